//! What leaves the window, and when nothing more may be accepted.

use std::sync::Arc;

use anyhow::Context;
use tidemark_control::config::Bytes;
use tidemark_journal::{Seq, VolumeId};

use crate::{
    config::GroupConfig,
    damage::{self, Place, Spot},
    points::resolve::Scope,
    replica::Replica,
    store::{
        Damage, ReadError, Where,
        base::fold::{self, Folded},
        check, rebuild,
        segment::Segment,
    },
};

/// What a decision rests on.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Bytes of the log.
    pub log_bytes: u64,
    /// Bytes that must be free so that the log goes on: a segment, or a frame that waits already.
    pub ahead_bytes: u64,
    /// The oldest segment, when it is sealed.
    pub oldest: Option<OldestSegment>,
    /// The received history's age counter now, nanoseconds.
    pub received_ns: u64,
    /// The lowest position that must stay, and why.
    pub pin: Option<(Seq, String)>,
}

/// The oldest segment.
#[derive(Clone, Copy, Debug)]
pub struct OldestSegment {
    /// Its last sequence.
    pub last: Seq,
    /// The age counter at its end, nanoseconds.
    pub received_ns: u64,
    /// Whether a point would be lost with it.
    pub has_points: bool,
}

/// What follows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Decision {
    /// The oldest segment is to be folded into the base.
    pub fold: bool,
    /// Why it does not leave, though it should: what is said when the log is full.
    pub held: Option<String>,
}

/// Decides what to do with the oldest segment.
///
/// It leaves the window by age, or early by size; but by size never what is younger than the least
/// window, and never what is pinned. Where there is no point there is nothing to keep: a first sync
/// of any length goes through a log of any size. When nothing may leave and the log has reached its
/// size, its owner accepts nothing more.
pub fn decide(config: &GroupConfig, facts: &Facts) -> Decision {
    let keep = Decision { fold: false, held: None };
    let crowded = facts.log_bytes + facts.ahead_bytes > config.size_max.0;
    let Some(oldest) = facts.oldest else { return keep };
    let age_ns = u128::from(facts.received_ns.saturating_sub(oldest.received_ns));
    let aged = age_ns > config.window.duration().as_nanos();
    let old_enough = !oldest.has_points || age_ns >= config.window_min.duration().as_nanos();
    let pin = facts.pin.as_ref().filter(|(seq, _)| *seq < oldest.last);
    let held = |why: String| Decision { fold: false, held: Some(why) };
    match pin {
        Some((seq, what)) if aged || crowded => held(format!("@seq:{seq} is held by {what}")),
        None if aged || (crowded && old_enough) => {
            Decision { fold: true, held: Some("its oldest history is being folded".to_owned()) }
        }
        None if crowded => held("all of its history is younger than window_min".to_owned()),
        _ => keep,
    }
}

/// Looks at a replica: tells its log what is held, and says whether its oldest segment is to be
/// folded.
pub fn look(replica: &Replica, segment: Bytes) -> bool {
    let decision = decide(replica.config(), &facts(replica, segment));
    replica.set_held(decision.held.map(Arc::from));
    decision.fold
}

fn facts(replica: &Replica, segment: Bytes) -> Facts {
    let segments = replica.journal().segments();
    let oldest = segments.first().filter(|oldest| oldest.is_sealed()).map(|oldest| {
        let summary = oldest.summary();
        let (last, received_ns) = (summary.last.seq, summary.received_ns);
        OldestSegment { last, received_ns, has_points: has_points(replica, last) }
    });
    Facts {
        log_bytes: replica.journal().bytes(),
        ahead_bytes: segment.0.max(replica.journal().wanted_bytes()),
        oldest,
        received_ns: replica.ledger().vitals().received_ns,
        pin: lowest_pin(replica),
    }
}

/// Whether a position below `last` can be recovered, for the group or any volume by itself.
fn has_points(replica: &Replica, last: Seq) -> bool {
    let Some(before) = last.0.checked_sub(1).map(Seq) else { return false };
    replica.ledger().history(|history| {
        let volumes = history.volumes.iter().map(|volume| Some(volume.name.as_str()));
        volumes.chain([None]).any(|volume| {
            let scope = Scope::of(history, replica.name(), volume);
            let good = |scope: Scope| scope.next_good(history, history.oldest.max(Seq(1)), before);
            scope.ok().and_then(good).is_some()
        })
    })
}

/// The lowest position that must stay: an export's or a branch's, or the newest point before a gap
/// that is still open.
fn lowest_pin(replica: &Replica) -> Option<(Seq, String)> {
    let mut pins: Vec<(Seq, String)> =
        replica.pins().list().into_iter().map(|pin| (pin.seq, pin.what)).collect();
    let end = replica.journal().progress().durable.seq;
    replica.ledger().history(|history| {
        let open = history.volumes.iter().filter(|volume| volume.open_gap().is_some());
        let names = open.map(|volume| Some(volume.name.as_str()));
        let names: Vec<Option<&str>> = names.collect();
        let group = (!names.is_empty()).then_some(None);
        for name in names.into_iter().chain(group) {
            let scope = Scope::of(history, replica.name(), name);
            if let Some(seq) = scope.ok().and_then(|scope| scope.newest_good(history, end)) {
                let what = "the newest point before a gap that is still open (raise size_max until \
                            the catch-up fits)";
                pins.push((seq, what.to_owned()));
            }
        }
    });
    pins.into_iter().min()
}

/// Folds the oldest segment into the base, unless it has been pinned meanwhile. Says whether it was.
/// Blocks, for long. One at a time for a replica.
///
/// # Errors
/// When the segment cannot be folded; it is tried again the next time.
pub fn fold_oldest(replica: &Replica) -> anyhow::Result<bool> {
    let segments = replica.journal().segments();
    let Some(segment) = segments.first().filter(|segment| segment.is_sealed()) else {
        return Ok(false);
    };
    let summary = segment.summary();
    let (last, ledger) = (summary.last, replica.ledger());
    let raise = || {
        ledger.change(|row| row.history.raise_oldest(last.seq, summary.wall_max_ns));
    };
    if replica.pins().raise(last.seq, raise).is_err() {
        return Ok(false);
    }
    ledger.keep_history()?;
    let Outcome { folded, lost, unknown } = folded(replica, segment)
        .with_context(|| format!("cannot fold segment {} into the base", segment.number()))?;
    ledger.change(|row| {
        row.base = last;
        row.bases.extend(&folded.rows);
        row.first_segment = segment.number() + 1;
    });
    ledger.keep(|row| replica.catalogue().fold_history(replica.name(), row))?;
    replica.base().committed(&folded.rows);
    let gone = |place: &Place| place.segment() == Some(segment.number());
    replica.damages().replace(gone, Vec::new());
    for removed in replica.journal().remove_through(segment.number()) {
        removed.remove().with_context(|| format!("cannot remove {}", removed.path().display()))?;
    }
    // Now that the base is asked for it. What the log has of what is lost, whoever scrubs finds out.
    for (volume, text) in lost {
        replica.damages().report(Spot::lost(replica, volume, u64::MAX, text));
    }
    for (place, text) in unknown {
        replica.damages().report(Spot::found(replica, place, text));
    }
    tracing::info!(group = replica.name(), segment = segment.number(), "folded into the base");
    Ok(true)
}

/// What a fold has come to.
struct Outcome {
    folded: Folded,
    /// The volumes of whose base nothing is known any more but what was folded in, and why.
    lost: Vec<(VolumeId, String)>,
    /// The blocks of the base that are unknown from now on, because what the segment had of them is
    /// damaged; what is lost is not among them.
    unknown: Vec<(Place, String)>,
}

/// Folds a segment, also one whose index is damaged.
fn folded(replica: &Replica, segment: &Arc<Segment>) -> anyhow::Result<Outcome> {
    let group = replica.group().id;
    let (folded, lost) = match fold::fold(replica.base(), segment, |_| Ok(())) {
        Err(error) if is_index(&error) => {
            let (stand_in, whole) = rebuild::stand_in(segment, group)?;
            let ids: Vec<VolumeId> =
                replica.ledger().history(|h| h.volumes.iter().map(|volume| volume.id).collect());
            tracing::warn!(group = replica.name(), whole, "folded by its frames: {error:#}");
            if !whole {
                // Whatever the damaged frame has changed.
                replica.base().lose(ids.iter().copied())?;
            }
            let lost = if whole { Vec::new() } else { ids };
            (fold::fold(replica.base(), &stand_in, |_| Ok(()))?, lost)
        }
        folded => (folded?, Vec::new()),
    };
    if !lost.is_empty() {
        let why = |volume| {
            let text = format!(
                "segment {} had a damaged frame and a damaged index: what it had changed of volume \
                 {volume}, and all that only the base holds of it, is unknown",
                segment.number()
            );
            (volume, text)
        };
        let lost = lost.into_iter().map(why).collect();
        return Ok(Outcome { folded, lost, unknown: Vec::new() });
    }
    let mut unknown = Vec::new();
    let number = segment.number();
    let known = replica.damages().list();
    let known = known.iter().map(|spot| spot.place).filter(|p| p.segment() == Some(number));
    let mut places: Vec<Place> = known.collect();
    if !folded.damage.is_empty() {
        let found = check::check(segment, group, None, None, &mut |_| Ok(())).unwrap_or_default();
        places.extend(found.iter().map(|found| Place::of_segment(number, found.what)));
        places.sort_unstable();
        places.dedup();
    }
    for place in places {
        for (volume, first, blocks) in damage::unknown_after(replica, segment, &place) {
            let text = format!(
                "{blocks} blocks of volume {volume} from {first} on are unknown in the base, since \
                 segment {number} was damaged"
            );
            unknown.push((Place::Base { volume, first, blocks }, text));
        }
    }
    Ok(Outcome { folded, lost: Vec::new(), unknown })
}

/// Whether an index is damaged: anything else of a segment is met block by block.
fn is_index(error: &anyhow::Error) -> bool {
    let damage = error.chain().find_map(|cause| cause.downcast_ref::<ReadError>());
    let index = |damage: &Damage| matches!(damage.at, Some(Where::Segment { chunk: None, .. }));
    damage.is_some_and(|error| matches!(error, ReadError::Damaged(damage) if index(damage)))
}

#[cfg(test)]
mod tests;
