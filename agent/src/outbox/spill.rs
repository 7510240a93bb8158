//! What the outbox shares with the [spool](crate::spool): which frames lie there, and which go there.
//!
//! Frames go to the spool oldest first, so what is kept is always the spool's frames and then those
//! in memory. It begins when the area in memory is half full, and all newer frames follow until the
//! sender has read the spool to its end; from then on they are sent from memory again. It also begins when frames
//! wait and nothing was acknowledged for some seconds: what lies there outlives a crash of the whole machine, and
//! regions that hold nothing else need not be compared after it.

use std::{
    collections::VecDeque,
    sync::{Arc, PoisonError, atomic::Ordering},
    time::Duration,
};

use tidemark_journal::{Ancestry, Position, Seq};
use tidemark_link::seam::AlignedBuf;

use super::{Outbox, State};
use crate::{
    capture::ring::SPOOLED_SEQ_AT,
    clock::since_boot,
    spool::{Batch, Index, SpoolError, Spooled},
};

/// The area's fill, in thousandths, above which the oldest frames go to the spool.
pub const SPILL_ABOVE_PERMILLE: u64 = 500;
/// How long frames stay in memory while nothing is acknowledged.
const SPILL_AFTER: Duration = Duration::from_secs(5);
/// The most bytes that go there with one sync, unless a frame is longer.
const BATCH_BYTES: u64 = 4 << 20;
/// How long a spool that has failed, or is full, is left alone.
const FAILED_WAIT: Duration = Duration::from_secs(30);
const FULL_WAIT: Duration = Duration::from_millis(500);

/// The spool's part of the outbox's state.
#[derive(Default)]
pub(super) struct Spill {
    index: Option<Arc<Index>>,
    /// Frames up to here lie in the spool, durably; zero if none do.
    pub through: Position,
    /// Counts the times that everything was dropped.
    epoch: u64,
    /// The spool is to be emptied: what it holds was dropped.
    clear: bool,
    /// Everything up to here is final-durable, and that is durably known.
    forget: Seq,
    /// Nothing goes there before this.
    not_before: Option<Duration>,
    /// What the last attempt came to, if it failed; for people. The next begins with whatever waits in memory.
    problem: Option<String>,
    /// That came from its being full.
    full: bool,
    /// Why what is in it cannot be read any more, until that is dropped; for people.
    lost: Option<String>,
    /// Last sequences and times of frames that were sent, are not final-durable, and lie in the
    /// spool.
    sent: VecDeque<(Seq, u64)>,
}

impl Spill {
    /// A new link resumes.
    pub fn rewound(&mut self) {
        self.sent.clear();
    }

    /// A frame of the spool was sent, or one that was sent from memory has left it.
    pub fn was_sent(&mut self, last: Seq, time_ns: u64) {
        self.sent.push_back((last, time_ns));
    }

    /// Everything in it is dropped.
    pub fn discard(&mut self) {
        self.epoch += 1;
        self.through = Position::default();
        self.lost = None;
        self.clear = self.index.is_some();
        self.sent.clear();
    }

    /// What was asked of it was done.
    fn works(&mut self) {
        (self.problem, self.full, self.not_before) = (None, false, None);
    }

    /// The times of frames up to `seq` that were sent and lay in the spool, once.
    pub fn take_times(&mut self, seq: Seq) -> Vec<u64> {
        let acked = self.sent.partition_point(|(last, _)| *last <= seq);
        self.sent.drain(..acked).map(|(_, time_ns)| time_ns).collect()
    }

    /// Journal time of the oldest record in it that is not final-durable.
    pub fn oldest_ns(&self, released: Seq) -> Option<u64> {
        if self.through.seq <= released {
            return None;
        }
        let sent = self.sent.front().map(|(_, time_ns)| *time_ns);
        sent.or_else(|| self.index.as_ref()?.time_after(released))
    }

    fn ends(&self) -> Option<(Position, Position)> {
        self.index.as_ref()?.ends()
    }
}

/// What the spool's thread is to do next.
#[derive(Debug, PartialEq, Eq)]
pub enum Chore {
    /// Nothing at the moment.
    None,
    /// Append the frames in the buffer.
    Append(Batch, u64),
    /// Remove what lies wholly below.
    Forget(Seq),
    /// Have it durably noted what is final-durable: the room is needed.
    Settle,
    /// Remove everything.
    Clear,
    /// End.
    Stop,
}

/// How the spool stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpoolBacklog {
    /// Whether there is one.
    pub configured: bool,
    /// Whether it holds frames that are not final-durable.
    pub in_use: bool,
    /// Bytes that its files take.
    pub bytes: u64,
    /// The most that they may take.
    pub bytes_max: u64,
    /// Why nothing more goes there, or what is there cannot be read; for people.
    pub problem: Option<String>,
}

impl Outbox {
    /// Has frames go to a spool from now on. What it holds already, up to its end, comes before the
    /// frames in memory if `going_on`; else it is removed.
    pub fn use_spool(&self, index: Arc<Index>, going_on: bool) {
        let mut state = self.state();
        let end = index.ends().map_or(Position::default(), |(_, last)| last);
        state.spill.clear = !going_on;
        state.spill.through = if going_on { end } else { Position::default() };
        state.spill.index = Some(index);
        drop(state);
        self.spill.notify_all();
    }

    /// Waits a while for something to do for the spool's thread. A batch of frames is put into
    /// `buffer`, padded.
    pub fn chore(&self, buffer: &mut AlignedBuf, wait: Duration) -> Chore {
        let mut state = self.state();
        let chore = self.look(&mut state, buffer);
        if chore != Chore::None {
            return chore;
        }
        let waited = self.spill.wait_timeout(state, wait);
        state = waited.unwrap_or_else(PoisonError::into_inner).0;
        self.look(&mut state, buffer)
    }

    fn look(&self, state: &mut State, buffer: &mut AlignedBuf) -> Chore {
        if state.closed {
            return Chore::Stop;
        }
        if state.spill.clear {
            return if state.discarding { Chore::None } else { Chore::Clear };
        }
        let ends = state.spill.ends();
        if ends.is_some_and(|(before, _)| before.seq < state.spill.forget) {
            return Chore::Forget(std::mem::take(&mut state.spill.forget));
        }
        if self.wants_spill(state) { self.batch(state, ends, buffer) } else { Chore::None }
    }

    fn wants_spill(&self, state: &State) -> bool {
        let spill = &state.spill;
        let at_all = spill.index.is_some()
            && spill.lost.is_none()
            && !state.discarding
            && spill.not_before.is_none_or(|time| since_boot() >= time)
            && state.frames.back().is_some_and(|frame| frame.last > spill.through.seq);
        let following = state.sent.max(state.released) < spill.through.seq;
        let long = || state.waiting_since.is_some_and(|since| since_boot() - since >= SPILL_AFTER);
        let full = || self.fill_permille(state) > SPILL_ABOVE_PERMILLE;
        // One that has failed is tried again before it is needed: nobody else would say that it works again.
        at_all && (following || spill.problem.is_some() || full() || long())
    }

    fn batch(
        &self,
        state: &State,
        ends: Option<(Position, Position)>,
        buffer: &mut AlignedBuf,
    ) -> Chore {
        let from = state.frames.partition_point(|frame| frame.last <= state.spill.through.seq);
        let Some(first) = state.frames.get(from) else { return Chore::None };
        // The frames between it and these were sent from memory: it has to be emptied first.
        if let Some((_, last)) = ends
            && last.seq <= state.released
            && first.before != last
        {
            return Chore::Settle;
        }
        buffer.clear();
        let mut batch = Batch { before: first.before, last: first.before, time_ns: first.time_ns };
        for frame in state.frames.range(from..) {
            if !buffer.is_empty() && buffer.len() as u64 + frame.bytes > BATCH_BYTES {
                break;
            }
            let layout = self.memory.layout();
            let offset = layout.frames_at() + frame.at % layout.frame_bytes;
            // SAFETY: the frame was written before it was listed, and nobody writes to its place
            // before it is freed, which the lock on the state keeps from happening here.
            let bytes = unsafe { self.memory.region().slice(offset, frame.bytes) };
            if buffer.extend(bytes.expect("inside the area")).is_err() {
                break;
            }
            batch.last = frame.last_position;
        }
        buffer.pad_to_block();
        Chore::Append(batch, state.spill.epoch)
    }

    /// A batch is durable in the spool: its frames leave the memory. False if everything was
    /// dropped meanwhile.
    pub fn spooled(&self, batch: &Batch, epoch: u64) -> bool {
        let mut state = self.state();
        if state.spill.epoch != epoch || state.discarding {
            return false;
        }
        state.spill.through = batch.last;
        state.spill.works();
        // Before the frames are freed: the next process looks for them there then.
        self.memory.word(SPOOLED_SEQ_AT).store(batch.last.seq.0, Ordering::Release);
        self.free(state);
        self.filled.notify_one();
        true
    }

    /// Frames could not be put there: they stay in memory, and it is tried again later. Returns what
    /// people are told.
    pub fn not_spooled(&self, error: &SpoolError) -> String {
        let mut state = self.state();
        state.spill.full = matches!(error, SpoolError::Full);
        let wait = if state.spill.full { FULL_WAIT } else { FAILED_WAIT };
        state.spill.not_before = Some(since_boot() + wait);
        let sentence = match error {
            SpoolError::Full => "the spool is full: when the ring is so too, writes are no longer \
                                 captured"
                .to_owned(),
            SpoolError::Io(error) => format!(
                "the spool cannot be written: {error}; when the ring is full, writes are no longer \
                 captured; it is tried again every {} s",
                FAILED_WAIT.as_secs()
            ),
        };
        state.spill.problem = Some(sentence.clone());
        sentence
    }

    /// The spool is empty.
    pub fn spool_cleared(&self) {
        let mut state = self.state();
        state.spill.clear = false;
        // Its disk has done what was asked of it; until it is tried again nobody knows better.
        state.spill.works();
    }

    /// Everything up to `seq` is final-durable, and the state says so durably.
    pub fn forget(&self, seq: Seq) {
        let mut state = self.state();
        state.spill.forget = seq;
        if state.spill.full {
            // Until it is tried again nobody knows better.
            state.spill.works();
        }
        drop(state);
        self.spill.notify_all();
    }

    /// Counts the times that everything was dropped.
    pub fn epoch(&self) -> u64 {
        self.state().spill.epoch
    }

    /// The sequence after which the sender goes on in the spool, if the next frame lies there.
    pub fn next_in_spool(&self) -> Option<(Seq, Arc<Index>)> {
        let state = self.state();
        let after = state.sent.max(state.released);
        let there = after < state.spill.through.seq && !state.held && !state.discarding;
        if !there || state.spill.lost.is_some() {
            return None;
        }
        Some((after, state.spill.index.clone()?))
    }

    /// A frame was taken out of the spool to be sent.
    pub fn sent_spooled(&self, frame: &Spooled) {
        let mut state = self.state();
        state.sent = state.sent.max(frame.last.seq);
        state.spill.was_sent(frame.last.seq, frame.time_ns);
        drop(state);
        self.spill.notify_all();
    }

    /// What is in the spool cannot be read any more.
    pub fn spool_lost(&self, sentence: String) {
        self.state().spill.lost = Some(sentence);
    }

    /// Whether everything after `from` is kept, so that a link can resume there.
    pub fn covers(&self, from: Position, ancestry: &Ancestry) -> bool {
        let state = self.state();
        let follows = |before: Position, last: Seq| {
            let inside = before.seq < from.seq && from.seq < last;
            inside || ancestry.continues(from, before)
        };
        if from.seq < state.spill.through.seq {
            let ends = state.spill.ends();
            return state.spill.lost.is_none()
                && ends.is_some_and(|(before, last)| follows(before, last.seq));
        }
        let first = state.frames.iter().find(|frame| frame.last > state.spill.through.seq);
        // With none kept, all that this term had was final-durable; but a target may have lost some of it again.
        let framed = self.framed();
        let none = framed <= from.seq || framed == ancestry.current().fork_seq;
        first.map_or(none, |frame| follows(frame.before, frame.last))
    }

    /// How the spool stands.
    pub fn spool(&self) -> SpoolBacklog {
        let state = self.state();
        let Some(index) = &state.spill.index else { return SpoolBacklog::default() };
        SpoolBacklog {
            configured: true,
            in_use: state.spill.through.seq > state.released,
            bytes: index.bytes(),
            bytes_max: index.bytes_max(),
            problem: state.spill.lost.clone().or_else(|| state.spill.problem.clone()),
        }
    }
}
