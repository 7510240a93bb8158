//! Making an index anew from the frames it is of.
//!
//! The meta of a frame says all that an index says of it, and has a checksum of its own; so the
//! index of a segment whose frames' metas are whole can be made again, whatever has happened to the
//! index on disk or to the chunks.

use std::sync::Arc;

use tidemark_journal::{
    FrameView, GroupId,
    checksum::crc64,
    frame::{FrameHeader, HEADER_BYTES},
    segment::{BLOCK_BYTES, Next, SegmentEnd, next},
};

use super::{
    ReadError,
    index::{MemoryIndex, sealed},
    recover::KnownSegment,
    segment::Segment,
};
use crate::machine::How;

/// What the frames of a segment say.
pub struct Scanned {
    /// The index of all frames whose meta is whole.
    pub index: MemoryIndex,
    /// The index of those after the last frame that is not.
    pub tail: Option<MemoryIndex>,
    /// Bytes at which a frame should begin and none does.
    pub missing: Vec<u64>,
}

impl Scanned {
    /// Whether every frame's meta is whole.
    pub fn is_whole(&self) -> bool {
        self.missing.is_empty()
    }
}

/// Reads the metas of all frames of a sealed segment. Where one is damaged it goes on with the next
/// frame at a multiple of 4096.
///
/// # Errors
/// When the file cannot be read.
pub fn scan(segment: &Segment, group: GroupId) -> Result<Scanned, ReadError> {
    let summary = segment.summary();
    let end = summary.data_bytes;
    let io = |error| ReadError::io(segment.name(), error);
    let file = segment.file().map_err(io)?;
    let mut found = Scanned { index: MemoryIndex::default(), tail: None, missing: Vec::new() };
    let mut header = vec![0; HEADER_BYTES];
    let mut meta = Vec::new();
    let mut last = summary.before.seq;
    let mut at = BLOCK_BYTES;
    while at < end {
        let have = (end - at).min(HEADER_BYTES as u64) as usize;
        file.read_up_to(&mut header[..have], at).map_err(io)?;
        match next(at, &header[..have]) {
            Next::Pad(further) => at = further,
            Next::Frame(bytes) if at + bytes as u64 <= end => {
                let meta_bytes = FrameHeader::peek(&header).map_or(0, |h| h.meta_bytes.get());
                meta.resize(meta_bytes as usize, 0);
                file.read_up_to(&mut meta, at).map_err(io)?;
                let good = FrameView::parse_meta(&meta).ok().filter(|view| {
                    view.header().group() == group && view.header().first_seq.get() > last.0
                });
                let Some(view) = good else {
                    at = found.miss(at);
                    continue;
                };
                last = view.header().last().seq;
                found.index.insert(&view, at);
                if let Some(tail) = &mut found.tail {
                    tail.insert(&view, at);
                }
                at += bytes as u64;
            }
            Next::Frame(_) | Next::End(_) => at = found.miss(at),
        }
    }
    if last != summary.last.seq && found.is_whole() {
        found.miss(end);
    }
    Ok(found)
}

impl Scanned {
    /// A frame is missing; where to look for the next one.
    fn miss(&mut self, at: u64) -> u64 {
        // The blocks after a missing frame are mostly its own.
        if self.missing.last().is_none_or(|last| at - last > BLOCK_BYTES) {
            self.missing.push(at);
        } else if let Some(last) = self.missing.last_mut() {
            *last = at;
        }
        self.tail = Some(MemoryIndex::default());
        (at + 1).next_multiple_of(BLOCK_BYTES)
    }
}

/// A segment in place of one whose index is damaged, with the index in memory, and whether it is all
/// of it: else it has only what follows the last damaged frame.
///
/// # Errors
/// When the file cannot be read.
pub fn stand_in(segment: &Segment, group: GroupId) -> Result<(Arc<Segment>, bool), ReadError> {
    let scanned = scan(segment, group)?;
    let whole = scanned.is_whole();
    let index = scanned.tail.unwrap_or(scanned.index);
    let (path, number) = (segment.path().to_owned(), segment.number());
    let made = Segment::open(path, number, segment.summary(), index, segment.caches());
    Ok((Arc::new(made), whole))
}

/// Makes the index and the end of a sealed segment anew in its file, if all frames' metas are whole.
/// Says whether it did. The end is written only when the frames are those that `known` speaks of, or
/// when it was good before.
///
/// # Errors
/// When the file cannot be read or written.
pub fn mend(segment: &Segment, group: GroupId, known: &KnownSegment) -> Result<bool, ReadError> {
    let scanned = scan(segment, group)?;
    if !scanned.is_whole() {
        return Ok(false);
    }
    let io = |error| ReadError::io(segment.name(), error);
    let index = sealed::build(&scanned.index, segment.number(), known.summary.before.seq);
    let file = segment.machine().open(segment.path(), How::Write).map_err(io)?;
    let bytes = file.length().map_err(io)?;
    let end_at = known.index_at + index.len() as u64;
    let mut block = vec![0; BLOCK_BYTES as usize];
    file.read_up_to(&mut block, bytes.saturating_sub(BLOCK_BYTES)).map_err(io)?;
    let old = SegmentEnd::decode(&block).ok().filter(|end| {
        (end.number, end.chain, end.index_at) == (segment.number(), known.chain, known.index_at)
    });
    let data_hash = match old {
        Some(old) => Some(old.data_hash),
        None => data_hash(segment, known)?,
    };
    file.write_all_at(&index, known.index_at).map_err(io)?;
    file.sync_data().map_err(io)?;
    let Some(data_hash) = data_hash else { return Ok(true) };
    let trailer = SegmentEnd {
        number: segment.number(),
        index_at: known.index_at,
        index_bytes: index.len() as u64,
        last: known.summary.last,
        data_hash,
        chain: known.chain,
        index_crc: crc64(&index),
    };
    if old != Some(trailer) || bytes != end_at + BLOCK_BYTES {
        file.write_all_at(&trailer.encode(), end_at).map_err(io)?;
        file.set_len(end_at + BLOCK_BYTES).map_err(io)?;
    }
    file.sync_all().map_err(io)?;
    Ok(true)
}

/// The hash of a segment's bytes before the index, if they are those that the catalogue speaks of.
fn data_hash(segment: &Segment, known: &KnownSegment) -> Result<Option<[u8; 32]>, ReadError> {
    let io = |error| ReadError::io(segment.name(), error);
    let file = segment.file().map_err(io)?;
    let mut block = vec![0; 1 << 20];
    file.read_up_to(&mut block[..BLOCK_BYTES as usize], 0).map_err(io)?;
    let Ok(start) = tidemark_journal::segment::SegmentStart::decode(&block) else {
        return Ok(None);
    };
    let mut hasher = blake3::Hasher::new();
    let mut at = 0;
    while at < known.index_at {
        let step = (known.index_at - at).min(block.len() as u64) as usize;
        file.read_up_to(&mut block[..step], at).map_err(io)?;
        hasher.update(&block[..step]);
        at += step as u64;
    }
    let hash = *hasher.finalize().as_bytes();
    Ok((SegmentEnd::chain_hash(&start.chain_before, &hash) == known.chain).then_some(hash))
}
