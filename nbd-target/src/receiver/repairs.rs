//! What a source is asked for again, because it is damaged here.

use std::{collections::BTreeMap, time::Duration};

use tidemark_journal::VolumeId;
use tidemark_link::message::{REPAIR_ROWS_MAX, RegionRun, Repair};
use tokio::time::Instant;

/// When a source is asked once more for what it has not sent.
const AGAIN: Duration = Duration::from_secs(3600);

/// What one session has asked for.
pub struct Repairs {
    /// The source knows the message.
    able: bool,
    /// Runs of regions, from the first up to the one after the last, sorted; only what is damaged still.
    asked: BTreeMap<VolumeId, Vec<(u64, u64)>>,
    since: Instant,
}

impl Repairs {
    /// Nothing has been asked for.
    pub fn new(able: bool) -> Repairs {
        Repairs { able, asked: BTreeMap::new(), since: Instant::now() }
    }

    /// What to ask for now, given all regions (volume, first, number) that are damaged at the newest
    /// position: what has not been asked for lately, or has been mended since. Call again until there is
    /// nothing.
    pub fn ask(&mut self, damaged: &[(VolumeId, u64, u64)]) -> Option<Repair> {
        if !self.able {
            return None;
        }
        if self.since.elapsed() >= AGAIN {
            self.asked.clear();
            self.since = Instant::now();
        }
        self.forget_mended(damaged);
        let mut runs = Vec::new();
        for (volume, first, regions) in damaged {
            let asked = self.asked.get(volume).map_or(&[][..], Vec::as_slice);
            for (start, end) in without(*first, first.saturating_add(*regions), asked) {
                let number = |number| u32::try_from(number).ok();
                let (Some(first), Some(regions)) = (number(start), number(end - start)) else {
                    continue;
                };
                if runs.len() < REPAIR_ROWS_MAX && first.checked_add(regions).is_some() {
                    runs.push(RegionRun { volume: *volume, first, regions });
                }
            }
        }
        for RegionRun { volume, first, regions } in &runs {
            let run = (u64::from(*first), u64::from(*first) + u64::from(*regions));
            self.asked.entry(*volume).or_default().push(run);
        }
        self.asked.values_mut().for_each(|asked| asked.sort_unstable());
        (!runs.is_empty()).then_some(Repair { runs })
    }

    /// Keeps only what is damaged of what was asked for.
    fn forget_mended(&mut self, damaged: &[(VolumeId, u64, u64)]) {
        let before = std::mem::take(&mut self.asked);
        for (volume, first, regions) in damaged {
            let Some(asked) = before.get(volume) else { continue };
            let end = first.saturating_add(*regions);
            let from = asked.partition_point(|(_, stop)| stop <= first);
            let inside = asked[from..].iter().take_while(|(start, _)| *start < end);
            let inside = inside.map(|(start, stop)| ((*start).max(*first), (*stop).min(end)));
            self.asked.entry(*volume).or_default().extend(inside);
        }
    }
}

/// The parts of a run that are in none of the others, which are sorted and disjoint.
fn without(first: u64, end: u64, others: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut parts = Vec::new();
    let mut at = first;
    let from = others.partition_point(|(_, stop)| *stop <= first);
    for (start, stop) in others[from..].iter().take_while(|(start, _)| *start < end) {
        if at < *start {
            parts.push((at, *start));
        }
        at = at.max(*stop);
    }
    if at < end {
        parts.push((at, end));
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_region_is_asked_for_once() {
        let (one, two) = (VolumeId(1), VolumeId(2));
        let run = |volume, first, regions| RegionRun { volume, first, regions };
        let mut repairs = Repairs::new(true);
        let asked = repairs.ask(&[(one, 4, 2), (two, 0, 1)]).expect("something");
        assert_eq!(asked.runs, [run(one, 4, 2), run(two, 0, 1)]);
        assert_eq!(repairs.ask(&[(one, 4, 2), (two, 0, 1)]), None);
        assert_eq!(repairs.ask(&[(one, 5, 1)]), None, "a part of it is left");
        let asked = repairs.ask(&[(one, 2, 6)]).expect("more");
        assert_eq!(asked.runs, [run(one, 2, 3), run(one, 6, 2)], "5 is still to come");
        assert_eq!(repairs.ask(&[]), None, "all is mended");
        assert_eq!(repairs.ask(&[(one, 3, 1)]).expect("again").runs, [run(one, 3, 1)]);
        // An hour later it is tried again.
        repairs.since = Instant::now().checked_sub(AGAIN).expect("the machine runs that long");
        assert_eq!(repairs.ask(&[(one, 2, 6)]).expect("again").runs, [run(one, 2, 6)]);
        assert_eq!(Repairs::new(false).ask(&[(one, 4, 2)]), None, "an older source");
    }

    #[test]
    fn a_message_has_a_bound() {
        let damaged: Vec<_> = (0..1000).map(|n| (VolumeId(0), n * 2, 1)).collect();
        let mut repairs = Repairs::new(true);
        let mut runs = 0;
        while let Some(repair) = repairs.ask(&damaged) {
            assert!(repair.runs.len() <= REPAIR_ROWS_MAX);
            runs += repair.runs.len();
        }
        assert_eq!(runs, 1000);
    }
}
