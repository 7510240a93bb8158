//! Frames: records encoded together, checked and read in place.
//!
//! ```text
//! header (192) | descriptors (32 each) | hashes (0 or 16 each) | chunk table (40 each) | chunks
//! '----------------------------- meta: one checksum -----------------------------'  own checksums
//! ```
//!
//! The meta part comes first and carries its own checksum, so an index is built, a position
//! checked and a dump printed without touching a payload byte. The chunks follow in the order of
//! the table, without padding.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{I64, U16, U32, U64},
};

use crate::{
    checksum::crc64_of,
    chunk::{CHUNK_BYTES_MAX, ChunkEntry, ChunkError},
    ids::{GroupId, Position, Sector, Seq, TermId, VolumeId},
    record::{Descriptor, Kind, Record},
};

/// First bytes of a frame.
pub const FRAME_MAGIC: [u8; 4] = *b"TMFR";
/// The version of the format described here.
pub const FRAME_VERSION: u16 = 1;
/// Bytes in a header.
pub const HEADER_BYTES: usize = size_of::<FrameHeader>();
/// The most records in a frame.
pub const RECORDS_MAX: usize = 16 << 10;
/// The most chunks in a frame.
pub const CHUNKS_MAX: usize = 256;
/// The most bytes in a frame, meta and chunks together.
pub const FRAME_BYTES_MAX: usize = 24 << 20;

/// A frame's header, 192 bytes.
///
/// What says "is this a frame, and how long" comes first, then where it belongs, then its times;
/// the room for encryption stands before the checksum, which closes the header.
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 4 | magic `TMFR` |
/// | 4 | 2 | version, 1 |
/// | 6 | 2 | flags, zero |
/// | 8 | 4 | meta bytes: header, descriptors, hashes and chunk table |
/// | 12 | 4 | records, 1 to 16384 |
/// | 16 | 4 | chunks, 0 to 256 |
/// | 20 | 4 | bytes of keyed hash per record: 0, or 16 in later versions |
/// | 24 | 8 | payload bytes: the sum of the stored chunks |
/// | 32 | 8 | raw bytes: the sum of the chunks unpacked |
/// | 40 | 16 | group |
/// | 56 | 16 | term |
/// | 72 | 16 | term of the position before |
/// | 88 | 8 | sequence of the position before |
/// | 96 | 8 | first sequence |
/// | 104 | 8 | last sequence |
/// | 112 | 8 | journal time of the first record, nanoseconds |
/// | 120 | 8 | the source's wall clock at that time, nanoseconds since 1970 |
/// | 128 | 16 | key epoch, zero without encryption |
/// | 144 | 8 | nonce of the first chunk in its key epoch, zero without encryption |
/// | 152 | 32 | reserved, zero |
/// | 184 | 8 | CRC-64/NVME of the meta without these eight bytes |
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct FrameHeader {
    /// [`FRAME_MAGIC`].
    pub magic: [u8; 4],
    /// [`FRAME_VERSION`].
    pub version: U16,
    /// Zero.
    pub flags: U16,
    /// Bytes of header, descriptors, hashes and chunk table.
    pub meta_bytes: U32,
    /// Number of records.
    pub records: U32,
    /// Number of chunks.
    pub chunks: U32,
    /// Bytes of keyed hash per record.
    pub hash_bytes: U32,
    /// Bytes of the stored chunks.
    pub payload_bytes: U64,
    /// Bytes of the chunks unpacked.
    pub raw_bytes: U64,
    /// The group.
    pub group: [u8; 16],
    /// The writer's term.
    pub term: [u8; 16],
    /// Term of the position before.
    pub before_term: [u8; 16],
    /// Sequence of the position before.
    pub before_seq: U64,
    /// Sequence of the first record.
    pub first_seq: U64,
    /// Sequence of the last record.
    pub last_seq: U64,
    /// Journal time of the first record.
    pub time_ns: U64,
    /// Wall clock at that time.
    pub wall_ns: I64,
    /// Reserved for encryption.
    pub key_epoch: [u8; 16],
    /// Reserved for encryption.
    pub nonce: U64,
    /// Zero.
    pub reserved: [u8; 32],
    /// Checksum of the meta.
    pub crc: U64,
}

const _: () = assert!(HEADER_BYTES == 192);

/// Why bytes are not a frame.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FrameError {
    /// Fewer bytes than the frame states.
    #[error("the frame is cut short: {have} bytes of {want}")]
    Short {
        /// Bytes at hand.
        have: usize,
        /// Bytes stated, or those of a header.
        want: usize,
    },
    /// Not a frame at all.
    #[error("these bytes are not a frame")]
    Magic,
    /// A frame of another version.
    #[error("the frame has version {0}; this program reads version {FRAME_VERSION}")]
    Version(u16),
    /// A length or count outside its bounds, or contradicting another.
    #[error("the frame's {0} is out of bounds")]
    Bounds(&'static str),
    /// The meta is not what was written.
    #[error("the frame's checksum does not match its bytes")]
    Checksum,
    /// A record contradicts itself.
    #[error("record {index} is {what}")]
    Record {
        /// Place in the frame, from zero.
        index: usize,
        /// What it is.
        what: &'static str,
    },
    /// A chunk is damaged.
    #[error("chunk {index}: {error}")]
    Chunk {
        /// Place in the frame, from zero.
        index: usize,
        /// What is wrong.
        error: ChunkError,
    },
}

impl FrameHeader {
    /// Reads the header at the start of `bytes` and checks its lengths, not its checksum: enough to
    /// know how many bytes the frame takes.
    ///
    /// # Errors
    /// [`FrameError::Short`], [`FrameError::Magic`], [`FrameError::Version`], [`FrameError::Bounds`].
    pub fn peek(bytes: &[u8]) -> Result<&FrameHeader, FrameError> {
        let short = FrameError::Short { have: bytes.len(), want: HEADER_BYTES };
        let (header, _) = FrameHeader::ref_from_prefix(bytes).map_err(|_| short)?;
        if header.magic != FRAME_MAGIC {
            return Err(FrameError::Magic);
        }
        if header.version.get() != FRAME_VERSION {
            return Err(FrameError::Version(header.version.get()));
        }
        let (records, chunks) = (header.records.get() as usize, header.chunks.get() as usize);
        let bound = |ok: bool, what| if ok { Ok(()) } else { Err(FrameError::Bounds(what)) };
        bound(header.flags.get() == 0, "flags")?;
        bound((1..=RECORDS_MAX).contains(&records), "number of records")?;
        bound(chunks <= CHUNKS_MAX, "number of chunks")?;
        bound(matches!(header.hash_bytes.get(), 0 | 16), "hash length")?;
        bound(
            header.meta_bytes.get() as usize
                == HEADER_BYTES
                    + records * (size_of::<Descriptor>() + header.hash_bytes.get() as usize)
                    + chunks * size_of::<ChunkEntry>(),
            "meta length",
        )?;
        bound(header.payload_bytes.get() <= FRAME_BYTES_MAX as u64, "payload length")?;
        bound(header.frame_bytes() <= FRAME_BYTES_MAX, "length")?;
        bound(header.first_seq.get() <= header.last_seq.get(), "sequence range")?;
        bound(header.last_seq.get() <= Seq::MAX.0, "last sequence")?;
        bound(header.first_seq.get() > header.before_seq.get(), "first sequence")?;
        Ok(header)
    }

    /// Bytes of the whole frame.
    pub fn frame_bytes(&self) -> usize {
        self.meta_bytes.get() as usize + self.payload_bytes.get() as usize
    }

    /// The position that this frame continues.
    pub fn before(&self) -> Position {
        Position { term: TermId(self.before_term), seq: Seq(self.before_seq.get()) }
    }

    /// The position at this frame's end.
    pub fn last(&self) -> Position {
        Position { term: TermId(self.term), seq: Seq(self.last_seq.get()) }
    }

    /// The group.
    pub fn group(&self) -> GroupId {
        GroupId(self.group)
    }
}

/// Where a record's payload lies among the raw chunks: a run of pieces, one per chunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// Chunk number in the frame.
    pub chunk: usize,
    /// Byte in the chunk's raw content.
    pub offset: usize,
    /// Bytes of the payload in this chunk.
    pub bytes: usize,
}

/// A frame whose meta has been checked. Payloads are checked as they are read.
#[derive(Clone, Copy, Debug)]
pub struct FrameView<'a> {
    bytes: &'a [u8],
    header: &'a FrameHeader,
    descriptors: &'a [Descriptor],
    table: &'a [ChunkEntry],
}

impl<'a> FrameView<'a> {
    /// Checks a frame's meta: lengths, checksum, every record, every row of the chunk table, and
    /// that each payload lies inside the chunks. `bytes` may go on after the frame.
    ///
    /// # Errors
    /// Any [`FrameError`] but that of a damaged chunk's content.
    pub fn parse(bytes: &'a [u8]) -> Result<FrameView<'a>, FrameError> {
        let view = Self::parse_meta(bytes)?;
        let want = view.header.frame_bytes();
        let bytes = bytes.get(..want).ok_or(FrameError::Short { have: bytes.len(), want })?;
        Ok(FrameView { bytes, ..view })
    }

    /// Like [`parse`](Self::parse), for bytes that may hold the meta alone: the chunks cannot be
    /// read through this view.
    ///
    /// # Errors
    /// As [`parse`](Self::parse).
    pub fn parse_meta(bytes: &'a [u8]) -> Result<FrameView<'a>, FrameError> {
        let header = FrameHeader::peek(bytes)?;
        let want = header.meta_bytes.get() as usize;
        let meta = bytes.get(..want).ok_or(FrameError::Short { have: bytes.len(), want })?;
        if meta_crc(meta) != header.crc.get() {
            return Err(FrameError::Checksum);
        }
        let records = header.records.get() as usize;
        let after_header = &meta[HEADER_BYTES..];
        let (descriptors, rest) = <[Descriptor]>::ref_from_prefix_with_elems(after_header, records)
            .map_err(|_| FrameError::Bounds("meta length"))?;
        let hashes = records * header.hash_bytes.get() as usize;
        let table = rest
            .get(hashes..)
            .and_then(|rest| <[ChunkEntry]>::ref_from_bytes(rest).ok())
            .ok_or(FrameError::Bounds("meta length"))?;
        let view = FrameView { bytes: meta, header, descriptors, table };
        view.check_table()?;
        view.check_records()?;
        Ok(view)
    }

    fn check_table(&self) -> Result<(), FrameError> {
        let (mut raw, mut stored) = (0, 0);
        for (index, entry) in self.table.iter().enumerate() {
            entry.check().map_err(|error| FrameError::Chunk { index, error })?;
            raw += u64::from(entry.raw_bytes.get());
            stored += u64::from(entry.stored_bytes.get());
        }
        if raw != self.header.raw_bytes.get() {
            return Err(FrameError::Bounds("raw length"));
        }
        if stored != self.header.payload_bytes.get() {
            return Err(FrameError::Bounds("payload length"));
        }
        Ok(())
    }

    fn check_records(&self) -> Result<(), FrameError> {
        let mut before = None;
        for (index, descriptor) in self.descriptors.iter().enumerate() {
            let fail = |what| FrameError::Record { index, what };
            let record = self.decode(descriptor).ok_or(fail("of an unknown kind"))?;
            record.check().map_err(fail)?;
            let in_order = match before {
                None => descriptor.seq_delta.get() == 0,
                Some(before) => record.seq > before,
            };
            if !in_order || record.seq.0 > self.header.last_seq.get() {
                return Err(fail("out of order"));
            }
            before = Some(record.seq);
            let mut left = record.payload_bytes();
            if left > 0 {
                for piece in self.pieces(index) {
                    left -= piece.bytes as u64;
                }
            }
            if left > 0 {
                return Err(fail("beyond the chunks"));
            }
        }
        if before != Some(Seq(self.header.last_seq.get())) {
            return Err(FrameError::Bounds("last sequence"));
        }
        Ok(())
    }

    fn decode(&self, descriptor: &Descriptor) -> Option<Record> {
        let delta_ns = u64::from(descriptor.time_delta_us.get()) * 1000;
        Some(Record {
            kind: Kind::from_u8(descriptor.kind)?,
            flags: descriptor.flags,
            volume: VolumeId(descriptor.volume.get()),
            seq: Seq(self
                .header
                .first_seq
                .get()
                .checked_add(u64::from(descriptor.seq_delta.get()))?),
            time_ns: self.header.time_ns.get().checked_add(delta_ns)?,
            start: Sector(descriptor.start.get()),
            sectors: descriptor.sectors.get(),
        })
    }

    /// The header.
    pub fn header(&self) -> &'a FrameHeader {
        self.header
    }

    /// The frame's bytes (after [`parse_meta`](Self::parse_meta): the meta's).
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The records in their order.
    pub fn records(&self) -> impl ExactSizeIterator<Item = Record> + '_ {
        let decode = |descriptor| self.decode(descriptor).expect("checked in parse_meta");
        self.descriptors.iter().map(decode)
    }

    /// The wall clock at a record of this frame, nanoseconds since 1970.
    pub fn wall_ns(&self, record: &Record) -> i64 {
        let delta = record.time_ns.saturating_sub(self.header.time_ns.get());
        self.header.wall_ns.get().saturating_add(i64::try_from(delta).unwrap_or(i64::MAX))
    }

    /// The rows of the chunk table.
    pub fn table(&self) -> &'a [ChunkEntry] {
        self.table
    }

    /// Where the payload of record `index` lies, piece by piece. Nothing for a record without one.
    pub fn pieces(&self, index: usize) -> impl Iterator<Item = Piece> + use<'a> {
        let table = self.table;
        let descriptor = self.descriptors.get(index);
        let mut left = descriptor
            .and_then(|descriptor| self.decode(descriptor))
            .map_or(0, |record| record.payload_bytes() as usize);
        let mut chunk = descriptor.map_or(0, |descriptor| descriptor.chunk.get() as usize);
        let mut offset = descriptor.map_or(0, |descriptor| descriptor.chunk_offset.get() as usize);
        std::iter::from_fn(move || {
            let raw = table.get(chunk)?.raw_bytes.get() as usize;
            let bytes = left.min(raw.checked_sub(offset).filter(|bytes| *bytes > 0)?);
            if bytes == 0 {
                return None;
            }
            let piece = Piece { chunk, offset, bytes };
            (left, chunk, offset) = (left - bytes, chunk + 1, 0);
            Some(piece)
        })
    }

    /// The stored bytes of chunk `index` and their offset from the frame's start, unchecked.
    pub fn stored_chunk(&self, index: usize) -> Option<(usize, &'a [u8])> {
        let entry = self.table.get(index)?;
        let before: usize =
            self.table[..index].iter().map(|entry| entry.stored_bytes.get() as usize).sum();
        let start = self.header.meta_bytes.get() as usize + before;
        let stored = self.bytes.get(start..start + entry.stored_bytes.get() as usize)?;
        Some((start, stored))
    }

    /// Checks every chunk's bytes against its checksum, without unpacking.
    ///
    /// # Errors
    /// [`FrameError::Chunk`], or [`FrameError::Short`] on a view of the meta alone.
    pub fn verify_chunks(&self) -> Result<(), FrameError> {
        let mut start = self.header.meta_bytes.get() as usize;
        for (index, entry) in self.table.iter().enumerate() {
            let end = start + entry.stored_bytes.get() as usize;
            let short = FrameError::Short { have: self.bytes.len(), want: end };
            let stored = self.bytes.get(start..end).ok_or(short)?;
            entry.verify(stored).map_err(|error| FrameError::Chunk { index, error })?;
            start = end;
        }
        Ok(())
    }

    /// The payload of record `index`, unpacked and checked. For tools and tests: a reader that wants
    /// speed unpacks each chunk once.
    ///
    /// # Errors
    /// [`FrameError::Chunk`], or [`FrameError::Short`] on a view of the meta alone.
    pub fn payload(&self, index: usize) -> Result<Vec<u8>, FrameError> {
        let mut payload = Vec::new();
        let mut raw = Vec::with_capacity(CHUNK_BYTES_MAX);
        for piece in self.pieces(index) {
            let want = self.header.frame_bytes();
            let (_, stored) = self
                .stored_chunk(piece.chunk)
                .ok_or(FrameError::Short { have: self.bytes.len(), want })?;
            self.table[piece.chunk]
                .unpack(stored, &mut raw)
                .map_err(|error| FrameError::Chunk { index: piece.chunk, error })?;
            payload.extend_from_slice(&raw[piece.offset..piece.offset + piece.bytes]);
        }
        Ok(payload)
    }
}

/// The checksum of a meta part, leaving out the eight bytes in the header where it is kept.
pub(crate) fn meta_crc(meta: &[u8]) -> u64 {
    crc64_of([&meta[..HEADER_BYTES - 8], &meta[HEADER_BYTES..]])
}
