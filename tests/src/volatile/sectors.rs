//! A set of sectors.

/// One bit for each sector of a disk.
#[derive(Clone)]
pub struct Sectors(Vec<u64>);

impl Sectors {
    /// None of so many sectors.
    pub fn new(sectors: u64) -> Sectors {
        Sectors(vec![0; sectors.div_ceil(64) as usize])
    }

    /// Adds `first..end`.
    pub fn set(&mut self, first: u64, end: u64) {
        (first..end).for_each(|sector| self.0[(sector / 64) as usize] |= 1 << (sector % 64));
    }

    /// Takes `first..end` out.
    pub fn clear(&mut self, first: u64, end: u64) {
        (first..end).for_each(|sector| self.0[(sector / 64) as usize] &= !(1 << (sector % 64)));
    }

    /// Those of `first..end` that are in the set.
    pub fn within(&self, first: u64, end: u64) -> impl Iterator<Item = u64> + '_ {
        (first..end).filter(|sector| self.0[(sector / 64) as usize] & (1 << (sector % 64)) != 0)
    }

    /// Empties the set: runs of what was in it, each with its first sector and the one after its last.
    pub fn take_runs(&mut self) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for (index, word) in self.0.iter_mut().enumerate() {
            let mut bits = std::mem::take(word);
            while bits != 0 {
                let sector = index as u64 * 64 + u64::from(bits.trailing_zeros());
                bits &= bits - 1;
                match runs.last_mut() {
                    Some((_, end)) if *end == sector => *end += 1,
                    _ => runs.push((sector, sector + 1)),
                }
            }
        }
        runs
    }
}
