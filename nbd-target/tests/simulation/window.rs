//! What leaves the window, and when: by the time in which it was received, and never together with
//! something older.

use std::time::Duration;

use tidemark_control::config::{Bytes, Seconds};
use tidemark_journal::Seq;
use tidemark_simdisk::{Rng, SimDisk};
use tidemark_target::simulation::SimTarget;

use crate::{
    random::config,
    source::{Connected, GROUP, Source, WALL_NS},
};

const WINDOW_MS: u64 = 20_000;

/// A target whose frames get a segment each, none of which leaves for its size; and a source with
/// everything sent.
fn begin(seed: u64) -> (SimTarget, Source) {
    let mut config = config(1);
    config.groups[0].size_max = Bytes(1 << 30);
    config.groups[0].window = Seconds(WINDOW_MS / 1000);
    let disk = SimDisk::new(seed);
    let mut target = SimTarget::start(&config, &disk, seed, WALL_NS).expect("it starts");
    let mut source = Source::new(seed);
    source.sync_all();
    assert!(matches!(source.connect(&mut target), Connected::Resumed));
    (target, source)
}

/// Silence makes nothing old that comes after it. It did: a frame was given the age counter as the
/// last message had left it, which then went on by all of the silence, so that up to a minute of the
/// window was missing.
#[test]
fn what_comes_after_a_silence_is_as_young_as_it_is() {
    let (mut target, mut source) = begin(1);
    target.advance(Duration::from_secs(1));
    source.hear(&mut target);
    target.advance(Duration::from_secs(15));
    source.write(0, 3, 5);
    source.send(&target);
    target.advance(Duration::from_millis(200));
    source.hear(&mut target);
    assert_eq!(source.acked.seq, source.last());
    let segments = target.journal(GROUP).expect("a replica").segments();
    let given_ns = segments.last().expect("one").summary().received_ns;
    let replica = target.groups().replica(GROUP).expect("a replica");
    let now_ns = replica.ledger().vitals().received_ns;
    assert!(now_ns >= 15_000_000_000, "the silence counts for what was there: {now_ns}");
    assert!(now_ns - given_ns < 1_000_000_000, "{} ns old already", now_ns - given_ns);
}

/// A segment leaves only if it was looked at. One more left with it: when the fold of the oldest
/// segment ended between the next look, which still saw that segment, and what followed from it, then
/// the segment after it was folded in its place, however young it was.
#[test]
fn nothing_younger_leaves_in_place_of_what_has_left_already() {
    let mut left = Seq::ZERO;
    for seed in 0..6 {
        let (mut target, mut source) = begin(seed);
        let mut rng = Rng::new(seed);
        let (mut sent, mut now_ms) = (vec![(source.last(), 0)], 0);
        for n in 0..250 {
            source.write(0, n % 50, 3);
            source.send(&target);
            sent.push((source.last(), now_ms));
            // Some come close together, others one by one.
            let ms = if rng.below(3) > 0 { rng.below(20) } else { rng.below(900) };
            target.advance(Duration::from_millis(ms));
            now_ms += ms;
            source.hear(&mut target);
            let oldest = target.oldest(GROUP);
            let newest_gone = sent.iter().find(|(last, _)| *last >= oldest);
            let at_ms = newest_gone.map_or(0, |(_, at_ms)| *at_ms);
            assert!(
                oldest == Seq::ZERO || now_ms - at_ms >= WINDOW_MS,
                "seed {seed}: {oldest} has left after {} ms",
                now_ms - at_ms
            );
            left = left.max(oldest);
        }
    }
    assert!(left > Seq::ZERO, "history left");
}

/// Where the target's clock stands, and that it is set while it runs, changes nothing: not what
/// leaves the window, what is acknowledged, or which points are offered.
#[test]
fn the_targets_clock_is_judged_by_nobody() {
    let live = |step: i64| {
        let (mut target, mut source) = begin(7);
        let mut seen = Vec::new();
        for n in 0..120u64 {
            match n {
                40 => target.step_wall(step),
                80 => target.step_wall(-2 * step),
                _ => {}
            }
            source.write(0, n % 50, 3);
            source.send(&target);
            target.advance(Duration::from_millis(300));
            source.hear(&mut target);
            seen.push((target.oldest(GROUP), source.acked, target.points(GROUP, None)));
        }
        assert!(target.oldest(GROUP) > Seq::ZERO, "history left");
        seen
    };
    let day_ns = 86_400_000_000_000;
    let steady = live(0);
    for step in [day_ns, -day_ns] {
        assert_eq!(live(step), steady, "the clock was set by {step} ns");
    }
}
