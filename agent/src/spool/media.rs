//! Where the segments of a spool lie: a directory, or what a test puts in its place.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// A place for files. Errors name no file: the caller knows which it meant.
pub trait Media: Send + Sync {
    /// The names of all files in it.
    ///
    /// # Errors
    /// Those of the disk.
    fn names(&self) -> io::Result<Vec<String>>;

    /// Makes an empty file of which `bytes` are set aside, in place of one that has the name. It is
    /// found again after a power cut.
    ///
    /// # Errors
    /// Those of the disk: above all, no room.
    fn create(&self, name: &str, bytes: u64) -> io::Result<Box<dyn MediaFile>>;

    /// Opens a file.
    ///
    /// # Errors
    /// Those of the disk.
    fn open(&self, name: &str) -> io::Result<Box<dyn MediaFile>>;

    /// Removes a file. It may come back with a power cut, until [`Self::sync`].
    ///
    /// # Errors
    /// Those of the disk.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Makes removals durable.
    ///
    /// # Errors
    /// Those of the disk.
    fn sync(&self) -> io::Result<()>;
}

/// A file of a [`Media`]. Offsets, lengths and memory are multiples of 4096.
pub trait MediaFile: Send {
    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// Those of the disk; a part may have been written.
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Reads until `into` is full or the file ends; how many bytes that were.
    ///
    /// # Errors
    /// Those of the disk.
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<usize>;

    /// Makes what was written durable.
    ///
    /// # Errors
    /// Those of the disk. They are final for this file.
    fn sync(&self) -> io::Result<()>;

    /// Its length.
    ///
    /// # Errors
    /// Those of the disk.
    fn bytes(&self) -> io::Result<u64>;

    /// Cuts it to this length.
    ///
    /// # Errors
    /// Those of the disk.
    fn cut(&self, bytes: u64) -> io::Result<()>;
}

/// A directory of this machine.
pub struct Directory(PathBuf);

impl Directory {
    /// Opens it, and makes it if it is not there.
    ///
    /// # Errors
    /// Those of mkdir(2).
    pub fn open(path: &Path) -> io::Result<Directory> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        // What it lies in has to lead to it after a power cut.
        if let Some(parent) = path.parent() {
            File::open(parent)?.sync_all()?;
        }
        Ok(Directory(path.to_owned()))
    }
}

impl Media for Directory {
    fn names(&self) -> io::Result<Vec<String>> {
        let name = |entry: io::Result<fs::DirEntry>| {
            entry.map(|entry| entry.file_name().to_string_lossy().into_owned())
        };
        fs::read_dir(&self.0)?.map(name).collect()
    }

    fn create(&self, name: &str, bytes: u64) -> io::Result<Box<dyn MediaFile>> {
        let path = self.0.join(name);
        if let Err(error) = fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(error);
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).mode(0o600);
        let file = open_direct(&mut options, &path)?;
        let made =
            set_aside(&file, bytes).and_then(|()| file.sync_all()).and_then(|()| self.sync());
        if let Err(error) = made {
            // It takes room that others need, and holds nothing.
            let _ = fs::remove_file(&path);
            return Err(error);
        }
        Ok(Box::new(file))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn MediaFile>> {
        let mut options = OpenOptions::new();
        Ok(Box::new(open_direct(options.read(true).write(true), &self.0.join(name))?))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.0.join(name))
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.0)?.sync_all()
    }
}

impl MediaFile for File {
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        while let Some(rest) = into.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.read_at(rest, offset + done as u64) {
                Ok(0) => break,
                Ok(bytes) => done += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn bytes(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn cut(&self, bytes: u64) -> io::Result<()> {
        self.set_len(bytes)
    }
}

/// Past the page cache where the file system can do that: what is spooled is read once, much later.
fn open_direct(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    match options.custom_flags(libc::O_DIRECT).open(path) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            options.custom_flags(0).open(path)
        }
        opened => opened,
    }
}

fn set_aside(file: &File, bytes: u64) -> io::Result<()> {
    let length = bytes.try_into().map_err(io::Error::other)?;
    match nix::fcntl::fallocate(file, nix::fcntl::FallocateFlags::empty(), 0, length) {
        // Without it a later write may find no room, which is an error as any other.
        Ok(()) | Err(nix::errno::Errno::EOPNOTSUPP) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
