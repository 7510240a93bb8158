//! Verifies of a group: on a schedule, gone on with after a restart, and remembered.
//!
//! The comparison itself is catch-up's ([`crate::capture::catchup`]). Here is when one begins, how far it was when
//! the agent ended, and what the last one found: `STATE-DIR/GROUP/verify.json`.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tidemark_control::agent::VerifyReport;
use tidemark_journal::{VolumeId, record::OFFER_BLOCK_BYTES};
use tokio::{task::JoinHandle, time::Instant};

use crate::{
    clock::wall_ns,
    engine::{Command, Engine, Snapshot},
    state::replace::replace_file,
};

const FILE: &str = "verify.json";
const VERSION: u32 = 1;
/// How often a verify is looked at, and how often it is written down how far it is.
const LOOK: Duration = Duration::from_millis(500);
const WRITE: Duration = Duration::from_secs(10);
const SECOND_NS: i64 = 1_000_000_000;

/// The content of `verify.json`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    version: u32,
    /// The time from which the schedule counts, nanoseconds since 1970: the end of the last verify of all volumes,
    /// or the group's first start.
    since_wall_ns: i64,
    last: Option<Ended>,
    under_way: Option<UnderWay>,
}

/// A verify that has ended.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Ended {
    begun_wall_ns: i64,
    ended_wall_ns: i64,
    differing_blocks: u64,
}

/// A verify that has not.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct UnderWay {
    begun_wall_ns: i64,
    /// Found before the agent was started the last time.
    differing_blocks: u64,
    /// All volumes of the group.
    whole: bool,
    /// The volumes that are not through, each with its first region that may not have been compared.
    reached: Vec<(VolumeId, u32)>,
}

impl Record {
    fn new() -> Record {
        Record { version: VERSION, since_wall_ns: wall_ns(), last: None, under_way: None }
    }

    /// What is remembered; a file that cannot be read or understood is worth no more than none.
    fn read(dir: &Path) -> Option<Record> {
        let bytes = std::fs::read(dir.join(FILE)).ok()?;
        let record: Option<Record> = serde_json::from_slice(&bytes).ok();
        record.filter(|record| record.version == VERSION)
    }
}

/// Looks after a group's verifies.
pub struct Verifies {
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

struct Shared {
    group: String,
    dir: PathBuf,
    engine: Engine,
    every_s: Option<u64>,
    state: Mutex<State>,
    /// Held while the file is written.
    writing: Arc<Mutex<()>>,
}

struct State {
    record: Record,
    written: Record,
    /// The engine's count of blocks that differ when the verify under way was begun or gone on with.
    counted: u64,
    /// When a verify was begun last.
    begun: Option<Instant>,
}

impl Verifies {
    /// Goes on with a verify that was under way. It is called on a tokio runtime.
    pub fn start(group: &str, dir: &Path, engine: Engine, every_s: Option<u64>) -> Verifies {
        let record = Record::read(dir).unwrap_or_else(Record::new);
        for (volume, region) in record.under_way.iter().flat_map(|verify| &verify.reached) {
            engine.tell(Command::VerifyFrom(*volume, *region));
        }
        let state = State { written: Record::new(), record, counted: 0, begun: None };
        let (group, dir) = (group.to_owned(), dir.to_owned());
        let (state, writing) = (Mutex::new(state), Arc::default());
        let shared = Arc::new(Shared { group, dir, engine, every_s, state, writing });
        let task = tokio::spawn({
            let shared = shared.clone();
            async move {
                let mut written = Instant::now();
                loop {
                    let asked = Instant::now();
                    let Some(now) = shared.engine.report().await else { return };
                    let urgent = shared.look(&now, asked);
                    if urgent || written.elapsed() >= WRITE {
                        written = Instant::now();
                        shared.write().await;
                    }
                    tokio::time::sleep(LOOK).await;
                }
            }
        });
        Verifies { shared, task }
    }

    /// Begins to compare a volume, or all.
    pub fn begin(&self, volume: Option<VolumeId>) {
        let now = self.shared.engine.snapshot();
        self.shared.begin(&mut self.shared.state(), &now, volume);
    }

    /// What people are told of the last verify, and of the next.
    pub fn report(&self) -> VerifyReport {
        let state = self.shared.state();
        let last = state.record.last.as_ref();
        VerifyReport {
            begun_wall_ns: last.map(|last| last.begun_wall_ns),
            ended_wall_ns: last.map(|last| last.ended_wall_ns),
            differing_bytes: last.map_or(0, |last| bytes_of(last.differing_blocks)),
            due_wall_ns: self.shared.due(&state),
        }
    }

    /// Writes down how far it is, at the end.
    pub async fn stop(&self) {
        self.task.abort();
        let asked = Instant::now();
        if let Some(now) = self.shared.engine.report().await {
            self.shared.look(&now, asked);
        }
        self.shared.write().await;
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When the schedule wants the next one.
    fn due(&self, state: &State) -> Option<i64> {
        Some(state.record.since_wall_ns.saturating_add(self.every_ns()?))
    }

    fn every_ns(&self) -> Option<i64> {
        Some(i64::try_from(self.every_s?).ok()?.saturating_mul(SECOND_NS))
    }

    fn begin(&self, state: &mut State, now: &Snapshot, volume: Option<VolumeId>) {
        let reached = now.volumes.iter().filter(|at| volume.is_none_or(|wanted| wanted == at.id));
        state.begun = Some(Instant::now());
        state.counted = now.counters.verify_differing_blocks;
        state.record.under_way = Some(UnderWay {
            begun_wall_ns: wall_ns(),
            differing_blocks: 0,
            whole: volume.is_none(),
            reached: reached.map(|at| (at.id, 0)).collect(),
        });
        self.engine.tell(Command::Verify(volume));
    }

    /// Takes in how things stand, ends a verify that is through and begins one that is due. True if that is to be
    /// written at once. `now` is not older than `asked`.
    fn look(&self, now: &Snapshot, asked: Instant) -> bool {
        let mut state = self.state();
        if state.begun.is_some_and(|begun| begun > asked) {
            return false;
        }
        let reached: Vec<(VolumeId, u32)> =
            now.volumes.iter().filter_map(|at| Some((at.id, at.verify_reached?))).collect();
        let found = now.counters.verify_differing_blocks - state.counted;
        if let Some(verify) = &mut state.record.under_way {
            if !reached.is_empty() {
                verify.reached = reached;
                return false;
            }
            let (whole, differing_blocks) =
                (verify.whole, verify.differing_blocks.saturating_add(found));
            let (begun_wall_ns, ended_wall_ns) = (verify.begun_wall_ns, wall_ns());
            if differing_blocks > 0 {
                let (group, bytes) = (&self.group, bytes_of(differing_blocks));
                tracing::warn!(
                    group,
                    bytes,
                    "verify: the target differed from the disks; it is mended"
                );
            } else {
                tracing::info!(group = self.group, "verify: the target has what the disks have");
            }
            state.record.under_way = None;
            if whole {
                state.record.since_wall_ns = ended_wall_ns;
            }
            state.record.last = Some(Ended { begun_wall_ns, ended_wall_ns, differing_blocks });
            return true;
        }
        // While a volume catches up, what would be compared is being sent.
        let quiet = now.volumes.iter().all(|at| at.gap.is_none() && at.uncaptured_regions == 0);
        let since_ns = state.record.since_wall_ns;
        if quiet && self.every_ns().is_some_and(|every_ns| is_due(wall_ns(), since_ns, every_ns)) {
            tracing::info!(group = self.group, "verify: the schedule's");
            self.begin(&mut state, now, None);
            return true;
        }
        false
    }

    async fn write(&self) {
        let record = {
            let mut state = self.state();
            let mut record = state.record.clone();
            let found = self.engine.snapshot().counters.verify_differing_blocks - state.counted;
            if let Some(verify) = &mut record.under_way {
                verify.differing_blocks = verify.differing_blocks.saturating_add(found);
            }
            if record == state.written {
                return;
            }
            state.written = record.clone();
            record
        };
        let (dir, writing) = (self.dir.clone(), self.writing.clone());
        let write = move || {
            let _writing = writing.lock().unwrap_or_else(PoisonError::into_inner);
            let json = serde_json::to_vec_pretty(&record)?;
            replace_file(&dir, FILE, &json)
        };
        if let Ok(Err(error)) = tokio::task::spawn_blocking(write).await {
            let group = &self.group;
            tracing::warn!(group, %error, "verify: how far it is cannot be written down");
        }
    }
}

/// Whether the next one is due. A clock that was set back must not keep it from beginning for ever.
fn is_due(now_ns: i64, since_ns: i64, every_ns: i64) -> bool {
    now_ns.abs_diff(since_ns) >= every_ns.unsigned_abs()
}

/// Bytes in so many blocks, which a file may have told.
fn bytes_of(blocks: u64) -> u64 {
    blocks.saturating_mul(OFFER_BLOCK_BYTES)
}

impl Drop for Verifies {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// It did: a clock that was a year ahead at one verify, and right afterwards, put the next one off for
    /// that year.
    #[test]
    fn a_clock_that_is_set_keeps_no_verify_off() {
        const DAY_NS: i64 = 86_400 * SECOND_NS;
        assert!(!is_due(100 * DAY_NS, 99 * DAY_NS + 1, DAY_NS));
        assert!(is_due(100 * DAY_NS, 99 * DAY_NS, DAY_NS));
        assert!(is_due(100 * DAY_NS, 465 * DAY_NS, DAY_NS));
    }

    #[test]
    fn golden_text() {
        let record = Record {
            version: VERSION,
            since_wall_ns: 5,
            last: Some(Ended { begun_wall_ns: 1, ended_wall_ns: 2, differing_blocks: 3 }),
            under_way: Some(UnderWay {
                begun_wall_ns: 6,
                differing_blocks: 7,
                whole: true,
                reached: vec![(VolumeId(1), 8)],
            }),
        };
        let text = concat!(
            r#"{"version":1,"since_wall_ns":5,"last":{"begun_wall_ns":1,"ended_wall_ns":2,"#,
            r#""differing_blocks":3},"under_way":{"begun_wall_ns":6,"differing_blocks":7,"whole":true,"#,
            r#""reached":[[1,8]]}}"#
        );
        assert_eq!(serde_json::to_string(&record).unwrap(), text);
        assert_eq!(serde_json::from_str::<Record>(text).unwrap(), record);
    }
}
