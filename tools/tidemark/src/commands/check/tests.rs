use std::io;

use tidemark_control::agent::{Ladder, LinkState, Rung, SyncStatus};

use super::super::status::tests::{NOW_NS, link, replica, source};
use super::*;

fn args() -> Check {
    Check { group: None, warning: None, critical: None }
}

fn judged(status: &AgentStatus, args: &Check) -> Verdict {
    let mut verdict = Verdict::default();
    verdict.agent(status, args, NOW_NS);
    verdict
}

#[test]
fn a_healthy_group_is_ok_with_its_figures() {
    let verdict = judged(&source(), &args());
    assert_eq!(verdict.level().code(), 0);
    assert_eq!(
        verdict.line(),
        "TIDEMARK OK - shop: the target is 0.4 s behind | 'shop_lag'=0.450s;60;300;0 \
         'shop_lag_bytes'=12288B;;;0 'shop_ring'=2.1%;;;0;100\n"
    );
}

#[test]
fn lag_is_judged_by_the_groups_target_or_the_given_thresholds() {
    let mut status = source();
    status.groups[0].lag_ns = 61 * SECOND_NS;
    assert_eq!(judged(&status, &args()).level(), Level::Warning);
    status.groups[0].lag_ns = 301 * SECOND_NS;
    assert_eq!(judged(&status, &args()).level(), Level::Critical);
    let given = Check { warning: Some(400), critical: Some(500), ..args() };
    assert_eq!(judged(&status, &given).level(), Level::Ok);
    let strict = Check { critical: Some(5), ..args() };
    assert!(judged(&status, &strict).line().contains("'shop_lag'=301.000s;5;5;0"));
}

#[test]
fn a_link_that_is_down_lags_though_nothing_waits() {
    let mut status = source();
    status.groups[0].lag_ns = 0;
    status.groups[0].link = link(LinkState::Connecting, 400, Some("no | route\nto host"));
    let verdict = judged(&status, &args());
    assert_eq!(verdict.level(), Level::Critical);
    let line = verdict.line();
    assert!(line.contains("(no   route to host) | 'shop_lag'=400.000s;60;300;0"), "{line}");
    assert_eq!(line.lines().count(), 1);
}

#[test]
fn gaps_and_problems_are_found() {
    let mut status = source();
    status.groups[0].volumes[0].gap = Some("the volume is being sent for the first time".into());
    assert_eq!(judged(&status, &args()).level(), Level::Warning);
    status.groups[0].problems.push("the state disk failed".into());
    let line = judged(&status, &args()).line();
    assert!(line.starts_with("TIDEMARK CRITICAL - shop: the state disk failed |"), "{line}");
    let other = Check { group: Some("other".parse().unwrap()), ..args() };
    assert!(judged(&status, &other).findings.is_empty());
}

#[test]
fn a_group_that_does_not_run_is_critical() {
    let mut status = source();
    let error = "/x/store.toml, line 3: unknown key 'fron'\n    3 | fron = 1".to_owned();
    status.unprotected = vec![GroupFailure { group: "store".into(), error }];
    let only = |group: &str| Check { group: Some(group.parse().unwrap()), ..args() };
    for args in [args(), only("store")] {
        let line = judged(&status, &args).line();
        let expected = "TIDEMARK CRITICAL - store: not protected: /x/store.toml, line 3: \
                        unknown key 'fron'";
        assert_eq!(line.trim_end().split(" | ").next(), Some(expected));
    }
    assert_eq!(judged(&status, &only("shop")).level(), Level::Ok);
}

#[test]
fn a_replica_is_judged_by_the_age_of_its_newest_point() {
    let mut status = replica();
    let mut verdict = Verdict::default();
    verdict.target(&status, &args(), NOW_NS);
    assert_eq!(verdict.level(), Level::Ok);
    assert!(verdict.line().contains("'shop_point_age'=0.500s;60;300;0"), "{}", verdict.line());
    status.groups[0].vouched_wall_ns -= 100_000_000_000;
    let mut verdict = Verdict::default();
    verdict.target(&status, &args(), NOW_NS);
    assert_eq!(verdict.level(), Level::Warning);
}

#[test]
fn a_daemon_that_should_run_is_missed_and_others_are_not() {
    let absent = || {
        let source = io::Error::from(io::ErrorKind::NotFound);
        Err::<(), _>(ClientError::NotRunning { daemon: "agent", path: "/x".into(), source })
    };
    let mut verdict = Verdict::default();
    assert!(verdict.answered(absent(), false).is_none());
    assert!(verdict.findings.is_empty());
    assert!(verdict.answered(absent(), true).is_none());
    assert_eq!(verdict.level(), Level::Critical);
    let mut verdict = Verdict::default();
    let denied = ClientError::NotAllowed { daemon: "agent", path: "/x".into() };
    assert!(verdict.answered(Err::<(), _>(denied), true).is_none());
    assert_eq!(verdict.level().code(), 3);
}

#[test]
fn the_next_rung_is_a_warning_before_it_is_reached() {
    let mut status = source();
    status.groups[0].ladder = Ladder {
        spool_bytes: 5,
        spool_bytes_max: 100,
        next: Some(Rung::Spool),
        next_in_s: Some(30),
        ..Ladder::default()
    };
    let verdict = judged(&status, &args());
    assert_eq!(verdict.level(), Level::Warning);
    let line = verdict.line();
    assert!(line.contains("shop: the spool will be used in less than a minute"), "{line}");
    assert!(line.contains("'shop_spool'=5B;;;0;100"), "{line}");
}

#[test]
fn a_group_that_is_to_be_in_sync_and_is_not_is_a_warning() {
    let mut status = source();
    status.groups[0].sync = Some(SyncStatus { stage: SyncStage::Sync, ..SyncStatus::default() });
    let verdict = judged(&status, &args());
    assert_eq!(verdict.level(), Level::Ok);
    assert!(verdict.line().contains("'shop_sync'=1;;;0;1 'shop_sync_left'=0c;;;0"));
    let reason = Some("there is no link to the target".to_owned());
    status.groups[0].sync = Some(SyncStatus { reason, left_total: 2, ..SyncStatus::default() });
    let verdict = judged(&status, &args());
    assert_eq!(verdict.level(), Level::Warning);
    let line = verdict.line();
    assert!(line.contains("shop: not in sync, there is no link to the target"), "{line}");
    assert!(line.contains("'shop_sync'=0;;;0;1 'shop_sync_left'=2c;;;0"), "{line}");
}

#[test]
fn a_target_that_cannot_say_zero_loss_is_a_warning() {
    let mut status = replica();
    let said = |status: &TargetStatus| {
        let mut verdict = Verdict::default();
        verdict.target(status, &args(), NOW_NS);
        (verdict.level(), verdict.line())
    };
    status.groups[0].zero_loss = Some(ZeroLoss::Held);
    let (level, line) = said(&status);
    assert!(level == Level::Ok && line.contains("'shop_zero_loss'=1;;;0;1"), "{line}");
    for claim in [ZeroLoss::None, ZeroLoss::Until { wall_ns: NOW_NS }] {
        status.groups[0].zero_loss = Some(claim);
        let (level, line) = said(&status);
        assert!(level == Level::Warning && line.contains("'shop_zero_loss'=0;;;0;1"), "{line}");
    }
}
