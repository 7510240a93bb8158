//! The frames come back as they went in.

use std::{
    pin::pin,
    task::{Context, Waker},
};

use tidemark_journal::{
    Ancestry, Compression, FrameBuilder, FrameMeta, GroupId, Kind, Record, Sector, TermId, VolumeId,
};

use super::*;
use crate::{capture::ring::Layout, dirty::tests::random::Random};

fn outbox(frame_bytes: u64) -> Arc<Outbox> {
    let layout = Layout { slots: 256, data_bytes: 4096, frame_bytes };
    Outbox::new(RingMemory::plain(layout, &[]))
}

/// Puts a frame in that is there already. False once the outbox is closed.
pub fn keep(outbox: &Outbox, frame: &[u8], facts: &FrameFacts) -> bool {
    let write = |out: &mut [u8]| {
        out.copy_from_slice(frame);
        frame.len()
    };
    outbox.push(frame.len() as u64, facts, write).is_some()
}

fn put(outbox: &Outbox, seq: u64, bytes: usize) {
    let content = vec![seq as u8; bytes];
    let before = Position { term: TermId([1; 16]), seq: Seq(seq - 1) };
    let (last, term) = (Seq(seq), TermId([1; 16]));
    let facts = FrameFacts { before, last, term, time_ns: seq, raw_bytes: 0 };
    assert!(keep(outbox, &content, &facts));
}

#[test]
fn frames_come_back_whole_around_the_end_and_again_after_a_rewind() {
    let outbox = outbox(8192);
    let (mut next, mut freed, mut bytes) = (1, 0, Vec::new());
    for round in 0..50u64 {
        for _ in 0..1 + round % 3 {
            put(&outbox, next, 1000 + (next as usize * 37) % 900);
            next += 1;
        }
        let mut expected = freed + 1;
        outbox.rewind(Seq(freed));
        while let Some(frame) = outbox.take(&mut bytes) {
            assert_eq!(frame.last, Seq(expected));
            assert_eq!(bytes.len(), 1000 + (expected as usize * 37) % 900);
            assert!(bytes.iter().all(|byte| *byte == expected as u8));
            expected += 1;
        }
        assert_eq!(expected, next);
        freed = next - 1;
        outbox.release(Seq(freed));
    }
    let empty = Backlog { area_bytes: 8192, ..Backlog::default() };
    assert_eq!(outbox.backlog(), empty);
}

#[test]
fn a_full_outbox_waits_for_room_and_gives_up_when_closed() {
    let outbox = outbox(8192);
    put(&outbox, 1, 6000);
    let waiting = {
        let outbox = outbox.clone();
        std::thread::spawn(move || put(&outbox, 2, 6000))
    };
    outbox.release(Seq(1));
    waiting.join().unwrap();
    let giving_up = {
        let outbox = outbox.clone();
        std::thread::spawn(move || {
            let before = Position::default();
            let facts = FrameFacts {
                before,
                last: Seq(3),
                term: TermId([1; 16]),
                time_ns: 0,
                raw_bytes: 0,
            };
            keep(&outbox, &[0; 6100], &facts)
        })
    };
    outbox.close();
    assert!(!giving_up.join().unwrap());
}

#[test]
fn held_frames_stay_until_they_are_let_go_and_the_sender_is_woken_then() {
    let outbox = outbox(16384);
    put(&outbox, 1, 1000);
    let take = || outbox.take(&mut Vec::new()).map(|frame| frame.last);
    assert_eq!(take(), Some(Seq(1)), "nothing is held");
    outbox.hold(true);
    put(&outbox, 2, 1000);
    assert_eq!(take(), None);
    assert_eq!((outbox.unsent(), outbox.sent_through(Seq(2))), (1, false));
    // The target has the first one all the same.
    outbox.release(Seq(1));
    assert_eq!(outbox.backlog().frames, 1);

    let woken = || {
        let mut filled = pin!(outbox.filled.notified());
        filled.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready()
    };
    // By the frames that came in, which is of no use to the sender; then no more.
    assert!(woken() && take().is_none() && !woken());
    outbox.hold(true);
    assert!(!woken());
    outbox.hold(false);
    assert!(woken());
    assert_eq!(take(), Some(Seq(2)));
    outbox.hold(false);
    assert!(!woken(), "nothing was held");
}

/// Whatever was put in, taken and freed: the next process finds the frames that this one still keeps.
#[test]
fn the_next_process_finds_the_same_frames() {
    const TERM: TermId = TermId([3; 16]);
    const GROUP: GroupId = GroupId([1; 16]);
    let layout = Layout { slots: 256, data_bytes: 4096, frame_bytes: 16384 };
    let memory = RingMemory::plain(layout, &[]);
    let outbox = Outbox::new(memory.clone());
    let mut builder = FrameBuilder::new(Compression::Off);
    let mut random = Random::new(1);
    let (mut last, mut released, mut rounds) = (0, 0, 0);
    for step in 0..3000u64 {
        if random.percent(60) {
            let sectors = 1 + random.below(9) as u32;
            let (kind, volume, start) = (Kind::Write, VolumeId(1), Sector(0));
            let seq = Seq(last + 1);
            let record = Record { kind, flags: 0, volume, seq, time_ns: step, start, sectors };
            builder.push(&record, [&vec![step as u8; sectors as usize * 512][..]]);
            let before = Position { term: TERM, seq: Seq(last) };
            let frame = builder.finish(&FrameMeta { group: GROUP, term: TERM, before, wall_ns: 0 });
            let bytes = frame.bytes.len() as u64;
            if place(&outbox.state(), layout.frame_bytes, bytes).is_some() {
                let raw_bytes = frame.raw_bytes;
                let facts = FrameFacts { before, last: seq, term: TERM, time_ns: step, raw_bytes };
                assert!(keep(&outbox, frame.bytes, &facts));
                last += 1;
            }
            builder.clear();
        } else if random.percent(70) {
            released += random.below(last - released + 1);
            outbox.release(Seq(released));
        } else {
            outbox.take(&mut Vec::new());
        }
        let next = kept(&memory, GROUP, TERM).unwrap();
        let framed = memory.word(FRAMED_SEQ_AT).load(Ordering::Acquire);
        assert_eq!((next.last().unwrap_or(Seq(framed)), framed), (Seq(last), last));
        let next = next.outbox(memory.clone());
        let (state, found) = (outbox.state(), next.state());
        assert_eq!(state.frames, found.frames, "step {step}");
        // Nothing is put over what is kept.
        assert!(state.frames.is_empty() || (state.start, state.end) == (found.start, found.end));
        rounds = state.end / layout.frame_bytes;
    }
    assert!(rounds > 20, "the area was used {rounds} times");
}

/// Nothing is kept, since the target had it all; a target that lost the last of it again cannot go on with what comes.
#[test]
fn an_inherited_outbox_without_frames_knows_how_far_they_went() {
    let layout = Layout { slots: 256, data_bytes: 4096, frame_bytes: 8192 };
    let memory = RingMemory::plain(layout, &[]);
    let (group, term) = (GroupId([1; 16]), TermId([1; 16]));
    let path = Ancestry::root(TermId([9; 16])).fork(term, Seq(4)).expect("a path");
    let at = |term, seq| Position { term, seq: Seq(seq) };
    memory.begin_term(term, Seq(4));
    let inherit = || kept(&memory, group, term).expect("nothing is wrong").outbox(memory.clone());
    let parent = path.terms()[0].id;
    assert!(
        inherit().covers(at(parent, 2), &path),
        "the first frame follows any end of the parent"
    );
    let outbox = inherit();
    put(&outbox, 5, 200);
    put(&outbox, 6, 200);
    outbox.release(Seq(6));
    for (seq, covered) in [(4, false), (5, false), (6, true)] {
        assert_eq!(inherit().covers(at(term, seq), &path), covered, "{seq}");
    }
    assert!(!inherit().covers(at(parent, 4), &path) && !inherit().covers(at(parent, 2), &path));
}

#[test]
fn frames_that_are_damaged_or_of_others_are_refused() {
    let group = GroupId([1; 16]);
    let layout = Layout { slots: 256, data_bytes: 4096, frame_bytes: 8192 };
    let refused = |term: u8, befores: [u64; 2], spoil: &dyn Fn(&RingMemory)| {
        let memory = RingMemory::plain(layout, &[]);
        let outbox = Outbox::new(memory.clone());
        for (seq, before) in befores.into_iter().enumerate() {
            let (seq, start) = (Seq(seq as u64 + 1), Sector(0));
            let (kind, volume) = (Kind::Flush, VolumeId(1));
            let record = Record { kind, flags: 0, volume, seq, time_ns: 1, start, sectors: 0 };
            let mut builder = FrameBuilder::new(Compression::Off);
            builder.push(&record, [&[][..]]);
            let before = Position { term: TermId([3; 16]), seq: Seq(before) };
            let term = TermId([3; 16]);
            let frame = builder.finish(&FrameMeta { group, term, before, wall_ns: 0 });
            let facts = FrameFacts { before, last: seq, term, time_ns: 1, raw_bytes: 0 };
            keep(&outbox, frame.bytes, &facts);
        }
        spoil(&memory);
        kept(&memory, group, TermId([term; 16])).is_err()
    };
    let poke = |at: u64, byte: u8| {
        move |memory: &RingMemory| {
            memory.region().copy_in(memory.layout().frames_at() + at, &[byte]).unwrap();
        }
    };
    let end = |end: u64| {
        move |memory: &RingMemory| memory.word(FRAMES_END_AT).store(end, Ordering::Release)
    };
    assert!(!refused(3, [0, 1], &|_| {}));
    // A fuzzer's: sums with such counters overflowed.
    let far = |memory: &RingMemory| {
        memory.word(FRAMES_START_AT).store(u64::MAX, Ordering::Release);
    };
    assert!(refused(3, [0, 1], &far), "a start that no agent comes to");
    assert!(refused(4, [0, 1], &|_| {}), "of another term");
    assert!(refused(3, [0, 0], &|_| {}), "not in order");
    for at in [0, 5, 50, 100, 200, 230, 300] {
        assert!(refused(3, [0, 1], &poke(at, 0xee)), "byte {at}");
    }
    for counter in [1, 100, 300, 10_000, u64::MAX] {
        assert!(refused(3, [0, 1], &end(counter)), "end {counter}");
    }
}
