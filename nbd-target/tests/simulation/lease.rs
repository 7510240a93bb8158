//! The zero-loss lease: what the target asks for, and what it says.

use std::time::Duration;

use tidemark_control::target::ZeroLoss;
use tidemark_link::{
    lease::LEASE,
    message::{LeaseGrant, Message, SYNC_FEATURE},
};
use tidemark_simdisk::SimDisk;
use tidemark_target::simulation::SimTarget;

use crate::{
    random::config,
    source::{Connected, GROUP, Source, WALL_NS},
};

const HALF: Duration = Duration::from_millis(500);

/// A target and a source that grants leases, with everything sent.
fn begin() -> (SimTarget, Source, SimDisk) {
    let disk = SimDisk::new(1);
    let mut target = SimTarget::start(&config(1), &disk, 1, WALL_NS).expect("it starts");
    let mut source = Source::new(1);
    source.features = vec![SYNC_FEATURE.to_owned()];
    source.sync_all();
    assert!(matches!(source.connect(&mut target), Connected::Resumed));
    target.advance(HALF);
    source.hear(&mut target);
    assert_eq!(source.acked.seq, source.last());
    (target, source, disk)
}

fn said(target: &SimTarget) -> Option<ZeroLoss> {
    target.zero_loss(GROUP)
}

fn grant(target: &SimTarget, number: u64) {
    target.feed(Message::LeaseGrant(LeaseGrant { number, lease: LEASE }));
    target.advance(Duration::from_millis(1));
}

/// The moment that is named, milliseconds after everything began.
fn until_ms(target: &SimTarget) -> i64 {
    match said(target) {
        Some(ZeroLoss::Until { wall_ns }) => (wall_ns - WALL_NS) / 1_000_000,
        other => panic!("{other:?}"),
    }
}

#[test]
fn it_is_asked_for_twice_a_second_and_lasts_from_the_asking() {
    let (mut target, mut source, _disk) = begin();
    assert_eq!(said(&target), Some(ZeroLoss::None));
    for _ in 0..4 {
        target.advance(HALF);
    }
    source.hear(&mut target);
    let asks = std::mem::take(&mut source.lease_asks);
    assert!((4..=6).contains(&asks.len()), "{asks:?}");
    assert!(asks.iter().zip(1..).all(|(number, n)| *number == n), "{asks:?}");
    // The newest was asked at most half a second ago.
    grant(&target, *asks.last().expect("asked"));
    assert_eq!(said(&target), Some(ZeroLoss::Held));
    target.advance(LEASE - HALF - Duration::from_millis(10));
    assert_eq!(said(&target), Some(ZeroLoss::Held));
    target.advance(HALF + Duration::from_millis(10));
    let ended_ms = until_ms(&target);
    assert!((3900..=4600).contains(&ended_ms), "{ended_ms}");
    target.advance(Duration::from_secs(60));
    assert_eq!(until_ms(&target), ended_ms, "what was said stays");
    // A grant for what was asked long ago is none any more.
    grant(&target, asks[0]);
    assert_eq!(until_ms(&target), ended_ms);
    // One for what this session has not asked ends it.
    grant(&target, 1 << 40);
    source.hear(&mut target);
    assert!(source.refusals[0].contains("not asked for"), "{:?}", source.refusals);
}

#[test]
fn a_gap_ends_the_claim_before_the_lease_ends() {
    let (mut target, mut source, _disk) = begin();
    target.advance(HALF);
    source.hear(&mut target);
    grant(&target, *source.lease_asks.last().expect("asked"));
    assert_eq!(said(&target), Some(ZeroLoss::Held));
    source.gap_begin();
    source.send(&target);
    target.advance(HALF);
    let ended_ms = until_ms(&target);
    assert!(ended_ms < 2000, "{ended_ms}");
    source.sync_all();
    assert!(matches!(source.connect(&mut target), Connected::Resumed));
    target.advance(HALF);
    source.hear(&mut target);
    assert_eq!(source.acked.seq, source.last());
    assert_eq!(until_ms(&target), ended_ms, "not again without a grant");
    grant(&target, *source.lease_asks.last().expect("asked"));
    assert_eq!(said(&target), Some(ZeroLoss::Held));
}

#[test]
fn a_cut_ends_nothing_and_a_restart_all() {
    let (mut target, mut source, disk) = begin();
    source.hear(&mut target);
    grant(&target, *source.lease_asks.last().expect("asked"));
    target.disconnect();
    assert_eq!(said(&target), Some(ZeroLoss::Held));
    // The next session's numbers are its own: what the one before has asked is nothing to it.
    assert!(matches!(source.connect(&mut target), Connected::Resumed));
    source.lease_asks.clear();
    target.advance(HALF);
    source.hear(&mut target);
    assert!(source.lease_asks.contains(&1), "{:?}", source.lease_asks);
    target.advance(LEASE);
    assert!(matches!(said(&target), Some(ZeroLoss::Until { .. })));
    drop(target);
    let mut target = SimTarget::start(&config(1), &disk, 2, WALL_NS).expect("it starts");
    assert_eq!(said(&target), None, "nobody has greeted");
    assert!(matches!(source.connect(&mut target), Connected::Resumed));
    assert_eq!(said(&target), Some(ZeroLoss::None));
}

#[test]
fn a_source_that_grants_none_is_not_asked() {
    let (mut target, mut source, _disk) = begin();
    target.disconnect();
    source.features.clear();
    assert!(matches!(source.connect(&mut target), Connected::Resumed));
    source.lease_asks.clear();
    target.advance(Duration::from_secs(5));
    source.hear(&mut target);
    assert_eq!((source.lease_asks.len(), said(&target)), (0, None));
    grant(&target, 1);
    source.hear(&mut target);
    assert!(source.refusals[0].contains("LeaseGrant"), "{:?}", source.refusals);
}
