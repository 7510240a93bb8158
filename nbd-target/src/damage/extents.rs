//! From a damaged place to the extents and positions that need it.

use tidemark_journal::{Seq, VolumeId};

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
/// Sectors that are looked at together: 8 MiB.
const WINDOW_SECTORS: u64 = 16 << 10;
/// The same of the base, of which large parts may be unknown at once: 256 MiB.
const BASE_WINDOW_SECTORS: u64 = 512 << 10;
/// The most sectors of extents that are looked at while somebody waits for it.
const SECTORS_SOON_MAX: u64 = BASE_WINDOW_SECTORS;
/// The most parts that an extent is divided into at once.
const PARTS_MAX: usize = 256;

/// The extents that a place concerns, as of the newest position; none where it would take long to find
/// that out.
pub fn of(replica: &Replica, place: &Place) -> Option<Vec<Extent>> {
    let extents = at_most(replica, place);
    let sectors: u64 = extents.iter().map(|extent| extent.end - extent.start).sum();
    if sectors > SECTORS_SOON_MAX {
        return None;
    }
    let end = replica.journal().progress().durable.seq;
    look_again(replica, place, &extents, end, &|| true)
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

/// The same extents as of a later position: what has been overwritten since has its end. None once
/// `goes_on` says that it is to give up.
pub fn look_again(
    replica: &Replica,
    place: &Place,
    extents: &[Extent],
    end: Seq,
    goes_on: &dyn Fn() -> bool,
) -> Option<Vec<Extent>> {
    let search = Search { replica, place, goes_on };
    let mut all = Vec::new();
    for extent in extents {
        if extent.until.is_some() || extent.from > end {
            all.push(*extent);
            continue;
        }
        let visible = search.visible(extent, end, PARTS_MAX)?;
        let parts = parts(extent, &visible);
        if parts.len() > PARTS_MAX {
            all.push(*extent);
            continue;
        }
        for (start, stop, is_visible) in parts {
            let part = Extent { start, end: stop, ..*extent };
            let until = match is_visible {
                true => None,
                false => Some(search.overwritten_at(&part, end)?),
            };
            all.push(Extent { until, ..part });
        }
    }
    // One that is overwritten at the position that wrote it is needed by none.
    all.retain(|extent| extent.until.is_none_or(|until| until > extent.from));
    Some(all)
}

/// The blocks of the base that are unknown after a segment has been folded, because of a place in it:
/// the first and how many.
pub fn unknown_after(
    replica: &Replica,
    segment: &Segment,
    place: &Place,
) -> Vec<(VolumeId, u64, u64)> {
    let last = segment.summary().last.seq;
    let search = Search { replica, place, goes_on: &|| true };
    let mut blocks: Vec<(VolumeId, u64, u64)> = Vec::new();
    for extent in of(replica, place).unwrap_or_else(|| at_most(replica, place)) {
        if extent.from > last || extent.until.is_some_and(|until| until <= last) {
            continue;
        }
        for (start, end) in search.visible(&extent, last, usize::MAX).unwrap_or_default() {
            let first = start / BLOCK_SECTORS;
            blocks.push((extent.volume, first, end.div_ceil(BLOCK_SECTORS) - first));
        }
    }
    blocks.sort_unstable();
    blocks.dedup();
    blocks
}

/// A search for what needs a place.
struct Search<'s> {
    replica: &'s Replica,
    place: &'s Place,
    /// Whether it is not to be given up.
    goes_on: &'s dyn Fn() -> bool,
}

impl Search<'_> {
    /// The first position at which nothing of an extent is needed; it is not needed at `end`.
    fn overwritten_at(&self, extent: &Extent, end: Seq) -> Option<Seq> {
        let (mut needed, mut free) = (extent.from.0, end.0);
        let is_needed = |at| self.visible(extent, at, 0).map(|visible| !visible.is_empty());
        if !is_needed(extent.from)? {
            return Some(extent.from);
        }
        while needed + 1 < free {
            let middle = needed + (free - needed) / 2;
            if is_needed(Seq(middle))? {
                needed = middle;
            } else {
                free = middle;
            }
        }
        Some(Seq(free))
    }

    /// The parts of an extent that a read at a position needs from the place: sorted and disjoint.
    /// Where it cannot be told, all of them. Once there are more than `most` it looks no further. None
    /// when it is given up.
    fn visible(&self, extent: &Extent, at: Seq, most: usize) -> Option<Vec<(u64, u64)>> {
        let mut all: Vec<(u64, u64)> = Vec::new();
        let mut from = extent.start;
        let step = match self.place {
            Place::Base { .. } => BASE_WINDOW_SECTORS,
            _ => WINDOW_SECTORS,
        };
        while from < extent.end && all.len() <= most {
            if !(self.goes_on)() {
                return None;
            }
            let to = (from + step).min(extent.end);
            let found = self.in_window(extent.volume, from, to, at);
            for (start, end) in found.unwrap_or_else(|| vec![(from, to)]) {
                match all.last_mut() {
                    Some((_, last)) if *last == start => *last = end,
                    _ => all.push((start, end)),
                }
            }
            from = to;
        }
        Some(all)
    }

    fn in_window(
        &self,
        volume: VolumeId,
        start: u64,
        end: u64,
        at: Seq,
    ) -> Option<Vec<(u64, u64)>> {
        let segments = self.replica.journal().segments();
        let lowest = match *self.place {
            Place::Chunk { segment, .. } => segment,
            Place::Index { segment } => segment + 1,
            Place::Base { .. } => 0,
            _ => return Some(Vec::new()),
        };
        let mut plan = Plan::new(Query { volume, start, end, at });
        plan.ask(segments.iter().rev().take_while(|segment| segment.number() >= lowest), at)
            .ok()?;
        let (pieces, uncovered) = plan.into_pieces();
        let (number, wanted) = match *self.place {
            Place::Chunk { segment, chunk } => (segment, chunk),
            // What a fold has brought since is good.
            Place::Base { .. } => {
                let base = self.replica.base();
                return Some(
                    uncovered.iter().flat_map(|(s, e)| base.bad(volume, *s, *e)).collect(),
                );
            }
            _ => return Some(uncovered),
        };
        let needed = |piece: &&Piece| {
            matches!(&piece.content, PieceContent::Data { segment, chunk, .. }
                if segment.number() == number && *chunk == wanted)
        };
        Some(pieces.iter().filter(needed).map(|piece| (piece.start, piece.end)).collect())
    }
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
