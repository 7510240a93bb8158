//! Errors that say that there is too little of something at present.

use std::io;

/// Whether an error says that the file system is full.
pub fn no_room(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Whether an error is about what there is too little of at present. What comes of a sync is never
/// asked here: its failure is final (invariant 7).
pub(super) fn passing(error: &io::Error) -> bool {
    let scarce = matches!(errno(error), Some(libc::ENOMEM | libc::EAGAIN));
    no_room(error) || out_of_files(error) || scarce
}

/// Whether there are too many open files: only opening one gives this.
fn out_of_files(error: &io::Error) -> bool {
    matches!(errno(error), Some(libc::EMFILE | libc::ENFILE))
}

/// The error of a directory's sync, which does not pass; that it could not be opened may.
pub(super) fn final_sync(error: io::Error) -> io::Error {
    if out_of_files(&error) { error } else { io::Error::other(error.to_string()) }
}

/// The number of an error, which may be wrapped.
fn errno(error: &io::Error) -> Option<i32> {
    let inner = || std::error::Error::source(error)?.downcast_ref::<io::Error>()?.raw_os_error();
    error.raw_os_error().or_else(inner)
}
