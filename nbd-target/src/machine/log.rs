//! The files that a log's owner writes: past the page cache, by the seam's io_uring.

use std::{io, path::Path};

use tidemark_link::seam::{self, AlignedBuf, How};

use super::Machine;

/// A file of a log's owner.
pub enum LogFile {
    /// One of this machine's.
    Real(seam::File),
    /// One on a simulated disk, and the machine it belongs to.
    #[cfg(feature = "simulation")]
    Simulated(tidemark_simdisk::SimFile, std::sync::Arc<super::simulated::Simulated>),
}

impl LogFile {
    /// Opens a file; see [`seam::File::open`].
    ///
    /// # Errors
    /// Those of open(2).
    pub async fn open(machine: &Machine, path: &Path, how: How) -> io::Result<LogFile> {
        match machine {
            Machine::Real => seam::File::open(path, how).await.map(LogFile::Real),
            #[cfg(feature = "simulation")]
            Machine::Simulated(simulated) => {
                simulated.dawdle().await;
                let file = simulated.open_log(path, how)?;
                Ok(LogFile::Simulated(file, std::sync::Arc::clone(simulated)))
            }
        }
    }

    /// Writes the whole buffer at `offset` and gives it back.
    ///
    /// # Errors
    /// Those of pwrite(2); some of the bytes may have been written.
    pub async fn write_all_at(
        &self,
        buffer: AlignedBuf,
        offset: u64,
    ) -> (io::Result<()>, AlignedBuf) {
        match self {
            LogFile::Real(file) => file.write_all_at(buffer, offset).await,
            #[cfg(feature = "simulation")]
            LogFile::Simulated(file, simulated) => {
                simulated.dawdle().await;
                (file.write_at(buffer.as_slice(), offset), buffer)
            }
        }
    }

    /// Has what was asked for so far be on its way: a caller that has work of its own meanwhile calls this first.
    ///
    /// # Errors
    /// The io_uring's.
    pub async fn submit(&self) -> io::Result<()> {
        match self {
            LogFile::Real(_) => seam::submit().await,
            #[cfg(feature = "simulation")]
            LogFile::Simulated(_, simulated) => {
                simulated.dawdle().await;
                Ok(())
            }
        }
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// Those of fdatasync(2), which are final for this file.
    pub async fn sync_data(&self) -> io::Result<()> {
        match self {
            LogFile::Real(file) => file.sync_data().await,
            #[cfg(feature = "simulation")]
            LogFile::Simulated(file, simulated) => {
                simulated.dawdle().await;
                file.sync()
            }
        }
    }

    /// Sets disk space aside and makes the file at least that long. Says whether the file system
    /// can do that.
    ///
    /// # Errors
    /// Those of fallocate(2).
    pub async fn preallocate(&self, offset: u64, bytes: u64) -> io::Result<bool> {
        match self {
            LogFile::Real(file) => file.preallocate(offset, bytes).await,
            #[cfg(feature = "simulation")]
            LogFile::Simulated(file, simulated) => {
                simulated.dawdle().await;
                file.preallocate(offset, bytes).map(|()| true)
            }
        }
    }
}

/// Makes the names in a directory durable, without holding the owner's thread up.
///
/// # Errors
/// Those of open(2) and fsync(2).
pub async fn sync_dir(machine: &Machine, dir: &Path) -> io::Result<()> {
    match machine {
        Machine::Real => seam::sync_dir(dir).await,
        #[cfg(feature = "simulation")]
        Machine::Simulated(simulated) => {
            simulated.dawdle().await;
            simulated.disk.sync_dir(dir)
        }
    }
}
