use tidemark_control::config::{Bytes, Seconds};

use super::*;

const MIB: u64 = 1 << 20;

fn config() -> GroupConfig {
    GroupConfig {
        name: "shop".parse().expect("a name"),
        node: "db1".parse().expect("a name"),
        readers: Vec::new(),
        branch_writers: Vec::new(),
        window: Seconds(100),
        window_min: Seconds(10),
        size_max: Bytes(40 * MIB),
    }
}

/// Every combination of how old the oldest segment is, how full the log is, and whether something
/// pins it.
#[test]
fn the_table() {
    // age in seconds, log in MiB, pinned; folded, why held
    let rows = [
        (5, 10, false, false, ""),
        (5, 10, true, false, ""),
        (50, 10, false, false, ""),
        (50, 10, true, false, ""),
        (101, 10, false, true, "being folded"),
        (101, 10, true, false, "@seq:7 is held by a reader"),
        (5, 35, false, false, "younger than window_min"),
        (5, 35, true, false, "@seq:7 is held by a reader"),
        (50, 35, false, true, "being folded"),
        (50, 35, true, false, "@seq:7 is held by a reader"),
        (101, 35, false, true, "being folded"),
        (101, 35, true, false, "@seq:7 is held by a reader"),
    ];
    for (age, log, pinned, fold, held) in rows {
        let facts = Facts {
            log_bytes: log * MIB,
            ahead_bytes: 10 * MIB,
            oldest: Some(OldestSegment { last: Seq(8), received_ns: 1_000, has_points: true }),
            received_ns: 1_000 + age * 1_000_000_000,
            pin: Some((Seq(if pinned { 7 } else { 8 }), "a reader".to_owned())),
        };
        let decision = decide(&config(), &facts);
        let row = (age, log, pinned);
        assert_eq!(decision.fold, fold, "{row:?}");
        match (&decision.held, held) {
            (None, "") => {}
            (Some(text), held) if !held.is_empty() => {
                assert!(text.contains(held), "{row:?} {text}")
            }
            (found, _) => panic!("{row:?}: {found:?}"),
        }
        // Without a point in it, its age matters to nobody.
        let oldest = facts.oldest.map(|oldest| OldestSegment { has_points: false, ..oldest });
        let pointless = decide(&config(), &Facts { oldest, ..facts.clone() });
        assert_eq!(pointless.fold, !pinned && (age > 100 || log > 30), "{row:?}");
        let nothing = Facts { oldest: None, ..facts };
        assert_eq!(decide(&config(), &nothing), Decision { fold: false, held: None });
    }
}
