//! A machine that is played: a simulated disk, and time and chance that follow from a seed.

use std::{
    io,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use tidemark_journal::TermId;
use tidemark_link::seam;
use tidemark_simdisk::{self as simdisk, Rng, SimDisk, SimFile};
use tokio::time::Instant;

use super::{DirEntry, file::How};

/// A played machine, for one life of a target. Lives inside one tokio runtime whose clock stands.
pub struct Simulated {
    /// Its disk.
    pub disk: SimDisk,
    rng: Mutex<Rng>,
    began: Instant,
    wall_ns: AtomicI64,
}

impl Simulated {
    /// A machine with this disk whose wall clock shows `wall_ns` now. To be made inside its runtime.
    pub fn new(disk: SimDisk, seed: u64, wall_ns: i64) -> Arc<Simulated> {
        let (rng, began) = (Mutex::new(Rng::new(seed)), Instant::now());
        Arc::new(Simulated { disk, rng, began, wall_ns: AtomicI64::new(wall_ns) })
    }

    /// Sets the wall clock forward or back.
    pub fn step_wall(&self, by_ns: i64) {
        self.wall_ns.fetch_add(by_ns, Ordering::Relaxed);
    }

    pub(super) fn wall_ns(&self) -> i64 {
        let passed = i64::try_from(self.began.elapsed().as_nanos()).unwrap_or(i64::MAX);
        self.wall_ns.load(Ordering::Relaxed).saturating_add(passed)
    }

    /// As much as has passed in its runtime.
    pub(super) fn boot_ns(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    pub(super) fn new_term(&self) -> TermId {
        let mut rng = self.rng();
        let mut id = [0; 16];
        id[..8].copy_from_slice(&rng.next_u64().to_le_bytes());
        id[8..].copy_from_slice(&rng.next_u64().to_le_bytes());
        TermId(id)
    }

    /// Lets others have their turn, as an operation under way does; now and then for long.
    pub(super) async fn dawdle(&self) {
        let choice = self.rng().below(8);
        match choice {
            0..6 => tokio::task::yield_now().await,
            6 => tokio::time::sleep(Duration::from_millis(1)).await,
            _ => {
                let ms = self.rng().below(20);
                tokio::time::sleep(Duration::from_millis(ms)).await;
            }
        }
    }

    pub(super) fn open(&self, path: &Path, how: How) -> io::Result<SimFile> {
        let how = match how {
            How::Read => simdisk::How::Read,
            How::Write => simdisk::How::Write,
            How::Truncate => simdisk::How::Truncate,
        };
        self.disk.open(path, how)
    }

    pub(super) fn open_log(&self, path: &Path, how: seam::How) -> io::Result<SimFile> {
        let how = match how {
            seam::How { create_new: true, .. } => simdisk::How::New,
            seam::How { write: true, .. } => simdisk::How::Write,
            _ => simdisk::How::Read,
        };
        self.disk.open(path, how)
    }

    pub(super) fn list(&self, dir: &Path) -> io::Result<Vec<DirEntry>> {
        let entries = self.disk.list(dir)?.into_iter();
        Ok(entries.map(|entry| DirEntry { name: entry.name, is_dir: entry.is_dir }).collect())
    }

    pub(super) fn open_database(
        &self,
        path: &Path,
        builder: &redb::Builder,
    ) -> Result<redb::Database, redb::Error> {
        let file = self.disk.open(path, simdisk::How::Create)?;
        Ok(builder.create_with_backend(Storage(file))?)
    }

    fn rng(&self) -> std::sync::MutexGuard<'_, Rng> {
        self.rng.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The catalogue's file.
struct Storage(SimFile);

impl std::fmt::Debug for Storage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Storage({})", self.0.path().display())
    }
}

impl redb::StorageBackend for Storage {
    fn len(&self) -> io::Result<u64> {
        self.0.length()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        match self.0.read_at(out, offset)? {
            bytes if bytes == out.len() => Ok(()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_length(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_at(data, offset)
    }
}
