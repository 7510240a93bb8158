//! Checksummed 4 KiB pages and the bounded cache they are read through.

use std::{io, sync::Arc};

use tidemark_journal::checksum::crc64;
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

use crate::{machine::File, store::cache::Cache};

/// Bytes in a page.
pub const PAGE_BYTES: usize = 4096;
/// Bytes of rows in a page.
pub const ROWS_BYTES: usize = PAGE_BYTES - size_of::<PageHeader>();

/// What the rows of a page are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum PageKind {
    /// Part of the index's head.
    Head = 1,
    /// Entries.
    Entries = 2,
    /// The first entry of each page of entries.
    Fences = 3,
    /// Places of chunks.
    Chunks = 4,
    /// Places of frames.
    Frames = 5,
}

/// The start of a page, 16 bytes.
///
/// The page's own number and the segment's are in it, so that a page read from the wrong place is
/// noticed.
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 8 | CRC-64/NVME of the other 4088 bytes |
/// | 8 | 4 | number of the page in the index |
/// | 12 | 2 | number of the segment, low bits |
/// | 14 | 1 | kind: 1 head, 2 entries, 3 fences, 4 chunks, 5 frames |
/// | 15 | 1 | rows; zero in the head |
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct PageHeader {
    crc: U64,
    number: U32,
    segment: U16,
    kind: u8,
    rows: u8,
}

const _: () = assert!(size_of::<PageHeader>() == 16);

/// The rows of one kind that fit a page.
pub const fn rows_per_page<R>() -> usize {
    let rows = ROWS_BYTES / size_of::<R>();
    assert!(rows <= 255);
    rows
}

/// Appends a page to an index under construction.
pub fn append(pages: &mut Vec<u8>, segment: u64, kind: PageKind, rows: usize, bytes: &[u8]) {
    let number = (pages.len() / PAGE_BYTES) as u32;
    let header = PageHeader {
        crc: 0.into(),
        number: number.into(),
        segment: (segment as u16).into(),
        kind: kind as u8,
        rows: rows as u8,
    };
    let at = pages.len();
    pages.extend_from_slice(header.as_bytes());
    pages.extend_from_slice(bytes);
    pages.resize(at + PAGE_BYTES, 0);
    let crc = crc64(&pages[at + 8..]);
    pages[at..at + 8].copy_from_slice(&crc.to_le_bytes());
}

/// A page that has been checked.
pub struct Page(Box<[u8]>);

impl Page {
    /// The rows.
    pub fn rows<R: FromBytes + KnownLayout + Immutable + Unaligned>(&self) -> &[R] {
        let rows = usize::from(self.0.get(15).copied().unwrap_or(0));
        <[R]>::ref_from_prefix_with_elems(self.bytes(), rows).map_or(&[], |(rows, _)| rows)
    }

    /// Everything after the page's header.
    pub fn bytes(&self) -> &[u8] {
        &self.0[size_of::<PageHeader>()..]
    }
}

/// Pages in use, of all segments: the bound of what indexes take in memory.
pub type PageCache = Cache<(u64, u32), Arc<Page>>;

/// Reads pages of one index.
#[derive(Clone, Copy)]
pub struct PageReader<'a> {
    /// The segment's file.
    pub file: &'a File,
    /// The file's id in the cache.
    pub file_id: u64,
    /// The segment's number.
    pub segment: u64,
    /// Byte at which the index begins.
    pub index_at: u64,
    /// Where pages are kept.
    pub cache: &'a PageCache,
}

impl PageReader<'_> {
    /// A page, from the cache or the file.
    ///
    /// # Errors
    /// When it cannot be read, or is not the page that was written there.
    pub fn page(&self, number: u32, kind: PageKind) -> io::Result<Arc<Page>> {
        if let Some(page) = self.cache.get(&(self.file_id, number)) {
            return Ok(page);
        }
        let mut bytes = vec![0; PAGE_BYTES].into_boxed_slice();
        let at = self.index_at + u64::from(number) * PAGE_BYTES as u64;
        self.file.read_exact_at(&mut bytes, at)?;
        let damaged = |what| {
            let text = format!("page {number} of the index of segment {} {what}", self.segment);
            io::Error::new(io::ErrorKind::InvalidData, text)
        };
        let (header, _) =
            PageHeader::ref_from_prefix(&bytes).map_err(|_| damaged("is too short"))?;
        if header.crc.get() != crc64(&bytes[8..]) {
            return Err(damaged("does not match its checksum"));
        }
        let expected = (number, self.segment as u16, kind as u8);
        if (header.number.get(), header.segment.get(), header.kind) != expected {
            return Err(damaged("is another page"));
        }
        let page = Arc::new(Page(bytes));
        self.cache.put((self.file_id, number), Arc::clone(&page));
        Ok(page)
    }
}
