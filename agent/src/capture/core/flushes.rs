//! Flushes of the local disks, and the epochs of dirty bits that they settle.

use tidemark_journal::Sector;

use super::{
    super::{Effect, LocalIo, OpId},
    Core, Op,
};

#[derive(Clone, Copy)]
pub(in crate::capture) enum FlushBy {
    Request(u32),
    /// The epoch that is being settled.
    Epoch,
    /// A clean stop.
    Stop,
}

pub(super) struct Epoch {
    flushes_left: usize,
    begun: bool,
    /// A flush failed; they are asked for again by [`Core::maintain`].
    failed: bool,
}

impl Core {
    pub(super) fn flush(&mut self, by: FlushBy, volume: usize) {
        let tick = self.map.flush_begun();
        let op = OpId(self.ops.insert(Op::Flush { by, volume, tick }));
        let volume = self.volumes[volume].id;
        let (start, sectors) = (Sector(0), 0);
        self.effects.push_back(Effect::Local { op, volume, io: LocalIo::Flush, start, sectors });
    }

    pub(super) fn flush_ended(&mut self, id: OpId, result: Result<(), i32>) {
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

    pub(super) fn poll_epoch(&mut self) {
        let Some(boundary) = self.map.boundary() else { return };
        let under_way = |op: &Op| op.captured().is_some_and(|seq| seq <= boundary);
        let covered = self.covered();
        let Some(epoch) = &mut self.epoch else { return };
        if !epoch.begun {
            if self.ops.iter().any(under_way) {
                return;
            }
            epoch.begun = true;
            for volume in 0..self.volumes.len() {
                self.flush(FlushBy::Epoch, volume);
            }
        } else if epoch.flushes_left == 0 && !epoch.failed && covered >= boundary {
            self.map.settle();
            self.epoch = None;
        }
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
        self.map.drop_clean(self.covered());
        self.maintain();
        false
    }
}
