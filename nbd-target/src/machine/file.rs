//! Open files.

use std::{
    fs::{self, OpenOptions},
    io,
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::Path,
};

/// How a file is opened. It can always be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum How {
    /// It is there; only read.
    Read,
    /// It is there; read and written.
    Write,
    /// It is made if it is not there, and emptied if it is.
    Truncate,
}

/// An open file.
pub enum File {
    /// One of this machine's.
    Real(fs::File),
    /// One on a simulated disk.
    #[cfg(feature = "simulation")]
    Simulated(tidemark_simdisk::SimFile),
}

pub(super) fn open(path: &Path, how: How) -> io::Result<fs::File> {
    let mut options = OpenOptions::new();
    options.read(true).write(how != How::Read);
    options.create(how == How::Truncate).truncate(how == How::Truncate).open(path)
}

impl File {
    /// Reads until the buffer is full or the file ends; the rest of the buffer is zeros. How many
    /// bytes it was.
    ///
    /// # Errors
    /// Those of pread(2).
    pub fn read_up_to(&self, out: &mut [u8], at: u64) -> io::Result<usize> {
        let have = match self {
            File::Real(file) => {
                let mut have = 0;
                while have < out.len() {
                    match file.read_at(&mut out[have..], at + have as u64) {
                        Ok(0) => break,
                        Ok(bytes) => have += bytes,
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        Err(error) => return Err(error),
                    }
                }
                have
            }
            #[cfg(feature = "simulation")]
            File::Simulated(file) => file.read_at(out, at)?,
        };
        out[have..].fill(0);
        Ok(have)
    }

    /// Reads the whole buffer.
    ///
    /// # Errors
    /// Those of pread(2), or that the file ends before.
    pub fn read_exact_at(&self, out: &mut [u8], at: u64) -> io::Result<()> {
        match self {
            File::Real(file) => file.read_exact_at(out, at),
            #[cfg(feature = "simulation")]
            File::Simulated(file) => match file.read_at(out, at)? {
                bytes if bytes == out.len() => Ok(()),
                _ => Err(io::ErrorKind::UnexpectedEof.into()),
            },
        }
    }

    /// Writes all of it.
    ///
    /// # Errors
    /// Those of pwrite(2).
    pub fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        match self {
            File::Real(file) => file.write_all_at(bytes, at),
            #[cfg(feature = "simulation")]
            File::Simulated(file) => file.write_at(bytes, at),
        }
    }

    /// Makes what was written durable (fdatasync).
    ///
    /// # Errors
    /// Those of fdatasync(2), which are final for this file.
    pub fn sync_data(&self) -> io::Result<()> {
        match self {
            File::Real(file) => file.sync_data(),
            #[cfg(feature = "simulation")]
            File::Simulated(file) => file.sync(),
        }
    }

    /// Makes what was written durable, with all that is known of the file (fsync).
    ///
    /// # Errors
    /// Those of fsync(2), which are final for this file.
    pub fn sync_all(&self) -> io::Result<()> {
        match self {
            File::Real(file) => file.sync_all(),
            #[cfg(feature = "simulation")]
            File::Simulated(file) => file.sync(),
        }
    }

    /// Its length in bytes.
    ///
    /// # Errors
    /// Those of fstat(2).
    pub fn length(&self) -> io::Result<u64> {
        match self {
            File::Real(file) => Ok(file.metadata()?.len()),
            #[cfg(feature = "simulation")]
            File::Simulated(file) => file.length(),
        }
    }

    /// Cuts it, or lets it end in a hole.
    ///
    /// # Errors
    /// Those of ftruncate(2).
    pub fn set_len(&self, bytes: u64) -> io::Result<()> {
        match self {
            File::Real(file) => file.set_len(bytes),
            #[cfg(feature = "simulation")]
            File::Simulated(file) => file.set_length(bytes),
        }
    }

    /// Sets room aside from the beginning and makes the file at least that long.
    ///
    /// # Errors
    /// Those of fallocate(2).
    pub fn preallocate(&self, bytes: u64) -> io::Result<()> {
        match self {
            File::Real(file) => fallocate(file, 0, 0, bytes),
            #[cfg(feature = "simulation")]
            File::Simulated(file) => file.preallocate(0, bytes),
        }
    }

    /// Makes a range read as zeros and gives its room back; the file is as long as before.
    ///
    /// # Errors
    /// Those of fallocate(2).
    pub fn punch(&self, at: u64, bytes: u64) -> io::Result<()> {
        let bytes = bytes.min(self.length()?.saturating_sub(at));
        if bytes == 0 {
            return Ok(());
        }
        match self {
            File::Real(file) => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                match fallocate(file, mode, at, bytes) {
                    Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                        zero(file, at, bytes)
                    }
                    done => done,
                }
            }
            #[cfg(feature = "simulation")]
            File::Simulated(file) => file.punch(at, bytes),
        }
    }

    /// Drops what the page cache has of a range.
    pub fn drop_cached(&self, at: u64, bytes: u64) {
        match self {
            File::Real(file) => {
                let (fd, at, bytes) = (file.as_raw_fd(), at as libc::off_t, bytes as libc::off_t);
                // SAFETY: a plain system call on an open descriptor; it touches no memory of ours.
                // Its failure only means that the pages stay.
                unsafe { libc::posix_fadvise(fd, at, bytes, libc::POSIX_FADV_DONTNEED) };
            }
            #[cfg(feature = "simulation")]
            File::Simulated(_) => {}
        }
    }
}

fn fallocate(file: &fs::File, mode: libc::c_int, at: u64, bytes: u64) -> io::Result<()> {
    let (at, bytes) = (at as libc::off_t, bytes as libc::off_t);
    // SAFETY: a plain system call on an open descriptor; it touches no memory of ours.
    match unsafe { libc::fallocate(file.as_raw_fd(), mode, at, bytes) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn zero(file: &fs::File, at: u64, bytes: u64) -> io::Result<()> {
    let zeros = vec![0; 1 << 20];
    let mut done = 0;
    while done < bytes {
        let step = (bytes - done).min(zeros.len() as u64);
        file.write_all_at(&zeros[..step as usize], at + done)?;
        done += step;
    }
    Ok(())
}
