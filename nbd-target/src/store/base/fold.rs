//! Folding a segment into the base.
//!
//! The steps, in an order that can be cut anywhere and begun again:
//!
//! 1. the caller has raised the oldest position offered to the segment's end, durably;
//! 2. what an interrupted fold left to redo is applied;
//! 3. the newest version of each block is applied, sorted and coalesced; a block that the segment
//!    changes only in part is put together and made durable in the redo file first;
//! 4. the base is synced;
//! 5. the caller commits the catalogue, takes the segment out of the log and deletes it.
//!
//! Until step 5 readers find everything the segment holds in the segment, so what the base holds of
//! it meanwhile does not matter; and applying it again gives the same.

use std::{collections::BTreeMap, io, sync::Arc};

use anyhow::Context;
use tidemark_journal::{SECTOR_BYTES, VolumeId};

use super::{
    BLOCK_BYTES, BLOCK_SECTORS, Base,
    apply::{Change, NewContent, Redo},
};
use crate::store::{
    index::Query,
    read::{self, Piece, PieceContent, Plan},
    segment::Segment,
};

/// Sectors that are looked at together.
const WINDOW_SECTORS: u64 = 16 << 10;
/// Bytes that are gathered before they are applied.
const BATCH_BYTES_MAX: usize = 8 << 20;

/// Where a fold can be cut short, for tests of what is left then.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// The redo file has been made.
    Begun,
    /// A batch's partial blocks are in the redo file, durably.
    RedoSynced,
    /// A change of a batch has been applied.
    Applied,
    /// Everything has been applied and synced.
    Synced,
}

/// Applies a segment to the base. `at` is told of each step, and ends the fold by an error.
///
/// # Errors
/// When the segment cannot be read, the base cannot be written, or `at` says so.
pub fn fold(
    base: &Base,
    segment: &Arc<Segment>,
    mut at: impl FnMut(Step) -> io::Result<()>,
) -> anyhow::Result<()> {
    let redo_path = base.dir().join("fold.redo");
    Redo::replay(&redo_path, base).context("cannot apply what an interrupted fold left")?;
    let mut redo = Redo::create(&redo_path)?;
    at(Step::Begun)?;
    let last = segment.summary().last.seq;
    let mut batch = Batch { changes: Vec::new(), bytes: 0 };
    for (volume, ranges) in touched(segment)? {
        for (start, end) in ranges {
            let mut from = start;
            while from < end {
                let to = (from + WINDOW_SECTORS).min(end);
                let mut plan = Plan::new(Query { volume, start: from, end: to, at: last });
                plan.ask([segment], last)?;
                let (pieces, rest) = plan.into_pieces();
                batch.window(base, &mut redo, volume, (from, to), &pieces, &rest)?;
                if batch.bytes >= BATCH_BYTES_MAX {
                    batch.apply(base, &mut redo, &mut at)?;
                }
                from = to;
            }
        }
    }
    batch.apply(base, &mut redo, &mut at)?;
    base.sync()?;
    at(Step::Synced)?;
    redo.remove()?;
    Ok(())
}

/// The blocks that a segment changes: sorted, disjoint ranges of sectors per volume, in whole
/// blocks.
fn touched(segment: &Segment) -> anyhow::Result<BTreeMap<VolumeId, Vec<(u64, u64)>>> {
    let mut touched: BTreeMap<VolumeId, Vec<(u64, u64)>> = BTreeMap::new();
    segment.for_each(|key, _| {
        let start = key.start.0 / BLOCK_SECTORS * BLOCK_SECTORS;
        let range = (start, key.end().next_multiple_of(BLOCK_SECTORS));
        let ranges = touched.entry(key.volume).or_default();
        // Versions of one extent follow each other: keep one.
        if ranges.last() != Some(&range) {
            ranges.push(range);
        }
    })?;
    for ranges in touched.values_mut() {
        ranges.sort_unstable();
        let mut merged: Vec<(u64, u64)> = Vec::new();
        for (start, end) in ranges.drain(..) {
            match merged.last_mut() {
                Some(last) if start <= last.1 => last.1 = last.1.max(end),
                _ => merged.push((start, end)),
            }
        }
        *ranges = merged;
    }
    Ok(touched)
}

struct Batch {
    changes: Vec<Change>,
    bytes: usize,
}

/// What a block of a window is made of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Make {
    Nothing,
    Zeros,
    Data,
    Unreadable,
}

impl Batch {
    /// Takes in a window of whole blocks: what the segment has of it, and what it has not.
    fn window(
        &mut self,
        base: &Base,
        redo: &mut Redo,
        volume: VolumeId,
        (start, end): (u64, u64),
        pieces: &[Piece],
        rest: &[(u64, u64)],
    ) -> anyhow::Result<()> {
        let first = start / BLOCK_SECTORS;
        let zeros = |piece: &Piece| matches!(piece.content, PieceContent::Zero);
        if rest.is_empty() && pieces.iter().all(zeros) {
            self.push(volume, first, NewContent::Zeros((end - start) / BLOCK_SECTORS));
            return Ok(());
        }
        let unreadable = |piece: &&Piece| matches!(piece.content, PieceContent::Unreadable);
        let readable: Vec<Piece> = pieces.iter().filter(|p| !unreadable(p)).cloned().collect();
        let mut bytes = vec![0; ((end - start) * SECTOR_BYTES) as usize];
        read::fill(&readable, start, &mut bytes)?;
        let mut makes = vec![Make::Zeros; ((end - start) / BLOCK_SECTORS) as usize];
        for (block, make) in makes.iter_mut().enumerate() {
            let number = first + block as u64;
            let (from, to) = (number * BLOCK_SECTORS, (number + 1) * BLOCK_SECTORS);
            let missing: Vec<(u64, u64)> = overlaps(rest, from, to).collect();
            let content = &mut bytes[block * BLOCK_BYTES as usize..][..BLOCK_BYTES as usize];
            if missing == [(from, to)] {
                *make = Make::Nothing;
                continue;
            }
            if pieces.iter().filter(unreadable).any(|p| p.start < to && p.end > from) {
                *make = Make::Unreadable;
                continue;
            }
            if !missing.is_empty() {
                let Some(old) = base.block(volume, number)? else {
                    *make = Make::Unreadable;
                    continue;
                };
                for (s, e) in missing {
                    let at = ((s - from) * SECTOR_BYTES) as usize;
                    let till = ((e - from) * SECTOR_BYTES) as usize;
                    content[at..till].copy_from_slice(&old[at..till]);
                }
                redo.push(volume, number, content)?;
            }
            if content.iter().any(|byte| *byte != 0) {
                *make = Make::Data;
            }
        }
        let mut block = 0;
        while block < makes.len() {
            let make = makes[block];
            let run = makes[block..].iter().take_while(|next| **next == make).count();
            let range = block * BLOCK_BYTES as usize..(block + run) * BLOCK_BYTES as usize;
            let content = match make {
                Make::Nothing => None,
                Make::Zeros => Some(NewContent::Zeros(run as u64)),
                Make::Unreadable => Some(NewContent::Unreadable(run as u64)),
                Make::Data => Some(NewContent::Data(bytes[range].to_vec())),
            };
            if let Some(content) = content {
                self.push(volume, first + block as u64, content);
            }
            block += run;
        }
        Ok(())
    }

    fn push(&mut self, volume: VolumeId, first: u64, content: NewContent) {
        self.bytes += match &content {
            NewContent::Data(bytes) => bytes.len(),
            // Not their size, but a bound on the list.
            NewContent::Zeros(_) | NewContent::Unreadable(_) => 256,
        };
        if let (
            NewContent::Zeros(more),
            Some(Change { volume: v, first: f, content: NewContent::Zeros(n) }),
        ) = (&content, self.changes.last_mut())
            && *v == volume
            && *f + *n == first
        {
            *n += more;
            return;
        }
        self.changes.push(Change { volume, first, content });
    }

    fn apply(
        &mut self,
        base: &Base,
        redo: &mut Redo,
        at: &mut impl FnMut(Step) -> io::Result<()>,
    ) -> io::Result<()> {
        redo.sync()?;
        at(Step::RedoSynced)?;
        for change in self.changes.drain(..) {
            base.apply(&change)?;
            at(Step::Applied)?;
        }
        self.bytes = 0;
        Ok(())
    }
}

/// The parts of sorted ranges inside `from..to`.
fn overlaps(ranges: &[(u64, u64)], from: u64, to: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
    let first = ranges.partition_point(|(_, end)| *end <= from);
    ranges[first..]
        .iter()
        .take_while(move |(start, _)| *start < to)
        .map(move |(start, end)| ((*start).max(from), (*end).min(to)))
}

#[cfg(test)]
mod tests;
