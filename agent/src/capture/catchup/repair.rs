//! Comparing single regions afresh, because the target has lost what it had of them.

use tidemark_journal::VolumeId;

use super::{Core, Verify};
use crate::dirty::regions_in;

/// The most regions that wait to be compared by themselves; beyond that, all of a volume is.
const REGIONS_MAX: usize = 4096;

impl Core {
    /// Compares a run of regions of a volume with the target, as [`verify`](Self::verify) does with
    /// all of them. What is not there is left out: the target may know the volume larger.
    pub fn compare(&mut self, volume: VolumeId, first: u32, regions: u32) {
        let Some(index) = self.volumes.iter().position(|known| known.id == volume) else { return };
        let all = regions_in(self.volumes[index].sectors);
        let run = first..first.saturating_add(regions).min(all);
        let slot = &mut self.catch_up.verify[index];
        let verify = slot.get_or_insert_with(|| Verify {
            next: all,
            regions: all,
            again: Vec::new(),
            differs: false,
        });
        if verify.again.len() + run.len() > REGIONS_MAX {
            return self.verify(volume);
        }
        for region in run.filter(|region| *region < verify.next) {
            if !verify.again.contains(&region) {
                verify.again.push(region);
            }
        }
    }
}
