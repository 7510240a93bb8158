//! Reading a range at a position: the newest version of each sector, from the newest source to the
//! oldest until the range is covered.

use std::sync::Arc;

use tidemark_journal::{SECTOR_BYTES, Seq};

use super::{
    Damage, ReadError, Where,
    index::{Content, Key, Query},
    segment::Segment,
};

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
    /// Sorted and disjoint.
    uncovered: Vec<(u64, u64)>,
}

impl Plan {
    /// A plan that has not asked anybody yet.
    pub fn new(query: Query) -> Plan {
        let uncovered =
            if query.start < query.end { vec![(query.start, query.end)] } else { Vec::new() };
        Plan { query, pieces: Vec::new(), uncovered }
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

    /// What is still unknown: sorted, disjoint ranges.
    pub fn uncovered(&self) -> &[(u64, u64)] {
        &self.uncovered
    }

    /// What was found, sorted by place.
    pub fn into_pieces(mut self) -> (Vec<Piece>, Vec<(u64, u64)>) {
        self.pieces.sort_unstable_by_key(|piece| piece.start);
        (self.pieces, self.uncovered)
    }

    fn paint(&mut self, key: &Key, content: &Content, segment: &Arc<Segment>) {
        let (start, end) = (key.start.0, key.end());
        let from = self.uncovered.partition_point(|(_, e)| *e <= start);
        let to = self.uncovered.partition_point(|(s, _)| *s < end);
        if from >= to {
            return;
        }
        let mut left = Vec::new();
        for (s, e) in &self.uncovered[from..to] {
            let (begin, stop) = ((*s).max(start), (*e).min(end));
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
            left.extend([(*s, begin), (stop, *e)].into_iter().filter(|(s, e)| s < e));
        }
        self.uncovered.splice(from..to, left);
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
