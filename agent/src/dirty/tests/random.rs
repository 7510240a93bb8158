//! Random numbers that a seed repeats exactly (SplitMix64).

pub(crate) struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// True `percent` times in a hundred.
    pub fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// Takes any element out.
    pub fn take<T>(&mut self, from: &mut Vec<T>) -> Option<T> {
        if from.is_empty() {
            None
        } else {
            Some(from.swap_remove(self.below(from.len() as u64) as usize))
        }
    }
}

/// The seeds to run: so many, or as the variable `name` says: a number of seeds, or `=SEED`.
pub(crate) fn seeds(name: &str, unless_told: u64) -> std::ops::Range<u64> {
    match std::env::var(name).ok().as_deref() {
        None => 0..unless_told,
        Some(told) => match told.strip_prefix('=') {
            Some(seed) => {
                let seed = seed.parse().expect("a seed after the =");
                seed..seed + 1
            }
            None => 0..told.parse().expect("a number of seeds"),
        },
    }
}
