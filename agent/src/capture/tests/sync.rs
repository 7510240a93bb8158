//! Sync mode: which answers wait, and for what.

use std::time::Duration;

use tidemark_control::agent::SyncStage as Stage;
use tidemark_journal::{Sector, Seq, TermId, VolumeId};
use tidemark_link::lease::LEASE;

use super::super::{
    Ask, Effect, LocalIo, OpId, Request, RequestId,
    catchup::{Mode, ReadBack},
    core::{Core, VolumeStart},
    ring::{Layout, RingMemory, RingReader, RingWriter},
};
use crate::{
    dirty::{
        bitmap::Bits,
        map::{self, DirtyMap},
    },
    lease::{Peer, SyncMode, Why},
};

const VOLUME: VolumeId = VolumeId(1);
const MIB: u64 = 2048;
const MS_NS: u64 = 1_000_000;

/// A core whose copies and commits are done at once, and whose disk does what it is told.
struct Group {
    core: Core,
    encoder: RingReader,
    local: Vec<(OpId, LocalIo)>,
    answered: Vec<(u64, Result<(), i32>)>,
    now_ns: u64,
    requests: u64,
}

impl Group {
    /// One volume of four regions; nothing of it has to be caught up.
    fn new(timeout: Option<Duration>, left: Option<Duration>) -> Group {
        let (uncaptured, dirty) = (Bits::new(4), Bits::new(4));
        let start =
            map::VolumeStart { id: VOLUME, regions: 4, written: vec![0], uncaptured, dirty };
        let map = DirtyMap::new([9; 16], 0, 0, vec![start]);
        let layout = Layout { slots: 128, data_bytes: 4 << 20, frame_bytes: 4096 };
        let memory = RingMemory::plain(layout, &[]);
        let volume = VolumeStart { id: VOLUME, sectors: 4 * MIB, gap: None };
        let writer = RingWriter::new(memory.clone());
        let mut core = Core::new(&[volume], map, writer, Seq(0), Seq(1 << 40));
        core.begin_sync(SyncMode::new(timeout, left, 0));
        core.peer(Peer::Able);
        core.link(Some(Mode::Send));
        core.allow_catch_up(u64::MAX);
        let encoder = RingReader::new(memory);
        let (local, answered) = (Vec::new(), Vec::new());
        Group { core, encoder, local, answered, now_ns: 0, requests: 0 }
    }

    /// One whose answers wait for a second at most, in sync, with a lease just granted.
    fn in_sync() -> Group {
        let mut group = Group::new(Some(Duration::from_secs(1)), None);
        group.pass(1200);
        assert_eq!(group.stage(), (Stage::Sync, None));
        assert_eq!(group.core.lease_asked(), Some(LEASE));
        group
    }

    fn stage(&self) -> (Stage, Option<Why>) {
        let (view, _) = self.core.sync_view();
        (view.stage, view.why)
    }

    fn pass(&mut self, ms: u64) {
        for _ in 0..ms / 10 {
            self.now_ns += 10 * MS_NS;
            self.core.set_now(self.now_ns);
            self.turn();
        }
    }

    fn turn(&mut self) {
        self.core.poll();
        while let Some(effect) = self.core.effect() {
            match effect {
                Effect::CommitMap(_) => self.core.map_committed(),
                Effect::Copy { op, .. } => self.core.copied(op, Ok(())),
                Effect::Local { op, io, .. } => self.local.push((op, io)),
                Effect::Complete { request, result } => self.answered.push((request.0, result)),
                Effect::Reserve(seq) => self.core.ceiling_reserved(seq),
                Effect::NoteLease(_) => self.core.lease_noted(),
            }
            self.core.poll();
        }
    }

    fn ask(&mut self, ask: Ask, start: u64, sectors: u64) -> u64 {
        let id = RequestId(self.requests);
        self.requests += 1;
        let request = Request { id, volume: VOLUME, ask, start: Sector(start), sectors };
        self.core.submit(request);
        self.turn();
        id.0
    }

    fn write(&mut self, start: u64, sectors: u64) -> u64 {
        self.ask(Ask::Write { fua: false }, start, sectors)
    }

    /// The disk does all that it was told.
    fn done(&mut self) {
        for (op, io) in std::mem::take(&mut self.local) {
            if matches!(io, LocalIo::Read { .. }) {
                let read = ReadBack { data: &[0; 1 << 20], zeros: true, hashes: &[] };
                self.core.read_ended(op, Ok(read));
            } else {
                self.core.local_ended(op, Ok(()));
            }
        }
        self.turn();
    }

    /// Everything up to here is final-durable.
    fn durable(&mut self, seq: Seq) {
        while self.encoder.take(|_, _| true) {}
        self.encoder.encoded();
        self.core.final_durable(seq);
        self.turn();
    }

    fn answers(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.answered).into_iter().map(|(request, _)| request).collect()
    }
}

#[test]
fn an_answer_waits_for_its_disk_and_for_the_target() {
    let mut group = Group::in_sync();
    let first = group.write(0, 8);
    let second = group.write(8, 8);
    group.done();
    assert!(group.answers().is_empty());
    group.durable(Seq(1));
    assert_eq!(group.answers(), [first]);
    group.durable(Seq(2));
    assert_eq!(group.answers(), [second]);
    // The target may be first.
    let third = group.write(0, 8);
    group.durable(group.core.last_seq());
    assert!(group.answers().is_empty());
    assert!(!group.core.is_idle());
    group.done();
    assert_eq!(group.answers(), [third]);
}

#[test]
fn a_request_of_several_records_waits_for_the_last() {
    let mut group = Group::in_sync();
    let wide = group.write(MIB / 2, 2 * MIB);
    group.done();
    assert_eq!(group.core.last_seq(), Seq(3));
    group.durable(Seq(2));
    assert!(group.answers().is_empty());
    group.durable(Seq(3));
    assert_eq!(group.answers(), [wide]);
    let zeros = group.ask(Ask::Zero { unmap: true, fua: false }, 0, 4 * MIB);
    group.done();
    assert!(group.answers().is_empty());
    group.durable(group.core.last_seq());
    assert_eq!(group.answers(), [zeros]);
}

#[test]
fn a_flush_waits_for_all_before_it() {
    let mut group = Group::in_sync();
    let write = group.write(0, 8);
    let flush = group.ask(Ask::Flush, 0, 0);
    group.done();
    group.durable(Seq(1));
    assert_eq!(group.answers(), [write]);
    group.durable(Seq(2));
    assert_eq!(group.answers(), [flush]);
}

#[test]
fn what_waits_too_long_is_answered_when_no_lease_is_left() {
    let mut group = Group::in_sync();
    let write = group.write(0, 8);
    group.done();
    group.pass(990);
    assert_eq!(group.core.lease_asked(), Some(LEASE), "it may still come in time");
    group.pass(10);
    assert_eq!(group.stage(), (Stage::Leaving, Some(Why::Slow)));
    assert_eq!(group.core.lease_asked(), None);
    group.pass(2080);
    assert!(group.answers().is_empty());
    group.pass(20);
    assert_eq!(group.answers(), [write]);
    assert_eq!(group.stage(), (Stage::Async, Some(Why::Slow)));
    // From now on nothing waits, until the target has kept up for a while.
    let another = group.write(8, 8);
    group.done();
    assert_eq!(group.answers(), [another]);
    group.pass(5000);
    assert_eq!(group.stage().0, Stage::Async);
    group.durable(group.core.last_seq());
    group.pass(2300);
    assert_eq!(group.stage(), (Stage::Sync, None));
}

#[test]
fn a_write_without_a_record_waits_until_no_lease_is_left() {
    let mut group = Group::in_sync();
    // Nobody empties the ring.
    let mut count = 0;
    while !group.core.is_overflowing() {
        group.write(0, MIB / 2);
        group.done();
        count += 1;
        assert!(count < 100, "the ring never fills");
    }
    let uncaptured = group.requests - 1;
    assert_eq!(group.stage(), (Stage::Leaving, Some(Why::Gap)));
    assert_eq!(group.core.lease_asked(), None);
    group.durable(group.core.last_seq());
    let answers = group.answers();
    assert_eq!(answers.len() as u64, uncaptured, "what has a record is answered");
    assert!(!answers.contains(&uncaptured));
    group.pass(2090);
    assert!(group.answers().is_empty());
    group.pass(10);
    assert_eq!(group.answers(), [uncaptured]);
    // It is in a gap until it has been caught up, and that is final-durable.
    for _ in 0..20 {
        group.pass(200);
        assert_ne!(group.stage(), (Stage::Sync, None));
        group.done();
    }
    assert_eq!(group.core.gap(VOLUME), None);
    group.durable(group.core.last_seq());
    group.pass(3000);
    assert_eq!(group.stage(), (Stage::Sync, None));
}

/// What was on its way is dropped, and the new term's records go on after its sequences: their being final-durable
/// says nothing of it.
#[test]
fn a_doubt_makes_nothing_final_durable_that_was_on_its_way() {
    let mut group = Group::in_sync();
    let held = group.write(0, 8);
    group.done();
    let under_way = group.write(8, 8);
    group.core.begin_doubt();
    group.turn();
    assert_eq!(group.stage(), (Stage::Leaving, Some(Why::Gap)));
    group.done();
    group.durable(Seq(2));
    assert!(group.answers().is_empty());
    group.core.maintain();
    group.turn();
    assert!(group.core.is_ready_for_term());
    group.core.end_doubt(TermId([2; 16]), Seq(2), Seq(1 << 40));
    group.turn();
    group.durable(group.core.last_seq());
    group.pass(2090);
    assert!(group.answers().is_empty());
    group.pass(10);
    assert_eq!(group.answers(), [held, under_way]);
}

#[test]
fn an_error_of_the_disk_waits_as_well() {
    let mut group = Group::in_sync();
    let write = group.write(0, 8);
    group.durable(group.core.last_seq());
    let [(op, LocalIo::Write { .. })] = group.local[..] else { panic!("{:?}", group.local) };
    group.local.clear();
    group.core.local_ended(op, Err(libc::EIO));
    group.turn();
    assert_eq!(group.stage(), (Stage::Leaving, Some(Why::Gap)));
    group.pass(2090);
    assert_eq!(group.answered, []);
    group.pass(10);
    assert_eq!(group.answered, [(write, Err(libc::EIO))]);
}

#[test]
fn an_agent_that_follows_another_waits_for_its_leases() {
    for timeout in [None, Some(Duration::from_secs(1))] {
        let mut group = Group::new(timeout, Some(LEASE));
        let first = group.write(0, 8);
        group.done();
        group.durable(Seq(1));
        assert_eq!(group.answers(), [first], "it is at the target");
        let second = group.write(0, 8);
        group.done();
        group.pass(2090);
        assert!(group.answers().is_empty());
        group.pass(10);
        assert_eq!(group.answers(), [second]);
    }
}

#[test]
fn a_stop_in_order_leaves_no_lease_behind() {
    let mut group = Group::in_sync();
    group.core.stop_leases();
    group.pass(10);
    assert!(group.core.has_granted());
    group.pass(2090);
    assert!(!group.core.has_granted());
}
