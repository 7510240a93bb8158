//! From a damaged place to the extents and positions that need it.

use tidemark_journal::{SECTOR_BYTES, Seq, VolumeId};

use super::{Extent, Place};
use crate::{
    replica::Replica,
    store::{
        index::{Content, Query},
        read::{Piece, PieceContent, Plan},
        segment::Segment,
    },
};

/// Sectors in a block of the base.
const BLOCK_SECTORS: u64 = 8;
const BLOCK_BYTES: usize = 4096;
/// Sectors that are looked at together.
const WINDOW_SECTORS: u64 = 16 << 10;
/// The same where the base is not read, since all of it is lost: 256 MiB.
const LOST_WINDOW_SECTORS: u64 = 512 << 10;
/// The most parts that an extent is divided into at once.
const PARTS_MAX: usize = 256;

/// The extents that a place concerns, as of the newest position.
pub fn of(replica: &Replica, place: &Place) -> Vec<Extent> {
    let end = replica.journal().progress().durable.seq;
    look_again(replica, place, &at_most(replica, place), end)
}

/// The extents that a place concerns if nothing in them has been overwritten since.
pub fn at_most(replica: &Replica, place: &Place) -> Vec<Extent> {
    let segments = replica.journal().segments();
    let in_log = |number: u64| segments.iter().find(|segment| segment.number() == number);
    let mut extents: Vec<Extent> = Vec::new();
    match *place {
        Place::Chunk { segment, chunk } => {
            let Some(segment) = in_log(segment) else { return extents };
            // An index that cannot be read is a place of its own.
            let _ = segment.for_each(|key, content| {
                if matches!(content, Content::Data { chunk: of, .. } if of == chunk) {
                    extents.push(Extent {
                        volume: key.volume,
                        start: key.start.0,
                        end: key.end(),
                        from: key.seq,
                        until: None,
                    });
                }
            });
        }
        Place::Index { segment } => {
            let Some(segment) = in_log(segment) else { return extents };
            let from = segment.summary().before.seq.next();
            let whole = |(volume, end)| Extent { volume, start: 0, end, from, until: None };
            extents = sizes(replica).into_iter().map(whole).collect();
        }
        Place::Base { volume, first, blocks } => {
            let size = sizes(replica).into_iter().find(|(id, _)| *id == volume);
            let sectors = size.map_or(0, |(_, sectors)| sectors);
            let start = first.saturating_mul(BLOCK_SECTORS).min(sectors);
            let end = first.saturating_add(blocks).saturating_mul(BLOCK_SECTORS).min(sectors);
            if start < end {
                extents.push(Extent { volume, start, end, from: Seq::ZERO, until: None });
            }
        }
        _ => {}
    }
    extents
}

/// The same extents as of a later position: what has been overwritten since has its end.
pub fn look_again(replica: &Replica, place: &Place, extents: &[Extent], end: Seq) -> Vec<Extent> {
    let mut all = Vec::new();
    for extent in extents {
        if extent.until.is_some() || extent.from > end {
            all.push(*extent);
            continue;
        }
        let visible = visible(replica, place, extent, end, PARTS_MAX);
        let parts = parts(extent, &visible);
        if parts.len() > PARTS_MAX {
            all.push(*extent);
            continue;
        }
        for (start, stop, is_visible) in parts {
            let part = Extent { start, end: stop, ..*extent };
            let until = (!is_visible).then(|| overwritten_at(replica, place, &part, end));
            all.push(Extent { until, ..part });
        }
    }
    // One that is overwritten at the position that wrote it is needed by none.
    all.retain(|extent| extent.until.is_none_or(|until| until > extent.from));
    all
}

/// The blocks of the base that are unknown after a segment has been folded, because of a place in it:
/// the first and how many.
pub fn unknown_after(
    replica: &Replica,
    segment: &Segment,
    place: &Place,
) -> Vec<(VolumeId, u64, u64)> {
    let last = segment.summary().last.seq;
    let mut blocks: Vec<(VolumeId, u64, u64)> = Vec::new();
    for extent in of(replica, place) {
        if extent.from > last || extent.until.is_some_and(|until| until <= last) {
            continue;
        }
        for (start, end) in visible(replica, place, &extent, last, usize::MAX) {
            let first = start / BLOCK_SECTORS;
            blocks.push((extent.volume, first, end.div_ceil(BLOCK_SECTORS) - first));
        }
    }
    blocks.sort_unstable();
    blocks.dedup();
    blocks
}

/// The first position at which nothing of an extent is needed; it is not needed at `end`.
fn overwritten_at(replica: &Replica, place: &Place, extent: &Extent, end: Seq) -> Seq {
    let (mut needed, mut free) = (extent.from.0, end.0);
    let is_needed = |at| !visible(replica, place, extent, at, 0).is_empty();
    if !is_needed(extent.from) {
        return extent.from;
    }
    while needed + 1 < free {
        let middle = needed + (free - needed) / 2;
        if is_needed(Seq(middle)) {
            needed = middle;
        } else {
            free = middle;
        }
    }
    Seq(free)
}

/// The parts of an extent that a read at a position needs from a place: sorted and disjoint. Where
/// it cannot be told, all of them. Once there are more than `most` it looks no further.
fn visible(
    replica: &Replica,
    place: &Place,
    extent: &Extent,
    at: Seq,
    most: usize,
) -> Vec<(u64, u64)> {
    let mut all: Vec<(u64, u64)> = Vec::new();
    let mut from = extent.start;
    let step = if is_lost(replica, place) { LOST_WINDOW_SECTORS } else { WINDOW_SECTORS };
    while from < extent.end && all.len() <= most {
        let to = (from + step).min(extent.end);
        let found = in_window(replica, place, extent.volume, from, to, at);
        for (start, end) in found.unwrap_or_else(|| vec![(from, to)]) {
            match all.last_mut() {
                Some((_, last)) if *last == start => *last = end,
                _ => all.push((start, end)),
            }
        }
        from = to;
    }
    all
}

fn in_window(
    replica: &Replica,
    place: &Place,
    volume: VolumeId,
    start: u64,
    end: u64,
    at: Seq,
) -> Option<Vec<(u64, u64)>> {
    let segments = replica.journal().segments();
    let lowest = match *place {
        Place::Chunk { segment, .. } => segment,
        Place::Index { segment } => segment + 1,
        Place::Base { .. } => 0,
        _ => return Some(Vec::new()),
    };
    let mut plan = Plan::new(Query { volume, start, end, at });
    plan.ask(segments.iter().rev().take_while(|segment| segment.number() >= lowest), at).ok()?;
    let (pieces, uncovered) = plan.into_pieces();
    let (number, wanted) = match *place {
        Place::Chunk { segment, chunk } => (segment, chunk),
        Place::Base { .. } if is_lost(replica, place) => return Some(uncovered),
        // What a fold has brought since is good.
        Place::Base { .. } => {
            let bad = uncovered.iter().flat_map(|(s, e)| bad_blocks(replica, volume, *s, *e));
            return Some(bad.collect());
        }
        _ => return Some(uncovered),
    };
    let needed = |piece: &&Piece| {
        matches!(&piece.content, PieceContent::Data { segment, chunk, .. }
            if segment.number() == number && *chunk == wanted)
    };
    Some(pieces.iter().filter(needed).map(|piece| (piece.start, piece.end)).collect())
}

/// Whether a place is in a base that gives nothing at all.
fn is_lost(replica: &Replica, place: &Place) -> bool {
    matches!(*place, Place::Base { volume, .. } if replica.base().is_lost(volume))
}

/// The parts of a range that the base does not give.
fn bad_blocks(replica: &Replica, volume: VolumeId, start: u64, end: u64) -> Vec<(u64, u64)> {
    let mut bad: Vec<(u64, u64)> = Vec::new();
    let mut out = [0; BLOCK_BYTES];
    let mut at = start;
    while at < end {
        let to = (at / BLOCK_SECTORS + 1).saturating_mul(BLOCK_SECTORS).min(end);
        let bytes = ((to - at) * SECTOR_BYTES) as usize;
        if replica.base().read(volume, at, to, &mut out[..bytes]).is_err() {
            match bad.last_mut() {
                Some((_, last)) if *last == at => *last = to,
                _ => bad.push((at, to)),
            }
        }
        at = to;
    }
    bad
}

/// An extent divided into what is visible and what is not.
fn parts(extent: &Extent, visible: &[(u64, u64)]) -> Vec<(u64, u64, bool)> {
    let mut parts = Vec::new();
    let mut at = extent.start;
    for (start, end) in visible {
        if at < *start {
            parts.push((at, *start, false));
        }
        parts.push((*start, *end, true));
        at = *end;
    }
    if at < extent.end {
        parts.push((at, extent.end, false));
    }
    parts
}

fn sizes(replica: &Replica) -> Vec<(VolumeId, u64)> {
    replica.ledger().history(|history| {
        let volumes = history.volumes.iter();
        volumes.map(|volume| (volume.id, volume.sectors())).collect()
    })
}
