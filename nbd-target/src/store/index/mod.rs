//! The index of a segment: in memory while it is written, in checksummed pages once it is sealed.

pub mod entry;
pub mod lookup;
pub mod memory;
pub mod page;
pub mod sealed;

use tidemark_journal::{
    Seq,
    chunk::{ChunkEntry, ChunkError},
};
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{I64, U32, U64},
};

pub use entry::{Content, Key};
pub use lookup::Query;
pub use memory::MemoryIndex;
pub use sealed::SealedIndex;

/// Where a chunk lies in its segment's file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChunkRow {
    /// Byte in the file.
    pub offset: u32,
    /// Bytes as stored.
    pub stored_bytes: u32,
    /// Bytes after unpacking.
    pub raw_bytes: u32,
    /// The codec's number.
    pub codec: u8,
    /// CRC-64/NVME of the stored bytes.
    pub crc: u64,
}

impl ChunkRow {
    /// Checks the stored bytes and unpacks them.
    ///
    /// # Errors
    /// [`ChunkError`].
    pub fn unpack(&self, stored: &[u8], raw: &mut Vec<u8>) -> Result<(), ChunkError> {
        let entry = ChunkEntry {
            raw_bytes: self.raw_bytes.into(),
            stored_bytes: self.stored_bytes.into(),
            codec: self.codec,
            reserved: [0; 7],
            crc: self.crc.into(),
            tag: [0; 16],
        };
        entry.unpack(stored, raw)
    }
}

/// Where a frame lies in its segment's file, and when it was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameRow {
    /// Byte in the file.
    pub offset: u32,
    /// Bytes of header, descriptors and chunk table.
    pub meta_bytes: u32,
    /// First sequence.
    pub first: Seq,
    /// Last sequence.
    pub last: Seq,
    /// Journal time of the first record, nanoseconds.
    pub time_ns: u64,
    /// Wall clock at the first record, nanoseconds since 1970.
    pub wall_ns: i64,
}

/// A chunk's place as stored, 20 bytes.
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 4 | byte in the file |
/// | 4 | 4 | stored bytes in the low 24 bits, codec in the high 8 |
/// | 8 | 4 | raw bytes |
/// | 12 | 8 | CRC-64/NVME of the stored bytes |
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct StoredChunkRow {
    offset: U32,
    stored_and_codec: U32,
    raw_bytes: U32,
    crc: U64,
}

/// A frame's place as stored, 40 bytes: byte in the file, meta bytes, first sequence, last
/// sequence, journal time, wall clock.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct StoredFrameRow {
    offset: U32,
    meta_bytes: U32,
    first: U64,
    last: U64,
    time_ns: U64,
    wall_ns: I64,
}

const _: () = assert!(size_of::<StoredChunkRow>() == 20 && size_of::<StoredFrameRow>() == 40);

impl From<&ChunkRow> for StoredChunkRow {
    fn from(row: &ChunkRow) -> StoredChunkRow {
        StoredChunkRow {
            offset: row.offset.into(),
            stored_and_codec: (row.stored_bytes | u32::from(row.codec) << 24).into(),
            raw_bytes: row.raw_bytes.into(),
            crc: row.crc.into(),
        }
    }
}

impl From<&StoredChunkRow> for ChunkRow {
    fn from(row: &StoredChunkRow) -> ChunkRow {
        ChunkRow {
            offset: row.offset.get(),
            stored_bytes: row.stored_and_codec.get() & 0xff_ffff,
            raw_bytes: row.raw_bytes.get(),
            codec: (row.stored_and_codec.get() >> 24) as u8,
            crc: row.crc.get(),
        }
    }
}

impl From<&FrameRow> for StoredFrameRow {
    fn from(row: &FrameRow) -> StoredFrameRow {
        StoredFrameRow {
            offset: row.offset.into(),
            meta_bytes: row.meta_bytes.into(),
            first: row.first.0.into(),
            last: row.last.0.into(),
            time_ns: row.time_ns.into(),
            wall_ns: row.wall_ns.into(),
        }
    }
}

impl From<&StoredFrameRow> for FrameRow {
    fn from(row: &StoredFrameRow) -> FrameRow {
        FrameRow {
            offset: row.offset.get(),
            meta_bytes: row.meta_bytes.get(),
            first: Seq(row.first.get()),
            last: Seq(row.last.get()),
            time_ns: row.time_ns.get(),
            wall_ns: row.wall_ns.get(),
        }
    }
}

#[cfg(test)]
mod tests;
