//! What the disks hold at each sequence, kept the simple way.

use tidemark_journal::{Kind, Record, Seq, VolumeId};

/// A change of content.
#[derive(Clone)]
pub struct Change {
    pub seq: Seq,
    pub volume: VolumeId,
    pub offset: usize,
    /// What is written; for zeros, their number.
    pub content: Result<Vec<u8>, usize>,
}

/// All changes, in order, and the sizes of the volumes.
#[derive(Clone, Default)]
pub struct Model {
    pub sizes: Vec<usize>,
    pub changes: Vec<Change>,
}

impl Model {
    pub fn new(sizes: &[usize]) -> Model {
        Model { sizes: sizes.to_vec(), changes: Vec::new() }
    }

    /// Takes a record in.
    pub fn push(&mut self, record: &Record, payload: &[u8]) {
        if !record.kind.changes_content() {
            return;
        }
        let content = match record.kind {
            Kind::Zero | Kind::Discard => Err(record.sectors as usize * 512),
            _ if record.payload_bytes() == 0 => Err(record.sectors as usize * 512),
            _ => Ok(payload.to_vec()),
        };
        let offset = record.start.0 as usize * 512;
        let change = Change { seq: record.seq, volume: record.volume, offset, content };
        self.changes.push(change);
    }

    /// A volume's content at a position.
    pub fn at(&self, volume: VolumeId, seq: Seq) -> Vec<u8> {
        let mut disk = vec![0; self.sizes[volume.0 as usize]];
        for change in self.changes.iter().take_while(|change| change.seq <= seq) {
            if change.volume != volume {
                continue;
            }
            match &change.content {
                Ok(bytes) => {
                    disk[change.offset..change.offset + bytes.len()].copy_from_slice(bytes)
                }
                Err(zeros) => disk[change.offset..change.offset + zeros].fill(0),
            }
        }
        disk
    }
}

/// Says where two disks differ first, in sectors; `None` when they are equal.
pub fn difference(one: &[u8], other: &[u8]) -> Option<usize> {
    if one.len() != other.len() {
        return Some(one.len().min(other.len()) / 512);
    }
    one.chunks(512).zip(other.chunks(512)).position(|(a, b)| a != b)
}

/// A small generator of numbers, the same in every run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}
