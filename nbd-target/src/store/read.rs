//! Reading a range at a position: the newest version of each sector, from the newest source to the
//! oldest until the range is covered.

use std::{collections::BTreeMap, sync::Arc};

use tidemark_journal::{SECTOR_BYTES, Seq};

use super::{
    Damage, ReadError, Where,
    index::{Content, Key, Query},
    segment::Segment,
};

/// The most uncovered parts of a range of which a plan of its beginning asks a source: what bounds the
/// searches, each of which is a few seeks in every index.
const PARTS_MAX: usize = 64;

/// What a part of a range reads as, and from where.
#[derive(Clone)]
pub struct Piece {
    /// First sector.
    pub start: u64,
    /// The sector after the last.
    pub end: u64,
    /// The content.
    pub content: PieceContent,
}

/// The content of a [`Piece`].
#[derive(Clone)]
pub enum PieceContent {
    /// Bytes of a chunk, from `offset` on.
    Data {
        /// The segment.
        segment: Arc<Segment>,
        /// The chunk.
        chunk: u32,
        /// First byte in the chunk's raw content.
        offset: u32,
    },
    /// Zeros.
    Zero,
    /// Unknown at the source.
    Unreadable,
}

impl Piece {
    /// The part of it inside `start..end`, which it overlaps.
    pub fn within(&self, start: u64, end: u64) -> Piece {
        let (from, to) = (self.start.max(start), self.end.min(end));
        let mut content = self.content.clone();
        if let PieceContent::Data { offset, .. } = &mut content {
            *offset += ((from - self.start) * SECTOR_BYTES) as u32;
        }
        Piece { start: from, end: to, content }
    }
}

/// The plan of a read: what was found, and what no source so far knows of.
pub struct Plan {
    query: Query,
    pieces: Vec<Piece>,
    /// Disjoint ranges: the sector after the last by the first.
    uncovered: BTreeMap<u64, u64>,
    /// The most uncovered ranges that a source is asked about.
    parts_max: usize,
}

impl Plan {
    /// A plan that has not asked anybody yet.
    pub fn new(query: Query) -> Plan {
        let uncovered = Some((query.start, query.end)).filter(|(start, end)| start < end);
        let uncovered = uncovered.into_iter().collect();
        Plan { query, pieces: Vec::new(), uncovered, parts_max: usize::MAX }
    }

    /// The same of the range's beginning alone, as far as a bounded number of searches leads.
    pub fn of_beginning(query: Query) -> Plan {
        Plan { parts_max: PARTS_MAX, ..Plan::new(query) }
    }

    /// Asks sources from the newest to the oldest for their newest version at or below `at`, until
    /// everything is covered.
    ///
    /// # Errors
    /// When a source's index cannot be read.
    pub fn ask<'s>(
        &mut self,
        sources: impl IntoIterator<Item = &'s Arc<Segment>>,
        at: Seq,
    ) -> Result<(), ReadError> {
        let mut found: Vec<(Key, Content)> = Vec::new();
        for source in sources {
            if self.uncovered.is_empty() {
                break;
            }
            self.narrow();
            found.clear();
            for (start, end) in &self.uncovered {
                let query = Query { start: *start, end: *end, at, ..self.query };
                source.find(&query, |key, content| found.push((key, content)))?;
            }
            found.sort_unstable_by_key(|(key, _)| std::cmp::Reverse(key.seq));
            for (key, content) in &found {
                self.paint(key, content, source);
            }
        }
        Ok(())
    }

    /// What was found, and what is still unknown: both sorted by place.
    pub fn into_pieces(mut self) -> (Vec<Piece>, Vec<(u64, u64)>) {
        self.narrow();
        self.pieces.retain(|piece| piece.start < self.query.end);
        self.pieces.sort_unstable_by_key(|piece| piece.start);
        (self.pieces, self.uncovered.into_iter().collect())
    }

    /// Has the range end before the uncovered ranges that are too many.
    fn narrow(&mut self) {
        if self.uncovered.len() > self.parts_max
            && let Some(end) = self.uncovered.keys().nth(self.parts_max).copied()
        {
            self.uncovered.split_off(&end);
            self.query.end = end;
        }
    }

    fn paint(&mut self, key: &Key, content: &Content, segment: &Arc<Segment>) {
        let (start, end) = (key.start.0, key.end());
        // From the last range that the extent reaches down to the first.
        while let Some((&from, &to)) = self.uncovered.range(..end).next_back()
            && to > start
        {
            let (begin, stop) = (from.max(start), to.min(end));
            let content = match *content {
                Content::Data { chunk, offset } => PieceContent::Data {
                    segment: Arc::clone(segment),
                    chunk,
                    offset: offset + ((begin - start) * SECTOR_BYTES) as u32,
                },
                Content::Zero => PieceContent::Zero,
                Content::Unreadable => PieceContent::Unreadable,
            };
            self.pieces.push(Piece { start: begin, end: stop, content });
            self.uncovered.remove(&from);
            let left = [(from, begin), (stop, to)].into_iter().filter(|(from, to)| from < to);
            self.uncovered.extend(left);
        }
    }
}

/// Copies the pieces into `out`, whose first byte is that of sector `start`. Each chunk is unpacked
/// once; zeros are left as they are, so `out` comes zeroed.
///
/// # Errors
/// When a chunk cannot be read or is damaged, or the source could not read its disk.
pub fn fill(pieces: &[Piece], start: u64, out: &mut [u8]) -> Result<(), ReadError> {
    let mut last: Option<(u64, u32, Arc<Vec<u8>>)> = None;
    let mut order: Vec<&Piece> = pieces.iter().collect();
    order.sort_by_key(|piece| match &piece.content {
        PieceContent::Data { segment, chunk, .. } => (segment.id(), *chunk),
        _ => (0, 0),
    });
    for piece in order {
        match &piece.content {
            PieceContent::Zero => {}
            PieceContent::Unreadable => {
                return Err(ReadError::Unreadable { start: piece.start, end: piece.end });
            }
            PieceContent::Data { segment, chunk, offset } => {
                let raw = match &last {
                    Some((id, number, raw)) if (*id, *number) == (segment.id(), *chunk) => {
                        Arc::clone(raw)
                    }
                    _ => segment.chunk(*chunk)?,
                };
                let bytes = ((piece.end - piece.start) * SECTOR_BYTES) as usize;
                let from = *offset as usize;
                let at = ((piece.start - start) * SECTOR_BYTES) as usize;
                let (Some(source), Some(target)) =
                    (raw.get(from..from + bytes), out.get_mut(at..at + bytes))
                else {
                    let place = Where::Segment { id: segment.id(), chunk: None };
                    let number = segment.number();
                    let text =
                        format!("the index of segment {number} points outside chunk {chunk}");
                    return Err(ReadError::Damaged(Damage::at(place, text)));
                };
                target.copy_from_slice(source);
                last = Some((segment.id(), *chunk, raw));
            }
        }
    }
    Ok(())
}
