//! The segments of a spool: appended to, and removed from the front.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tidemark_journal::{
    GroupId, Position, Seq,
    segment::{BLOCK_BYTES, SegmentStart},
};
use tidemark_link::seam::AlignedBuf;

use super::media::{Media, MediaFile};
use crate::clock::wall_ns;

/// How large a spool and its segments may be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// All files together.
    pub bytes_max: u64,
    /// One file, unless a batch is longer. A multiple of 4096.
    pub segment_bytes: u64,
}

impl Limits {
    /// For a spool of so many bytes: sixteen segments, of 4 to 64 MiB each.
    pub fn of(bytes_max: u64) -> Limits {
        let segment_bytes = (bytes_max / 16).clamp(4 << 20, 64 << 20) / BLOCK_BYTES * BLOCK_BYTES;
        Limits { bytes_max, segment_bytes }
    }
}

/// Frames to be appended, and made durable at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Batch {
    /// The position before the first.
    pub before: Position,
    /// The last position.
    pub last: Position,
    /// Journal time of the first record.
    pub time_ns: u64,
}

/// A segment of which some frames count.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Segment {
    pub number: u64,
    /// The position before its first frame.
    pub before: Position,
    /// The position at its end: that of its last frame, or before the next segment's first.
    pub last: Position,
    /// Journal time of its first record.
    pub time_ns: u64,
    /// The byte after its last batch.
    pub end: u64,
    /// Bytes it takes.
    pub file_bytes: u64,
}

/// Why frames cannot be appended.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// The spool is as large as it may be.
    #[error("it is full")]
    Full,
    /// The disk refuses.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// What a spool holds durably, for all who ask.
pub struct Index {
    media: Arc<dyn Media>,
    segments: Mutex<VecDeque<Segment>>,
    bytes_max: u64,
}

impl Index {
    pub(super) fn new(
        media: Arc<dyn Media>,
        segments: VecDeque<Segment>,
        bytes_max: u64,
    ) -> Arc<Index> {
        Arc::new(Index { media, segments: Mutex::new(segments), bytes_max })
    }

    fn segments(&self) -> MutexGuard<'_, VecDeque<Segment>> {
        self.segments.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The position before the first frame, and the last position. None if there is no frame.
    pub fn ends(&self) -> Option<(Position, Position)> {
        let segments = self.segments();
        Some((segments.front()?.before, segments.back()?.last))
    }

    /// Bytes that its files take.
    pub fn bytes(&self) -> u64 {
        self.segments().iter().map(|segment| segment.file_bytes).sum()
    }

    /// The most that they may take.
    pub fn bytes_max(&self) -> u64 {
        self.bytes_max
    }

    /// Journal time of the first record of the segment with what follows `after`.
    pub fn time_after(&self, after: Seq) -> Option<u64> {
        self.find(after).map(|segment| segment.time_ns)
    }

    /// The segment with what follows `after`.
    pub(super) fn find(&self, after: Seq) -> Option<Segment> {
        self.segments().iter().find(|segment| segment.last.seq > after).copied()
    }

    /// The segment with this number.
    pub(super) fn get(&self, number: u64) -> Option<Segment> {
        self.segments().iter().find(|segment| segment.number == number).copied()
    }

    pub(super) fn media(&self) -> &Arc<dyn Media> {
        &self.media
    }
}

/// The writing end of a spool. Owned by one thread.
pub struct Store {
    group: GroupId,
    limits: Limits,
    index: Arc<Index>,
    /// The number of the next segment.
    next: u64,
    /// The last segment, unless it must not be written to any more.
    open: Option<Box<dyn MediaFile>>,
}

impl Store {
    /// Goes on with the segments of an index, and with this number.
    pub(super) fn new(group: GroupId, limits: Limits, index: Arc<Index>, next: u64) -> Store {
        Store { group, limits, index, next, open: None }
    }

    /// What it holds.
    pub fn index(&self) -> &Arc<Index> {
        &self.index
    }

    /// Appends `frames`, lying end to end, padded to whole blocks, and makes them durable. A segment
    /// in which something failed is not written to again (invariant 7): what it held before stays,
    /// and the next batch begins another.
    ///
    /// # Errors
    /// [`SpoolError`]. Nothing was added then.
    pub fn append(&mut self, batch: &Batch, frames: &AlignedBuf) -> Result<(), SpoolError> {
        let bytes = frames.len() as u64;
        let last = self.index.segments().back().copied();
        let room = |segment: &Segment| segment.end + bytes <= self.limits.segment_bytes;
        let at = match (&self.open, last.filter(room)) {
            (Some(_), Some(segment)) => segment.end,
            _ => self.begin(batch, bytes)?,
        };
        let Some(file) = &self.open else { return Err(SpoolError::Full) };
        if let Err(error) = file.write(at, frames.as_slice()).and_then(|()| file.sync()) {
            self.open = None;
            return Err(error.into());
        }
        let mut segments = self.index.segments();
        if at == BLOCK_BYTES {
            let number = self.next;
            self.next += 1;
            let file_bytes = self.limits.segment_bytes.max(BLOCK_BYTES + bytes);
            let Batch { before, last, time_ns } = *batch;
            let end = BLOCK_BYTES + bytes;
            segments.push_back(Segment { number, before, last, time_ns, end, file_bytes });
        } else if let Some(segment) = segments.back_mut() {
            (segment.end, segment.last) = (segment.end + bytes, batch.last);
        }
        Ok(())
    }

    /// Begins a segment; where its first batch goes.
    fn begin(&mut self, batch: &Batch, bytes: u64) -> Result<u64, SpoolError> {
        if let Some(file) = self.open.take()
            && let Some(segment) = self.index.segments().back_mut()
        {
            // It gives back what was set aside and not used. If it does not, it only takes more.
            if file.cut(segment.end).is_ok() {
                segment.file_bytes = segment.end;
            }
        }
        let file_bytes = self.limits.segment_bytes.max(BLOCK_BYTES + bytes);
        if self.index.bytes() + file_bytes > self.limits.bytes_max {
            return Err(SpoolError::Full);
        }
        let number = self.next;
        let start = SegmentStart {
            number,
            group: self.group,
            before: batch.before,
            created_ns: wall_ns(),
            chain_before: [0; 32],
        };
        let mut header = AlignedBuf::new(BLOCK_BYTES as usize);
        header.extend(&start.encode()).map_err(io::Error::other)?;
        let file = self.index.media.create(&name(number), file_bytes)?;
        // Made durable together with the batch.
        file.write(0, header.as_slice())?;
        self.open = Some(file);
        Ok(BLOCK_BYTES)
    }

    /// Everything up to `seq` is final-durable, and the state says so durably: segments that hold
    /// nothing else are removed.
    ///
    /// # Errors
    /// Those of the disk. The segment counts as removed all the same.
    pub fn forget(&mut self, seq: Seq) -> io::Result<()> {
        loop {
            let first = {
                let mut segments = self.index.segments();
                match segments.front() {
                    Some(first) if first.last.seq <= seq => {}
                    _ => return Ok(()),
                }
                if segments.len() == 1 {
                    self.open = None;
                }
                segments.pop_front()
            };
            if let Some(first) = first {
                self.index.media.remove(&name(first.number))?;
            }
        }
    }

    /// Removes everything, durably.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn clear(&mut self) -> io::Result<()> {
        self.open = None;
        self.index.segments().clear();
        for name in self.index.media.names()?.iter().filter(|name| number(name).is_some()) {
            self.index.media.remove(name)?;
        }
        self.index.media.sync()
    }
}

/// The file of a segment.
pub(super) fn name(number: u64) -> String {
    format!("{number:012}.seg")
}

/// The number of the segment in a file.
pub(super) fn number(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".seg").filter(|digits| digits.len() == 12)?;
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())?
}
