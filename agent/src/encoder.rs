//! The encoder: takes captured records out of the ring, in order, and makes frames of them.
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

use tidemark_journal::{Compression, FrameBuilder, FrameMeta, GroupId, Position, Record, TermId};

use crate::{
    capture::ring::RingReader,
    carriers::Carriers,
    clock::{JournalClock, since_boot, wall_ns},
    outbox::{FrameFacts, Outbox},
};

/// Raw bytes at which a frame is closed though the sender is busy.
const FRAME_RAW_BYTES: u64 = 1 << 20;
/// Raw bytes that are worth a frame when the sender has nothing to send.
const WORTH_RAW_BYTES: u64 = 128 << 10;
/// How often it looks, before a small frame may be made, whether a frame is worth it: four times at least.
const LOOK_NS: u64 = 4_000_000;
const LOOKS: u64 = 4;
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
    /// Nothing: it works, or looks again by itself.
    pub const NONE: u8 = 0;
    /// That a frame is asked for: it has records, which wait for the sender.
    pub const SENDER: u8 = 1;
    /// Anything.
    pub const ANYTHING: u8 = 2;
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
    /// Records were committed. That alone wakes no encoder that has some and waits for the sender.
    pub fn committed(&self) {
        // With the one in `sleep`: either the encoder sees the record, or it is seen to wait.
        fence(Ordering::SeqCst);
        if self.shared.waits_for.load(Ordering::Relaxed) == rest::ANYTHING {
            self.wake();
        }
    }

    /// The sender has taken a frame, or there is something else to look at.
    pub fn wake(&self) {
        if self.shared.waits_for.swap(rest::NONE, Ordering::AcqRel) != rest::NONE {
            self.thread.unpark();
        }
    }

    /// Answers wait for what it makes, or no longer: then small frames follow each other at once.
    pub fn hurry(&self, hurry: bool) {
        self.shared.hurry.store(hurry, Ordering::Relaxed);
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
    builder: FrameBuilder,
    first: Option<Record>,
    pace: Arc<Pace>,
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
        let shared = Arc::new(Shared {
            waits_for: AtomicU8::new(rest::NONE),
            stop: AtomicBool::new(false),
            hurry: AtomicBool::new(false),
            frames: AtomicU64::new(0),
            raw_bytes: AtomicU64::new(0),
            frame_bytes: AtomicU64::new(0),
            next_place: Mutex::new(None),
        });
        let builder = FrameBuilder::new(compression);
        Encoder {
            group,
            place,
            ring,
            outbox,
            clock,
            compression,
            builder,
            first: None,
            pace: Arc::default(),
            not_before_ns: 0,
            shared,
        }
    }

    fn run(&mut self) {
        loop {
            match self.turn() {
                Turn::Framed => {}
                // Nobody has to wake it for what comes meanwhile.
                Turn::Rest(rest) => std::thread::sleep(rest),
                Turn::Idle => self.sleep(),
                Turn::Ended => return,
            }
        }
    }

    /// Takes what is committed, and closes a frame if it is time for that. Waits for room in the
    /// outbox if there is none.
    pub fn turn(&mut self) -> Turn {
        let full = self.fill();
        let stopping = self.shared.stop.load(Ordering::Acquire);
        let now_ns = self.clock.now_ns();
        let old =
            self.first.is_some_and(|first| now_ns.saturating_sub(first.time_ns) >= OPEN_NS_MAX);
        let ready = full || stopping || old || self.outbox.unsent() == 0;
        if !self.builder.is_empty() && ready {
            let hurry = stopping || self.shared.hurry.load(Ordering::Relaxed);
            let worth = full || self.builder.raw_bytes() >= WORTH_RAW_BYTES;
            // The clock that all groups have in common.
            let now_ns = since_boot().as_nanos() as u64;
            if !worth && !hurry && now_ns < self.not_before_ns {
                let left_ns = self.not_before_ns - now_ns;
                let rest_ns = left_ns.min(LOOK_NS.max(left_ns / LOOKS));
                return Turn::Rest(Duration::from_nanos(rest_ns));
            }
            self.not_before_ns = self.pace.next_ns(now_ns);
            if self.finish() { Turn::Framed } else { Turn::Ended }
        } else if stopping {
            Turn::Ended
        } else {
            Turn::Idle
        }
    }

    /// The next frame opens a new term. To be called while the ring is drained.
    #[cfg(feature = "simulation")]
    pub fn set_place(&self, place: Place) {
        self.shared.set_place(place);
    }

    /// Moves committed records into the builder. True when it is as full as it should get.
    fn fill(&mut self) -> bool {
        loop {
            let (builder, first) = (&mut self.builder, &mut self.first);
            if builder.raw_bytes() >= FRAME_RAW_BYTES {
                return true;
            }
            let mut full = false;
            let took = self.ring.take(|record, payload| {
                full = !builder.fits(record);
                if !full {
                    first.get_or_insert(*record);
                    builder.push(record, [payload]);
                }
                !full
            });
            if full || !took {
                return full;
            }
        }
    }

    /// Closes the frame and puts it into the outbox. False once that is closed.
    fn finish(&mut self) -> bool {
        let next = self.shared.next_place.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(place) = next {
            self.place = place;
        }
        let first = self.first.take().expect("a frame has a first record");
        // The wall clock first: should this thread be held up between the two, records look older
        // than they are, and what was acknowledged before a time is in the point of that time.
        let wall_ns = wall_ns();
        let age_ns = self.clock.now_ns().saturating_sub(first.time_ns);
        let about = FrameMeta {
            group: self.group,
            term: self.place.term,
            before: self.place.before,
            wall_ns: wall_ns.saturating_sub(i64::try_from(age_ns).unwrap_or(0)),
        };
        let frame = self.builder.finish(&about);
        let (last, raw_bytes) = (frame.last, frame.raw_bytes);
        let (bytes, before) = (frame.frame_bytes() as u64, self.place.before);
        let term = self.place.term;
        let facts = FrameFacts { before, last, term, time_ns: first.time_ns, raw_bytes };
        if !self.outbox.push([frame.meta, frame.payload], &facts) {
            // The records stay in the ring, for the agent that goes on with it.
            return false;
        }
        self.shared.frames.fetch_add(1, Ordering::Relaxed);
        self.shared.raw_bytes.fetch_add(raw_bytes, Ordering::Relaxed);
        self.shared.frame_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.builder.clear();
        self.ring.encoded();
        self.place.before = Position { term: self.place.term, seq: last };
        self.adapt();
        true
    }

    fn adapt(&mut self) {
        let hurry = self.outbox.backlog().fill_permille > HURRY_ABOVE_PERMILLE;
        let wanted = match self.compression {
            Compression::Zstd(_) if hurry => Compression::Zstd(FASTEST),
            usual => usual,
        };
        if self.builder.compression() != wanted {
            self.builder.set_compression(wanted);
        }
    }

    fn sleep(&mut self) {
        let has_some = !self.builder.is_empty();
        // Nobody has to wake it for each record that comes while the sender is busy.
        let (waits_for, at_most) = if has_some {
            (rest::SENDER, Duration::from_nanos(LOOK_NS))
        } else {
            (rest::ANYTHING, Duration::from_millis(100))
        };
        self.shared.waits_for.store(waits_for, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let go = if has_some { self.outbox.unsent() == 0 } else { self.ring.has_more() };
        if !go && !self.shared.stop.load(Ordering::Acquire) {
            std::thread::park_timeout(at_most);
        }
        self.shared.waits_for.store(rest::NONE, Ordering::Release);
    }
}
