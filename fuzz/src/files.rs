//! Files in memory: what a directory of the agent is made of, and how it is read back.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tidemark_agent::spool::media::{Media, MediaFile};
use tidemark_agent::state::disk::StateDisk;

/// Files by name. Clones are the same.
#[derive(Clone, Default)]
pub struct Files(Arc<Mutex<BTreeMap<String, Vec<u8>>>>);

impl Files {
    /// Puts a file there.
    pub fn put(&self, name: &str, content: Vec<u8>) {
        self.lock().insert(name.to_owned(), content);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, name: &str, change: impl FnOnce(&mut Vec<u8>) -> T) -> io::Result<T> {
        self.lock().get_mut(name).map(change).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

/// Writes at a place; the file becomes longer where it must.
fn write(file: &mut Vec<u8>, bytes: &[u8], at: u64) {
    let at = at as usize;
    file.resize(file.len().max(at + bytes.len()), 0);
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

impl StateDisk for Files {
    fn open(&mut self, name: &str, bytes: u64) -> io::Result<()> {
        let mut files = self.lock();
        let file = files.entry(name.to_owned()).or_default();
        file.resize(file.len().max(bytes as usize), 0);
        Ok(())
    }

    fn read(&mut self, name: &str) -> io::Result<Option<Vec<u8>>> {
        Ok(self.lock().get(name).cloned())
    }

    fn write_at(&mut self, name: &str, bytes: &[u8], at: u64) -> io::Result<()> {
        self.with(name, |file| write(file, bytes, at))
    }

    fn sync(&mut self, _: &str) -> io::Result<()> {
        Ok(())
    }

    fn create(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.put(name, bytes.to_vec());
        Ok(())
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        let content = self.lock().remove(from).ok_or(io::ErrorKind::NotFound)?;
        self.put(to, content);
        Ok(())
    }

    fn sync_names(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Media for Files {
    fn names(&self) -> io::Result<Vec<String>> {
        Ok(self.lock().keys().cloned().collect())
    }

    fn create(&self, name: &str, _: u64) -> io::Result<Box<dyn MediaFile>> {
        self.put(name, Vec::new());
        Media::open(self, name)
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn MediaFile>> {
        Ok(Box::new(Open { files: self.clone(), name: name.to_owned() }))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.lock().remove(name).map(drop).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

struct Open {
    files: Files,
    name: String,
}

impl MediaFile for Open {
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.files.with(&self.name, |file| write(file, bytes, offset))
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        self.files.with(&self.name, |file| {
            let from = file.get(offset as usize..).unwrap_or_default();
            let bytes = from.len().min(into.len());
            into[..bytes].copy_from_slice(&from[..bytes]);
            bytes
        })
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn bytes(&self) -> io::Result<u64> {
        self.files.with(&self.name, |file| file.len() as u64)
    }

    fn cut(&self, bytes: u64) -> io::Result<()> {
        self.files.with(&self.name, |file| file.resize(bytes as usize, 0))
    }
}
