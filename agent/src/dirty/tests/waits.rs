//! What can wait is written all the same, in pieces: whatever is urgent meanwhile.

use tidemark_journal::{Seq, VolumeId};

use super::super::{
    RegionId,
    bitmap::{self, Bits, PAGE_REGIONS},
    map::{Commit, DirtyMap, VolumeStart},
};

const VOLUME: VolumeId = VolumeId(3);
const PAGES: u32 = 200;
/// What a commit takes along of what can wait.
const TOGETHER: u32 = 64;

fn region(page: u32, index: u32) -> RegionId {
    RegionId { volume: VOLUME, index: page * PAGE_REGIONS + index }
}

/// A map in which the first region of each page is uncaptured, durably.
fn map() -> DirtyMap {
    let regions = PAGES * PAGE_REGIONS;
    let mut uncaptured = Bits::new(regions);
    (0..PAGES).for_each(|page| {
        uncaptured.set(region(page, 0).index);
    });
    let written = vec![0; PAGES as usize];
    let start = VolumeStart { id: VOLUME, regions, written, uncaptured, dirty: Bits::new(regions) };
    let mut map = DirtyMap::new([7; 16], 0, 0, vec![start]);
    let commit = map.begin_commit(Seq::ZERO).expect("the first");
    assert_eq!(pages(&commit).len(), PAGES as usize, "the first commit writes every page");
    map.commit_written();
    assert!(map.begin_commit(Seq::ZERO).is_none() && map.is_settled());
    map
}

fn pages(commit: &Commit) -> Vec<u32> {
    let number = |offset: u64| (offset / (2 * super::super::BLOCK_BYTES as u64)) as u32;
    commit.pages.iter().map(|page| number(page.offset)).collect()
}

#[test]
fn what_waits_is_written_though_something_is_always_urgent() {
    let mut map = map();
    (0..PAGES).for_each(|page| map.caught_up(region(page, 0)));
    assert!(!map.wants_commit(), "nobody waits for that");
    map.write_back();
    let mut left: std::collections::BTreeSet<u32> = (0..PAGES).collect();
    let mut commits = 0;
    while !left.is_empty() {
        // What is urgent is always on the first pages, and they are always stale again.
        for page in 0..8 {
            map.mark_uncaptured(region(page, 1 + commits));
            map.caught_up(region(page, commits));
        }
        map.write_back();
        let commit = map.begin_commit(Seq::ZERO).expect("there is something");
        assert!(commit.pages.len() as u32 <= 8 + TOGETHER, "{}", commit.pages.len());
        pages(&commit).iter().for_each(|page| {
            left.remove(page);
        });
        map.commit_written();
        commits += 1;
        assert!(commits <= PAGES.div_ceil(TOGETHER - 8), "{left:?} still wait");
    }
}

#[test]
fn a_region_of_a_doubt_may_be_written_when_its_page_is_durable() {
    let mut map = map();
    map.doubt(VOLUME);
    let last = region(PAGES - 1, 9);
    assert!(!map.ready_uncaptured(last), "only memory says so");
    let commit = map.begin_commit(Seq::ZERO).expect("there is something");
    assert!(pages(&commit).contains(&(PAGES - 1)), "somebody waits for that page");
    assert!(!map.ready_uncaptured(last), "the commit is under way");
    map.commit_written();
    assert!(map.ready_uncaptured(last));
    assert!(!map.ready_uncaptured(region(PAGES - 2, 0)) && map.is_marking_any(VOLUME));
    while map.begin_commit(Seq::ZERO).is_some() {
        map.commit_written();
    }
    assert!(map.ready_uncaptured(region(PAGES - 2, 0)) && !map.is_marking_any(VOLUME));
    assert!(map.is_settled());
}

#[test]
fn a_failed_flush_marks_what_is_dirty_and_waits_for_its_pages() {
    let mut map = map();
    (0..PAGES).for_each(|page| map.caught_up(region(page, 0)));
    assert!(map.rotate(Seq(5)));
    map.flush_failed(VOLUME);
    assert_eq!(map.uncaptured(VOLUME).count(), PAGES);
    for page in 0..PAGES {
        assert!(map.is_marking(region(page, 0)));
    }
    let commit = map.begin_commit(Seq::ZERO).expect("there is something");
    let written = pages(&commit);
    map.commit_written();
    assert_eq!(written.len(), TOGETHER as usize);
    let marking = |page: &u32| map.is_marking(region(*page, 0));
    assert!(written.iter().all(|page| !marking(page)) && (0..PAGES).any(|page| marking(&page)));
}

#[test]
fn the_bits_of_a_whole_page_are_counted_and_found() {
    let regions = 3 * PAGE_REGIONS + 5;
    let (mut bits, mut other) = (Bits::new(regions), Bits::new(regions));
    bits.fill();
    assert_eq!((bits.count(), bits.pages().count()), (regions, 4));
    assert_eq!((bits.next(regions - 1), bits.next(regions)), (Some(regions - 1), None));
    bits.empty();
    assert_eq!((bits.count(), bits.next(0), &bits), (0, None, &Bits::new(regions)));
    for region in [PAGE_REGIONS - 1, 3 * PAGE_REGIONS, regions - 1] {
        other.set(region);
    }
    bits.set(PAGE_REGIONS - 1);
    bits.include(&other);
    assert_eq!(bits.pages().collect::<Vec<_>>(), [0, 3]);
    assert_eq!(bits.next(PAGE_REGIONS), Some(3 * PAGE_REGIONS), "over pages that hold none");
    assert_eq!((bits.count(), other.count()), (3, 3));
    assert_eq!(bitmap::pages_in(regions), 4);
}

/// Writes to every region, and says how many commits they waited for.
fn commits(map: &mut DirtyMap, regions: impl Iterator<Item = u32>) -> u32 {
    let (mut commits, mut seq) = (0, 0);
    for index in regions {
        let region = RegionId { volume: VOLUME, index };
        while !map.mark_again(region) && !map.ready(region, region.start()) {
            let commit = map.begin_commit(Seq::ZERO).expect("it is waited for");
            assert_eq!(commit.log.iter().count(), 1);
            map.commit_written();
            commits += 1;
        }
        seq += 1;
        map.drawn(region, Seq(seq));
    }
    commits
}

#[test]
fn a_stream_waits_seldom_and_writes_here_and_there_wait_for_each_region() {
    let regions = 2 * PAGE_REGIONS + 5;
    let new = || {
        let start = VolumeStart {
            id: VOLUME,
            regions,
            written: vec![0; 3],
            uncaptured: Bits::new(regions),
            dirty: Bits::new(regions),
        };
        let mut map = DirtyMap::new([7; 16], 0, 0, vec![start]);
        map.limit_active(1024);
        map.begin_commit(Seq::ZERO).expect("the first");
        map.commit_written();
        map
    };
    // One for each of the first two regions, and then, besides the one that is waited for, 4, 8, 16, 32, and 64 at a
    // time.
    assert_eq!(commits(&mut new(), 0..2000), 2 + 4 + (2000u32 - 66).div_ceil(65));
    assert_eq!(commits(&mut new(), regions - 600..regions), 2 + 4 + (600u32 - 66).div_ceil(65));
    assert_eq!(commits(&mut new(), (0..500).map(|step| step * 7)), 500);
    // None is foreseen where that could take what is used.
    let mut small = new();
    small.limit_active(8);
    assert_eq!(commits(&mut small, 0..300), 300);
}
