//! What leaves the window, and when nothing more may be accepted.

use std::sync::Arc;

use anyhow::Context;
use tidemark_control::config::Bytes;
use tidemark_journal::Seq;

use crate::{config::GroupConfig, points::resolve::Scope, replica::Replica, store::base::fold};

/// What a decision rests on.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Bytes of the log.
    pub log_bytes: u64,
    /// Bytes of one segment.
    pub segment_bytes: u64,
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
}

/// What follows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Decision {
    /// The oldest segment is to be folded into the base.
    pub fold: bool,
    /// Why nothing more may be accepted, as a sentence.
    pub gate: Option<String>,
}

/// Decides what to do with the oldest segment.
///
/// It leaves the window by age, or early by size; but never what is younger than the least window
/// by size, and never what is pinned. When the log has reached its size and nothing may leave,
/// nothing more is accepted.
pub fn decide(config: &GroupConfig, facts: &Facts) -> Decision {
    let keep = Decision { fold: false, gate: None };
    let full = facts.log_bytes >= config.size_max.0;
    let crowded = facts.log_bytes + facts.segment_bytes > config.size_max.0;
    let Some(oldest) = facts.oldest else { return keep };
    let age_ns = u128::from(facts.received_ns.saturating_sub(oldest.received_ns));
    let aged = age_ns > config.window.duration().as_nanos();
    let old_enough = age_ns >= config.window_min.duration().as_nanos();
    let pin = facts.pin.as_ref().filter(|(seq, _)| *seq < oldest.last);
    let gate = |why: String| {
        let text = format!("the log has reached its size of {} and {why}", config.size_max);
        Decision { fold: false, gate: full.then_some(text) }
    };
    match pin {
        Some((seq, what)) if aged || crowded => gate(format!("{what} pins @seq:{seq}")),
        None if aged || (crowded && old_enough) => {
            // While it is folded, too, nothing may grow beyond the size.
            Decision { fold: true, gate: gate("its oldest history is being folded".into()).gate }
        }
        None if crowded => gate("all of its history is younger than window_min".into()),
        _ => keep,
    }
}

/// Looks at a replica: closes or opens its log, and says whether its oldest segment is to be folded.
pub fn look(replica: &Replica, segment: Bytes) -> bool {
    let decision = decide(replica.config(), &facts(replica, segment));
    replica.set_gate(decision.gate.map(Arc::from));
    decision.fold
}

fn facts(replica: &Replica, segment: Bytes) -> Facts {
    let segments = replica.journal().segments();
    let oldest = segments.first().filter(|oldest| oldest.is_sealed()).map(|oldest| {
        let summary = oldest.summary();
        OldestSegment { last: summary.last.seq, received_ns: summary.received_ns }
    });
    Facts {
        log_bytes: replica.journal().bytes(),
        segment_bytes: segment.0,
        oldest,
        received_ns: replica.ledger().vitals().received_ns,
        pin: lowest_pin(replica),
    }
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
                pins.push((seq, "the newest point before a gap that is still open".to_owned()));
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
    fold::fold(replica.base(), segment, |_| Ok(()))
        .with_context(|| format!("cannot fold segment {} into the base", segment.number()))?;
    ledger.change(|row| {
        row.base = last;
        row.first_segment = segment.number() + 1;
    });
    ledger.keep(|row| replica.catalogue().fold_history(replica.name(), row))?;
    for removed in replica.journal().remove_through(last.seq) {
        std::fs::remove_file(removed.path())
            .with_context(|| format!("cannot remove {}", removed.path().display()))?;
    }
    tracing::info!(group = replica.name(), segment = segment.number(), "folded into the base");
    Ok(true)
}

#[cfg(test)]
mod tests;
