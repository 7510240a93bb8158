//! Log and spool files.

use std::{
    cell::Cell,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
};

use tokio_uring::buf::BoundedBuf;

use super::aligned::{AlignedBuf, Handed};

/// How a file is opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct How {
    /// It can be written to; else only read.
    pub write: bool,
    /// It is made, and must not be there yet.
    pub create_new: bool,
    /// Past the page cache, where the filesystem can do that (see [`File::is_direct`]).
    pub direct: bool,
}

impl How {
    /// For reading.
    pub const READ: How = How { write: false, create_new: false, direct: false };
    /// A new file that is written past the page cache.
    pub const NEW_DIRECT: How = How { write: true, create_new: true, direct: true };
    /// A file that is there already, written past the page cache.
    pub const WRITE_DIRECT: How = How { write: true, create_new: false, direct: true };
}

/// A file of the streaming path.
///
/// A failed sync is final: what the kernel dropped then cannot be known, so every later write and
/// sync of this file fails too, and the file must be recovered from media or from the peer.
pub struct File {
    file: tokio_uring::fs::File,
    path: PathBuf,
    direct: bool,
    fenced: Cell<bool>,
}

impl File {
    /// Opens a file; a new one can be read and written by its owner and read by its group. Of a new
    /// file, the directory must be synced too ([`sync_dir`]) before it is sure to be found again.
    ///
    /// # Errors
    /// Those of open(2), with the path.
    pub async fn open(path: &Path, how: How) -> io::Result<File> {
        let open = async |direct: bool| {
            let mut options = tokio_uring::fs::OpenOptions::new();
            options.read(true).write(how.write).create_new(how.create_new).mode(0o640);
            options.custom_flags(if direct { libc::O_DIRECT } else { 0 });
            options.open(path).await
        };
        let mut direct = how.direct;
        let mut opened = open(direct).await;
        if direct && opened.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::EINVAL)) {
            // A filesystem without direct I/O may have made the file before it said so.
            direct = false;
            if how.create_new {
                let _ = std::fs::remove_file(path);
            }
            opened = open(direct).await;
        }
        let file = opened.map_err(|error| at(path, "open", error))?;
        Ok(File { file, path: path.to_owned(), direct, fenced: Cell::new(false) })
    }

    /// Whether it goes past the page cache: then offsets and lengths must be multiples of 4096.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes the whole buffer at `offset` and gives it back.
    ///
    /// # Errors
    /// Those of pwrite(2), with the path; some of the bytes may have been written.
    pub async fn write_all_at(
        &self,
        buffer: AlignedBuf,
        offset: u64,
    ) -> (io::Result<()>, AlignedBuf) {
        if let Err(error) = self.check_fence() {
            return (Err(error), buffer);
        }
        let (result, handed) = self.file.write_all_at(Handed(buffer), offset).await;
        (result.map_err(|error| at(&self.path, "write", error)), handed.0)
    }

    /// Reads at `offset` until the buffer's whole length is filled or the file ends, and says how
    /// many bytes were read.
    ///
    /// # Errors
    /// Those of pread(2), with the path.
    pub async fn read_at(
        &self,
        buffer: AlignedBuf,
        offset: u64,
    ) -> (io::Result<usize>, AlignedBuf) {
        let bytes = buffer.len();
        let (mut handed, mut done) = (Handed(buffer), 0);
        while done < bytes {
            let (result, slice) =
                self.file.read_at(handed.slice(done..bytes), offset + done as u64).await;
            handed = slice.into_inner();
            match result {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(error) => return (Err(at(&self.path, "read", error)), handed.0),
            }
            // The end of a file read directly comes as a length that is no multiple of a block;
            // there is nothing after it, and a read from there would not be aligned.
            if self.direct && !done.is_multiple_of(super::BLOCK_BYTES) {
                break;
            }
        }
        (Ok(done), handed.0)
    }

    /// Makes what was written durable (fdatasync).
    ///
    /// # Errors
    /// Those of fdatasync(2), with the path. They are final for this file.
    pub async fn sync_data(&self) -> io::Result<()> {
        self.check_fence()?;
        self.file.sync_data().await.map_err(|error| {
            self.fenced.set(true);
            at(&self.path, "sync", error)
        })
    }

    /// Sets disk space aside and makes the file at least that long. Says whether the filesystem can
    /// do that.
    ///
    /// # Errors
    /// Those of fallocate(2), with the path: above all, no room.
    pub async fn preallocate(&self, offset: u64, bytes: u64) -> io::Result<bool> {
        match self.file.fallocate(offset, bytes, 0).await {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(false),
            Err(error) => Err(at(&self.path, "set space aside for", error)),
        }
    }

    /// Cuts the file, or lets it end in a hole.
    ///
    /// # Errors
    /// Those of ftruncate(2), with the path.
    pub fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.check_fence()?;
        // SAFETY: the descriptor is open as long as `self.file`, which outlives the call.
        let fd = unsafe { BorrowedFd::borrow_raw(self.file.as_raw_fd()) };
        let length = bytes.try_into().map_err(io::Error::other)?;
        nix::unistd::ftruncate(fd, length).map_err(|error| at(&self.path, "cut", error.into()))
    }

    fn check_fence(&self) -> io::Result<()> {
        if self.fenced.get() {
            let error = io::Error::other("an earlier sync failed, so its content is unknown");
            return Err(at(&self.path, "go on with", error));
        }
        Ok(())
    }
}

/// Makes the names in a directory durable (fsync): needed after a file was made, renamed or
/// removed in it.
///
/// # Errors
/// Those of open(2) and fsync(2), with the path.
pub async fn sync_dir(path: &Path) -> io::Result<()> {
    let directory =
        tokio_uring::fs::File::open(path).await.map_err(|error| at(path, "open", error))?;
    directory.sync_all().await.map_err(|error| at(path, "sync", error))
}

fn at(path: &Path, what: &str, error: io::Error) -> io::Error {
    io::Error::new(
        error.kind(),
        WithPath { text: format!("cannot {what} {}", path.display()), error },
    )
}

/// An error with the file it concerns; the original stays reachable as its source.
#[derive(Debug, thiserror::Error)]
#[error("{text}: {error}")]
struct WithPath {
    text: String,
    #[source]
    error: io::Error,
}
