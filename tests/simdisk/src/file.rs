//! Open files.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::disk::SimDisk;

/// How a file is opened. It can always be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum How {
    /// It is there; only read.
    Read,
    /// It is there; read and written.
    Write,
    /// It is made if it is not there.
    Create,
    /// It is made if it is not there, and emptied if it is.
    Truncate,
    /// It is made, and must not be there yet.
    New,
}

/// An open file. Clones are the same open file.
#[derive(Clone)]
pub struct SimFile {
    pub(crate) disk: SimDisk,
    pub(crate) path: PathBuf,
    pub(crate) number: u64,
    pub(crate) life: u64,
    pub(crate) writable: bool,
    /// As long as it lives, the file takes room without a name too.
    pub(crate) _open: Arc<()>,
}

impl SimFile {
    /// The path by which it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads from `offset` on until `out` is full or the file ends; how many bytes it was.
    ///
    /// # Errors
    /// `EIO`, by fault or because the power is off.
    pub fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<usize> {
        self.disk.read(self, out, offset)
    }

    /// Writes all of `bytes` at `offset`; the file becomes longer where it must.
    ///
    /// # Errors
    /// `EIO` or `ENOSPC`; some of it may have been written.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.disk.write(self, bytes, offset)
    }

    /// Makes all that was written, and its length, durable. Not its name.
    ///
    /// # Errors
    /// `EIO`; what was to become durable is then there or not, for good.
    pub fn sync(&self) -> io::Result<()> {
        self.disk.sync(self)
    }

    /// Its length in bytes.
    ///
    /// # Errors
    /// `EIO` when the power is off.
    pub fn length(&self) -> io::Result<u64> {
        self.disk.length(self)
    }

    /// Cuts it, or lets it end in a hole.
    ///
    /// # Errors
    /// `EIO`.
    pub fn set_length(&self, bytes: u64) -> io::Result<()> {
        self.disk.set_length(self, bytes)
    }

    /// Sets room aside and makes the file at least that long.
    ///
    /// # Errors
    /// `ENOSPC`, with nothing done, or `EIO`.
    pub fn preallocate(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.disk.preallocate(self, offset, bytes)
    }

    /// Makes a range inside the file read as zeros and gives its whole blocks back.
    ///
    /// # Errors
    /// `EIO`.
    pub fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.disk.punch(self, offset, bytes)
    }
}
