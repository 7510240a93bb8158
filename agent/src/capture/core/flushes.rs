//! Flushes of the local disks, and the epochs of dirty bits that they settle.

use tidemark_journal::Sector;

use super::{
    super::{Effect, LocalIo, OpId},
    Core, Op, Volume,
};

#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::capture) enum FlushBy {
    /// A write with FUA, which may bring one of its own: it vouches for nothing, but may fail.
    Write,
    Request(u32),
    /// The epoch that is being settled.
    Epoch,
    /// A clean stop.
    Stop,
}

/// A flush of a volume's disk.
#[derive(Clone, Copy)]
pub(in crate::capture) struct Flushing {
    op: OpId,
    by: FlushBy,
    /// What had completed when it was begun.
    tick: u64,
    /// Whether it has ended, and well.
    ended: Option<bool>,
}

pub(super) struct Epoch {
    flushes_left: usize,
    begun: bool,
    /// A flush failed; they are asked for again by [`Core::maintain`].
    failed: bool,
}

impl Core {
    pub(super) fn flush(&mut self, by: FlushBy, volume: usize) {
        let op = OpId(self.ops.insert(Op::Flush { by, volume }));
        let begun = Flushing { op, by, tick: self.map.flush_begun(), ended: None };
        self.volumes[volume].flushing.push_back(begun);
        let volume = self.volumes[volume].id;
        let (start, sectors) = (Sector(0), 0);
        self.effects.push_back(Effect::Local { op, volume, io: LocalIo::Flush, start, sectors });
    }

    pub(super) fn flush_ended(&mut self, id: OpId, result: Result<(), i32>) {
        let Op::Flush { by, volume } = self.ops.remove(id.0) else { unreachable!() };
        if result.is_err() {
            self.cache_lost(volume);
        }
        self.flushed(volume, id, result.is_ok());
        self.stop_flush_failed |= by == FlushBy::Stop && result.is_err();
        if let FlushBy::Request(request) = by {
            if result.is_err() {
                self.requests.get_mut(request).needs = None;
            }
            self.part_ended(request, result);
        }
    }

    /// A write with FUA goes to the disk.
    pub(super) fn fua_begun(&mut self, op: OpId, volume: usize) {
        let begun = Flushing { op, by: FlushBy::Write, tick: 0, ended: None };
        self.volumes[volume].flushing.push_back(begun);
    }

    /// A write with FUA has ended. To a disk that cannot write through its cache the kernel sends a flush behind
    /// it, and tells nobody else when that fails. A disk that has no room did not get so far.
    pub(super) fn fua_ended(&mut self, op: OpId, volume: usize, result: Result<(), i32>) {
        if result.is_err_and(|errno| errno != libc::ENOSPC) {
            self.cache_lost(volume);
        }
        self.flushed(volume, op, result.is_ok());
    }

    /// What brought a flush has ended. In the order in which they were begun: one that succeeds vouches for
    /// nothing that an earlier one may yet fail to keep.
    fn flushed(&mut self, volume: usize, id: OpId, well: bool) {
        let Volume { id: volume, flushing, .. } = &mut self.volumes[volume];
        // The name of one that has ended may have been given to another since.
        let under_way = |flush: &&mut Flushing| flush.op == id && flush.ended.is_none();
        if let Some(flush) = flushing.iter_mut().find(under_way) {
            flush.ended = Some(well);
        }
        while let Some(Flushing { by, tick, ended: Some(well), .. }) = flushing.front().copied() {
            flushing.pop_front();
            if well {
                self.map.flush_ended(*volume, tick);
            }
            if by == FlushBy::Epoch
                && let Some(epoch) = &mut self.epoch
            {
                epoch.flushes_left -= 1;
                epoch.failed |= !well;
            }
        }
    }

    /// Of what no flush has made safe the disk may have lost anything.
    pub(super) fn cache_lost(&mut self, volume: usize) {
        // The ring remembers it until the marks are durable: its agent may die before.
        self.ring.memory().set_flush_failed(volume, true);
        self.reread_unflushed(volume);
        self.failures_marked();
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
        self.map.write_back();
        self.begin_commit();
    }

    pub(super) fn poll_epoch(&mut self) {
        let Some(boundary) = self.map.boundary() else { return };
        let under_way = |op: &Op| op.captured().is_some_and(|seq| seq <= boundary);
        let covered = self.covered;
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
            self.map.write_back();
            self.epoch = None;
        }
    }

    /// Takes the next step towards nothing being active or dirty, for a stop. Some when that is so, on stable
    /// storage, or cannot come about since a disk refuses to be flushed; true if nothing is left to be caught up
    /// either.
    pub fn settle_for_stop(&mut self) -> Option<bool> {
        if !self.is_idle() {
            return None;
        }
        if self.map.is_settled() && (self.map.is_captured_throughout() || self.stop_flush_failed) {
            return Some(self.map.is_clean_throughout());
        }
        // Once for all that has ended so far; one that failed is not repeated.
        if self.stop_flushed != Some(self.map.flush_begun()) {
            self.stop_flushed = Some(self.map.flush_begun());
            for volume in 0..self.volumes.len() {
                self.flush(FlushBy::Stop, volume);
            }
            return None;
        }
        self.map.drop_clean(self.covered);
        self.maintain();
        None
    }
}
