//! The step "killed, ring kept" of the simulator: a new core goes on with what is in the ring and on the
//! state disk, and with nothing else.

use tidemark_journal::{Kind, Seq};

use super::{
    super::{
        Ask, LocalIo, Payload, Request, RequestId,
        core::{Core, VolumeStart},
        ring,
    },
    replica::Content,
    sim::{Asked, Flight, Sim},
    steps::Task,
};
use crate::dirty::{RegionId, map::DirtyMap};

impl Sim {
    /// The agent dies between two calls of its core, whatever is under way, and another takes over.
    pub fn killed(&mut self) {
        let lost = self.lose_requests();
        self.lost_for_leases(&lost);
        let mut ceiling = self.core.ceiling();
        for task in std::mem::take(&mut self.tasks) {
            match task {
                Task::Write { op, io } => {
                    let flight = self.flights[&op];
                    self.write_in_part(flight, io);
                }
                Task::Flush { volume, content, .. } => {
                    if self.random.percent(50) && content.0 > self.stable[volume].0 {
                        self.stable[volume] = content;
                    }
                }
                Task::Commit { commit, pages_written } => {
                    let pages = self.random.below(commit.pages.len() as u64 * 2 + 1) as usize;
                    let whole = pages_written || pages >= commit.pages.len();
                    commit.pages.iter().take(pages).for_each(|page| self.state.write(page));
                    if whole && self.random.percent(50) {
                        commit.log.iter().for_each(|log| self.state.write(log));
                    }
                }
                Task::Reserve(seq) if self.random.percent(50) => ceiling = ceiling.max(seq),
                Task::Note(lease) if self.random.percent(50) => self.leases.noted = Some(lease),
                Task::Note(_) | Task::Reserve(_) | Task::Copy { .. } | Task::Read { .. } => {}
            }
        }
        self.flights.clear();
        self.reads = 0;
        self.answers.clear();
        self.link = None;
        self.take_over(ceiling);
        self.kills += 1;
        // Some fronts hand over again what was not answered.
        if self.random.percent(50) {
            for Request { ask, volume, start, sectors, .. } in lost {
                self.submit(usize::from(volume.0) - 1, ask, start.0, sectors);
            }
        }
        self.check_marks();
    }

    fn lose_requests(&mut self) -> Vec<Request> {
        self.under_way = 0;
        let open = |asked: &&mut Asked| asked.answered_at.is_none() && !asked.lost;
        let lost = self.asked.iter_mut().filter(open).map(|asked| {
            asked.lost = true;
            asked.request
        });
        lost.collect()
    }

    /// Of a write under way any part may have reached the disk, in no order, and some may have been
    /// spoilt.
    fn write_in_part(&mut self, flight: Flight, io: LocalIo) {
        let range = self.grain.range(flight.start, flight.sectors);
        let content: Content = match io {
            LocalIo::Write { payload: Payload::Ring(slot), .. } => {
                let mut bytes = vec![0; slot.payload_bytes as usize];
                let region = self.core.ring_region();
                region.copy_out(slot.payload_at, &mut bytes).expect("a place in the ring");
                self.grain.content(&bytes)
            }
            LocalIo::Write { .. } => {
                range.clone().map(|at| Sim::number(flight.request, at)).collect()
            }
            _ => vec![0; range.len()],
        };
        let (none, all) = (self.random.percent(30), self.random.percent(30));
        for (grain, number) in range.zip(content) {
            match self.random.below(20) {
                _ if none => {}
                0 if !all => {
                    self.disks[flight.volume][grain] = self.garbage;
                    self.garbage += 1;
                }
                1..10 if !all => {}
                _ => self.disks[flight.volume][grain] = number,
            }
        }
    }

    fn take_over(&mut self, ceiling: Seq) {
        let memory = self.core.ring_memory().clone();
        let before = (self.core.last_seq(), self.core.volumes.iter().map(|volume| volume.gap));
        let before = (before.0, before.1.collect::<Vec<_>>());
        let volumes: Vec<_> =
            self.core.volumes.iter().map(|volume| (volume.id, volume.sectors)).collect();
        // What the target was sent lies in frames.
        let sent = self.target.applied.checked_sub(1).map(|at| self.journal[at].record.seq);
        let left = ring::inherit(memory, &volumes, sent, self.fork_seq..=ceiling)
            .unwrap_or_else(|error| panic!("{error}"));
        assert_eq!((left.last_seq, &left.gaps), (before.0, &before.1));
        for (slot, record) in left.redo.iter().chain(&left.failed) {
            assert!(matches!(record.kind, Kind::Write | Kind::Zero | Kind::Discard));
            assert_eq!(slot.payload_bytes, record.payload_bytes());
        }
        let mut maps = self.state.maps();
        for map in maps.iter_mut().filter(|map| left.unflushed.contains(&map.id)) {
            map.uncaptured.absorb(&mut map.dirty);
        }
        for (_, record) in &left.failed {
            let map = maps.iter_mut().find(|map| map.id == record.volume).expect("a volume");
            let last = tidemark_journal::Sector(record.end().0 - 1);
            for index in RegionId::of(map.id, record.start).index..=RegionId::of(map.id, last).index
            {
                map.uncaptured.set(index);
            }
        }
        let starts: Vec<VolumeStart> = volumes
            .iter()
            .zip(&left.gaps)
            .map(|((id, sectors), gap)| VolumeStart { id: *id, sectors: *sectors, gap: *gap })
            .collect();
        let (generation, transaction) = self.state.newest();
        let mut map = DirtyMap::new(super::storage::MAP_ID, generation, transaction, maps);
        while let Some(commit) = map.begin_commit(Seq::ZERO) {
            commit.pages.iter().chain(&commit.log).for_each(|block| self.state.write(block));
            map.commit_written();
        }
        self.encoder = left.reader();
        self.core = Core::new(&starts, map, left.writer(), left.last_seq, ceiling);
        self.redone_as = self.asked.len() as u64;
        let nobodys = Request {
            id: RequestId(self.redone_as),
            volume: volumes[0].0,
            ask: Ask::Flush,
            start: tidemark_journal::Sector(0),
            sectors: 0,
        };
        self.asked.push(Asked { lost: true, ..Asked::new(nobodys, left.last_seq.0) });
        self.begin_sync();
        self.core.take_over(&left.redo, &left.failed);
        self.wait();
        self.drain();
    }
}
