//! One file's content: what is on the disk, and what is only in memory.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use crate::{SECTOR_BYTES, rng::Rng};

pub(crate) type Sector = [u8; SECTOR_BYTES as usize];
/// The unit in which room is taken.
pub(crate) const BLOCK_BYTES: u64 = 4096;

/// A file's bytes. A sector that is not named holds zeros.
#[derive(Clone, Default)]
pub(crate) struct Bytes {
    pub length: u64,
    sectors: BTreeMap<u64, Arc<Sector>>,
    /// Blocks that have room on the disk.
    pub blocks: BTreeSet<u64>,
}

/// A change that is not durable yet.
#[derive(Clone)]
enum Change {
    /// One sector's new content.
    Sector(u64, Arc<Sector>),
    /// The file's new length.
    Length(u64),
    /// Room set aside for blocks from..to.
    Room(u64, u64),
    /// A hole over sectors from..to.
    Hole(u64, u64),
}

/// A file: what reads see, what the disk holds, and the changes between them in order.
#[derive(Clone, Default)]
pub(crate) struct Content {
    pub now: Bytes,
    disk: Bytes,
    pending: Vec<Change>,
}

impl Bytes {
    pub fn sector(&self, number: u64) -> Sector {
        self.sectors.get(&number).map_or([0; SECTOR_BYTES as usize], |sector| **sector)
    }

    fn apply(&mut self, change: &Change) {
        match change {
            Change::Sector(number, content) => {
                // Beyond a length that was not kept there is nothing.
                if number * SECTOR_BYTES < self.length {
                    self.sectors.insert(*number, Arc::clone(content));
                    self.blocks.insert(number * SECTOR_BYTES / BLOCK_BYTES);
                }
            }
            Change::Length(length) => {
                if *length < self.length {
                    self.sectors.split_off(&length.div_ceil(SECTOR_BYTES));
                    self.blocks.split_off(&length.div_ceil(BLOCK_BYTES));
                    let inside = (length % SECTOR_BYTES) as usize;
                    if inside > 0
                        && let Some(last) = self.sectors.get_mut(&(length / SECTOR_BYTES))
                    {
                        Arc::make_mut(last)[inside..].fill(0);
                    }
                }
                self.length = *length;
            }
            Change::Room(from, to) => self.blocks.extend(*from..*to),
            Change::Hole(from, to) => {
                let gone: Vec<u64> = self.sectors.range(from..to).map(|(n, _)| *n).collect();
                gone.iter().for_each(|number| {
                    self.sectors.remove(number);
                });
                let per_block = BLOCK_BYTES / SECTOR_BYTES;
                for block in from.div_ceil(per_block)..to / per_block {
                    self.blocks.remove(&block);
                }
            }
        }
    }

    pub fn flip(&mut self, bit: u64) {
        let (byte, bit) = (bit / 8, bit % 8);
        let zeros = || Arc::new([0; SECTOR_BYTES as usize]);
        let sector = self.sectors.entry(byte / SECTOR_BYTES).or_insert_with(zeros);
        Arc::make_mut(sector)[(byte % SECTOR_BYTES) as usize] ^= 1 << bit;
    }
}

impl Content {
    pub fn read(&self, offset: u64, out: &mut [u8]) -> usize {
        let have = self.now.length.saturating_sub(offset).min(out.len() as u64) as usize;
        let mut done = 0;
        while done < have {
            let at = offset + done as u64;
            let inside = (at % SECTOR_BYTES) as usize;
            let step = (SECTOR_BYTES as usize - inside).min(have - done);
            match self.now.sectors.get(&(at / SECTOR_BYTES)) {
                Some(sector) => {
                    out[done..done + step].copy_from_slice(&sector[inside..inside + step]);
                }
                None => out[done..done + step].fill(0),
            }
            done += step;
        }
        have
    }

    /// Puts one sector's content in place. The length is known to reach so far.
    pub fn put(&mut self, number: u64, content: Sector) {
        self.change(Change::Sector(number, Arc::new(content)));
    }

    pub fn set_length(&mut self, length: u64) {
        if length != self.now.length {
            self.change(Change::Length(length));
        }
    }

    /// Blocks of this range that have no room yet.
    pub fn missing_blocks(&self, from: u64, to: u64) -> u64 {
        to.saturating_sub(from) - self.now.blocks.range(from..to.max(from)).count() as u64
    }

    pub fn set_aside(&mut self, from: u64, to: u64) {
        self.change(Change::Room(from, to));
    }

    /// Makes whole sectors from..to a hole.
    pub fn punch(&mut self, from: u64, to: u64) {
        self.change(Change::Hole(from, to));
    }

    fn change(&mut self, change: Change) {
        self.now.apply(&change);
        self.pending.push(change);
    }

    /// Everything so far is durable.
    pub fn synced(&mut self) {
        for change in std::mem::take(&mut self.pending) {
            self.disk.apply(&change);
        }
    }

    /// The power goes: decides what of the changes the disk has kept.
    pub fn lose(&mut self, rng: &mut Rng) {
        let metadata = self.pending.iter().filter(|c| !matches!(c, Change::Sector(..))).count();
        let kept = rng.below(metadata as u64 + 1);
        self.keep_some(kept, rng);
    }

    /// A sync fails: decides what of the data the disk has kept. Reads go on to see all of it.
    pub fn sync_failed(&mut self, rng: &mut Rng) {
        self.keep_some(u64::MAX, rng);
    }

    fn keep_some(&mut self, mut kept_metadata: u64, rng: &mut Rng) {
        let per_million = *[0, 100_000, 500_000, 900_000, 1_000_000]
            .get(rng.below(5) as usize)
            .unwrap_or(&500_000);
        for change in std::mem::take(&mut self.pending) {
            let kept = match change {
                Change::Sector(..) => rng.chance(per_million),
                _ if kept_metadata > 0 => {
                    kept_metadata -= 1;
                    true
                }
                _ => false,
            };
            if kept {
                self.disk.apply(&change);
            }
        }
    }

    /// The power is back, or nothing hides what the disk has: that is what there is.
    pub fn restarted(&mut self) {
        self.now = self.disk.clone();
    }

    /// Flips a bit on the disk and in memory.
    pub fn flip(&mut self, bit: u64) {
        self.now.flip(bit);
        self.disk.flip(bit);
    }
}
