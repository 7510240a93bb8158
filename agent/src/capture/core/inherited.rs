//! Writes whose agent died before the local disk had answered, and those that the disk refused: both
//! are remembered in the ring until it does not matter any more.

use tidemark_journal::{Kind, Record, Sector, Seq, VolumeId, record::flag};

use super::{
    super::{Effect, LocalIo, OpId, Payload, range_lock::LockId, ring::SlotRef},
    Core, Op,
};
use crate::dirty::RegionId;

/// A captured write of another agent that is carried out again.
pub(in crate::capture) struct RedoOp {
    volume: usize,
    record: Record,
    slot: SlotRef,
}

/// A captured write that the local disk refused.
pub(in crate::capture) struct Failed {
    slot: SlotRef,
    volume: VolumeId,
    start: Sector,
    sectors: u64,
}

impl Op {
    /// The sequence of a captured write under way.
    pub(super) fn captured(&self) -> Option<Seq> {
        match self {
            Op::Write(op) => op.slot.map(|(_, seq)| seq),
            Op::Redo(op) => Some(op.record.seq),
            Op::Read(_) | Op::Flush { .. } => None,
        }
    }
}

impl Core {
    /// Takes over what another agent was in the middle of: `redo` is carried out again, each with its
    /// range locked; `failed` is durably marked already and read back, and so is what a failed flush may have
    /// lost. To be called first of all.
    pub fn take_over(&mut self, redo: &[(SlotRef, Record)], failed: &[(SlotRef, Record)]) {
        for (slot, _) in failed {
            self.ring.local_done(*slot);
        }
        self.failures_marked();
        for (slot, record) in redo {
            let volume = self.volume_index(record.volume);
            let op = RedoOp { volume, record: *record, slot: *slot };
            let id = self.ops.insert(Op::Redo(op));
            let sectors = u64::from(record.sectors);
            if self.volumes[volume].lock.acquire(LockId(id), record.start, sectors) {
                self.redo_locked(OpId(id));
            }
        }
    }

    /// Writes that are being carried out again.
    pub fn redo_count(&self) -> usize {
        self.ops.iter().filter(|op| matches!(op, Op::Redo(_))).count()
    }

    pub(super) fn redo_locked(&mut self, op: OpId) {
        let Op::Redo(RedoOp { record, slot, .. }) = self.ops.get(op.0) else { unreachable!() };
        let (fua, unmap) = (record.flags & flag::FUA != 0, record.flags & flag::UNMAP != 0);
        let io = match record.kind {
            Kind::Write => LocalIo::Write { payload: Payload::Ring(*slot), fua },
            _ => LocalIo::Zero { unmap, fua },
        };
        let (volume, start, sectors) = (record.volume, record.start, u64::from(record.sectors));
        if fua {
            self.fua_begun(op, self.volume_index(volume));
        }
        self.effects.push_back(Effect::Local { op, volume, io, start, sectors });
    }

    pub(super) fn redo_ended(&mut self, id: OpId, result: Result<(), i32>) {
        let Op::Redo(op) = self.ops.remove(id.0) else { unreachable!() };
        match result {
            Ok(()) => self.ring.local_done(op.slot),
            Err(_) => {
                let (start, sectors) = (op.record.start, u64::from(op.record.sectors));
                self.local_failed(Some(op.slot), op.volume, start, sectors);
            }
        }
        if op.record.flags & flag::FUA != 0 {
            self.fua_ended(id, op.volume, result);
        }
        let mut granted = Vec::new();
        self.volumes[op.volume].lock.release(LockId(id.0), &mut granted);
        for lock in granted {
            self.locked(OpId(lock.0));
        }
    }

    /// What the disk holds there now is unknown: it is read back and sent. Until that is durably
    /// marked the ring remembers it, if the write has a slot; without one its regions are marked.
    pub(super) fn local_failed(
        &mut self,
        slot: Option<SlotRef>,
        volume: usize,
        start: Sector,
        sectors: u64,
    ) {
        self.counters.local_errors += 1;
        self.reread(volume, start, sectors);
        if let Some(slot) = slot {
            self.ring.local_failed(slot);
            let volume = self.volumes[volume].id;
            self.failed.push(Failed { slot, volume, start, sectors });
        }
        self.failures_marked();
    }

    /// Forgets failed flushes, and gives up the slots of failed writes, when their regions' marks are
    /// durable.
    pub(super) fn failures_marked(&mut self) {
        for (index, volume) in self.volumes.iter().enumerate() {
            if self.ring.memory().flush_failed(index) && !self.map.is_marking_any(volume.id) {
                self.ring.memory().set_flush_failed(index, false);
            }
        }
        for at in (0..self.failed.len()).rev() {
            let Failed { slot, volume, start, sectors } = self.failed[at];
            let last = RegionId::of(volume, Sector(start.0 + sectors - 1)).index;
            let first = RegionId::of(volume, start).index;
            let marking =
                (first..=last).any(|index| self.map.is_marking(RegionId { volume, index }));
            if !marking {
                self.ring.local_done(slot);
                self.failed.swap_remove(at);
            }
        }
    }
}
