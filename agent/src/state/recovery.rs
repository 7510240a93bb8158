//! What a restart means: a table over what was found.
//!
//! | state block | stopped cleanly | map readable | ring left behind, sound | follows |
//! |---|---|---|---|---|
//! | none | - | - | - | a new group: its first term, everything uncaptured, gap *first sync* |
//! | there | either | yes | yes | the same term goes on after the ring's last sequence; active and dirty regions are dirty, uncaptured ones and those of writes that the disk refused are caught up, gaps stay open |
//! | there | yes | yes, and empty | no | the same term goes on where it ended |
//! | there | yes | yes, and not empty | no | as not stopped cleanly |
//! | there | no | yes | no | a new term at the ceiling; active, dirty and uncaptured regions are caught up, gap *crash* on volumes that have any |
//! | there | either | no | either | a new term at the ceiling; everything is compared, gap *doubt* |
//!
//! Disks that may have been written without the agent (`disks`) make it the last row whatever the map says.
//! After a clean stop a ring is sound only if it ends where the stop says. Where the ring's column says
//! no, one that was left behind is dropped, and a new one made.

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
}

/// What a sound ring of the state's newest term says that was left behind.
pub struct LeftRing {
    /// The last sequence drawn.
    pub last_seq: Seq,
    /// The last sequence in a frame.
    pub framed: Seq,
    /// The volumes' gaps, in their order.
    pub gaps: Vec<Option<Gap>>,
    /// Regions of writes that the disk refused.
    pub failed: Vec<RegionId>,
}

/// Decides how a group goes on. `volumes` are ids and numbers of regions; `ring` is what was left
/// behind; `fresh` holds ids for what has to be made.
///
/// # Errors
/// [`StateError::Damaged`] when the terms do not fit the state block.
pub fn decide(
    dir: &std::path::Path,
    group: tidemark_journal::GroupId,
    volumes: &[(VolumeId, u32)],
    found: &Found,
    ring: Option<&LeftRing>,
    fresh: [[u8; 16]; 2],
) -> Result<Start, StateError> {
    let (Some(old), Some(ancestry)) = (found.state, found.ancestry.clone()) else {
        return Ok(new_group(group, volumes, fresh));
    };
    if ancestry.current().id != old.term {
        // The terms are written before the block that uses them, so they may be one ahead.
        let ahead = ancestry.terms().iter().rev().nth(1).is_some_and(|term| term.id == old.term);
        if !ahead {
            return Err(StateError::Damaged(dir.to_owned()));
        }
    }
    let log = active::recover(&found.log, old.map_id);
    let mut doubt = found.doubted || log.is_err();
    let log = log.unwrap_or_else(|damaged| active::Recovered {
        active: Vec::new(),
        transaction: damaged.transaction,
    });
    let mut generation = 0;
    let ring = ring.filter(|ring| {
        ancestry.current().id == old.term && old.clean.is_none_or(|end| end == ring.last_seq)
    });
    let mut maps = Vec::new();
    for ((volume, regions), bytes) in volumes.iter().zip(&found.maps) {
        let recovered = bitmap::recover(bytes, old.map_id, *regions);
        doubt |= recovered.damaged_pages > 0;
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
    if let Some(ring) = ring.filter(|_| !doubt) {
        for map in &mut maps {
            for region in ring.failed.iter().filter(|region| region.volume == map.id) {
                map.uncaptured.set(region.index);
            }
        }
        return Ok(Start {
            state: GroupState { clean: None, ..old },
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
        && ancestry.current().id == old.term
    {
        return Ok(Start {
            state: GroupState {
                ceiling: Seq(last_seq.0 + FIRST_RESERVE),
                time_ceiling_ns: old.time_ceiling_ns + TIME_RESERVE_NS,
                clean: None,
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
        });
    }
    let ancestry = ancestry
        .fork(TermId(fresh[0]), old.ceiling)
        .map_err(|_| StateError::Damaged(dir.to_owned()))?;
    Ok(Start {
        state: GroupState {
            term: TermId(fresh[0]),
            ceiling: Seq(old.ceiling.0 + FIRST_RESERVE),
            time_ceiling_ns: old.time_ceiling_ns + TIME_RESERVE_NS,
            clean: None,
            ..old
        },
        new_term: true,
        last_seq: old.ceiling,
        time_base_ns: old.time_ceiling_ns,
        place: opening(&ancestry),
        ancestry,
        maps,
        generation,
        transaction: log.transaction,
        gaps,
        with_ring: false,
    })
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
    }
}

#[cfg(test)]
mod tests;
