//! A log as its readers see it: segments, newest first, and how far it has come.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, RwLock,
        atomic::{AtomicU64, Ordering},
    },
};

use tidemark_journal::{FrameView, GroupId, Position};
use tokio::sync::watch;

use super::segment::{Caches, Segment};
use crate::machine::Machine;

/// How far a log has come.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Progress {
    /// The last position that can be read.
    pub written: Position,
    /// The last position that survives a power cut.
    pub durable: Position,
    /// Why nothing is being taken in at present, as a sentence.
    pub stalled: Option<Arc<str>>,
    /// Why nothing will be taken in until the log is opened anew, as a sentence.
    pub failed: Option<Arc<str>>,
}

/// A log's read side.
pub struct Journal {
    group: GroupId,
    dir: PathBuf,
    caches: Arc<Caches>,
    /// From the oldest to the newest.
    segments: RwLock<Arc<Vec<Arc<Segment>>>>,
    progress: watch::Sender<Progress>,
    /// Bytes of all segments: kept here so that the owner may ask before each frame.
    bytes: watch::Sender<u64>,
    /// Bytes of the frame that waits until history has left; zero when none does.
    wanted_bytes: AtomicU64,
}

/// What a log's owner tells of the frames it has stored.
pub trait Follower: Send + Sync + 'static {
    /// A frame that can be read from now on and, where each batch is synced, is durable.
    fn stored(&self, frame: &FrameView<'_>);

    /// The age counter of received history, nanoseconds.
    fn received_ns(&self) -> u64 {
        0
    }

    /// The log has become longer by a segment, or waits until history has left.
    fn pressed(&self) {}

    /// Whether the log may take room for another segment.
    ///
    /// # Errors
    /// That there is none to be had, and why.
    fn may_grow(&self) -> std::io::Result<()> {
        Ok(())
    }

    /// A segment has been sealed: its index is durable.
    ///
    /// # Errors
    /// When the catalogue cannot take it in; the segment is then found again by its trailer.
    fn sealed(
        &self,
        segment: &Segment,
        end: &tidemark_journal::segment::SegmentEnd,
    ) -> anyhow::Result<()>;
}

impl Journal {
    /// A log whose segments have been found.
    pub fn new(
        group: GroupId,
        dir: &Path,
        caches: &Arc<Caches>,
        segments: Vec<Arc<Segment>>,
        end: Position,
    ) -> Journal {
        let progress = Progress { written: end, durable: end, ..Progress::default() };
        let bytes = segments.iter().map(|segment| segment.summary().data_bytes).sum();
        Journal {
            group,
            dir: dir.to_owned(),
            caches: Arc::clone(caches),
            segments: RwLock::new(Arc::new(segments)),
            progress: watch::Sender::new(progress),
            bytes: watch::Sender::new(bytes),
            wanted_bytes: AtomicU64::new(0),
        }
    }

    /// The group whose frames it holds.
    pub fn group(&self) -> GroupId {
        self.group
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The caches its segments read through.
    pub fn caches(&self) -> &Arc<Caches> {
        &self.caches
    }

    /// The machine that it is kept on.
    pub fn machine(&self) -> &Machine {
        &self.caches.machine
    }

    /// The segments from the oldest to the newest, as they are now.
    pub fn segments(&self) -> Arc<Vec<Arc<Segment>>> {
        Arc::clone(&self.segments.read().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    /// How far it has come.
    pub fn progress(&self) -> Progress {
        self.progress.borrow().clone()
    }

    /// Follows how far it has come.
    pub fn watch(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// Bytes of all segments.
    pub fn bytes(&self) -> u64 {
        *self.bytes.borrow()
    }

    /// Bytes of the frame that waits until history has left; zero when none does.
    pub fn wanted_bytes(&self) -> u64 {
        self.wanted_bytes.load(Ordering::Relaxed)
    }

    /// Adds a segment at the end.
    pub fn push(&self, segment: Arc<Segment>) {
        self.grew(segment.summary().data_bytes);
        self.change(|segments| segments.push(segment));
    }

    /// Takes away the segments up to the one of this number, and returns them.
    pub fn remove_through(&self, number: u64) -> Vec<Arc<Segment>> {
        let mut removed = Vec::new();
        self.change(|segments| {
            let keep = segments.partition_point(|segment| segment.number() <= number);
            removed.extend(segments.drain(..keep));
        });
        let gone: u64 = removed.iter().map(|segment| segment.summary().data_bytes).sum();
        self.bytes.send_modify(|bytes| *bytes = bytes.saturating_sub(gone));
        removed
    }

    /// A segment has grown by so many bytes.
    pub(super) fn grew(&self, by: u64) {
        self.bytes.send_modify(|bytes| *bytes += by);
    }

    /// Follows its bytes.
    pub(super) fn watch_bytes(&self) -> watch::Receiver<u64> {
        self.bytes.subscribe()
    }

    /// A frame waits for so many bytes, or none does. Says whether that is news.
    pub(super) fn want(&self, bytes: u64) -> bool {
        self.wanted_bytes.swap(bytes, Ordering::Relaxed) != bytes
    }

    pub(super) fn advance(&self, change: impl FnOnce(&mut Progress)) {
        self.progress.send_if_modified(|progress| {
            let before = progress.clone();
            change(progress);
            *progress != before
        });
    }

    fn change(&self, change: impl FnOnce(&mut Vec<Arc<Segment>>)) {
        let mut guard = self.segments.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut segments = guard.to_vec();
        change(&mut segments);
        *guard = Arc::new(segments);
    }
}
