//! Which records a frame has, and how their payloads lie in its chunks.

use crate::{
    chunk::{CHUNK_BYTES_MAX, ChunkEntry},
    frame::{CHUNKS_MAX, FRAME_BYTES_MAX, HEADER_BYTES, RECORDS_MAX},
    ids::Seq,
    record::{Descriptor, Record},
};

/// The records of a frame that is to be written.
pub struct FramePlan {
    bytes_max: usize,
    descriptors: Vec<Descriptor>,
    /// Raw bytes of the chunks that take no more.
    closed: Vec<usize>,
    /// Those of the chunk after them.
    open_bytes: usize,
    first: Option<Record>,
    last_seq: Seq,
    raw_bytes: u64,
}

impl Default for FramePlan {
    /// For a frame as long as frames may be.
    fn default() -> FramePlan {
        FramePlan::of_at_most(FRAME_BYTES_MAX)
    }
}

impl FramePlan {
    /// For a frame of at most so many bytes, unless its first record alone has more.
    pub fn of_at_most(bytes_max: usize) -> FramePlan {
        FramePlan {
            bytes_max: bytes_max.min(FRAME_BYTES_MAX),
            descriptors: Vec::new(),
            closed: Vec::new(),
            open_bytes: 0,
            first: None,
            last_seq: Seq::ZERO,
            raw_bytes: 0,
        }
    }

    /// Whether it has no record.
    pub fn is_empty(&self) -> bool {
        self.first.is_none()
    }

    /// The first record.
    pub fn first(&self) -> Option<&Record> {
        self.first.as_ref()
    }

    /// The last record's sequence.
    pub fn last_seq(&self) -> Seq {
        self.last_seq
    }

    /// Raw bytes of its payload.
    pub fn raw_bytes(&self) -> u64 {
        self.raw_bytes
    }

    /// How many bytes the frame has at most: so many if no chunk shrinks.
    pub fn frame_bytes_max(&self) -> usize {
        self.meta_bytes() + self.raw_bytes as usize
    }

    /// Bytes of header, descriptors and chunk table.
    pub(super) fn meta_bytes(&self) -> usize {
        meta_bytes(self.descriptors.len(), self.chunks().count())
    }

    pub(super) fn descriptors(&self) -> &[Descriptor] {
        &self.descriptors
    }

    /// Raw bytes of each chunk.
    pub(super) fn chunks(&self) -> impl Iterator<Item = usize> {
        let open = (self.open_bytes > 0).then_some(self.open_bytes);
        self.closed.iter().copied().chain(open)
    }

    /// Whether a record with so much payload, at this sequence and time, may still join.
    pub fn fits(&self, record: &Record) -> bool {
        let Some(first) = &self.first else { return true };
        let bytes = record.payload_bytes() as usize;
        let chunks = self.closed.len() + 2 + bytes.div_ceil(CHUNK_BYTES_MAX);
        let meta = meta_bytes(self.descriptors.len() + 1, chunks);
        let delta_us = record.time_ns.saturating_sub(first.time_ns) / 1000;
        self.descriptors.len() < RECORDS_MAX
            && chunks <= CHUNKS_MAX
            && meta + self.raw_bytes as usize + bytes <= self.bytes_max
            && record.seq.0 - first.seq.0 <= u64::from(u32::MAX)
            && delta_us <= u64::from(u32::MAX)
    }

    /// Adds a record.
    ///
    /// # Panics
    /// When the record does not [`fit`](Self::fits), contradicts itself, or goes back in sequence: all of these are
    /// mistakes of the caller.
    pub fn push(&mut self, record: &Record) {
        assert!(self.fits(record), "a record that does not fit its frame");
        assert_eq!(record.check(), Ok(()), "a record that contradicts itself: {record:?}");
        assert!(self.is_empty() || record.seq > self.last_seq, "a sequence that goes back");
        let first = *self.first.get_or_insert(*record);
        let (chunk, offset) = self.place(record.payload_bytes() as usize);
        self.descriptors.push(Descriptor::of(record, &first, chunk, offset));
        self.last_seq = record.seq;
    }

    /// The chunk in which a payload of so many bytes begins, and where in it; zeros for none.
    fn place(&mut self, bytes: usize) -> (usize, usize) {
        if bytes == 0 {
            return (0, 0);
        }
        if self.open_bytes > 0 && self.open_bytes + bytes > CHUNK_BYTES_MAX {
            self.close();
        }
        let place = (self.closed.len(), self.open_bytes);
        self.raw_bytes += bytes as u64;
        let mut left = bytes;
        while left > 0 {
            let taken = left.min(CHUNK_BYTES_MAX - self.open_bytes);
            self.open_bytes += taken;
            left -= taken;
            if self.open_bytes == CHUNK_BYTES_MAX {
                self.close();
            }
        }
        place
    }

    fn close(&mut self) {
        self.closed.push(std::mem::take(&mut self.open_bytes));
    }

    /// Forgets the records and keeps the buffers.
    pub fn clear(&mut self) {
        self.descriptors.clear();
        self.closed.clear();
        (self.open_bytes, self.raw_bytes, self.first) = (0, 0, None);
    }
}

fn meta_bytes(records: usize, chunks: usize) -> usize {
    HEADER_BYTES + records * size_of::<Descriptor>() + chunks * size_of::<ChunkEntry>()
}
