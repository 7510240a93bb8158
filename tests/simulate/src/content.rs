//! What the sectors hold: each is filled with one number, its stamp, that says who wrote it.

use tidemark_journal::{Kind, Record, record::flag};

/// What fills a sector. Zero is zeros.
pub type Stamp = u64;

/// Not one number all through: nobody has written that.
pub const TORN: Stamp = u64::MAX;

/// The bytes of sectors with these stamps.
pub fn bytes(stamps: &[Stamp]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(stamps.len() * 512);
    for stamp in stamps {
        for _ in 0..64 {
            bytes.extend_from_slice(&stamp.to_le_bytes());
        }
    }
    bytes
}

/// The stamps of whole sectors.
pub fn stamps(bytes: &[u8]) -> Vec<Stamp> {
    let word = |bytes: &[u8]| bytes.try_into().map_or(TORN, u64::from_le_bytes);
    bytes
        .chunks(512)
        .map(|sector| {
            let first = word(&sector[..8]);
            if sector.chunks(8).all(|part| word(part) == first) { first } else { TORN }
        })
        .collect()
}

/// A record and what it brings.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// The record.
    pub record: Record,
    /// The stamps of its range, if it has content.
    pub content: Vec<Stamp>,
    /// An offer's hashes.
    pub hashes: Vec<u8>,
}

impl Entry {
    /// A record with its payload.
    pub fn new(record: &Record, payload: &[u8]) -> Entry {
        let zeros = record.kind == Kind::Sync && record.flags & flag::ZEROS != 0;
        let (content, hashes) = match record.kind {
            Kind::Write | Kind::Sync if !zeros => (stamps(payload), Vec::new()),
            Kind::Write | Kind::Sync | Kind::Zero | Kind::Discard => {
                (vec![0; record.sectors as usize], Vec::new())
            }
            Kind::Offer => (Vec::new(), payload.to_vec()),
            _ => (Vec::new(), Vec::new()),
        };
        Entry { record: *record, content, hashes }
    }
}

/// The content of all volumes as records say it. Volume `n` is at `n - 1`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Image {
    /// The sectors of each volume.
    pub volumes: Vec<Vec<Stamp>>,
    /// Whether the source could not read a sector.
    pub unknown: Vec<Vec<bool>>,
    /// Whether a volume is in a gap.
    pub in_gap: Vec<bool>,
}

impl Image {
    /// Zeros, nobody having caught up yet.
    pub fn new(sizes: &[u64]) -> Image {
        Image {
            volumes: sizes.iter().map(|sectors| vec![0; *sectors as usize]).collect(),
            unknown: sizes.iter().map(|sectors| vec![false; *sectors as usize]).collect(),
            in_gap: vec![true; sizes.len()],
        }
    }

    /// Applies the next record of the order.
    pub fn apply(&mut self, entry: &Entry) {
        let record = &entry.record;
        let Some(volume) = usize::from(record.volume.0).checked_sub(1) else { return };
        match record.kind {
            Kind::GapBegin => self.in_gap[volume] = true,
            Kind::GapEnd => self.in_gap[volume] = false,
            _ => {}
        }
        if !record.kind.has_range() {
            return;
        }
        let range = record.start.0 as usize..record.end().0 as usize;
        if record.kind.changes_content() {
            self.unknown[volume][range.clone()].fill(false);
            self.volumes[volume][range].copy_from_slice(&entry.content);
        } else if record.kind == Kind::Unreadable {
            self.unknown[volume][range].fill(true);
        }
    }
}
