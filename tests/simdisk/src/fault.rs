//! Faults: by chance, or at a stated place.

use std::io;

/// The numbers of Linux's errors.
pub mod errno {
    /// No such file.
    pub const ENOENT: i32 = 2;
    /// The disk failed.
    pub const EIO: i32 = 5;
    /// It is there already.
    pub const EEXIST: i32 = 17;
    /// The disk is full.
    pub const ENOSPC: i32 = 28;
}

/// What can be made to fail, and what is counted as an effect (all but reads and opening).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// Reading a file.
    Read,
    /// Writing to a file.
    Write,
    /// Syncing a file.
    Sync,
    /// Setting room aside.
    Preallocate,
    /// Changing a file's length, or punching a hole.
    Resize,
    /// Opening a file that is there.
    Open,
    /// Making a file or a directory.
    Create,
    /// Renaming a file.
    Rename,
    /// Removing a file or a directory.
    Remove,
    /// Syncing a directory.
    SyncDir,
}

/// How many times in a million something goes wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Faults {
    /// A read fails.
    pub read_fails: u32,
    /// A write fails; some of its sectors may have been written.
    pub write_fails: u32,
    /// A sync fails; what it was to make durable is there or not, and no later sync brings it back.
    pub sync_fails: u32,
    /// A sector is said to be written and is not.
    pub write_is_lost: u32,
    /// A sector is said to be written and has landed on another of the same file.
    pub write_lands_elsewhere: u32,
}

/// One operation that is to fail.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Planned {
    pub op: Op,
    pub part: String,
    pub passes: u32,
    pub errno: i32,
}

impl Planned {
    /// Counts an operation; true if this is the one.
    pub fn meets(&mut self, op: Op, path: &str) -> bool {
        if self.op != op || !path.contains(&self.part) {
            return false;
        }
        if self.passes > 0 {
            self.passes -= 1;
            return false;
        }
        true
    }
}

pub(crate) fn error(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}
