//! Starts QEMU so that it never outlives the process that runs the tests.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread;

/// Starts `command` with `keep` open in it, to be killed when this process dies.
///
/// The kernel kills such a child when the *thread* that started it ends. Tests run in threads that come and
/// go, so one thread that stays starts all.
pub fn start(mut command: Command, keep: Vec<Arc<OwnedFd>>) -> io::Result<Child> {
    static STARTER: OnceLock<Sender<Box<dyn FnOnce() + Send>>> = OnceLock::new();
    let starter = STARTER.get_or_init(|| {
        let (sender, requests) = channel::<Box<dyn FnOnce() + Send>>();
        thread::spawn(move || requests.into_iter().for_each(|request| request()));
        sender
    });
    let kept: Vec<RawFd> = keep.iter().map(|descriptor| descriptor.as_raw_fd()).collect();
    // SAFETY: between fork and exec the closure only makes system calls, which need no memory or locks;
    // the descriptors are open, since `keep` lives until the command has been started.
    unsafe {
        command.pre_exec(move || {
            let inherit = |&kept: &RawFd| libc::fcntl(kept, libc::F_SETFD, 0) < 0;
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) < 0 || kept.iter().any(inherit) {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let (sender, result) = channel();
    let request = Box::new(move || {
        let child = command.spawn();
        drop(keep);
        // The receiver waits below.
        let _ = sender.send(child);
    });
    let gone = || io::Error::other("the thread that starts emulators is gone");
    starter.send(request).map_err(|_| gone())?;
    result.recv().map_err(|_| gone())?
}
