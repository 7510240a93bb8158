use super::*;
use crate::history::{Mark, Size};

fn volume(number: u16, gaps: &[(u64, Option<u64>)]) -> Volume {
    Volume {
        id: VolumeId(number),
        name: format!("disk{number}"),
        logical_block_bytes: 512,
        physical_block_bytes: 4096,
        sizes: vec![Size { from: Seq::ZERO, sectors: 100 }],
        added: Seq::ZERO,
        removed: None,
        gaps: gaps
            .iter()
            .map(|(begin, end)| Gap { begin: Seq(*begin), end: end.map(Seq), reason: 2 })
            .collect(),
        unreadable: Vec::new(),
    }
}

/// Disk 0 is whole from 10, with a gap 30..40; disk 1 from 20, with a gap 35..50 and one from 80.
fn history() -> History {
    History {
        volumes: vec![
            volume(0, &[(0, Some(10)), (30, Some(40))]),
            volume(1, &[(0, Some(20)), (35, Some(50)), (80, None)]),
        ],
        marks: vec![Mark { seq: Seq(25), name: "good".to_owned(), wall_ns: 0 }].into(),
        oldest: Seq(5),
        ..History::default()
    }
}

const END: Seq = Seq(90);

#[test]
fn every_position_against_the_definition() {
    let history = history();
    for (name, inside) in [
        (None, vec![0..20, 30..50, 80..1000]),
        (Some("disk0"), vec![0..10, 30..40]),
        (Some("disk1"), vec![0..20, 35..50, 80..1000]),
    ] {
        let scope = Scope::of(&history, "shop", name).expect("it is there");
        let good = |n: u64| (5..=90).contains(&n) && !inside.iter().any(|gap| gap.contains(&n));
        for n in 0..100 {
            let checked = scope.check(&history, Seq(n), END);
            assert_eq!(checked.is_ok(), good(n), "{name:?} {n}: {checked:?}");
            let newest = (0..=n.min(90)).rev().find(|n| good(*n)).map(Seq);
            if n <= 90 {
                assert_eq!(scope.newest_good(&history, Seq(n)), newest, "{name:?} {n}");
                let next = (n..=90).find(|n| good(*n)).map(Seq);
                if n >= 5 {
                    assert_eq!(scope.next_good(&history, Seq(n), END), next, "{name:?} {n}");
                }
            }
        }
        let ranges = scope.good_ranges(&history, END, 10);
        let listed: Vec<u64> = ranges.iter().flat_map(|(first, last)| first.0..=last.0).collect();
        let all: Vec<u64> = (0..100).filter(|n| good(*n)).collect();
        assert_eq!(listed, all, "{name:?} {ranges:?}");
        assert_eq!(scope.good_ranges(&history, END, 1), ranges[ranges.len() - 1..]);
    }
}

/// Disk 1 leaves the group at 60 and disk 2 comes at 70; both had gaps while they were part of it.
#[test]
fn volumes_that_are_gone_count_while_they_were_there() {
    let mut history = history();
    history.volumes[1].gaps = vec![
        Gap { begin: Seq(0), end: Some(Seq(20)), reason: 1 },
        Gap { begin: Seq(45), end: None, reason: 2 },
    ];
    history.volumes[1].removed = Some(Seq(60));
    history.volumes.push(volume(2, &[(70, Some(75))]));
    history.volumes[2].added = Seq(70);
    let bad_of = |name: Option<&str>| match name {
        None => vec![0..20, 30..40, 45..60, 70..75],
        Some("disk1") => vec![0..20, 45..1000],
        _ => std::iter::once(0..75).collect(),
    };
    for name in [None, Some("disk1"), Some("disk2")] {
        let scope = Scope::of(&history, "shop", name).expect("it is there");
        let bad = bad_of(name);
        let good = |n: u64| (5..=90).contains(&n) && !bad.iter().any(|gap| gap.contains(&n));
        let all: Vec<u64> = (0..100).filter(|n| good(*n)).collect();
        let ranges = scope.good_ranges(&history, END, 10);
        let listed: Vec<u64> = ranges.iter().flat_map(|(first, last)| first.0..=last.0).collect();
        assert_eq!(listed, all, "{name:?} {ranges:?}");
        for n in 5..=90 {
            let newest = (0..=n).rev().find(|n| good(*n)).map(Seq);
            assert_eq!(scope.newest_good(&history, Seq(n)), newest, "{name:?} {n}");
            let next = (n..=90).find(|n| good(*n)).map(Seq);
            assert_eq!(scope.next_good(&history, Seq(n), END), next, "{name:?} {n}");
            assert_eq!(scope.check(&history, Seq(n), END).is_ok(), good(n), "{name:?} {n}");
        }
    }
}

/// The history begins at 0, where nothing has been written and no point is.
#[test]
fn the_oldest_point_that_is_named_is_one() {
    let mut history = history();
    history.oldest = Seq::ZERO;
    history.volumes = vec![volume(0, &[(1, Some(10))])];
    let group = Scope::of(&history, "shop", None).expect("a group");
    let early = group.before_all(&history, "noon is too early", END).0;
    assert!(early.ends_with("the oldest point is @seq:10"), "{early}");
    assert!(group.check(&history, Seq(10), END).is_ok());
}

#[test]
fn refusals_say_what_can_be_had() {
    let history = history();
    let group = Scope::of(&history, "shop", None).expect("a group");
    let sentence = |seq| group.check(&history, Seq(seq), END).expect_err("refused").0;
    let inside = sentence(36);
    for part in ["disk0", "faster than", "@seq:29 before", "@seq:50 after"] {
        assert!(inside.contains(part), "{inside}");
    }
    assert!(sentence(85).contains("@seq:79 before and none after"), "{}", sentence(85));
    assert!(sentence(4).contains("the oldest point is @seq:20"), "{}", sentence(4));
    let early = group.before_all(&history, "noon is too early", END).0;
    assert_eq!(early, "noon is too early; the oldest point is @seq:20");
    assert!(sentence(91).contains("the newest is @seq:79"), "{}", sentence(91));
    let unknown = Scope::of(&history, "shop", Some("disk7")).err().expect("unknown").0;
    assert!(unknown.contains("disk0, disk1"), "{unknown}");
    assert!(group.no_such_mark(&history, "bad").0.contains("good"));
    let empty = History::default();
    let scope = Scope::of(&empty, "shop", None).expect("a group");
    assert_eq!(
        scope.before_all(&empty, "noon is too early", Seq(0)),
        scope.nothing_good(&empty, Seq(0))
    );
    assert!(scope.nothing_good(&empty, Seq(0)).0.contains("nothing has been received"));
}

#[test]
fn a_volume_that_comes_later_leaves_older_points_good() {
    let mut history = history();
    history.volumes[1].added = Seq(60);
    history.volumes[1].gaps = vec![Gap { begin: Seq(60), end: Some(Seq(70)), reason: 1 }];
    let group = Scope::of(&history, "shop", None).expect("a group");
    assert!(group.check(&history, Seq(45), END).is_ok());
    assert!(group.check(&history, Seq(65), END).is_err());
    assert!(group.check(&history, Seq(70), END).is_ok());
    history.volumes[1].removed = Some(Seq(75));
    let alone = Scope::of(&history, "shop", Some("disk1")).expect("there");
    assert!(alone.check(&history, Seq(74), END).is_ok());
    assert!(alone.check(&history, Seq(75), END).is_err(), "it is no longer written to");
    assert!(group.check(&history, Seq(80), END).is_ok());
}
