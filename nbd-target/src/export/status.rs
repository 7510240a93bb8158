//! Block status: which parts of a volume are known to be zeros.
//!
//! A client may ask about gigabytes at once, of which it uses the first part alone. So a range is looked
//! at in steps that grow as long as each leads to its end, and the answer ends early where it has taken
//! long, or where it is not known how it goes on: the client then asks on from there.

use std::time::{Duration, Instant};

use crate::store::{ReadError, base::Stretch};

/// Sectors of the first step: 1 MiB.
pub(super) const STEP_MIN: u64 = 2 << 10;
/// Sectors of the largest: 256 MiB, in which a segment may have some 65,000 extents of 4 KiB.
const STEP_MAX: u64 = 512 << 10;
/// The most stretches of one answer; the last step may bring more.
const STRETCHES_MAX: usize = 4096;
/// How long an answer takes before it ends early, at the end of a step.
const TIME_MAX: Duration = Duration::from_millis(250);

/// The stretches from `start` on, with `one` at least the first; empty only if the range is. `look` gives
/// those of the range that it is told, from its first sector on; it may end early, never empty.
///
/// # Errors
/// That of `look` at the first step.
pub(super) fn stretches(
    start: u64,
    end: u64,
    one: bool,
    look: impl FnMut(u64, u64) -> Result<Vec<Stretch>, ReadError>,
) -> Result<Vec<Stretch>, ReadError> {
    let began = Instant::now();
    in_steps(start, end, one, look, || began.elapsed() >= TIME_MAX)
}

fn in_steps(
    start: u64,
    end: u64,
    one: bool,
    mut look: impl FnMut(u64, u64) -> Result<Vec<Stretch>, ReadError>,
    is_late: impl Fn() -> bool,
) -> Result<Vec<Stretch>, ReadError> {
    let most = if one { 1 } else { STRETCHES_MAX };
    let mut all: Vec<Stretch> = Vec::new();
    let (mut at, mut step) = (start, STEP_MIN);
    while at < end {
        let found = match look(at, end.min(at.saturating_add(step))) {
            Err(_) if !all.is_empty() => break,
            found => found?,
        };
        let reached = found.last().map_or(at, |last| last.end);
        for stretch in found {
            match all.last_mut() {
                Some(last) if last.zeros == stretch.zeros => last.end = stretch.end,
                _ => all.push(stretch),
            }
        }
        if reached <= at || all.len() > most || is_late() {
            break;
        }
        step = (2 * (reached - at)).clamp(STEP_MIN, STEP_MAX);
        at = reached;
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// Looks at alternating stretches of so many sectors, at `most` of them at once; notes what it was
    /// asked for.
    fn looked(
        end: u64,
        length: u64,
        most: usize,
        one: bool,
        asked: &mut Vec<(u64, u64)>,
    ) -> Vec<Stretch> {
        let look = |from: u64, to: u64| {
            asked.push((from, to));
            let mut found = Vec::new();
            let mut at = from;
            while at < to && found.len() < most {
                let stop = ((at / length + 1) * length).min(to);
                found.push(Stretch {
                    start: at,
                    end: stop,
                    zeros: (at / length).is_multiple_of(2),
                });
                at = stop;
            }
            Ok(found)
        };
        in_steps(0, end, one, look, || false).expect("looked")
    }

    fn is_alternating(found: &[Stretch], length: u64) {
        for (n, stretch) in (0..).zip(found) {
            let (start, end) = (n * length, (n + 1) * length);
            assert_eq!((stretch.start, stretch.zeros), (start, n % 2 == 0));
            assert!(stretch.end == end || n + 1 == found.len() as u64);
        }
    }

    #[test]
    fn who_wants_one_has_no_more_looked_at_than_finds_it() {
        const GIB: u64 = 2 << 20;
        let mut asked = Vec::new();
        let found = looked(2 * GIB, 8, 64, true, &mut asked);
        assert_eq!(asked, [(0, STEP_MIN)]);
        is_alternating(&found, 8);
        // A long one takes steps that grow.
        asked.clear();
        let found = looked(4 * GIB, GIB, 64, true, &mut asked);
        assert_eq!(found[0], Stretch { start: 0, end: GIB, zeros: true });
        assert!(asked.len() < 16, "{asked:?}");
        assert!(asked.iter().all(|(from, to)| to - from <= STEP_MAX));
        assert!(asked.windows(2).all(|pair| pair[0].1 == pair[1].0), "{asked:?}");
    }

    #[test]
    fn an_answer_has_a_bound_and_no_hole() {
        let mut asked = Vec::new();
        let found = looked(u64::MAX, 8, 64, false, &mut asked);
        assert!((STRETCHES_MAX..=STRETCHES_MAX + 64).contains(&found.len()), "{}", found.len());
        is_alternating(&found, 8);
        // Steps no longer than what one of them leads to.
        assert!(asked.iter().all(|(from, to)| to - from <= STEP_MIN), "{asked:?}");
        asked.clear();
        let found = looked(1000, 300, 64, false, &mut asked);
        is_alternating(&found, 300);
        assert_eq!(found.last().map(|last| last.end), Some(1000));
        assert_eq!(looked(0, 8, 64, true, &mut asked), []);
    }

    #[test]
    fn what_is_known_is_said_where_it_is_not_known_how_it_goes_on() {
        let look = |start, end| match end <= 4 * STEP_MIN {
            true => Ok(vec![Stretch { start, end, zeros: true }]),
            false => Err(ReadError::Unreadable { start, end }),
        };
        let found = in_steps(0, u64::MAX, false, look, || false).expect("the beginning is known");
        assert_eq!(found, [Stretch { start: 0, end: 3 * STEP_MIN, zeros: true }]);
        assert!(in_steps(8 * STEP_MIN, u64::MAX, false, look, || false).is_err());
    }

    #[test]
    fn it_ends_early_when_it_takes_long() {
        let steps = Cell::new(0);
        let look = |start, end| {
            steps.set(steps.get() + 1);
            Ok(vec![Stretch { start, end, zeros: true }])
        };
        let found = in_steps(0, u64::MAX, true, look, || steps.get() == 2).expect("looked");
        assert_eq!(found, [Stretch { start: 0, end: 3 * STEP_MIN, zeros: true }]);
    }
}
