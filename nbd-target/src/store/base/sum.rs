//! The sum of one block: what eight bytes say of its content.
//!
//! | sum | the block |
//! |---|---|
//! | 0 | reads as zeros |
//! | 1 | unknown: it could not be read at the source, was damaged in the log, or has been lost here |
//! | else | the CRC-64/NVME of its content, with the lowest byte XORed with [`Unknown`]: a bit for each sector that is unknown (and zeros in the content), lowest first. What would be 0 or 1 has its top bit flipped |
//!
//! A sector is what a source writes, or cannot read; so a block of which some are unknown keeps the
//! others. The sums have a checksum of their own, so the bits need none.

use std::ops::{BitAnd, BitOr, Range};

use tidemark_journal::checksum::crc64;

use super::BLOCK_SECTORS;

/// The sum of a block that reads as zeros.
pub const SUM_ZEROS: u64 = 0;
/// The sum of a block whose content is unknown.
pub const SUM_UNREADABLE: u64 = 1;

const TOP: u64 = 1 << 63;

/// The sectors of a block that are unknown: a bit for each, lowest first.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Unknown(pub u8);

impl Unknown {
    /// All is known.
    pub const NONE: Unknown = Unknown(0);
    /// Nothing is.
    pub const ALL: Unknown = Unknown(u8::MAX);

    /// These sectors, counted from the block's first.
    pub fn of(sectors: Range<u64>) -> Unknown {
        let below = |sector: u64| (1u16 << sector.min(BLOCK_SECTORS)) - 1;
        Unknown((below(sectors.end) & !below(sectors.start)) as u8)
    }

    /// The first run of unknown sectors among these, counted from the block's first.
    pub fn first_in(self, sectors: Range<u64>) -> Option<Range<u64>> {
        let unknown = |sector: &u64| self.0 & (1 << sector) != 0;
        let start = sectors.clone().find(unknown)?;
        let end = (start..sectors.end).find(|sector| !unknown(sector)).unwrap_or(sectors.end);
        Some(start..end)
    }
}

impl BitOr for Unknown {
    type Output = Unknown;

    fn bitor(self, other: Unknown) -> Unknown {
        Unknown(self.0 | other.0)
    }
}

impl BitAnd for Unknown {
    type Output = Unknown;

    fn bitand(self, other: Unknown) -> Unknown {
        Unknown(self.0 & other.0)
    }
}

/// The sum that is kept for a block's content, whose unknown sectors are zeros.
pub fn sum_of(block: &[u8], unknown: Unknown) -> u64 {
    match unknown {
        Unknown::ALL => SUM_UNREADABLE,
        Unknown::NONE if block.iter().all(|byte| *byte == 0) => SUM_ZEROS,
        _ => sum_with(crc64(block), unknown),
    }
}

/// Which sectors of a block are unknown by its sum, which is neither of the two special ones;
/// nothing if the content is not the one that was summed.
pub fn unknown_by(block: &[u8], sum: u64) -> Option<Unknown> {
    let crc = crc64(block);
    let unknown = Unknown(u8::try_from((crc ^ sum) & !TOP).ok()?);
    (unknown != Unknown::ALL && sum_with(crc, unknown) == sum).then_some(unknown)
}

fn sum_with(crc: u64, unknown: Unknown) -> u64 {
    match crc ^ u64::from(unknown.0) {
        sum @ (SUM_ZEROS | SUM_UNREADABLE) => sum ^ TOP,
        sum => sum,
    }
}

/// New sums of blocks.
pub(super) enum Sums<'a> {
    Each(&'a [u64]),
    All(u64, u64),
}

impl Sums<'_> {
    pub(super) fn blocks(&self) -> u64 {
        match self {
            Sums::Each(sums) => sums.len() as u64,
            Sums::All(_, blocks) => *blocks,
        }
    }

    pub(super) fn of(&self, place: u64) -> u64 {
        match self {
            Sums::Each(sums) => sums.get(place as usize).copied().unwrap_or(SUM_UNREADABLE),
            Sums::All(sum, _) => *sum,
        }
    }

    pub(super) fn are_zeros(&self) -> bool {
        matches!(self, Sums::All(SUM_ZEROS, _))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_tells_which_sectors_are_unknown() {
        let block = vec![7; 4096];
        let known = sum_of(&block, Unknown::NONE);
        // CRC-64/NVME of 4096 bytes of 7.
        assert_eq!(known, 0x5c78_2b05_adc4_4e5f);
        assert_eq!(sum_of(&block, Unknown(0b101)), known ^ 0b101);
        for unknown in (0..u8::MAX).map(Unknown) {
            assert_eq!(unknown_by(&block, sum_of(&block, unknown)), Some(unknown));
        }
        assert_eq!(sum_of(&block, Unknown::ALL), SUM_UNREADABLE);
        assert_eq!(sum_of(&[0; 4096], Unknown::NONE), SUM_ZEROS);
        assert_eq!(unknown_by(&[0; 4096], sum_of(&[0; 4096], Unknown(1))), Some(Unknown(1)));
        for other in [known ^ 0x100, known ^ TOP, known ^ 0xff, !known] {
            assert_eq!(unknown_by(&block, other), None, "{other:#x}");
        }
    }

    /// A sum is never one of the special two by chance.
    #[test]
    fn sums_keep_clear_of_the_special_ones() {
        for unknown in (0..u8::MAX).map(Unknown) {
            for special in [SUM_ZEROS, SUM_UNREADABLE] {
                let sum = sum_with(special ^ u64::from(unknown.0), unknown);
                assert_eq!(sum, special ^ TOP);
            }
        }
    }

    #[test]
    fn sectors_and_their_bits() {
        assert_eq!(Unknown::of(0..8), Unknown::ALL);
        assert_eq!(Unknown::of(3..3), Unknown::NONE);
        assert_eq!(Unknown::of(1..3) | Unknown::of(7..8), Unknown(0b1000_0110));
        let unknown = Unknown(0b1000_0110);
        assert_eq!(unknown.first_in(0..8), Some(1..3));
        assert_eq!(unknown.first_in(2..8), Some(2..3));
        assert_eq!(unknown.first_in(3..7), None);
        assert_eq!(unknown.first_in(3..8), Some(7..8));
    }
}
