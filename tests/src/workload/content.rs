//! What writes contain: every sector names its write and its own place, and is filled from both, so that a
//! sector that is lost, torn, stale or misplaced is seen.
//!
//! A sector of 512 bytes: `TIDETEST` | write's number (u64, little endian) | sector's number on its disk (u64) |
//! filler. Half of the filler is zeroes, so that it compresses about as well as real data.

use super::rng::Rng;

/// The unit of content, in bytes.
pub const SECTOR_BYTES: u64 = 512;

const SECTOR: usize = SECTOR_BYTES as usize;
const MAGIC: &[u8; 8] = b"TIDETEST";
const RANDOM_END: usize = 24 + (SECTOR - 24) / 2;

/// Fills `bytes`, which begin at `offset_bytes` of a disk, with what the write `number` contains there. Offset
/// and length are whole sectors.
pub fn fill(number: usize, offset_bytes: u64, bytes: &mut [u8]) {
    let first = offset_bytes / SECTOR_BYTES;
    for (sector, bytes) in (first..).zip(bytes.chunks_mut(SECTOR)) {
        fill_sector(number as u64, sector, bytes);
    }
}

/// The number of the write that a sector's content names; none if it is not a write's.
pub fn number(sector: &[u8]) -> Option<usize> {
    let rest = sector.strip_prefix(MAGIC)?;
    let number = u64::from_le_bytes(rest.get(..8)?.try_into().ok()?);
    usize::try_from(number).ok()
}

fn fill_sector(number: u64, sector: u64, bytes: &mut [u8]) {
    let mut rng = Rng::new(number.rotate_left(32) ^ sector);
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..16].copy_from_slice(&number.to_le_bytes());
    bytes[16..24].copy_from_slice(&sector.to_le_bytes());
    let (random, zeroes) = bytes[24..].split_at_mut(RANDOM_END - 24);
    for word in random.chunks_mut(8) {
        word.copy_from_slice(&rng.draw().to_le_bytes()[..word.len()]);
    }
    zeroes.fill(0);
}
