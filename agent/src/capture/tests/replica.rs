//! A copy of the volumes as the records say, and content in the coarse form of the simulator.
//!
//! Content is told by one number for each *grain*, a fixed count of sectors; zero reads as zeros.
//! In bytes, a grain is its number and zeros.

use tidemark_journal::{Kind, Record, record::flag};

use crate::dirty::REGION_SECTORS;

/// The number of each grain of a volume.
pub type Content = Vec<u64>;

/// Sectors in a grain, with the ways between the two forms of content.
#[derive(Clone, Copy, Debug)]
pub struct Grain(pub u64);

impl Grain {
    /// The grains that a range of sectors covers; it begins and ends between grains.
    pub fn range(self, start: u64, sectors: u64) -> std::ops::Range<usize> {
        assert!(start.is_multiple_of(self.0) && sectors.is_multiple_of(self.0), "half a grain");
        (start / self.0) as usize..((start + sectors) / self.0) as usize
    }

    /// The region in which a grain lies.
    pub fn region(self, grain: usize) -> u32 {
        (grain as u64 * self.0 / REGION_SECTORS) as u32
    }

    pub fn bytes(self, content: &[u64]) -> Vec<u8> {
        let mut bytes = vec![0; content.len() * self.0 as usize * 512];
        for (bytes, number) in bytes.chunks_exact_mut(self.0 as usize * 512).zip(content) {
            bytes[..8].copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    pub fn content(self, bytes: &[u8]) -> Content {
        let number = |bytes: &[u8]| u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
        bytes.chunks_exact(self.0 as usize * 512).map(number).collect()
    }

    /// Something like the hashes of the blocks of 4 KiB.
    pub fn hashes(self, content: &[u64]) -> Vec<u8> {
        let hash = |block: &[u64]| {
            let mixed = block.iter().fold(0x1234_5678_9abc_def1u128, |hash, number| {
                (hash ^ u128::from(*number)).wrapping_mul(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef)
            });
            mixed.to_le_bytes()
        };
        if self.0 >= 8 {
            let blocks = self.0 as usize / 8;
            content.iter().flat_map(|number| hash(&[*number]).repeat(blocks)).collect()
        } else {
            content.chunks(8 / self.0 as usize).flat_map(hash).collect()
        }
    }
}

/// A record as it came out of the ring, its payload in the coarse form; of an offer, the hashes.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    pub record: Record,
    pub content: Content,
    pub hashes: Vec<u8>,
}

impl Entry {
    pub fn new(grain: Grain, record: &Record, payload: &[u8]) -> Entry {
        assert_eq!(payload.len() as u64, record.payload_bytes(), "{record:?}");
        record.check().unwrap_or_else(|error| panic!("{record:?}: {error}"));
        let has_content = matches!(record.kind, Kind::Write | Kind::Sync);
        Entry {
            record: *record,
            content: if has_content { grain.content(payload) } else { Vec::new() },
            hashes: if has_content { Vec::new() } else { payload.to_vec() },
        }
    }
}

/// The volumes at some position of the journal.
#[derive(Clone)]
pub struct Replica {
    grain: Grain,
    pub volumes: Vec<Content>,
    /// Grains that are not known, because the source could not read them.
    pub unknown: Vec<Vec<bool>>,
    pub in_gap: Vec<bool>,
    /// How many entries of the journal have been applied.
    pub applied: usize,
}

impl Replica {
    pub fn new(grain: Grain, volumes: Vec<Content>) -> Replica {
        let unknown = volumes.iter().map(|volume| vec![false; volume.len()]).collect();
        Replica { grain, unknown, in_gap: vec![false; volumes.len()], volumes, applied: 0 }
    }

    /// Applies the next entry; volume `n` has the number `n + 1`.
    pub fn apply(&mut self, entry: &Entry) {
        self.applied += 1;
        let record = &entry.record;
        let volume = usize::from(record.volume.0.max(1)) - 1;
        match record.kind {
            Kind::GapBegin => {
                assert!(!self.in_gap[volume], "a gap in a gap: {record:?}");
                self.in_gap[volume] = true;
            }
            Kind::GapEnd => {
                assert!(self.in_gap[volume], "the end of no gap: {record:?}");
                self.in_gap[volume] = false;
            }
            Kind::Mark => {
                assert!(!self.in_gap.contains(&true), "a mark inside a gap: {record:?}");
            }
            _ => {}
        }
        if !record.kind.has_range() {
            return;
        }
        let range = self.grain.range(record.start.0, u64::from(record.sectors));
        if record.kind.changes_content() {
            self.unknown[volume][range.clone()].fill(false);
            let zeros = !matches!(record.kind, Kind::Write | Kind::Sync)
                || record.kind == Kind::Sync && record.flags & flag::ZEROS != 0;
            if zeros {
                self.volumes[volume][range].fill(0);
            } else {
                self.volumes[volume][range].copy_from_slice(&entry.content);
            }
        } else if record.kind == Kind::Unreadable {
            self.unknown[volume][range].fill(true);
        }
    }

    /// The blocks of an offer that this replica wants.
    pub fn wants(&self, entry: &Entry) -> Vec<bool> {
        let record = &entry.record;
        let volume = usize::from(record.volume.0) - 1;
        let range = self.grain.range(record.start.0, u64::from(record.sectors));
        let own = self.grain.hashes(&self.volumes[volume][range.clone()]);
        assert_eq!(own.len(), entry.hashes.len());
        let differs = |(own, theirs): (&[u8], &[u8])| own != theirs;
        let mut wants: Vec<bool> =
            own.chunks(16).zip(entry.hashes.chunks(16)).map(differs).collect();
        for grain in range.clone().filter(|grain| self.unknown[volume][*grain]) {
            let at = (grain - range.start) as u64 * self.grain.0;
            (at / 8..(at + self.grain.0).div_ceil(8))
                .for_each(|block| wants[block as usize] = true);
        }
        wants
    }
}
