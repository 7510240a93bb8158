//! Requests and their parts: from a front's request to its answer.

use tidemark_journal::{GapReason, Kind, Sector, Seq, record::flag};

use super::{
    super::{
        Ask, Effect, LocalIo, OpId, Payload, Request, gap::Gap, range_lock::LockId, ring::SlotRef,
    },
    Core, FlushBy, Op,
};
use crate::dirty::{REGION_SECTORS, RegionId};

/// The most regions that one part of a wide request covers, and the most such parts at once:
/// together a quarter of the largest active set, and no more than the smallest.
const WIDE_REGIONS: u64 = 64;
const WIDE_AT_ONCE: usize = 16;

/// The most regions that wide requests have active at once.
pub const WIDE_REGIONS_MAX: usize = WIDE_REGIONS as usize * WIDE_AT_ONCE;

pub(super) struct RequestState {
    pub request: Request,
    /// First sector not yet made into a part.
    next: Sector,
    parts: u32,
    result: Result<(), i32>,
    /// The sequence up to which everything is final-durable once the request is; none if nothing makes
    /// it so, since some of it has no record or the disk refused it.
    pub needs: Option<Seq>,
}

impl RequestState {
    fn need(&mut self, seq: Seq) {
        self.needs = self.needs.map(|needs| needs.max(seq));
    }
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
pub(in crate::capture) struct WriteOp {
    pub request: u32,
    volume: usize,
    ask: Ask,
    start: Sector,
    sectors: u64,
    /// Byte of the request's payload.
    offset: u64,
    stage: Stage,
    /// Regions held in the active set, counted from the first.
    held: u64,
    pub slot: Option<(SlotRef, Seq)>,
}

impl Core {
    /// Takes a request from a front. Its parts are admitted in order, before any later request.
    ///
    /// # Panics
    /// When the range is empty or beyond the volume's end; the front checks that.
    pub fn submit(&mut self, request: Request) {
        let volume = self.volume_index(request.volume);
        let (next, needs) = (request.start, Some(Seq::ZERO));
        let state = RequestState { request, next, parts: 0, result: Ok(()), needs };
        let id = self.requests.insert(state);
        if request.ask == Ask::Flush {
            self.requests.get_mut(id).parts = 1;
            if !self.overflow
                && let Some(seq) = self.draw(0, true)
            {
                self.record(Kind::Flush, 0, request.volume, seq, Sector(0), 0);
            }
            // It vouches for what was answered before, with a record or without.
            self.requests.get_mut(id).need(self.last_seq);
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

    pub(in crate::capture) fn locked(&mut self, id: OpId) {
        match self.ops.get_mut(id.0) {
            Op::Write(op) => {
                op.stage = Stage::Map;
                let (volume, start, sectors) = (op.volume, op.start, op.sectors);
                self.taint(volume, start, sectors);
                self.admit(id);
            }
            Op::Read(_) => self.read_locked(id),
            Op::Redo(_) => self.redo_locked(id),
            Op::Flush { .. } => unreachable!("a flush takes no range"),
        }
    }

    /// Lets a part that holds its range go on as far as it can.
    pub(super) fn admit(&mut self, id: OpId) {
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
            // A wide part may wait for its other regions, and its sequence with it.
            if first == last && self.map.mark_again(region) {
                continue;
            }
            ready &= self.map.ready(region, start);
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
        self.requests.get_mut(op.request).need(seq);
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
        let (volume, start, sectors, request) = (op.volume, op.start, op.sectors, op.request);
        self.requests.get_mut(request).needs = None;
        if self.volumes[volume].gap.is_none() {
            self.set_gap(volume, Some(Gap::owed(GapReason::Overflow)));
        }
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
        if op.ask.is_fua() {
            self.fua_begun(id, op.volume);
        }
        let volume = self.volumes[op.volume].id;
        let (start, sectors) = (op.start, op.sectors);
        self.effects.push_back(Effect::Local { op: id, volume, io, start, sectors });
    }

    /// A local write, zeroing or flush has ended.
    pub fn local_ended(&mut self, id: OpId, result: Result<(), i32>) {
        match self.ops.get(id.0) {
            Op::Write(_) => self.write_ended(id, result),
            Op::Flush { .. } => self.flush_ended(id, result),
            Op::Redo(_) => self.redo_ended(id, result),
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
        let slot = op.slot.map(|(slot, _)| slot);
        if result.is_err() && op.stage == Stage::Local {
            self.requests.get_mut(op.request).needs = None;
            self.local_failed(slot, op.volume, op.start, op.sectors);
        } else if let Some(slot) = slot {
            self.ring.local_done(slot);
        }
        if op.stage == Stage::Local {
            if result.is_ok() {
                self.readable_again(op.volume, op.start, op.sectors);
            }
            if op.ask.is_fua() {
                self.fua_ended(id, op.volume, result);
            }
        }
        let mut granted = std::mem::take(&mut self.granted);
        self.volumes[op.volume].lock.release(LockId(id.0), &mut granted);
        self.part_ended(op.request, result);
        for lock in granted.drain(..) {
            self.locked(OpId(lock.0));
        }
        self.granted = granted;
    }

    pub(super) fn part_ended(&mut self, id: u32, result: Result<(), i32>) {
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
            self.answer(state.request.id, state.result, state.needs);
        }
    }
}
