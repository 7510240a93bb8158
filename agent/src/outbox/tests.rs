//! The frames come back as they went in.

use std::{
    pin::pin,
    task::{Context, Waker},
};

use tidemark_journal::TermId;

use super::*;
use crate::capture::ring::Layout;

fn outbox(frame_bytes: u64) -> Arc<Outbox> {
    let layout = Layout { slots: 256, data_bytes: 4096, frame_bytes };
    Outbox::new(RingMemory::plain(layout, &[]))
}

fn put(outbox: &Outbox, seq: u64, bytes: usize) {
    let content = vec![seq as u8; bytes];
    let (meta, payload) = content.split_at(bytes / 3);
    let before = Position { term: TermId([1; 16]), seq: Seq(seq - 1) };
    let facts = FrameFacts { before, last: Seq(seq), time_ns: seq, raw_bytes: 0 };
    assert!(outbox.push([meta, payload], &facts));
}

#[test]
fn frames_come_back_whole_around_the_end_and_again_after_a_rewind() {
    let outbox = outbox(8192);
    let (mut next, mut freed) = (1, 0);
    for round in 0..50u64 {
        for _ in 0..1 + round % 3 {
            put(&outbox, next, 1000 + (next as usize * 37) % 900);
            next += 1;
        }
        let mut expected = freed + 1;
        outbox.rewind(Seq(freed));
        while let Some(loan) = outbox.lend() {
            assert_eq!(loan.info().last, Seq(expected));
            assert_eq!(loan.len(), 1000 + (expected as usize * 37) % 900);
            assert!(loan.iter().all(|byte| *byte == expected as u8));
            expected += 1;
        }
        assert_eq!(expected, next);
        freed = next - 1;
        outbox.release(Seq(freed));
    }
    assert_eq!(outbox.backlog(), Backlog::default());
}

#[test]
fn a_lent_frame_stays_though_it_is_acknowledged() {
    let outbox = outbox(8192);
    put(&outbox, 1, 4000);
    put(&outbox, 2, 4000);
    let loan = outbox.lend().unwrap();
    outbox.release(Seq(2));
    assert_eq!(outbox.backlog().frames, 2, "nothing before the lent frame was freed");
    assert!(loan.iter().all(|byte| *byte == 1));
    drop(loan);
    assert_eq!(outbox.backlog().frames, 0, "the acknowledgement counts when it is given back");
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
            let facts = FrameFacts { before, last: Seq(3), time_ns: 0, raw_bytes: 0 };
            outbox.push([&[0; 100], &[0; 6000]], &facts)
        })
    };
    outbox.close();
    assert!(!giving_up.join().unwrap());
}

#[test]
fn held_frames_stay_until_they_are_let_go_and_the_sender_is_woken_then() {
    let outbox = outbox(16384);
    put(&outbox, 1, 1000);
    drop(outbox.lend().expect("nothing is held"));
    outbox.hold(true);
    put(&outbox, 2, 1000);
    assert!(outbox.lend().is_none());
    assert_eq!((outbox.unsent(), outbox.sent_through(Seq(2))), (1, false));
    // The target has the first one all the same.
    outbox.release(Seq(1));
    assert_eq!(outbox.backlog().frames, 1);

    let woken = || {
        let mut filled = pin!(outbox.filled.notified());
        filled.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready()
    };
    // By the frames that came in, which is of no use to the sender; then no more.
    assert!(woken() && outbox.lend().is_none() && !woken());
    outbox.hold(true);
    assert!(!woken());
    outbox.hold(false);
    assert!(woken());
    assert_eq!(outbox.lend().map(|loan| loan.info().last), Some(Seq(2)));
    outbox.hold(false);
    assert!(!woken(), "nothing was held");
}
