//! Disks with a volatile cache, as real drives have one, for tests that cut the power.
//!
//! A disk is two files: what a reader sees, and what would be left without power. A write changes the first
//! alone; a flush brings the second up to it; a cut lets a random part of the sectors in between through, each
//! of 512 bytes by itself, and undoes the others. A sector that is written again before it was flushed may have
//! been let through in its older form. The disks are served over NBD on a Unix socket, as drives of a guest.
//!
//! A disk can also be told to lie: it says yes to flushes and does nothing, and what was written becomes durable
//! only some seconds later. That is how a test shows that a flush is needed.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::Bytes;
use tidemark_nbd::{
    BlockSizes, BoxFuture, Buffer, Chunk, ClientInfo, Errno, Error, Export, ExportEntry,
    ExportInfo, Exports, Features, Limits, Listener, OpenError, Purpose, Reply, Server,
};
use tokio::runtime::Runtime;

use crate::vm::Disk;
use crate::workload::rng::Rng;

mod sectors;

use sectors::Sectors;

const SECTOR_BYTES: u64 = 512;
/// A write to a disk that lies is durable after one to two of these.
const LIE_HALF: Duration = Duration::from_secs(4);

/// Some disks and their server, which ends with this.
pub struct VolatileDisks {
    disks: Vec<(String, Arc<VolatileDisk>)>,
    socket: PathBuf,
    _runtime: Runtime,
}

impl VolatileDisks {
    /// Disks of zeros with these names and sizes in bytes, their files in `directory`, served at `socket`. All
    /// that is random about them follows from the seed.
    pub fn start(
        directory: &Path,
        socket: &Path,
        sizes: &[(&str, u64)],
        seed: u64,
    ) -> Result<VolatileDisks> {
        let mut disks = Vec::new();
        for (index, (name, bytes)) in sizes.iter().enumerate() {
            let disk = VolatileDisk::new(directory, name, *bytes, seed + index as u64);
            disks.push(((*name).to_owned(), Arc::new(disk.context("cannot make a disk")?)));
        }
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let listener = runtime.block_on(Listener::unix(socket, 0o600))?;
        let server = Server::new(Arc::new(ByName(disks.clone())), Limits::default());
        runtime.spawn(async move { server.serve(listener).await });
        Ok(VolatileDisks { disks, socket: socket.to_owned(), _runtime: runtime })
    }

    /// A guest's drive; the name is its serial number as well.
    pub fn drive(&self, name: &str) -> Disk {
        Disk::nbd(&self.socket, name, name)
    }

    /// The file of this machine that has what a reader of the disk sees.
    pub fn file(&self, name: &str) -> Result<&Path> {
        Ok(&self.disk(name)?.path)
    }

    /// What has been written so far is durable, flushed or not.
    pub fn settle(&self) -> Result<()> {
        self.disks.iter().try_for_each(|(_, disk)| Ok(disk.state().settle()?))
    }

    /// From now on the disk ignores flushes.
    pub fn ignore_flushes(&self, name: &str) -> Result<()> {
        let mut state = self.disk(name)?.state();
        let aging = Sectors::new(state.sectors);
        state.lie = Some(Lie { aging, since: Instant::now() });
        Ok(())
    }

    /// Cuts the power of the disks with these names, whose users must be dead: requests that are still on the
    /// way are lost. Says what was kept.
    pub fn cut(&self, names: &[&str]) -> Result<String> {
        let mut said = Vec::new();
        for name in names {
            let (kept, lost) = self.disk(name)?.state().cut()?;
            said.push(format!("{name}: {kept} of {} unflushed sectors kept", kept + lost));
        }
        Ok(said.join(", "))
    }

    fn disk(&self, name: &str) -> Result<&VolatileDisk> {
        let found = self.disks.iter().find(|(own, _)| own == name);
        Ok(&found.with_context(|| format!("there is no disk {name}"))?.1)
    }
}

struct VolatileDisk {
    path: PathBuf,
    bytes: u64,
    state: Mutex<State>,
}

struct State {
    /// What a reader sees.
    seen: File,
    /// What is left without power.
    durable: File,
    sectors: u64,
    /// Where the two may differ.
    unflushed: Sectors,
    lie: Option<Lie>,
    /// Counts the cuts: who connected before the last one is dead.
    life: u64,
    rng: Rng,
}

struct Lie {
    /// What was unflushed when the half began: durable when it ends.
    aging: Sectors,
    since: Instant,
}

impl VolatileDisk {
    fn new(directory: &Path, name: &str, bytes: u64, seed: u64) -> io::Result<VolatileDisk> {
        let path = directory.join(format!("{name}.img"));
        let make = |path: &Path| {
            let file = File::options().read(true).write(true).create_new(true).open(path)?;
            file.set_len(bytes).map(|()| file)
        };
        let sectors = bytes / SECTOR_BYTES;
        let state = State {
            seen: make(&path)?,
            durable: make(&directory.join(format!("{name}.durable.img")))?,
            sectors,
            unflushed: Sectors::new(sectors),
            lie: None,
            life: 0,
            rng: Rng::new(seed),
        };
        Ok(VolatileDisk { path, bytes, state: Mutex::new(state) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn write(&mut self, offset: u64, data: &[u8], fua: bool) -> io::Result<()> {
        self.age()?;
        let (first, end) = (offset / SECTOR_BYTES, (offset + data.len() as u64) / SECTOR_BYTES);
        // The cache may have let an older form through on its own account.
        let older: Vec<u64> = self.unflushed.within(first, end).collect();
        for sector in older {
            if self.rng.below(2) == 0 {
                copy(&self.seen, &self.durable, sector, 1)?;
            }
        }
        self.seen.write_all_at(data, offset)?;
        self.unflushed.set(first, end);
        if fua && self.lie.is_none() {
            copy(&self.seen, &self.durable, first, end - first)?;
            self.unflushed.clear(first, end);
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.age()?;
        if self.lie.is_some() { Ok(()) } else { self.settle() }
    }

    fn settle(&mut self) -> io::Result<()> {
        for (first, end) in self.unflushed.take_runs() {
            copy(&self.seen, &self.durable, first, end - first)?;
        }
        Ok(())
    }

    /// On a disk that lies, what was written a while ago becomes durable.
    fn age(&mut self) -> io::Result<()> {
        let Some(lie) = &mut self.lie else { return Ok(()) };
        if lie.since.elapsed() < LIE_HALF {
            return Ok(());
        }
        for (first, end) in lie.aging.take_runs() {
            copy(&self.seen, &self.durable, first, end - first)?;
            self.unflushed.clear(first, end);
        }
        lie.aging = self.unflushed.clone();
        lie.since = Instant::now();
        Ok(())
    }

    fn cut(&mut self) -> io::Result<(u64, u64)> {
        self.age()?;
        self.life += 1;
        // Sometimes nearly all is kept, sometimes nearly nothing.
        let percent = self.rng.below(101);
        let (mut kept, mut lost) = (0, 0);
        for (first, end) in self.unflushed.take_runs() {
            for sector in first..end {
                if self.rng.below(100) < percent {
                    copy(&self.seen, &self.durable, sector, 1)?;
                    kept += 1;
                } else {
                    copy(&self.durable, &self.seen, sector, 1)?;
                    lost += 1;
                }
            }
        }
        if let Some(lie) = &mut self.lie {
            lie.aging = Sectors::new(self.sectors);
        }
        Ok((kept, lost))
    }
}

/// Copies sectors from one file to the same place of another.
fn copy(from: &File, to: &File, first: u64, count: u64) -> io::Result<()> {
    let mut buffer = vec![0; (count * SECTOR_BYTES).min(1 << 20) as usize];
    let (mut at, end) = (first * SECTOR_BYTES, (first + count) * SECTOR_BYTES);
    while at < end {
        let piece = buffer.len().min((end - at) as usize);
        from.read_exact_at(&mut buffer[..piece], at)?;
        to.write_all_at(&buffer[..piece], at)?;
        at += piece as u64;
    }
    Ok(())
}

/// Finds the disks for the server.
struct ByName(Vec<(String, Arc<VolatileDisk>)>);

impl Exports for ByName {
    fn list<'a>(&'a self, _: &'a ClientInfo) -> BoxFuture<'a, Vec<ExportEntry>> {
        let entry = |name: &String| ExportEntry { name: name.clone(), ..ExportEntry::default() };
        Box::pin(async move { self.0.iter().map(|(name, _)| entry(name)).collect() })
    }

    fn open<'a>(
        &'a self,
        name: &'a str,
        _: Purpose,
        _: &'a ClientInfo,
    ) -> BoxFuture<'a, Result<Arc<dyn Export>, OpenError>> {
        Box::pin(async move {
            let found = self.0.iter().find(|(own, _)| own == name);
            let (_, disk) = found.ok_or_else(|| OpenError::unavailable("there is no such disk"))?;
            let life = disk.state().life;
            Ok(Arc::new(Connected { disk: Arc::clone(disk), life }) as Arc<dyn Export>)
        })
    }
}

/// A disk as somebody has it who connected in one of its lives.
struct Connected {
    disk: Arc<VolatileDisk>,
    life: u64,
}

impl Connected {
    fn with<T>(&self, work: impl FnOnce(&mut State) -> io::Result<T>) -> Reply<T> {
        let mut state = self.disk.state();
        if state.life != self.life {
            return Reply::error(Error::new(Errno::Io, "the power was cut"));
        }
        Reply::result(work(&mut state).map_err(Error::from))
    }
}

impl Export for Connected {
    fn info(&self) -> ExportInfo {
        let sector = SECTOR_BYTES as u32;
        ExportInfo {
            size: self.disk.bytes,
            block_sizes: BlockSizes { minimum: sector, ..BlockSizes::default() },
            features: Features { flush: true, fua: true, ..Features::default() },
            ..ExportInfo::default()
        }
    }

    fn read(self: Arc<Self>, offset: u64, length: u32) -> Reply<Vec<Chunk>> {
        self.with(|state| {
            let mut bytes = vec![0; length as usize];
            state.seen.read_exact_at(&mut bytes, offset)?;
            Ok(vec![Chunk::Data(Bytes::from(bytes))])
        })
    }

    fn write(self: Arc<Self>, offset: u64, data: Buffer, fua: bool) -> Reply<()> {
        self.with(|state| state.write(offset, &data, fua))
    }

    fn flush(self: Arc<Self>) -> Reply<()> {
        self.with(State::flush)
    }
}

#[cfg(test)]
mod tests;
