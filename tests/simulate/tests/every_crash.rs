//! All sequences of up to three operations of a source, with its power cut before every effect of the
//! last one on either of its disks.
//!
//! After each cut the source starts again. Whatever then differs from what the target has durably is
//! marked (invariant 2), the disk holds what a flush had made safe, and nothing else than was written, and
//! every point that the target offers is as it was (invariant 3). A third of the crashes are followed until
//! everything is at rest: both sides are equal then.

use std::panic::{AssertUnwindSafe, catch_unwind};

use tidemark_simulate::script::{ALL, Crash, Disk, Do, crash};

/// All sequences that begin so: by themselves, and with one and two operations more.
fn every_crash(first: Do) {
    let seconds = ALL.map(|second| vec![first, second]);
    let thirds = seconds.iter().flat_map(|two| ALL.map(|third| [&two[..], &[third]].concat()));
    let sequences: Vec<Vec<Do>> =
        [vec![first]].into_iter().chain(seconds.clone()).chain(thirds).collect();
    assert_eq!(sequences.len(), 1 + ALL.len() + ALL.len() * ALL.len());
    let mut crashes = 0;
    for sequence in sequences {
        for disk in [Disk::State, Disk::Volume] {
            for effect in 0.. {
                // What the disks keep of what was not flushed is another matter each time.
                crashes += 1;
                let play = || crash(&sequence, disk, effect, crashes);
                match catch_unwind(AssertUnwindSafe(play)) {
                    Ok(Crash::Cut) => {}
                    Ok(Crash::After) => break,
                    Err(_) => {
                        panic!("{sequence:?}, cut before effect {effect} on the {disk:?} disk")
                    }
                }
            }
        }
    }
    println!("{first:?}: {crashes} crashes");
    assert!(crashes > 500, "{crashes} crashes");
}

#[test]
fn every_crash_from_a_write_on() {
    every_crash(Do::Write);
}

#[test]
fn every_crash_from_writes_that_overlap_on() {
    every_crash(Do::Overlap);
}

#[test]
fn every_crash_from_a_discard_on() {
    every_crash(Do::Discard);
}

#[test]
fn every_crash_from_a_mark_on() {
    every_crash(Do::Mark);
}

#[test]
fn every_crash_from_an_acknowledgement_on() {
    every_crash(Do::Send);
}

#[test]
fn every_crash_from_a_tidy_map_on() {
    every_crash(Do::Tidy);
}

#[test]
fn every_crash_from_an_overflow_on() {
    every_crash(Do::Overflow);
}

#[test]
fn every_crash_from_a_write_that_is_refused_on() {
    every_crash(Do::Refuse);
}

#[test]
fn every_crash_from_a_flush_that_fails_on() {
    every_crash(Do::Lose);
}

#[test]
fn every_crash_from_a_killed_agent_on() {
    every_crash(Do::Kill);
}

#[test]
fn every_crash_from_a_stop_in_order_on() {
    every_crash(Do::Stop);
}
