//! A thread's share of the processors (nice(1)), for threads that may let others go first.

use std::io;

/// What the kernel calls a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThreadId(libc::id_t);

/// The usual niceness, and that of threads that let others go first: a tenth of the share.
const USUAL: i32 = 0;
const BEHIND: i32 = 10;

/// The calling thread.
pub fn this_thread() -> ThreadId {
    // SAFETY: takes nothing and cannot fail.
    let id = unsafe { libc::gettid() };
    ThreadId(id.unsigned_abs())
}

/// Has a thread of this process let others go first, or ends that.
///
/// # Errors
/// `EACCES` where it is to end and [`may_return`] is false; `ESRCH` when the thread has ended.
pub fn let_others_first(thread: ThreadId, behind: bool) -> io::Result<()> {
    let nice = if behind { BEHIND } else { USUAL };
    // SAFETY: takes numbers only.
    super::answer(unsafe { libc::setpriority(libc::PRIO_PROCESS, thread.0, nice) })
}

/// Whether a thread that has let others go first can have its usual share again. Others than root need a
/// limit for it (`LimitNICE=+0` in a unit).
pub fn may_return() -> bool {
    let limit = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NICE);
    // The limit is kept as 20 less the niceness.
    let limited = limit.is_ok_and(|(soft, _)| soft.cast_signed() >= i64::from(20 - USUAL));
    limited || super::may(CAP_SYS_NICE)
}

/// `linux/capability.h`.
const CAP_SYS_NICE: u32 = 23;

#[cfg(test)]
mod tests {
    use super::*;

    fn niceness(thread: ThreadId) -> i32 {
        // SAFETY: takes numbers only.
        unsafe { libc::getpriority(libc::PRIO_PROCESS, thread.0) }
    }

    #[test]
    fn a_thread_alone_steps_back_and_returns() {
        let outer = this_thread();
        std::thread::spawn(move || {
            let before = niceness(outer);
            let_others_first(this_thread(), true).unwrap();
            assert_eq!(niceness(this_thread()), BEHIND);
            assert_eq!(niceness(outer), before);
            assert_eq!(let_others_first(this_thread(), false).is_ok(), may_return());
        })
        .join()
        .unwrap();
    }
}
