//! The target's copy of a group: log, base, history and pins, and reading any of it.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock},
};

use anyhow::Context;
use tidemark_journal::{Ancestry, Position, SECTOR_BYTES, Seq, VolumeId};
use tidemark_link::message::Hello;
use tokio::sync::{Notify, watch};

use crate::{
    catalogue::{Catalogue, GroupRow, HistoryRow},
    config::{GroupConfig, StoreConfig},
    damage::{Damages, Place, Spot},
    lease::Lease,
    ledger::Ledger,
    pins::{PinGuard, Pins},
    store::{
        Damage, ReadError, Where,
        base::{Base, Stretch},
        index::Query,
        journal::Journal,
        log::{self, LogOptions, LogWriter, Owner},
        read::{self, Plan},
        recover::{self, Expected},
        segment::Caches,
    },
};

/// The most entries of an index in memory.
const ENTRIES_MAX: usize = 256 << 10;

/// A group's copy.
pub struct Replica {
    name: String,
    config: GroupConfig,
    dir: PathBuf,
    group: RwLock<GroupRow>,
    catalogue: Arc<Catalogue>,
    ledger: Arc<Ledger>,
    writer: LogWriter,
    base: Base,
    pins: Arc<Pins>,
    held: watch::Sender<Option<Arc<str>>>,
    notices: Mutex<Vec<String>>,
    damages: Damages,
    lease: Lease,
}

/// How a log of this target is written. That of a replica has a size, and each batch is synced.
pub fn log_options(store: &StoreConfig, bytes_max: Option<u64>) -> LogOptions {
    LogOptions {
        segment_bytes: store.segment.0,
        entries_max: ENTRIES_MAX,
        sync_batches: bytes_max.is_some(),
        bytes_max,
    }
}

impl Replica {
    /// A replica whose group is known, with its log recovered, and the log's owner to be run.
    ///
    /// # Errors
    /// When the catalogue or the log cannot be read.
    pub fn open(
        config: &GroupConfig,
        store: &StoreConfig,
        dir: &Path,
        catalogue: &Arc<Catalogue>,
        caches: &Arc<Caches>,
        attention: &Arc<Notify>,
    ) -> anyhow::Result<(Replica, Owner)> {
        let name = config.name.as_str();
        let group = catalogue.group(name)?.context("the group is not in the catalogue")?;
        let ledger = Arc::new(Ledger::open(name, catalogue, attention)?);
        let options = log_options(store, Some(config.size_max.0));
        let row = ledger.row().clone();
        let known = catalogue.segments(name)?;
        let vitals = ledger.vitals();
        let expected = Expected {
            group: group.id,
            first: row.first_segment,
            known: &known,
            before: row.base,
            acked: vitals.acked.seq,
            received_ns: vitals.received_ns,
        };
        let found = recover::recover(&dir.join("log"), caches, &options, &expected, &*ledger)
            .with_context(|| format!("cannot recover the log of group '{name}'"))?;
        if !found.damage.is_empty() {
            let wall_ns = found.segments.last().map_or(0, |last| last.summary().wall_max_ns);
            let why = found.damage.join("; ");
            ledger.change(|row| {
                row.history.truncate(found.end, wall_ns);
                row.history.lose(vitals.acked.seq, why);
            });
            ledger.keep_history()?;
        }
        let journal = Journal::new(group.id, &dir.join("log"), caches, found.segments, found.end);
        let journal = Arc::new(journal);
        let held = watch::Sender::new(None);
        let (writer, owner) =
            log::new(journal, Arc::clone(&ledger) as _, options, held.subscribe(), found.start);
        let (base, damage) =
            Base::open(catalogue.machine(), &dir.join("base"), group.id, &row.bases)
                .with_context(|| format!("cannot open the base of group '{name}'"))?;
        let notices = [found.damage, damage].concat();
        for sentence in &notices {
            tracing::error!(group = %name, "{sentence}");
        }
        let replica = Replica {
            name: name.to_owned(),
            config: config.clone(),
            dir: dir.to_owned(),
            group: RwLock::new(group),
            catalogue: Arc::clone(catalogue),
            ledger,
            writer,
            base,
            pins: Arc::default(),
            held,
            notices: Mutex::new(notices),
            damages: Damages::open(name, catalogue)?,
            lease: Lease::default(),
        };
        for (volume, blocks, text) in replica.base.lost() {
            // What the log holds of it takes long to find out: whoever scrubs does.
            replica.damages.report(Spot::lost(&replica, volume, blocks, text));
        }
        for (number, text) in found.suspect {
            let known = replica.damages.list();
            if !known.iter().any(|spot| spot.place.segment() == Some(number)) {
                replica.damages.report(Spot::found(&replica, Place::End { segment: number }, text));
            }
            let segments = replica.journal().segments();
            let segment = segments.iter().find(|segment| segment.number() == number);
            if let Some(segment) = segment {
                replica.damages.suspect(Where::Segment { id: segment.id(), chunk: None });
            }
        }
        Ok((replica, owner))
    }

    /// Makes a group known that was greeted for the first time.
    ///
    /// # Errors
    /// When the catalogue cannot be written.
    pub fn create(
        config: &GroupConfig,
        catalogue: &Catalogue,
        hello: &Hello,
    ) -> anyhow::Result<()> {
        let row = GroupRow {
            id: hello.group.id,
            node: config.node.to_string(),
            ancestry: hello.ancestry.clone(),
            created_ns: catalogue.machine().wall_ns(),
        };
        catalogue.put_group(config.name.as_str(), &row, &HistoryRow::default())
    }

    /// Takes a greeting in: the path of terms and the volumes, durably.
    ///
    /// # Errors
    /// When the catalogue cannot be written.
    pub fn announce(&self, hello: &Hello) -> anyhow::Result<()> {
        let changed = self.ledger.change(|row| row.history.announce(&hello.volumes));
        let mut group = self.group();
        // A source that has forgotten terms is not to make this side forget them.
        let end = self.journal().progress().durable;
        let knows = end.term.is_nil() || hello.ancestry.contains(end);
        if changed || (knows && group.ancestry != hello.ancestry) {
            if knows {
                group.ancestry = hello.ancestry.clone();
            }
            self.ledger.keep(|history| self.catalogue.put_group(&self.name, &group, history))?;
            *self.group.write().unwrap_or_else(PoisonError::into_inner) = group;
        }
        self.ledger.begin();
        Ok(())
    }

    /// The path of terms that ends with a position's, if it is known.
    pub fn path_to(&self, position: Position) -> Option<Ancestry> {
        self.group().ancestry.until(position)
    }

    /// Reads sectors `start..end` of a volume as of a position into `out`, which comes zeroed. The
    /// position must be pinned or checked; it blocks on the disk.
    ///
    /// # Errors
    /// Any [`ReadError`].
    pub fn read(
        &self,
        volume: VolumeId,
        at: Seq,
        start: u64,
        end: u64,
        out: &mut [u8],
    ) -> Result<(), ReadError> {
        let mut plan = Plan::new(Query { volume, start, end, at });
        self.ask(&mut plan, at)?;
        self.finish(plan, volume, start, out)
    }

    /// Asks this replica's log, then leaves what is not covered to [`finish`](Self::finish).
    ///
    /// # Errors
    /// Any [`ReadError`].
    pub fn ask(&self, plan: &mut Plan, at: Seq) -> Result<(), ReadError> {
        let oldest = self.ledger.history(|history| history.oldest);
        if at < oldest {
            return Err(ReadError::NotRetained { oldest });
        }
        let segments = self.journal().segments();
        plan.ask(segments.iter().rev(), at)
    }

    /// Fills `out` with what the plan found and, for the rest, what the base holds.
    ///
    /// # Errors
    /// Any [`ReadError`].
    pub fn finish(
        &self,
        plan: Plan,
        volume: VolumeId,
        start: u64,
        out: &mut [u8],
    ) -> Result<(), ReadError> {
        let (pieces, rest) = plan.into_pieces();
        read::fill(&pieces, start, out)?;
        for (from, to) in rest {
            let at = ((from - start) * SECTOR_BYTES) as usize;
            let bytes = ((to - from) * SECTOR_BYTES) as usize;
            self.base.read(volume, from, to, &mut out[at..at + bytes])?;
        }
        Ok(())
    }

    /// The stretches that a plan covers, by whether they are known to read as zeros. May end early, never
    /// empty.
    ///
    /// # Errors
    /// Any [`ReadError`].
    pub fn stretches(&self, plan: Plan, volume: VolumeId) -> Result<Vec<Stretch>, ReadError> {
        let (pieces, rest) = plan.into_pieces();
        let zeros = |content: &read::PieceContent| matches!(content, read::PieceContent::Zero);
        let found =
            pieces.iter().map(|p| Stretch { start: p.start, end: p.end, zeros: zeros(&p.content) });
        let mut all: Vec<Stretch> = found.collect();
        let mut complete_to = u64::MAX;
        for (from, to) in rest {
            let below = self.base.stretches(volume, from, to)?;
            let reached = below.last().map_or(from, |last| last.end);
            all.extend(below);
            if reached < to {
                // The base did not look further; nothing after this is known to be complete.
                complete_to = reached;
                break;
            }
        }
        all.retain(|stretch| stretch.start < complete_to);
        all.sort_unstable_by_key(|stretch| stretch.start);
        let mut merged: Vec<Stretch> = Vec::new();
        for stretch in all {
            match merged.last_mut() {
                Some(last) if last.zeros == stretch.zeros => last.end = stretch.end,
                _ => merged.push(stretch),
            }
        }
        Ok(merged)
    }

    /// Pins a position for as long as the guard lives.
    ///
    /// # Errors
    /// The oldest position, when the one wanted is below it.
    pub fn pin(&self, at: Seq, what: impl Into<String>) -> Result<PinGuard, Seq> {
        self.pins.pin(at, what, || self.ledger.history(|history| history.oldest))
    }

    /// Pins all that is retained for as long as the guard lives.
    pub fn pin_oldest(&self, what: impl Into<String>) -> PinGuard {
        self.pins.pin_oldest(what, || self.ledger.history(|history| history.oldest))
    }

    /// The group's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the configuration says of it.
    pub fn config(&self) -> &GroupConfig {
        &self.config
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its row in the catalogue.
    pub fn group(&self) -> GroupRow {
        self.group.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The catalogue.
    pub fn catalogue(&self) -> &Arc<Catalogue> {
        &self.catalogue
    }

    /// Its history and vitals.
    pub fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// Its log's read side.
    pub fn journal(&self) -> &Arc<Journal> {
        self.writer.journal()
    }

    /// Feeds its log.
    pub fn writer(&self) -> &LogWriter {
        &self.writer
    }

    /// The oldest retained state.
    pub fn base(&self) -> &Base {
        &self.base
    }

    /// What holds positions.
    pub fn pins(&self) -> &Arc<Pins> {
        &self.pins
    }

    /// Says why history does not leave at present: what a source is told when the log is full.
    pub fn set_held(&self, reason: Option<Arc<str>>) {
        self.held.send_if_modified(|held| {
            let changed = *held != reason;
            *held = reason;
            changed
        });
    }

    /// Tells people something that they should know, once.
    pub fn notice(&self, sentence: String) {
        const NOTICES_MAX: usize = 20;
        let mut notices = self.notices.lock().unwrap_or_else(PoisonError::into_inner);
        if notices.len() < NOTICES_MAX && !notices.contains(&sentence) {
            tracing::error!(group = %self.name, "{sentence}");
            notices.push(sentence);
        }
    }

    /// Has damage that a read met looked at, and told.
    pub fn met(&self, error: &ReadError) {
        match error {
            ReadError::Damaged(Damage { at: Some(place), .. }) if self.has(*place) => {
                self.damages.suspect(*place);
            }
            ReadError::Damaged(damage) => {
                self.notice(format!("what points read is damaged: {damage}"));
            }
            _ => {}
        }
    }

    /// Whether a place is in this replica's own log or base.
    fn has(&self, place: Where) -> bool {
        match place {
            Where::Segment { id, .. } => self.journal().segments().iter().any(|s| s.id() == id),
            Where::Base { .. } => true,
        }
    }

    /// What people should know.
    pub fn notices(&self) -> Vec<String> {
        self.notices.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The lease that its source has granted.
    pub fn lease(&self) -> &Lease {
        &self.lease
    }

    /// What is damaged of it.
    pub fn damages(&self) -> &Damages {
        &self.damages
    }
}
