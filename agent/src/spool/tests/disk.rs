//! A disk in memory with a volatile cache: what was written and not synced may be lost, in sectors.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, MutexGuard},
};

use crate::{
    dirty::tests::random::Random,
    spool::media::{Media, MediaFile},
};

const SECTOR_BYTES: usize = 512;

/// A file: as it is on the medium, and as it is read.
#[derive(Clone, Default)]
struct File {
    durable: Vec<u8>,
    cached: Vec<u8>,
}

#[derive(Default)]
struct State {
    files: BTreeMap<String, File>,
    /// Files that were removed, which a power cut may bring back.
    removed: BTreeMap<String, File>,
    fail_sync: bool,
    fail_write: bool,
    fail_create: bool,
}

/// A directory on the disk. Clones are the same one.
#[derive(Clone, Default)]
pub struct Disk(Arc<Mutex<State>>);

struct Handle(Disk, String);

impl Disk {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub fn fail_next_sync(&self) {
        self.state().fail_sync = true;
    }

    pub fn fail_next_write(&self) {
        self.state().fail_write = true;
    }

    pub fn fail_next_create(&self) {
        self.state().fail_create = true;
    }

    pub fn bytes(&self) -> u64 {
        self.state().files.values().map(|file| file.cached.len() as u64).sum()
    }

    pub fn flip(&self, name: &str, at: usize) {
        let mut state = self.state();
        let file = state.files.get_mut(name).unwrap();
        file.cached[at] ^= 4;
        file.durable[at] ^= 4;
    }

    /// The power goes: of what was not synced, a random part of the sectors is there afterwards.
    pub fn cut_power(&self, random: &mut Random) {
        let mut state = self.state();
        (state.fail_sync, state.fail_write, state.fail_create) = (false, false, false);
        for (name, file) in std::mem::take(&mut state.removed) {
            if random.below(2) == 0 {
                state.files.entry(name).or_insert(file);
            }
        }
        for file in state.files.values_mut() {
            let File { durable, cached } = file;
            durable.resize(cached.len(), 0);
            for (old, new) in durable.chunks_mut(SECTOR_BYTES).zip(cached.chunks(SECTOR_BYTES)) {
                if random.below(2) == 0 {
                    old.copy_from_slice(new);
                }
            }
            cached.clone_from(durable);
        }
    }
}

fn failed<T>() -> io::Result<T> {
    Err(io::Error::other("as asked for"))
}

impl Media for Disk {
    fn names(&self) -> io::Result<Vec<String>> {
        Ok(self.state().files.keys().cloned().collect())
    }

    fn create(&self, name: &str, bytes: u64) -> io::Result<Box<dyn MediaFile>> {
        let mut state = self.state();
        if std::mem::take(&mut state.fail_create) {
            return failed();
        }
        let zeros = vec![0; bytes as usize];
        let file = File { durable: zeros.clone(), cached: zeros };
        state.files.insert(name.to_owned(), file);
        state.removed.clear();
        Ok(Box::new(Handle(self.clone(), name.to_owned())))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn MediaFile>> {
        if !self.state().files.contains_key(name) {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(Box::new(Handle(self.clone(), name.to_owned())))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut state = self.state();
        let file = state.files.remove(name).ok_or(io::ErrorKind::NotFound)?;
        state.removed.insert(name.to_owned(), file);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.state().removed.clear();
        Ok(())
    }
}

impl Handle {
    fn with<T>(&self, work: impl FnOnce(&mut File) -> T) -> io::Result<T> {
        let mut state = self.0.state();
        // A file that was removed goes on for who has it open.
        let (files, removed) = {
            let State { files, removed, .. } = &mut *state;
            (files, removed)
        };
        let file = files.get_mut(&self.1).or_else(|| removed.get_mut(&self.1));
        Ok(work(file.ok_or(io::ErrorKind::NotFound)?))
    }
}

impl MediaFile for Handle {
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        assert!(offset.is_multiple_of(4096) && bytes.len().is_multiple_of(4096));
        let fails = std::mem::take(&mut self.0.state().fail_write);
        let written = if fails { bytes.len() / 2 } else { bytes.len() };
        self.with(|file| {
            let end = offset as usize + bytes.len();
            if file.cached.len() < end {
                file.cached.resize(end, 0);
            }
            file.cached[offset as usize..][..written].copy_from_slice(&bytes[..written]);
        })?;
        if fails { failed() } else { Ok(()) }
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        assert!(offset.is_multiple_of(4096) && into.len().is_multiple_of(4096));
        self.with(|file| {
            let from = file.cached.get(offset as usize..).unwrap_or_default();
            let bytes = from.len().min(into.len());
            into[..bytes].copy_from_slice(&from[..bytes]);
            bytes
        })
    }

    fn sync(&self) -> io::Result<()> {
        if std::mem::take(&mut self.0.state().fail_sync) {
            return failed();
        }
        self.with(|file| file.durable.clone_from(&file.cached))
    }

    fn bytes(&self) -> io::Result<u64> {
        self.with(|file| file.cached.len() as u64)
    }

    fn cut(&self, bytes: u64) -> io::Result<()> {
        self.with(|file| file.cached.resize(bytes as usize, 0))
    }
}
