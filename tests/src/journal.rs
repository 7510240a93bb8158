//! A target's log, read as files, past all of the target's own code.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use tidemark_journal::segment::{BLOCK_BYTES, SegmentEnd, frames};
use tidemark_journal::{GapReason, Kind, Position, Record, SECTOR_BYTES, Seq, TermId};

use crate::workload::{Action, content, order};

/// A record and what it carries.
#[derive(Clone, Debug)]
pub struct Logged {
    /// The term of its frame.
    pub term: TermId,
    /// The record.
    pub record: Record,
    /// Its payload; empty if it has none.
    pub payload: Vec<u8>,
}

/// Hands every record in the log directory to `take`, in the log's order, and proves meanwhile that segments
/// follow one another, that each frame continues the one before or opens a new term, and that sequences grow.
pub fn walk(log_dir: &Path, mut take: impl FnMut(Logged) -> Result<()>) -> Result<()> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(log_dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "seg") {
            paths.push(path);
        }
    }
    paths.sort();
    let mut before: Option<Position> = None;
    for path in paths {
        let bytes = std::fs::read(&path)?;
        let trailer = bytes.len().saturating_sub(usize::try_from(BLOCK_BYTES)?);
        let end = match SegmentEnd::decode(&bytes[trailer..]) {
            Ok(sealed) => usize::try_from(sealed.index_at)?,
            Err(_) => bytes.len(),
        };
        for (at, frame) in frames(&bytes[..end]) {
            let place = || format!("{} at byte {at}", path.display());
            let frame = frame.with_context(place)?;
            let (first, last) = (frame.header().before(), frame.header().last());
            if let Some(before) = before {
                let opens = last.term != before.term && first.seq >= before.seq;
                ensure!(first == before || opens, "{}: {first} does not follow {before}", place());
            }
            for (index, record) in frame.records().enumerate() {
                let payload = frame.payload(index).with_context(place)?;
                take(Logged { term: last.term, record, payload })?;
            }
            before = Some(last);
        }
    }
    Ok(())
}

/// The records of a load, those after `after`, with the sequence of each: writes (whose content is proved to
/// be that of the write they name), zeroes, discards and flushes. Volumes are the load's disks by number.
/// Marks, and sequences that were given up, are left out; anything else is an error.
pub fn of_load(log_dir: &Path, after: Seq) -> Result<Vec<(Seq, order::Record)>> {
    let mut records = Vec::new();
    let mut expected = Vec::new();
    walk(log_dir, |Logged { record, payload, .. }| {
        if record.seq <= after || matches!(record.kind, Kind::Mark | Kind::Void) {
            return Ok(());
        }
        let offset_bytes = record.start.0 * SECTOR_BYTES;
        let length_bytes = u64::from(record.sectors) * SECTOR_BYTES;
        let (action, number) = match record.kind {
            Kind::Write => {
                let number = content::number(&payload);
                expected.resize(payload.len(), 0);
                content::fill(number.unwrap_or_default(), offset_bytes, &mut expected);
                ensure!(payload == expected, "the content of {record:?} is not write {number:?}'s");
                (Action::Write { offset_bytes, length_bytes }, number)
            }
            Kind::Zero => (Action::Zero { offset_bytes, length_bytes }, None),
            Kind::Discard => (Action::Discard { offset_bytes, length_bytes }, None),
            Kind::Flush => (Action::Flush, None),
            _ => anyhow::bail!("{record:?} is of no load"),
        };
        let disk = usize::from(record.volume.0);
        records.push((record.seq, order::Record { disk, action, number }));
        Ok(())
    })?;
    Ok(records)
}

/// The gaps of so many volumes, of each in order.
pub fn gaps(log_dir: &Path, volumes: usize) -> Result<Vec<Vec<Gap>>> {
    let mut gaps = vec![Vec::new(); volumes];
    walk(log_dir, |logged| note_gap(&mut gaps, &logged.record))?;
    Ok(gaps)
}

fn note_gap(gaps: &mut [Vec<Gap>], record: &Record) -> Result<()> {
    let gaps = gaps.get_mut(usize::from(record.volume.0)).context("an unknown volume")?;
    match record.kind {
        Kind::GapBegin => {
            let reason = GapReason::from_u8(record.flags).context("a gap without a reason")?;
            // Another one inside a gap goes on with it.
            if gaps.last().is_none_or(|gap| gap.end.is_some()) {
                gaps.push(Gap { reason, begin: record.seq, end: None });
            }
        }
        Kind::GapEnd => gaps.last_mut().context("no gap to end")?.end = Some(record.seq),
        _ => {}
    }
    Ok(())
}

/// What the volumes hold as the log says, record by record. All begins as zeros.
pub struct Replay {
    records: std::vec::IntoIter<Logged>,
    next: Option<Logged>,
    contents: Vec<Vec<u8>>,
    gaps: Vec<Vec<Gap>>,
}

/// A gap of a volume: from the sequence of its begin up to, without it, that of its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// Why it began.
    pub reason: GapReason,
    /// Where.
    pub begin: Seq,
    /// None: it is still open.
    pub end: Option<Seq>,
}

impl Replay {
    /// Reads a log of volumes of these sizes, with numbers from 0 on. It is all held in memory.
    pub fn read(log_dir: &Path, sizes_bytes: &[u64]) -> Result<Replay> {
        let mut gaps: Vec<Vec<Gap>> = vec![Vec::new(); sizes_bytes.len()];
        let mut records = Vec::new();
        walk(log_dir, |logged| {
            note_gap(&mut gaps, &logged.record)?;
            records.push(logged);
            Ok(())
        })?;
        let mut records = records.into_iter();
        let next = records.next();
        let contents = sizes_bytes.iter().map(|size| vec![0; *size as usize]).collect();
        Ok(Replay { records, next, contents, gaps })
    }

    /// The gaps of a volume, in order.
    pub fn gaps(&self, volume: usize) -> &[Gap] {
        &self.gaps[volume]
    }

    /// Whether a volume is inside a gap at a position. Before its first gap, the first sync, nothing of it is known,
    /// which is no better: other volumes' gaps may begin some sequences earlier.
    pub fn in_gap(&self, volume: usize, at: Seq) -> bool {
        let gaps = &self.gaps[volume];
        let holds = |gap: &Gap| gap.begin <= at && gap.end.is_none_or(|end| at < end);
        gaps.first().is_some_and(|first| at < first.begin) || gaps.iter().any(holds)
    }

    /// Goes on to a position, which is not before the last one, and gives the volumes' contents there.
    pub fn advance(&mut self, to: Seq) -> Result<&[Vec<u8>]> {
        while let Some(Logged { record, payload, .. }) =
            self.next.take_if(|logged| logged.record.seq <= to)
        {
            self.next = self.records.next();
            if !record.kind.changes_content() {
                continue;
            }
            let content = self.contents.get_mut(usize::from(record.volume.0));
            let start = usize::try_from(record.start.bytes())?;
            let end = usize::try_from(record.end().bytes())?;
            let range = content.and_then(|content| content.get_mut(start..end));
            let range = range.with_context(|| format!("{record:?} is beyond its volume"))?;
            if payload.is_empty() {
                range.fill(0);
            } else {
                range.copy_from_slice(&payload);
            }
        }
        Ok(&self.contents)
    }
}
