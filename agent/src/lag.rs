//! How long records take to become final-durable.

/// Buckets per doubling.
const FINE: u32 = 4;
/// Durations from 1 microsecond to 2^40 microseconds.
const BUCKETS: usize = 40 * FINE as usize;

/// Counts of durations in buckets that grow by a fixed factor: a quantile is exact to a fifth.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LagHistogram {
    counts: Vec<u64>,
    total: u64,
    max_ns: u64,
}

impl Default for LagHistogram {
    fn default() -> LagHistogram {
        LagHistogram { counts: vec![0; BUCKETS], total: 0, max_ns: 0 }
    }
}

impl LagHistogram {
    /// Counts a duration.
    pub fn add(&mut self, ns: u64) {
        let exact = (ns as f64 / 1000.0).max(1.0).log2() * f64::from(FINE);
        self.counts[(exact as usize).min(BUCKETS - 1)] += 1;
        self.total += 1;
        self.max_ns = self.max_ns.max(ns);
    }

    /// The duration that so many thousandths of those counted do not exceed, rounded up to its
    /// bucket's end.
    pub fn quantile_ns(&self, permille: u64) -> Option<u64> {
        let wanted = (self.total * permille).div_ceil(1000).max(1);
        let mut seen = 0;
        let bucket = self.counts.iter().position(|count| {
            seen += count;
            seen >= wanted
        })?;
        let end_us = 2f64.powf((bucket + 1) as f64 / f64::from(FINE));
        Some(((end_us * 1000.0) as u64).min(self.max_ns))
    }

    /// How many were counted.
    pub fn total(&self) -> u64 {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_a_fifth() {
        let mut lag = LagHistogram::default();
        assert_eq!(lag.quantile_ns(500), None);
        for ms in 1..=1000u64 {
            lag.add(ms * 1_000_000);
        }
        for (permille, exact_ms) in [(500, 500.0), (990, 990.0), (1000, 1000.0)] {
            let found = lag.quantile_ns(permille).unwrap() as f64 / 1e6;
            assert!((exact_ms..=exact_ms * 1.2).contains(&found), "{permille}: {found} ms");
        }
    }
}
