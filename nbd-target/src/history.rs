//! What the frames received say besides content: terms, gaps, marks, sizes.
//!
//! A history is a fold over the frames in their order, so what the catalogue keeps of it (up to the
//! end of a sealed segment) goes on with the frames after that.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tidemark_journal::{
    FrameView, GapReason, Kind, Position, Record, Seq, TermId, VolumeId, record::MARK_ID_BYTES,
};
use tidemark_link::message::VolumeHello;

use crate::bounds::{SECTORS_MAX, at_most};

/// The most unreadable ranges that are listed of a volume; more are counted only by the data.
const UNREADABLE_LISTED_MAX: usize = 1000;

/// What is known of a group's order.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct History {
    /// Its volumes, gone ones too while points hold them.
    pub volumes: Vec<Volume>,
    /// Named points, in order. There may be very many: copies of a history share them, and the catalogue keeps each in a
    /// row of its own.
    #[serde(skip)]
    pub marks: Arc<Vec<Mark>>,
    /// Which term's records begin where, in order.
    pub terms: Vec<TermStart>,
    /// The last position taken in.
    pub end: Position,
    /// The wall clock of the last record taken in, nanoseconds since 1970.
    pub end_wall_ns: i64,
    /// The oldest position that is offered; the records up to it are in the base or may be.
    pub oldest: Seq,
    /// The wall clock at the oldest position.
    pub oldest_wall_ns: i64,
    /// Stretches that were acknowledged and have been lost here.
    #[serde(default)]
    pub lost: Vec<Lost>,
    /// The last sequence before some that never came, or were lost here, while the gaps are taken in
    /// with which the source went on after them: they begin where the missing ones do, since nothing
    /// is known of what those held.
    #[serde(default)]
    pub skipped: Option<Seq>,
}

/// A stretch that was acknowledged and has been lost here: the source has not sent it again.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Lost {
    /// The position before it.
    pub after: Seq,
    /// Its last position.
    pub to: Seq,
    /// How it was lost, as a sentence.
    pub why: String,
}

/// A term's first sequence in the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TermStart {
    /// The term.
    pub term: TermId,
    /// Its first record's sequence.
    pub first: Seq,
}

/// A volume and what happened to it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Volume {
    /// Its number in the group.
    pub id: VolumeId,
    /// Its name.
    pub name: String,
    /// Bytes of a logical block at the source.
    pub logical_block_bytes: u32,
    /// Bytes of a physical block at the source.
    pub physical_block_bytes: u32,
    /// Its sizes in sectors, each from a sequence on, in order; at least one.
    pub sizes: Vec<Size>,
    /// The group's position when it was first announced.
    pub added: Seq,
    /// The group's position when it was no longer announced.
    pub removed: Option<Seq>,
    /// Its gaps in order. It begins with one: nothing of it is here yet.
    pub gaps: Vec<Gap>,
    /// Ranges the source could not read.
    pub unreadable: Vec<Unreadable>,
}

/// A size from a sequence on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Size {
    /// From here on.
    pub from: Seq,
    /// Sectors.
    #[serde(deserialize_with = "at_most::<SECTORS_MAX, _>")]
    pub sectors: u64,
}

/// A stretch of the order in which a volume cannot be recovered: from `begin`, up to and without
/// `end`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Gap {
    /// The gap-begin's sequence.
    pub begin: Seq,
    /// The gap-end's sequence; none while it is open.
    pub end: Option<Seq>,
    /// Number of a [`GapReason`].
    pub reason: u8,
}

impl Gap {
    /// Whether a position lies in it.
    pub fn contains(&self, at: Seq) -> bool {
        self.begin <= at && self.end.is_none_or(|end| at < end)
    }

    /// Why it began, as a clause.
    pub fn describe(&self) -> &'static str {
        GapReason::from_u8(self.reason).map_or("for an unknown reason", GapReason::describe)
    }
}

/// A named point.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Mark {
    /// The mark's sequence: the point is the state there.
    pub seq: Seq,
    /// Its name.
    pub name: String,
    /// The source's wall clock, nanoseconds since 1970.
    pub wall_ns: i64,
}

/// A range that the source could not read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Unreadable {
    /// From this sequence on.
    pub seq: Seq,
    /// First sector.
    #[serde(deserialize_with = "at_most::<SECTORS_MAX, _>")]
    pub start: u64,
    /// Sectors.
    pub sectors: u32,
}

impl Volume {
    /// Its size in sectors at a position.
    pub fn sectors_at(&self, at: Seq) -> u64 {
        let index = self.sizes.partition_point(|size| size.from <= at).saturating_sub(1);
        self.sizes.get(index).map_or(0, |size| size.sectors)
    }

    /// Its newest size in sectors.
    pub fn sectors(&self) -> u64 {
        self.sizes.last().map_or(0, |size| size.sectors)
    }

    /// Whether it was part of the group at a position.
    pub fn present_at(&self, at: Seq) -> bool {
        self.added <= at && self.removed.is_none_or(|removed| at < removed)
    }

    /// The gap that a position lies in.
    pub fn gap_at(&self, at: Seq) -> Option<&Gap> {
        let index = self.gaps.partition_point(|gap| gap.begin <= at).checked_sub(1)?;
        self.gaps.get(index).filter(|gap| gap.contains(at))
    }

    /// The gap that is open now.
    pub fn open_gap(&self) -> Option<&Gap> {
        self.gaps.last().filter(|gap| gap.end.is_none())
    }
}

impl History {
    /// Takes a greeting's volumes in: new ones begin with a gap, missing ones end here. Says
    /// whether anything changed.
    pub fn announce(&mut self, volumes: &[VolumeHello]) -> bool {
        let before = self.clone();
        let at = self.end.seq;
        for volume in &mut self.volumes {
            let announced = volumes.iter().any(|hello| hello.id == volume.id);
            match (announced, volume.removed) {
                (false, None) => volume.removed = Some(at.next()),
                (true, Some(_)) => {
                    // It comes back as if new: what happened in between is unknown.
                    volume.removed = None;
                    if volume.open_gap().is_none() {
                        let reason = GapReason::Doubt as u8;
                        volume.gaps.push(Gap { begin: at.next(), end: None, reason });
                    }
                }
                _ => {}
            }
        }
        for hello in volumes {
            match self.volumes.iter_mut().find(|volume| volume.id == hello.id) {
                Some(volume) => {
                    volume.name.clone_from(&hello.name);
                    volume.logical_block_bytes = hello.logical_block_bytes;
                    volume.physical_block_bytes = hello.physical_block_bytes;
                }
                None => {
                    // The present position stays good without it.
                    let added = if at == Seq::ZERO { at } else { at.next() };
                    self.volumes.push(Volume {
                        id: hello.id,
                        name: hello.name.clone(),
                        logical_block_bytes: hello.logical_block_bytes,
                        physical_block_bytes: hello.physical_block_bytes,
                        sizes: vec![Size { from: Seq::ZERO, sectors: hello.sectors }],
                        added,
                        removed: None,
                        gaps: vec![Gap {
                            begin: added,
                            end: None,
                            reason: GapReason::FirstSync as u8,
                        }],
                        unreadable: Vec::new(),
                    });
                }
            }
        }
        *self != before
    }

    /// Takes a frame in, unless it is part of the history already.
    pub fn extend(&mut self, frame: &FrameView<'_>) {
        let header = frame.header();
        let last = header.last();
        if last.seq <= self.end.seq {
            return;
        }
        let first = Seq(header.first_seq.get());
        // A term that was begun after the loss begins above it; so this is what was lost.
        for lost in self.lost.iter_mut().filter(|lost| lost.after < first && first <= lost.to) {
            lost.after = last.seq;
        }
        self.lost.retain(|lost| lost.after < lost.to);
        if header.before().seq > self.end.seq {
            self.skipped = Some(self.end.seq);
        }
        if self.terms.last().is_none_or(|start| start.term != last.term) {
            self.terms.push(TermStart { term: last.term, first });
        }
        for (index, record) in frame.records().enumerate() {
            if record.kind != Kind::GapBegin {
                self.skipped = None;
            }
            match record.kind {
                Kind::GapBegin | Kind::GapEnd | Kind::Resize | Kind::Unreadable => {
                    self.extend_volume(&record);
                }
                Kind::Mark => {
                    let wall_ns = frame.wall_ns(&record);
                    if let Ok(payload) = frame.payload(index) {
                        let name = payload.get(MARK_ID_BYTES..).unwrap_or_default();
                        // A source says no other; it shall not reach terminals if one does.
                        let plain = |c: char| if c.is_control() { '\u{fffd}' } else { c };
                        let name = String::from_utf8_lossy(name).chars().map(plain).collect();
                        let mark = Mark { seq: record.seq, name, wall_ns };
                        Arc::make_mut(&mut self.marks).push(mark);
                    }
                }
                _ => {}
            }
            self.end_wall_ns = frame.wall_ns(&record);
        }
        self.end = last;
    }

    fn extend_volume(&mut self, record: &Record) {
        let Some(volume) = self.volumes.iter_mut().find(|volume| volume.id == record.volume) else {
            return;
        };
        match record.kind {
            Kind::GapBegin if volume.open_gap().is_none() => {
                let begin = self.skipped.map_or(record.seq, Seq::next);
                volume.gaps.push(Gap { begin, end: None, reason: record.flags });
            }
            Kind::GapEnd => {
                if let Some(gap) = volume.gaps.last_mut().filter(|gap| gap.end.is_none()) {
                    gap.end = Some(record.seq);
                }
            }
            Kind::Resize => {
                volume.sizes.push(Size { from: record.seq, sectors: record.start.0 });
            }
            Kind::Unreadable if volume.unreadable.len() < UNREADABLE_LISTED_MAX => {
                volume.unreadable.push(Unreadable {
                    seq: record.seq,
                    start: record.start.0,
                    sectors: record.sectors,
                });
            }
            _ => {}
        }
    }

    /// Forgets what lies above a position, because the records after it are lost.
    pub fn truncate(&mut self, end: Position, wall_ns: i64) {
        self.end = end;
        self.end_wall_ns = wall_ns;
        self.retain_marks(|mark| mark.seq <= end.seq);
        self.terms.retain(|start| start.first <= end.seq);
        for volume in &mut self.volumes {
            volume.gaps.retain(|gap| gap.begin <= end.seq.next());
            if let Some(gap) = volume.gaps.last_mut() {
                gap.end = gap.end.filter(|gap_end| *gap_end <= end.seq);
            }
            let first = volume.sizes.first().copied();
            volume.sizes.retain(|size| size.from <= end.seq);
            if volume.sizes.is_empty() {
                volume.sizes.extend(first);
            }
            volume.unreadable.retain(|range| range.seq <= end.seq);
        }
    }

    fn retain_marks(&mut self, stays: impl Fn(&Mark) -> bool) {
        if !self.marks.iter().all(&stays) {
            Arc::make_mut(&mut self.marks).retain(stays);
        }
    }

    /// Remembers that what followed the end, up to a position, is lost.
    pub fn lose(&mut self, to: Seq, why: String) {
        let after = self.end.seq;
        // One that begins above the end is part of it.
        let earlier = self.lost.iter().filter(|lost| lost.after >= after).map(|lost| lost.to);
        let to = earlier.max().map_or(to, |earlier| earlier.max(to));
        self.lost.retain(|lost| lost.after < after);
        if after < to {
            self.lost.push(Lost { after, to, why });
        }
    }

    /// The lost stretch that a position lies in.
    pub fn lost_at(&self, at: Seq) -> Option<&Lost> {
        self.lost.iter().find(|lost| lost.after < at && at <= lost.to)
    }

    /// Raises the oldest position offered and forgets what lies below it.
    pub fn raise_oldest(&mut self, oldest: Seq, wall_ns: i64) {
        if oldest <= self.oldest {
            return;
        }
        self.oldest = oldest;
        self.oldest_wall_ns = wall_ns;
        self.retain_marks(|mark| mark.seq >= oldest);
        self.lost.retain(|lost| lost.to > oldest);
        let keep = self.terms.partition_point(|start| start.first <= oldest).saturating_sub(1);
        self.terms.drain(..keep);
        for volume in &mut self.volumes {
            volume.gaps.retain(|gap| gap.end.is_none_or(|end| end > oldest));
            let keep = volume.sizes.partition_point(|size| size.from <= oldest).saturating_sub(1);
            volume.sizes.drain(..keep);
        }
        self.volumes.retain(|volume| volume.removed.is_none_or(|removed| removed > oldest));
    }

    /// The volume of this name that a position may be asked of: the present one before gone ones.
    pub fn volume(&self, name: &str) -> Option<&Volume> {
        let named = || self.volumes.iter().filter(|volume| volume.name == name);
        named().find(|volume| volume.removed.is_none()).or_else(|| named().next_back())
    }

    /// The full position of a sequence of this log.
    pub fn position(&self, seq: Seq) -> Position {
        let index = self.terms.partition_point(|start| start.first <= seq).saturating_sub(1);
        let term = self.terms.get(index).map_or(self.end.term, |start| start.term);
        Position { term, seq }
    }
}

#[cfg(test)]
mod tests;
