//! The agent's state directory on a simulated disk.

use std::{io, path::PathBuf};

use tidemark_agent::state::disk::StateDisk;
use tidemark_simdisk::{How, SimDisk, SimFile};

/// Where it is.
pub const DIR: &str = "/state";

/// Files opened on the disk.
pub struct SimState {
    disk: SimDisk,
    files: std::collections::BTreeMap<String, SimFile>,
}

impl SimState {
    /// The directory; made if it is not there.
    ///
    /// # Errors
    /// The disk's.
    pub fn new(disk: &SimDisk) -> io::Result<SimState> {
        disk.create_dir_all(&PathBuf::from(DIR))?;
        disk.sync_dir(&PathBuf::from("/"))?;
        Ok(SimState { disk: disk.clone(), files: Default::default() })
    }

    fn file(&self, name: &str) -> io::Result<&SimFile> {
        self.files.get(name).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
    }
}

fn path(name: &str) -> PathBuf {
    PathBuf::from(DIR).join(name)
}

impl StateDisk for SimState {
    fn open(&mut self, name: &str, bytes: u64) -> io::Result<()> {
        let file = self.disk.open(&path(name), How::Create)?;
        let length = file.length()?;
        if length < bytes {
            file.write_at(&vec![0; (bytes - length) as usize], length)?;
        }
        file.sync()?;
        self.files.insert(name.to_owned(), file);
        Ok(())
    }

    fn read(&mut self, name: &str) -> io::Result<Option<Vec<u8>>> {
        if !self.disk.exists(&path(name)) {
            return if self.disk.is_off() { Err(io::Error::other("off")) } else { Ok(None) };
        }
        let file = self.disk.open(&path(name), How::Read)?;
        let mut bytes = vec![0; file.length()? as usize];
        file.read_at(&mut bytes, 0)?;
        Ok(Some(bytes))
    }

    fn write_at(&mut self, name: &str, bytes: &[u8], at: u64) -> io::Result<()> {
        self.file(name)?.write_at(bytes, at)
    }

    fn sync(&mut self, name: &str) -> io::Result<()> {
        self.file(name)?.sync()
    }

    fn create(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let file = self.disk.open(&path(name), How::Truncate)?;
        file.write_at(bytes, 0)?;
        file.sync()
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        self.disk.rename(&path(from), &path(to))
    }

    fn sync_names(&mut self) -> io::Result<()> {
        self.disk.sync_dir(&PathBuf::from(DIR))
    }
}
