//! A random load on disks, recorded from outside, and the means to judge a journal and a replica by it.
//!
//! 1. [`Shape::operations`] makes a list of operations from a seed; every 512 bytes of every write say which
//!    write they belong to ([`content`]).
//! 2. [`run`] carries the list out on [`Disk`]s at a given depth and logs when each operation was submitted and
//!    when it was acknowledged.
//! 3. [`order::of_journal`] finds out which operation each record of a journal is, and proves that the journal
//!    holds each one once (whole, or in parts), in an order that agrees with every pair of which one was acknowledged before the
//!    other was submitted.
//! 4. Only then is that order the truth: [`history::History`] tells the content of any range after any number
//!    of its operations.

pub mod content;
pub mod disk;
pub mod history;
pub mod nbd;
pub mod order;
pub mod rng;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use content::SECTOR_BYTES;
pub use disk::Disk;
use rng::Rng;

use crate::vm::Guest;

/// What a load is to look like.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Shape {
    /// The same seed makes the same operations.
    pub seed: u64,
    /// How many operations.
    pub operations: usize,
    /// The disks' sizes, in bytes; multiples of `block_bytes`.
    pub sizes_bytes: Vec<u64>,
    /// The smallest unit of I/O, in bytes: 512 or 4096, say.
    pub block_bytes: u64,
    /// The most blocks in one write, zero or discard. Most operations have far fewer.
    pub blocks_max: u64,
    /// Of 100 operations, how many are zeroes (discards, flushes); the rest are writes.
    pub zeroes_percent: u64,
    /// See `zeroes_percent`; 0 for disks that do not take discards.
    pub discards_percent: u64,
    /// See `zeroes_percent`.
    pub flushes_percent: u64,
    /// Half of the operations go to the first `hot_bytes` of a disk, so that many overlap in flight.
    pub hot_bytes: u64,
}

/// A load for the program `workload`, which puts it on the disks of this machine or of a guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Job {
    /// The load.
    pub shape: Shape,
    /// Block devices or files, one for each of the shape's sizes.
    pub disks: Vec<PathBuf>,
    /// How many operations are under way at a time.
    pub depth: usize,
    /// When to stop if the operations last longer.
    pub seconds_max: Option<u64>,
}

impl Job {
    /// Carries the job out in a guest, where `program` is the path of the program `workload`.
    pub fn run_in(&self, guest: &Guest, program: &str, timeout: Duration) -> Result<Log> {
        let output = guest.start(&[program], serde_json::to_vec(self)?, timeout)?.wait()?;
        if !output.success() {
            bail!("the load in the guest failed: {}", output.error_text());
        }
        serde_json::from_slice(&output.stdout.0).context("the load in the guest left no log")
    }
}

/// What an operation does. Offsets and lengths are multiples of 512 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Action {
    /// Write content that carries the operation's number.
    Write {
        /// Where it starts.
        offset_bytes: u64,
        /// Its length.
        length_bytes: u64,
    },
    /// Write zeroes.
    Zero {
        /// Where it starts.
        offset_bytes: u64,
        /// Its length.
        length_bytes: u64,
    },
    /// Discard; the range reads as zeroes afterwards.
    Discard {
        /// Where it starts.
        offset_bytes: u64,
        /// Its length.
        length_bytes: u64,
    },
    /// Make everything acknowledged so far durable.
    Flush,
}

impl Action {
    /// The offset and the length, in bytes, of what it changes.
    pub fn range(self) -> Option<(u64, u64)> {
        match self {
            Action::Write { offset_bytes, length_bytes }
            | Action::Zero { offset_bytes, length_bytes }
            | Action::Discard { offset_bytes, length_bytes } => Some((offset_bytes, length_bytes)),
            Action::Flush => None,
        }
    }
}

/// One operation. Its number is its index in the list of operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operation {
    /// The index of the disk.
    pub disk: usize,
    /// What it does.
    pub action: Action,
}

/// A moment of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// The place in the total order of all submissions and acknowledgements.
    pub event: u64,
    /// The time since the run's start, in nanoseconds.
    pub time_ns: u64,
}

/// What happened to one operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The operation.
    pub operation: Operation,
    /// Taken before the operation was handed to the disk.
    pub submitted: Moment,
    /// Taken after the disk had acknowledged it; none if it failed.
    pub acknowledged: Option<Moment>,
    /// The error, if it failed.
    pub error: Option<String>,
}

/// What happened in a run: an entry per operation that was submitted, by its number. Operations that a stop
/// kept from being submitted are missing at the end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Log {
    /// The entries; an operation's number is its index.
    pub entries: Vec<Entry>,
}

impl Log {
    /// The first error of a disk, if there was any.
    pub fn error(&self) -> Option<&str> {
        self.entries.iter().find_map(|entry| entry.error.as_deref())
    }
}

impl Shape {
    /// Makes the operations. No two zeroes or discards of a disk have the same range, nor have their parts, so
    /// that a journal's records can be told apart.
    pub fn operations(&self) -> Result<Vec<Operation>> {
        let whole = |size: &u64| *size > 0 && size.is_multiple_of(self.block_bytes);
        if self.sizes_bytes.is_empty()
            || !self.block_bytes.is_multiple_of(SECTOR_BYTES)
            || !self.sizes_bytes.iter().all(whole)
            || self.blocks_max == 0
        {
            bail!("a shape needs disks of whole blocks, and blocks of whole sectors: {self:?}");
        }
        let mut rng = Rng::new(self.seed);
        let mut cleared = std::collections::HashSet::new();
        let mut operations = Vec::with_capacity(self.operations);
        while operations.len() < self.operations {
            let operation = self.operation(&mut rng);
            let ranges = match operation.action {
                Action::Zero { offset_bytes, length_bytes }
                | Action::Discard { offset_bytes, length_bytes } => {
                    order::clear_ranges((offset_bytes, length_bytes))
                }
                _ => Vec::new(),
            };
            let keys: Vec<_> = ranges.iter().map(|range| (operation.disk, *range)).collect();
            if !keys.iter().any(|key| cleared.contains(key)) {
                cleared.extend(keys);
                operations.push(operation);
            }
        }
        Ok(operations)
    }

    fn operation(&self, rng: &mut Rng) -> Operation {
        let disk = usize::try_from(rng.below(self.sizes_bytes.len() as u64)).unwrap_or(0);
        let size_blocks = self.sizes_bytes.get(disk).map_or(1, |size| size / self.block_bytes);
        let kind = rng.below(100);
        if kind < self.flushes_percent {
            return Operation { disk, action: Action::Flush };
        }
        // Half are one block, the rest of any length.
        let blocks = if rng.below(2) == 0 { 1 } else { 1 + rng.below(self.blocks_max) };
        let blocks = blocks.min(size_blocks);
        let hot_blocks = (self.hot_bytes / self.block_bytes).clamp(blocks, size_blocks);
        let within = if rng.below(2) == 0 { hot_blocks } else { size_blocks };
        let offset_bytes = rng.below(within - blocks + 1) * self.block_bytes;
        let length_bytes = blocks * self.block_bytes;
        let action = match kind - self.flushes_percent {
            kind if kind < self.zeroes_percent => Action::Zero { offset_bytes, length_bytes },
            kind if kind < self.zeroes_percent + self.discards_percent => {
                Action::Discard { offset_bytes, length_bytes }
            }
            _ => Action::Write { offset_bytes, length_bytes },
        };
        Operation { disk, action }
    }
}

/// Carries out the operations on the disks, `depth` of them at a time, each submitted as soon as there is
/// room, until all are done or `stop` is set.
pub fn run(disks: &[&dyn Disk], operations: &[Operation], depth: usize, stop: &AtomicBool) -> Log {
    go_on(Log::default(), disks, operations, depth, stop)
}

/// Goes on with a load whose first operations have been carried out, as the log says.
pub fn go_on(
    mut log: Log,
    disks: &[&dyn Disk],
    operations: &[Operation],
    depth: usize,
    stop: &AtomicBool,
) -> Log {
    let next = AtomicUsize::new(log.entries.len());
    // An operation has two moments.
    let events = AtomicU64::new(2 * log.entries.len() as u64);
    let clock = Clock { start: Instant::now(), events };
    let done = Mutex::new(Vec::with_capacity(operations.len()));
    thread::scope(|scope| {
        for _ in 0..depth.max(1) {
            scope.spawn(|| {
                let mut buffer = disk::Buffer::default();
                while !stop.load(Ordering::Relaxed) {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some(&operation) = operations.get(number) else { break };
                    let entry = carry_out(disks, number, operation, &clock, &mut buffer);
                    done.lock().unwrap_or_else(PoisonError::into_inner).push((number, entry));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    // Every number below the highest was taken by some thread, which finished it.
    done.sort_by_key(|(number, _)| *number);
    log.entries.extend(done.into_iter().map(|(_, entry)| entry));
    log
}

struct Clock {
    start: Instant,
    events: AtomicU64,
}

impl Clock {
    fn now(&self) -> Moment {
        let event = self.events.fetch_add(1, Ordering::SeqCst);
        let time_ns = u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        Moment { event, time_ns }
    }
}

fn carry_out(
    disks: &[&dyn Disk],
    number: usize,
    operation: Operation,
    clock: &Clock,
    buffer: &mut disk::Buffer,
) -> Entry {
    let disk = disks[operation.disk];
    if let Action::Write { offset_bytes, length_bytes } = operation.action {
        content::fill(number, offset_bytes, buffer.bytes(length_bytes));
    }
    let submitted = clock.now();
    let result = match operation.action {
        Action::Write { offset_bytes, length_bytes } => {
            disk.write(offset_bytes, buffer.bytes(length_bytes))
        }
        Action::Zero { offset_bytes, length_bytes } => disk.zero(offset_bytes, length_bytes),
        Action::Discard { offset_bytes, length_bytes } => disk.discard(offset_bytes, length_bytes),
        Action::Flush => disk.flush(),
    };
    let acknowledged = clock.now();
    match result {
        Ok(()) => Entry { operation, submitted, acknowledged: Some(acknowledged), error: None },
        Err(error) => {
            Entry { operation, submitted, acknowledged: None, error: Some(error.to_string()) }
        }
    }
}

#[cfg(test)]
mod tests;
