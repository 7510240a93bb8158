//! The capture core: requests in, effects out.

pub mod answers;
mod flushes;
mod inherited;
mod order;
mod sync;
mod writes;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use tidemark_journal::{GapReason, Seq, VolumeId};

pub use self::writes::WIDE_REGIONS_MAX;
use self::{
    answers::Answers,
    flushes::{Epoch, FlushBy, Flushing},
    inherited::{Failed, RedoOp},
    writes::{RequestState, WriteOp},
};
use super::{
    Effect, OpId, RequestId,
    catchup::CatchUp,
    gap::Gap,
    range_lock::{LockId, RangeLock},
    ring::{RingMemory, RingWriter},
    slab::Slab,
};
use crate::{
    dirty::map::DirtyMap,
    kernel::memfd::Region,
    lease::{Peer, SyncMode},
};

/// The ring's fill, in thousandths, below which capture resumes after an overflow.
const RESUME_BELOW_PERMILLE: u64 = 500;

/// A volume as the core starts with it.
#[derive(Clone, Copy, Debug)]
pub struct VolumeStart {
    /// Its number.
    pub id: VolumeId,
    /// Its size.
    pub sectors: u64,
    /// A gap it is in from the start.
    pub gap: Option<Gap>,
}

pub(super) struct Volume {
    pub id: VolumeId,
    pub sectors: u64,
    pub lock: RangeLock,
    pub gap: Option<Gap>,
    /// Flushes under way, and those that ended before an earlier one, in the order of their beginning.
    pub flushing: VecDeque<Flushing>,
    /// What the disk did not give when it was to be compared or sent: first sectors, and how many from each.
    pub unreadable: BTreeMap<u64, u64>,
}

/// Counters that only grow, and a few that say how things stand. Units are in the names.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Counters {
    /// Writes, zeroes and discards that have a record.
    pub captured: u64,
    /// Their payload bytes.
    pub captured_bytes: u64,
    /// Those that have none.
    pub uncaptured: u64,
    /// Times the ring was found full.
    pub overflows: u64,
    /// Local writes that failed.
    pub local_errors: u64,
    /// Bytes read by catch-up and verify.
    pub catch_up_read_bytes: u64,
    /// Blocks of 4 KiB that verify found to differ.
    pub verify_differing_blocks: u64,
}

pub(super) enum Op {
    Write(WriteOp),
    Flush { by: FlushBy, volume: usize },
    Read(super::catchup::ReadOp),
    Redo(RedoOp),
}

/// The capture state of a group.
pub struct Core {
    pub(super) volumes: Vec<Volume>,
    pub(super) map: DirtyMap,
    pub(super) ring: RingWriter,
    pub(super) ops: Slab<Op>,
    requests: Slab<RequestState>,
    /// Parts that wait for a commit, by the first region that was not ready.
    map_waiters: VecDeque<OpId>,
    wide: usize,
    wide_waiters: VecDeque<u32>,
    pub(super) effects: VecDeque<Effect>,
    last_seq: Seq,
    ceiling: Seq,
    asked_ceiling: Seq,
    pub(super) now_ns: u64,
    durable: Seq,
    /// Everything up to here is final-durable or lies in the spool, and the state says so durably.
    covered: Seq,
    pub(super) overflow: bool,
    pub(super) catch_up: CatchUp,
    pub(super) counters: Counters,
    /// The epoch of dirty bits that is being settled.
    epoch: Option<Epoch>,
    doubt: bool,
    /// What had ended when the flushes of a stop were begun.
    stop_flushed: Option<u64>,
    stop_flush_failed: bool,
    granted: Vec<LockId>,
    /// Writes that the local disk refused, until that is durably marked.
    failed: Vec<Failed>,
    sync: SyncMode,
    /// The other end of the link.
    peer: Peer,
    /// Answers that wait for the target.
    answers: Answers<(RequestId, Result<(), i32>)>,
}

impl Core {
    /// Starts after `last_seq`, with sequences reserved up to `ceiling`.
    pub fn new(
        volumes: &[VolumeStart],
        map: DirtyMap,
        ring: RingWriter,
        last_seq: Seq,
        ceiling: Seq,
    ) -> Core {
        let volumes: Vec<Volume> = volumes
            .iter()
            .map(|start| Volume {
                id: start.id,
                sectors: start.sectors,
                lock: RangeLock::default(),
                gap: start.gap,
                flushing: VecDeque::new(),
                unreadable: BTreeMap::new(),
            })
            .collect();
        for (index, volume) in volumes.iter().enumerate() {
            ring.memory().set_gap(index, volume.gap);
        }
        Core {
            catch_up: CatchUp::new(volumes.len()),
            volumes,
            map,
            ring,
            ops: Slab::with_capacity(1024),
            requests: Slab::with_capacity(1024),
            map_waiters: VecDeque::with_capacity(1024),
            wide: 0,
            wide_waiters: VecDeque::new(),
            effects: VecDeque::with_capacity(1024),
            last_seq,
            ceiling,
            asked_ceiling: ceiling,
            now_ns: 0,
            durable: Seq::ZERO,
            covered: Seq::ZERO,
            overflow: false,
            counters: Counters::default(),
            epoch: None,
            doubt: false,
            stop_flushed: None,
            stop_flush_failed: false,
            granted: Vec::with_capacity(64),
            failed: Vec::new(),
            sync: SyncMode::new(None, None, 0),
            peer: Peer::Away,
            answers: Answers::with_capacity(1024),
        }
    }

    /// Sets journal time for what follows. Time never goes back.
    pub fn set_now(&mut self, now_ns: u64) {
        self.now_ns = self.now_ns.max(now_ns);
    }

    /// The next thing to do.
    pub fn effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// A commit of the dirty map is on stable storage.
    pub fn map_committed(&mut self) {
        self.map.commit_written();
        self.failures_marked();
        for _ in 0..self.map_waiters.len() {
            if let Some(op) = self.map_waiters.pop_front() {
                self.admit(op);
            }
        }
    }

    /// Everything up to `seq` is durable at the final target.
    pub fn final_durable(&mut self, seq: Seq) {
        self.durable = self.durable.max(seq);
    }

    /// Everything up to `acked` is final-durable, everything up to `spooled` is so or lies in the spool, and
    /// the state says so durably: regions without later writes need no mark.
    ///
    /// Without the state's word a target that has lost what it acknowledged could not be told from one that
    /// never had it, and nothing would say that the region has to be sent again.
    pub fn noted(&mut self, acked: Seq, spooled: Seq) {
        self.covered = self.covered.max(acked).max(spooled);
    }

    /// Whether something is final-durable of which the state does not say so yet.
    pub fn awaits_note(&self) -> bool {
        self.covered < self.durable
    }

    /// Sequences up to `seq` are durably reserved.
    pub fn ceiling_reserved(&mut self, seq: Seq) {
        self.ceiling = self.ceiling.max(seq);
    }

    /// Does what can be done after a batch of calls: begins the next commit, ends an overflow,
    /// goes on with catch-up. Call it once per turn of the engine's loop.
    pub fn poll(&mut self) {
        self.ring.collect();
        self.reserve_ahead();
        if self.overflow && !self.doubt && self.ring.fill_permille() < RESUME_BELOW_PERMILLE {
            self.record_owed_gaps();
            self.overflow = self.owes_gaps() || !self.can_draw(0, false);
        }
        if !self.overflow {
            self.record_owed_gaps();
        }
        self.poll_catch_up();
        self.poll_epoch();
        self.poll_sync();
        self.begin_commit();
    }

    fn begin_commit(&mut self) {
        if let Some(commit) = self.map.begin_commit(self.covered) {
            self.effects.push_back(Effect::CommitMap(commit));
        }
    }

    /// The memory that payloads of slots lie in.
    pub fn ring_region(&self) -> Arc<Region> {
        self.ring.memory().region().clone()
    }

    /// The ring's memory.
    pub fn ring_memory(&self) -> &Arc<RingMemory> {
        self.ring.memory()
    }

    pub(super) fn set_gap(&mut self, volume: usize, gap: Option<Gap>) {
        self.volumes[volume].gap = gap;
        self.ring.memory().set_gap(volume, gap);
    }

    pub(super) fn volume_index(&self, id: VolumeId) -> usize {
        self.volumes.iter().position(|volume| volume.id == id).expect("a volume of this group")
    }

    /// The last sequence drawn.
    pub fn last_seq(&self) -> Seq {
        self.last_seq
    }

    /// Keeps catch-up and verify from reading more, while so much waits for the link already.
    pub fn hold_catch_up(&mut self, held: bool) {
        self.catch_up.hold(held);
    }

    /// Sequences up to here are durably reserved.
    pub fn ceiling(&self) -> Seq {
        self.ceiling
    }

    /// The highest sequence known to be final-durable.
    pub fn durable(&self) -> Seq {
        self.durable
    }

    /// The position up to which the journal tells the whole truth now: none during an overflow.
    pub fn vouched(&self) -> Option<Seq> {
        (!self.overflow && !self.owes_gaps()).then_some(self.last_seq)
    }

    /// Whether no request and no read is under way.
    pub fn is_idle(&self) -> bool {
        self.ops.len() == 0
            && self.requests.len() == 0
            && self.answers.is_empty()
            && self.effects.is_empty()
    }

    /// The gap a volume is in.
    pub fn gap(&self, volume: VolumeId) -> Option<GapReason> {
        self.volumes[self.volume_index(volume)].gap.map(|gap| gap.reason)
    }

    /// Whether writes are being let through without a record.
    pub fn is_overflowing(&self) -> bool {
        self.overflow
    }

    /// How full the ring is, in thousandths.
    pub fn ring_fill_permille(&self) -> u64 {
        self.ring.fill_permille()
    }

    /// Whether the encoder has taken every record.
    pub fn is_drained(&self) -> bool {
        self.ring.is_drained()
    }

    /// The dirty map.
    pub fn map(&self) -> &DirtyMap {
        &self.map
    }

    /// The dirty map, for a stop: everything is settled through it.
    pub fn map_mut(&mut self) -> &mut DirtyMap {
        &mut self.map
    }

    /// The counters.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// The request that a part belongs to; none for the core's own work. For errors in logs.
    pub fn request_of(&self, op: OpId) -> Option<RequestId> {
        match self.ops.get(op.0) {
            Op::Write(WriteOp { request, .. })
            | Op::Flush { by: FlushBy::Request(request), .. } => {
                Some(self.requests.get(*request).request.id)
            }
            _ => None,
        }
    }
}
