//! The bitmap of dirty and uncaptured regions, and its file of checksummed pages.
//!
//! Every page has two places in the file and is written to them in turn: a page torn by a power
//! cut leaves the one before, and nothing relied on the torn one yet.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

use super::BLOCK_BYTES;
use crate::state::COUNT_MAX;
use tidemark_journal::checksum::crc64;

const BITS_BYTES: usize = 2016;
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

/// A plain set of region numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bits {
    words: Vec<u64>,
    regions: u32,
    ones: u32,
}

impl Bits {
    /// No region of so many.
    pub fn new(regions: u32) -> Bits {
        Bits { words: vec![0; (regions as usize).div_ceil(64)], regions, ones: 0 }
    }

    /// An empty set for as many regions as `other` has.
    pub fn new_like(other: &Bits) -> Bits {
        Bits::new(other.regions)
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
        self.ones = if to { self.ones + 1 } else { self.ones - 1 };
        true
    }

    /// Whether the region is in the set.
    pub fn get(&self, region: u32) -> bool {
        self.words.get(region as usize / 64).is_some_and(|word| word & (1 << (region % 64)) != 0)
    }

    /// Adds every region.
    pub fn fill(&mut self) {
        for region in 0..self.regions {
            self.set(region);
        }
    }

    /// The number of regions in the set.
    pub fn count(&self) -> u32 {
        self.ones
    }

    /// The first region in the set at or after `from`.
    pub fn next(&self, from: u32) -> Option<u32> {
        let mut word = from as usize / 64;
        let mut bits = self.words.get(word)? & (u64::MAX << (from % 64));
        while bits == 0 {
            word += 1;
            bits = *self.words.get(word)?;
        }
        Some(word as u32 * 64 + bits.trailing_zeros())
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

    /// Moves every region of `other` into this set.
    pub fn absorb(&mut self, other: &mut Bits) {
        let mut ones = 0;
        for (word, from) in self.words.iter_mut().zip(&mut other.words) {
            *word |= std::mem::take(from);
            ones += word.count_ones();
        }
        (self.ones, other.ones) = (ones, 0);
    }

    fn page_bits(&self, page: u32) -> impl Iterator<Item = u64> + '_ {
        let words = BITS_BYTES / 8;
        let from = (page as usize * words).min(self.words.len());
        self.words[from..].iter().copied().chain(std::iter::repeat(0)).take(words)
    }
}

/// Pages in the map of a volume of so many regions.
pub fn pages_in(regions: u32) -> u32 {
    regions.div_ceil(PAGE_REGIONS)
}

/// Bytes of the file for a volume of so many regions.
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
    let joined = dirty[0].page_bits(number).zip(dirty[1].page_bits(number)).map(|(a, b)| a | b);
    for (bytes, word) in page.dirty.chunks_exact_mut(8).zip(joined) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    for (bytes, word) in page.uncaptured.chunks_exact_mut(8).zip(uncaptured.page_bits(number)) {
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

/// Reads a whole file for a volume of `regions` regions. A page that cannot be read counts as
/// uncaptured throughout, which costs a comparison and never a change.
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
        let newest = (0..2u64)
            .filter_map(|place| {
                let at = (u64::from(number) * 2 + place) as usize * BLOCK_BYTES;
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
        let first = number * PAGE_REGIONS;
        let here = PAGE_REGIONS.min(regions - first);
        let Some((place, page)) = newest else {
            found.damaged_pages += 1;
            (first..first + here).for_each(|region| {
                found.uncaptured.set(region);
            });
            continue;
        };
        found.written[number as usize] = place + 1;
        found.generation = found.generation.max(page.generation.get());
        for region in 0..here {
            let (byte, bit) = (region as usize / 8, 1u8 << (region % 8));
            if page.dirty[byte] & bit != 0 {
                found.dirty.set(first + region);
            }
            if page.uncaptured[byte] & bit != 0 {
                found.uncaptured.set(first + region);
            }
        }
    }
    found
}
