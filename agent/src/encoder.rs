//! The encoder: takes captured records out of the ring, in order, and makes frames of them, in their place in the outbox.
//!
//! Frames batch by themselves: while the sender is busy with a frame, the next one fills; when it
//! has nothing to send, what is there goes: at once after a rest, and else when it is worth a frame or a little
//! later, since a frame costs about as much as a hundred small writes; in sync mode always at once. Nor does one
//! stay open for longer than a second while the sender is busy or the link is cut: only a frame can go to the spool.

mod pace;

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering, fence},
    },
    thread::{JoinHandle, Thread},
    time::Duration,
};

use tidemark_journal::{Compression, FrameMeta, FramePlan, FrameWriter, GroupId, Position, TermId};

use crate::{
    capture::ring::RingReader,
    carriers::Carriers,
    clock::{JournalClock, since_boot, wall_ns},
    outbox::{FrameFacts, Outbox},
};

/// Raw bytes at which a frame is closed though the sender is busy.
pub const FRAME_RAW_BYTES: u64 = 1 << 20;
/// Raw bytes that are worth a frame when the sender has nothing to send.
const WORTH_RAW_BYTES: u64 = 256 << 10;
/// The shortest and the longest time after which it looks again by itself what has come.
const LOOK_NS: u64 = 4_000_000;
const LOOK_NS_MAX: u64 = 100_000_000;
/// The ring's fill, in thousandths, at which it is woken to look.
const LOOK_ABOVE_PERMILLE: u64 = 30;
/// How long the first record of a frame may be in it before it is closed though the sender is busy.
const OPEN_NS_MAX: u64 = 1_000_000_000;
/// The outbox's fill, in thousandths, above which the fastest compression is used.
const HURRY_ABOVE_PERMILLE: u64 = 500;
const FASTEST: i32 = -5;

pub use pace::Pace;

/// Where encoded history goes on.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// The term that is being written.
    pub term: TermId,
    /// The position that the next frame continues.
    pub before: Position,
}

/// What an encoder that does nothing waits for.
mod rest {
    /// Nothing: it works.
    pub const NONE: u8 = 0;
    /// That some time goes by, or that the ring fills.
    pub const TIME: u8 = 1;
    /// The same, or that a frame is asked for: it has records, which wait for the sender.
    pub const SENDER: u8 = 2;
    /// Anything.
    pub const ANYTHING: u8 = 3;
}

struct Shared {
    /// One of [`rest`].
    waits_for: AtomicU8,
    stop: AtomicBool,
    hurry: AtomicBool,
    frames: AtomicU64,
    raw_bytes: AtomicU64,
    frame_bytes: AtomicU64,
    next_place: Mutex<Option<Place>>,
}

impl Shared {
    fn set_place(&self, place: Place) {
        *self.next_place.lock().unwrap_or_else(PoisonError::into_inner) = Some(place);
    }
}

/// Counters of an encoder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EncoderCounters {
    /// Frames made.
    pub frames: u64,
    /// Payload bytes before compression.
    pub raw_bytes: u64,
    /// Bytes of the frames.
    pub frame_bytes: u64,
}

/// A handle to the encoder's thread.
#[derive(Clone)]
pub struct Waker {
    shared: Arc<Shared>,
    thread: Thread,
}

impl Waker {
    /// Records were committed, and the ring is so full. An encoder that has some already need not know of each.
    pub fn committed(&self, ring_permille: u64) {
        let least = if ring_permille > LOOK_ABOVE_PERMILLE { rest::TIME } else { rest::ANYTHING };
        self.wake_if(least);
    }

    /// The sender has taken a frame, or there is something else to look at.
    pub fn wake(&self) {
        self.wake_if(rest::SENDER);
    }

    /// Answers wait for what it makes, or no longer: then small frames follow each other at once.
    pub fn hurry(&self, hurry: bool) {
        self.shared.hurry.store(hurry, Ordering::Relaxed);
        self.wake_if(rest::TIME);
    }

    /// Wakes it if it waits for so much, or for less.
    fn wake_if(&self, least: u8) {
        // With the one in `wait`: either the encoder sees what has changed, or it is seen to wait.
        fence(Ordering::SeqCst);
        if self.shared.waits_for.load(Ordering::Relaxed) >= least
            && self.shared.waits_for.swap(rest::NONE, Ordering::AcqRel) != rest::NONE
        {
            self.thread.unpark();
        }
    }

    /// Asks the encoder to end when the ring is drained.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        self.thread.unpark();
    }

    /// The next frame opens a new term. To be called while the ring is drained.
    pub fn set_place(&self, place: Place) {
        self.shared.set_place(place);
    }

    /// The counters.
    pub fn counters(&self) -> EncoderCounters {
        EncoderCounters {
            frames: self.shared.frames.load(Ordering::Relaxed),
            raw_bytes: self.shared.raw_bytes.load(Ordering::Relaxed),
            frame_bytes: self.shared.frame_bytes.load(Ordering::Relaxed),
        }
    }
}

/// Starts the encoder of a group.
///
/// # Errors
/// The thread cannot be started.
pub fn start(
    group: GroupId,
    place: Place,
    ring: RingReader,
    outbox: Arc<Outbox>,
    clock: JournalClock,
    compression: Compression,
    carriers: Arc<Carriers>,
) -> std::io::Result<(Waker, JoinHandle<()>)> {
    let mut encoder = Encoder::new(group, place, ring, outbox, clock, compression);
    encoder.pace = carriers.pace().clone();
    let shared = encoder.shared.clone();
    let handle = std::thread::Builder::new().name("tm-encoder".into()).spawn(move || {
        carriers.join();
        encoder.run();
    })?;
    Ok((Waker { shared, thread: handle.thread().clone() }, handle))
}

/// The encoder itself; [`start`] gives it a thread.
pub struct Encoder {
    group: GroupId,
    place: Place,
    ring: RingReader,
    outbox: Arc<Outbox>,
    clock: JournalClock,
    compression: Compression,
    /// The records taken from the ring, where their payloads stay until they are encoded.
    plan: FramePlan,
    writer: FrameWriter,
    pace: Arc<Pace>,
    /// Time on the boot clock of the last frame.
    framed_ns: u64,
    /// Its raw bytes, and the time since the one before it.
    framed: (u64, u64),
    /// Time on the boot clock at which the next frame may be closed that is not worth it.
    not_before_ns: u64,
    shared: Arc<Shared>,
}

/// What a turn of the encoder has come to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Turn {
    /// A frame is made.
    Framed,
    /// The next frame is not worth it yet; after this time it is to be looked at again.
    Rest(Duration),
    /// The sender has something to send still; so is it then.
    Busy(Duration),
    /// There is nothing to do now.
    Idle,
    /// The outbox is closed, or a stop was asked for and nothing is left.
    Ended,
}

impl Encoder {
    /// Goes on at `place`.
    pub fn new(
        group: GroupId,
        place: Place,
        ring: RingReader,
        outbox: Arc<Outbox>,
        clock: JournalClock,
        compression: Compression,
    ) -> Encoder {
        let frame_bytes_max = usize::try_from(outbox.frame_bytes_max()).unwrap_or(usize::MAX);
        let shared = Arc::new(Shared {
            waits_for: AtomicU8::new(rest::NONE),
            stop: AtomicBool::new(false),
            hurry: AtomicBool::new(false),
            frames: AtomicU64::new(0),
            raw_bytes: AtomicU64::new(0),
            frame_bytes: AtomicU64::new(0),
            next_place: Mutex::new(None),
        });
        Encoder {
            group,
            place,
            ring,
            outbox,
            clock,
            compression,
            plan: FramePlan::of_at_most(frame_bytes_max),
            writer: FrameWriter::new(compression),
            pace: Arc::default(),
            framed_ns: 0,
            framed: (0, 0),
            not_before_ns: 0,
            shared,
        }
    }

    fn run(&mut self) {
        loop {
            match self.turn() {
                Turn::Framed => {}
                Turn::Rest(rest) => self.wait(rest::TIME, rest),
                Turn::Busy(rest) => self.wait(rest::SENDER, rest),
                Turn::Idle => self.wait(rest::ANYTHING, Duration::from_millis(100)),
                Turn::Ended => return,
            }
        }
    }

    /// Takes what is committed, and closes a frame if it is time for that. Waits for room in the
    /// outbox if there is none.
    pub fn turn(&mut self) -> Turn {
        let full = self.fill();
        let stopping = self.shared.stop.load(Ordering::Acquire);
        let hurry = stopping || self.shared.hurry.load(Ordering::Relaxed);
        // The clock that all groups have in common.
        let now_ns = since_boot().as_nanos() as u64;
        let worth = full || self.plan.raw_bytes() >= WORTH_RAW_BYTES;
        if !worth && !hurry && now_ns < self.not_before_ns {
            let rest_ns = self.fills_in_ns(WORTH_RAW_BYTES, now_ns).max(LOOK_NS);
            return Turn::Rest(Duration::from_nanos(rest_ns.min(self.not_before_ns - now_ns)));
        }
        let Some(first) = self.plan.first() else {
            return if stopping { Turn::Ended } else { Turn::Idle };
        };
        let old = self.clock.now_ns().saturating_sub(first.time_ns) >= OPEN_NS_MAX;
        if !full && !stopping && !old && self.outbox.unsent() > 0 {
            let look_ns = self.fills_in_ns(FRAME_RAW_BYTES, now_ns);
            return Turn::Busy(Duration::from_nanos(look_ns.clamp(LOOK_NS, LOOK_NS_MAX)));
        }
        self.framed = (self.plan.raw_bytes(), now_ns.saturating_sub(self.framed_ns));
        self.framed_ns = now_ns;
        self.not_before_ns = self.pace.next_ns(now_ns);
        if self.finish() { Turn::Framed } else { Turn::Ended }
    }

    /// Half of the time after which the frame will have so many raw bytes, at the rate at which records have come since
    /// the last, or else before that.
    fn fills_in_ns(&self, raw_bytes: u64, now_ns: u64) -> u64 {
        let has_bytes = self.plan.raw_bytes();
        let (came_bytes, in_ns) = match has_bytes {
            0 => self.framed,
            _ => (has_bytes, now_ns.saturating_sub(self.framed_ns)),
        };
        let missing = u128::from(raw_bytes.saturating_sub(has_bytes));
        let ns = u128::from(in_ns) * missing / u128::from(came_bytes.max(1)) / 2;
        u64::try_from(ns).unwrap_or(u64::MAX)
    }

    /// Takes what is committed. Whether a frame of it would not have to wait for room.
    #[cfg(feature = "simulation")]
    pub fn has_room(&mut self) -> bool {
        self.fill();
        self.outbox.has_room(self.plan.frame_bytes_max() as u64)
    }

    /// The next frame opens a new term. To be called while the ring is drained.
    #[cfg(feature = "simulation")]
    pub fn set_place(&self, place: Place) {
        self.shared.set_place(place);
    }

    /// Takes committed records. True when there are as many as a frame should get.
    fn fill(&mut self) -> bool {
        loop {
            let plan = &mut self.plan;
            if plan.raw_bytes() >= FRAME_RAW_BYTES {
                return true;
            }
            let mut full = false;
            let took = self.ring.take(|record, _| {
                full = !plan.fits(record);
                if !full {
                    plan.push(record);
                }
                !full
            });
            if full || !took {
                return full;
            }
        }
    }

    /// Writes the frame into the outbox. False once that is closed.
    fn finish(&mut self) -> bool {
        let next = self.shared.next_place.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(place) = next {
            self.place = place;
        }
        let Encoder { plan, writer, ring, outbox, .. } = self;
        let time_ns = plan.first().expect("a frame has a first record").time_ns;
        let (last, raw_bytes) = (plan.last_seq(), plan.raw_bytes());
        // The wall clock first: should this thread be held up between the two, records look older
        // than they are, and what was acknowledged before a time is in the point of that time.
        let wall_ns = wall_ns();
        let age_ns = self.clock.now_ns().saturating_sub(time_ns);
        let Place { term, before } = self.place;
        let about = FrameMeta {
            group: self.group,
            term,
            before,
            wall_ns: wall_ns.saturating_sub(i64::try_from(age_ns).unwrap_or(0)),
        };
        let facts = FrameFacts { before, last, term, time_ns, raw_bytes };
        let pushed = outbox.push(plan.frame_bytes_max() as u64, &facts, |out| {
            writer.write(plan, &about, ring.payloads(), out)
        });
        // Else the records stay in the ring, for the agent that goes on with it.
        let Some(bytes) = pushed else { return false };
        plan.clear();
        ring.encoded();
        self.shared.frames.fetch_add(1, Ordering::Relaxed);
        self.shared.raw_bytes.fetch_add(raw_bytes, Ordering::Relaxed);
        self.shared.frame_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.place.before = Position { term, seq: last };
        self.adapt();
        true
    }

    fn adapt(&mut self) {
        let hurry = self.outbox.backlog().fill_permille > HURRY_ABOVE_PERMILLE;
        let wanted = match self.compression {
            Compression::Zstd(_) if hurry => Compression::Zstd(FASTEST),
            usual => usual,
        };
        if self.writer.compression() != wanted {
            self.writer.set_compression(wanted);
        }
    }

    /// Waits for something, for so long at most.
    fn wait(&mut self, waits_for: u8, at_most: Duration) {
        self.shared.waits_for.store(waits_for, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let go = match waits_for {
            rest::ANYTHING => self.ring.has_more(),
            rest::SENDER => self.outbox.unsent() == 0,
            _ => self.shared.hurry.load(Ordering::Relaxed),
        };
        if !go && !self.shared.stop.load(Ordering::Acquire) {
            std::thread::park_timeout(at_most);
        }
        self.shared.waits_for.store(rest::NONE, Ordering::Release);
    }
}
