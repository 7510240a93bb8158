//! What a restart means: a table over what was found.
//!
//! | state block | stopped cleanly | map readable | follows |
//! |---|---|---|---|
//! | none | - | - | a new group: its first term, everything uncaptured, gap *first sync* |
//! | there | yes | yes, and empty | the same term goes on where it ended |
//! | there | no | yes | a new term at the ceiling; active, dirty and uncaptured regions are caught up, gap *crash* on volumes that have any |
//! | there | either | no | a new term at the ceiling; everything is compared, gap *doubt* |

use tidemark_journal::{Ancestry, GapReason, Position, Seq, TermId, VolumeId};

use super::{StateError, block::GroupState, files::Found};
use crate::{
    dirty::{active, bitmap, map::VolumeStart},
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
    pub gaps: Vec<(VolumeId, Option<GapReason>)>,
}

/// Decides how a group goes on. `volumes` are ids and numbers of regions; `fresh` holds ids for
/// what has to be made.
///
/// # Errors
/// [`StateError::Damaged`] when the terms do not fit the state block.
pub fn decide(
    dir: &std::path::Path,
    group: tidemark_journal::GroupId,
    volumes: &[(VolumeId, u32)],
    found: &Found,
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
    let mut doubt = log.is_err();
    let log = log.unwrap_or_else(|damaged| active::Recovered {
        active: Vec::new(),
        transaction: damaged.transaction,
    });
    let mut generation = 0;
    let (mut maps, mut gaps) = (Vec::new(), Vec::new());
    for ((volume, regions), bytes) in volumes.iter().zip(&found.maps) {
        let recovered = bitmap::recover(bytes, old.map_id, *regions);
        doubt |= recovered.damaged_pages > 0;
        generation = generation.max(recovered.generation);
        let mut uncaptured = recovered.uncaptured;
        let mut dirty = recovered.dirty;
        uncaptured.absorb(&mut dirty);
        for region in log.active.iter().filter(|region| region.volume == *volume) {
            if region.index < *regions {
                uncaptured.set(region.index);
            }
        }
        maps.push(VolumeStart {
            id: *volume,
            regions: *regions,
            written: recovered.written,
            uncaptured,
        });
    }
    if doubt {
        maps.iter_mut().for_each(|map| map.uncaptured.fill());
    }
    for map in &maps {
        let reason = if doubt { GapReason::Doubt } else { GapReason::Crash };
        gaps.push((map.id, (map.uncaptured.count() > 0).then_some(reason)));
    }
    let clean = old.clean.filter(|_| !doubt && gaps.iter().all(|(_, gap)| gap.is_none()));
    if let Some(last_seq) = clean
        && ancestry.current().id == old.term
    {
        let place = Place { term: old.term, before: Position { term: old.term, seq: last_seq } };
        // The first record of a term names the end of its parent.
        let current = *ancestry.current();
        let place = if last_seq == current.fork_seq { opening(&ancestry) } else { place };
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
            place,
            ancestry,
            maps,
            generation,
            transaction: log.transaction,
            gaps,
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
    })
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
        VolumeStart { id: *id, regions: *regions, written, uncaptured }
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
        },
        new_term: true,
        last_seq: Seq::ZERO,
        time_base_ns: 0,
        place: opening(&ancestry),
        ancestry,
        maps: maps.collect(),
        generation: 0,
        transaction: 0,
        gaps: volumes.iter().map(|(id, _)| (*id, Some(GapReason::FirstSync))).collect(),
    }
}
