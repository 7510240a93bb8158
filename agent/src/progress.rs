//! The pace of catch-up, from counters that only grow.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use tidemark_journal::VolumeId;

/// Samples closer together than this say nothing about a rate.
const SAMPLE_S: f64 = 0.5;

/// Remembers enough between two looks to say how fast something goes.
#[derive(Debug, Default)]
pub struct Pace(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    last: Option<(Instant, u64)>,
    rate: u64,
    totals: HashMap<VolumeId, u64>,
}

impl Pace {
    /// The rate at which a counter of bytes grows, smoothed over the last looks.
    pub fn bytes_per_s(&self, counter: u64) -> u64 {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let (then, before) = *state.last.get_or_insert((now, counter));
        let seconds = now.duration_since(then).as_secs_f64();
        if seconds >= SAMPLE_S {
            let rate = (counter.saturating_sub(before) as f64 / seconds) as u64;
            state.rate = if state.rate == 0 { rate } else { (state.rate + rate) / 2 };
            state.last = Some((now, counter));
        }
        state.rate
    }

    /// The most that was left to do for a volume since it was last done: what progress is shown of.
    pub fn total(&self, volume: VolumeId, left: u64) -> u64 {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let total = state.totals.entry(volume).or_default();
        *total = if left == 0 { 0 } else { (*total).max(left) };
        *total
    }
}
