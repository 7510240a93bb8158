//! What a restart means: a table over what was found.
//!
//! | state block | stopped cleanly | map readable | spool lost | ring left behind, sound | follows |
//! |---|---|---|---|---|---|
//! | none | - | - | - | - | a new group: its first term, everything uncaptured, gap *first sync* |
//! | there | either | yes | no | yes | the same term goes on after the ring's last sequence; active and dirty regions are dirty, uncaptured ones and those of writes that the disk refused are caught up, gaps stay open |
//! | there | yes | yes, and empty | no | no | the same term goes on where it ended |
//! | there | yes | yes, and not empty | no | no | as not stopped cleanly |
//! | there | no | yes | no | no | a new term at the ceiling; active, dirty and uncaptured regions are caught up, gap *crash* on volumes that have any |
//! | there | either | no | either | either | a new term at the ceiling; everything is compared, gap *doubt* |
//! | there | either | either | yes | either | the same |
//!
//! A state block whose term is neither of the last two of the path counts as a map that cannot be read.
//! Disks that may have been written without the agent (`disks`) make it the last row whatever the map says.
//! After a clean stop a ring is sound only if it ends where the stop says. Where the ring's column says
//! no, one that was left behind is dropped, and a new one made.
//!
//! What the spool holds is sent before anything else, under its own terms, unless it is removed or
//! lost:
//!
//! | the state relies on it beyond what is acknowledged | all of that is there, in order | the ring shows that all of it is final-durable | follows |
//! |---|---|---|---|
//! | no | no | - | it is removed |
//! | no | yes | no | it is sent |
//! | yes | yes | no | it is sent |
//! | either | either | yes | it is removed |
//! | yes | no | no | it is lost |
//!
//! After a clean stop nobody relies on it. One that goes beyond the ceiling is lost too: the state is
//! older than it.

use tidemark_journal::{Ancestry, GapReason, Position, Seq, TermId, VolumeId};

use super::{StateError, block::GroupState, files::Found};
use crate::{
    capture::gap::Gap,
    dirty::{RegionId, active, bitmap, map::VolumeStart},
    encoder::Place,
};

/// Sequences reserved at the start.
const FIRST_RESERVE: u64 = 1 << 24;
/// Journal time reserved ahead, nanoseconds: one hour.
pub const TIME_RESERVE_NS: u64 = 3_600_000_000_000;

/// How a group goes on.
pub struct Start {
    /// What to write durably, with the terms, before anything else.
    pub state: GroupState,
    /// The path of terms.
    pub ancestry: Ancestry,
    /// Whether the terms have changed.
    pub new_term: bool,
    /// The last sequence used.
    pub last_seq: Seq,
    /// Journal time goes on after this.
    pub time_base_ns: u64,
    /// Where encoded history goes on.
    pub place: Place,
    /// The dirty map's volumes.
    pub maps: Vec<VolumeStart>,
    /// The highest generation seen and the log's newest transaction.
    pub generation: u64,
    /// See above.
    pub transaction: u64,
    /// The gaps the volumes start in.
    pub gaps: Vec<(VolumeId, Option<Gap>)>,
    /// Whether the ring that was left behind is gone on with.
    pub with_ring: bool,
    /// Whether what is in the spool is sent; else it is removed.
    pub with_spool: bool,
    /// Why everything is compared, for people, as far as it follows from what was found here.
    pub doubts: Vec<&'static str>,
}

/// What a sound ring of the state's newest term says that was left behind.
pub struct LeftRing {
    /// The last sequence drawn.
    pub last_seq: Seq,
    /// The last sequence in a frame.
    pub framed: Seq,
    /// The volumes' gaps, in their order.
    pub gaps: Vec<Option<Gap>>,
    /// Volumes of which what was not flushed may be lost.
    pub unflushed: Vec<VolumeId>,
    /// Regions of writes that the disk refused.
    pub failed: Vec<RegionId>,
    /// Whether everything before its first frame is final-durable, so that no spool is needed.
    pub beyond_spool: bool,
}

/// What was found in the spool.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LeftSpool {
    /// The position before its first frame.
    pub before: Position,
    /// The position of its last.
    pub end: Position,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum SpoolVerdict {
    Removed,
    Sent,
    Lost,
}

/// Decides how a group goes on. `volumes` are ids and numbers of regions; `ring` and `spool` are what
/// was left behind; `fresh` holds ids for what has to be made.
///
/// # Errors
/// [`StateError::Damaged`] when the terms do not fit the state block.
pub fn decide(
    dir: &std::path::Path,
    group: tidemark_journal::GroupId,
    volumes: &[(VolumeId, u32)],
    found: &Found,
    ring: Option<&LeftRing>,
    spool: Option<LeftSpool>,
    fresh: [[u8; 16]; 2],
) -> Result<Start, StateError> {
    let (Some(old), Some(ancestry)) = (found.state, found.ancestry.clone()) else {
        return Ok(new_group(group, volumes, fresh));
    };
    // The terms are written before the block that uses them, so they may be one ahead. Else a path
    // was being taken over from the target to end a doubt, or one of the two is older than the other.
    let fits = ancestry.terms().iter().rev().take(2).any(|term| term.id == old.term);
    let log = active::recover(&found.log, old.map_id);
    let mut doubts = Vec::new();
    if log.is_err() {
        doubts.push("the log of active regions is damaged");
    }
    if !fits {
        doubts.push("the path of terms and the state are not of the same time");
    }
    let log = log.unwrap_or_else(|damaged| active::Recovered {
        active: Vec::new(),
        transaction: damaged.transaction,
    });
    let mut generation = 0;
    let same_term = ancestry.current().id == old.term;
    let ring = ring.filter(|ring| same_term && old.clean.is_none_or(|end| end == ring.last_seq));
    let verdict = judge_spool(&old, &ancestry, ring, spool);
    let with_spool = verdict == SpoolVerdict::Sent;
    if verdict == SpoolVerdict::Lost {
        doubts.push("the spool does not hold what the state relies on");
    }
    let mut pages_damaged = false;
    let mut maps = Vec::new();
    for ((volume, regions), bytes) in volumes.iter().zip(&found.maps) {
        let recovered = bitmap::recover(bytes, old.map_id, *regions);
        pages_damaged |= recovered.damaged_pages > 0;
        generation = generation.max(recovered.generation);
        let mut dirty = recovered.dirty;
        for region in log.active.iter().filter(|region| region.volume == *volume) {
            if region.index < *regions {
                dirty.set(region.index);
            }
        }
        maps.push(VolumeStart {
            id: *volume,
            regions: *regions,
            written: recovered.written,
            uncaptured: recovered.uncaptured,
            dirty,
        });
    }
    if pages_damaged {
        doubts.push("pages of the dirty map are damaged");
    }
    let doubt = found.doubted || !doubts.is_empty();
    if let Some(ring) = ring.filter(|_| !doubt) {
        for map in &mut maps {
            // What no flush has made safe is active or dirty.
            if ring.unflushed.contains(&map.id) {
                map.uncaptured.absorb(&mut map.dirty);
            }
            for region in ring.failed.iter().filter(|region| region.volume == map.id) {
                map.uncaptured.set(region.index);
            }
        }
        return Ok(Start {
            state: GroupState { clean: None, spooled: relied_on(&old, with_spool), ..old },
            new_term: false,
            last_seq: ring.last_seq,
            time_base_ns: old.time_ceiling_ns,
            place: place_after(&ancestry, ring.framed),
            gaps: volumes.iter().map(|(id, _)| *id).zip(ring.gaps.iter().copied()).collect(),
            ancestry,
            maps,
            generation,
            transaction: log.transaction,
            with_ring: true,
            with_spool,
            doubts,
        });
    }
    let mut gaps = Vec::new();
    for map in &mut maps {
        map.uncaptured.absorb(&mut map.dirty);
        if doubt {
            map.uncaptured.fill();
        }
        let reason = if doubt { GapReason::Doubt } else { GapReason::Crash };
        gaps.push((map.id, (map.uncaptured.count() > 0).then_some(Gap::owed(reason))));
    }
    let clean = old.clean.filter(|_| !doubt && gaps.iter().all(|(_, gap)| gap.is_none()));
    if let Some(last_seq) = clean
        && same_term
    {
        return Ok(Start {
            state: GroupState {
                ceiling: Seq(last_seq.0 + FIRST_RESERVE),
                time_ceiling_ns: old.time_ceiling_ns + TIME_RESERVE_NS,
                clean: None,
                spooled: Position::default(),
                ..old
            },
            new_term: false,
            last_seq,
            time_base_ns: old.time_ceiling_ns,
            place: place_after(&ancestry, last_seq),
            ancestry,
            maps,
            generation,
            transaction: log.transaction,
            gaps,
            with_ring: false,
            with_spool: false,
            doubts,
        });
    }
    let ancestry = without_unused_term(ancestry, &old, spool);
    let fork_seq = old.ceiling.max(ancestry.current().fork_seq);
    let ancestry = ancestry
        .fork(TermId(fresh[0]), fork_seq)
        .map_err(|_| StateError::Damaged(dir.to_owned()))?;
    Ok(Start {
        state: GroupState {
            term: TermId(fresh[0]),
            ceiling: Seq(fork_seq.0 + FIRST_RESERVE),
            time_ceiling_ns: old.time_ceiling_ns + TIME_RESERVE_NS,
            clean: None,
            spooled: relied_on(&old, with_spool),
            ..old
        },
        new_term: true,
        last_seq: fork_seq,
        time_base_ns: old.time_ceiling_ns,
        place: opening(&ancestry),
        ancestry,
        maps,
        generation,
        transaction: log.transaction,
        gaps,
        with_ring: false,
        with_spool,
        doubts,
    })
}

/// The path without a term that was written down and never begun, so that attempts which fail then do not
/// use up the terms that a path can hold.
///
/// The terms are written before the block that names the newest, and nothing is captured, spooled or sent
/// until that is durable. So of a term that the block does not name there is nothing anywhere, unless the
/// block is older than the terms. Then the spool may hold some of it, and the term stays; or the target, which
/// has also heard of a higher generation and has everything compared, whether the term is on the path or not.
fn without_unused_term(ancestry: Ancestry, old: &GroupState, spool: Option<LeftSpool>) -> Ancestry {
    let last = *ancestry.current();
    let spooled = spool.is_some_and(|spool| [spool.before.term, spool.end.term].contains(&last.id));
    if last.parent != old.term || spooled {
        return ancestry;
    }
    ancestry.until(Position { term: last.parent, seq: last.fork_seq }).unwrap_or(ancestry)
}

/// The table of the spool.
fn judge_spool(
    old: &GroupState,
    ancestry: &Ancestry,
    ring: Option<&LeftRing>,
    spool: Option<LeftSpool>,
) -> SpoolVerdict {
    let relied_on = old.clean.is_none() && old.spooled.seq > old.acked.seq;
    let whole = spool.is_some_and(|spool| {
        let from_acked =
            spool.before.seq <= old.acked.seq || ancestry.continues(old.acked, spool.before);
        from_acked && spool.end.seq >= old.spooled.seq && ancestry.contains(spool.end)
    });
    if spool.is_some_and(|spool| spool.end.seq > old.ceiling) {
        SpoolVerdict::Lost
    } else if old.clean.is_some() || ring.is_some_and(|ring| ring.beyond_spool) {
        SpoolVerdict::Removed
    } else if whole {
        SpoolVerdict::Sent
    } else if relied_on {
        SpoolVerdict::Lost
    } else {
        SpoolVerdict::Removed
    }
}

fn relied_on(old: &GroupState, with_spool: bool) -> Position {
    if with_spool { old.spooled } else { Position::default() }
}

/// The place of the first frame after `seq`, in a path's newest term.
fn place_after(ancestry: &Ancestry, seq: Seq) -> Place {
    let current = *ancestry.current();
    // The first record of a term names the end of its parent.
    if seq == current.fork_seq {
        return opening(ancestry);
    }
    Place { term: current.id, before: Position { term: current.id, seq } }
}

/// The place of the first frame of a path's newest term.
pub fn opening(ancestry: &Ancestry) -> Place {
    let current = ancestry.current();
    let parent = if current.parent.is_nil() { current.id } else { current.parent };
    Place { term: current.id, before: Position { term: parent, seq: current.fork_seq } }
}

fn new_group(
    group: tidemark_journal::GroupId,
    volumes: &[(VolumeId, u32)],
    fresh: [[u8; 16]; 2],
) -> Start {
    let ancestry = Ancestry::root(TermId(fresh[0]));
    let maps = volumes.iter().map(|(id, regions)| {
        let mut uncaptured = bitmap::Bits::new(*regions);
        uncaptured.fill();
        let written = vec![0; bitmap::pages_in(*regions) as usize];
        let dirty = bitmap::Bits::new(*regions);
        VolumeStart { id: *id, regions: *regions, written, uncaptured, dirty }
    });
    Start {
        state: GroupState {
            group,
            map_id: fresh[1],
            term: TermId(fresh[0]),
            ceiling: Seq(FIRST_RESERVE),
            time_ceiling_ns: TIME_RESERVE_NS,
            acked: Position::default(),
            generation: 0,
            clean: None,
            ring: 0,
            spooled: Position::default(),
        },
        new_term: true,
        last_seq: Seq::ZERO,
        time_base_ns: 0,
        place: opening(&ancestry),
        ancestry,
        maps: maps.collect(),
        generation: 0,
        transaction: 0,
        gaps: volumes.iter().map(|(id, _)| (*id, Some(Gap::owed(GapReason::FirstSync)))).collect(),
        with_ring: false,
        with_spool: false,
        doubts: Vec::new(),
    }
}

#[cfg(test)]
mod tests;
