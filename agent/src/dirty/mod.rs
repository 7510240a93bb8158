//! The dirty map: which regions of a volume may differ from what the target has made durable.
//!
//! Two sets, after DRBD's activity log and bitmap. A bounded set of *active* regions
//! ([`active`]) is kept in a small log; a region is active there, durably, before the first write
//! into it may reach the disk, so a hot region costs nothing. An unbounded bitmap ([`bitmap`])
//! holds two bits for every region: *dirty* (it left the active set before its last write was known
//! to be durable on both sides) and *uncaptured* (a write into it has no record; only catch-up
//! clears it). [`map::DirtyMap`] joins the two and says what has to be written in which order; it
//! does no I/O itself. What writes in sequence come to next is foreseen ([`streams`]).

pub mod active;
pub mod bitmap;
pub mod map;
mod streams;
#[cfg(test)]
pub(crate) mod tests;

use tidemark_journal::{Sector, VolumeId, ids::SECTOR_BYTES};

/// Bytes in a region. One MiB: a catch-up reads little for one small write, and the map of a 64 TiB
/// volume is 65 MiB on the disk and 24 MiB in memory.
pub const REGION_BYTES: u64 = 1 << 20;
/// Sectors in a region.
pub const REGION_SECTORS: u64 = REGION_BYTES / SECTOR_BYTES;
/// The unit in which the map's files are written.
pub const BLOCK_BYTES: usize = 4096;

/// One region of one volume.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct RegionId {
    /// The volume.
    pub volume: VolumeId,
    /// Its place: bytes from `index` MiB on.
    pub index: u32,
}

impl RegionId {
    /// The region in which a sector lies.
    pub fn of(volume: VolumeId, sector: Sector) -> RegionId {
        RegionId { volume, index: (sector.0 / REGION_SECTORS) as u32 }
    }

    /// Its first sector.
    pub fn start(self) -> Sector {
        Sector(u64::from(self.index) * REGION_SECTORS)
    }
}

/// The number of regions in a volume, the last of which may be short.
pub fn regions_in(sectors: u64) -> u32 {
    u32::try_from(sectors.div_ceil(REGION_SECTORS)).unwrap_or(u32::MAX)
}
