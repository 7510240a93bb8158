//! The capture core: requests in, effects out.

use std::{collections::VecDeque, sync::Arc};

use tidemark_journal::{GapReason, Kind, Record, Sector, Seq, VolumeId, record::flag};

use super::{
    Ask, Effect, LocalIo, OpId, Payload, Request, RequestId,
    catchup::CatchUp,
    gap::Gap,
    range_lock::{LockId, RangeLock},
    ring::{RingWriter, SlotRef},
    slab::Slab,
};
use crate::{
    dirty::{REGION_SECTORS, RegionId, map::DirtyMap},
    kernel::memfd::Region,
};

/// The most regions that one part of a wide request covers, and the most such parts at once:
/// together a quarter of the active set.
const WIDE_REGIONS: u64 = 64;
const WIDE_AT_ONCE: usize = 16;
/// Sequences reserved ahead of use in one go, and the remainder at which the next are asked for.
const RESERVE_AHEAD: u64 = 1 << 24;
const RESERVE_LOW: u64 = 1 << 23;
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
    pub gap: Option<GapReason>,
}

pub(super) struct Volume {
    pub id: VolumeId,
    pub sectors: u64,
    pub lock: RangeLock,
    pub gap: Option<Gap>,
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

pub(super) struct RequestState {
    request: Request,
    /// First sector not yet made into a part.
    next: Sector,
    parts: u32,
    result: Result<(), i32>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// Waits for its range.
    Lock,
    /// Holds its range and waits for a commit of the map.
    Map,
    /// The payload is being copied.
    Copy,
    /// On the local disk.
    Local,
}

#[derive(Clone, Debug)]
pub(super) struct WriteOp {
    request: u32,
    volume: usize,
    ask: Ask,
    start: Sector,
    sectors: u64,
    /// Byte of the request's payload.
    offset: u64,
    stage: Stage,
    /// Regions held in the active set, counted from the first.
    held: u64,
    slot: Option<(SlotRef, Seq)>,
}

pub(super) enum Op {
    Write(WriteOp),
    Flush { by: FlushBy, volume: usize, tick: u64 },
    Read(super::catchup::ReadOp),
}

#[derive(Clone, Copy)]
pub(super) enum FlushBy {
    Request(u32),
    /// The epoch that is being settled.
    Epoch,
    /// A clean stop.
    Stop,
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
    now_ns: u64,
    durable: Seq,
    pub(super) overflow: bool,
    pub(super) catch_up: CatchUp,
    pub(super) counters: Counters,
    /// The epoch of dirty bits that is being settled.
    epoch: Option<Epoch>,
    doubt: bool,
    stop_flushed: bool,
    granted: Vec<LockId>,
}

struct Epoch {
    flushes_left: usize,
    begun: bool,
    /// A flush failed; they are asked for again by [`Core::maintain`].
    failed: bool,
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
                gap: start.gap.map(Gap::owed),
            })
            .collect();
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
            overflow: false,
            counters: Counters::default(),
            epoch: None,
            doubt: false,
            stop_flushed: false,
            granted: Vec::with_capacity(64),
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

    /// Takes a request from a front. Its parts are admitted in order, before any later request.
    ///
    /// # Panics
    /// When the range is empty or beyond the volume's end; the front checks that.
    pub fn submit(&mut self, request: Request) {
        let volume = self.volume_index(request.volume);
        let state = RequestState { request, next: request.start, parts: 0, result: Ok(()) };
        let id = self.requests.insert(state);
        if request.ask == Ask::Flush {
            self.requests.get_mut(id).parts = 1;
            if !self.overflow
                && let Some(seq) = self.draw(0, true)
            {
                self.record(Kind::Flush, 0, request.volume, seq, Sector(0), 0);
            }
            return self.flush(FlushBy::Request(id), volume);
        }
        let end = request.start.0.checked_add(request.sectors);
        let fits = end.is_some_and(|end| end <= self.volumes[volume].sectors);
        assert!(request.sectors > 0 && fits, "a request beyond the volume's end: {request:?}");
        if matches!(request.ask, Ask::Write { .. }) {
            while self.next_part(id) {}
        } else {
            self.next_wide(id);
        }
    }

    /// Makes the request's next part and admits it. False when there is none left.
    fn next_part(&mut self, id: u32) -> bool {
        let state = self.requests.get_mut(id);
        let request = state.request;
        let (start, end) = (state.next, request.start.0 + request.sectors);
        if start.0 == end {
            return false;
        }
        let span = match request.ask {
            Ask::Write { .. } => REGION_SECTORS,
            _ => WIDE_REGIONS * REGION_SECTORS,
        };
        let part_end = ((start.0 / span + 1) * span).min(end);
        state.next = Sector(part_end);
        state.parts += 1;
        let volume = self.volume_index(request.volume);
        let op = self.ops.insert(Op::Write(WriteOp {
            request: id,
            volume,
            ask: request.ask,
            start,
            sectors: part_end - start.0,
            offset: (start.0 - request.start.0) * 512,
            stage: Stage::Lock,
            held: 0,
            slot: None,
        }));
        let id = OpId(op);
        if self.volumes[volume].lock.acquire(LockId(op), start, part_end - start.0) {
            self.locked(id);
        }
        true
    }

    /// Wide requests go part by part, and only some of them at once.
    fn next_wide(&mut self, request: u32) {
        if self.wide == WIDE_AT_ONCE {
            return self.wide_waiters.push_back(request);
        }
        self.wide += 1;
        self.next_part(request);
    }

    pub(super) fn locked(&mut self, id: OpId) {
        match self.ops.get_mut(id.0) {
            Op::Write(op) => {
                op.stage = Stage::Map;
                let (volume, start, sectors) = (op.volume, op.start, op.sectors);
                self.taint(volume, start, sectors);
                self.admit(id);
            }
            Op::Read(_) => self.read_locked(id),
            Op::Flush { .. } => unreachable!("a flush takes no range"),
        }
    }

    /// Lets a part that holds its range go on as far as it can.
    fn admit(&mut self, id: OpId) {
        let Op::Write(op) = self.ops.get(id.0) else { unreachable!("only writes are admitted") };
        let (volume, start, sectors, ask) = (op.volume, op.start, op.sectors, op.ask);
        let volume_id = self.volumes[volume].id;
        let first = RegionId::of(volume_id, start).index;
        let last = RegionId::of(volume_id, Sector(start.0 + sectors - 1)).index;
        let payload_bytes = if matches!(ask, Ask::Write { .. }) { sectors * 512 } else { 0 };
        if !self.overflow {
            self.record_owed_gaps();
            if self.owes_gaps() || !self.can_draw(payload_bytes, false) {
                self.overflow = true;
                self.counters.overflows += 1;
            }
        }
        let mut ready = true;
        for index in first..=last {
            let region = RegionId { volume: volume_id, index };
            if self.overflow {
                ready &= self.map.ready_uncaptured(region);
                continue;
            }
            let Op::Write(op) = self.ops.get_mut(id.0) else { unreachable!() };
            if u64::from(index - first) < op.held {
                continue;
            }
            ready &= self.map.ready(region);
            if ready {
                self.map.hold(region);
                op.held += 1;
            }
        }
        if !ready {
            return self.map_waiters.push_back(id);
        }
        if self.overflow { self.pass_uncaptured(id) } else { self.capture(id) }
    }

    /// The write has a record: sequence, slot, payload.
    fn capture(&mut self, id: OpId) {
        let Op::Write(op) = self.ops.get(id.0) else { unreachable!() };
        let op = op.clone();
        let volume_id = self.volumes[op.volume].id;
        let (kind, flags, payload_bytes) = match op.ask {
            Ask::Write { fua } => (Kind::Write, u8::from(fua) * flag::FUA, op.sectors * 512),
            Ask::Zero { unmap, fua } => {
                (Kind::Zero, (u8::from(unmap) * flag::UNMAP) | (u8::from(fua) * flag::FUA), 0)
            }
            Ask::Discard => (Kind::Discard, flag::UNMAP, 0),
            Ask::Flush => unreachable!("a flush is no write"),
        };
        let seq = self.draw(payload_bytes, false).expect("room was found in admit");
        let slot = self.reserve(kind, flags, volume_id, seq, op.start, op.sectors as u32);
        let first = RegionId::of(volume_id, op.start).index;
        for index in first..first + op.held as u32 {
            self.map.drawn(RegionId { volume: volume_id, index }, seq);
        }
        self.counters.captured += 1;
        self.counters.captured_bytes += payload_bytes;
        let Op::Write(state) = self.ops.get_mut(id.0) else { unreachable!() };
        state.slot = Some((slot, seq));
        if payload_bytes > 0 {
            state.stage = Stage::Copy;
            let request = self.requests.get(op.request).request.id;
            self.effects.push_back(Effect::Copy { op: id, request, offset: op.offset, slot });
        } else {
            self.ring.commit(slot);
            self.go_local(id);
        }
    }

    /// The payload is in the slot; or it could not be fetched, with this errno, and nothing was
    /// written.
    pub fn copied(&mut self, id: OpId, result: Result<(), i32>) {
        let Op::Write(op) = self.ops.get(id.0) else { unreachable!("only writes are copied") };
        let (slot, _) = op.slot.expect("a copy has a slot");
        match result {
            Ok(()) => {
                self.ring.commit(slot);
                self.go_local(id);
            }
            Err(errno) => {
                self.ring.make_void(slot);
                let Op::Write(op) = self.ops.get_mut(id.0) else { unreachable!() };
                op.slot = None;
                self.write_ended(id, Err(errno));
            }
        }
    }

    /// The write has no record. Its region is durably marked.
    fn pass_uncaptured(&mut self, id: OpId) {
        let Op::Write(op) = self.ops.get(id.0) else { unreachable!() };
        let (volume, start, sectors) = (op.volume, op.start, op.sectors);
        self.volumes[volume].gap.get_or_insert(Gap::owed(GapReason::Overflow));
        self.record_owed_gaps();
        self.redo_catch_up(volume, start, sectors);
        self.counters.uncaptured += 1;
        self.go_local(id);
    }

    fn go_local(&mut self, id: OpId) {
        let Op::Write(op) = self.ops.get_mut(id.0) else { unreachable!() };
        op.stage = Stage::Local;
        let op = op.clone();
        let io = match op.ask {
            Ask::Write { fua } => {
                let own = Payload::Request(self.requests.get(op.request).request.id, op.offset);
                LocalIo::Write {
                    payload: op.slot.map_or(own, |(slot, _)| Payload::Ring(slot)),
                    fua,
                }
            }
            Ask::Zero { unmap, fua } => LocalIo::Zero { unmap, fua },
            Ask::Discard => LocalIo::Zero { unmap: true, fua: false },
            Ask::Flush => unreachable!("a flush is no write"),
        };
        let volume = self.volumes[op.volume].id;
        let (start, sectors) = (op.start, op.sectors);
        self.effects.push_back(Effect::Local { op: id, volume, io, start, sectors });
    }

    /// A local write, zeroing or flush has ended.
    pub fn local_ended(&mut self, id: OpId, result: Result<(), i32>) {
        match self.ops.get(id.0) {
            Op::Write(_) => self.write_ended(id, result),
            Op::Flush { .. } => self.flush_ended(id, result),
            Op::Read(_) => unreachable!("reads end with read_ended"),
        }
    }

    fn write_ended(&mut self, id: OpId, result: Result<(), i32>) {
        let Op::Write(op) = self.ops.remove(id.0) else { unreachable!() };
        let volume_id = self.volumes[op.volume].id;
        let first = RegionId::of(volume_id, op.start).index;
        for index in first..first + op.held as u32 {
            self.map.release(RegionId { volume: volume_id, index });
        }
        if let Some((slot, _)) = op.slot {
            self.ring.local_done(slot);
        }
        if result.is_err() && op.stage == Stage::Local {
            // What the disk holds now is unknown: read it back and send that.
            self.counters.local_errors += 1;
            self.reread(op.volume, op.start, op.sectors);
        }
        let mut granted = std::mem::take(&mut self.granted);
        self.volumes[op.volume].lock.release(LockId(id.0), &mut granted);
        self.part_ended(op.request, result);
        for lock in granted.drain(..) {
            self.locked(OpId(lock.0));
        }
        self.granted = granted;
    }

    fn part_ended(&mut self, id: u32, result: Result<(), i32>) {
        let state = self.requests.get_mut(id);
        state.parts -= 1;
        state.result = state.result.and(result);
        let wide = matches!(state.request.ask, Ask::Zero { .. } | Ask::Discard);
        if wide {
            if state.result.is_ok() && self.next_part(id) {
                return;
            }
            self.wide -= 1;
            if let Some(waiting) = self.wide_waiters.pop_front() {
                self.next_wide(waiting);
            }
        }
        let state = self.requests.get(id);
        if state.parts == 0 {
            let state = self.requests.remove(id);
            let request = state.request.id;
            self.effects.push_back(Effect::Complete { request, result: state.result });
        }
    }

    fn flush(&mut self, by: FlushBy, volume: usize) {
        let tick = self.map.flush_begun();
        let op = OpId(self.ops.insert(Op::Flush { by, volume, tick }));
        let volume = self.volumes[volume].id;
        let (start, sectors) = (Sector(0), 0);
        self.effects.push_back(Effect::Local { op, volume, io: LocalIo::Flush, start, sectors });
    }

    fn flush_ended(&mut self, id: OpId, result: Result<(), i32>) {
        let Op::Flush { by, volume, tick } = self.ops.remove(id.0) else { unreachable!() };
        if result.is_ok() {
            let volume = self.volumes[volume].id;
            self.map.flush_ended(volume, tick);
        }
        match (by, &mut self.epoch) {
            (FlushBy::Request(request), _) => self.part_ended(request, result),
            (FlushBy::Epoch, Some(epoch)) => {
                epoch.flushes_left -= 1;
                epoch.failed |= result.is_err();
            }
            (FlushBy::Epoch, None) => unreachable!("an epoch waits for its flushes"),
            (FlushBy::Stop, _) => {}
        }
    }

    /// A commit of the dirty map is on stable storage.
    pub fn map_committed(&mut self) {
        self.map.commit_written();
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
        if self.map.wants_commit() {
            self.begin_commit(false);
        }
    }

    fn begin_commit(&mut self, all: bool) {
        if let Some(commit) = self.map.begin_commit(self.durable, all) {
            self.effects.push_back(Effect::CommitMap(commit));
        }
    }

    /// Begins a term that no gap opens with a record of its own, so that the target learns of it
    /// and can be vouched to though nothing is written.
    pub fn open_term(&mut self) {
        if !self.owes_gaps()
            && let Some(seq) = self.draw(0, true)
        {
            self.record(Kind::Void, 0, VolumeId(0), seq, Sector(0), 0);
        }
    }

    /// The memory that payloads of slots lie in.
    pub fn ring_region(&self) -> Arc<Region> {
        self.ring.memory().region().clone()
    }

    /// The two sides' memories disagree: nothing is captured until [`Self::end_doubt`], every
    /// region is marked, and the gap with which the next term begins is owed.
    pub fn begin_doubt(&mut self) {
        self.link(None);
        self.overflow = true;
        self.doubt = true;
        for index in 0..self.volumes.len() {
            let id = self.volumes[index].id;
            self.map.doubt(id);
            self.volumes[index].gap = Some(Gap::owed(GapReason::Doubt));
        }
    }

    /// Whether a new term may begin: nothing captured is under way or waits for the encoder, and
    /// every mark is durable.
    pub fn is_ready_for_term(&self) -> bool {
        let captured = |op: &Op| matches!(op, Op::Write(op) if op.slot.is_some());
        self.doubt
            && self.ring.is_drained()
            && self.map.is_settled()
            && !self.ops.iter().any(captured)
    }

    /// A new term has begun after `last_seq`; sequences up to `ceiling` are its own.
    pub fn end_doubt(&mut self, last_seq: Seq, ceiling: Seq) {
        self.last_seq = last_seq;
        (self.ceiling, self.asked_ceiling) = (ceiling, ceiling);
        self.doubt = false;
    }

    /// Takes the next step towards nothing being active or dirty, for a clean stop. True when that
    /// is so, on stable storage.
    pub fn settle_for_stop(&mut self) -> bool {
        if !self.is_idle() {
            return false;
        }
        if self.map.is_clean_throughout() && self.map.is_settled() {
            return true;
        }
        if !self.stop_flushed {
            self.stop_flushed = true;
            for volume in 0..self.volumes.len() {
                self.flush(FlushBy::Stop, volume);
            }
            return false;
        }
        self.map.drop_clean(self.durable);
        self.maintain();
        false
    }

    /// Closes the epoch of dirty bits and writes what can wait. Call it every few seconds.
    pub fn maintain(&mut self) {
        let flushes_left = self.volumes.len();
        match &mut self.epoch {
            // The disk did not say that its cache is safe: ask again.
            Some(epoch) if epoch.failed && epoch.flushes_left == 0 => {
                *epoch = Epoch { flushes_left, begun: false, failed: false };
            }
            Some(_) => {}
            None if self.map.rotate(self.last_seq) => {
                self.epoch = Some(Epoch { flushes_left, begun: false, failed: false });
            }
            None => {}
        }
        self.begin_commit(true);
    }

    fn poll_epoch(&mut self) {
        let Some(boundary) = self.map.boundary() else { return };
        let under_way = |op: &Op| match op {
            Op::Write(op) => op.slot.is_some_and(|(_, seq)| seq <= boundary),
            _ => false,
        };
        let Some(epoch) = &mut self.epoch else { return };
        if !epoch.begun {
            if self.ops.iter().any(under_way) {
                return;
            }
            epoch.begun = true;
            for volume in 0..self.volumes.len() {
                self.flush(FlushBy::Epoch, volume);
            }
        } else if epoch.flushes_left == 0 && !epoch.failed && self.durable >= boundary {
            self.map.settle();
            self.epoch = None;
        }
    }

    /// Draws a mark's sequence. `payload` is its id and name, as records want it.
    ///
    /// # Errors
    /// The sentence that says why no mark can be set now.
    pub fn mark(&mut self, payload: &[u8]) -> Result<Seq, String> {
        if let Some(volume) = self.volumes.iter().find(|volume| volume.gap.is_some()) {
            let reason = volume.gap.map_or("", |gap| gap.reason.describe());
            return Err(format!(
                "volume {} is inside a gap ({reason}); a mark can be set when it has caught up",
                volume.id
            ));
        }
        let seq = self
            .draw(payload.len() as u64, true)
            .ok_or("the ring has no room for a mark; try again in a moment")?;
        let sectors = payload.len() as u32;
        let slot = self.reserve(Kind::Mark, 0, VolumeId(0), seq, Sector(0), sectors);
        self.ring
            .memory()
            .region()
            .copy_in(slot.payload_at, payload)
            .map_err(|error| error.to_string())?;
        self.ring.commit(slot);
        self.ring.local_done(slot);
        Ok(seq)
    }

    pub(super) fn can_draw(&mut self, payload_bytes: u64, about_ring: bool) -> bool {
        !self.doubt && self.last_seq < self.ceiling && self.ring.has_room(payload_bytes, about_ring)
    }

    /// Draws the next sequence, if one is reserved and the ring has room for the record.
    pub(super) fn draw(&mut self, payload_bytes: u64, about_ring: bool) -> Option<Seq> {
        if self.owes_gaps() {
            self.record_owed_gaps();
            if self.owes_gaps() {
                return None;
            }
        }
        self.can_draw(payload_bytes, about_ring).then(|| self.advance_seq())
    }

    fn advance_seq(&mut self) -> Seq {
        self.last_seq = self.last_seq.next();
        self.reserve_ahead();
        self.last_seq
    }

    fn reserve_ahead(&mut self) {
        if self.asked_ceiling.0 - self.last_seq.0 < RESERVE_LOW {
            self.asked_ceiling = Seq(self.asked_ceiling.0 + RESERVE_AHEAD);
            self.effects.push_back(Effect::Reserve(self.asked_ceiling));
        }
    }

    /// Reserves the slot for a sequence that [`Self::draw`] gave.
    pub(super) fn reserve(
        &mut self,
        kind: Kind,
        flags: u8,
        volume: VolumeId,
        seq: Seq,
        start: Sector,
        sectors: u32,
    ) -> SlotRef {
        let record = Record { kind, flags, volume, seq, time_ns: self.now_ns, start, sectors };
        self.ring.reserve(&record, record.payload_bytes() == 0 || kind == Kind::Mark)
    }

    /// A record without payload that needs no local write.
    pub(super) fn record(
        &mut self,
        kind: Kind,
        flags: u8,
        volume: VolumeId,
        seq: Seq,
        start: Sector,
        sectors: u32,
    ) {
        let slot = self.reserve(kind, flags, volume, seq, start, sectors);
        self.ring.commit(slot);
        self.ring.local_done(slot);
    }

    fn owes_gaps(&self) -> bool {
        self.volumes.iter().any(|volume| volume.gap.is_some_and(|gap| gap.begin.is_none()))
    }

    /// Draws the gap-begins that are owed, as far as the ring has room.
    fn record_owed_gaps(&mut self) {
        for index in 0..self.volumes.len() {
            let Some(Gap { reason, begin: None }) = self.volumes[index].gap else { continue };
            if !self.can_draw(0, true) {
                return;
            }
            let seq = self.advance_seq();
            let id = self.volumes[index].id;
            self.record(Kind::GapBegin, reason as u8, id, seq, Sector(0), 0);
            self.volumes[index].gap = Some(Gap { reason, begin: Some(seq) });
        }
    }

    /// Draws the gap-end of a volume that has caught up.
    pub(super) fn end_gap(&mut self, volume: usize) -> bool {
        let Some(seq) = self.draw(0, true) else { return false };
        let id = self.volumes[volume].id;
        self.record(Kind::GapEnd, 0, id, seq, Sector(0), 0);
        self.volumes[volume].gap = None;
        true
    }

    pub(super) fn volume_index(&self, id: VolumeId) -> usize {
        self.volumes.iter().position(|volume| volume.id == id).expect("a volume of this group")
    }

    /// The last sequence drawn.
    pub fn last_seq(&self) -> Seq {
        self.last_seq
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
        self.ops.len() == 0 && self.requests.len() == 0 && self.effects.is_empty()
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
