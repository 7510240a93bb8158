//! What a daemon that sits below filesystems must ask of the kernel for itself.
//!
//! None of it is fatal where it is not allowed (containers, an unprivileged demonstration): each
//! step returns a [`Warning`] for the caller to log.

pub mod fdstore;
pub mod priority;

use std::fmt;
use std::io;

/// A protection that could not be had, and what that means.
#[derive(Debug)]
pub struct Warning {
    /// What was tried.
    pub what: &'static str,
    /// What may happen without it.
    pub risk: &'static str,
    /// Why it failed.
    pub source: io::Error,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}: {}; {}", self.what, self.source, self.risk)
    }
}

/// Takes all the precautions of this module. Call it before any thread or ring is made: what they
/// inherit is decided here.
///
/// Nothing here is wanted of a process that serves no kernel device.
#[must_use]
pub fn settle_below_filesystems() -> Vec<Warning> {
    let tried = [
        (
            "mark this process as serving writeback (PR_SET_IO_FLUSHER)",
            "under memory pressure it may wait for writes that wait for it",
            become_io_flusher(),
        ),
        (
            "keep this process in memory (mlockall)",
            "its pages may be on the disk it serves when they are needed",
            lock_memory(),
        ),
        (
            "exempt this process from the OOM killer",
            "the disks it serves stall if it is killed",
            avoid_oom_kill(),
        ),
        (
            "have a mount namespace of its own",
            "it may hang at exit on a filesystem that it serves itself",
            own_mount_namespace(),
        ),
    ];
    let warning = |(what, risk, outcome): (_, _, io::Result<()>)| {
        outcome.err().map(|source| Warning { what, risk, source })
    };
    tried.into_iter().filter_map(warning).collect()
}

/// Memory this process and its future threads allocate does not wait for I/O, and their writes are
/// not throttled behind those they serve. Needs CAP_SYS_RESOURCE and Linux 5.6.
///
/// # Errors
/// `EPERM`, or `EINVAL` on older kernels.
pub fn become_io_flusher() -> io::Result<()> {
    // SAFETY: takes numbers only.
    answer(unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) })
}

/// Keeps all pages, once touched, in memory. Untouched ones (thread stacks, reserves) cost nothing.
///
/// # Errors
/// `EPERM` unless the process may lock without limit: under a limit, later allocations would fail.
pub fn lock_memory() -> io::Result<()> {
    let (limit, _) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_MEMLOCK)?;
    if limit != libc::RLIM_INFINITY && !may(CAP_IPC_LOCK) {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    let flags = libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT;
    // SAFETY: takes flags only.
    answer(unsafe { libc::mlockall(flags) })
}

/// Sets the OOM score to -1000: never chosen.
///
/// # Errors
/// `EACCES` without CAP_SYS_RESOURCE.
pub fn avoid_oom_kill() -> io::Result<()> {
    std::fs::write("/proc/self/oom_score_adj", "-1000")
}

/// Leaves the mount namespace of those who mount our devices. Unmounts there still reach us, so that
/// we do not keep a filesystem alive; mounts made here stay here. For the calling thread and those
/// it starts later.
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN.
pub fn own_mount_namespace() -> io::Result<()> {
    use nix::mount::{MsFlags, mount};
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)?;
    Ok(())
}

/// `linux/prctl.h`; the libc crate does not have it.
const PR_SET_IO_FLUSHER: i32 = 57;
/// `linux/capability.h`.
const CAP_IPC_LOCK: u32 = 14;

/// Whether a capability is effective, from `/proc/self/status`.
fn may(capability: u32) -> bool {
    let Ok(status) = std::fs::read_to_string("/proc/self/status") else { return false };
    effective(&status).is_some_and(|set| set >> capability & 1 == 1)
}

fn effective(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

fn answer(rc: i32) -> io::Result<()> {
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn effective_capabilities_are_read() {
        let status = "Name:\tx\nCapPrm:\t000001ffffffffff\nCapEff:\t0000000000004000\n";
        assert_eq!(effective(status), Some(1 << CAP_IPC_LOCK));
        assert_eq!(effective("Name:\tx\n"), None);
    }

    #[test]
    fn a_warning_is_a_sentence_with_the_risk() {
        let warning = Warning {
            what: "keep this process in memory (mlockall)",
            risk: "its pages may be on the disk it serves",
            source: io::Error::from_raw_os_error(libc::EPERM),
        };
        assert_eq!(
            warning.to_string(),
            "cannot keep this process in memory (mlockall): Operation not permitted (os error 1); \
             its pages may be on the disk it serves"
        );
    }

    #[test]
    fn a_forked_child_settles_or_says_why_not() {
        // In a child, for the effects last as long as the process.
        // SAFETY: the child runs only async-signal-tolerant code of ours and `_exit`s; the test
        // harness's other threads do not exist in it. Its allocations may deadlock only if another
        // thread holds the allocator's lock, which glibc's fork takes care of.
        match unsafe { nix::unistd::fork() }.unwrap() {
            nix::unistd::ForkResult::Child => {
                let namespace = std::fs::read_link("/proc/self/ns/mnt").ok();
                let warnings = settle_below_filesystems();
                let moved = std::fs::read_link("/proc/self/ns/mnt").ok() != namespace;
                let warned = warnings.iter().any(|w| w.what.contains("namespace"));
                let oom = std::fs::read_to_string("/proc/self/oom_score_adj").unwrap_or_default();
                let exempt = oom.trim() == "-1000";
                let oom_warned = warnings.iter().any(|w| w.what.contains("OOM"));
                let code = i32::from(moved == warned) + 2 * i32::from(exempt == oom_warned);
                // SAFETY: leaves the child without running the harness's exit handlers.
                unsafe { libc::_exit(code) }
            }
            nix::unistd::ForkResult::Parent { child } => {
                use nix::sys::wait::{WaitStatus, waitpid};
                assert_eq!(waitpid(child, None).unwrap(), WaitStatus::Exited(child, 0));
            }
        }
    }
}
