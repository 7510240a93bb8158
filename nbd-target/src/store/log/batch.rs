//! What is written at once: frames, one after the other, up to a multiple of 4096 bytes.

use std::io;

use tidemark_journal::{
    frame::{FRAME_BYTES_MAX, FrameHeader},
    segment::{BLOCK_BYTES, SegmentStart},
};
use tidemark_link::seam::AlignedBuf;

use super::{LogOptions, writer::Waiting};
use crate::store::{index::sealed, journal::Journal};

/// The most bytes in a batch; a longer frame is a batch by itself.
const BATCH_BYTES_MAX: usize = 8 << 20;

/// What a segment has taken in, whether it is on the disk or on its way.
#[derive(Default)]
pub(super) struct Content {
    pub hasher: blake3::Hasher,
    /// Upper bounds of what the index will hold.
    pub entries: usize,
    pub chunks: usize,
    pub frames: usize,
}

impl Content {
    /// Whether a frame that begins at byte `at` goes into a file of so many bytes, with the index.
    pub fn fits(&self, needs: &Needs, at: u64, file_bytes: u64, options: &LogOptions) -> bool {
        let index = sealed::bytes_max(
            self.entries + needs.entries,
            self.chunks + needs.chunks,
            self.frames + 1,
        );
        let data = (at + needs.bytes as u64).next_multiple_of(BLOCK_BYTES);
        data + index + BLOCK_BYTES <= file_bytes
            && self.entries + needs.entries <= options.entries_max
    }
}

/// Frames that are written at once, and the memory for it, to be used again.
pub(super) struct Batch {
    pub buffer: AlignedBuf,
    /// Each with the byte of the segment at which it begins.
    pub frames: Vec<(u64, Waiting)>,
    /// Bytes before them that belong to no frame.
    pub header_bytes: u64,
    begins_at: u64,
}

impl Batch {
    pub fn new() -> Batch {
        let bytes_max = FRAME_BYTES_MAX + 2 * BLOCK_BYTES as usize + BATCH_BYTES_MAX;
        let buffer = AlignedBuf::new(bytes_max);
        Batch { buffer, frames: Vec::new(), header_bytes: 0, begins_at: 0 }
    }

    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Begins a batch at a byte of the segment.
    pub fn begin(&mut self, at: u64) {
        self.buffer.clear();
        self.frames.clear();
        (self.header_bytes, self.begins_at) = (0, at);
    }

    /// Puts a segment's header before the frames.
    pub fn put_start(&mut self, start: &SegmentStart, content: &mut Content) -> io::Result<()> {
        let bytes = start.encode();
        self.buffer.extend(&bytes).map_err(io::Error::other)?;
        content.hasher.update(&bytes);
        self.header_bytes = self.buffer.len() as u64;
        Ok(())
    }

    /// Byte of the segment at which the next frame would begin.
    pub fn end(&self) -> u64 {
        self.begins_at + self.buffer.len() as u64
    }

    /// Whether a further frame may join: not at a multiple of 4096, where a batch begins.
    pub fn is_open(&self) -> bool {
        self.is_empty()
            || !(self.buffer.len() as u64).is_multiple_of(BLOCK_BYTES)
                && self.buffer.len() < BATCH_BYTES_MAX
    }

    /// Takes a frame in, for which there is room.
    pub fn push(
        &mut self,
        waiting: Waiting,
        needs: &Needs,
        content: &mut Content,
    ) -> io::Result<()> {
        let at = self.end();
        self.buffer.extend(&waiting.bytes).map_err(io::Error::other)?;
        content.hasher.update(&waiting.bytes);
        content.entries += needs.entries;
        content.chunks += needs.chunks;
        content.frames += 1;
        self.frames.push((at, waiting));
        Ok(())
    }

    /// Fills up to whole blocks.
    pub fn close(&mut self, content: &mut Content) {
        let end = self.buffer.len();
        self.buffer.pad_to_block();
        content.hasher.update(&self.buffer.as_slice()[end..]);
    }
}

/// What a frame takes.
#[derive(Clone, Copy)]
pub(super) struct Needs {
    pub bytes: usize,
    pub entries: usize,
    pub chunks: usize,
}

impl Needs {
    /// The most bytes by which the log grows: with padding, and the header of a segment.
    pub fn room_bytes(&self) -> u64 {
        (self.bytes as u64).next_multiple_of(BLOCK_BYTES) + BLOCK_BYTES
    }

    pub fn of(frame: &[u8]) -> io::Result<Needs> {
        let header = FrameHeader::peek(frame).map_err(io::Error::other)?;
        let chunks = header.chunks.get() as usize;
        // A record has an entry for each chunk it lies in; only its last one is shared.
        let entries = header.records.get() as usize + chunks;
        Ok(Needs { bytes: frame.len(), entries, chunks })
    }

    /// Whether a frame would make the log larger than it may be, with so many bytes on their way.
    /// One segment may always grow: only what follows it lets it be sealed, and only what is sealed
    /// can leave.
    pub fn exceed(&self, journal: &Journal, options: &LogOptions, under_way: u64) -> bool {
        let after = journal.bytes() + under_way + self.room_bytes();
        options.bytes_max.is_some_and(|max| after > max && journal.segments().len() > 1)
    }
}
