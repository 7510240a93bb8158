//! The agent's spool on a simulated disk.

use std::{io, path::PathBuf};

use tidemark_agent::spool::{
    Limits,
    media::{Media, MediaFile},
};
use tidemark_simdisk::{How, Rng, SimDisk, SimFile};

const DIR: &str = "/spool";
/// A spool that is seldom full, in segments of which there are several.
pub const LIMITS: Limits = Limits { bytes_max: 8 << 20, segment_bytes: 256 << 10 };

/// A directory on the disk.
pub struct SimSpool(SimDisk);

/// A file in it.
struct Segment(SimFile);

fn path(name: &str) -> PathBuf {
    PathBuf::from(DIR).join(name)
}

impl SimSpool {
    /// The directory; made if it is not there.
    ///
    /// # Errors
    /// The disk's.
    pub fn new(disk: &SimDisk) -> io::Result<SimSpool> {
        disk.create_dir_all(&PathBuf::from(DIR))?;
        disk.sync_dir(&PathBuf::from("/"))?;
        Ok(SimSpool(disk.clone()))
    }
}

/// A bit of a segment rots.
pub fn rot(disk: &SimDisk, rng: &mut Rng) {
    let files = disk.list(&PathBuf::from(DIR)).unwrap_or_default();
    let files: Vec<_> = files.into_iter().filter(|file| file.bytes > 0).collect();
    if let Some(file) = files.get(rng.below(files.len().max(1) as u64) as usize) {
        // Mostly near the beginning, where there is something.
        let within = [file.bytes, file.bytes.min(40_000)][rng.below(2) as usize];
        disk.rot(&path(&file.name), rng.below(within * 8)).expect("it is there");
    }
}

impl Media for SimSpool {
    fn names(&self) -> io::Result<Vec<String>> {
        Ok(self.0.list(&PathBuf::from(DIR))?.into_iter().map(|entry| entry.name).collect())
    }

    fn create(&self, name: &str, bytes: u64) -> io::Result<Box<dyn MediaFile>> {
        if self.0.exists(&path(name)) {
            self.0.remove_file(&path(name))?;
        }
        let file = self.0.open(&path(name), How::New)?;
        file.preallocate(0, bytes).and_then(|()| file.sync()).and_then(|()| Media::sync(self))?;
        Ok(Box::new(Segment(file)))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn MediaFile>> {
        Ok(Box::new(Segment(self.0.open(&path(name), How::Write)?)))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.0.remove_file(&path(name))
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_dir(&PathBuf::from(DIR))
    }
}

impl MediaFile for Segment {
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_at(bytes, offset)
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        self.0.read_at(into, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }

    fn bytes(&self) -> io::Result<u64> {
        self.0.length()
    }

    fn cut(&self, bytes: u64) -> io::Result<()> {
        self.0.set_length(bytes)
    }
}
