//! Folding a segment into the base.
//!
//! The steps, in an order that can be cut anywhere and begun again:
//!
//! 1. the caller has raised the oldest position offered to the segment's end, durably;
//! 2. what an interrupted fold left to redo is applied;
//! 3. the newest version of each block is applied, sorted and coalesced; a block that the segment
//!    changes only in part is put together and made durable in the redo file first;
//! 4. the base is synced, then the maps and headers that make new sums and the next generation
//!    count, and these too;
//! 5. the caller commits the catalogue with the volumes' new rows, takes the segment out of the log
//!    and deletes it.
//!
//! Until step 5 readers find everything the segment holds in the segment, so what the base holds of
//! it meanwhile does not matter; and applying it again gives the same.

use std::{collections::BTreeMap, io, slice, sync::Arc};

use anyhow::Context;
use tidemark_journal::{SECTOR_BYTES, VolumeId};

use super::{
    BLOCK_BYTES, BLOCK_SECTORS, Base, BaseRow, DAMAGE_NAMED_MAX,
    apply::{Change, NewContent, Redo},
    sum::Unknown,
};
use crate::store::{
    ReadError,
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

/// What a fold leaves to its caller.
#[derive(Debug)]
pub struct Folded {
    /// What was damaged, a sentence each: those blocks are unknown from now on, which reads say,
    /// until the source sends them again.
    pub damage: Vec<String>,
    /// What the catalogue is to know of the volumes changed, before the segment leaves the log;
    /// then the base is told by [`Base::committed`].
    pub rows: BTreeMap<VolumeId, BaseRow>,
}

/// Applies a segment to the base. `at` is told of each step, and ends the fold by an error.
///
/// Blocks that lie in one extent are applied in the order of the log, so that each chunk is unpacked
/// once; the kernel sorts them on their way to the disk. The others are few, and put together one by
/// one.
///
/// # Errors
/// When the segment cannot be read, the base cannot be written, or `at` says so.
pub fn fold(
    base: &Base,
    segment: &Arc<Segment>,
    mut at: impl FnMut(Step) -> io::Result<()>,
) -> anyhow::Result<Folded> {
    Redo::replay(base).context("cannot apply what an interrupted fold left")?;
    let mut redo = Redo::create(base)?;
    at(Step::Begun)?;
    let last = segment.summary().last.seq;
    let mut batch = Batch { changes: Vec::new(), bytes: 0, damage: Vec::new() };
    let mut whole = Vec::new();
    for (volume, ranges) in touched(segment)? {
        for (start, end) in ranges {
            let mut from = start;
            while from < end {
                let to = (from + WINDOW_SECTORS).min(end);
                let mut plan = Plan::new(Query { volume, start: from, end: to, at: last });
                plan.ask([segment], last)?;
                let (pieces, rest) = plan.into_pieces();
                let window = Window { volume, start: from, end: to, pieces, rest };
                window.sort_out(base, &mut redo, &mut batch, &mut whole)?;
                if batch.bytes >= BATCH_BYTES_MAX {
                    batch.apply(base, &mut redo, &mut at)?;
                }
                from = to;
            }
        }
    }
    batch.apply(base, &mut redo, &mut at)?;
    whole.sort_unstable_by_key(|run: &Run| (run.chunk, run.offset));
    for run in whole {
        let content = match segment.chunk(run.chunk) {
            Ok(raw) => {
                let range = run.offset as usize..run.offset as usize + run.blocks as usize * BLOCK;
                let bytes = raw.get(range).context("the index points outside its chunk")?;
                NewContent::Data(bytes.to_vec())
            }
            Err(error) => {
                batch.damaged(error)?;
                NewContent::Unreadable(u64::from(run.blocks))
            }
        };
        let change = Change { volume: run.volume, first: run.first, content };
        batch.apply_one(base, &change, &mut at)?;
    }
    let rows = base.finish()?;
    at(Step::Synced)?;
    redo.remove()?;
    Ok(Folded { damage: batch.damage, rows })
}

/// Bytes in a block, as a length in memory.
const BLOCK: usize = BLOCK_BYTES as usize;

/// Blocks that lie wholly in one extent with content.
struct Run {
    chunk: u32,
    offset: u32,
    volume: VolumeId,
    first: u64,
    blocks: u32,
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

/// Whole blocks of a volume: what the segment has of them, and what it has not.
struct Window {
    volume: VolumeId,
    start: u64,
    end: u64,
    pieces: Vec<Piece>,
    rest: Vec<(u64, u64)>,
}

impl Window {
    /// Blocks that lie wholly in one extent go to `whole` or, without content, to the batch; the
    /// others are put together, and kept in the redo file when the base has a part in them.
    fn sort_out(
        &self,
        base: &Base,
        redo: &mut Redo,
        batch: &mut Batch,
        whole: &mut Vec<Run>,
    ) -> anyhow::Result<()> {
        let mut mixed: Vec<u64> = Vec::new();
        for piece in &self.pieces {
            let first = piece.start.div_ceil(BLOCK_SECTORS);
            let after = (piece.end / BLOCK_SECTORS).max(first);
            let touched = piece.start / BLOCK_SECTORS..piece.end.div_ceil(BLOCK_SECTORS);
            mixed.extend(touched.filter(|block| !(first..after).contains(block)));
            if first == after {
                continue;
            }
            match &piece.content {
                PieceContent::Zero => {
                    batch.push(self.volume, first, NewContent::Zeros(after - first));
                }
                PieceContent::Unreadable => {
                    batch.push(self.volume, first, NewContent::Unreadable(after - first));
                }
                PieceContent::Data { chunk, offset, .. } => whole.push(Run {
                    chunk: *chunk,
                    offset: offset + ((first * BLOCK_SECTORS - piece.start) * SECTOR_BYTES) as u32,
                    volume: self.volume,
                    first,
                    blocks: (after - first) as u32,
                }),
            }
        }
        mixed.dedup();
        for block in mixed {
            let content = self.put_together(base, redo, batch, block)?;
            batch.push(self.volume, block, content);
        }
        Ok(())
    }

    /// A block of which several extents, or the base, have a part. Sectors that are damaged, here or
    /// there, are unknown from now on, and no others.
    fn put_together(
        &self,
        base: &Base,
        redo: &mut Redo,
        batch: &mut Batch,
        block: u64,
    ) -> anyhow::Result<NewContent> {
        let (from, to) = (block * BLOCK_SECTORS, (block + 1) * BLOCK_SECTORS);
        debug_assert!(self.start <= from && to <= self.end);
        let mut content = vec![0; BLOCK];
        let mut unknown = Unknown::NONE;
        let first = self.pieces.partition_point(|piece| piece.end <= from);
        let pieces = self.pieces[first..].iter().take_while(|piece| piece.start < to);
        for piece in pieces.map(|piece| piece.within(from, to)) {
            let sectors = Unknown::of(piece.start - from..piece.end - from);
            match read::fill(slice::from_ref(&piece), from, &mut content) {
                Ok(()) => {}
                Err(ReadError::Unreadable { .. }) => unknown = unknown | sectors,
                Err(error) => {
                    batch.damaged(error)?;
                    unknown = unknown | sectors;
                }
            }
        }
        let missing: Vec<(u64, u64)> = overlaps(&self.rest, from, to).collect();
        if !missing.is_empty() {
            let (old, lost) = match base.block(self.volume, block) {
                Ok(old) => old,
                Err(error) => {
                    batch.damaged(error)?;
                    (vec![0; BLOCK], Unknown::ALL)
                }
            };
            for (start, end) in missing {
                let at = ((start - from) * SECTOR_BYTES) as usize;
                let till = ((end - from) * SECTOR_BYTES) as usize;
                content[at..till].copy_from_slice(&old[at..till]);
                unknown = unknown | (lost & Unknown::of(start - from..end - from));
            }
            redo.push(self.volume, block, &content, unknown)?;
        }
        Ok(match unknown {
            Unknown::NONE => NewContent::Data(content),
            Unknown::ALL => NewContent::Unreadable(1),
            _ => NewContent::Parts(content, unknown),
        })
    }
}

struct Batch {
    changes: Vec<Change>,
    bytes: usize,
    damage: Vec<String>,
}

impl Batch {
    /// Takes note of damage. Any other error may pass, and ends the fold.
    fn damaged(&mut self, error: ReadError) -> Result<(), ReadError> {
        let ReadError::Damaged(text) = error else { return Err(error) };
        self.name(text.text);
        Ok(())
    }

    fn name(&mut self, damage: String) {
        if self.damage.len() < DAMAGE_NAMED_MAX && !self.damage.contains(&damage) {
            self.damage.push(damage);
        }
    }

    fn push(&mut self, volume: VolumeId, first: u64, content: NewContent) {
        self.bytes += match &content {
            NewContent::Data(bytes) | NewContent::Parts(bytes, _) => bytes.len(),
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
        for change in std::mem::take(&mut self.changes) {
            self.apply_one(base, &change, at)?;
        }
        self.bytes = 0;
        Ok(())
    }

    fn apply_one(
        &mut self,
        base: &Base,
        change: &Change,
        at: &mut impl FnMut(Step) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut damage = Vec::new();
        base.apply(change, &mut damage)?;
        damage.into_iter().for_each(|damage| self.name(damage));
        at(Step::Applied)
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
