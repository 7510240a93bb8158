use tidemark_control::agent::{FrontKind, GroupFailure, Ladder};
use tidemark_control::target::ScrubStatus;
use tidemark_journal::{GroupId, Position, Seq, TermId, VolumeId};

use super::*;

pub const NOW_NS: i64 = 1_795_427_970_000_000_000;
const SECOND_NS: i64 = 1_000_000_000;

pub fn link(state: LinkState, age_s: i64, sentence: Option<&str>) -> LinkStatus {
    LinkStatus {
        state,
        since_wall_ns: NOW_NS - age_s * SECOND_NS,
        sentence: sentence.map(str::to_owned),
    }
}

pub fn source() -> AgentStatus {
    let volume = VolumeStatus {
        name: "data".into(),
        id: VolumeId(1),
        backing: "/dev/sdb".into(),
        device: "/dev/tidemark/shop/data".into(),
        front: FrontKind::Ublk,
        sectors: 1 << 30,
        gap: None,
        catch_up: None,
        verify: None,
        active_regions: 3,
        dirty_regions: 4,
        uncaptured_regions: 0,
    };
    let group = GroupStatus {
        name: "shop".into(),
        id: GroupId([1; 16]),
        target: "recovery.example.com:7410".into(),
        target_name: "recovery".into(),
        link: link(LinkState::Up, 720, None),
        position: Position { term: TermId([2; 16]), seq: Seq(100) },
        durable_seq: Seq(90),
        rpo_target_s: Some(60),
        lag_ns: 450_000_000,
        lag_bytes: 12 << 10,
        ring_fill_permille: 21,
        rung: Rung::Ring,
        ladder: Ladder::default(),
        sent_bytes_total: 10 << 30,
        raw_bytes_total: 28 << 30,
        frames_total: 1234,
        gaps_total: 0,
        compared_bytes_total: 0,
        sync: None,
        problems: Vec::new(),
        doubt: None,
        verified: Default::default(),
        volumes: vec![volume],
    };
    AgentStatus {
        node: "db1".into(),
        version: "1".into(),
        groups: vec![group],
        unprotected: Vec::new(),
    }
}

pub fn replica() -> TargetStatus {
    let volume =
        ReplicaVolume { name: "data".into(), id: VolumeId(1), sectors: 1 << 30, gap: None };
    let group = ReplicaStatus {
        name: "shop".into(),
        id: GroupId([1; 16]),
        source: "db1".into(),
        link: link(LinkState::Up, 720, None),
        position: Position { term: TermId([2; 16]), seq: Seq(90) },
        wall_ns: NOW_NS - SECOND_NS,
        vouched_wall_ns: NOW_NS - SECOND_NS / 2,
        oldest_seq: Seq(1),
        oldest_wall_ns: NOW_NS - 86_400 * SECOND_NS,
        window_s: 86_400,
        log_bytes: 10 << 30,
        base_bytes: 300 << 30,
        frames_total: 1000,
        received_bytes_total: 10 << 30,
        exports: 0,
        problems: Vec::new(),
        damage: Vec::new(),
        zero_loss: None,
        scrub: ScrubStatus::default(),
        volumes: vec![volume],
    };
    TargetStatus {
        node: "recovery".into(),
        version: "1".into(),
        nbd_listen: Vec::new(),
        nbd_socket: None,
        groups: vec![group],
    }
}

fn told(status: &AgentStatus) -> String {
    let mut out = String::new();
    agent(&mut out, status, NOW_NS);
    out
}

#[test]
fn a_healthy_group_is_told_in_words() {
    assert_eq!(
        told(&source()),
        "agent db1\n\
         \x20 group shop to recovery (recovery.example.com:7410)\n\
         \x20   link   up for 12 min\n\
         \x20   lag    0.4 s behind, within the 60 s asked for, 12.0 KiB to send\n\
         \x20   ring   3 % full\n\
         \x20   sent   10.0 GiB for 28.0 GiB, 2.8 times smaller\n\
         \x20   volume data  /dev/tidemark/shop/data  (ublk on /dev/sdb, 512 GiB)\n\
         \x20     every write is captured\n"
    );
}

#[test]
fn trouble_is_told_with_its_reason() {
    let mut status = source();
    let group = &mut status.groups[0];
    group.link = link(LinkState::Refused, 300, Some("the target knows no such group"));
    (group.lag_ns, group.lag_bytes) = (0, 0);
    group.rung = Rung::Gap;
    group.sent_bytes_total = 0;
    group.problems = vec!["the state disk is full".into()];
    group.volumes[0].gap = Some("writes came faster than they could be sent".into());
    group.volumes[0].catch_up = Some(Progress {
        done_regions: 1,
        total_regions: 3,
        bytes_per_s: 120 << 20,
        eta_s: Some(720),
    });
    let told = told(&status);
    for expected in [
        "link   REFUSED for 5 min: the target knows no such group\n",
        // Nothing is waiting, but the target's state is known no later than the link's end.
        "lag    5 min behind, MORE than the 60 s asked for\n",
        "ring   full: writes are only noted until it empties\n",
        "sent   0 B\n",
        "problem: the state disk is full\n",
        "catching up, 33.3 % at 120 MiB/s, 12 min left: writes came faster than they could be sent\n",
    ] {
        assert!(told.contains(expected), "{told}\nwanted: {expected}");
    }
}

#[test]
fn a_group_that_does_not_run_is_told_with_its_reason() {
    let mut status = source();
    let error = "/x/store.toml, line 3: unknown key 'fron'\n    3 | fron = 1".to_owned();
    status.unprotected = vec![GroupFailure { group: "store".into(), error }];
    let expected = "  group store is NOT PROTECTED\n\
                    \x20   /x/store.toml, line 3: unknown key 'fron'\n\
                    \x20       3 | fron = 1\n";
    assert!(told(&status).ends_with(expected), "{}", told(&status));
    status.groups.clear();
    assert_eq!(told(&status), format!("agent db1\n{expected}"));
}

#[test]
fn a_replica_is_told_with_its_window() {
    let mut status = replica();
    status.groups[0].volumes[0].gap = Some("the source stopped unexpectedly".into());
    status.groups[0].link = LinkStatus {
        state: LinkState::Down,
        since_wall_ns: 0,
        sentence: Some("the source is not connected".into()),
    };
    let mut out = String::new();
    target(&mut out, &status, NOW_NS);
    assert_eq!(
        out,
        "target recovery\n\
         \x20 group shop from db1\n\
         \x20   link   down: the source is not connected\n\
         \x20   newest 2026-11-23T09:59:29.5Z (0.5 s ago)\n\
         \x20   oldest 2026-11-22T09:59:30Z (a window of 24 h)\n\
         \x20   space  10.0 GiB of log, 300 GiB of base\n\
         \x20   volume data  512 GiB, in a gap: the source stopped unexpectedly\n"
    );
}

#[test]
fn a_young_replica_has_everything_since_the_first_sync() {
    let mut status = replica();
    status.groups[0].oldest_wall_ns = 0;
    let mut out = String::new();
    target(&mut out, &status, NOW_NS);
    assert!(out.contains("    oldest the first sync (a window of 24 h)\n"), "{out}");
}

#[test]
fn a_source_without_lag_says_so() {
    let mut status = source();
    (status.groups[0].lag_ns, status.groups[0].lag_bytes) = (0, 0);
    assert!(told(&status).contains("    lag    none: the target has everything\n"));
}

#[test]
fn an_empty_machine_says_what_to_do() {
    let mut status = source();
    status.groups.clear();
    assert!(told(&status).contains("'tidemark protect' begins one"));
}

#[test]
fn the_spool_and_the_next_rung_are_told() {
    let mut status = source();
    let group = &mut status.groups[0];
    group.rung = Rung::Spool;
    group.ladder = Ladder {
        spool_bytes: 3 << 30,
        spool_bytes_max: 64 << 30,
        growth_bytes_per_s: 12 << 20,
        window_s: 60,
        next: Some(Rung::Gap),
        next_in_s: Some(5205),
        ..Ladder::default()
    };
    let mut out = String::new();
    agent(&mut out, &status, NOW_NS);
    assert!(out.contains("    spool  3.0 GiB of 64.0 GiB in use\n"), "{out}");
    let warning = "    warning: writes will no longer be captured in 86 min, as what waits has grown by \
                   12.0 MiB/s over the last 60 s\n";
    assert!(out.contains(warning), "{out}");
    status.groups[0].ladder.next_in_s = Some(10 * 3600);
    out.clear();
    agent(&mut out, &status, NOW_NS);
    assert!(!out.contains("warning"), "{out}");
}

#[test]
fn sync_mode_is_told_on_both_sides() {
    let mut status = source();
    assert!(!told(&status).contains("sync"));
    status.groups[0].sync = Some(SyncStatus { stage: SyncStage::Sync, ..SyncStatus::default() });
    assert!(told(&status).contains("    sync   yes: what is answered is at the target\n"));
    let reason = Some("there is no link to the target".to_owned());
    status.groups[0].sync = Some(SyncStatus { reason, ..SyncStatus::default() });
    assert!(told(&status).contains("    sync   NO, async: there is no link to the target\n"));
    let mut status = replica();
    let mut said = |claim| {
        status.groups[0].zero_loss = Some(claim);
        let mut out = String::new();
        target(&mut out, &status, NOW_NS);
        out
    };
    assert!(said(ZeroLoss::Held).contains("    sync   zero loss: every write"));
    let until = said(ZeroLoss::Until { wall_ns: 1_795_424_400_000_000_000 });
    assert!(until.contains("    sync   zero loss until 2026-11-23T09:00:00"), "{until}");
    assert!(said(ZeroLoss::None).contains("    sync   no zero loss"));
}
