//! The state directory as the rest sees it: a few named files of whole blocks. A simulator puts a
//! disk of its own in the place of the real one.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// Named files on stable storage. What is written is durable after a sync of its file, a new or
/// replaced name after a sync of the directory.
pub trait StateDisk: Send {
    /// Opens a file for blocks that are written in place, and makes it at least so long with zeros,
    /// durably. All of it is written once, so that later writes change no metadata of the file
    /// system and cannot fail for want of room.
    ///
    /// # Errors
    /// The disk's.
    fn open(&mut self, name: &str, bytes: u64) -> io::Result<()>;

    /// All of a file's content; none if there is no such file.
    ///
    /// # Errors
    /// The disk's.
    fn read(&mut self, name: &str) -> io::Result<Option<Vec<u8>>>;

    /// Writes into an opened file.
    ///
    /// # Errors
    /// The disk's.
    fn write_at(&mut self, name: &str, bytes: &[u8], at: u64) -> io::Result<()>;

    /// Makes durable what was written to an opened file.
    ///
    /// # Errors
    /// The disk's. It is final for the file.
    fn sync(&mut self, name: &str) -> io::Result<()>;

    /// Makes a file with this content, durable but for its name; one that is there is emptied first.
    ///
    /// # Errors
    /// The disk's.
    fn create(&mut self, name: &str, bytes: &[u8]) -> io::Result<()>;

    /// Gives a file another's name.
    ///
    /// # Errors
    /// The disk's.
    fn rename(&mut self, from: &str, to: &str) -> io::Result<()>;

    /// Makes names durable.
    ///
    /// # Errors
    /// The disk's.
    fn sync_names(&mut self) -> io::Result<()>;
}

/// A directory of the file system.
pub struct StateDir {
    dir: PathBuf,
    files: BTreeMap<String, File>,
}

impl StateDir {
    /// A directory that is there.
    pub fn new(dir: &Path) -> StateDir {
        StateDir { dir: dir.to_owned(), files: BTreeMap::new() }
    }

    fn file(&self, name: &str) -> io::Result<&File> {
        self.files.get(name).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
    }

    /// Takes an opened file for this process alone.
    ///
    /// # Errors
    /// Another process has it.
    pub fn lock(&self, name: &str) -> io::Result<()> {
        self.file(name)?.try_lock().map_err(io::Error::from)
    }
}

impl StateDisk for StateDir {
    fn open(&mut self, name: &str, bytes: u64) -> io::Result<()> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(self.dir.join(name))?;
        let mut at = file.metadata()?.len();
        let zeros = vec![0; 1 << 20];
        while at < bytes {
            let piece = zeros.len().min((bytes - at) as usize);
            file.write_all_at(&zeros[..piece], at)?;
            at += piece as u64;
        }
        file.sync_all()?;
        self.files.insert(name.to_owned(), file);
        Ok(())
    }

    fn read(&mut self, name: &str) -> io::Result<Option<Vec<u8>>> {
        match fs::read(self.dir.join(name)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn write_at(&mut self, name: &str, bytes: &[u8], at: u64) -> io::Result<()> {
        self.file(name)?.write_all_at(bytes, at)
    }

    fn sync(&mut self, name: &str) -> io::Result<()> {
        self.file(name)?.sync_data()
    }

    fn create(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let file = File::create(self.dir.join(name))?;
        file.write_all_at(bytes, 0)?;
        file.sync_all()
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.dir.join(from), self.dir.join(to))
    }

    fn sync_names(&mut self) -> io::Result<()> {
        File::open(&self.dir).and_then(|dir| dir.sync_all())
    }
}
