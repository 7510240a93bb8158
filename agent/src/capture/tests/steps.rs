//! What can happen next in the simulator, and carrying it out.

use std::time::Duration;

use tidemark_journal::{GapReason, Kind, Seq, TermId, VolumeId};

use super::{
    super::{
        Ask, LocalIo, OpId, Payload,
        catchup::{Mode, ReadBack},
        ring::SlotRef,
    },
    replica::{Content, Entry},
    sim::Sim,
};
use crate::dirty::map::Commit;

/// An effect of the core that has not ended. They end in any order.
pub enum Task {
    Copy {
        op: OpId,
        slot: SlotRef,
    },
    Write {
        op: OpId,
        io: LocalIo,
    },
    Flush {
        op: OpId,
        volume: usize,
        content: (u64, Content),
    },
    /// Half of the range is read at one time and half at another.
    Read {
        op: OpId,
        volume: usize,
        start: u64,
        sectors: u64,
        hash: bool,
        half: Option<Content>,
    },
    Commit {
        commit: Commit,
        pages_written: bool,
    },
    Reserve(Seq),
    Note(Duration),
}

impl Sim {
    pub fn step(&mut self) {
        self.wait();
        match self.random.below(1000) {
            0..290 if self.under_way < self.depth => self.submit_some(),
            290..740 => self.step_task(),
            740..840 => {
                let records = self.random.below(12);
                self.encode(records);
            }
            840..880 => {
                let entries = self.random.below(30) as usize;
                self.acknowledge(entries);
            }
            880..920 => self.answer(),
            920..945 => {
                let bytes = self.random.below(8 << 20);
                self.core.allow_catch_up(bytes);
            }
            985..995 => self.core.maintain(),
            995..998 => {
                let durable = self.core.durable();
                self.core.map_mut().drop_clean(durable);
            }
            998 => {
                // So many at once that some wait, or that the slots kept back are used up.
                for _ in 0..20 + self.random.below(60) {
                    self.submit_many();
                }
            }
            945..956 => {
                let up = self.random.percent(80) && !self.doubting;
                let mode = if self.random.percent(80) { Mode::Offer } else { Mode::Send };
                self.set_link(up.then_some(mode));
            }
            956..960 => {
                // Refused inside a gap or without room; the replicas look at those that are set.
                let _ = self.core.mark(b"0123456789abcdefname");
            }
            960 => {
                let volume = self.random.below(self.disks.len() as u64) as u16;
                if self.random.percent(50) {
                    self.core.verify(VolumeId(volume + 1));
                } else {
                    let (first, regions) = (self.random.below(6), 1 + self.random.below(3));
                    self.core.compare(VolumeId(volume + 1), first as u32, regions as u32);
                }
            }
            961 => self.spoil(),
            962 if self.random.percent(40) && !self.doubting => {
                self.link = None;
                self.doubting = true;
                self.core.begin_doubt();
            }
            963..975 => self.check_content(),
            975..983 => self.check_marks(),
            983..985 if !self.doubting => self.killed(),
            _ => {}
        }
        self.drain();
        self.step_doubt();
        self.step_leases();
        if self.random.percent(50) {
            self.core.poll();
            self.drain();
        }
    }

    /// Requests that need no place in the ring's data.
    fn submit_many(&mut self) {
        let volume = self.random.below(self.disks.len() as u64) as usize;
        let place = self.random.below(self.disks[volume].len() as u64);
        match self.random.below(3) {
            0 => self.submit(volume, Ask::Discard, place * self.grain.0, self.grain.0),
            _ if self.flushing => self.submit(volume, Ask::Flush, 0, 0),
            _ => {}
        }
    }

    fn submit_some(&mut self) {
        let volume = self.random.below(self.disks.len() as u64) as usize;
        let grains = self.disks[volume].len() as u64;
        let ask = match self.random.below(20) {
            0..13 => Ask::Write { fua: self.random.percent(10) },
            13..16 => Ask::Zero { unmap: self.random.percent(50), fua: self.random.percent(10) },
            16..18 => Ask::Discard,
            _ if self.flushing => return self.submit(volume, Ask::Flush, 0, 0),
            _ => return,
        };
        // Most are small and near a few hot places; some go over several regions.
        let place = if self.random.percent(70) {
            (self.random.below(3) * 677 + self.random.below(20)) % grains
        } else {
            self.random.below(grains)
        };
        let wide = !matches!(ask, Ask::Write { .. }) && self.random.percent(10);
        let most = match (wide, self.random.below(10)) {
            (true, _) => grains,
            (_, 0..8) => 16,
            _ => (3000 / self.grain.0).max(2),
        };
        let count = 1 + self.random.below(most.min(grains - place));
        self.submit(volume, ask, place * self.grain.0, count * self.grain.0);
    }

    fn fails(&mut self, per_mille: u64) -> bool {
        self.random.below(1000) < per_mille && !self.calm
    }

    /// Carries out any one effect, or a part of it.
    pub fn step_task(&mut self) {
        let Some(task) = self.random.take(&mut self.tasks) else { return };
        match task {
            Task::Copy { op, slot } => self.copy(op, slot),
            Task::Write { op, io } => self.write(op, io),
            Task::Flush { op, volume, content } => {
                let failed = self.fails(100);
                if failed {
                    self.lose_unflushed(volume);
                } else if content.0 > self.stable[volume].0 {
                    self.stable[volume] = content;
                }
                if let Some(request) = self.core.request_of(op) {
                    self.asked[request.0 as usize].failed = failed;
                }
                self.core.local_ended(op, if failed { Err(5) } else { Ok(()) });
            }
            Task::Read { op, volume, start, sectors, hash, half } => {
                self.read(op, volume, start, sectors, hash, half);
            }
            Task::Commit { commit, pages_written: false } => {
                commit.pages.iter().for_each(|page| self.state.write(page));
                self.check_marks();
                self.tasks.push(Task::Commit { commit, pages_written: true });
            }
            Task::Commit { commit, pages_written: true } => {
                commit.log.iter().for_each(|log| self.state.write(log));
                self.check_marks();
                self.core.map_committed();
            }
            Task::Reserve(seq) => self.core.ceiling_reserved(seq),
            Task::Note(lease) => {
                self.leases.noted = Some(lease).filter(|lease| !lease.is_zero());
                self.core.lease_noted();
            }
        }
        self.drain();
    }

    /// A flush fails, and some of what was written since the last good one is lost, whatever later flushes say.
    fn lose_unflushed(&mut self, volume: usize) {
        self.disk_is_behind();
        let busy = self.busy(volume, false);
        let disk = self.disks[volume].iter_mut().zip(&self.stable[volume].1);
        for ((now, before), busy) in disk.zip(busy) {
            if !busy && self.random.percent(10) {
                *now = *before;
            }
        }
    }

    fn copy(&mut self, op: OpId, slot: SlotRef) {
        let flight = self.flights[&op];
        if self.fails(10) {
            self.flights.remove(&op);
            self.asked[flight.request as usize].failed = true;
            return self.core.copied(op, Err(14));
        }
        let bytes = self.grain.bytes(&self.numbers(op));
        self.core.ring_region().copy_in(slot.payload_at, &bytes).expect("a place in the ring");
        self.core.copied(op, Ok(()));
    }

    /// What a part of a write puts into its grains.
    fn numbers(&self, op: OpId) -> Content {
        let flight = self.flights[&op];
        let range = self.grain.range(flight.start, flight.sectors);
        range.map(|grain| Sim::number(flight.request, grain)).collect()
    }

    fn write(&mut self, op: OpId, io: LocalIo) {
        let flight = self.flights[&op];
        let range = self.grain.range(flight.start, flight.sectors);
        let mut content = match io {
            // The bytes have to stay in the ring until the disk has them.
            LocalIo::Write { payload: Payload::Ring(slot), .. } => {
                let mut bytes = vec![0; slot.payload_bytes as usize];
                let region = self.core.ring_region();
                region.copy_out(slot.payload_at, &mut bytes).expect("a place in the ring");
                self.grain.content(&bytes)
            }
            LocalIo::Write { payload: Payload::Request(..), .. } => self.numbers(op),
            _ => vec![0; range.len()],
        };
        let failed = self.fails(10);
        if failed {
            // Some of it is there, some is as before, and some is neither.
            for (grain, number) in range.clone().zip(&mut content) {
                match self.random.below(3) {
                    0 => *number = self.disks[flight.volume][grain],
                    1 => (*number, self.garbage) = (self.garbage, self.garbage + 1),
                    _ => {}
                }
            }
        }
        self.disks[flight.volume][range].copy_from_slice(&content);
        let asked = &mut self.asked[flight.request as usize];
        asked.failed |= failed;
        asked.carried_out += flight.sectors;
        self.flights.remove(&op);
        self.core.local_ended(op, if failed { Err(5) } else { Ok(()) });
    }

    fn read(
        &mut self,
        op: OpId,
        volume: usize,
        start: u64,
        sectors: u64,
        hash: bool,
        half: Option<Content>,
    ) {
        let range = self.grain.range(start, sectors);
        let middle = range.start + range.len() / 2;
        let Some(mut content) = half else {
            let half = Some(self.disks[volume][range.start..middle].to_vec());
            return self.tasks.push(Task::Read { op, volume, start, sectors, hash, half });
        };
        content.extend_from_slice(&self.disks[volume][middle..range.end]);
        self.reads -= 1;
        let refused = self.unreadable.as_ref().is_some_and(|(bad, sector)| {
            *bad == volume && sector.start < start + sectors && start < sector.end
        });
        // A read that fails is tried in halves, which a grain has to allow.
        if self.grain.0 <= 8 && (refused || self.fails(5)) {
            return self.core.read_ended(op, Err(5));
        }
        let bytes = self.grain.bytes(&content);
        let zeros = content.iter().all(|number| *number == 0);
        let hashes = if hash { self.grain.hashes(&content) } else { Vec::new() };
        self.core.read_ended(op, Ok(ReadBack { data: &bytes, zeros, hashes: &hashes }));
    }

    /// The encoder takes records, and the target gets them.
    pub fn encode(&mut self, records: u64) {
        let grain = self.grain;
        let mut entry = None;
        for _ in 0..records {
            let took = self.encoder.take(|record, payload| {
                entry = Some(Entry::new(grain, record, payload));
                true
            });
            if !took {
                break;
            }
            let entry = entry.take().expect("a record");
            let next = self.target.applied;
            assert_eq!(Some(&entry), self.journal.get(next), "not what was committed");
            if entry.record.kind == Kind::Offer {
                self.answers.push((entry.record.seq, self.target.wants(&entry)));
            }
            self.target.apply(&entry);
        }
        if self.calm || self.random.percent(80) {
            self.encoder.encoded();
        }
    }

    /// One of the target's answers arrives, be it over a later link.
    pub fn answer(&mut self) {
        let Some((seq, wants)) = self.random.take(&mut self.answers) else { return };
        if self.link.is_some() {
            self.core.needed(seq, |block| wants[block as usize]);
            self.drain();
        }
    }

    /// The target says how much of what it has is durable.
    pub fn acknowledge(&mut self, entries: usize) {
        let upto = self.durable.applied.saturating_add(entries).min(self.target.applied);
        let mut last = None;
        while self.durable.applied < upto {
            let entry = &self.journal[self.durable.applied];
            last = Some(entry.record.seq);
            self.durable.apply(entry);
        }
        if let Some(seq) = last {
            self.core.final_durable(seq);
            self.core.noted(seq, Seq::ZERO);
        }
    }

    pub fn set_link(&mut self, mode: Option<Mode>) {
        self.link = mode;
        // A welcome says where the replica ends, to whichever agent.
        if let Some(last) = self.durable.applied.checked_sub(1).filter(|_| mode.is_some()) {
            let seq = self.journal[last].record.seq;
            self.core.final_durable(seq);
            self.core.noted(seq, Seq::ZERO);
        }
        self.core.link(mode);
        self.set_peer(mode);
        if self.random.percent(50) {
            self.answers.clear();
        }
    }

    /// A range becomes unreadable, or readable again.
    fn spoil(&mut self) {
        self.unreadable = match self.unreadable {
            Some(_) => None,
            None => {
                let volume = self.random.below(self.disks.len() as u64) as usize;
                let sectors = self.disks[volume].len() as u64 * self.grain.0;
                let start = self.random.below(sectors);
                Some((volume, start..start + 1 + self.random.below(20)))
            }
        };
    }

    /// A doubt goes on as in the engine. The target turns out to be another than was thought.
    pub fn step_doubt(&mut self) {
        if !self.doubting || !self.core.is_ready_for_term() {
            return self.keep_doubt_going();
        }
        self.decode();
        self.acknowledge(usize::MAX);
        self.other_target();
        let fork = self.core.last_seq().0 + self.random.below(2) * 500;
        for volume in 0..self.disks.len() {
            for _ in 0..self.random.below(5) {
                let grain = self.random.below(self.disks[volume].len() as u64) as usize;
                for replica in [&mut self.replayed, &mut self.target, &mut self.durable] {
                    replica.volumes[volume][grain] = self.garbage;
                }
                self.garbage += 1;
            }
            assert_eq!(self.core.gap(VolumeId(volume as u16 + 1)), Some(GapReason::Doubt));
            for replica in [&mut self.replayed, &mut self.target, &mut self.durable] {
                replica.in_gap[volume] = false;
            }
        }
        (self.replayed_seq, self.fork_seq) = (fork, Seq(fork));
        self.owed = (0..self.disks.len()).map(|volume| (volume, fork)).collect();
        self.core.end_doubt(TermId([1; 16]), Seq(fork), Seq(fork + (1 << 24)));
        self.doubting = false;
        self.check_marks();
    }

    fn keep_doubt_going(&mut self) {
        if self.doubting && self.random.percent(20) {
            self.core.maintain();
            self.drain();
        }
    }
}
