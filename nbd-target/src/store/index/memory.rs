//! The index of a segment that is not sealed yet.

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
};

use tidemark_journal::{FrameView, Kind, Record, SECTOR_BYTES, Sector, Seq, VolumeId};

use super::{
    ChunkRow, FrameRow,
    entry::{Content, Key},
    lookup::{Query, Sorted, find},
};

/// Entries, chunks and frames of one segment, in memory.
#[derive(Default)]
pub struct MemoryIndex {
    entries: BTreeMap<Key, Content>,
    chunks: Vec<ChunkRow>,
    frames: Vec<FrameRow>,
    /// The length classes in use, by volume.
    classes: HashMap<VolumeId, u16>,
}

impl MemoryIndex {
    /// Adds a frame that begins at byte `offset` of the segment.
    pub fn insert(&mut self, frame: &FrameView<'_>, offset: u64) {
        let header = frame.header();
        let first_chunk = self.chunks.len() as u32;
        let mut chunk_at = offset + u64::from(header.meta_bytes.get());
        for entry in frame.table() {
            self.chunks.push(ChunkRow {
                offset: chunk_at as u32,
                stored_bytes: entry.stored_bytes.get(),
                raw_bytes: entry.raw_bytes.get(),
                codec: entry.codec,
                crc: entry.crc.get(),
            });
            chunk_at += u64::from(entry.stored_bytes.get());
        }
        self.frames.push(FrameRow {
            offset: offset as u32,
            meta_bytes: header.meta_bytes.get(),
            first: Seq(header.first_seq.get()),
            last: Seq(header.last_seq.get()),
            time_ns: header.time_ns.get(),
            wall_ns: header.wall_ns.get(),
        });
        for (index, record) in frame.records().enumerate() {
            match record.kind {
                kind if kind.changes_content() && record.payload_bytes() == 0 => {
                    self.put(&record, record.start, record.sectors, Content::Zero);
                }
                kind if kind.changes_content() => {
                    let mut start = record.start;
                    for piece in frame.pieces(index) {
                        let sectors = (piece.bytes as u64 / SECTOR_BYTES) as u32;
                        let chunk = first_chunk + piece.chunk as u32;
                        let data = Content::Data { chunk, offset: piece.offset as u32 };
                        self.put(&record, start, sectors, data);
                        start = Sector(start.0 + u64::from(sectors));
                    }
                }
                Kind::Unreadable => {
                    self.put(&record, record.start, record.sectors, Content::Unreadable);
                }
                _ => {}
            }
        }
    }

    /// Collects the extents that overlap the query, as [`find`] does.
    pub fn find(&self, query: &Query, found: impl FnMut(Key, Content)) {
        let classes = self.classes.get(&query.volume).copied().unwrap_or(0);
        let Ok(()) = find(&mut &self.entries, classes, query, found);
    }

    /// A chunk's place.
    pub fn chunk(&self, number: u32) -> Option<&ChunkRow> {
        self.chunks.get(number as usize)
    }

    /// The entries in their order.
    pub fn entries(&self) -> &BTreeMap<Key, Content> {
        &self.entries
    }

    /// The chunks in the order of the file.
    pub fn chunks(&self) -> &[ChunkRow] {
        &self.chunks
    }

    /// The frames in the order of the file.
    pub fn frames(&self) -> &[FrameRow] {
        &self.frames
    }

    /// The length classes in use, by volume.
    pub fn classes(&self) -> &HashMap<VolumeId, u16> {
        &self.classes
    }

    fn put(&mut self, record: &Record, start: Sector, sectors: u32, content: Content) {
        let key = Key::new(record.volume, start, sectors, record.seq);
        *self.classes.entry(record.volume).or_default() |= 1 << key.class;
        self.entries.insert(key, content);
    }
}

impl Sorted for &BTreeMap<Key, Content> {
    type Error = Infallible;

    fn at_or_below(&mut self, key: &Key) -> Result<Option<(Key, Content)>, Infallible> {
        Ok(self.range(..=key).next_back().map(|(key, content)| (*key, *content)))
    }
}
