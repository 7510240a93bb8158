//! The bounded set of active regions and the log that keeps it.
//!
//! The log is a ring of 4 KiB blocks that is written in place. Each block is one transaction: the
//! slots that changed, then as many other slots as fit, taken in turn. So the newest
//! [`BLOCKS_NEEDED`] blocks restate every slot, and the block that a transaction overwrites holds
//! nothing that is still needed. A block that was torn by a power cut fails its checksum; no write
//! had been let through on its account.
//!
//! The file holds the ring twice. A block that has rotted, or was never written though the disk said
//! so, could not be told from one that was torn, and if it is the newest, the ring without it is whole:
//! its copy speaks for it.

use std::collections::HashMap;

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

use super::{BLOCK_BYTES, RegionId};
use crate::state::COUNT_MAX;
use tidemark_journal::{Seq, VolumeId, checksum::crc64};

/// Slots in the set: how many regions may be active at once.
pub const SLOTS: usize = 4096;
/// Blocks in the log's ring.
pub const BLOCKS: u64 = 64;
/// The most slots that one transaction changes.
pub const CHANGES_MAX: usize = 248;
/// Blocks that restate every slot, counted back from the newest.
pub const BLOCKS_NEEDED: u64 = (SLOTS / (ENTRIES - CHANGES_MAX)) as u64;
/// Bytes of the ring; the log file holds it twice, one copy after the other.
pub const LOG_BYTES: u64 = BLOCKS * BLOCK_BYTES as u64;

const ENTRIES: usize = 504;
const MAGIC: [u8; 4] = *b"TMAL";
const NO_REGION: u32 = u32::MAX;

const _: () = assert!(SLOTS.is_multiple_of(ENTRIES - CHANGES_MAX) && BLOCKS_NEEDED + 1 < BLOCKS);
const _: () = assert!(size_of::<Block>() == BLOCK_BYTES && SLOTS <= u16::MAX as usize);

/// A transaction of the log, one block. What identifies it comes first, the checksum closes the
/// head, and the slots fill the rest.
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 4 | magic `TMAL` |
/// | 4 | 2 | version, 1 |
/// | 6 | 2 | entries in use, 0 to 504 |
/// | 8 | 8 | transaction number, from 1; the block stands at this modulo 64 |
/// | 16 | 16 | id of the map, against blocks of an earlier life |
/// | 32 | 8 | first transaction of this life of the set: earlier blocks do not count |
/// | 40 | 16 | reserved, zero |
/// | 56 | 8 | CRC-64/NVME of the block with these eight bytes zero |
/// | 64 | 8 x 504 | entries: slot (2), volume (2), region (4; all ones: the slot is free) |
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Block {
    magic: [u8; 4],
    version: U16,
    entries_used: U16,
    transaction: U64,
    map_id: [u8; 16],
    first_transaction: U64,
    reserved: [u8; 16],
    crc: U64,
    entries: [Entry; ENTRIES],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Entry {
    slot: U16,
    volume: U16,
    region: U32,
}

/// What a slot holds.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    /// The region, if the slot is taken.
    pub region: Option<RegionId>,
    /// Requests that need the region to stay.
    pub users: u32,
    /// The last sequence drawn for a write into it.
    pub last_seq: Seq,
    /// Counts local completions; see [`super::map::DirtyMap::flush_begun`].
    pub last_tick: u64,
    referenced: bool,
    /// Whether the log says durably that the slot holds this region.
    durable: bool,
}

const FREE: Slot = Slot {
    region: None,
    users: 0,
    last_seq: Seq::ZERO,
    last_tick: 0,
    referenced: false,
    durable: false,
};

/// The set in memory.
pub struct ActiveSet {
    slots: Vec<Slot>,
    by_region: HashMap<RegionId, u16>,
    /// Slots that are taken: the first of them.
    limit: usize,
    hand: usize,
    map_id: [u8; 16],
    transaction: u64,
    first_transaction: u64,
    context_from: usize,
}

impl ActiveSet {
    /// An empty set that continues a log after `transaction`.
    pub fn new(map_id: [u8; 16], transaction: u64) -> ActiveSet {
        ActiveSet {
            slots: vec![FREE; SLOTS],
            by_region: HashMap::with_capacity(SLOTS * 2),
            limit: SLOTS,
            hand: 0,
            map_id,
            transaction,
            first_transaction: transaction + 1,
            context_from: 0,
        }
    }

    /// Keeps at most so many regions active, of [`SLOTS`]. One request may need as many as it has
    /// regions.
    ///
    /// # Panics
    /// When there would be none, or some are active.
    pub fn limit(&mut self, slots: usize) {
        assert!((1..=SLOTS).contains(&slots) && self.by_region.is_empty(), "a limit of {slots}");
        self.limit = slots;
    }

    /// The most regions that may be active.
    pub fn slots(&self) -> usize {
        self.limit
    }

    /// The slot of a region that is active durably.
    pub fn durable_slot(&self, region: RegionId) -> Option<u16> {
        let slot = *self.by_region.get(&region)?;
        self.slots[usize::from(slot)].durable.then_some(slot)
    }

    /// Whether the region is active or about to be.
    pub fn contains(&self, region: RegionId) -> bool {
        self.by_region.contains_key(&region)
    }

    /// A slot by its number.
    pub fn slot_mut(&mut self, slot: u16) -> &mut Slot {
        let slot = &mut self.slots[usize::from(slot)];
        slot.referenced = true;
        slot
    }

    /// A slot by its number, without counting as a use.
    pub fn peek(&self, slot: u16) -> &Slot {
        &self.slots[usize::from(slot)]
    }

    /// The taken slots.
    pub fn taken(&self) -> impl Iterator<Item = &Slot> {
        self.slots.iter().filter(|slot| slot.region.is_some())
    }

    /// The last transaction handed out by [`Self::transaction`].
    pub fn last_transaction(&self) -> u64 {
        self.transaction
    }

    /// Whether the log still speaks of an earlier life: this one has no transaction yet.
    pub fn is_unwritten(&self) -> bool {
        self.transaction < self.first_transaction
    }

    /// Finds a slot that a new region may take: a free one, or one without users, by a second
    /// chance for those used since the hand last came by.
    pub fn victim(&mut self) -> Option<u16> {
        for _ in 0..2 * self.limit {
            let at = self.hand;
            self.hand = (self.hand + 1) % self.limit;
            let slot = &mut self.slots[at];
            if slot.region.is_none() {
                return Some(at as u16);
            }
            if slot.users > 0 || !slot.durable {
                continue;
            }
            if !std::mem::take(&mut slot.referenced) {
                return Some(at as u16);
            }
        }
        None
    }

    /// The slots that [`Self::victim`] looks at next.
    pub fn next_in_turn(&self, slots: usize) -> impl Iterator<Item = u16> + use<> {
        let (hand, limit) = (self.hand, self.limit);
        (0..slots.min(limit)).map(move |after| ((hand + after) % limit) as u16)
    }

    /// Puts `region` (or nothing) into a slot, in memory; the log says so after the next
    /// transaction. Returns what the slot held.
    pub fn replace(&mut self, slot: u16, region: Option<RegionId>) -> Slot {
        let old = std::mem::replace(
            &mut self.slots[usize::from(slot)],
            Slot { region, referenced: true, ..FREE },
        );
        if let Some(region) = old.region {
            self.by_region.remove(&region);
        }
        if let Some(region) = region {
            self.by_region.insert(region, slot);
        }
        old
    }

    /// Encodes the next transaction for slots that were replaced. Returns the block and its offset
    /// in the log file.
    ///
    /// # Panics
    /// When more than [`CHANGES_MAX`] slots are named.
    pub fn transaction(&mut self, changed: &[u16]) -> (u64, Vec<u8>) {
        assert!(changed.len() <= CHANGES_MAX, "a transaction of too many changes");
        self.transaction += 1;
        let context = (0..ENTRIES - CHANGES_MAX).map(|i| ((self.context_from + i) % SLOTS) as u16);
        let mut entries = [Entry { slot: 0.into(), volume: 0.into(), region: 0.into() }; ENTRIES];
        let mut used = 0;
        for slot in changed.iter().copied().chain(context) {
            let region = self.slots[usize::from(slot)].region;
            entries[used] = Entry {
                slot: slot.into(),
                volume: region.map_or(0, |region| region.volume.0).into(),
                region: region.map_or(NO_REGION, |region| region.index).into(),
            };
            used += 1;
        }
        self.context_from = (self.context_from + ENTRIES - CHANGES_MAX) % SLOTS;
        let mut block = Block {
            magic: MAGIC,
            version: 1.into(),
            entries_used: (used as u16).into(),
            transaction: self.transaction.into(),
            map_id: self.map_id,
            first_transaction: self.first_transaction.into(),
            reserved: [0; 16],
            crc: 0.into(),
            entries,
        };
        block.crc = crc64(block.as_bytes()).into();
        (self.transaction % BLOCKS * BLOCK_BYTES as u64, block.as_bytes().to_vec())
    }

    /// Marks slots as durably holding what they hold, after their transaction was written.
    pub fn written(&mut self, changed: &[u16]) {
        for slot in changed {
            self.slots[usize::from(*slot)].durable = true;
        }
    }
}

/// What a log file says.
#[derive(Debug, PartialEq, Eq)]
pub struct Recovered {
    /// The regions that were active.
    pub active: Vec<RegionId>,
    /// The newest transaction.
    pub transaction: u64,
}

/// A log in which blocks that are still needed are damaged.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the log of active regions is damaged: {missing} of the blocks it needs are missing")]
pub struct DamagedLog {
    /// Blocks that are needed and cannot be read.
    pub missing: u64,
    /// The newest transaction: a new life of the set has to go on after it.
    pub transaction: u64,
}

/// Reads a whole log file: one copy of the ring or more, of which any may have each block.
///
/// # Errors
/// [`DamagedLog`]: which regions were active cannot be known, so all may have changed.
pub fn recover(file: &[u8], map_id: [u8; 16]) -> Result<Recovered, DamagedLog> {
    let mut blocks: Vec<&Block> = file
        .chunks_exact(BLOCK_BYTES)
        .enumerate()
        .filter_map(|(at, bytes)| {
            let block = Block::ref_from_bytes(bytes).ok()?;
            let own = block.magic == MAGIC
                && block.version.get() == 1
                && block.map_id == map_id
                && block.transaction.get() % BLOCKS == at as u64 % BLOCKS
                && block.first_transaction.get() <= block.transaction.get()
                && usize::from(block.entries_used.get()) <= ENTRIES;
            let mut copy = *block;
            copy.crc = 0.into();
            (own && crc64(copy.as_bytes()) == block.crc.get()).then_some(block)
        })
        .collect();
    blocks.sort_by_key(|block| block.transaction.get());
    blocks.dedup_by_key(|block| block.transaction.get());
    // A map is named by the state only when its first transaction is durable.
    let Some(last) = blocks.last() else {
        return Err(DamagedLog { missing: 1, transaction: 0 });
    };
    let newest = last.transaction.get();
    if newest > COUNT_MAX {
        let possible = blocks.iter().map(|block| block.transaction.get());
        let transaction = possible.filter(|number| *number <= COUNT_MAX).max().unwrap_or(0);
        return Err(DamagedLog { missing: 1, transaction });
    }
    let oldest_needed = newest.saturating_sub(BLOCKS_NEEDED).max(last.first_transaction.get());
    blocks.retain(|block| block.transaction.get() >= oldest_needed);
    let wanted = newest - oldest_needed + 1;
    if blocks.len() as u64 != wanted {
        let missing = wanted - blocks.len() as u64;
        return Err(DamagedLog { missing, transaction: newest });
    }
    let mut slots = vec![None; SLOTS];
    for block in blocks {
        for entry in &block.entries[..usize::from(block.entries_used.get())] {
            let region = (entry.region.get() != NO_REGION).then(|| RegionId {
                volume: VolumeId(entry.volume.get()),
                index: entry.region.get(),
            });
            if let Some(slot) = slots.get_mut(usize::from(entry.slot.get())) {
                *slot = region;
            }
        }
    }
    let mut active: Vec<RegionId> = slots.into_iter().flatten().collect();
    active.sort();
    active.dedup();
    Ok(Recovered { active, transaction: newest })
}
