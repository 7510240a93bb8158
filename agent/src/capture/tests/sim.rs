//! The capture core with everything around it simulated: fronts, disks that take their time and
//! fail, the state disk, an encoder that lags, a target that answers offers, a link that breaks.
//!
//! A seed decides everything, so a failure is repeated with `TIDEMARK_CAPTURE_SEEDS==SEED`; a plain
//! number there runs so many seeds. What is checked, and where:
//!
//! - writes that overlap are never under way together ([`Sim::drain`]);
//! - the copy or the local write of a captured write comes only when its regions are durably
//!   marked, that of another only when they are durably uncaptured and its volume is in a gap
//!   ([`Sim::drain`]); no record stands between such a write and its gap-begin ([`Sim::decode`]);
//! - each request is answered once, when all of it was carried out ([`Sim::completed`]);
//! - the ring loses and reorders nothing; each captured write is in the journal once, with its own
//!   bytes, after all that had been acknowledged when it was submitted ([`Sim::decode`]);
//! - gaps begin and end in turn, marks stand in none ([`super::replica::Replica::apply`]), and none
//!   ends while its volume waits for catch-up ([`Sim::drain`]);
//! - where no write is under way and nothing waits for catch-up, the disk equals the journal
//!   replayed to its end, inside gaps and outside ([`Sim::check_content`]);
//! - where the disk, with or without what was not flushed, differs from what is final-durable, the
//!   state on storage says so ([`Sim::check_marks`]);
//! - an agent that is killed is followed by one that goes on with the same order, knowing the ring and
//!   the state disk alone ([`Sim::killed`]);
//! - while the target holds a zero-loss lease, it has what the disks have, but for what nobody was
//!   answered ([`Sim::check_lease`]);
//! - when everything is answered, nothing is stuck, every gap ends, and all marks are dropped
//!   ([`Sim::come_to_rest`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use tidemark_journal::{GapReason, Kind, Sector, Seq, TermId, VolumeId};

use super::{
    super::{
        Ask, Effect, LocalIo, OpId, Payload, Request, RequestId,
        catchup::{Mode, READS_MAX},
        core::{Core, VolumeStart},
        gap::Gap,
        ring::{Layout, RingMemory, RingReader, RingWriter},
    },
    leases::Leases,
    replica::{Content, Entry, Grain, Replica},
    steps::Task,
    storage::{MAP_ID, State},
};
use crate::dirty::{
    RegionId,
    active::LOG_BYTES,
    bitmap::{self, Bits},
    map::{self, DirtyMap},
    regions_in,
    tests::random::{Random, seeds},
};

/// A request of the simulated fronts.
pub struct Asked {
    pub request: Request,
    /// The last sequence drawn when it was submitted, and when it was answered.
    pub submitted_after: u64,
    pub answered_at: Option<u64>,
    /// Sectors carried out, and of those written with and without a record.
    pub carried_out: u64,
    pub captured: u64,
    pub uncaptured: u64,
    pub failed: bool,
    /// Its agent died before the answer.
    pub lost: bool,
}

impl Asked {
    pub fn new(request: Request, submitted_after: u64) -> Asked {
        Asked {
            request,
            submitted_after,
            answered_at: None,
            carried_out: 0,
            captured: 0,
            uncaptured: 0,
            failed: false,
            lost: false,
        }
    }
}

/// A part of a request between its first effect and its end.
#[derive(Clone, Copy, Debug)]
pub struct Flight {
    pub request: u64,
    pub volume: usize,
    pub start: u64,
    pub sectors: u64,
    /// Its bytes may be on their way to the disk.
    pub local: bool,
}

pub struct Sim {
    pub random: Random,
    pub grain: Grain,
    pub core: Core,
    pub disks: Vec<Content>,
    /// The disks as the last flush left them, and the number of that flush.
    pub stable: Vec<(u64, Content)>,
    pub state: State,
    pub asked: Vec<Asked>,
    pub under_way: usize,
    pub flights: BTreeMap<OpId, Flight>,
    pub tasks: Vec<Task>,
    pub reads: usize,
    pub flushes: u64,
    /// Every record, as soon as it is committed.
    pub journal: Vec<Entry>,
    pub replayed: Replica,
    pub replayed_seq: u64,
    pub shadow: RingReader,
    pub encoder: RingReader,
    pub target: Replica,
    pub durable: Replica,
    /// Answers of the target on their way: the offer's sequence and what is wanted.
    pub answers: Vec<(Seq, Vec<bool>)>,
    pub link: Option<Mode>,
    /// Volumes with an uncaptured write, and the last sequence drawn before it was let through.
    pub owed: Vec<(usize, u64)>,
    /// Whether a volume was in a gap when the core was last looked at.
    gaps: Vec<bool>,
    pub doubting: bool,
    /// The sequence that the term continues.
    pub fork_seq: Seq,
    /// How often the agent was killed, and the request for which its writes are carried out again.
    pub kills: u32,
    pub redone_as: u64,
    /// A volume and a range of its sectors that cannot be read.
    pub unreadable: Option<(usize, std::ops::Range<u64>)>,
    pub calm: bool,
    /// The target has rotted, of which the source's marks cannot know.
    pub rotten: bool,
    /// Whether the fronts ask for flushes at all.
    pub flushing: bool,
    /// Requests at once.
    pub depth: usize,
    pub garbage: u64,
    pub leases: Leases,
    /// Journal time.
    pub now_ns: u64,
    seed: u64,
}

impl Sim {
    fn new(seed: u64) -> Sim {
        let mut random = Random::new(seed);
        // Many small writes on few regions; or wide requests on many regions.
        let (grain, sizes) = match random.below(4) {
            0 => (Grain(1), vec![2048 + 1003, 700]),
            1 => (Grain(8), vec![3 * 2048, 2048]),
            2 => (Grain(8), vec![2 * 2048 + 504]),
            _ => (Grain(256), vec![150 * 2048 + 512, 3 * 2048]),
        };
        // Few slots beyond those kept back; the frames area fills the last page.
        let slots = 64 + 4 + random.below(60);
        let frame_bytes = 8192 - slots * 64 % 4096;
        let layout = Layout { slots, data_bytes: 4 << 20, frame_bytes };
        let named = (1u16..).map(VolumeId).zip(sizes.iter().copied());
        let memory = RingMemory::plain(layout, &named.collect::<Vec<_>>());
        let mut volumes = Vec::new();
        let mut maps = Vec::new();
        let (mut disks, mut target) = (Vec::<Content>::new(), Vec::<Content>::new());
        for (index, sectors) in sizes.iter().enumerate() {
            let id = VolumeId(index as u16 + 1);
            let regions = regions_in(*sectors);
            let mut uncaptured = Bits::new(regions);
            let first_sync = random.percent(50);
            let mut number = |_| if random.percent(50) { 0 } else { 1 + random.below(5) };
            let disk: Content = (0..sectors / grain.0).map(&mut number).collect();
            target.push(if first_sync { vec![0; disk.len()] } else { disk.clone() });
            disks.push(disk);
            if first_sync {
                uncaptured.fill();
            }
            let gap = first_sync.then_some(Gap::owed(GapReason::FirstSync));
            volumes.push(VolumeStart { id, sectors: *sectors, gap });
            let written = vec![0; bitmap::pages_in(regions) as usize];
            let dirty = Bits::new(regions);
            maps.push(map::VolumeStart { id, regions, written, uncaptured, dirty });
        }
        let bitmaps: Vec<Vec<u8>> =
            maps.iter().map(|map| vec![0; bitmap::file_bytes(map.regions) as usize]).collect();
        let state = State {
            log: vec![0; LOG_BYTES as usize],
            maps: maps
                .iter()
                .zip(&bitmaps)
                .map(|(map, file)| bitmap::recover(file, MAP_ID, map.regions))
                .collect(),
            bitmaps,
            regions: maps.iter().map(|map| map.regions).collect(),
            active: BTreeSet::new(),
        };
        let last_seq = random.below(2) * 1000;
        let ceiling = Seq(last_seq + [0, 3, 50, 1 << 24][random.below(4) as usize]);
        let map = DirtyMap::new(MAP_ID, 0, 0, maps);
        memory.begin_term(TermId([1; 16]), Seq(last_seq));
        let writer = RingWriter::new(memory.clone());
        let replica = Replica::new(grain, target);
        Sim {
            core: Core::new(&volumes, map, writer, Seq(last_seq), ceiling),
            stable: disks.iter().map(|disk| (0, disk.clone())).collect(),
            disks,
            state,
            asked: Vec::new(),
            under_way: 0,
            flights: BTreeMap::new(),
            tasks: Vec::new(),
            reads: 0,
            flushes: 0,
            journal: Vec::new(),
            replayed: replica.clone(),
            replayed_seq: last_seq,
            shadow: RingReader::new(memory.clone()),
            encoder: RingReader::new(memory),
            target: replica.clone(),
            durable: replica,
            answers: Vec::new(),
            link: None,
            owed: Vec::new(),
            gaps: volumes.iter().map(|volume| volume.gap.is_some()).collect(),
            doubting: false,
            fork_seq: Seq(last_seq),
            kills: 0,
            redone_as: 0,
            unreadable: None,
            calm: false,
            rotten: false,
            flushing: random.percent(60),
            depth: [2, 8, 24][random.below(3) as usize],
            garbage: 1 << 60,
            leases: Leases::new(random.percent(50).then_some(Duration::from_secs(1))),
            now_ns: 0,
            random,
            grain,
            seed,
        }
    }

    /// Time goes by, as long as several reads take at most.
    pub fn wait(&mut self) {
        self.now_ns += self.random.below(20_000_000);
        self.core.set_now(self.now_ns);
    }

    pub fn submit(&mut self, volume: usize, ask: Ask, start: u64, sectors: u64) {
        let id = RequestId(self.asked.len() as u64);
        let volume_id = VolumeId(volume as u16 + 1);
        let request = Request { id, volume: volume_id, ask, start: Sector(start), sectors };
        self.asked.push(Asked::new(request, self.core.last_seq().0));
        self.under_way += 1;
        self.core.submit(request);
        self.drain();
    }

    /// What a write request puts into a grain.
    pub fn number(request: u64, grain: usize) -> u64 {
        (request + 1) << 24 | grain as u64
    }

    /// Takes the core's effects, as the engine does after every batch of calls.
    pub fn drain(&mut self) {
        for volume in 0..self.disks.len() {
            let id = VolumeId(volume as u16 + 1);
            let gap = self.core.gap(id).is_some();
            if std::mem::replace(&mut self.gaps[volume], gap) && !gap {
                assert_eq!(self.core.map().uncaptured(id).count(), 0, "a gap that ends too early");
            }
        }
        while let Some(effect) = self.core.effect() {
            match effect {
                Effect::Copy { op, request, offset, slot } => {
                    let asked = self.asked[request.0 as usize].request;
                    let flight = Flight {
                        request: request.0,
                        volume: usize::from(asked.volume.0) - 1,
                        start: asked.start.0 + offset / 512,
                        sectors: slot.payload_bytes / 512,
                        local: false,
                    };
                    self.takes_off(op, flight);
                    self.for_regions(flight, |sim, region| {
                        assert!(sim.state.covers(flight.volume, region), "not marked: {region}");
                    });
                    self.tasks.push(Task::Copy { op, slot });
                }
                Effect::Local { op, volume, io, start, sectors } => {
                    let volume = usize::from(volume.0) - 1;
                    self.local(op, volume, io, start.0, sectors);
                }
                Effect::Complete { request, result } => self.completed(request, result),
                Effect::CommitMap(commit) => {
                    self.tasks.push(Task::Commit { commit, pages_written: false });
                }
                Effect::Reserve(seq) => self.tasks.push(Task::Reserve(seq)),
                Effect::NoteLease(lease) => self.tasks.push(Task::Note(lease)),
            }
        }
        self.decode();
    }

    fn local(&mut self, op: OpId, volume: usize, io: LocalIo, start: u64, sectors: u64) {
        match io {
            LocalIo::Read { hash } => {
                self.reads += 1;
                assert!(self.reads <= READS_MAX, "more reads than the engine has buffers for");
                self.tasks.push(Task::Read { op, volume, start, sectors, hash, half: None });
                return;
            }
            LocalIo::Flush => {
                self.flushes += 1;
                let content = (self.flushes, self.disks[volume].clone());
                self.tasks.push(Task::Flush { op, volume, content });
                return;
            }
            LocalIo::Write { payload: Payload::Ring(slot), .. } => {
                let redo = Flight { request: self.redone_as, volume, start, sectors, local: true };
                if !self.flights.contains_key(&op) && self.core.request_of(op).is_none() {
                    self.takes_off(op, redo);
                    self.for_regions(redo, |sim, region| assert!(sim.state.covers(volume, region)));
                }
                let flight = self.flights.get_mut(&op).expect("a captured write was copied first");
                assert_eq!((flight.start, flight.sectors), (start, sectors));
                assert_eq!(slot.payload_bytes, sectors * 512);
                flight.local = true;
            }
            LocalIo::Write { payload: Payload::Request(request, offset), .. } => {
                let flight = Flight { request: request.0, volume, start, sectors, local: true };
                let asked = &mut self.asked[request.0 as usize];
                assert_eq!(asked.request.start.0 + offset / 512, start);
                asked.uncaptured += sectors;
                self.takes_off(op, flight);
                self.for_regions(flight, |sim, region| {
                    assert!(sim.state.is_uncaptured(volume, region), "not uncaptured: {region}");
                });
                assert!(self.core.gap(VolumeId(volume as u16 + 1)).is_some(), "no gap");
                self.owed.push((volume, self.core.last_seq().0));
            }
            LocalIo::Zero { .. } => {
                let request = self.core.request_of(op).map_or(self.redone_as, |request| request.0);
                let flight = Flight { request, volume, start, sectors, local: true };
                self.takes_off(op, flight);
                self.for_regions(flight, |sim, region| {
                    assert!(sim.state.covers(volume, region), "a zeroing before its mark");
                });
            }
        }
        self.tasks.push(Task::Write { op, io });
    }

    fn takes_off(&mut self, op: OpId, flight: Flight) {
        let end = flight.start + flight.sectors;
        for other in self.flights.values().filter(|other| other.volume == flight.volume) {
            let apart = other.start >= end || flight.start >= other.start + other.sectors;
            assert!(apart, "{flight:?} begins during {other:?}");
        }
        assert!(self.flights.insert(op, flight).is_none(), "an op used twice");
    }

    fn for_regions(&mut self, flight: Flight, mut each: impl FnMut(&mut Sim, u32)) {
        let id = VolumeId(1);
        let last = RegionId::of(id, Sector(flight.start + flight.sectors - 1)).index;
        for region in RegionId::of(id, Sector(flight.start)).index..=last {
            each(self, region);
        }
    }

    /// With everything answered and nothing failing, all is sent and all marks are dropped.
    pub fn come_to_rest(&mut self) {
        self.calm = true;
        self.unreadable = None;
        let volumes = self.disks.len() as u16;
        for round in 0.. {
            assert!(round < 3000, "stuck: {} tasks, {:?}", self.tasks.len(), self.core.counters());
            self.wait();
            self.step_doubt();
            if self.link.is_none() && !self.doubting {
                self.set_link(Some(Mode::Offer));
            }
            for _ in 0..20 {
                self.step_task();
            }
            self.encode(1000);
            while !self.answers.is_empty() {
                self.answer();
            }
            if round % 3 == 0 {
                self.acknowledge(usize::MAX);
            }
            self.core.allow_catch_up(1 << 30);
            if round % 5 == 4 {
                self.core.maintain();
                self.drain();
            }
            self.core.poll();
            self.drain();
            let open = (1..=volumes).any(|id| {
                let id = VolumeId(id);
                self.core.gap(id).is_some()
                    || self.core.map().uncaptured(id).count() > 0
                    || self.core.verify_progress(id).is_some()
            });
            if !open
                && !self.doubting
                && self.under_way == 0
                && self.core.vouched() == Some(self.core.durable())
                && self.core.settle_for_stop() == Some(true)
            {
                break;
            }
            self.drain();
        }
        assert!(self.core.is_idle() && self.tasks.is_empty() && self.core.is_drained());
        assert_eq!(self.journal.len(), self.durable.applied);
        assert_eq!(self.replayed.in_gap, vec![false; self.disks.len()]);
        self.check_requests();
        self.check_content();
        for (volume, disk) in self.disks.iter().enumerate() {
            let unknown = &self.replayed.unknown[volume];
            let equal = |grain: usize| disk[grain] == self.durable.volumes[volume][grain];
            assert!((0..disk.len()).all(|grain| unknown[grain] || equal(grain)));
            for region in 0..self.state.regions[volume] {
                assert!(!self.state.covers(volume, region), "a mark is left");
            }
        }
    }

    /// Rot at the target, which a verify finds and mends.
    fn verify_mends(&mut self) {
        let volume = self.random.below(self.disks.len() as u64) as usize;
        let grain = self.random.below(self.disks[volume].len() as u64) as usize;
        for replica in [&mut self.replayed, &mut self.target, &mut self.durable] {
            replica.volumes[volume][grain] = 99;
        }
        self.rotten = true;
        let before = self.core.counters().verify_differing_blocks;
        let records = self.journal.len();
        self.core.verify(VolumeId(volume as u16 + 1));
        self.come_to_rest();
        assert!(self.core.counters().verify_differing_blocks > before);
        assert!(self.journal[records..].iter().all(|entry| entry.record.kind != Kind::GapBegin));
    }

    fn run(&mut self, steps: u32) {
        self.begin_sync();
        self.set_link(Some(Mode::Offer));
        for _ in 0..steps {
            self.step();
        }
        self.come_to_rest();
        self.verify_mends();
    }
}

const SEEDS: &str = "TIDEMARK_CAPTURE_SEEDS";

/// Says which seed it was.
struct Told(u64);

impl Drop for Told {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("repeat with TIDEMARK_CAPTURE_SEEDS=={}", self.0);
        }
    }
}

#[test]
fn whatever_happens_the_journal_tells_the_truth() {
    let (mut kills, mut leased) = (0, 0);
    for seed in seeds(SEEDS, 500) {
        let told = Told(seed);
        let mut sim = Sim::new(told.0);
        assert_eq!(sim.seed, seed);
        sim.run(1000);
        kills += sim.kills;
        leased += u64::from(sim.leases.looks > 0);
    }
    let told = std::env::var_os(SEEDS).is_some();
    assert!(kills > 0 || told, "no agent was killed");
    assert!(leased > 4 || told, "only {leased} targets ever held a lease");
}
