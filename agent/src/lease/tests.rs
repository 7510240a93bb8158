use super::{
    model::{FLAWS, Flaw, World},
    *,
};
use crate::dirty::tests::random::seeds;

const SEEDS: &str = "TIDEMARK_LEASE_SEEDS";
const TROUBLE_MS: u64 = 60_000;

#[test]
fn a_target_that_holds_a_lease_lacks_nothing_that_was_answered() {
    let (mut held_ms, mut calm_held_ms, mut run_ms) = (0, 0, 0);
    for seed in seeds(SEEDS, 60) {
        run_ms += 2 * TROUBLE_MS;
        let outcome = World::new(seed, Flaw::None).run(TROUBLE_MS);
        assert_eq!(outcome.wrong, None, "repeat with {SEEDS}=={seed}");
        if let Some(bound) = outcome.waited_ms_bound {
            let waited = outcome.waited_ms_max;
            assert!(waited <= bound, "an answer waited {waited} ms; repeat with {SEEDS}=={seed}");
        }
        held_ms += outcome.held_ms;
        calm_held_ms += outcome.calm_held_ms;
    }
    let (share, calm_share) = (held_ms * 100 / run_ms, calm_held_ms * 200 / run_ms);
    assert!(share > 30 && calm_share > 50, "leases are hardly ever held: {share}, {calm_share} %");
}

#[test]
fn each_flaw_is_seen() {
    for flaw in FLAWS {
        let seen = (0..300).any(|seed| World::new(seed, flaw).run(TROUBLE_MS).wrong.is_some());
        assert!(seen, "{flaw:?} is not seen");
    }
}

/// A group whose answers wait for two seconds, in a world that is told what happens.
struct Story {
    mode: SyncMode,
    facts: Facts,
}

impl Story {
    fn new(left: Option<Duration>) -> Story {
        let mode = SyncMode::new(Some(Duration::from_secs(2)), left, 0);
        let facts = Facts {
            now_ns: 0,
            last_seq: Seq(10),
            durable: Seq(10),
            whole: true,
            peer: Peer::Able,
            waiting_since_ns: None,
        };
        Story { mode, facts }
    }

    /// Lets time pass, as the engine's turns do.
    fn pass(&mut self, ms: u64) -> (Stage, Option<Why>) {
        for _ in 0..ms / 10 {
            self.facts.now_ns += 10_000_000;
            self.mode.turn(&self.facts);
            if self.mode.to_note().is_some() {
                self.mode.noted();
            }
        }
        let view = self.mode.view();
        (view.stage, view.why)
    }

    fn in_sync() -> Story {
        let mut story = Story::new(None);
        assert_eq!(story.pass(900), (Stage::Async, Some(Why::Settling)));
        assert_eq!(story.pass(200), (Stage::Sync, None));
        assert_eq!(story.mode.asked(&story.facts), Some(LEASE));
        story
    }
}

#[test]
fn entering_waits_for_what_was_answered_before() {
    let mut story = Story::new(None);
    // It lags a little all the time, as under load.
    story.facts.durable = Seq(9);
    story.pass(500);
    story.facts.durable = Seq(10);
    story.facts.last_seq = Seq(12);
    assert_eq!(story.pass(600), (Stage::Entering, Some(Why::Settling)));
    assert_eq!(story.mode.asked(&story.facts), None);
    assert!(story.mode.holds() && !story.mode.has_granted());
    story.facts.durable = Seq(11);
    assert_eq!(story.pass(10).0, Stage::Entering);
    story.facts.durable = Seq(12);
    assert_eq!(story.pass(10).0, Stage::Sync);
}

#[test]
fn what_takes_too_long_is_answered_when_the_last_lease_has_run_out() {
    let mut story = Story::in_sync();
    story.facts.waiting_since_ns = Some(story.facts.now_ns);
    assert_eq!(story.pass(1000).0, Stage::Sync);
    assert_eq!(story.mode.asked(&story.facts), Some(LEASE));
    assert_eq!(story.pass(1000), (Stage::Leaving, Some(Why::Slow)));
    assert_eq!(story.mode.asked(&story.facts), None);
    // Two seconds and a twentieth after the last grant, which was a second ago.
    assert_eq!(story.pass(1090).0, Stage::Leaving);
    assert!(story.mode.holds());
    assert_eq!(story.pass(10), (Stage::Async, Some(Why::Slow)));
    story.facts.waiting_since_ns = None;
    // Twice as long as the first time.
    assert_eq!(story.pass(800), (Stage::Async, Some(Why::Settling)));
    assert_eq!(story.pass(200).0, Stage::Sync);
    assert_eq!(story.mode.view().left_total, 1);
}

#[test]
fn a_gap_ends_it_at_once_and_a_cut_when_it_lasts() {
    let mut story = Story::in_sync();
    story.facts.whole = false;
    assert_eq!(story.mode.asked(&story.facts), None);
    assert_eq!(story.pass(10), (Stage::Leaving, Some(Why::Gap)));
    let mut story = Story::in_sync();
    story.facts.peer = Peer::Away;
    assert_eq!(story.pass(1900).0, Stage::Sync);
    story.facts.peer = Peer::Able;
    assert_eq!(story.pass(1900).0, Stage::Sync);
    story.facts.peer = Peer::Away;
    // The lease of the beginning is long over by then.
    assert_eq!(story.pass(2100), (Stage::Async, Some(Why::Away)));
    story.facts.peer = Peer::Unable;
    assert_eq!(story.pass(5000), (Stage::Async, Some(Why::Unable)));
}

#[test]
fn leases_of_an_earlier_life_are_waited_for() {
    let mut story = Story::new(Some(LEASE));
    assert_eq!(story.pass(2090), (Stage::Leaving, Some(Why::Restarted)));
    assert!(story.mode.holds() && story.mode.has_granted());
    assert_eq!(story.pass(10).0, Stage::Async);
    // With sync mode switched off meanwhile, too; and then the state need not name them any more.
    let mut story = Story::new(None);
    story.mode = SyncMode::new(None, Some(LEASE), 0);
    story.mode.turn(&story.facts);
    assert_eq!((story.mode.holds(), story.mode.to_note()), (true, None));
    story.facts.now_ns = 2_100_000_000;
    story.mode.turn(&story.facts);
    assert_eq!((story.mode.holds(), story.mode.to_note()), (false, Some(Duration::ZERO)));
    assert_eq!(story.pass(5000), (Stage::Async, Some(Why::Off)));
}

#[test]
fn nothing_is_granted_before_the_state_says_so_nor_while_it_stops() {
    let mut story = Story::new(None);
    for _ in 0..1000 {
        story.facts.now_ns += 10_000_000;
        story.mode.turn(&story.facts);
    }
    assert_eq!(story.mode.view().why, Some(Why::Unnoted));
    assert_eq!(story.mode.to_note(), Some(LEASE));
    assert_eq!(story.mode.to_note(), None, "once");
    let mut story = Story::in_sync();
    story.mode.stop();
    assert_eq!(story.mode.asked(&story.facts), None);
    assert_eq!(story.pass(2100), (Stage::Async, Some(Why::Stopping)));
}
