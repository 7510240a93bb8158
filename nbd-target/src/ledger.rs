//! What a replica knows of its history, kept in the catalogue.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard},
    time::Duration,
};

use tidemark_journal::{FrameView, segment::SegmentEnd};
use tidemark_link::message::Heartbeat;
use tokio::{sync::Notify, time::Instant};

use crate::{
    catalogue::{Catalogue, HistoryRow, Vitals},
    history::History,
    store::{journal::Follower, segment::Segment},
};

/// The longest silence that still counts as received history.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// A group's history and vitals.
pub struct Ledger {
    name: String,
    catalogue: Arc<Catalogue>,
    row: RwLock<HistoryRow>,
    vitals: Mutex<Beat>,
    /// Held from the copy of the row until the catalogue has it, so that it never goes back.
    keeping: Mutex<()>,
    /// Told when the window should be looked at before its time.
    attention: Arc<Notify>,
}

struct Beat {
    vitals: Vitals,
    kept: Vitals,
    last: Option<Instant>,
}

impl Ledger {
    /// The ledger of a group, as the catalogue has it. `attention` is told when the group's window
    /// should be looked at.
    ///
    /// # Errors
    /// When the catalogue cannot be read.
    pub fn open(
        name: &str,
        catalogue: &Arc<Catalogue>,
        attention: &Arc<Notify>,
    ) -> anyhow::Result<Ledger> {
        let vitals = catalogue.vitals(name)?;
        Ok(Ledger {
            name: name.to_owned(),
            catalogue: Arc::clone(catalogue),
            row: RwLock::new(catalogue.history(name)?),
            vitals: Mutex::new(Beat { vitals, kept: vitals, last: None }),
            keeping: Mutex::default(),
            attention: Arc::clone(attention),
        })
    }

    /// What is known, under a lock: be brief.
    pub fn row(&self) -> RwLockReadGuard<'_, HistoryRow> {
        self.row.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the history, under a lock: be brief.
    pub fn history<T>(&self, look: impl FnOnce(&History) -> T) -> T {
        look(&self.row().history)
    }

    /// Changes what is known, in memory.
    pub fn change<T>(&self, change: impl FnOnce(&mut HistoryRow) -> T) -> T {
        change(&mut self.row.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// What changes all the time.
    pub fn vitals(&self) -> Vitals {
        self.beat().vitals
    }

    /// Begins to count received history from now on, as a session begins.
    pub fn begin(&self) {
        self.beat().last = Some(Instant::now());
    }

    /// Takes a heartbeat in: the source lives, vouches, and says how new its dirty map is.
    pub fn heard(&self, heartbeat: &Heartbeat) {
        let mut beat = self.beat();
        beat.count();
        let vitals = &mut beat.vitals;
        vitals.map_generation = vitals.map_generation.max(heartbeat.map_generation);
        if heartbeat.vouched.seq >= vitals.vouched.seq {
            vitals.vouched = heartbeat.vouched;
            vitals.vouched_wall_ns = heartbeat.wall_ns;
        }
    }

    /// Counts time in which it was this side that did not listen: a source that is there and is kept
    /// waiting cannot be heard, and history must grow old nevertheless, or nothing would ever leave.
    pub fn waited(&self) {
        self.beat().count();
    }

    /// Keeps the vitals in the catalogue if they have changed.
    ///
    /// # Errors
    /// When the catalogue cannot be written.
    pub fn keep_vitals(&self) -> anyhow::Result<()> {
        let vitals = {
            let beat = self.beat();
            if beat.vitals == beat.kept {
                return Ok(());
            }
            beat.vitals
        };
        self.catalogue.put_vitals(&self.name, &vitals)?;
        self.beat().kept = vitals;
        Ok(())
    }

    /// Keeps the history in the catalogue.
    ///
    /// # Errors
    /// When the catalogue cannot be written.
    pub fn keep_history(&self) -> anyhow::Result<()> {
        self.keep(|row| self.catalogue.put_history(&self.name, row))
    }

    /// Keeps the row as it is now by `put`, one at a time.
    ///
    /// # Errors
    /// Those of `put`.
    pub fn keep(&self, put: impl FnOnce(&HistoryRow) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let _keeping = self.keeping.lock().unwrap_or_else(PoisonError::into_inner);
        let row = self.row().clone();
        put(&row)
    }

    fn beat(&self) -> MutexGuard<'_, Beat> {
        self.vitals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Beat {
    fn count(&mut self) {
        let now = Instant::now();
        let since = self.last.replace(now).map_or(Duration::ZERO, |last| now - last);
        let since = since.min(SILENCE_MAX).as_nanos();
        self.vitals.received_ns += u64::try_from(since).unwrap_or(u64::MAX);
    }
}

impl Follower for Ledger {
    fn stored(&self, frame: &FrameView<'_>) {
        self.change(|row| row.history.extend(frame));
        let mut beat = self.beat();
        if beat.last.is_some() {
            beat.count();
        }
        if frame.header().last().seq > beat.vitals.acked.seq {
            beat.vitals.acked = frame.header().last();
        }
    }

    fn received_ns(&self) -> u64 {
        let mut beat = self.beat();
        if beat.last.is_some() {
            // What is asked about came now: the silence before it is not its age.
            beat.count();
        }
        beat.vitals.received_ns
    }

    fn pressed(&self) {
        self.attention.notify_one();
    }

    fn may_grow(&self) -> std::io::Result<()> {
        self.catalogue.reserve().check()
    }

    fn sealed(&self, segment: &Segment, end: &SegmentEnd) -> anyhow::Result<()> {
        self.attention.notify_one();
        let put = |row: &HistoryRow| {
            self.catalogue.put_segment(&self.name, segment, end.index_at, end.chain, Some(row))
        };
        self.keep(put)
    }
}
