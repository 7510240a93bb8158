//! From a point's name to a position, or to the reason why not.

use tidemark_journal::{Seq, VolumeId};

use super::{name::Spec, time};
use crate::{
    history::{Gap, History, Volume},
    replica::Replica,
};

/// A point that can be recovered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Resolved {
    /// The position's sequence.
    pub seq: Seq,
    /// Whether the name means the same position whenever it is asked.
    pub fixed: bool,
}

/// Why a point cannot be had, as a sentence that says what can.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refusal(pub String);

/// Resolves what stands after the `@`, for one volume or for the whole group. May block on the disk.
///
/// # Errors
/// [`Refusal`].
pub fn resolve(replica: &Replica, volume: Option<&str>, spec: &Spec) -> Result<Resolved, Refusal> {
    let end = replica.journal().progress().durable.seq;
    let scope = replica.ledger().history(|history| Scope::of(history, replica.name(), volume))?;
    let fixed = |seq| Resolved { seq, fixed: true };
    match spec {
        Spec::Latest => replica.ledger().history(|history| {
            let newest = scope.newest_good(history, end);
            let seq = newest.ok_or_else(|| scope.nothing_good(history, end))?;
            Ok(Resolved { seq, fixed: false })
        }),
        Spec::Seq(seq) => {
            replica.ledger().history(|history| scope.check(history, *seq, end)).map(fixed)
        }
        Spec::Mark(name) => replica.ledger().history(|history| {
            let mark = history.marks.iter().rev().find(|mark| mark.name == *name);
            let mark = mark.ok_or_else(|| scope.no_such_mark(history, name))?;
            scope.check(history, mark.seq, end).map(fixed)
        }),
        Spec::Time(wall_ns) => {
            let seq = time::resolve(replica, &scope, *wall_ns, end)?;
            not_after_a_loss(replica, seq, *wall_ns)?;
            replica.ledger().history(|history| scope.check(history, seq, end)).map(fixed)
        }
        Spec::Branch(name) => {
            let sentence =
                "a point of the replica is wanted here (latest, mark:NAME, seq:N or a time)";
            Err(Refusal(format!("{sentence}, and @branch:{name} would be a branch")))
        }
    }
}

/// Refuses a time that may lie in a lost stretch: the state before it would not be that of the time.
fn not_after_a_loss(replica: &Replica, seq: Seq, wall_ns: i64) -> Result<(), Refusal> {
    let lost =
        replica.ledger().history(|history| history.lost.iter().find(|l| l.after == seq).cloned());
    let Some(lost) = lost else { return Ok(()) };
    if time::wall_at(replica, seq)? >= wall_ns {
        return Ok(());
    }
    Err(Refusal(format!(
        "what was received after @seq:{seq}, up to @seq:{}, has been lost here ({}), and that time \
         may lie in it; @seq:{seq} is the state before",
        lost.to, lost.why
    )))
}

/// What must be outside its gaps.
pub struct Scope {
    group: String,
    volume: Option<(VolumeId, String)>,
}

impl Scope {
    /// One volume, by its name, or the whole group.
    ///
    /// # Errors
    /// [`Refusal`] when there is no such volume.
    pub fn of(history: &History, group: &str, volume: Option<&str>) -> Result<Scope, Refusal> {
        let found = match volume {
            None => None,
            Some(name) => {
                let volume = history.volume(name).ok_or_else(|| {
                    let names: Vec<&str> =
                        history.volumes.iter().map(|volume| volume.name.as_str()).collect();
                    let all = names.join(", ");
                    Refusal(format!("group '{group}' has no volume '{name}'; it has: {all}"))
                })?;
                Some((volume.id, volume.name.clone()))
            }
        };
        Ok(Scope { group: group.to_owned(), volume: found })
    }

    /// Whether a position is retained, has been reached, and is outside the gaps.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn check(&self, history: &History, at: Seq, end: Seq) -> Result<Seq, Refusal> {
        if at < history.oldest {
            return Err(self.before_all(history, &format!("@seq:{at} is no longer retained"), end));
        }
        if let Some(lost) = history.lost_at(at) {
            let below = self.newest_good(history, lost.after);
            let hint =
                below.map_or(String::new(), |seq| format!("; the point before is @seq:{seq}"));
            return Err(Refusal(format!(
                "@seq:{at} was received and has been lost here ({}); it is there again if the \
                 source sends it again{hint}",
                lost.why
            )));
        }
        if at > end {
            let newest = self.newest_good(history, end);
            let hint = newest.map_or(String::new(), |seq| format!("; the newest is @seq:{seq}"));
            return Err(Refusal(format!("@seq:{at} has not been received yet{hint}")));
        }
        let Some((volume, gap)) = self.gap_at(history, at) else {
            if self.volumes(history, at).next().is_some() {
                return Ok(at);
            }
            return Err(self.nothing_good(history, end));
        };
        let near = |seq: Option<Seq>, word| {
            seq.map_or(format!("none {word}"), |seq| format!("@seq:{seq} {word}"))
        };
        Err(Refusal(format!(
            "@seq:{at} lies in a gap of volume '{}' ({}): its writes were not captured in order \
             there; the nearest good points are {} and {}",
            volume.name,
            gap.describe(),
            near(self.newest_good(history, at), "before"),
            near(self.next_good(history, at, end), "after"),
        )))
    }

    /// Whether a volume is in it.
    pub fn concerns(&self, volume: VolumeId) -> bool {
        self.volume.as_ref().is_none_or(|(id, _)| *id == volume)
    }

    /// The newest good position at or below `from`.
    pub fn newest_good(&self, history: &History, from: Seq) -> Option<Seq> {
        self.newest_of(history, &self.changes(history), from)
    }

    /// The oldest good position at or above `from`, and not above `end`.
    pub fn next_good(&self, history: &History, from: Seq, end: Seq) -> Option<Seq> {
        let changes = self.changes(history);
        let mut at = from;
        while at <= end {
            if self.is_good(history, at) {
                return Some(at);
            }
            at = *changes.get(changes.partition_point(|change| *change <= at))?;
        }
        None
    }

    /// The stretches of good positions from the oldest to the newest, at most `most` of the newest.
    pub fn good_ranges(&self, history: &History, end: Seq, most: usize) -> Vec<(Seq, Seq)> {
        let changes = self.changes(history);
        let lowest = history.oldest.max(Seq(1));
        let mut ranges = Vec::new();
        let mut from = end;
        while ranges.len() < most {
            let Some(last) = self.newest_of(history, &changes, from) else { break };
            let mut first = last;
            loop {
                let place = changes.partition_point(|change| *change <= first).checked_sub(1);
                first =
                    place.and_then(|place| changes.get(place)).map_or(lowest, |c| *c.max(&lowest));
                let before = Seq(first.0 - 1);
                if before < lowest || !self.is_good(history, before) {
                    break;
                }
                first = before;
            }
            ranges.push((first, last));
            from = Seq(first.0 - 1);
        }
        ranges.reverse();
        ranges
    }

    fn newest_of(&self, history: &History, changes: &[Seq], from: Seq) -> Option<Seq> {
        let mut at = from;
        while at >= history.oldest && at > Seq::ZERO {
            if self.is_good(history, at) {
                return Some(at);
            }
            let place = changes.partition_point(|change| *change <= at).checked_sub(1)?;
            at = Seq(changes.get(place)?.0.checked_sub(1)?);
        }
        None
    }

    /// Whether something was there at a position, and none of it in a gap.
    fn is_good(&self, history: &History, at: Seq) -> bool {
        self.volumes(history, at).next().is_some()
            && self.gap_at(history, at).is_none()
            && history.lost_at(at).is_none()
    }

    /// Where positions may begin or cease to be good, in order: between two of these all are alike.
    /// A volume counts only while it is part of the group, and then with all of its gaps, whether
    /// it is still part of it today or not.
    fn changes(&self, history: &History) -> Vec<Seq> {
        let id = self.volume.as_ref().map(|(id, _)| *id);
        let wanted = history.volumes.iter().filter(|volume| id.is_none_or(|id| id == volume.id));
        let mut changes: Vec<Seq> = wanted
            .flat_map(|volume| {
                let ends = [Some(volume.added), volume.removed];
                let gaps = volume.gaps.iter().flat_map(|gap| [Some(gap.begin), gap.end]);
                ends.into_iter().chain(gaps).flatten()
            })
            .collect();
        let lost = history.lost.iter();
        changes.extend(lost.flat_map(|lost| [lost.after.next(), lost.to.next()]));
        changes.sort_unstable();
        changes.dedup();
        changes
    }

    fn volumes<'h>(
        &'h self,
        history: &'h History,
        at: Seq,
    ) -> impl Iterator<Item = &'h Volume> + 'h {
        let id = self.volume.as_ref().map(|(id, _)| *id);
        let wanted = move |volume: &&Volume| id.is_none_or(|id| id == volume.id);
        history.volumes.iter().filter(wanted).filter(move |volume| volume.present_at(at))
    }

    fn gap_at<'h>(&'h self, history: &'h History, at: Seq) -> Option<(&'h Volume, &'h Gap)> {
        let gaps = self.volumes(history, at).filter_map(|v| Some((v, v.gap_at(at)?)));
        // The one that began first says most.
        gaps.min_by_key(|(_, gap)| gap.begin)
    }

    /// The refusal of what lies before the oldest point, which is named.
    pub fn before_all(&self, history: &History, why: &str, end: Seq) -> Refusal {
        match self.next_good(history, history.oldest.max(Seq(1)), end) {
            Some(seq) => Refusal(format!("{why}; the oldest point is @seq:{seq}")),
            None => self.nothing_good(history, end),
        }
    }

    fn nothing_good(&self, history: &History, end: Seq) -> Refusal {
        let what = match &self.volume {
            Some((_, name)) => format!("{}/{name}", self.group),
            None => self.group.clone(),
        };
        Refusal(match self.gap_at(history, end) {
            Some((volume, gap)) => format!(
                "{what} has no point yet: volume '{}' is in a gap ({}); wait until it has caught up",
                volume.name,
                gap.describe()
            ),
            None => format!("{what} has no point yet: nothing has been received"),
        })
    }

    fn no_such_mark(&self, history: &History, name: &str) -> Refusal {
        let known: Vec<&str> =
            history.marks.iter().rev().take(10).map(|mark| mark.name.as_str()).collect();
        let known = if known.is_empty() {
            "there are none".to_owned()
        } else {
            format!("the newest are: {}", known.join(", "))
        };
        Refusal(format!("group '{}' has no mark '{name}'; {known}", self.group))
    }
}

#[cfg(test)]
mod tests;
