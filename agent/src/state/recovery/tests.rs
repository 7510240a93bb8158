//! Every combination of what a start can find.

use std::path::Path;

use tidemark_journal::GroupId;

use super::*;
use crate::dirty::{
    active::{ActiveSet, LOG_BYTES},
    bitmap::Bits,
};

const GROUP: GroupId = GroupId([1; 16]);
const MAP_ID: [u8; 16] = [2; 16];
const VOLUMES: [(VolumeId, u32); 2] = [(VolumeId(1), 10), (VolumeId(2), 20)];
const FORK: Seq = Seq(100);
const LAST: Seq = Seq(150);
const CEILING: Seq = Seq(1000);
const OLD: TermId = TermId([3; 16]);
const FRESH: [[u8; 16]; 2] = [[8; 16], [9; 16]];

/// What the map's files say.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Map {
    /// Nothing is marked.
    Empty,
    /// Of volume 1, region 3 is active, 4 dirty and 5 uncaptured.
    Marked,
    /// A page of volume 1 cannot be read.
    DamagedPage,
    /// The log of active regions cannot be read.
    DamagedLog,
}

/// How the terms fit the state block.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Terms {
    Same,
    /// A newer one was begun, and nothing has used it.
    Ahead,
    Other,
}

fn found(clean: Option<Seq>, map: Map, terms: Terms) -> Found {
    let mut active = ActiveSet::new(MAP_ID, 0);
    let region = RegionId { volume: VOLUMES[0].0, index: 3 };
    active.replace(7, (map == Map::Marked).then_some(region));
    let mut log = vec![0; LOG_BYTES as usize];
    for _ in 0..3 {
        let (at, block) = active.transaction(&[7]);
        log[at as usize..][..4096].copy_from_slice(&block);
    }
    if map == Map::DamagedLog {
        log[2 * 4096 + 100] ^= 1;
    }
    let maps = VOLUMES.map(|(volume, regions)| {
        let (mut dirty, mut uncaptured) = (Bits::new(regions), Bits::new(regions));
        if map == Map::Marked && volume == VOLUMES[0].0 {
            dirty.set(4);
            uncaptured.set(5);
        }
        let mut file = vec![0; bitmap::file_bytes(regions) as usize];
        let (at, page) = bitmap::encode(MAP_ID, 0, 77, 0, [&dirty, &dirty], &uncaptured);
        if map != Map::DamagedPage || volume != VOLUMES[0].0 {
            file[at as usize..][..4096].copy_from_slice(&page);
        }
        file
    });
    let path = Ancestry::root(TermId([4; 16])).fork(OLD, FORK).unwrap();
    let ancestry = match terms {
        Terms::Same => path,
        Terms::Ahead => path.fork(TermId([5; 16]), LAST).unwrap(),
        Terms::Other => Ancestry::root(TermId([6; 16])),
    };
    let state = GroupState {
        group: GROUP,
        map_id: MAP_ID,
        term: OLD,
        ceiling: CEILING,
        time_ceiling_ns: 5000,
        acked: Position { term: OLD, seq: Seq(120) },
        generation: 42,
        clean,
        ring: 11,
        spooled: Position::default(),
    };
    let (state, ancestry) = (Some(state), Some(ancestry));
    Found { state, ancestry, log, maps: maps.to_vec(), lease: None, doubted: false }
}

fn ring() -> LeftRing {
    let gap = Gap { reason: GapReason::Overflow, begun: true };
    let failed = vec![RegionId { volume: VOLUMES[1].0, index: 6 }];
    let gaps = vec![Some(gap), None];
    let unflushed = Vec::new();
    LeftRing { last_seq: LAST, framed: Seq(140), gaps, unflushed, failed, beyond_spool: false }
}

fn start(found: &Found, ring: Option<&LeftRing>) -> Option<Start> {
    decide(Path::new("/state"), GROUP, &VOLUMES, found, ring, None, FRESH).ok()
}

fn marked(bits: &Bits) -> Vec<u32> {
    bits.iter().collect()
}

#[test]
fn every_combination_has_its_row() {
    let mut rows = [0; 4];
    for clean in [None, Some(LAST), Some(Seq(149))] {
        for map in [Map::Empty, Map::Marked, Map::DamagedPage, Map::DamagedLog] {
            for terms in [Terms::Same, Terms::Ahead, Terms::Other] {
                for (left, doubted) in [(false, false), (true, false), (false, true), (true, true)]
                {
                    let case = format!("{clean:?} {map:?} {terms:?} {left} {doubted}");
                    let left = left.then(ring);
                    let found = Found { doubted, ..found(clean, map, terms) };
                    let start = start(&found, left.as_ref()).expect("a way to go on");
                    let told = [
                        (map == Map::DamagedLog, "the log of active regions is damaged"),
                        (
                            terms == Terms::Other,
                            "the path of terms and the state are not of the same time",
                        ),
                        (map == Map::DamagedPage, "pages of the dirty map are damaged"),
                    ];
                    let told = told.iter().filter(|(is, _)| *is).map(|(_, why)| *why);
                    assert_eq!(start.doubts, told.collect::<Vec<_>>(), "{case}");
                    // A map that is not to be believed is as good as one that cannot be read.
                    let believed = !doubted && terms != Terms::Other;
                    let damaged = map == Map::DamagedPage || believed;
                    let map = if damaged { map } else { Map::DamagedLog };
                    check(&case, clean, map, terms, left.as_ref(), &start, &mut rows);
                }
            }
        }
    }
    assert!(rows.iter().all(|row| *row > 0), "{rows:?}");
}

/// The rows in the order of the table of this module.
fn check(
    case: &str,
    clean: Option<Seq>,
    map: Map,
    terms: Terms,
    left: Option<&LeftRing>,
    start: &Start,
    rows: &mut [u32; 4],
) {
    let readable = matches!(map, Map::Empty | Map::Marked);
    let fits = left.filter(|ring| clean.is_none_or(|end| end == ring.last_seq));
    let gaps = |reason| Some(Gap::owed(reason));
    assert!(start.state.clean.is_none() && start.generation >= 77 * u64::from(readable), "{case}");
    assert_eq!((start.time_base_ns, start.transaction), (5000, 3), "{case}");
    if readable && terms == Terms::Same && fits.is_some() {
        rows[0] += 1;
        assert!(start.with_ring && !start.new_term, "{case}");
        assert_eq!((start.last_seq, start.state.ceiling), (LAST, CEILING), "{case}");
        assert_eq!(start.place.before, Position { term: OLD, seq: Seq(140) }, "{case}");
        assert_eq!((start.state.term, start.place.term), (OLD, OLD), "{case}");
        let dirty = if map == Map::Marked { vec![3, 4] } else { vec![] };
        let uncaptured = if map == Map::Marked { vec![5] } else { vec![] };
        assert_eq!(marked(&start.maps[0].dirty), dirty, "{case}");
        assert_eq!(marked(&start.maps[0].uncaptured), uncaptured, "{case}");
        assert_eq!(marked(&start.maps[1].uncaptured), [6], "{case}");
        let gaps: Vec<_> = start.gaps.iter().map(|(_, gap)| *gap).collect();
        assert_eq!(gaps, ring().gaps, "{case}");
        return;
    }
    assert!(!start.with_ring, "{case}");
    assert!(start.maps.iter().all(|map| map.dirty.count() == 0), "{case}");
    if let Some(seq) = clean
        && map == Map::Empty
        && terms == Terms::Same
    {
        rows[1] += 1;
        assert!(!start.new_term, "{case}");
        assert_eq!((start.last_seq, start.state.term), (seq, OLD), "{case}");
        assert_eq!(start.place.before, Position { term: OLD, seq }, "{case}");
        assert!(start.state.ceiling > seq && start.gaps.iter().all(|(_, gap)| gap.is_none()));
        return;
    }
    assert!(start.new_term, "{case}");
    assert_eq!((start.last_seq, start.state.term), (CEILING, TermId(FRESH[0])), "{case}");
    assert_eq!(start.ancestry.current().fork_seq, CEILING, "{case}");
    assert_eq!(start.place.before.seq, CEILING, "{case}");
    assert!(start.state.ceiling > CEILING, "{case}");
    if readable {
        rows[2] += 1;
        let uncaptured = if map == Map::Marked { vec![3, 4, 5] } else { vec![] };
        assert_eq!(marked(&start.maps[0].uncaptured), uncaptured, "{case}");
        assert_eq!(start.maps[1].uncaptured.count(), 0, "{case}");
        let gap = gaps(GapReason::Crash).filter(|_| map == Map::Marked);
        assert_eq!((start.gaps[0].1, start.gaps[1].1), (gap, None), "{case}");
    } else {
        rows[3] += 1;
        assert!(start.maps.iter().all(|map| map.uncaptured.count() == map.regions), "{case}");
        let all = start.gaps.iter().all(|(_, gap)| *gap == gaps(GapReason::Doubt));
        assert!(all, "{case}");
    }
}

/// The agent died between a flush that failed and the marks of what it may have lost.
#[test]
fn what_a_failed_flush_may_have_lost_is_read_back_by_the_next_agent() {
    let found = found(None, Map::Marked, Terms::Same);
    let left = LeftRing { unflushed: vec![VOLUMES[0].0], ..ring() };
    let start = start(&found, Some(&left)).expect("a way to go on");
    assert!(start.with_ring);
    assert_eq!(marked(&start.maps[0].uncaptured), [3, 4, 5]);
    assert_eq!(marked(&start.maps[1].uncaptured), [6], "the other volume's flush did not fail");
}

/// The state disk takes the terms and not the block, again and again. A path holds 256 terms: of a target's
/// position that has fallen out of it nobody could say any more that the source goes on from it.
#[test]
fn starts_that_fail_before_their_term_is_named_use_up_no_terms() {
    let mut found = found(None, Map::Marked, Terms::Same);
    let begun = found.ancestry.clone().unwrap();
    for number in 20..=255 {
        let fresh = [[number; 16]; 2];
        let start =
            decide(Path::new("/state"), GROUP, &VOLUMES, &found, None, None, fresh).unwrap();
        let wanted = begun.fork(TermId([number; 16]), CEILING).unwrap();
        assert_eq!(start.ancestry, wanted, "attempt {number}");
        assert_eq!(start.place.before, Position { term: OLD, seq: CEILING });
        found.ancestry = Some(start.ancestry);
    }
    // What the spool holds of a term was written in it.
    let at = |seq| Position { term: TermId([255; 16]), seq: Seq(seq) };
    let spool = Some(LeftSpool { before: at(1000), end: at(1001) });
    let start = decide(Path::new("/state"), GROUP, &VOLUMES, &found, None, spool, FRESH).unwrap();
    assert_eq!(start.ancestry.terms().len(), begun.terms().len() + 2);
}

#[test]
fn a_group_without_state_is_new_whatever_ring_there_is() {
    let mut nothing = found(None, Map::Empty, Terms::Same);
    nothing.state = None;
    for left in [None, Some(ring())] {
        let start = start(&nothing, left.as_ref()).unwrap();
        assert!(start.new_term && !start.with_ring);
        assert_eq!((start.last_seq, start.state.ring), (Seq::ZERO, 0));
        assert!(start.maps.iter().all(|map| map.uncaptured.count() == map.regions));
        let first = Some(Gap::owed(GapReason::FirstSync));
        assert!(start.gaps.iter().all(|(_, gap)| *gap == first));
    }
}

#[test]
fn the_first_frame_of_a_term_names_its_parents_end() {
    let found = found(None, Map::Empty, Terms::Same);
    let left = LeftRing {
        last_seq: Seq(103),
        framed: FORK,
        gaps: vec![None; 2],
        unflushed: vec![],
        failed: vec![],
        beyond_spool: false,
    };
    let start = start(&found, Some(&left)).unwrap();
    let parent = Position { term: TermId([4; 16]), seq: FORK };
    assert_eq!((start.place.term, start.place.before), (OLD, parent));
}

/// What there is of a spool.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Spool {
    None,
    /// From what is acknowledged on to what the state names.
    Whole,
    /// Up to before that.
    Short,
    /// It begins after what is acknowledged.
    Late,
    /// It ends beyond the ceiling.
    Beyond,
    /// Its end is no part of the path.
    Foreign,
}

impl Spool {
    fn left(self) -> Option<LeftSpool> {
        let at = |seq| Position { term: OLD, seq: Seq(seq) };
        let (before, end) = match self {
            Spool::None => return None,
            Spool::Whole => (at(115), at(135)),
            Spool::Short => (at(115), at(129)),
            Spool::Late => (at(121), at(135)),
            Spool::Beyond => (at(115), at(1001)),
            Spool::Foreign => (at(115), Position { term: TermId([7; 16]), seq: Seq(135) }),
        };
        Some(LeftSpool { before, end })
    }
}

#[test]
fn every_combination_with_a_spool_has_its_row() {
    let spools =
        [Spool::None, Spool::Whole, Spool::Short, Spool::Late, Spool::Beyond, Spool::Foreign];
    let mut seen = [0; 3];
    for spooled in [0, 110, 130] {
        for clean in [None, Some(LAST)] {
            for map in [Map::Empty, Map::Marked, Map::DamagedPage] {
                for ring in [None, Some(false), Some(true)] {
                    for spool in spools {
                        let case = format!("{spooled} {clean:?} {map:?} {ring:?} {spool:?}");
                        let mut found = found(clean, map, Terms::Same);
                        let mut old = found.state.unwrap();
                        old.spooled = Position { term: OLD, seq: Seq(spooled) };
                        found.state = Some(old);
                        let left =
                            ring.map(|beyond_spool| LeftRing { beyond_spool, ..self::ring() });
                        let start = decide(
                            Path::new("/state"),
                            GROUP,
                            &VOLUMES,
                            &found,
                            left.as_ref(),
                            spool.left(),
                            FRESH,
                        )
                        .unwrap();
                        let unneeded = clean.is_some() || ring == Some(true);
                        // What was acknowledged is at 120.
                        let sent = match spool {
                            Spool::Whole => !unneeded,
                            Spool::Short => !unneeded && spooled <= 129,
                            _ => false,
                        };
                        let lost = spool == Spool::Beyond || (!unneeded && !sent && spooled > 120);
                        seen[usize::from(sent) + 2 * usize::from(lost)] += 1;
                        assert_eq!(start.with_spool, sent, "{case}");
                        let told = start
                            .doubts
                            .contains(&"the spool does not hold what the state relies on");
                        assert_eq!(told, lost, "{case}");
                        let relied_on = if sent { old.spooled } else { Position::default() };
                        assert_eq!(start.state.spooled, relied_on, "{case}");
                        let doubt = lost || map == Map::DamagedPage;
                        let all = |map: &VolumeStart| map.uncaptured.count() == map.regions;
                        assert_eq!(start.maps.iter().all(all), doubt, "{case}");
                        assert_eq!(start.with_ring, left.is_some() && !doubt, "{case}");
                        if doubt {
                            let reason = Some(Gap::owed(GapReason::Doubt));
                            assert!(start.gaps.iter().all(|(_, gap)| *gap == reason), "{case}");
                        } else if !start.with_ring && map == Map::Empty {
                            // All that is not final-durable is in the spool: nothing is compared.
                            assert!(start.gaps.iter().all(|(_, gap)| gap.is_none()), "{case}");
                        }
                    }
                }
            }
        }
    }
    assert!(seen.iter().all(|count| *count > 10), "{seen:?}");
}
