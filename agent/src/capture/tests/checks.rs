//! What the simulator checks of the core's work: that requests are carried out, that the journal
//! tells of them, and that content and marks are right.

use tidemark_journal::{Kind, VolumeId};

use super::{
    super::{Ask, Request, RequestId},
    replica::Entry,
    sim::{Asked, Sim},
};

impl Sim {
    pub fn completed(&mut self, id: RequestId, result: Result<(), i32>) {
        let asked = &mut self.asked[id.0 as usize];
        assert!(asked.answered_at.is_none(), "{id:?} is answered twice");
        asked.answered_at = Some(self.core.last_seq().0);
        assert_eq!(result.is_err(), asked.failed, "{id:?}");
        if result.is_ok() {
            assert_eq!(asked.carried_out, asked.request.sectors, "{id:?}: not all of it");
        }
        self.under_way -= 1;
    }

    /// Reads what was committed, ahead of the encoder.
    pub fn decode(&mut self) {
        let grain = self.grain;
        let mut entry = None;
        while self.shadow.take(|record, payload| {
            entry = Some(Entry::new(grain, record, payload));
            true
        }) {
            let entry = entry.take().expect("a record");
            let (record, seq) = (entry.record, entry.record.seq.0);
            assert_eq!(seq, self.replayed_seq + 1, "a sequence is missing");
            self.replayed_seq = seq;
            let in_gap = &self.replayed.in_gap;
            self.owed.retain(|(volume, before)| *before >= seq || !in_gap[*volume]);
            if record.kind != Kind::GapBegin {
                let late = self.owed.iter().find(|(_, before)| *before < seq);
                assert!(late.is_none(), "{record:?} before a gap-begin that is owed: {late:?}");
            }
            match record.kind {
                Kind::Write => self.is_asked_for(&entry),
                Kind::Zero | Kind::Discard => {
                    let covers = |asked: &&Asked| {
                        let Request { ask, start, sectors, volume, .. } = asked.request;
                        let kind = match ask {
                            Ask::Zero { .. } => Some(Kind::Zero),
                            Ask::Discard => Some(Kind::Discard),
                            _ => None,
                        };
                        kind == Some(record.kind)
                            && volume == record.volume
                            && start <= record.start
                            && record.end().0 <= start.0 + sectors
                            && asked.submitted_after < seq
                            && asked.answered_at.is_none_or(|at| seq <= at)
                    };
                    assert!(self.asked.iter().any(|asked| covers(&asked)), "{record:?}");
                }
                _ => {}
            }
            self.replayed.apply(&entry);
            self.journal.push(entry);
        }
    }

    fn is_asked_for(&mut self, entry: &Entry) {
        let record = &entry.record;
        let first = self.grain.range(record.start.0, u64::from(record.sectors)).start;
        let id = (entry.content[0] >> 24) - 1;
        for (at, number) in entry.content.iter().enumerate() {
            assert_eq!(*number, Sim::number(id, first + at), "not the bytes of the request");
        }
        let asked = &mut self.asked[id as usize];
        assert_eq!(asked.request.volume, record.volume);
        assert!(record.seq.0 > asked.submitted_after, "{record:?} is before what came before it");
        assert!(asked.answered_at.is_none_or(|at| record.seq.0 <= at), "{record:?} is too late");
        asked.captured += u64::from(record.sectors);
        assert!(asked.captured <= asked.request.sectors, "{record:?} is there twice");
    }

    /// Whether the core waits for catch-up of a region, as far as it says.
    fn waits_for_catch_up(&self, volume: usize, region: u32) -> bool {
        self.core.map().uncaptured(VolumeId(volume as u16 + 1)).get(region)
    }

    /// Grains of a volume on which a write may be under way.
    pub fn busy(&self, volume: usize, local_only: bool) -> Vec<bool> {
        let mut busy = vec![false; self.disks[volume].len()];
        for flight in self.flights.values() {
            if flight.volume == volume && (flight.local || !local_only) {
                busy[self.grain.range(flight.start, flight.sectors)].fill(true);
            }
        }
        busy
    }

    /// The disk equals the journal, where nothing is under way and nothing waits for catch-up.
    pub fn check_content(&mut self) {
        if self.replayed_seq != self.core.last_seq().0 || self.doubting {
            return;
        }
        for volume in 0..self.disks.len() {
            let busy = self.busy(volume, false);
            let (disk, replayed) = (&self.disks[volume], &self.replayed.volumes[volume]);
            for grain in 0..disk.len() {
                if disk[grain] == replayed[grain]
                    || busy[grain]
                    || self.replayed.unknown[volume][grain]
                    || self.waits_for_catch_up(volume, self.grain.region(grain))
                {
                    continue;
                }
                panic!(
                    "grain {grain} of volume {volume} is {:x} and {:x} in the journal",
                    disk[grain], replayed[grain]
                );
            }
        }
    }

    /// What differs from the final-durable state is marked on the state disk.
    pub fn check_marks(&mut self) {
        if self.rotten {
            return;
        }
        for volume in 0..self.disks.len() {
            let busy = self.busy(volume, true);
            let durable = &self.durable.volumes[volume];
            let (disk, stable) = (&self.disks[volume], &self.stable[volume].1);
            for grain in 0..disk.len() {
                let same = disk[grain] == durable[grain]
                    && stable[grain] == durable[grain]
                    && !busy[grain];
                let region = self.grain.region(grain);
                assert!(
                    same || self.durable.unknown[volume][grain]
                        || self.state.covers(volume, region),
                    "region {region} of volume {volume} differs at grain {grain} and is not marked"
                );
            }
        }
    }

    /// At the end each write is in the journal as far as it was not let through without a record.
    pub fn check_requests(&self) {
        for asked in self.asked.iter().filter(|asked| !asked.lost) {
            assert!(asked.answered_at.is_some());
            if matches!(asked.request.ask, Ask::Write { .. }) && !asked.failed {
                assert_eq!(asked.captured + asked.uncaptured, asked.request.sectors);
            }
        }
    }
}
