//! The agent's state directory on a simulated disk, of which one half may go bad.

use std::{io, path::PathBuf};

use tidemark_agent::state::disk::StateDisk;
use tidemark_simdisk::{How, Rng, SimDisk, SimFile};

/// Where it is.
pub const DIR: &str = "/state";
/// The files of which there is one for each copy.
const TERMS: [&str; 2] = ["terms.json", "terms.copy.json"];
/// How many of 100 writes of a copy that is rotten go astray.
const ASTRAY_PERCENT: u64 = 3;

/// One of the two copies of what the state holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Copy {
    /// The first half of a file of blocks, and the first of two files.
    First,
    /// The others.
    Second,
}

/// Files opened on the disk.
pub struct SimState {
    disk: SimDisk,
    files: std::collections::BTreeMap<String, SimFile>,
    rotten: Option<Copy>,
    rng: Rng,
}

impl SimState {
    /// The directory; made if it is not there.
    ///
    /// # Errors
    /// The disk's.
    pub fn new(disk: &SimDisk, rotten: Option<Copy>, rng: Rng) -> io::Result<SimState> {
        disk.create_dir_all(&PathBuf::from(DIR))?;
        disk.sync_dir(&PathBuf::from("/"))?;
        Ok(SimState { disk: disk.clone(), files: Default::default(), rotten, rng })
    }

    fn file(&self, name: &str) -> io::Result<&SimFile> {
        self.files.get(name).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
    }

    /// Where a write to the rotten copy goes instead; `Some(None)` is nowhere.
    fn astray(&mut self, copy: Copy, half: u64, bytes: u64) -> Option<Option<u64>> {
        if self.rotten != Some(copy) || self.rng.below(100) >= ASTRAY_PERCENT {
            return None;
        }
        let from = if copy == Copy::First { 0 } else { half };
        let sectors = (half - bytes) / 512 + 1;
        Some((self.rng.below(2) == 0).then(|| from + self.rng.below(sectors) * 512))
    }
}

fn path(name: &str) -> PathBuf {
    PathBuf::from(DIR).join(name)
}

/// In one copy of what is on the disk, each block of a file rots at one bit.
pub fn rot(disk: &SimDisk, copy: Copy, rng: &mut Rng) {
    let files = disk.list(&PathBuf::from(DIR)).unwrap_or_default();
    let in_copy = |name: &str| match TERMS.iter().position(|terms| *terms == name) {
        Some(place) => (place == copy as usize).then_some((0, 1)),
        None if name == "state" || name.ends_with(".log") || name.ends_with(".map") => {
            Some((copy as u64, 2))
        }
        None => None,
    };
    let files: Vec<_> = files
        .iter()
        .filter_map(|file| in_copy(&file.name).map(|(part, parts)| (file, part, parts)))
        .filter(|(file, ..)| file.bytes > 0)
        .collect();
    if files.is_empty() {
        return;
    }
    let (file, part, parts) = files[rng.below(files.len() as u64) as usize];
    let bytes = file.bytes / parts;
    let mut at = part * bytes;
    let end = at + bytes;
    while at < end {
        let here = (end - at).min(4096);
        // A block's head is where it says what it is.
        let within = [here, here.min(200)][rng.below(2) as usize];
        let bit = (at + rng.below(within)) * 8 + rng.below(8);
        disk.rot(&path(&file.name), bit).expect("it is there");
        at += here;
    }
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
        let half = self.file(name)?.length()? / 2;
        let copy = if at < half { Copy::First } else { Copy::Second };
        match self.astray(copy, half, bytes.len() as u64) {
            None => self.file(name)?.write_at(bytes, at),
            Some(Some(elsewhere)) => self.file(name)?.write_at(bytes, elsewhere),
            Some(None) => Ok(()),
        }
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
