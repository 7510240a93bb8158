//! Branches: writable children of a point, each with a log of its own.
//!
//! A branch is a term whose parent is the point's. What is written into it is journaled like
//! everything else; a read asks the branch's log, then the replica at the point. It pins the point.

pub mod registry;
mod writing;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError, RwLock, RwLockReadGuard,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use tidemark_journal::{FrameView, Position, SECTOR_BYTES, Seq, VolumeId, segment::SegmentEnd};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

use crate::{
    catalogue::{BranchRow, Catalogue, Vitals},
    config::StoreConfig,
    damage::{Damages, Place},
    pins::PinGuard,
    points::{Spec, resolve::resolve},
    replica::{Replica, log_options},
    store::{
        ReadError,
        base::Stretch,
        index::{Content as Indexed, Query},
        journal::{Follower, Journal},
        log::{self, LogWriter, Owner},
        read::{PieceContent, Plan},
        recover::{self, Expected},
        segment::{Caches, Segment},
    },
};
pub use writing::{Change, Content, WriteError};

/// Changes waiting to be written.
const QUEUE_MAX: usize = 1024;
/// A position that is above all there are.
const NEWEST: Seq = Seq(u64::MAX);

/// A writable child of a point.
pub struct Branch {
    name: String,
    row: BranchRow,
    parent: Arc<Replica>,
    writer: LogWriter,
    queue: mpsc::Sender<writing::Request>,
    clients: AtomicU32,
    /// When the last client left, or the branch was opened.
    left: Mutex<Instant>,
    /// Up to where the catalogue knows it to be durable.
    kept: Mutex<Position>,
    damages: Damages,
    /// Whether its rows and files are there and its own still. Held by who writes any of them.
    there: RwLock<bool>,
    pin: Arc<PinGuard>,
}

/// One open export's hold on a branch.
pub struct ClientGuard(Arc<Branch>);

impl Branch {
    /// Opens a branch that the catalogue knows and whose point is pinned: its log is recovered. The
    /// log's owner and the writing task are to be run.
    ///
    /// # Errors
    /// When its log cannot be read or is damaged, or its point cannot be had.
    pub fn open(
        name: &str,
        mut row: BranchRow,
        parent: &Arc<Replica>,
        pin: &Arc<PinGuard>,
        store: &StoreConfig,
        catalogue: &Arc<Catalogue>,
        caches: &Arc<Caches>,
    ) -> anyhow::Result<(Branch, Owner, impl Future<Output = ()> + Send + use<>)> {
        let at = row.term.fork_seq;
        let damaged = |why: &str| {
            anyhow::anyhow!(
                "the branch '{name}' is damaged, so what was written into it cannot be relied \
                 on ({why}): drop it and make another of @seq:{at}"
            )
        };
        if let Some(why) = &row.damage {
            return Err(damaged(why));
        }
        // What the parent has lost since would be read as what was before it.
        resolve(parent, row.volume.as_deref(), &Spec::Seq(at)).map_err(|refusal| {
            anyhow::anyhow!("the point of the branch '{name}' cannot be had any more: {refusal}")
        })?;
        let dir = branch_dir(parent, name);
        let damages = Damages::open(&log_name(parent, name), catalogue)?;
        let options = log_options(store, None);
        let log_name = log_name(parent, name);
        let known = catalogue.segments(&log_name)?;
        let group = parent.group().id;
        let before = Position { term: row.term.parent, seq: at };
        let acked = catalogue.vitals(&log_name)?.acked.seq.max(at);
        let expected = Expected { group, first: 0, known: &known, before, acked, received_ns: 0 };
        let follower = Arc::new(BranchFollower { log_name, catalogue: Arc::clone(catalogue) });
        let found = recover::recover(&dir.join("log"), caches, &options, &expected, &*follower)
            .with_context(|| format!("cannot recover the branch '{name}'"))?;
        for (_, sentence) in &found.suspect {
            parent.notice(format!("the branch '{name}': {sentence}"));
        }
        if !found.damage.is_empty() {
            // For good: the next start finds a log that ends sooner, and nothing wrong with it.
            let why = found.damage.join("; ");
            row.damage = Some(why.clone());
            catalogue.put_branch(parent.name(), name, &row)?;
            return Err(damaged(&why));
        }
        let journal = Journal::new(group, &dir.join("log"), caches, found.segments, found.end);
        // A branch has no size, so nobody holds anything up.
        let (_, held) = watch::channel(None);
        let (writer, owner) = log::new(Arc::new(journal), follower, options, held, found.start);
        let (queue, requests) = mpsc::channel(QUEUE_MAX);
        let task = writing::run(writer.clone(), group, row.term.id, found.end, requests);
        let branch = Branch {
            name: name.to_owned(),
            row,
            parent: Arc::clone(parent),
            writer,
            queue,
            clients: AtomicU32::new(0),
            left: Mutex::new(Instant::now()),
            kept: Mutex::default(),
            damages,
            there: RwLock::new(true),
            pin: Arc::clone(pin),
        };
        Ok((branch, owner, task))
    }

    /// Changes the content of a volume. With `durable`, it survives a power cut once this returns;
    /// else once a later [`sync`](Self::sync) has.
    ///
    /// # Errors
    /// [`WriteError`]; the range then reads as before or after.
    pub async fn change(&self, change: Change, durable: bool) -> Result<(), WriteError> {
        writing::ask(&self.queue, Some(change), durable).await
    }

    /// Makes every change that has returned durable.
    ///
    /// # Errors
    /// [`WriteError`].
    pub async fn sync(&self) -> Result<(), WriteError> {
        writing::ask(&self.queue, None, true).await
    }

    /// Reads sectors `start..end` into `out`, which comes zeroed. Blocks on the disk.
    ///
    /// # Errors
    /// Any [`ReadError`].
    pub fn read(
        &self,
        volume: VolumeId,
        start: u64,
        end: u64,
        out: &mut [u8],
    ) -> Result<(), ReadError> {
        let plan = self.ask(Plan::new(newest(volume, start, end)))?;
        self.parent.finish(plan, volume, start, out)
    }

    /// The stretches of a range's beginning, by whether they are known to be zeros: as far as a bounded
    /// number of searches leads.
    ///
    /// # Errors
    /// Any [`ReadError`].
    pub fn stretches(
        &self,
        volume: VolumeId,
        start: u64,
        end: u64,
    ) -> Result<Vec<Stretch>, ReadError> {
        let plan = self.ask(Plan::of_beginning(newest(volume, start, end)))?;
        self.parent.stretches(plan, volume)
    }

    /// Asks its log, then its parent's at its point.
    fn ask(&self, mut plan: Plan) -> Result<Plan, ReadError> {
        plan.ask(self.writer.journal().segments().iter().rev(), NEWEST)?;
        self.parent.ask(&mut plan, self.row.term.fork_seq)?;
        Ok(plan)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the catalogue has of it.
    pub fn row(&self) -> &BranchRow {
        &self.row
    }

    /// The replica it is a child of.
    pub fn parent(&self) -> &Arc<Replica> {
        &self.parent
    }

    /// The position it was made at.
    pub fn at(&self) -> Position {
        Position { term: self.row.term.parent, seq: self.row.term.fork_seq }
    }

    /// Its log.
    pub fn journal(&self) -> &Journal {
        self.writer.journal()
    }

    /// Its log's name in the catalogue.
    pub fn log_name(&self) -> String {
        log_name(&self.parent, &self.name)
    }

    /// What is damaged of its log.
    pub fn damages(&self) -> &Damages {
        &self.damages
    }

    /// How much of each volume cannot be read because its log is damaged. Blocks on the disk.
    pub fn missing(&self) -> BTreeMap<VolumeId, u64> {
        let mut missing = BTreeMap::new();
        let segments = self.journal().segments();
        for spot in self.damages.list() {
            let in_log = |number| segments.iter().find(|segment| segment.number() == number);
            match spot.place {
                Place::Chunk { segment, chunk } => {
                    in_log(segment).into_iter().for_each(|segment| {
                        self.add_needed(segment, chunk, &mut missing);
                    });
                }
                // Nobody knows what it holds, so reads are refused.
                Place::Index { .. } => {
                    let volumes = registry::volumes(self).into_iter();
                    missing.extend(volumes.map(|(_, id, sectors)| (id, sectors * SECTOR_BYTES)));
                }
                _ => {}
            }
        }
        missing
    }

    /// Adds how much a read of everything needs of a chunk.
    fn add_needed(&self, segment: &Segment, chunk: u32, bytes: &mut BTreeMap<VolumeId, u64>) {
        let mut extents = Vec::new();
        // An index that cannot be read is a place of its own.
        let _ = segment.for_each(|key, content| {
            if matches!(content, Indexed::Data { chunk: of, .. } if of == chunk) {
                extents.push((key.volume, key.start.0, key.end()));
            }
        });
        // Versions of one extent are asked for once.
        extents.sort_unstable();
        extents.dedup();
        for (volume, start, end) in extents {
            let Ok(plan) = self.ask(Plan::new(newest(volume, start, end))) else { continue };
            let needed = plan.into_pieces().0.into_iter().filter(|piece| {
                matches!(&piece.content, PieceContent::Data { segment: of, chunk: number, .. }
                    if of.id() == segment.id() && *number == chunk)
            });
            let sectors: u64 = needed.map(|piece| piece.end - piece.start).sum();
            if sectors > 0 {
                *bytes.entry(volume).or_default() += sectors * SECTOR_BYTES;
            }
        }
    }

    /// Bytes of its log.
    pub fn log_bytes(&self) -> u64 {
        self.writer.journal().bytes()
    }

    /// Clients that have it open.
    pub fn clients(&self) -> u32 {
        self.clients.load(Ordering::Relaxed)
    }

    /// How long nobody has had it open.
    pub fn idle(&self) -> Duration {
        if self.clients() > 0 {
            return Duration::ZERO;
        }
        self.left.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }

    /// Keeps in the catalogue how far its log is durable, if that has moved: what is found to be
    /// missing below that at the next start is damage. Nothing of one that has been dropped.
    ///
    /// # Errors
    /// When the catalogue cannot be written.
    pub fn keep_vitals(&self, catalogue: &Catalogue) -> anyhow::Result<()> {
        let Some(_there) = self.there() else { return Ok(()) };
        let acked = self.writer.journal().progress().durable;
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if *kept != acked {
            let vitals = Vitals { acked, ..Vitals::default() };
            catalogue.put_vitals(&self.log_name(), &vitals)?;
            *kept = acked;
        }
        Ok(())
    }

    /// Counts a client until the guard is dropped.
    pub fn opened(self: &Arc<Self>) -> ClientGuard {
        self.clients.fetch_add(1, Ordering::Relaxed);
        ClientGuard(Arc::clone(self))
    }

    /// Lets its log end.
    pub fn end(&self) {
        self.writer.end();
    }

    /// Whether its log is to end, because it is being dropped or the target ends.
    pub fn is_ending(&self) -> bool {
        self.writer.is_ending()
    }

    /// Waits until its log has ended: nothing is written any more.
    pub async fn ended(&self) {
        self.writer.ended().await;
    }

    /// Its rows and files, for as long as the guard lives; none when it has been dropped. Who writes
    /// any of them holds this.
    pub fn there(&self) -> Option<RwLockReadGuard<'_, bool>> {
        let there = self.there.read().unwrap_or_else(PoisonError::into_inner);
        if *there { Some(there) } else { None }
    }

    /// Gives its rows and files up. Blocks until nobody writes them any more.
    pub fn leave(&self) {
        *self.there.write().unwrap_or_else(PoisonError::into_inner) = false;
    }

    /// What holds its point.
    pub fn pin(&self) -> &Arc<PinGuard> {
        &self.pin
    }
}

impl Drop for ClientGuard {
    fn drop(&mut self) {
        *self.0.left.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        self.0.clients.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Sectors of a volume as they are now.
fn newest(volume: VolumeId, start: u64, end: u64) -> Query {
    Query { volume, start, end, at: NEWEST }
}

/// Where a branch's log is.
pub fn branch_dir(parent: &Replica, name: &str) -> PathBuf {
    parent.dir().join("branches").join(name)
}

/// Its log's name in the catalogue.
fn log_name(parent: &Replica, name: &str) -> String {
    format!("{}/{name}", parent.name())
}

struct BranchFollower {
    log_name: String,
    catalogue: Arc<Catalogue>,
}

impl Follower for BranchFollower {
    fn stored(&self, _frame: &FrameView<'_>) {}

    fn may_grow(&self) -> std::io::Result<()> {
        self.catalogue.reserve().check()
    }

    fn sealed(&self, segment: &Segment, end: &SegmentEnd) -> anyhow::Result<()> {
        self.catalogue.put_segment(&self.log_name, segment, end.index_at, end.chain, None)
    }
}

#[cfg(test)]
mod tests;
