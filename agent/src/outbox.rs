//! The outbox: encoded frames, kept until the final target has them.
//!
//! It is the frames area of the [ring](crate::capture::ring): a ring of bytes in which frames lie
//! end to end, each in one piece. The encoder puts frames in, the sender reads them (again after a
//! reconnect, verbatim), and the acknowledgement of the final target frees them, oldest first.
//!
//! With a [spool](crate::spool) the oldest of them lie there, and no longer in memory.
//!
//! The next process finds them again by walking from the start to the end ([`kept`]). Where the rest of
//! the area is too short for a frame, the bytes at its begin are zeros, or fewer than a header has.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tidemark_journal::{Position, Seq, TermId, frame::HEADER_BYTES};
use tokio::sync::Notify;

use crate::{
    capture::ring::{FRAMED_SEQ_AT, FRAMES_END_AT, FRAMES_START_AT, RingMemory},
    clock::since_boot,
};

mod inherit;
mod spill;

pub use inherit::{Kept, kept};
pub use spill::{Chore, SPILL_ABOVE_PERMILLE, SpoolBacklog};

use spill::Spill;

/// The area's fill, in thousandths, above which catch-up adds nothing to it.
const BACKLOGGED_ABOVE_PERMILLE: u64 = 300;

/// A frame's place and what is known of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameInfo {
    /// The position it continues.
    pub before: Position,
    /// Its last sequence.
    pub last: Seq,
    /// The same with its term.
    last_position: Position,
    /// Journal time of its first record.
    pub time_ns: u64,
    /// Raw bytes of its payload.
    pub raw_bytes: u64,
    /// Bytes of the frame.
    pub bytes: u64,
    /// Counter of its first byte in the area.
    at: u64,
}

#[derive(Default)]
struct State {
    frames: VecDeque<FrameInfo>,
    /// Counter after the last frame.
    end: u64,
    /// Counter of the first byte in use.
    start: u64,
    /// The last sequence handed to the sender over the present link.
    sent: Seq,
    /// The target takes nothing: frames are kept, and none is taken.
    held: bool,
    /// The highest sequence that was released.
    released: Seq,
    /// Since when frames wait in memory and nothing is released.
    waiting_since: Option<Duration>,
    /// Frames are dropped instead of kept: what they hold will be compared instead.
    discarding: bool,
    closed: bool,
    /// A frame is being written to its place.
    writing: bool,
    spill: Spill,
}

/// The frames of one group.
pub struct Outbox {
    memory: Arc<RingMemory>,
    state: Mutex<State>,
    room: Condvar,
    /// Woken when there may be something to do for the spool's thread.
    spill: Condvar,
    /// Whether so much waits that catch-up should not add to it.
    backlogged: AtomicBool,
    /// Woken when there may be a frame to send: one came in, or they are no longer held.
    pub filled: Notify,
}

/// How full an outbox is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Frames kept in memory.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes that there is room for in memory.
    pub area_bytes: u64,
    /// Journal time of the oldest record that is not final-durable.
    pub oldest_ns: Option<u64>,
    /// How full the area is, 0 to 1000.
    pub fill_permille: u64,
}

impl Outbox {
    /// An empty outbox in the frames area of a new ring.
    pub fn new(memory: Arc<RingMemory>) -> Arc<Outbox> {
        Outbox::with(memory, State::default())
    }

    fn with(memory: Arc<RingMemory>, mut state: State) -> Arc<Outbox> {
        state.waiting_since = (!state.frames.is_empty()).then(since_boot);
        Arc::new(Outbox {
            memory,
            state: Mutex::new(state),
            room: Condvar::new(),
            spill: Condvar::new(),
            backlogged: AtomicBool::new(false),
            filled: Notify::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last sequence that was put in a frame, or where the term begins.
    fn framed(&self) -> Seq {
        Seq(self.memory.word(FRAMED_SEQ_AT).load(Ordering::Acquire))
    }

    /// The longest frame that it can keep.
    pub fn frame_bytes_max(&self) -> u64 {
        self.memory.layout().frame_bytes
    }

    /// Has `write` put a frame of at most `bytes_max` bytes in its place, of which it tells how many it has, and keeps it.
    /// Waits for room as long as it takes. Returns the bytes, none while frames are dropped, and `None` once the outbox
    /// is closed.
    ///
    /// # Panics
    /// When `bytes_max` is more than [`Self::frame_bytes_max`], `write` tells of more, or another thread is at it.
    pub fn push(
        &self,
        bytes_max: u64,
        info: &FrameFacts,
        write: impl FnOnce(&mut [u8]) -> usize,
    ) -> Option<u64> {
        let layout = *self.memory.layout();
        let (area, frames_at) = (layout.frame_bytes, layout.frames_at());
        assert!(bytes_max <= area, "a frame longer than the outbox");
        let mut state = self.state();
        let at = loop {
            if state.closed || state.discarding {
                return (!state.closed).then_some(0);
            }
            if let Some(at) = place(&state, area, bytes_max) {
                break at;
            }
            let waited = self.room.wait_timeout(state, Duration::from_millis(500));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        };
        assert!(!std::mem::replace(&mut state.writing, true), "one writes frames at a time");
        drop(state);
        let region = self.memory.region();
        // SAFETY: the place is free, so nobody reads there until the frame is told of below. Whoever has the lock
        // meanwhile takes frames or frees them; only this adds any, once at a time.
        let room = unsafe { region.slice_mut(frames_at + at % area, bytes_max) };
        let bytes = write(room.expect("the place lies inside the area")) as u64;
        assert!(bytes <= bytes_max, "a frame longer than it may be");
        let mut state = self.state();
        state.writing = false;
        if state.closed || state.discarding {
            return (!state.closed).then_some(0);
        }
        if state.frames.is_empty() {
            state.start = at;
            self.memory.word(FRAMES_START_AT).store(at, Ordering::Release);
            self.memory.word(FRAMES_END_AT).store(at, Ordering::Release);
        } else if at > state.end {
            let rest = (at - state.end).min(HEADER_BYTES as u64);
            region.zero(frames_at + state.end % area, rest).expect("inside the area");
        }
        let FrameFacts { before, last, term, time_ns, raw_bytes } = *info;
        let last_position = Position { term, seq: last };
        state.frames.push_back(FrameInfo {
            before,
            last,
            last_position,
            time_ns,
            raw_bytes,
            bytes,
            at,
        });
        state.waiting_since.get_or_insert_with(since_boot);
        state.end = at + bytes;
        self.memory.word(FRAMES_END_AT).store(state.end, Ordering::Release);
        // After the end: nothing frees the frame before the lock is given back.
        self.memory.word(FRAMED_SEQ_AT).store(last.0, Ordering::Release);
        self.look_at_backlog(&state);
        drop(state);
        self.filled.notify_one();
        self.spill.notify_all();
        Some(bytes)
    }

    /// Whether a frame of so many bytes would be put in at once.
    #[cfg(feature = "simulation")]
    pub fn has_room(&self, bytes: u64) -> bool {
        let state = self.state();
        let area = self.memory.layout().frame_bytes;
        state.closed || state.discarding || place(&state, area, bytes).is_some()
    }

    /// Frames that were not handed to the sender yet.
    pub fn unsent(&self) -> usize {
        let state = self.state();
        let in_spool = usize::from(state.sent.max(state.released) < state.spill.through.seq);
        in_spool + state.frames.len() - next(&state)
    }

    /// Whether everything up to `seq` was handed to the sender over the present link.
    pub fn sent_through(&self, seq: Seq) -> bool {
        self.state().sent >= seq
    }

    /// Journal times of the frames kept that end at `seq` or before; of those in the spool only if
    /// they were sent over the present link.
    pub fn times_through(&self, seq: Seq) -> Vec<u64> {
        let mut state = self.state();
        let mut times = state.spill.take_times(seq);
        let through = state.frames.iter().take_while(|frame| frame.last <= seq);
        times.extend(through.map(|frame| frame.time_ns));
        times
    }

    /// Goes back to just after `seq`: a new link resumes there.
    pub fn rewind(&self, seq: Seq) {
        let mut state = self.state();
        state.sent = seq;
        state.spill.rewound();
    }

    /// The link has ended: nothing is on its way any more.
    pub fn link_ended(&self) {
        let mut state = self.state();
        state.sent = state.released;
        state.spill.rewound();
        drop(state);
        self.spill.notify_all();
    }

    /// Holds all frames back from the sender while the target has no room, or lets them go again.
    /// A frame that was taken already goes all the same.
    pub fn hold(&self, held: bool) {
        let before = std::mem::replace(&mut self.state().held, held);
        if before && !held {
            self.filled.notify_one();
        }
    }

    /// The next frame for the sender, if none are held back and it lies in memory. It is copied, so that
    /// a link that hangs keeps nothing in memory.
    pub fn take(&self, buffer: &mut Vec<u8>) -> Option<FrameInfo> {
        let mut state = self.state();
        let spooled = state.sent.max(state.released) < state.spill.through.seq;
        if state.held || spooled {
            return None;
        }
        let frame = *state.frames.get(next(&state))?;
        buffer.resize(frame.bytes as usize, 0);
        let layout = self.memory.layout();
        let offset = layout.frames_at() + frame.at % layout.frame_bytes;
        self.memory.region().copy_out(offset, buffer).expect("the frame lies inside the area");
        state.sent = frame.last;
        Some(frame)
    }

    /// Everything up to `seq` is final-durable: its frames are freed.
    pub fn release(&self, seq: Seq) {
        let mut state = self.state();
        if seq > state.released {
            state.released = seq;
            state.waiting_since = Some(since_boot());
        }
        self.free(state);
    }

    fn free(&self, mut state: MutexGuard<'_, State>) {
        let through = state.released.max(state.spill.through.seq);
        while let Some(frame) = state.frames.front().copied()
            && frame.last <= through
        {
            if frame.last > state.released && frame.last <= state.sent {
                state.spill.was_sent(frame.last, frame.time_ns);
            }
            state.start = frame.at + frame.bytes;
            state.frames.pop_front();
        }
        if state.frames.is_empty() {
            state.waiting_since = None;
            state.start = state.end;
        }
        self.memory.word(FRAMES_START_AT).store(state.start, Ordering::Release);
        self.look_at_backlog(&state);
        drop(state);
        self.room.notify_all();
    }

    /// Drops all frames, and those that come until [`Self::resume`].
    pub fn discard(&self) {
        let mut state = self.state();
        state.discarding = true;
        state.waiting_since = None;
        state.spill.discard();
        state.frames.clear();
        state.start = state.end;
        self.memory.word(FRAMES_START_AT).store(state.start, Ordering::Release);
        drop(state);
        self.room.notify_all();
    }

    /// Keeps frames again.
    pub fn resume(&self) {
        self.state().discarding = false;
        self.spill.notify_all();
    }

    /// Ends it: whoever waits for room gives up, and a frame that is being written is not kept.
    pub fn close(&self) {
        self.state().closed = true;
        self.room.notify_all();
        self.spill.notify_all();
        self.filled.notify_one();
    }

    /// Whether so much waits, in memory or in the spool, that catch-up should not add to it.
    pub fn is_backlogged(&self) -> bool {
        self.backlogged.load(Ordering::Relaxed)
    }

    fn look_at_backlog(&self, state: &State) {
        let spooled = state.sent.max(state.released) < state.spill.through.seq;
        let much = spooled || self.fill_permille(state) > BACKLOGGED_ABOVE_PERMILLE;
        self.backlogged.store(much, Ordering::Relaxed);
    }

    fn fill_permille(&self, state: &State) -> u64 {
        (state.end - state.start) * 1000 / self.memory.layout().frame_bytes
    }

    /// How full it is.
    pub fn backlog(&self) -> Backlog {
        let state = self.state();
        let in_memory = state.frames.front().map(|frame| frame.time_ns);
        Backlog {
            frames: state.frames.len() as u64,
            bytes: state.frames.iter().map(|frame| frame.bytes).sum(),
            oldest_ns: state.spill.oldest_ns(state.released).or(in_memory),
            fill_permille: self.fill_permille(&state),
            area_bytes: self.memory.layout().frame_bytes,
        }
    }
}

/// What the encoder says of a frame.
#[derive(Clone, Copy, Debug)]
pub struct FrameFacts {
    /// The position it continues.
    pub before: Position,
    /// Its last sequence.
    pub last: Seq,
    /// Its term.
    pub term: TermId,
    /// Journal time of its first record.
    pub time_ns: u64,
    /// Raw bytes of its payload.
    pub raw_bytes: u64,
}

/// The place in the list of the frame that is sent next, if it lies in memory.
fn next(state: &State) -> usize {
    let through = state.sent.max(state.spill.through.seq);
    state.frames.partition_point(|frame| frame.last <= through)
}

/// Where a frame of so many bytes may lie, in one piece.
fn place(state: &State, area: u64, bytes: u64) -> Option<u64> {
    let left = area - state.end % area;
    let at = if bytes > left { state.end + left } else { state.end };
    let fits = at + bytes - state.start <= area || state.frames.is_empty();
    fits.then_some(at)
}

#[cfg(test)]
pub(crate) mod tests;
