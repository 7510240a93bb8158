//! The index at the end of a sealed segment.
//!
//! ```text
//! head | entries | fences | chunks | frames        pages of 4096 bytes
//! ```
//!
//! The head holds the counts, the first fence of each page of fences, and the length classes in use
//! by each volume; it alone stays in memory. A lookup reads a page of fences and a page of entries,
//! both through the bounded cache.

use std::{io, sync::Arc};

use tidemark_journal::{Seq, VolumeId};
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

use super::{
    ChunkRow, FrameRow, MemoryIndex, StoredChunkRow, StoredFrameRow,
    entry::{Content, EntryRow, Key},
    lookup::{Query, Sorted, find},
    page::{self, PageKind, PageReader, ROWS_BYTES, rows_per_page},
};

const ENTRIES_PER_PAGE: usize = rows_per_page::<EntryRow>();
const CHUNKS_PER_PAGE: usize = rows_per_page::<StoredChunkRow>();
const FRAMES_PER_PAGE: usize = rows_per_page::<StoredFrameRow>();
const HEAD_MAGIC: [u8; 8] = *b"TMIDX\0\0\x01";

/// The start of the head, 48 bytes; the fences and the volumes' rows follow, over as many pages as
/// they take.
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 8 | magic `TMIDX` 0 0, version 1 |
/// | 8 | 8 | base: the sequence that the entries' are counted from |
/// | 16 | 4 | entries |
/// | 20 | 4 | chunks |
/// | 24 | 4 | frames |
/// | 28 | 4 | pages of the head |
/// | 32 | 4 | pages of entries |
/// | 36 | 4 | pages of fences |
/// | 40 | 4 | volumes: rows of volume (2) and length classes in use (2) |
/// | 44 | 4 | reserved, zero |
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct HeadStart {
    magic: [u8; 8],
    base: U64,
    entries: U32,
    chunks: U32,
    frames: U32,
    head_pages: U32,
    entry_pages: U32,
    fence_pages: U32,
    volumes: U32,
    reserved: U32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct VolumeRow {
    volume: U16,
    classes: U16,
}

const _: () = assert!(size_of::<HeadStart>() == 48 && size_of::<VolumeRow>() == 4);

impl HeadStart {
    /// Whether the number of each page is one.
    fn pages_fit(&self) -> bool {
        let of = |rows: U32, per_page: usize| u64::from(rows.get()).div_ceil(per_page as u64);
        let parts = [self.head_pages, self.entry_pages, self.fence_pages];
        let rows = of(self.chunks, CHUNKS_PER_PAGE) + of(self.frames, FRAMES_PER_PAGE);
        parts.iter().map(|pages| u64::from(pages.get())).sum::<u64>() + rows <= u64::from(u32::MAX)
    }
}

/// The bytes that [`build`] will need, at most, for so many rows.
pub fn bytes_max(entries: usize, chunks: usize, frames: usize) -> u64 {
    let entry_pages = entries.div_ceil(ENTRIES_PER_PAGE);
    let fence_pages = entry_pages.div_ceil(ENTRIES_PER_PAGE);
    let head = size_of::<HeadStart>() + fence_pages * size_of::<EntryRow>() + (4 << 16);
    let pages = entry_pages
        + fence_pages
        + chunks.div_ceil(CHUNKS_PER_PAGE)
        + frames.div_ceil(FRAMES_PER_PAGE)
        + head.div_ceil(ROWS_BYTES);
    (pages * page::PAGE_BYTES) as u64
}

/// The index's pages for a segment whose sequences are above `base`.
pub fn build(index: &MemoryIndex, segment: u64, base: Seq) -> Vec<u8> {
    let encode = |(key, content): (&Key, &Content)| EntryRow::encode(key, content, base);
    let entries: Vec<EntryRow> = index.entries().iter().map(encode).collect();
    let fences: Vec<EntryRow> = entries.iter().step_by(ENTRIES_PER_PAGE).copied().collect();
    let tops: Vec<EntryRow> = fences.iter().step_by(ENTRIES_PER_PAGE).copied().collect();
    let chunks: Vec<StoredChunkRow> = index.chunks().iter().map(Into::into).collect();
    let frames: Vec<StoredFrameRow> = index.frames().iter().map(Into::into).collect();
    let mut volumes: Vec<VolumeRow> = index
        .classes()
        .iter()
        .map(|(id, classes)| VolumeRow { volume: id.0.into(), classes: (*classes).into() })
        .collect();
    // The same frames always have the same index.
    volumes.sort_unstable_by_key(|row| row.volume.get());
    let head_bytes = size_of::<HeadStart>()
        + tops.as_slice().as_bytes().len()
        + volumes.as_slice().as_bytes().len();
    let start = HeadStart {
        magic: HEAD_MAGIC,
        base: base.0.into(),
        entries: (entries.len() as u32).into(),
        chunks: (chunks.len() as u32).into(),
        frames: (frames.len() as u32).into(),
        head_pages: (head_bytes.div_ceil(ROWS_BYTES) as u32).into(),
        entry_pages: (fences.len() as u32).into(),
        fence_pages: (tops.len() as u32).into(),
        volumes: (volumes.len() as u32).into(),
        reserved: 0.into(),
    };
    let head =
        [start.as_bytes(), tops.as_slice().as_bytes(), volumes.as_slice().as_bytes()].concat();

    let mut pages = Vec::new();
    for part in head.chunks(ROWS_BYTES) {
        page::append(&mut pages, segment, PageKind::Head, 0, part);
    }
    append_rows(&mut pages, segment, PageKind::Entries, &entries);
    append_rows(&mut pages, segment, PageKind::Fences, &fences);
    append_rows(&mut pages, segment, PageKind::Chunks, &chunks);
    append_rows(&mut pages, segment, PageKind::Frames, &frames);
    pages
}

fn append_rows<R: IntoBytes + Immutable>(
    pages: &mut Vec<u8>,
    segment: u64,
    kind: PageKind,
    rows: &[R],
) {
    for part in rows.chunks(ROWS_BYTES / size_of::<R>()) {
        page::append(pages, segment, kind, part.len(), part.as_bytes());
    }
}

/// The head of an index on disk.
pub struct SealedIndex {
    base: Seq,
    entries: u32,
    chunks: u32,
    frames: u32,
    head_pages: u32,
    entry_pages: u32,
    fence_pages: u32,
    tops: Vec<Key>,
    classes: Vec<(VolumeId, u16)>,
}

impl SealedIndex {
    /// Reads an index's head.
    ///
    /// # Errors
    /// When it cannot be read or is damaged.
    pub fn open(reader: PageReader<'_>) -> io::Result<SealedIndex> {
        let first = reader.page(0, PageKind::Head)?;
        let damaged = || {
            let text = format!("the head of the index of segment {} is damaged", reader.segment);
            io::Error::new(io::ErrorKind::InvalidData, text)
        };
        let (start, _) = HeadStart::read_from_prefix(first.bytes()).map_err(|_| damaged())?;
        if start.magic != HEAD_MAGIC || !start.pages_fit() {
            return Err(damaged());
        }
        let mut bytes = first.bytes().to_vec();
        for number in 1..start.head_pages.get() {
            bytes.extend_from_slice(reader.page(number, PageKind::Head)?.bytes());
        }
        let rest = bytes.get(size_of::<HeadStart>()..).unwrap_or_default();
        let base = Seq(start.base.get());
        let (tops, rest) =
            <[EntryRow]>::ref_from_prefix_with_elems(rest, start.fence_pages.get() as usize)
                .map_err(|_| damaged())?;
        let (volumes, _) =
            <[VolumeRow]>::ref_from_prefix_with_elems(rest, start.volumes.get() as usize)
                .map_err(|_| damaged())?;
        let tops = tops.iter().map(|row| Some(row.decode(base)?.0)).collect::<Option<Vec<_>>>();
        let classes = |row: &VolumeRow| (VolumeId(row.volume.get()), row.classes.get());
        Ok(SealedIndex {
            base,
            entries: start.entries.get(),
            chunks: start.chunks.get(),
            frames: start.frames.get(),
            head_pages: start.head_pages.get(),
            entry_pages: start.entry_pages.get(),
            fence_pages: start.fence_pages.get(),
            tops: tops.ok_or_else(damaged)?,
            classes: volumes.iter().map(classes).collect(),
        })
    }

    /// Collects the extents that overlap the query, as [`find`] does.
    ///
    /// # Errors
    /// When a page cannot be read or is damaged.
    pub fn find(
        &self,
        reader: PageReader<'_>,
        query: &Query,
        found: impl FnMut(Key, Content),
    ) -> io::Result<()> {
        let Some((_, classes)) = self.classes.iter().find(|(id, _)| *id == query.volume) else {
            return Ok(());
        };
        let mut cursor = Cursor { index: self, reader, fences: None, entries: None };
        find(&mut cursor, *classes, query, found)
    }

    /// All entries in their order, page by page.
    ///
    /// # Errors
    /// When a page cannot be read or is damaged.
    pub fn for_each(
        &self,
        reader: PageReader<'_>,
        mut each: impl FnMut(Key, Content),
    ) -> io::Result<()> {
        for number in 0..self.entry_pages {
            let page = reader.page(self.head_pages + number, PageKind::Entries)?;
            for row in page.rows::<EntryRow>() {
                let (key, content) = row.decode(self.base).ok_or_else(|| bad_row(reader))?;
                each(key, content);
            }
        }
        Ok(())
    }

    /// A chunk's place.
    ///
    /// # Errors
    /// When there is none of this number, or its page cannot be read or is damaged.
    pub fn chunk(&self, reader: PageReader<'_>, number: u32) -> io::Result<ChunkRow> {
        // First, since a row that contradicts the index may name any number.
        if number >= self.chunks {
            return Err(bad_row(reader));
        }
        let first = self.head_pages + self.entry_pages + self.fence_pages;
        let page = first + number / CHUNKS_PER_PAGE as u32;
        let page = reader.page(page, PageKind::Chunks)?;
        let row = page.rows::<StoredChunkRow>().get(number as usize % CHUNKS_PER_PAGE);
        row.map(Into::into).ok_or_else(|| bad_row(reader))
    }

    /// The number of frames.
    pub fn frames(&self) -> u32 {
        self.frames
    }

    /// The number of chunks.
    pub fn chunks(&self) -> u32 {
        self.chunks
    }

    /// The number of entries.
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// A frame's place.
    ///
    /// # Errors
    /// When there is none of this number, or its page cannot be read or is damaged.
    pub fn frame(&self, reader: PageReader<'_>, number: u32) -> io::Result<FrameRow> {
        let first = self.head_pages
            + self.entry_pages
            + self.fence_pages
            + self.chunks.div_ceil(CHUNKS_PER_PAGE as u32);
        if number >= self.frames {
            return Err(bad_row(reader));
        }
        let page = reader.page(first + number / FRAMES_PER_PAGE as u32, PageKind::Frames)?;
        let row = page.rows::<StoredFrameRow>().get(number as usize % FRAMES_PER_PAGE);
        row.map(Into::into).ok_or_else(|| bad_row(reader))
    }
}

fn bad_row(reader: PageReader<'_>) -> io::Error {
    let text = format!("the index of segment {} contradicts itself", reader.segment);
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// Seeks in an index; keeps the pages of the last seek, since the next is mostly near.
struct Cursor<'a> {
    index: &'a SealedIndex,
    reader: PageReader<'a>,
    fences: Option<(u32, Arc<page::Page>)>,
    entries: Option<(u32, Arc<page::Page>)>,
}

impl Cursor<'_> {
    fn load(&mut self, kind: PageKind, number: u32) -> io::Result<Arc<page::Page>> {
        let slot = if kind == PageKind::Fences { &mut self.fences } else { &mut self.entries };
        if let Some((_, page)) = slot.as_ref().filter(|(at, _)| *at == number) {
            return Ok(Arc::clone(page));
        }
        let page = self.reader.page(number, kind)?;
        *slot = Some((number, Arc::clone(&page)));
        Ok(page)
    }

    /// The last row of a page that is not above the key, and its place in the page.
    fn last_row(&self, page: &page::Page, key: &Key) -> io::Result<Option<(usize, Key, Content)>> {
        let rows = page.rows::<EntryRow>();
        let decode = |row: &EntryRow| row.decode(self.index.base);
        let above = rows.partition_point(|row| decode(row).is_some_and(|(k, _)| k <= *key));
        let Some(place) = above.checked_sub(1) else { return Ok(None) };
        let (k, content) = rows.get(place).and_then(decode).ok_or_else(|| bad_row(self.reader))?;
        Ok(Some((place, k, content)))
    }
}

impl Sorted for Cursor<'_> {
    type Error = io::Error;

    fn at_or_below(&mut self, key: &Key) -> io::Result<Option<(Key, Content)>> {
        let index = self.index;
        let Some(top) = index.tops.partition_point(|k| k <= key).checked_sub(1) else {
            return Ok(None);
        };
        let fences =
            self.load(PageKind::Fences, index.head_pages + index.entry_pages + top as u32)?;
        let Some((place, ..)) = self.last_row(&fences, key)? else { return Ok(None) };
        let number = index.head_pages + (top * ENTRIES_PER_PAGE + place) as u32;
        let entries = self.load(PageKind::Entries, number)?;
        Ok(self.last_row(&entries, key)?.map(|(_, key, content)| (key, content)))
    }
}
