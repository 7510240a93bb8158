//! The simulated state disk.

use std::collections::BTreeSet;

use tidemark_journal::VolumeId;

use crate::dirty::{
    RegionId, active, bitmap,
    map::{self, BlockWrite},
};

pub const MAP_ID: [u8; 16] = [3; 16];

/// The files of the state disk, and what a start would read from them.
pub struct State {
    pub log: Vec<u8>,
    pub bitmaps: Vec<Vec<u8>>,
    pub regions: Vec<u32>,
    pub active: BTreeSet<RegionId>,
    pub maps: Vec<bitmap::Recovered>,
}

impl State {
    pub fn write(&mut self, write: &BlockWrite) {
        let at = write.offset as usize;
        match write.volume {
            None => {
                self.log[at..at + 4096].copy_from_slice(&write.block);
                let found = active::recover(&self.log, MAP_ID).expect("no damage here");
                self.active = found.active.into_iter().collect();
            }
            Some(id) => {
                let volume = usize::from(id.0) - 1;
                self.bitmaps[volume][at..at + 4096].copy_from_slice(&write.block);
                let regions = self.regions[volume];
                self.maps[volume] = bitmap::recover(&self.bitmaps[volume], MAP_ID, regions);
            }
        }
    }

    pub fn is_uncaptured(&self, volume: usize, region: u32) -> bool {
        self.maps[volume].uncaptured.get(region)
    }

    pub fn is_active(&self, volume: usize, region: u32) -> bool {
        self.active.contains(&RegionId { volume: VolumeId(volume as u16 + 1), index: region })
    }

    /// The dirty map's volumes as a start finds them that goes on with the ring.
    pub fn maps(&self) -> Vec<map::VolumeStart> {
        let map = |(index, found): (usize, &bitmap::Recovered)| {
            let (id, regions) = (VolumeId(index as u16 + 1), self.regions[index]);
            let mut dirty = found.dirty.clone();
            for region in self.active.iter().filter(|region| region.volume == id) {
                dirty.set(region.index);
            }
            let (written, uncaptured) = (found.written.clone(), found.uncaptured.clone());
            map::VolumeStart { id, regions, written, uncaptured, dirty }
        };
        self.maps.iter().enumerate().map(map).collect()
    }

    /// The newest generation of the bitmaps, and the newest transaction of the log.
    pub fn newest(&self) -> (u64, u64) {
        let generations = self.maps.iter().map(|map| map.generation);
        // None, if the agent was killed before its first.
        let transaction = active::recover(&self.log, MAP_ID).map_or(0, |log| log.transaction);
        (generations.max().unwrap_or(0), transaction)
    }

    pub fn covers(&self, volume: usize, region: u32) -> bool {
        self.is_active(volume, region)
            || self.is_uncaptured(volume, region)
            || self.maps[volume].dirty.get(region)
    }
}
