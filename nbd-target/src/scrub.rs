//! The scrub: everything that is kept is read again from time to time, and compared with what was
//! written down of it.
//!
//! One thread does it for all groups, one after the other, at a stated rate, and waits while frames
//! wait to be stored. A pass goes through the sealed and open segments from the oldest to the newest,
//! then through the base. How far it is is kept in the catalogue, so that it goes on there after a
//! restart, at the segment or the stretch of the base that it was at. The logs of the group's branches
//! come last ([`branch`]). The same thread looks at once
//! at what a read has found to be damaged, and keeps the list of damage up to date.
//!
//! What can be made again here is made again: the index and the end of a segment from its frames, the
//! header and the maps of a base from memory. The rest goes into the list of [`damage`](crate::damage).

mod branch;

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tidemark_journal::{GroupId, VolumeId};

use crate::{
    bounds::{COUNT_MAX, at_most},
    branch::registry::Branches,
    config::ScrubConfig,
    damage::{Place, Spot},
    groups::Groups,
    replica::Replica,
    store::{
        Where,
        base::{check::BadBlocks, sums::UNIT_BLOCKS},
        check::{self, Finding, What},
        rebuild,
        recover::KnownSegment,
        segment::Segment,
    },
};

/// How often suspects are looked at, and passes begun.
const TICK: Duration = Duration::from_millis(500);
/// How often the place of a pass is kept.
const KEEP: Duration = Duration::from_secs(5);
/// The longest that a step waits for the log.
const YIELD_MAX: Duration = Duration::from_millis(500);
/// Of the time, the part that keeping the list of damage up to date may take.
const REFRESH_SHARE: u32 = 20;
const REFRESH_MIN: Duration = Duration::from_secs(1);

/// How far a group's scrub is, as the catalogue keeps it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ScrubRow {
    /// The pass under way.
    pub pass: Option<Pass>,
    /// When the last pass ended, nanoseconds since 1970; zero for none.
    pub finished_wall_ns: i64,
    /// Bytes that it read.
    #[serde(deserialize_with = "at_most::<COUNT_MAX, _>")]
    pub finished_bytes: u64,
    /// Damaged places that it found.
    #[serde(deserialize_with = "at_most::<COUNT_MAX, _>")]
    pub finished_found: u64,
    /// Indexes and ends of segments made anew so far.
    #[serde(deserialize_with = "at_most::<COUNT_MAX, _>")]
    pub mended_total: u64,
}

/// A pass.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Pass {
    /// When it began, nanoseconds since 1970.
    pub started_wall_ns: i64,
    /// Bytes read so far.
    #[serde(deserialize_with = "at_most::<COUNT_MAX, _>")]
    pub bytes: u64,
    /// Damaged places found so far.
    #[serde(deserialize_with = "at_most::<COUNT_MAX, _>")]
    pub found: u64,
    /// What comes next.
    pub at: Cursor,
}

/// A place in a pass.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cursor {
    /// The segment of this number, or the next one there is.
    Segment(u64),
    /// A volume's base, from a unit of its sums on.
    Base {
        /// The volume, or the next one there is.
        volume: VolumeId,
        /// The unit.
        unit: u64,
    },
    /// The log of a branch, from a segment on.
    Branch {
        /// The branch, or the next one there is.
        name: String,
        /// The segment.
        segment: u64,
    },
}

/// The scrubs of a target.
pub struct Scrubs {
    config: ScrubConfig,
    groups: Arc<Groups>,
    branches: Arc<Branches>,
    state: Mutex<BTreeMap<String, Scrub>>,
    wake: Condvar,
    ending: AtomicBool,
}

/// A group's scrub.
#[derive(Clone, Default)]
struct Scrub {
    row: ScrubRow,
    kept: Option<Instant>,
    /// A pass is wanted now.
    asked: bool,
    /// When the list of damage was last brought up to date, and how long that took.
    refreshed: Option<(Instant, Duration)>,
    /// Bad blocks of the volume that the pass is at.
    bad: Vec<Spot>,
    /// The catalogue failed: this is told once.
    failed: bool,
}

impl Scrubs {
    /// The scrubs of these groups and branches, to be run by [`run`](Self::run).
    pub fn new(config: ScrubConfig, groups: Arc<Groups>, branches: Arc<Branches>) -> Arc<Scrubs> {
        let (state, wake, ending) = Default::default();
        Arc::new(Scrubs { config, groups, branches, state, wake, ending })
    }

    /// Has a pass of a group begin now, unless one is under way.
    pub fn start(&self, group: &str) {
        self.state().entry(group.to_owned()).or_default().asked = true;
        self.wake.notify_all();
    }

    /// How far a group's scrub is.
    pub fn row(&self, replica: &Replica) -> ScrubRow {
        if let Some(scrub) = self.state().get(replica.name()).filter(|scrub| scrub.kept.is_some()) {
            return scrub.row.clone();
        }
        replica.catalogue().scrub(replica.name()).unwrap_or_default()
    }

    /// Ends [`run`](Self::run) soon.
    pub fn end(&self) {
        self.ending.store(true, Ordering::Release);
        self.wake.notify_all();
    }

    /// Scrubs until it is ended. Blocks.
    pub fn run(&self) {
        self.work();
        let state = self.state();
        for (name, scrub) in state.iter().filter(|(_, scrub)| scrub.kept.is_some()) {
            if let Err(error) = self.groups.catalogue().put_scrub(name, &scrub.row) {
                tracing::warn!(group = %name, "how far the scrub is cannot be kept: {error:#}");
            }
        }
    }

    /// Looks at all of a group at once, as [`run`](Self::run) does in time. Nothing may be waiting to be
    /// stored.
    ///
    /// # Errors
    /// When the catalogue or the disk fails.
    #[cfg(feature = "simulation")]
    pub fn whole_pass(&self, replica: &Arc<Replica>) -> anyhow::Result<()> {
        self.start(replica.name());
        self.load(replica)?;
        self.attend(replica);
        while self.step(replica)? {}
        Ok(())
    }

    fn work(&self) {
        while !self.ending() {
            let mut worked = false;
            for replica in self.groups.replicas() {
                if self.ending() {
                    return;
                }
                let step = self.load(&replica).and_then(|()| {
                    self.attend(&replica);
                    self.step(&replica)
                });
                match step {
                    Ok(step) => worked |= step,
                    Err(_) if self.ending() => return,
                    Err(error) => self.failed(&replica, &error),
                }
            }
            if !worked {
                let state = self.state();
                let _ = self.wake.wait_timeout(state, TICK);
            }
        }
    }

    /// Takes in how far the scrub was before the start.
    fn load(&self, replica: &Replica) -> anyhow::Result<()> {
        let mut state = self.state();
        let scrub = state.entry(replica.name().to_owned()).or_default();
        if scrub.kept.is_some() {
            return Ok(());
        }
        scrub.row = replica.catalogue().scrub(replica.name())?;
        scrub.kept = Some(Instant::now());
        if let Some(Pass { at: Cursor::Base { unit, .. }, .. }) = &mut scrub.row.pass {
            // What was found of the volume before the restart is not known any more.
            *unit = 0;
        }
        Ok(())
    }

    /// Looks at what reads have met, and brings the list of damage up to date now and then.
    fn attend(&self, replica: &Arc<Replica>) {
        for suspect in replica.damages().take_suspects() {
            if let Err(error) = self.look_at(replica, suspect) {
                self.failed(replica, &error);
            }
        }
        let refreshed = self.state().get(replica.name()).and_then(|scrub| scrub.refreshed);
        let due = refreshed
            .is_none_or(|(at, took)| at.elapsed() >= (took * REFRESH_SHARE).max(REFRESH_MIN));
        if due {
            let began = Instant::now();
            replica.damages().refresh(replica, &|| !self.ending());
            let mut state = self.state();
            let scrub = state.entry(replica.name().to_owned()).or_default();
            scrub.refreshed = Some((Instant::now(), began.elapsed()));
        }
    }

    fn look_at(&self, replica: &Arc<Replica>, suspect: Where) -> anyhow::Result<()> {
        match suspect {
            Where::Base { volume, first, .. } => {
                let looked = replica.base().check(volume, first / UNIT_BLOCKS)?;
                let of_it = |bad: &BadBlocks| bad.first <= first && first < bad.first + bad.blocks;
                if let Some(bad) = looked.bad.into_iter().find(of_it) {
                    let place = Place::Base { volume, first: bad.first, blocks: bad.blocks };
                    replica.damages().report(Spot::found(replica, place, bad.text));
                }
            }
            Where::Segment { id, chunk } => {
                let segments = replica.journal().segments();
                // Another log's, or folded meanwhile.
                let Some(segment) = segments.iter().find(|segment| segment.id() == id) else {
                    return Ok(());
                };
                let number = segment.number();
                match chunk {
                    Some(chunk) => {
                        let Err(error) = segment.chunk(chunk) else { return Ok(()) };
                        let place = Place::Chunk { segment: number, chunk };
                        replica.damages().report(Spot::found(replica, place, error.to_string()));
                    }
                    None => {
                        let known = replica.catalogue().segments(replica.name())?;
                        self.check_segment(replica, segment, &known, &mut |_| Ok(()))?;
                    }
                }
            }
        }
        Ok(())
    }

    /// One step of a group's pass. Says whether there was something to do.
    fn step(&self, replica: &Arc<Replica>) -> anyhow::Result<bool> {
        let Some(mut pass) = self.pass(replica)? else { return Ok(false) };
        let before = pass.bytes;
        let began = Instant::now();
        let next = match pass.at.clone() {
            Cursor::Segment(number) => {
                let segments = replica.journal().segments();
                match segments.iter().find(|segment| segment.number() >= number) {
                    Some(segment) => {
                        let known = replica.catalogue().segments(replica.name())?;
                        let mut last = Instant::now();
                        let mut bytes = 0;
                        pass.found +=
                            self.check_segment(replica, segment, &known, &mut |step| {
                                bytes += step;
                                self.pace(replica, step, &mut last)
                            })?;
                        pass.bytes += bytes;
                        Some(Cursor::Segment(segment.number() + 1))
                    }
                    None => Some(Cursor::Base { volume: VolumeId(0), unit: 0 }),
                }
            }
            Cursor::Base { volume, unit } => {
                let ids = replica.base().volume_ids();
                match ids.into_iter().find(|id| *id >= volume) {
                    Some(id) => {
                        let from = if id == volume { unit } else { 0 };
                        let next = self.check_base(replica, id, from, &mut pass)?;
                        let mut last = began;
                        self.pace(replica, pass.bytes - before, &mut last)?;
                        next
                    }
                    None => Some(Cursor::Branch { name: String::new(), segment: 0 }),
                }
            }
            Cursor::Branch { name, segment } => {
                self.step_branch(replica, &name, segment, &mut pass)?
            }
        };
        self.advance(replica, pass, next)?;
        Ok(true)
    }

    /// The pass under way, or a new one if it is time.
    fn pass(&self, replica: &Replica) -> anyhow::Result<Option<Pass>> {
        let mut state = self.state();
        let scrub = state.entry(replica.name().to_owned()).or_default();
        if scrub.row.pass.is_none() && (scrub.asked || self.is_due(replica, &scrub.row)) {
            tracing::info!(group = replica.name(), "a scrub begins");
            let started_wall_ns = replica.catalogue().machine().wall_ns();
            let at = Cursor::Segment(0);
            scrub.row.pass = Some(Pass { started_wall_ns, bytes: 0, found: 0, at });
            replica.catalogue().put_scrub(replica.name(), &scrub.row)?;
            drop(state);
            let verified = replica.catalogue().verify();
            if let Err(error) = verified {
                replica.notice(format!("{error:#}"));
            }
            state = self.state();
        }
        let scrub = state.entry(replica.name().to_owned()).or_default();
        scrub.asked = false;
        Ok(scrub.row.pass.clone())
    }

    fn is_due(&self, replica: &Replica, row: &ScrubRow) -> bool {
        let interval = self.config.interval.duration();
        let last = if row.finished_wall_ns > 0 {
            row.finished_wall_ns
        } else {
            replica.group().created_ns
        };
        // A clock that was set back must not keep it from beginning for ever.
        let age = replica.catalogue().machine().wall_ns().abs_diff(last);
        !interval.is_zero() && u128::from(age) >= interval.as_nanos()
    }

    fn advance(&self, replica: &Replica, pass: Pass, next: Option<Cursor>) -> anyhow::Result<()> {
        let mut state = self.state();
        let scrub = state.entry(replica.name().to_owned()).or_default();
        let ended = next.is_none();
        match next {
            Some(at) => scrub.row.pass = Some(Pass { at, ..pass }),
            None => {
                let Pass { bytes, found, .. } = pass;
                tracing::info!(group = replica.name(), bytes, found, "the scrub has ended");
                let finished_wall_ns = replica.catalogue().machine().wall_ns();
                let mended_total = scrub.row.mended_total;
                scrub.row = ScrubRow {
                    pass: None,
                    finished_wall_ns,
                    finished_bytes: bytes,
                    finished_found: found,
                    mended_total,
                };
            }
        }
        if ended || scrub.kept.is_none_or(|kept| kept.elapsed() >= KEEP) {
            scrub.kept = Some(Instant::now());
            replica.catalogue().put_scrub(replica.name(), &scrub.row)?;
        }
        scrub.failed = false;
        Ok(())
    }

    /// Checks a segment, mends what can be mended, and puts the rest into the list of damage; how
    /// many places are damaged.
    fn check_segment(
        &self,
        replica: &Arc<Replica>,
        segment: &Arc<Segment>,
        known: &BTreeMap<u64, KnownSegment>,
        pace: &mut check::Pace<'_>,
    ) -> anyhow::Result<u64> {
        let (group, number) = (replica.group().id, segment.number());
        let (findings, mended) = mended(segment, group, known, pace)?;
        self.count_mended(replica, mended);
        if replica.ledger().row().first_segment > number {
            // Folded meanwhile, which has read it.
            return Ok(0);
        }
        let spot = |finding: Finding| {
            Spot::found(replica, Place::of_segment(number, finding.what), finding.text)
        };
        let spots: Vec<Spot> = findings.into_iter().map(spot).collect();
        let found = spots.len() as u64;
        replica.damages().replace(|place| place.segment() == Some(number), spots);
        Ok(found)
    }

    fn count_mended(&self, replica: &Replica, mended: bool) {
        let mut state = self.state();
        let scrub = state.entry(replica.name().to_owned()).or_default();
        scrub.row.mended_total += u64::from(mended);
    }

    fn check_base(
        &self,
        replica: &Arc<Replica>,
        volume: VolumeId,
        unit: u64,
        pass: &mut Pass,
    ) -> anyhow::Result<Option<Cursor>> {
        let looked = replica.base().check(volume, unit)?;
        pass.bytes += looked.bytes;
        pass.found += looked.bad.len() as u64;
        let spots = looked.bad.into_iter().map(|bad| {
            let place = Place::Base { volume, first: bad.first, blocks: bad.blocks };
            Spot::found(replica, place, bad.text)
        });
        let spots: Vec<Spot> = spots.collect();
        // At once, so that people know; what is not found again goes at the volume's end.
        spots.iter().for_each(|spot| _ = replica.damages().report(spot.clone()));
        let mut state = self.state();
        let scrub = state.entry(replica.name().to_owned()).or_default();
        scrub.bad.extend(spots);
        if let Some(unit) = looked.next {
            return Ok(Some(Cursor::Base { volume, unit }));
        }
        let bad = std::mem::take(&mut scrub.bad);
        drop(state);
        let of = |place: &Place| matches!(place, Place::Base { volume: id, .. } if *id == volume);
        replica.damages().replace(of, bad);
        let next = volume.0.checked_add(1).map(VolumeId);
        Ok(next.map(|volume| Cursor::Base { volume, unit: 0 }))
    }

    /// Holds the scrub up between two steps, and looks at what has come up meanwhile; an error when it is
    /// to end.
    fn pace(&self, replica: &Arc<Replica>, bytes: u64, last: &mut Instant) -> io::Result<()> {
        self.hold_up(replica, bytes, last)?;
        self.attend(replica);
        *last = Instant::now();
        Ok(())
    }

    /// Holds the scrub up so that it keeps to its rate and leaves the disk to the log; an error when
    /// it is to end.
    fn hold_up(&self, replica: &Arc<Replica>, bytes: u64, last: &mut Instant) -> io::Result<()> {
        let rate = self.config.bytes_per_s.0.max(1);
        let due = Duration::from_secs_f64(bytes as f64 / rate as f64);
        let step = last.elapsed();
        self.sleep(due.saturating_sub(step))?;
        let waited = Instant::now();
        while replica.writer().is_busy() && waited.elapsed() < YIELD_MAX {
            self.sleep(Duration::from_millis(10))?;
        }
        *last = Instant::now();
        Ok(())
    }

    fn sleep(&self, mut time: Duration) -> io::Result<()> {
        loop {
            if self.ending() {
                return Err(io::Error::new(io::ErrorKind::Interrupted, "the target ends"));
            }
            if time.is_zero() {
                return Ok(());
            }
            let part = time.min(TICK);
            std::thread::sleep(part);
            time -= part;
        }
    }

    fn failed(&self, replica: &Replica, error: &anyhow::Error) {
        let told = {
            let mut state = self.state();
            let scrub = state.entry(replica.name().to_owned()).or_default();
            std::mem::replace(&mut scrub.failed, true)
        };
        if !told {
            tracing::warn!(group = replica.name(), "the scrub: {error:#}");
        }
        // Tried again, and not in a hurry.
        let _ = self.sleep(TICK);
    }

    fn ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }

    fn state(&self) -> MutexGuard<'_, BTreeMap<String, Scrub>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is damaged of a segment of any log, once its index and its end have been made anew where they
/// can be; and whether they were.
fn mended(
    segment: &Segment,
    group: GroupId,
    known: &BTreeMap<u64, KnownSegment>,
    pace: &mut check::Pace<'_>,
) -> anyhow::Result<(Vec<Finding>, bool)> {
    let number = segment.number();
    let row = known.get(&number);
    let before = number.checked_sub(1).and_then(|before| known.get(&before));
    let chain_before = before.map(|before| before.chain).or((number == 0).then_some([0; 32]));
    let findings = check::check(segment, group, row, chain_before, pace)?;
    let broken = |finding: &Finding| matches!(finding.what, What::Index | What::End);
    match row.filter(|_| findings.iter().any(broken)) {
        Some(row) if rebuild::mend(segment, group, row)? => {
            let texts: Vec<String> = findings.iter().map(|f| f.text.clone()).collect();
            tracing::warn!(segment = number, "made anew from its frames: {texts:?}");
            Ok((check::check(segment, group, Some(row), chain_before, pace)?, true))
        }
        _ => Ok((findings, false)),
    }
}
