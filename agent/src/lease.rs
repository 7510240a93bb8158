//! Sync mode: when an answer waits for the target, and when the target is granted a zero-loss lease.
//!
//! [`SyncMode`] decides without I/O, by the boot clock alone; the [core](crate::capture::core) asks
//! it whether answers are held back ([`SyncMode::holds`]) and tells it how things stand.
//!
//! ```text
//!        everything final-durable            what was answered before
//!        for a while, no gap                 is final-durable
//! async ------------------------> entering ------------------------> sync
//!   ^                                |                                 | an answer has waited too
//!   |        a gap, or too long      |                                 | long, a gap, a stop
//!   |<-------------------------------'                                 v
//!   '------------------------------------------------------------- leaving
//!                     the last lease granted has run out
//! ```
//!
//! Leases are granted in *sync* alone. In all stages but *async* nothing is answered that is not
//! final-durable; so a write that cannot become so, since it has no record, waits in *leaving* until
//! no target can claim any more that nothing is lost. An agent that does not know what an earlier
//! one has granted begins in *leaving*.

use std::time::Duration;

use tidemark_control::agent::SyncStage as Stage;
use tidemark_journal::Seq;
use tidemark_link::lease::{LEASE, outlived_ns};

const SECOND_NS: u64 = 1_000_000_000;
/// How long the target has to have kept up before answers wait for it: the shortest and the longest
/// such time. It doubles whenever it could not keep up after all.
const CALM_NS: (u64, u64) = (SECOND_NS, 60 * SECOND_NS);
/// So long in sync shows that it can.
const PROVEN_NS: u64 = 60 * SECOND_NS;

/// The other end of the link.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Peer {
    /// There is none.
    #[default]
    Away,
    /// One that knows no leases.
    Unable,
    /// One that asks for leases.
    Able,
}

/// How things stand, as the core sees them.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// The boot clock, read after everything else was found out.
    pub now_ns: u64,
    /// The last sequence drawn.
    pub last_seq: Seq,
    /// Everything up to here is final-durable.
    pub durable: Seq,
    /// Every change of the disks has a record: no volume is in a gap, and nothing waits to be read
    /// back.
    pub whole: bool,
    /// The other end.
    pub peer: Peer,
    /// Since when the oldest answer waits that is held back.
    pub waiting_since_ns: Option<u64>,
}

/// Why a group is not in sync.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Why {
    /// It was not asked for.
    #[default]
    Off,
    /// An agent before this one may have granted a lease.
    Restarted,
    /// The state disk has not noted yet that leases are granted.
    Unnoted,
    /// There is no link.
    Away,
    /// The target is of a version that knows no leases.
    Unable,
    /// A volume is in a gap, or waits to be read back.
    Gap,
    /// The target did not make everything durable in time.
    Slow,
    /// It has not kept up for long enough yet.
    Settling,
    /// The agent or the group is stopping.
    Stopping,
}

impl Why {
    /// For people, as a clause.
    pub fn describe(self) -> &'static str {
        match self {
            Why::Off => "it was not asked for",
            Why::Restarted => "an agent before this one may have granted a zero-loss lease",
            Why::Unnoted => "the state disk has not noted yet that leases are granted",
            Why::Away => "there is no link to the target",
            Why::Unable => "the target is of a version that knows no sync mode",
            Why::Gap => "a volume is in a gap, or is compared or read back",
            Why::Slow => "the target does not make writes durable in time",
            Why::Settling => "the target has to keep up for a while first",
            Why::Stopping => "the group is stopping",
        }
    }
}

/// How it stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct View {
    /// The stage.
    pub stage: Stage,
    /// Why it is not in sync; none if it is.
    pub why: Option<Why>,
    /// How often it has left sync.
    pub left_total: u64,
}

/// The decisions of one group.
#[derive(Debug)]
pub struct SyncMode {
    /// How long an answer waits; none if the group is not to be in sync at all.
    timeout_ns: Option<u64>,
    stage: Stage,
    why: Why,
    since_ns: u64,
    /// In *entering*: the last sequence that may have been answered too early.
    boundary: Seq,
    /// No target holds a lease from then on.
    outlived_ns: u64,
    /// Since when there was no other end.
    away_since_ns: Option<u64>,
    stopping: bool,
    note: Note,
    pace: Pace,
    left_total: u64,
}

/// What the state says durably of leases.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Note {
    /// What is needed.
    Right,
    /// It has to say this, and nobody was told yet.
    Wanted(Duration),
    /// It is being written.
    Asked,
}

/// Whether the target keeps up.
#[derive(Debug)]
struct Pace {
    /// The last sequence drawn at some time: as long as it is not final-durable, the target is at
    /// least so far behind.
    sample: (Seq, u64),
    calm_since_ns: u64,
    calm_needed_ns: u64,
}

impl SyncMode {
    /// A group whose answers wait for so long, or not at all. `left` is the longest lease that an
    /// earlier agent may have granted; that one has ended.
    pub fn new(timeout: Option<Duration>, left: Option<Duration>, now_ns: u64) -> SyncMode {
        let wanted = if timeout.is_some() { LEASE } else { Duration::ZERO };
        let noted = left.unwrap_or(Duration::ZERO);
        let right = if timeout.is_some() { noted >= wanted } else { noted.is_zero() };
        SyncMode {
            timeout_ns: timeout.map(|timeout| timeout.as_nanos() as u64),
            stage: if left.is_some() { Stage::Leaving } else { Stage::Async },
            why: if left.is_some() { Why::Restarted } else { Why::Off },
            since_ns: now_ns,
            boundary: Seq::ZERO,
            outlived_ns: left.map_or(0, |left| outlived_ns(now_ns, left)),
            away_since_ns: Some(now_ns),
            stopping: false,
            note: if right { Note::Right } else { Note::Wanted(wanted) },
            pace: Pace {
                sample: (Seq::ZERO, now_ns),
                calm_since_ns: now_ns,
                calm_needed_ns: CALM_NS.0,
            },
            left_total: 0,
        }
    }

    /// Takes the next step that the facts allow.
    pub fn turn(&mut self, facts: &Facts) {
        let now_ns = facts.now_ns;
        self.away_since_ns = match facts.peer {
            Peer::Away => self.away_since_ns.or(Some(now_ns)),
            Peer::Unable | Peer::Able => None,
        };
        let hindrance = self.hindrance(facts);
        let behind = self.pace.is_behind(facts, self.timeout_ns.unwrap_or(0) / 2);
        if behind || hindrance.is_some() {
            self.pace.calm_since_ns = now_ns;
        }
        let waited = |since: Option<u64>| {
            since.is_some_and(|since| now_ns.saturating_sub(since) >= self.timeout_ns.unwrap_or(0))
        };
        let late = waited(facts.waiting_since_ns).then_some(Why::Slow);
        match self.stage {
            Stage::Async => {
                let settling = if behind { Why::Slow } else { Why::Settling };
                self.why = hindrance.unwrap_or(settling);
                if hindrance.is_none() && self.pace.is_calm(now_ns) {
                    self.boundary = facts.last_seq;
                    self.go(Stage::Entering, Why::Settling, now_ns);
                }
            }
            Stage::Entering => {
                let late = late.or(waited(Some(self.since_ns)).then_some(Why::Slow));
                if let Some(why) = hindrance.or(late) {
                    // Nothing was granted.
                    self.give_up(why, now_ns);
                    self.go(Stage::Async, why, now_ns);
                } else if facts.durable >= self.boundary {
                    self.go(Stage::Sync, Why::Settling, now_ns);
                }
            }
            Stage::Sync => {
                // A cut that is mended in time costs no more than the waiting.
                let hindrance =
                    hindrance.filter(|why| *why != Why::Away || waited(self.away_since_ns));
                if let Some(why) = hindrance.or(late) {
                    self.give_up(why, now_ns);
                    self.left_total += 1;
                    self.go(Stage::Leaving, why, now_ns);
                }
            }
            Stage::Leaving => {}
        }
        if self.stage == Stage::Leaving && now_ns >= self.outlived_ns {
            self.go(Stage::Async, self.why, now_ns);
        }
    }

    /// The target asks for a lease: how long it may hold one, if it may. `facts` are those of now: of
    /// an older clock the lease would seem over too early.
    pub fn asked(&mut self, facts: &Facts) -> Option<Duration> {
        self.turn(facts);
        if self.stage != Stage::Sync {
            return None;
        }
        self.outlived_ns = self.outlived_ns.max(outlived_ns(facts.now_ns, LEASE));
        Some(LEASE)
    }

    /// The longest lease that the state is to name durably, when that has changed; call
    /// [`Self::noted`] when it does. Zero: none is granted any more.
    pub fn to_note(&mut self) -> Option<Duration> {
        let Note::Wanted(lease) = self.note else { return None };
        // What an earlier agent has granted is named until it is over.
        if lease.is_zero() && self.stage != Stage::Async {
            return None;
        }
        self.note = Note::Asked;
        Some(lease)
    }

    /// The state says durably what it was to say.
    pub fn noted(&mut self) {
        self.note = Note::Right;
    }

    /// No lease is granted any more.
    pub fn stop(&mut self) {
        self.stopping = true;
    }

    /// Whether it has nothing to decide: it was not asked for, and there is nothing to wait for.
    pub fn is_idle(&self) -> bool {
        self.timeout_ns.is_none() && self.stage == Stage::Async && self.note == Note::Right
    }

    /// Whether nothing is answered that is not final-durable.
    pub fn holds(&self) -> bool {
        self.stage != Stage::Async
    }

    /// Whether a target may hold a lease.
    pub fn has_granted(&self) -> bool {
        matches!(self.stage, Stage::Sync | Stage::Leaving)
    }

    /// How it stands.
    pub fn view(&self) -> View {
        let why = (self.stage != Stage::Sync).then_some(self.why);
        View { stage: self.stage, why, left_total: self.left_total }
    }

    fn hindrance(&self, facts: &Facts) -> Option<Why> {
        match () {
            () if self.timeout_ns.is_none() => Some(Why::Off),
            () if self.stopping => Some(Why::Stopping),
            () if self.note != Note::Right => Some(Why::Unnoted),
            () if !facts.whole => Some(Why::Gap),
            () => match facts.peer {
                Peer::Away => Some(Why::Away),
                Peer::Unable => Some(Why::Unable),
                Peer::Able => None,
            },
        }
    }

    /// Sync was tried and is over: next time it is tried later, unless it has worked for long.
    fn give_up(&mut self, why: Why, now_ns: u64) {
        let proven = self.stage == Stage::Sync && now_ns.saturating_sub(self.since_ns) >= PROVEN_NS;
        let needed = &mut self.pace.calm_needed_ns;
        if proven {
            *needed = CALM_NS.0;
        } else if why == Why::Slow {
            *needed = (*needed * 2).min(CALM_NS.1);
        }
        self.pace.calm_since_ns = now_ns;
    }

    fn go(&mut self, stage: Stage, why: Why, now_ns: u64) {
        (self.stage, self.why, self.since_ns) = (stage, why, now_ns);
    }
}

impl Pace {
    /// Whether the target is behind by more than so much.
    fn is_behind(&mut self, facts: &Facts, behind_ns_max: u64) -> bool {
        if facts.durable >= self.sample.0 {
            self.sample = (facts.last_seq, facts.now_ns);
        }
        facts.now_ns.saturating_sub(self.sample.1) > behind_ns_max
    }

    fn is_calm(&self, now_ns: u64) -> bool {
        now_ns.saturating_sub(self.calm_since_ns) >= self.calm_needed_ns
    }
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
