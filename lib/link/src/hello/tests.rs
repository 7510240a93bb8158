use tidemark_journal::{Ancestry, GroupId, Seq, TermId};

use super::*;
use crate::message::{GroupHello, ProtocolRange, VolumeHello};

fn at(term: u8, seq: u64) -> Position {
    Position { term: TermId([term; 16]), seq: Seq(seq) }
}

/// A source in its second term, which continues the first after 100; it has reserved up to 1000,
/// 150 is acknowledged, and its map is of generation 7.
fn hello() -> Hello {
    Hello {
        protocol: ProtocolRange::OWN,
        features: Vec::new(),
        software: String::new(),
        group: GroupHello { id: GroupId([9; 16]), name: "db".into() },
        ancestry: Ancestry::root(TermId([1; 16])).fork(TermId([2; 16]), Seq(100)).unwrap(),
        volumes: vec![VolumeHello {
            id: VolumeId(1),
            name: "data".into(),
            sectors: 2048,
            logical_block_bytes: 512,
            physical_block_bytes: 512,
        }],
        acked: at(2, 150),
        ceiling: Seq(1000),
        map_generation: 7,
    }
}

fn target(position: Option<Position>) -> TargetMemory {
    TargetMemory {
        position,
        path: None,
        map_generation: 7,
        volumes: vec![VolumeSize { id: VolumeId(1), sectors: 2048 }],
    }
}

fn doubt(why: Doubt) -> Verdict {
    Verdict::Doubt { why, path: None }
}

fn refused(verdict: Verdict) -> (RefuseCode, String) {
    match verdict {
        Verdict::Refuse(refuse) => (refuse.code, refuse.sentence),
        other => panic!("{other:?}"),
    }
}

fn every_combination() -> impl Iterator<Item = Facts> {
    (0..1u32 << 8).map(|bits| {
        let fact = |bit: u32| bits & (1 << bit) != 0;
        Facts {
            sizes_differ: fact(0),
            new: fact(1),
            on_path: fact(2),
            contradicts: fact(3),
            above_ceiling: fact(4),
            map_newer: fact(5),
            below_acked: fact(6),
            path_known: fact(7),
        }
    })
}

#[test]
fn exactly_one_row_fits_every_combination() {
    for facts in every_combination() {
        let fits = |row: &&([Is; 8], Outcome)| {
            row.0.iter().zip(facts.list()).all(|(is, fact)| is.met_by(fact))
        };
        assert_eq!(TABLE.iter().filter(fits).count(), 1, "{facts:?}");
    }
}

#[test]
fn every_combination_is_decided_as_the_rules_say() {
    let mut seen = Vec::new();
    for facts in every_combination() {
        let outcome = facts.decide();
        seen.push(outcome);
        // Another size or another history is never written into, and nothing else is refused.
        let refuses = matches!(outcome, Outcome::SizeMismatch | Outcome::Diverged);
        let forgotten = facts.map_newer && facts.path_known;
        let must = facts.sizes_differ || (!facts.new && !facts.on_path && !forgotten);
        assert_eq!(refuses, must, "{facts:?}");
        if refuses {
            assert_eq!(outcome == Outcome::SizeMismatch, facts.sizes_differ, "{facts:?}");
            continue;
        }
        // Memories that disagree are never resumed, and those that agree are never doubted.
        let above = facts.above_ceiling && !facts.new;
        let disagree = facts.contradicts || above || facts.map_newer || facts.below_acked;
        match outcome {
            Outcome::Doubt(why) => {
                assert!(facts.new || facts.on_path || why == Doubt::MapBehind, "{facts:?}");
                assert!(disagree, "{facts:?}");
                let true_of_it = match why {
                    Doubt::SourceContradicts => facts.contradicts,
                    Doubt::SourceBehind => facts.above_ceiling,
                    Doubt::MapBehind => facts.map_newer,
                    Doubt::TargetBehind => facts.below_acked,
                };
                assert!(true_of_it, "{facts:?} is not {why:?}");
            }
            Outcome::Resume => assert!(!disagree && !facts.new, "{facts:?}"),
            Outcome::Fresh => assert!(!disagree && facts.new, "{facts:?}"),
            Outcome::SizeMismatch | Outcome::Diverged => unreachable!(),
        }
    }
    for (_, outcome) in TABLE {
        assert!(seen.contains(&outcome), "no combination leads to {outcome:?}");
    }
}

#[test]
fn a_replica_that_fits_is_resumed_where_it_ends() {
    for position in [at(2, 150), at(2, 151), at(2, 1000)] {
        let verdict = compare(&hello(), &target(Some(position)));
        assert_eq!(verdict, Verdict::Resume { from: position });
    }
    // All of the second term was lost on the way: the first is continued where it was left.
    let mut hello = hello();
    hello.acked = at(1, 70);
    for position in [at(1, 70), at(1, 100), at(2, 100)] {
        let verdict = compare(&hello, &target(Some(position)));
        assert_eq!(verdict, Verdict::Resume { from: position });
    }
}

#[test]
fn a_new_replica_is_sent_everything() {
    let mut hello = hello();
    hello.acked = Position::default();
    let mut new = TargetMemory::default();
    assert_eq!(compare(&hello, &new), Verdict::Fresh);
    new.map_generation = 8;
    assert_eq!(compare(&hello, &new), doubt(Doubt::MapBehind));
}

#[test]
fn a_restored_source_is_noticed() {
    assert_eq!(compare(&hello(), &target(Some(at(2, 1001)))), doubt(Doubt::SourceBehind));
    let mut newer = target(Some(at(2, 200)));
    newer.map_generation = 8;
    assert_eq!(compare(&hello(), &newer), doubt(Doubt::MapBehind));
    newer.map_generation = 6;
    assert_eq!(compare(&hello(), &newer), Verdict::Resume { from: at(2, 200) });
}

#[test]
fn a_restored_target_is_noticed() {
    assert_eq!(compare(&hello(), &target(Some(at(2, 149)))), doubt(Doubt::TargetBehind));
    assert_eq!(compare(&hello(), &target(Some(at(1, 100)))), doubt(Doubt::TargetBehind));
    assert_eq!(compare(&hello(), &target(None)), doubt(Doubt::TargetBehind));
}

#[test]
fn a_source_that_contradicts_itself_is_not_believed() {
    let mut hello = hello();
    for acked in [at(2, 1001), at(1, 101), at(3, 1)] {
        hello.acked = acked;
        let verdict = compare(&hello, &target(Some(at(2, 999))));
        assert_eq!(verdict, doubt(Doubt::SourceContradicts), "{acked}");
    }
}

#[test]
fn another_history_is_refused() {
    // A term of somebody else; a part of the first term that the path left out.
    for position in [at(3, 120), at(1, 101), at(2, 99)] {
        let (code, sentence) = refused(compare(&hello(), &target(Some(position))));
        assert_eq!(code, RefuseCode::Diverged);
        assert!(sentence.contains("'db'") && sentence.contains(&position.to_string()));
    }
}

/// The source was rolled back to before a term of its own, in which the replica ends.
#[test]
fn a_source_that_has_forgotten_a_term_compares_everything() {
    let path = hello().ancestry.fork(TermId([3; 16]), Seq(1000)).unwrap();
    let mut newer = target(Some(at(3, 1200)));
    newer.map_generation = 8;
    newer.path = Some(path.clone());
    let verdict = compare(&hello(), &newer);
    assert_eq!(verdict, Verdict::Doubt { why: Doubt::MapBehind, path: Some(path.clone()) });
    // Nobody can continue a path that is not known; and a source that has told everything it knows
    // has forgotten nothing.
    for (path, generation) in [(None, 8), (Some(hello().ancestry), 8), (Some(path), 7)] {
        (newer.path, newer.map_generation) = (path, generation);
        assert_eq!(refused(compare(&hello(), &newer)).0, RefuseCode::Diverged);
    }
}

#[test]
fn another_size_is_refused() {
    let mut other = target(Some(at(2, 200)));
    other.volumes[0].sectors = 4096;
    let (code, sentence) = refused(compare(&hello(), &other));
    assert_eq!(code, RefuseCode::SizeMismatch);
    for part in ["'data'", "2048", "4096"] {
        assert!(sentence.contains(part), "{sentence}");
    }
    // A volume that only one side knows is no reason.
    other.volumes[0].id = VolumeId(2);
    assert_eq!(compare(&hello(), &other), Verdict::Resume { from: at(2, 200) });
}

#[test]
fn every_doubt_has_a_sentence() {
    let all =
        [Doubt::SourceContradicts, Doubt::SourceBehind, Doubt::MapBehind, Doubt::TargetBehind];
    for why in all {
        assert!(why.sentence().contains("everything is compared"), "{why:?}");
    }
}
