//! Index entries: which extent of which volume has which content since which sequence.
//!
//! Entries are sorted by volume, length class, start, length and sequence. The class bounds how far
//! before a range an extent that overlaps it can start, so a lookup is a few seeks; the length
//! stands before the sequence so that the versions of one extent lie together and all but the
//! newest wanted are skipped by one seek.

use tidemark_journal::{Sector, Seq, VolumeId};
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32},
};

/// The longest extent with content, in sectors: one chunk of 128 KiB.
pub const DATA_SECTORS_MAX: u32 = 256;

/// The longest extent of each length class, in sectors. Extents with content are in the first two;
/// the others are the interval table of large zero extents, probed by every lookup in a source
/// that has any.
pub const CLASS_SECTORS: [u64; 10] =
    [16, 256, 1 << 11, 1 << 14, 1 << 17, 1 << 20, 1 << 23, 1 << 26, 1 << 29, 1 << 32];

/// The length class of an extent.
pub fn class_of(sectors: u32) -> u8 {
    CLASS_SECTORS.iter().take_while(|longest| u64::from(sectors) > **longest).count() as u8
}

/// An entry's place in the order of an index.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Key {
    /// The volume.
    pub volume: VolumeId,
    /// [`class_of`] the length.
    pub class: u8,
    /// First sector.
    pub start: Sector,
    /// Length in sectors.
    pub sectors: u32,
    /// The record's sequence.
    pub seq: Seq,
}

impl Key {
    /// The key of an extent.
    pub fn new(volume: VolumeId, start: Sector, sectors: u32, seq: Seq) -> Key {
        Key { volume, class: class_of(sectors), start, sectors, seq }
    }

    /// The sector after the extent.
    pub fn end(&self) -> u64 {
        self.start.0 + u64::from(self.sectors)
    }

    /// Whether the other is a version of the same extent.
    pub fn same_extent(&self, other: &Key) -> bool {
        (self.volume, self.start, self.sectors) == (other.volume, other.start, other.sectors)
    }
}

/// What an extent reads as.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Content {
    /// Bytes in a chunk of the segment.
    Data {
        /// The chunk's number in the segment.
        chunk: u32,
        /// The extent's first byte in the chunk's raw content.
        offset: u32,
    },
    /// Zeros.
    Zero,
    /// Unknown: the source could not read its disk here.
    Unreadable,
}

/// An entry as stored, 24 bytes.
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 2 | volume |
/// | 2 | 6 | first sector |
/// | 8 | 6 | sequence less the segment's base sequence |
/// | 14 | 1 | content: 0 data, 1 zeros, 2 unreadable |
/// | 15 | 1 | data: sectors less one; else zero |
/// | 16 | 4 | data: chunk number; else sectors |
/// | 20 | 4 | data: byte in the chunk's raw content; else zero |
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct EntryRow {
    volume: U16,
    start: [u8; 6],
    seq: [u8; 6],
    content: u8,
    sectors_less_one: u8,
    chunk_or_sectors: U32,
    offset: U32,
}

const _: () = assert!(size_of::<EntryRow>() == 24);

impl EntryRow {
    /// Encodes an entry of a segment whose sequences are above `base`.
    pub fn encode(key: &Key, content: &Content, base: Seq) -> EntryRow {
        let (kind, less_one, word, offset) = match *content {
            Content::Data { chunk, offset } => {
                debug_assert!((1..=DATA_SECTORS_MAX).contains(&key.sectors));
                (0, (key.sectors - 1) as u8, chunk, offset)
            }
            Content::Zero => (1, 0, key.sectors, 0),
            Content::Unreadable => (2, 0, key.sectors, 0),
        };
        EntryRow {
            volume: key.volume.0.into(),
            start: low48(key.start.0),
            seq: low48(key.seq.0 - base.0),
            content: kind,
            sectors_less_one: less_one,
            chunk_or_sectors: word.into(),
            offset: offset.into(),
        }
    }

    /// Decodes an entry of a segment whose sequences are above `base`; nothing when the row
    /// contradicts itself.
    pub fn decode(&self, base: Seq) -> Option<(Key, Content)> {
        let word = self.chunk_or_sectors.get();
        let (sectors, content) = match self.content {
            0 => {
                let data = Content::Data { chunk: word, offset: self.offset.get() };
                (u32::from(self.sectors_less_one) + 1, data)
            }
            1 => (word, Content::Zero),
            2 => (word, Content::Unreadable),
            _ => return None,
        };
        let delta = from48(self.seq);
        let seq = Seq(base.0.checked_add(delta)?);
        let key = Key::new(VolumeId(self.volume.get()), Sector(from48(self.start)), sectors, seq);
        (sectors > 0 && delta > 0).then_some((key, content))
    }
}

fn low48(number: u64) -> [u8; 6] {
    let bytes = number.to_le_bytes();
    [bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5]]
}

fn from48(b: [u8; 6]) -> u64 {
    u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], 0, 0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_bound_their_extents() {
        for (class, longest) in CLASS_SECTORS.iter().enumerate() {
            let longest = u32::try_from(*longest).unwrap_or(u32::MAX);
            assert_eq!(usize::from(class_of(longest)), class);
            if let Some(more) = longest.checked_add(1) {
                assert_eq!(usize::from(class_of(more)), class + 1);
            }
        }
    }

    #[test]
    fn the_row_is_these_bytes() {
        let base = Seq(1000);
        let key = Key::new(VolumeId(2), Sector(0x0102_0304_0506), 8, Seq(1005));
        let row = EntryRow::encode(&key, &Content::Data { chunk: 7, offset: 512 }, base);
        assert_eq!(
            row.as_bytes(),
            [2, 0, 6, 5, 4, 3, 2, 1, 5, 0, 0, 0, 0, 0, 0, 7, 7, 0, 0, 0, 0, 2, 0, 0]
        );
        assert_eq!(row.decode(base), Some((key, Content::Data { chunk: 7, offset: 512 })));
        for content in [Content::Zero, Content::Unreadable] {
            let key = Key::new(VolumeId(9), Sector(5), u32::MAX, Seq(1 << 47));
            assert_eq!(EntryRow::encode(&key, &content, base).decode(base), Some((key, content)));
        }
    }

    #[test]
    fn a_row_that_contradicts_itself_is_refused() {
        let key = Key::new(VolumeId(0), Sector(0), 1, Seq(1));
        let mut row = EntryRow::encode(&key, &Content::Zero, Seq(0));
        row.chunk_or_sectors = 0.into();
        assert_eq!(row.decode(Seq(0)), None);
        row.content = 3;
        assert_eq!(row.decode(Seq(0)), None);
        // A search goes on below the lowest version of an extent, so one at the base never ended it.
        let base = Key::new(VolumeId(0), Sector(0), 1, Seq(5));
        assert_eq!(EntryRow::encode(&base, &Content::Zero, Seq(5)).decode(Seq(5)), None);
    }
}
