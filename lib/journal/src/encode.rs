//! Building frames.
//!
//! A [`FrameBuilder`] is filled record by record and then finished; its buffers are kept for the
//! next frame, so that a busy encoder allocates nothing. A content record of at most one chunk is
//! never split over two, so that a small read unpacks one chunk.

use zerocopy::IntoBytes;

use crate::{
    checksum::crc64,
    chunk::{CHUNK_BYTES_MAX, ChunkEntry, Codec},
    frame::{
        CHUNKS_MAX, FRAME_BYTES_MAX, FRAME_MAGIC, FRAME_VERSION, FrameHeader, HEADER_BYTES,
        RECORDS_MAX, meta_crc,
    },
    ids::{GroupId, Position, Seq, TermId},
    record::{Descriptor, Record},
};

/// Whether and how hard chunks are compressed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Compression {
    /// Every chunk stays raw.
    Off,
    /// zstd at this level; a chunk that shrinks by less than a sixteenth stays raw.
    Zstd(i32),
}

/// What a frame says of itself as a whole.
#[derive(Clone, Copy, Debug)]
pub struct FrameMeta {
    /// The group.
    pub group: GroupId,
    /// The writer's term.
    pub term: TermId,
    /// The position that the frame continues.
    pub before: Position,
    /// The source's wall clock at the first record, nanoseconds since 1970.
    pub wall_ns: i64,
}

/// The two parts of a finished frame, to be stored one after the other.
#[derive(Clone, Copy, Debug)]
pub struct EncodedFrame<'a> {
    /// Header, descriptors and chunk table.
    pub meta: &'a [u8],
    /// The chunks.
    pub payload: &'a [u8],
    /// Raw bytes of the payload.
    pub raw_bytes: u64,
    /// Last sequence in the frame.
    pub last: Seq,
}

impl EncodedFrame<'_> {
    /// Bytes of the whole frame.
    pub fn frame_bytes(&self) -> usize {
        self.meta.len() + self.payload.len()
    }

    /// Both parts in one vector.
    pub fn to_vec(&self) -> Vec<u8> {
        [self.meta, self.payload].concat()
    }
}

/// After a chunk that did not shrink, so many pieces of the next one are tried first, of so many bytes each: most of what
/// does not shrink comes in long runs, and trying it is the dearest thing that is done to it.
const SAMPLE_PIECES: usize = 8;
const SAMPLE_PIECE_BYTES: usize = 1 << 10;
/// The shortest chunk of which that is less than all.
const SAMPLED_BYTES_MIN: usize = 8 * SAMPLE_PIECES * SAMPLE_PIECE_BYTES;

/// Collects records and encodes them together.
pub struct FrameBuilder {
    compression: Compression,
    compressor: Option<zstd::bulk::Compressor<'static>>,
    descriptors: Vec<Descriptor>,
    table: Vec<ChunkEntry>,
    payload: Vec<u8>,
    /// Where in `payload` the raw bytes of the open chunk begin.
    open_at: usize,
    scratch: Vec<u8>,
    sample: Vec<u8>,
    /// The last chunk that was tried did not shrink.
    shrank_not: bool,
    meta: Vec<u8>,
    first: Option<Record>,
    last_seq: Seq,
    raw_bytes: u64,
}

impl FrameBuilder {
    /// An empty builder.
    pub fn new(compression: Compression) -> FrameBuilder {
        let mut builder = FrameBuilder {
            compression,
            compressor: None,
            descriptors: Vec::new(),
            table: Vec::new(),
            payload: Vec::new(),
            open_at: 0,
            scratch: Vec::new(),
            sample: Vec::new(),
            shrank_not: false,
            meta: Vec::new(),
            first: None,
            last_seq: Seq::ZERO,
            raw_bytes: 0,
        };
        builder.set_compression(compression);
        builder
    }

    /// Changes the compression of the chunks that are closed from now on.
    pub fn set_compression(&mut self, compression: Compression) {
        self.compressor = match compression {
            Compression::Off => None,
            // Without a compressor (no memory for its tables) chunks stay raw, which is correct.
            Compression::Zstd(level) => zstd::bulk::Compressor::new(level).ok(),
        };
        self.compression = compression;
    }

    /// The compression in force.
    pub fn compression(&self) -> Compression {
        self.compression
    }

    /// Whether nothing has been pushed.
    pub fn is_empty(&self) -> bool {
        self.first.is_none()
    }

    /// Records pushed so far.
    pub fn records(&self) -> usize {
        self.descriptors.len()
    }

    /// Raw payload bytes pushed so far.
    pub fn raw_bytes(&self) -> u64 {
        self.raw_bytes
    }

    /// Whether a record with so much payload, at this sequence and time, may still join.
    pub fn fits(&self, record: &Record) -> bool {
        let Some(first) = &self.first else { return true };
        let bytes = record.payload_bytes() as usize;
        let chunks = self.table.len() + 2 + bytes.div_ceil(CHUNK_BYTES_MAX);
        let meta = HEADER_BYTES
            + (self.descriptors.len() + 1) * size_of::<Descriptor>()
            + chunks * size_of::<ChunkEntry>();
        let delta_us = record.time_ns.saturating_sub(first.time_ns) / 1000;
        self.descriptors.len() < RECORDS_MAX
            && chunks <= CHUNKS_MAX
            && meta + self.payload.len() + bytes <= FRAME_BYTES_MAX
            && record.seq.0 - first.seq.0 <= u64::from(u32::MAX)
            && delta_us <= u64::from(u32::MAX)
    }

    /// Adds a record with its payload, given in pieces.
    ///
    /// # Panics
    /// When the record does not [`fit`](Self::fits), contradicts itself, goes back in sequence, or
    /// the pieces are not as long as the record says: all of these are mistakes of the caller.
    pub fn push<'p>(&mut self, record: &Record, payload: impl IntoIterator<Item = &'p [u8]>) {
        assert!(self.fits(record), "a record that does not fit its frame");
        assert_eq!(record.check(), Ok(()), "a record that contradicts itself: {record:?}");
        assert!(self.is_empty() || record.seq > self.last_seq, "a sequence that goes back");
        let first = *self.first.get_or_insert(*record);
        let bytes = record.payload_bytes() as usize;
        let (mut chunk, mut offset) = (0, 0);
        if bytes > 0 {
            let open = self.payload.len() - self.open_at;
            if open > 0 && open + bytes > CHUNK_BYTES_MAX {
                self.close_chunk();
            }
            (chunk, offset) = (self.table.len(), self.payload.len() - self.open_at);
            let mut pushed = 0;
            for mut piece in payload {
                pushed += piece.len();
                while !piece.is_empty() {
                    let room = CHUNK_BYTES_MAX - (self.payload.len() - self.open_at);
                    let (head, tail) = piece.split_at(room.min(piece.len()));
                    self.payload.extend_from_slice(head);
                    if self.payload.len() - self.open_at == CHUNK_BYTES_MAX {
                        self.close_chunk();
                    }
                    piece = tail;
                }
            }
            assert_eq!(pushed, bytes, "a payload of another length than its record says");
            self.raw_bytes += bytes as u64;
        }
        self.descriptors.push(Descriptor {
            kind: record.kind as u8,
            flags: record.flags,
            volume: record.volume.0.into(),
            seq_delta: ((record.seq.0 - first.seq.0) as u32).into(),
            time_delta_us: ((record.time_ns.saturating_sub(first.time_ns) / 1000) as u32).into(),
            sectors: record.sectors.into(),
            start: record.start.0.into(),
            chunk: (chunk as u32).into(),
            chunk_offset: (offset as u32).into(),
        });
        self.last_seq = record.seq;
    }

    /// Closes the frame. The parts are valid until the builder is used again; call
    /// [`clear`](Self::clear) before the next frame.
    ///
    /// # Panics
    /// On an empty builder, or a position before that is not below the first record.
    pub fn finish(&mut self, about: &FrameMeta) -> EncodedFrame<'_> {
        let first = self.first.expect("a frame holds at least one record");
        assert!(about.before.seq < first.seq, "a frame that does not go forward");
        if self.payload.len() > self.open_at {
            self.close_chunk();
        }
        let table_bytes = self.table.as_slice().as_bytes();
        let descriptor_bytes = self.descriptors.as_slice().as_bytes();
        let meta_bytes = HEADER_BYTES + descriptor_bytes.len() + table_bytes.len();
        let mut header = FrameHeader {
            magic: FRAME_MAGIC,
            version: FRAME_VERSION.into(),
            flags: 0.into(),
            meta_bytes: (meta_bytes as u32).into(),
            records: (self.descriptors.len() as u32).into(),
            chunks: (self.table.len() as u32).into(),
            hash_bytes: 0.into(),
            payload_bytes: (self.payload.len() as u64).into(),
            raw_bytes: self.raw_bytes.into(),
            group: about.group.0,
            term: about.term.0,
            before_term: about.before.term.0,
            before_seq: about.before.seq.0.into(),
            first_seq: first.seq.0.into(),
            last_seq: self.last_seq.0.into(),
            time_ns: first.time_ns.into(),
            wall_ns: about.wall_ns.into(),
            key_epoch: [0; 16],
            nonce: 0.into(),
            reserved: [0; 32],
            crc: 0.into(),
        };
        self.meta.clear();
        self.meta.extend_from_slice(header.as_bytes());
        self.meta.extend_from_slice(descriptor_bytes);
        self.meta.extend_from_slice(table_bytes);
        header.crc = meta_crc(&self.meta).into();
        self.meta[..HEADER_BYTES].copy_from_slice(header.as_bytes());
        EncodedFrame {
            meta: &self.meta,
            payload: &self.payload,
            raw_bytes: self.raw_bytes,
            last: self.last_seq,
        }
    }

    /// Forgets the frame and keeps the buffers.
    pub fn clear(&mut self) {
        self.descriptors.clear();
        self.table.clear();
        self.payload.clear();
        self.open_at = 0;
        self.first = None;
        self.raw_bytes = 0;
    }

    fn close_chunk(&mut self) {
        let raw_bytes = self.payload.len() - self.open_at;
        let mut codec = Codec::Raw;
        if let Some(compressor) = &mut self.compressor {
            let raw = &self.payload[self.open_at..];
            let sampled = self.shrank_not && raw_bytes >= SAMPLED_BYTES_MIN;
            let worth = !sampled || {
                take_sample(raw, &mut self.sample);
                shrink(compressor, &self.sample, &mut self.scratch).is_some()
            };
            let shrunk = worth.then(|| shrink(compressor, raw, &mut self.scratch)).flatten();
            self.shrank_not = shrunk.is_none();
            if let Some(bytes) = shrunk {
                self.payload.truncate(self.open_at);
                self.payload.extend_from_slice(&self.scratch[..bytes]);
                codec = Codec::Zstd;
            }
        }
        let stored = &self.payload[self.open_at..];
        self.table.push(ChunkEntry {
            raw_bytes: (raw_bytes as u32).into(),
            stored_bytes: (stored.len() as u32).into(),
            codec: codec as u8,
            reserved: [0; 7],
            crc: crc64(stored).into(),
            tag: [0; 16],
        });
        self.open_at = self.payload.len();
    }
}

/// Compresses into `scratch`; the number of bytes, if they are fewer by a sixteenth at least.
fn shrink(
    compressor: &mut zstd::bulk::Compressor<'static>,
    raw: &[u8],
    scratch: &mut Vec<u8>,
) -> Option<usize> {
    scratch.resize(raw.len() - raw.len().div_ceil(16), 0);
    // An error means that the result is longer than that.
    compressor.compress_to_buffer(raw, scratch.as_mut_slice()).ok()
}

/// Takes pieces of a chunk at equal distances, in turn from the four quarters of a block of 4 KiB: records' blocks often
/// begin alike.
fn take_sample(raw: &[u8], sample: &mut Vec<u8>) {
    sample.clear();
    for piece in 0..SAMPLE_PIECES {
        let at = raw.len() / SAMPLE_PIECES * piece + piece % 4 * SAMPLE_PIECE_BYTES;
        sample.extend_from_slice(&raw[at..at + SAMPLE_PIECE_BYTES]);
    }
}
