//! Catch-up of ranges that are being written: it is tried honestly before a range is locked.

use tidemark_journal::{GapReason, Sector, Seq, VolumeId};

use super::super::{
    Ask, Effect, LocalIo, OpId, Request, RequestId,
    catchup::{Mode, ReadBack},
    core::{Core, VolumeStart},
    gap::Gap,
    ring::{Layout, RingMemory, RingWriter},
};
use crate::dirty::{
    REGION_SECTORS,
    bitmap::Bits,
    map::{self, DirtyMap},
};

const VOLUME: VolumeId = VolumeId(1);

/// What was to be done in a turn of the engine's loop.
#[derive(Default)]
struct Seen {
    copies: Vec<OpId>,
    writes: Vec<OpId>,
    reads: Vec<(OpId, Sector)>,
}

/// A core whose volume is sent for the first time.
struct Bench {
    core: Core,
    requests: u64,
}

impl Bench {
    fn new(regions: u32) -> Bench {
        let mut uncaptured = Bits::new(regions);
        uncaptured.fill();
        let start = map::VolumeStart {
            id: VOLUME,
            regions,
            written: vec![0],
            uncaptured,
            dirty: Bits::new(regions),
        };
        let map = DirtyMap::new([9; 16], 0, 0, vec![start]);
        let layout = Layout { slots: 1024, data_bytes: 4 << 20, frame_bytes: 4096 };
        let memory = RingMemory::plain(layout, &[]);
        let sectors = u64::from(regions) * REGION_SECTORS;
        let volume =
            VolumeStart { id: VOLUME, sectors, gap: Some(Gap::owed(GapReason::FirstSync)) };
        let core = Core::new(&[volume], map, RingWriter::new(memory), Seq(0), Seq(1 << 40));
        Bench { core, requests: 0 }
    }

    fn connect(&mut self) {
        self.core.link(Some(Mode::Send));
        self.core.allow_catch_up(u64::MAX);
    }

    fn turn(&mut self) -> Seen {
        let mut seen = Seen::default();
        self.core.poll();
        while let Some(effect) = self.core.effect() {
            match effect {
                Effect::CommitMap(_) => self.core.map_committed(),
                Effect::Copy { op, .. } => seen.copies.push(op),
                Effect::Local { op, io: LocalIo::Read { .. }, start, .. } => {
                    seen.reads.push((op, start));
                }
                Effect::Local { op, .. } => seen.writes.push(op),
                Effect::Complete { .. } | Effect::Reserve(_) | Effect::NoteLease(_) => {}
            }
        }
        seen
    }

    fn submit(&mut self, start: u64) {
        let id = RequestId(self.requests);
        self.requests += 1;
        let (ask, start) = (Ask::Write { fua: false }, Sector(start));
        self.core.submit(Request { id, volume: VOLUME, ask, start, sectors: 8 });
    }

    /// A write that is let through at once; it stays under way.
    fn write(&mut self, start: u64) -> OpId {
        self.submit(start);
        let seen = self.turn();
        let [op] = seen.copies[..] else { panic!("the write has to wait") };
        op
    }

    /// Ends writes without a turn.
    fn end(&mut self, op: OpId) {
        self.core.copied(op, Ok(()));
        while let Some(effect) = self.core.effect() {
            assert!(matches!(effect, Effect::Local { op: local, .. } if local == op));
        }
        self.core.local_ended(op, Ok(()));
    }

    fn read_ended(&mut self, op: OpId) {
        let content = ReadBack { data: &[0; 1 << 20], zeros: true, hashes: &[] };
        self.core.read_ended(op, Ok(content));
    }
}

#[test]
fn a_range_that_is_always_busy_is_locked_after_a_while_and_not_before() {
    let mut bench = Bench::new(1);
    let mut under_way = bench.write(0);
    bench.connect();
    // A look is no attempt, however many there are.
    for number in 1..=99u64 {
        bench.core.set_now(number * 1_000_000);
        assert!(bench.turn().reads.is_empty());
        let next = bench.write(number % 100 * 8);
        bench.end(under_way);
        under_way = next;
    }
    bench.core.set_now(200_000_000);
    assert!(bench.turn().reads.is_empty(), "a write is under way");
    bench.submit(2040);
    assert!(bench.turn().copies.is_empty(), "the range is wanted for a read");
    bench.end(under_way);
    let seen = bench.turn();
    let [(read, Sector(0))] = seen.reads[..] else { panic!("the read had its turn") };
    assert!(seen.copies.is_empty(), "a write goes past the lock");
    bench.read_ended(read);
    let seen = bench.turn();
    assert_eq!((seen.copies.len(), seen.reads.len()), (1, 0));
    assert_eq!(bench.core.gap(VOLUME), None);
}

#[test]
fn a_range_is_locked_after_four_reads_that_were_lost() {
    let mut bench = Bench::new(1);
    bench.connect();
    for lost in 0..4 {
        let seen = bench.turn();
        let [(read, _)] = seen.reads[..] else { panic!("read {lost} begins at once") };
        let write = bench.write(0);
        bench.end(write);
        bench.read_ended(read);
        assert!(bench.core.gap(VOLUME).is_some());
    }
    let seen = bench.turn();
    let [(read, _)] = seen.reads[..] else { panic!("the read with the lock") };
    bench.submit(0);
    assert!(bench.turn().copies.is_empty(), "a write goes past the lock");
    bench.read_ended(read);
    assert_eq!(bench.turn().copies.len(), 1);
    assert_eq!(bench.core.gap(VOLUME), None);
}

#[test]
fn a_busy_range_holds_up_no_other() {
    let mut bench = Bench::new(3);
    let busy = bench.write(REGION_SECTORS);
    bench.connect();
    let seen = bench.turn();
    let read: Vec<u64> = seen.reads.iter().map(|(_, start)| start.0).collect();
    assert_eq!(read, [0, 2 * REGION_SECTORS]);
    seen.reads.iter().for_each(|(op, _)| bench.read_ended(*op));
    bench.end(busy);
    let seen = bench.turn();
    let [(read, Sector(REGION_SECTORS))] = seen.reads[..] else { panic!("it is free now") };
    bench.read_ended(read);
    bench.turn();
    assert_eq!(bench.core.gap(VOLUME), None);
}
