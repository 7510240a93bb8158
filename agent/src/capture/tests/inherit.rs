//! Rings that were left behind: what each state of a slot means, and what is refused.

use std::sync::{Arc, atomic::Ordering};

use tidemark_journal::{
    GapReason, GroupId, Kind, Record, Sector, Seq, TermId, VolumeId, record::flag,
};

use super::super::{
    gap::Gap,
    ring::{self, About, Inherited, Layout, NotOurs, RingMemory, RingWriter, SlotRef},
};
use crate::{clock::JournalClock, state::COUNT_MAX};

const VOLUMES: [(VolumeId, u64); 2] = [(VolumeId(1), 1 << 20), (VolumeId(5), 2048)];
const TERM: TermId = TermId([4; 16]);
const LAYOUT: Layout = Layout { slots: 128, data_bytes: 1 << 20, frame_bytes: 4096 };
/// The term goes on after this.
const FORK: u64 = 100;

fn about() -> About {
    let clock = JournalClock::after(5);
    About { group: GroupId([1; 16]), id: 7, clock, volumes: VOLUMES.to_vec() }
}

/// A ring in use, and its next sequence.
struct Bench {
    memory: Arc<RingMemory>,
    writer: RingWriter,
    seq: u64,
}

impl Bench {
    fn new() -> Bench {
        let memory = RingMemory::create(&about(), LAYOUT).unwrap();
        memory.begin_term(TERM, Seq(FORK));
        Bench { writer: RingWriter::new(memory.clone()), memory, seq: FORK }
    }

    fn reserve(&mut self, kind: Kind, flags: u8, sectors: u32) -> SlotRef {
        self.seq += 1;
        let (seq, start) = (Seq(self.seq), Sector(self.seq % 64 * 8));
        let volume = VOLUMES[0].0;
        let record = Record { kind, flags, volume, seq, time_ns: self.seq, start, sectors };
        assert!(self.writer.has_room(record.payload_bytes(), true));
        self.writer.reserve(&record, true)
    }

    fn committed(&mut self, kind: Kind, flags: u8, sectors: u32) -> SlotRef {
        let slot = self.reserve(kind, flags, sectors);
        self.writer.commit(slot);
        slot
    }

    fn inherit(&self) -> Result<Inherited, NotOurs> {
        ring::inherit(self.memory.clone(), &VOLUMES, None, Seq(FORK)..=Seq(1000))
    }

    fn word(&self, at: u64) -> &std::sync::atomic::AtomicU64 {
        self.memory.word(at)
    }
}

/// The records that the encoder of the next agent takes.
fn taken(inherited: &Inherited) -> Vec<(Kind, u64)> {
    let (mut reader, mut taken) = (inherited.reader(), Vec::new());
    while reader.take(|record, payload| {
        assert_eq!(payload.len() as u64, record.payload_bytes());
        taken.push((record.kind, record.seq.0));
        true
    }) {}
    taken
}

#[test]
fn each_state_of_a_slot_has_its_consequence() {
    let mut bench = Bench::new();
    let kinds = [
        (Kind::Write, flag::FUA, 8),
        (Kind::Zero, flag::UNMAP, 64),
        (Kind::Discard, flag::UNMAP, 9),
        (Kind::Sync, 0, 8),
        (Kind::Flush, 0, 0),
    ];
    let (mut expected, mut redo, mut failed) = (Vec::new(), Vec::new(), Vec::new());
    for (kind, flags, sectors) in kinds {
        let writes = matches!(kind, Kind::Write | Kind::Zero | Kind::Discard);
        bench.reserve(kind, flags, sectors);
        expected.push((Kind::Void, bench.seq));
        let slot = bench.committed(kind, flags, sectors);
        expected.push((kind, bench.seq));
        redo.extend(writes.then_some((slot, bench.seq)));
        let slot = bench.committed(kind, flags, sectors);
        bench.writer.local_done(slot);
        expected.push((kind, bench.seq));
        let slot = bench.committed(kind, flags, sectors);
        bench.writer.local_failed(slot);
        expected.push((kind, bench.seq));
        failed.extend(writes.then_some((slot, bench.seq)));
        let slot = bench.committed(kind, flags, sectors);
        bench.writer.local_failed(slot);
        bench.writer.local_done(slot);
        expected.push((kind, bench.seq));
        let slot = bench.reserve(kind, flags, sectors);
        bench.writer.make_void(slot);
        expected.push((Kind::Void, bench.seq));
    }
    // And again, as by an agent that died before it had done anything.
    for _ in 0..2 {
        let left = bench.inherit().unwrap();
        assert_eq!((left.last_seq, left.framed), (Seq(bench.seq), Seq(FORK)));
        let named = |list: &[(SlotRef, Record)]| -> Vec<(SlotRef, u64)> {
            list.iter().map(|(slot, record)| (*slot, record.seq.0)).collect()
        };
        assert_eq!(named(&left.redo), redo);
        assert_eq!(named(&left.failed), failed);
        assert_eq!(taken(&left), expected);
        assert_eq!(left.gaps, [None, None]);
    }
    // When all of it is through, all of the ring is free again.
    let left = bench.inherit().unwrap();
    let (mut writer, mut reader) = (left.writer(), left.reader());
    for (slot, _) in left.redo.iter().chain(&left.failed) {
        writer.local_done(*slot);
    }
    while reader.take(|_, _| true) {}
    reader.encoded();
    writer.collect();
    assert!(writer.is_drained());
    assert_eq!(writer.fill_permille(), 0);
}

#[test]
fn the_encoder_goes_on_after_what_lies_in_frames() {
    let mut bench = Bench::new();
    for _ in 0..5 {
        let slot = bench.committed(Kind::Write, 0, 8);
        bench.writer.local_done(slot);
    }
    // The frame was put into the outbox; that its records are encoded was not noted any more.
    let in_frames = Some(Seq(FORK + 3));
    let range = Seq(FORK)..=Seq(1000);
    let left = ring::inherit(bench.memory.clone(), &VOLUMES, in_frames, range.clone()).unwrap();
    assert_eq!(taken(&left), [(Kind::Write, FORK + 4), (Kind::Write, FORK + 5)]);
    // It was acknowledged and its frame freed since.
    bench.word(ring::FRAMED_SEQ_AT).store(FORK + 5, Ordering::Release);
    let left = ring::inherit(bench.memory.clone(), &VOLUMES, None, range).unwrap();
    assert_eq!((taken(&left), left.last_seq), (vec![], Seq(FORK + 5)));
    // Slots were being freed.
    bench.memory.state(0).store(0, Ordering::Release);
    bench.memory.state(1).store(0, Ordering::Release);
    let left = bench.inherit().unwrap();
    let mut writer = left.writer();
    writer.collect();
    assert_eq!(writer.fill_permille(), 0);
}

#[test]
fn a_gap_whose_record_was_not_noted_yet_is_not_recorded_twice() {
    let owed = Gap::owed(GapReason::Overflow);
    let begun = Gap { begun: true, ..owed };
    let reason = GapReason::Overflow as u8;
    // What the table says, the last record, and what follows.
    let cases = [
        (None, None, None),
        (Some(owed), None, Some(owed)),
        (Some(owed), Some((Kind::GapBegin, reason)), Some(begun)),
        (Some(begun), Some((Kind::GapBegin, reason)), Some(begun)),
        (Some(begun), Some((Kind::GapEnd, 0)), None),
        (Some(owed), Some((Kind::GapEnd, 0)), Some(owed)),
        (Some(begun), Some((Kind::Flush, 0)), Some(begun)),
    ];
    for (noted, last, expected) in cases {
        let mut bench = Bench::new();
        bench.memory.set_gap(0, noted);
        bench.memory.set_gap(1, Some(begun));
        if let Some((kind, flags)) = last {
            bench.committed(kind, flags, 0);
        }
        let left = bench.inherit().unwrap();
        assert_eq!(left.gaps, [expected, Some(begun)], "{noted:?} {last:?}");
        // The next agent but one is told the same.
        assert_eq!(bench.inherit().unwrap().gaps, left.gaps);
    }
    // A record that was not committed becomes void, and says nothing.
    let mut bench = Bench::new();
    bench.memory.set_gap(0, Some(begun));
    bench.reserve(Kind::GapEnd, 0, 0);
    assert_eq!(bench.inherit().unwrap().gaps, [Some(begun), None]);
}

#[test]
fn another_ring_than_the_states_is_refused() {
    let memory = RingMemory::create(&about(), LAYOUT).unwrap();
    let adopt = |about: &About, layout, term| {
        let fd = memory.region().fd().unwrap().try_clone_to_owned().unwrap();
        RingMemory::adopt(fd, about, layout, term).map(|(_, clock)| clock)
    };
    assert!(adopt(&about(), LAYOUT, TERM).is_err(), "it holds no term yet");
    memory.begin_term(TERM, Seq(FORK));
    let mut clock = [0; 16];
    memory.region().copy_out(56, &mut clock).unwrap();
    let (base, started) = clock.split_at(8);
    let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
    assert_eq!(adopt(&about(), LAYOUT, TERM).unwrap().parts(), (number(base), number(started)));

    let other = |change: &dyn Fn(&mut About)| {
        let mut other = about();
        change(&mut other);
        adopt(&other, LAYOUT, TERM).is_err()
    };
    assert!(other(&|about| about.group = GroupId([2; 16])));
    assert!(other(&|about| about.id = 8));
    assert!(other(&|about| about.volumes.truncate(1)));
    assert!(other(&|about| about.volumes[1].1 += 8));
    assert!(other(&|about| about.volumes[1].0 = VolumeId(6)));
    assert!(
        adopt(&about(), Layout { slots: 64, data_bytes: (1 << 20) + 4096, ..LAYOUT }, TERM)
            .is_err()
    );
    assert!(adopt(&about(), LAYOUT, TermId([5; 16])).is_err());
    for at in 0..88 {
        let mut byte = [0];
        memory.region().copy_out(at, &mut byte).unwrap();
        memory.region().copy_in(at, &[byte[0] ^ 0x80]).unwrap();
        assert!(adopt(&about(), LAYOUT, TERM).is_err(), "byte {at}");
        memory.region().copy_in(at, &byte).unwrap();
    }
    memory.end_term();
    assert!(adopt(&about(), LAYOUT, TERM).is_err(), "what it holds is not all");
    memory.begin_term(TERM, Seq(FORK));
    assert!(adopt(&about(), LAYOUT, TERM).is_ok());
}

/// Counters that no agent comes to: the next slot would have been number 0 again, in a release build.
#[test]
fn a_ring_whose_counters_cannot_be_counted_on_from_is_refused() {
    let refused = |number: u64| {
        let bench = Bench::new();
        for counter in [112, 120, 128] {
            bench.word(counter).store(number, Ordering::Release);
        }
        bench.inherit().err().map(|error| error.to_string())
    };
    assert_eq!(refused(COUNT_MAX), None);
    for number in [COUNT_MAX + 1, u64::MAX] {
        let why = refused(number).expect("refused");
        assert!(why.ends_with("its counters"), "{why}");
    }
    // The same of what the payloads take.
    let mut bench = Bench::new();
    bench.committed(Kind::Write, 0, 8);
    let (at, end) = (ring::HEADER_BYTES + 40, ring::HEADER_BYTES + 56);
    let area = LAYOUT.data_bytes;
    let far = u64::MAX / area * area - area;
    bench.word(at).store(far, Ordering::Release);
    bench.word(end).store(far + 4096, Ordering::Release);
    assert!(matches!(bench.inherit().err(), Some(NotOurs::Content("a payload's place"))));
}

#[test]
fn a_ring_that_contradicts_itself_is_refused() {
    const RESERVED: u64 = 112;
    const ENCODED: u64 = 120;
    const FREED: u64 = 128;
    let slot = |number: u64, field: u64| ring::HEADER_BYTES + number * 64 + field;
    // A word, and what is put there.
    let pokes = [
        (RESERVED, 129),
        (ENCODED, 4),
        (ENCODED, 2),
        (FREED, 1),
        (ring::FRAMED_SEQ_AT, 1001),
        (ring::FRAMED_SEQ_AT, FORK - 1),
        (slot(1, 0), 0),
        (slot(1, 0), 16 | 3),
        (slot(1, 8), FORK + 1),
        (slot(2, 8), 1001),
        (slot(1, 16), u64::MAX),
        (slot(1, 24), 1 << 20),
        (slot(1, 32), 8 | 1 << 32 | 99 << 48),
        (slot(1, 32), 8 | 2 << 32 | (Kind::Write as u64) << 48),
        (slot(1, 32), 9 | 1 << 32 | (Kind::Write as u64) << 48),
        (slot(1, 40), 0),
        (slot(1, 40), u64::MAX),
        (slot(1, 40), (1 << 20) - 512),
        (slot(1, 48), 8192),
        (slot(1, 56), 4096),
        (slot(2, 56), 1 << 40),
        (4096, 1 | 9 << 16),
        (4096, 1 | 1 << 24),
        (4096, 1 | 1 << 16 | 2 << 24),
    ];
    for (at, value) in pokes {
        let mut bench = Bench::new();
        for _ in 0..3 {
            bench.committed(Kind::Write, 0, 8);
        }
        assert!(bench.inherit().is_ok());
        bench.word(at).store(value, Ordering::Release);
        let refused = bench.inherit().err();
        assert!(matches!(refused, Some(NotOurs::Content(_))), "{at}: {value:#x}: {refused:?}");
    }
}
