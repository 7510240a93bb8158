//! Numbers by chance that follow from a seed.

/// A small generator of numbers (SplitMix64): the same in every run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A generator that follows from the seed.
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    /// Any number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `bound`, which is not zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next_u64() % bound.max(1)
    }

    /// True so many times in a million.
    pub fn chance(&mut self, per_million: u32) -> bool {
        // No number is drawn where the answer is known, so that faults that are off change nothing.
        match per_million {
            0 => false,
            1_000_000.. => true,
            _ => self.below(1_000_000) < u64::from(per_million),
        }
    }

    /// Another generator, so that what is drawn there does not shift what is drawn here.
    pub fn fork(&mut self) -> Rng {
        Rng(self.next_u64())
    }
}

/// Spreads a number over all bits.
pub(crate) fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
