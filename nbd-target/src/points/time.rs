//! From a moment of the source's clock to a position.
//!
//! The state at a moment is that after the last record whose wall clock is not later. Where the
//! clock was set back, several records are the last before the moment, each for a stretch of the
//! order: then all are named and none is chosen.

use std::sync::Arc;

use tidemark_journal::{FrameView, Seq};

use super::resolve::{Refusal, Scope};
use crate::{
    clock::format_wall,
    replica::Replica,
    store::{ReadError, index::FrameRow, segment::Segment},
};

/// A clock that goes back by less than this is not called ambiguous: clocks are slewed, and the two
/// clocks of a record are not read in one instant.
const JITTER_NS: i64 = 100_000_000;

/// The position at a moment. `scope` is what the oldest point is named of.
///
/// # Errors
/// [`Refusal`]: nothing was vouched for at that moment, it is no longer retained, or ambiguous.
pub fn resolve(replica: &Replica, scope: &Scope, wall_ns: i64, end: Seq) -> Result<Seq, Refusal> {
    let (oldest, oldest_wall_ns, end_wall_ns) = replica
        .ledger()
        .history(|history| (history.oldest, history.oldest_wall_ns, history.end_wall_ns));
    let vitals = replica.ledger().vitals();
    let mut vouched_ns = end_wall_ns;
    if vitals.vouched.seq <= end {
        vouched_ns = vouched_ns.max(vitals.vouched_wall_ns);
    }
    if wall_ns > vouched_ns {
        return Err(Refusal(format!(
            "the source has vouched for nothing after {}; the newest point is @{0}",
            format_wall(vouched_ns)
        )));
    }
    let mut walk = Walk { wall_ns, last_below: None, highest_since: i64::MIN, found: Vec::new() };
    if oldest > Seq::ZERO && oldest_wall_ns <= wall_ns {
        walk.last_below = Some(Below::Position(oldest));
    }
    for segment in replica.journal().segments().iter() {
        if segment.summary().last.seq > oldest {
            walk.segment(segment, oldest).map_err(|error| Refusal(error.to_string()))?;
        }
    }
    let found = walk.finish().map_err(|error| Refusal(error.to_string()))?;
    match found.as_slice() {
        [] => Err(replica.ledger().history(|history| {
            let why = format!("{} is before everything that is retained", format_wall(wall_ns));
            scope.before_all(history, &why, end)
        })),
        [seq] => Ok((*seq).min(end)),
        several => {
            let names: Vec<String> = several.iter().map(|seq| format!("@seq:{seq}")).collect();
            Err(Refusal(format!(
                "the source's clock was set back, so {} was more than once: choose one of {}",
                format_wall(wall_ns),
                names.join(", ")
            )))
        }
    }
}

/// The source's wall clock at a position.
///
/// # Errors
/// [`Refusal`] when the log cannot be read there.
pub fn wall_at(replica: &Replica, seq: Seq) -> Result<i64, Refusal> {
    let (oldest, oldest_wall_ns) =
        replica.ledger().history(|history| (history.oldest, history.oldest_wall_ns));
    let segments = replica.journal().segments();
    let place = segments.partition_point(|segment| segment.summary().last.seq < seq);
    let Some(segment) = segments.get(place).filter(|_| seq > oldest) else {
        return Ok(oldest_wall_ns);
    };
    let read = || {
        let (mut low, mut high) = (0, segment.frames()?);
        // The last frame that begins at or before the position.
        while low + 1 < high {
            let middle = low.midpoint(high);
            match segment.frame(middle)? {
                Some(row) if row.first <= seq => low = middle,
                _ => high = middle,
            }
        }
        let Some(row) = segment.frame(low)? else { return Ok(oldest_wall_ns) };
        let meta = segment.frame_meta(&row)?;
        let view = parse(segment, &row, &meta)?;
        let records = view.records().take_while(|record| record.seq <= seq);
        Ok(records.last().map_or(row.wall_ns, |record| view.wall_ns(&record)))
    };
    read().map_err(|error: ReadError| Refusal(error.to_string()))
}

fn parse<'m>(
    segment: &Segment,
    row: &FrameRow,
    meta: &'m [u8],
) -> Result<FrameView<'m>, ReadError> {
    FrameView::parse_meta(meta).map_err(|error| {
        let number = segment.number();
        ReadError::Damaged(format!("segment {number}, frame at {}: {error}", row.offset).into())
    })
}

/// The last thing seen that is not later than the moment.
enum Below {
    Position(Seq),
    Frame(Arc<Segment>, FrameRow),
}

struct Walk {
    wall_ns: i64,
    last_below: Option<Below>,
    /// The latest wall clock seen since the last position found.
    highest_since: i64,
    found: Vec<(Seq, i64)>,
}

impl Walk {
    fn segment(&mut self, segment: &Arc<Segment>, oldest: Seq) -> Result<(), ReadError> {
        let summary = segment.summary();
        let frames = segment.frames()?;
        if summary.wall_min_ns > self.wall_ns {
            self.above(summary.wall_max_ns)?;
        } else if summary.wall_max_ns <= self.wall_ns && frames > 0 {
            if let Some(row) = segment.frame(frames - 1)? {
                self.below(segment, row);
            }
        } else {
            for number in 0..frames {
                let Some(row) = segment.frame(number)? else { break };
                if row.last <= oldest {
                    continue;
                }
                if row.wall_ns <= self.wall_ns {
                    self.below(segment, row);
                } else {
                    self.above(row.wall_ns)?;
                }
            }
        }
        Ok(())
    }

    fn below(&mut self, segment: &Arc<Segment>, row: FrameRow) {
        if let Some((_, highest)) = self.found.last_mut() {
            *highest = (*highest).max(self.highest_since);
        }
        self.last_below = Some(Below::Frame(Arc::clone(segment), row));
    }

    fn above(&mut self, wall_ns: i64) -> Result<(), ReadError> {
        self.highest_since = self.highest_since.max(wall_ns);
        if let Some(below) = self.last_below.take() {
            let seq = self.position(&below)?;
            self.found.push((seq, wall_ns));
            self.highest_since = wall_ns;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Vec<Seq>, ReadError> {
        if let Some((_, highest)) = self.found.last_mut() {
            *highest = (*highest).max(self.highest_since);
        }
        if let Some(below) = self.last_below.take() {
            let seq = self.position(&below)?;
            self.found.push((seq, i64::MAX));
        }
        // A position that a clock's jitter alone separates from the next is not a choice.
        let limit = self.wall_ns.saturating_add(JITTER_NS);
        Ok(self.found.iter().filter(|(_, highest)| *highest > limit).map(|(seq, _)| *seq).collect())
    }

    /// The last record of what was seen that is not later than the moment.
    fn position(&self, below: &Below) -> Result<Seq, ReadError> {
        let (segment, row) = match below {
            Below::Position(seq) => return Ok(*seq),
            Below::Frame(segment, row) => (segment, row),
        };
        let meta = segment.frame_meta(row)?;
        let view = parse(segment, row, &meta)?;
        let records = view.records().take_while(|record| view.wall_ns(record) <= self.wall_ns);
        Ok(records.last().map_or(row.first, |record| record.seq))
    }
}
