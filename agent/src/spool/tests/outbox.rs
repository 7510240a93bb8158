//! An outbox with a spool, a sender and acknowledgements: what is sent is the journal, in order.

use std::time::Duration;

use tidemark_journal::Ancestry;

use super::{media::Media, *};
use crate::{
    capture::ring::{Layout, RingMemory},
    dirty::tests::random::Random,
    outbox::{FrameFacts, Outbox, tests::keep},
};

fn memory() -> Arc<RingMemory> {
    let layout = Layout { slots: 256, data_bytes: 4096, frame_bytes: 128 << 10 };
    RingMemory::plain(layout, &[])
}

fn push(outbox: &Outbox, journal: &Journal) {
    let (last, bytes) = journal.frames.last().unwrap();
    let view = tidemark_journal::FrameView::parse(bytes).unwrap();
    let (before, time_ns) = (view.header().before(), view.header().time_ns.get());
    let facts = FrameFacts { before, last: last.seq, term: last.term, time_ns, raw_bytes: 0 };
    assert!(keep(outbox, bytes, &facts));
}

/// Sends the next frame; its last sequence.
fn send(outbox: &Outbox, reader: &mut Option<Reader>, journal: &Journal) -> Option<Seq> {
    let of = |last: Seq| journal.frames.iter().find(|(position, _)| position.seq == last).unwrap();
    let mut bytes = Vec::new();
    if let Some((after, index)) = outbox.next_in_spool() {
        let reader = reader.get_or_insert_with(|| Reader::new(index));
        let frame = reader.next(after, &mut bytes).unwrap();
        assert_eq!(of(frame.last.seq).1, bytes);
        outbox.sent_spooled(&frame);
        return Some(frame.last.seq);
    }
    let frame = outbox.take(&mut bytes)?;
    assert_eq!(of(frame.last).1, bytes);
    Some(frame.last)
}

#[test]
fn whatever_is_slow_the_frames_are_sent_in_order() {
    let (mut spilled, mut unspilled) = (0, 0);
    for seed in 0..30 {
        let mut random = Random::new(seed);
        let disk = Disk::default();
        let outbox = Outbox::new(memory());
        let store = open(&disk);
        outbox.use_spool(store.index().clone(), true);
        let mut worker = Worker::new(store, outbox.clone());
        let (mut journal, mut reader) = (Journal::new(), None);
        let (mut sent, mut acked, mut link_up) = (Seq(0), Seq(0), true);
        for _ in 0..600 {
            match random.below(12) {
                // Room in memory as the encoder wants it: else it waits.
                0..=3 if outbox.backlog().fill_permille < 700 => {
                    journal.add(1 + random.below(40) as u32);
                    push(&outbox, &journal);
                }
                4..=6 => {
                    worker.turn(Duration::ZERO, &|_| {});
                }
                7..=8 if link_up => {
                    if let Some(last) = send(&outbox, &mut reader, &journal) {
                        assert_eq!(last.0, sent.0 + 1, "seed {seed}: one frame after the other");
                        sent = last;
                    }
                }
                9 => {
                    acked = Seq(acked.0 + random.below(sent.0.max(acked.0) - acked.0 + 1));
                    outbox.release(acked);
                }
                10 => outbox.forget(acked),
                11 if random.below(4) == 0 => {
                    link_up = !link_up;
                    outbox.link_ended();
                    outbox.rewind(acked);
                    let covers = outbox
                        .covers(Position { term: term(1), seq: acked }, &Ancestry::root(term(1)));
                    assert!(covers, "seed {seed}");
                    (sent, reader) = (acked, None);
                }
                _ => {}
            }
            let spool = outbox.spool();
            spilled += u32::from(spool.in_use);
            unspilled += u32::from(!spool.in_use && outbox.backlog().frames > 0);
        }
        // In the end everything is sent, and nothing is left.
        for _ in 0..2000 {
            outbox.release(sent);
            outbox.forget(sent);
            worker.turn(Duration::ZERO, &|_| {});
            if let Some(last) = send(&outbox, &mut reader, &journal) {
                assert_eq!(last.0, sent.0 + 1, "seed {seed}");
                sent = last;
            }
        }
        assert_eq!(sent, journal.end.seq, "seed {seed}: everything was sent");
        assert_eq!((outbox.backlog().bytes, outbox.spool().bytes), (0, 0), "seed {seed}");
    }
    assert!(spilled > 500 && unspilled > 500, "{spilled} {unspilled}");
}

#[test]
fn what_was_sent_past_the_spool_is_noted_before_it_is_used_again() {
    let disk = Disk::default();
    let outbox = Outbox::new(memory());
    let store = open(&disk);
    outbox.use_spool(store.index().clone(), true);
    let mut worker = Worker::new(store, outbox.clone());
    let (mut journal, mut reader) = (Journal::new(), None);
    let fill = |journal: &mut Journal| {
        while outbox.backlog().fill_permille < 700 {
            journal.add(20);
            push(&outbox, journal);
        }
    };
    let told = std::cell::RefCell::new(Vec::new());
    let mut turn = || {
        told.borrow_mut().clear();
        worker.turn(Duration::ZERO, &|what| told.borrow_mut().push(what));
        told.borrow().first().copied()
    };
    fill(&mut journal);
    assert_eq!(turn(), Some(Told::Spooled(journal.end, 0)));
    while send(&outbox, &mut reader, &journal).is_some() {}
    outbox.release(journal.end.seq);
    // These go past it.
    journal.add(1);
    push(&outbox, &journal);
    assert_eq!(send(&outbox, &mut reader, &journal), Some(journal.end.seq));
    outbox.release(journal.end.seq);
    fill(&mut journal);
    assert_eq!(turn(), Some(Told::Settle), "its old end is not where these frames begin");
    let acked = journal.end.seq.0 - outbox.backlog().frames;
    outbox.forget(Seq(acked));
    assert_eq!(turn(), None, "what is in it is removed");
    assert_eq!(turn(), Some(Told::Spooled(journal.end, 0)));
    assert!(outbox.spool().in_use);
}

/// The sender hangs in the middle of a frame: neither that one nor those behind it keep memory from the
/// frames that come.
#[test]
fn a_link_that_hangs_keeps_no_room_from_new_frames() {
    let outbox = Outbox::new(memory());
    let store = open(&Disk::default());
    outbox.use_spool(store.index().clone(), true);
    let mut worker = Worker::new(store, outbox.clone());
    let (mut journal, mut frame) = (Journal::new(), Vec::new());
    journal.add(20);
    push(&outbox, &journal);
    assert!(outbox.take(&mut frame).is_some());
    let area = outbox.backlog().area_bytes;
    let mut passed = 0;
    while passed < 3 * area {
        while outbox.backlog().fill_permille < 700 {
            journal.add(20);
            push(&outbox, &journal);
            passed += journal.frames.last().unwrap().1.len() as u64;
        }
        worker.turn(Duration::ZERO, &|_| {});
        assert_eq!(outbox.backlog().bytes, 0, "all of it went to the spool");
    }
    assert_eq!(journal.frames[0].1, frame);
}

#[test]
fn the_next_process_finds_ring_and_spool_in_one_piece() {
    for seed in 0..40 {
        let mut random = Random::new(seed);
        let (disk, memory) = (Disk::default(), memory());
        memory.begin_term(term(1), Seq(0));
        let outbox = Outbox::new(memory.clone());
        let store = open(&disk);
        outbox.use_spool(store.index().clone(), true);
        let mut worker = Worker::new(store, outbox.clone());
        let mut journal = Journal::new();
        for _ in 0..120 {
            if outbox.backlog().fill_permille < 700 {
                journal.add(1 + random.below(40) as u32);
                push(&outbox, &journal);
            }
            if random.below(2) == 0 {
                worker.turn(Duration::ZERO, &|_| {});
            }
        }
        let acked = Seq(random.below(20));
        // It dies, and the memory is inherited.
        drop(worker);
        let store = open(&disk);
        let end = store.index().ends().map(|(_, end)| end);
        let mut kept = crate::outbox::kept(&memory, GROUP, term(1)).unwrap();
        assert!(!kept.join(&memory, end, acked, Seq(0)).unwrap(), "seed {seed}");
        let outbox = kept.outbox(memory.clone());
        outbox.use_spool(store.index().clone(), true);
        outbox.release(acked);
        outbox.rewind(acked);
        let (mut reader, mut sent) = (None, acked);
        while let Some(last) = send(&outbox, &mut reader, &journal) {
            assert_eq!(last.0, sent.0 + 1, "seed {seed}");
            sent = last;
        }
        assert_eq!(sent, journal.end.seq, "seed {seed}");
        // Without the spool the ring is not whole.
        let mut kept = crate::outbox::kept(&memory, GROUP, term(1)).unwrap();
        assert!(end.is_some() && kept.join(&memory, None, Seq(0), Seq(0)).is_err(), "seed {seed}");
    }
}

#[test]
fn a_spool_that_fails_is_said_and_one_that_is_lost_is_not_resumed() {
    let disk = Disk::default();
    let outbox = Outbox::new(memory());
    let store = open(&disk);
    outbox.use_spool(store.index().clone(), true);
    let mut worker = Worker::new(store, outbox.clone());
    let mut journal = Journal::new();
    let fill = |journal: &mut Journal| {
        while outbox.backlog().fill_permille < 700 {
            journal.add(40);
            push(&outbox, journal);
        }
    };
    fill(&mut journal);
    disk.fail_next_create();
    worker.turn(Duration::ZERO, &|_| panic!("nothing was spooled"));
    let problem = outbox.spool().problem.unwrap();
    assert!(problem.contains("cannot be written: as asked for"), "{problem}");
    assert!(!outbox.spool().in_use, "it is left alone for a while");

    let outbox = Outbox::new(memory());
    let store = open(&disk);
    outbox.use_spool(store.index().clone(), true);
    let mut worker = Worker::new(store, outbox.clone());
    let mut journal = Journal::new();
    while outbox.backlog().fill_permille < 700 {
        journal.add(40);
        push(&outbox, &journal);
    }
    worker.turn(Duration::ZERO, &|_| {});
    assert!(outbox.spool().in_use);
    let path = Ancestry::root(term(1));
    let start = Position { term: term(1), seq: Seq(0) };
    assert!(outbox.covers(start, &path));
    outbox.spool_lost("the spool is damaged".into());
    assert!(!outbox.covers(start, &path) && outbox.next_in_spool().is_none());
    // What is compared instead needs none of it.
    outbox.discard();
    outbox.resume();
    worker.turn(Duration::ZERO, &|_| {});
    assert_eq!((outbox.spool().bytes, disk.names().unwrap().len()), (0, 0));
}

#[test]
fn what_is_said_of_a_spool_is_over_when_its_cause_is() {
    let disk = Disk::default();
    let outbox = Outbox::new(memory());
    let store = open(&disk);
    outbox.use_spool(store.index().clone(), true);
    let mut worker = Worker::new(store, outbox.clone());
    let mut turn = || assert!(worker.turn(Duration::ZERO, &|_| {}));
    let mut journal = Journal::new();
    let mut fill = |permille: u64| {
        while outbox.backlog().fill_permille < permille {
            journal.add(40);
            push(&outbox, &journal);
        }
        journal.end.seq
    };
    let said = || outbox.spool().problem.unwrap_or_default();
    fill(700);
    turn();
    assert!(outbox.spool().in_use && said().is_empty());
    outbox.spool_lost("the spool is damaged".into());
    assert_eq!(said(), "the spool is damaged");
    outbox.discard();
    assert_eq!(said(), "", "it was given up");
    outbox.resume();
    turn();

    // A disk that has failed is a problem also when nothing waits any more..
    let last = fill(700);
    disk.fail_next_create();
    turn();
    outbox.release(last);
    assert!(outbox.backlog().frames == 0 && said().contains("cannot be written"), "{}", said());
    // ..until something was done there.
    outbox.discard();
    assert!(said().contains("cannot be written"), "{}", said());
    outbox.resume();
    turn();
    assert_eq!(said(), "", "it was emptied");

    // That is tried with whatever waits next, however little.
    outbox.not_spooled(&SpoolError::Full);
    fill(1);
    turn();
    assert!(said().contains("is full"), "it is left alone for a while: {}", said());
    std::thread::sleep(Duration::from_millis(600));
    turn();
    assert!(said().is_empty() && outbox.spool().in_use, "{}", said());
}
