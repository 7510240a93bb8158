//! The bitmap of dirty and uncaptured regions, and its file of checksummed pages.
//!
//! Every page has two places in the file and is written to them in turn: a page torn by a power
//! cut leaves the one before, and nothing relied on the torn one yet. The file holds all places
//! twice: the page before would also be found where the newest has rotted, and must not be believed.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

use super::BLOCK_BYTES;
use crate::state::COUNT_MAX;
use tidemark_journal::checksum::crc64;

const BITS_BYTES: usize = 2016;
const PAGE_WORDS: usize = BITS_BYTES / 8;
/// Regions that one page speaks of.
pub const PAGE_REGIONS: u32 = (BITS_BYTES * 8) as u32;
const MAGIC: [u8; 4] = *b"TMBM";

const _: () = assert!(size_of::<Page>() == BLOCK_BYTES && BITS_BYTES.is_multiple_of(8));

/// A page of the bitmap's file, one block. What identifies it comes first, the checksum closes
/// the head, then the two sets of bits, least significant bit first.
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 4 | magic `TMBM` |
/// | 4 | 2 | version, 1 |
/// | 6 | 2 | reserved, zero |
/// | 8 | 8 | generation: the map's commit that wrote it; the higher of the two places counts |
/// | 16 | 16 | id of the map |
/// | 32 | 4 | number of the page |
/// | 36 | 20 | reserved, zero |
/// | 56 | 8 | CRC-64/NVME of the block with these eight bytes zero |
/// | 64 | 2016 | dirty bits |
/// | 2080 | 2016 | uncaptured bits |
///
/// Page `n` stands at block `2 n` or `2 n + 1`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Page {
    magic: [u8; 4],
    version: U16,
    reserved: U16,
    generation: U64,
    map_id: [u8; 16],
    number: U32,
    reserved2: [u8; 20],
    crc: U64,
    dirty: [u8; BITS_BYTES],
    uncaptured: [u8; BITS_BYTES],
}

/// A plain set of region numbers. It knows how many each page holds, so that what is empty is passed
/// over at once: a volume of 64 TiB has 67 million regions on 4162 pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bits {
    /// Whole pages; bits beyond the last region are never set.
    words: Vec<u64>,
    /// The number of regions in the set, for each page.
    page_ones: Vec<u32>,
    regions: u32,
    ones: u32,
}

impl Bits {
    /// No region of so many.
    pub fn new(regions: u32) -> Bits {
        let pages = pages_in(regions) as usize;
        Bits { words: vec![0; pages * PAGE_WORDS], page_ones: vec![0; pages], regions, ones: 0 }
    }

    /// An empty set for as many regions as `other` has.
    pub fn new_like(other: &Bits) -> Bits {
        Bits::new(other.regions)
    }

    /// The number of regions that may be in it.
    pub fn regions(&self) -> u32 {
        self.regions
    }

    /// Adds a region; says whether it was not there before.
    pub fn set(&mut self, region: u32) -> bool {
        self.change(region, true)
    }

    /// Removes a region; says whether it was there.
    pub fn clear(&mut self, region: u32) -> bool {
        self.change(region, false)
    }

    fn change(&mut self, region: u32, to: bool) -> bool {
        assert!(region < self.regions, "region {region} of {}", self.regions);
        let (word, bit) = (&mut self.words[region as usize / 64], 1 << (region % 64));
        if (*word & bit != 0) == to {
            return false;
        }
        *word ^= bit;
        let page_ones = &mut self.page_ones[(region / PAGE_REGIONS) as usize];
        if to {
            (*page_ones, self.ones) = (*page_ones + 1, self.ones + 1);
        } else {
            (*page_ones, self.ones) = (*page_ones - 1, self.ones - 1);
        }
        true
    }

    /// Whether the region is in the set.
    pub fn get(&self, region: u32) -> bool {
        self.words.get(region as usize / 64).is_some_and(|word| word & (1 << (region % 64)) != 0)
    }

    /// Adds every region.
    pub fn fill(&mut self) {
        for page in 0..pages_in(self.regions) {
            self.fill_page(page);
        }
    }

    /// Removes every region.
    pub fn empty(&mut self) {
        for page in 0..pages_in(self.regions) {
            if self.page_ones[page as usize] > 0 {
                self.change_page(page, |_, word| *word = 0);
            }
        }
    }

    /// The number of regions in the set.
    pub fn count(&self) -> u32 {
        self.ones
    }

    /// The first region in the set at or after `from`.
    pub fn next(&self, from: u32) -> Option<u32> {
        let first = from / PAGE_REGIONS;
        let after = || {
            let later = self.page_ones.get(first as usize + 1..)?;
            let skipped = later.iter().position(|ones| *ones > 0)?;
            self.next_on(first + 1 + skipped as u32, 0)
        };
        self.next_on(first, from % PAGE_REGIONS).or_else(after)
    }

    fn next_on(&self, page: u32, from: u32) -> Option<u32> {
        if *self.page_ones.get(page as usize)? == 0 {
            return None;
        }
        let words = self.page(page);
        let mut word = from as usize / 64;
        let mut bits = words[word] & (u64::MAX << (from % 64));
        while bits == 0 {
            word += 1;
            bits = *words.get(word)?;
        }
        Some(page * PAGE_REGIONS + word as u32 * 64 + bits.trailing_zeros())
    }

    /// The regions in the set, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        let mut from = Some(0);
        std::iter::from_fn(move || {
            let region = self.next(from?)?;
            from = region.checked_add(1);
            Some(region)
        })
    }

    /// The pages that hold any region of the set, ascending.
    pub fn pages(&self) -> impl Iterator<Item = u32> + '_ {
        (0..).zip(&self.page_ones).filter(|(_, ones)| **ones > 0).map(|(page, _)| page)
    }

    /// Adds every region of `other`.
    pub fn include(&mut self, other: &Bits) {
        for page in other.pages() {
            let from = other.page(page);
            self.change_page(page, |at, word| *word |= from[at]);
        }
    }

    /// Moves every region of `other` into this set.
    pub fn absorb(&mut self, other: &mut Bits) {
        self.include(other);
        other.empty();
    }

    fn page(&self, page: u32) -> &[u64] {
        &self.words[page as usize * PAGE_WORDS..][..PAGE_WORDS]
    }

    fn fill_page(&mut self, page: u32) {
        let here = PAGE_REGIONS.min(self.regions - page * PAGE_REGIONS) as usize;
        self.change_page(page, |at, word| {
            *word = match here.saturating_sub(at * 64) {
                64.. => u64::MAX,
                left => (1 << left) - 1,
            }
        });
    }

    /// Takes a page over from its bytes.
    fn read_page(&mut self, page: u32, bytes: &[u8; BITS_BYTES]) {
        self.fill_page(page);
        let (from, _) = bytes.as_chunks();
        self.change_page(page, |at, word| *word &= u64::from_le_bytes(from[at]));
    }

    /// Changes each word of a page, and counts anew.
    fn change_page(&mut self, page: u32, mut change: impl FnMut(usize, &mut u64)) {
        let mut ones = 0;
        let words = &mut self.words[page as usize * PAGE_WORDS..][..PAGE_WORDS];
        for (at, word) in words.iter_mut().enumerate() {
            change(at, word);
            ones += word.count_ones();
        }
        let before = std::mem::replace(&mut self.page_ones[page as usize], ones);
        self.ones = self.ones - before + ones;
    }
}

/// Pages in the map of a volume of so many regions.
pub fn pages_in(regions: u32) -> u32 {
    regions.div_ceil(PAGE_REGIONS)
}

/// Bytes of one copy of all places, for a volume of so many regions; the file holds two.
pub fn file_bytes(regions: u32) -> u64 {
    u64::from(pages_in(regions)) * 2 * BLOCK_BYTES as u64
}

/// Encodes page `number` as the `written`-th writing of that page. `dirty` sets are joined.
/// Returns the offset in the file and the block.
pub fn encode(
    map_id: [u8; 16],
    number: u32,
    generation: u64,
    written: u64,
    dirty: [&Bits; 2],
    uncaptured: &Bits,
) -> (u64, Vec<u8>) {
    let mut page = Page {
        magic: MAGIC,
        version: 1.into(),
        reserved: 0.into(),
        generation: generation.into(),
        map_id,
        number: number.into(),
        reserved2: [0; 20],
        crc: 0.into(),
        dirty: [0; BITS_BYTES],
        uncaptured: [0; BITS_BYTES],
    };
    let joined = dirty[0].page(number).iter().zip(dirty[1].page(number)).map(|(a, b)| a | b);
    for (bytes, word) in page.dirty.chunks_exact_mut(8).zip(joined) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    for (bytes, word) in page.uncaptured.chunks_exact_mut(8).zip(uncaptured.page(number)) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    page.crc = crc64(page.as_bytes()).into();
    let block = u64::from(number) * 2 + written % 2;
    (block * BLOCK_BYTES as u64, page.as_bytes().to_vec())
}

/// What a bitmap's file says.
#[derive(Debug)]
pub struct Recovered {
    /// Regions that were dirty.
    pub dirty: Bits,
    /// Regions with an uncaptured write.
    pub uncaptured: Bits,
    /// For each page, which place to write next (see [`encode`]).
    pub written: Vec<u64>,
    /// The highest generation.
    pub generation: u64,
    /// Pages of which neither place could be read: their regions are all set as uncaptured.
    pub damaged_pages: u32,
}

/// Reads a whole file for a volume of `regions` regions: one copy of the places or both, of which
/// either may have each page. A page that cannot be read counts as uncaptured throughout, which costs a
/// comparison and never a change.
pub fn recover(file: &[u8], map_id: [u8; 16], regions: u32) -> Recovered {
    let pages = pages_in(regions);
    let mut found = Recovered {
        dirty: Bits::new(regions),
        uncaptured: Bits::new(regions),
        written: vec![0; pages as usize],
        generation: 0,
        damaged_pages: 0,
    };
    for number in 0..pages {
        let newest = (0..4u64)
            .filter_map(|place| {
                let (copy, place) = (place / 2, place % 2);
                let at = (copy * file_bytes(regions)) as usize
                    + (u64::from(number) * 2 + place) as usize * BLOCK_BYTES;
                let page = Page::ref_from_bytes(file.get(at..at + BLOCK_BYTES)?).ok()?;
                let mut copy = *page;
                copy.crc = 0.into();
                let own = page.magic == MAGIC
                    && page.version.get() == 1
                    && page.map_id == map_id
                    && page.number.get() == number
                    && crc64(copy.as_bytes()) == page.crc.get();
                own.then_some((place, page))
            })
            .max_by_key(|(_, page)| page.generation.get())
            .filter(|(_, page)| page.generation.get() <= COUNT_MAX);
        let Some((place, page)) = newest else {
            found.damaged_pages += 1;
            found.uncaptured.fill_page(number);
            continue;
        };
        found.written[number as usize] = place + 1;
        found.generation = found.generation.max(page.generation.get());
        found.dirty.read_page(number, &page.dirty);
        found.uncaptured.read_page(number, &page.uncaptured);
    }
    found
}
