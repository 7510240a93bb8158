//! The storage below the dirty map, which can be torn, and what a start would find on it.

use tidemark_journal::VolumeId;

use super::super::super::{
    BLOCK_BYTES, RegionId,
    active::{self, LOG_BYTES},
    bitmap::{self, Bits},
    map::{BlockWrite, DirtyMap, VolumeStart},
};

pub const MAP_ID: [u8; 16] = [7; 16];
/// One volume of one page, and one of more than a commit writes for want of something better to do;
/// together more regions than can be active.
pub const VOLUMES: [(VolumeId, u32); 2] = [(VolumeId(1), 300), (VolumeId(4), 90_000)];

/// The files on storage.
#[derive(Clone)]
pub struct Storage {
    pub log: Vec<u8>,
    pub bitmaps: [Vec<u8>; 2],
}

impl Storage {
    pub fn new() -> Storage {
        Storage {
            log: vec![0; LOG_BYTES as usize],
            bitmaps: VOLUMES.map(|(_, regions)| vec![0; bitmap::file_bytes(regions) as usize]),
        }
    }

    /// Writes those sectors of a block for which `reached` says so.
    pub fn write(&mut self, write: &BlockWrite, mut reached: impl FnMut() -> bool) {
        let file = match write.volume {
            None => &mut self.log,
            Some(id) => {
                let at = VOLUMES.iter().position(|volume| volume.0 == id);
                &mut self.bitmaps[at.expect("a volume of the map")]
            }
        };
        assert_eq!(write.block.len(), BLOCK_BYTES);
        let to = &mut file[write.offset as usize..][..BLOCK_BYTES];
        for (to, from) in to.chunks_exact_mut(512).zip(write.block.chunks_exact(512)) {
            if reached() {
                to.copy_from_slice(from);
            }
        }
    }
}

/// What a start after a crash would find.
pub struct Found {
    pub active: active::Recovered,
    pub bitmaps: [bitmap::Recovered; 2],
}

impl Found {
    pub fn of(storage: &Storage) -> Found {
        let map = |at: usize| bitmap::recover(&storage.bitmaps[at], MAP_ID, VOLUMES[at].1);
        Found {
            active: active::recover(&storage.log, MAP_ID).expect("only the newest block is torn"),
            bitmaps: [map(0), map(1)],
        }
    }

    pub fn bitmap(&self, region: RegionId) -> &bitmap::Recovered {
        &self.bitmaps[usize::from(region.volume == VOLUMES[1].0)]
    }

    pub fn covers(&self, region: RegionId) -> bool {
        let bitmap = self.bitmap(region);
        self.active.active.binary_search(&region).is_ok()
            || bitmap.dirty.get(region.index)
            || bitmap.uncaptured.get(region.index)
    }

    pub fn map(&self) -> DirtyMap {
        let mut generation = 0;
        let volumes = VOLUMES.iter().zip(&self.bitmaps).map(|((id, regions), found)| {
            generation = generation.max(found.generation);
            let mut uncaptured = found.uncaptured.clone();
            uncaptured.absorb(&mut found.dirty.clone());
            for region in self.active.active.iter().filter(|region| region.volume == *id) {
                uncaptured.set(region.index);
            }
            let (written, dirty) = (found.written.clone(), Bits::new(*regions));
            VolumeStart { id: *id, regions: *regions, written, uncaptured, dirty }
        });
        let volumes = volumes.collect();
        DirtyMap::new(MAP_ID, generation, self.active.transaction, volumes)
    }
}
