//! The engine: one thread per group that carries out what the capture core decides.
//!
//! One io_uring carries the ublk queues of all the group's devices, the reads and writes of the
//! backing disks, and a wake-up for requests that come from other threads (NBD fronts, the link,
//! the state keeper). The loop: wait, take completions and commands, let the core think, carry out
//! its effects.

mod buffers;
pub mod course;
mod effects;
mod hasher;
mod requests;
mod run;
mod ublk;

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::Duration,
};

use tidemark_journal::{Ancestry, GapReason, Position, Sector, Seq, VolumeId};
use tidemark_link::message::RegionRun;
use tokio::sync::oneshot;

use self::course::AfterDoubt;
use crate::{
    capture::{
        catchup::Mode,
        core::{Core, Counters},
    },
    carriers::Carriers,
    clock::JournalClock,
    encoder, kernel,
    kernel::blockdev::Backing,
    lease::{Peer, View},
    outbox::Outbox,
    state::keeper::{Done, Keeper},
};

pub use hasher::{Seen, digest};
pub use requests::{Answer, FrontAsk, FrontRequest};
pub use ublk::UblkQueue;

/// The most bytes that one read of a front may ask for.
pub const READ_BYTES_MAX: u64 = buffers::Pool::bytes_max();

/// What the engine is told by other threads.
pub enum Command {
    /// A request from a front.
    Request(FrontRequest),
    /// The state keeper has finished something.
    Kept(Done),
    /// The hasher has looked for or at content for catch-up.
    Seen(Seen),
    /// Everything up to here is final-durable.
    Durable(Seq),
    /// Everything up to here is final-durable or lies in the spool, unless the outbox has dropped
    /// everything since it counted so often.
    Spooled(Position, u64),
    /// Note durably what is final-durable.
    Settle,
    /// The link is up (and how content goes over it) or down.
    Link(Option<Mode>),
    /// Who is at the other end of the link.
    Peer(Peer),
    /// The target asks for a lease: to be told if it may hold one, and for how long.
    LeaseAsk(Box<dyn FnOnce(Duration) + Send>),
    /// The target's answer to an offer: a bit for each block of 4 KiB.
    Needed(Seq, [u8; 32]),
    /// Set a mark.
    Mark(String, oneshot::Sender<Result<Seq, String>>),
    /// Compare a volume, or all.
    Verify(Option<VolumeId>),
    /// Go on with the comparison of a volume that had reached this region.
    VerifyFrom(VolumeId, u32),
    /// Compare these regions: the target has lost what it had of them.
    Repair(Vec<RegionRun>),
    /// The two sides' memories disagree.
    Doubt(AfterDoubt),
    /// Say how things stand now.
    Report(oneshot::Sender<Snapshot>),
    /// Serve a ublk device.
    Serve(UblkQueue),
    /// End when everything captured is final-durable, or at once; answers whether it was clean.
    Stop {
        /// Do not wait for the target.
        at_once: bool,
        /// The answer.
        done: oneshot::Sender<bool>,
    },
}

/// The way to a running engine. Cheap to clone.
#[derive(Clone)]
pub struct Engine {
    commands: mpsc::Sender<Command>,
    waker: kernel::uring::Waker,
    closer: kernel::uring::Closer,
    pending: Arc<AtomicBool>,
    state: Arc<Mutex<Snapshot>>,
}

impl Engine {
    /// Hands a command over. False if the engine has ended.
    pub fn tell(&self, command: Command) -> bool {
        let sent = self.commands.send(command).is_ok();
        if !self.pending.swap(true, Ordering::AcqRel) {
            self.waker.wake();
        }
        sent
    }

    /// How things stand, after all that was handed over before. None if the engine has ended.
    pub async fn report(&self) -> Option<Snapshot> {
        let (answer, report) = oneshot::channel();
        self.tell(Command::Report(answer));
        report.await.ok()
    }

    /// Lets go of the devices, when the engine has ended and its thread has been joined: only then can
    /// another engine take them.
    pub fn release(&self) {
        self.closer.close();
    }

    /// How things stood a moment ago.
    pub fn snapshot(&self) -> Snapshot {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// How an engine stands.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Counters.
    pub counters: Counters,
    /// The last sequence drawn.
    pub last_seq: Seq,
    /// The position up to which everything is captured, unless writes pass uncaptured now.
    pub vouched: Option<Seq>,
    /// The highest sequence known to be final-durable.
    pub durable: Seq,
    /// Sequences up to here are durably reserved.
    pub ceiling: Seq,
    /// How full the ring is, in thousandths.
    pub ring_fill_permille: u64,
    /// Whether writes are being let through without a record.
    pub overflow: bool,
    /// Regions active, and regions dirty.
    pub active_regions: u64,
    /// See above.
    pub dirty_regions: u64,
    /// Journal time of this snapshot, nanoseconds.
    pub journal_ns: u64,
    /// Wall clock at that time, nanoseconds since 1970.
    pub wall_ns: i64,
    /// Whether the state disk has failed.
    pub tracking_lost: Option<String>,
    /// Why the two sides' memories last disagreed, if they did.
    pub doubted: Option<String>,
    /// Requests of applications under way.
    pub requests: u64,
    /// Writes of an earlier process that are still being carried out again.
    pub redone_writes_left: u64,
    /// How sync mode stands.
    pub sync: View,
    /// Answers that wait for the target.
    pub answers_waiting: u64,
    /// For each volume.
    pub volumes: Vec<VolumeSnapshot>,
}

/// How a volume stands.
#[derive(Clone, Debug)]
pub struct VolumeSnapshot {
    /// The volume.
    pub id: VolumeId,
    /// The gap it is in.
    pub gap: Option<GapReason>,
    /// Regions still to be caught up.
    pub uncaptured_regions: u32,
    /// Sectors that the disk last did not give, and the first of them.
    pub unreadable: Option<(u64, Sector)>,
    /// Regions in all.
    pub regions: u32,
    /// A verify's progress: regions compared, regions in all.
    pub verify: Option<(u32, u32)>,
    /// The first region that a verify under way may not have compared.
    pub verify_reached: Option<u32>,
}

/// A volume as the engine serves it.
pub struct EngineVolume {
    /// Its number.
    pub id: VolumeId,
    /// The disk below.
    pub backing: Arc<Backing>,
    /// Its size.
    pub sectors: u64,
}

/// What an engine is made of.
pub struct Parts {
    /// The capture core.
    pub core: Core,
    /// The volumes, in the core's order.
    pub volumes: Vec<EngineVolume>,
    /// Journal time.
    pub clock: JournalClock,
    /// The encoder, to be woken.
    pub encoder: encoder::Waker,
    /// Told how full the ring is.
    pub carriers: Arc<Carriers>,
    /// The encoded frames, for a doubt.
    pub outbox: Arc<Outbox>,
    /// The path of terms.
    pub ancestry: Ancestry,
    /// The most bytes a second that catch-up reads.
    pub catch_up_bytes_per_s: Option<u64>,
    /// Told when a new term was begun, and up to where its sequences are reserved: the link greets
    /// anew.
    pub on_term: Box<dyn Fn(Ancestry, Seq) + Send>,
}

/// Starts an engine. `make_keeper` gets the way to answer it.
///
/// # Errors
/// No io_uring, no memory, no thread, or the keeper does not start. Then the thread has ended.
pub fn start(
    parts: Parts,
    make_keeper: impl FnOnce(Box<dyn Fn(Done) + Send>) -> std::io::Result<Keeper> + Send + 'static,
) -> anyhow::Result<(Engine, JoinHandle<()>)> {
    let (commands, inbox) = mpsc::channel();
    let (ready, started) = mpsc::channel();
    let handle =
        std::thread::Builder::new().name("tm-engine".into()).spawn(
            move || match run::Loop::new(parts, commands, inbox, make_keeper) {
                Ok((engine, mut work)) => {
                    let _ = ready.send(Ok(engine));
                    work.run();
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            },
        )?;
    let error = match started.recv() {
        Ok(Ok(engine)) => return Ok((engine, handle)),
        Ok(Err(error)) => error,
        Err(ended) => ended.into(),
    };
    // A panic there has been reported already.
    let _ = handle.join();
    Err(error)
}

/// A range of a volume, in sectors, that a front has checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First sector.
    pub start: Sector,
    /// Sectors.
    pub sectors: u64,
}
