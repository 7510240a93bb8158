//! The dirty map of a volume of 64 TiB, with its files on a real disk: what it takes there and in memory, that what
//! waits is written in pieces, and that a start finds what was there. It prints how long the steps take that the
//! engine's thread takes; the longest is one over all regions.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use tidemark_agent::{
    dirty::{
        RegionId,
        active::{self, SLOTS},
        bitmap::{self, Bits, PAGE_REGIONS},
        map::{DirtyMap, VolumeStart},
        regions_in,
    },
    state::files::StateFiles,
};
use tidemark_journal::{GroupId, Seq, VolumeId};

const VOLUME: VolumeId = VolumeId(1);
const MAP_ID: [u8; 16] = *b"a map of 64 TiB.";
const MIB: u64 = 1 << 20;
/// Pages of a commit that nobody waits for, and those that it may write because of what it evicts.
const PAGES_MAX: usize = 64 + active::CHANGES_MAX;

/// A map, its files, and the longest of the steps taken so far.
struct Vast {
    map: DirtyMap,
    files: StateFiles,
    longest: (Duration, &'static str),
    commits: u32,
    pages: usize,
}

impl Vast {
    fn new(dir: &Path, regions: u32) -> anyhow::Result<Vast> {
        Vast::open(dir, regions, |_| Ok(active::Recovered { active: Vec::new(), transaction: 0 }))
    }

    fn found(dir: &Path, regions: u32) -> anyhow::Result<Vast> {
        Vast::open(dir, regions, |log| active::recover(log, MAP_ID))
    }

    fn open(
        dir: &Path,
        regions: u32,
        recover: impl FnOnce(&[u8]) -> Result<active::Recovered, active::DamagedLog>,
    ) -> anyhow::Result<Vast> {
        let (mut files, found) = StateFiles::open(dir, GroupId([1; 16]), &[(VOLUME, regions)])?;
        let log = recover(&found.log)?;
        let bitmap::Recovered { mut dirty, mut uncaptured, written, generation, damaged_pages } =
            bitmap::recover(&found.maps[0], MAP_ID, regions);
        anyhow::ensure!(damaged_pages == 0 || generation == 0, "{damaged_pages} damaged pages");
        uncaptured.absorb(&mut dirty);
        log.active.iter().for_each(|region| {
            uncaptured.set(region.index);
        });
        let start = VolumeStart { id: VOLUME, regions, written, uncaptured, dirty };
        let mut map = DirtyMap::new(MAP_ID, generation, log.transaction, vec![start]);
        while let Some(commit) = map.begin_commit(Seq::ZERO) {
            files.write_commit(&commit)?;
            map.commit_written();
        }
        Ok(Vast { map, files, longest: (Duration::ZERO, ""), commits: 0, pages: 0 })
    }

    fn step<T>(&mut self, name: &'static str, step: impl FnOnce(&mut DirtyMap) -> T) -> T {
        let start = Instant::now();
        let result = step(&mut self.map);
        self.longest = self.longest.max((start.elapsed(), name));
        result
    }

    /// Writes commits until nothing waits.
    fn commit(&mut self, durable: u64) -> anyhow::Result<()> {
        while let Some(commit) = self.step("a commit", |map| map.begin_commit(Seq(durable))) {
            anyhow::ensure!(
                commit.pages.len() <= PAGES_MAX,
                "{} pages at once",
                commit.pages.len()
            );
            (self.commits, self.pages) = (self.commits + 1, self.pages + commit.pages.len());
            self.files.write_commit(&commit)?;
            self.step("the end of a commit", DirtyMap::commit_written);
        }
        Ok(())
    }

    /// An epoch of dirty bits, from its end to its last page on the disk.
    fn settle(&mut self, last: u64) -> anyhow::Result<()> {
        let tick = self.map.flush_begun();
        self.step("a flush", |map| map.flush_ended(VOLUME, tick));
        if self.step("a rotation", |map| map.rotate(Seq(last))) {
            self.step("a settlement", DirtyMap::settle);
        }
        self.step("what is due", DirtyMap::write_back);
        self.commit(last)?;
        anyhow::ensure!(self.map.is_settled());
        Ok(())
    }

    fn tell(&mut self, what: &str, since: Instant) {
        let (longest, step) = self.longest;
        println!(
            "{what}: {:.2} s; {} commits, {} pages; the longest step was {step}, {:.2} ms",
            since.elapsed().as_secs_f64(),
            self.commits,
            self.pages,
            longest.as_secs_f64() * 1e3
        );
        (self.longest, self.commits, self.pages) = ((Duration::ZERO, ""), 0, 0);
    }
}

/// Memory of this process that is its own.
fn anonymous_bytes() -> anyhow::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    Ok(number.ok_or_else(|| anyhow::anyhow!("no RssAnon"))?.parse::<u64>()? * 1024)
}

#[test]
fn a_map_of_64_tib_is_small_and_no_step_of_it_is_long() -> anyhow::Result<()> {
    let regions = regions_in((64 << 40) / 512);
    assert_eq!((regions, bitmap::pages_in(regions)), (1 << 26, 4162));
    let dir = tempfile::tempdir()?;
    let before = anonymous_bytes()?;
    let start = Instant::now();
    let mut vast = Vast::new(dir.path(), regions)?;
    let took = start.elapsed();
    // As at a first sync. What the file says of a new group does not count yet.
    assert_eq!(vast.map.uncaptured(VOLUME).count(), regions);
    let file = std::fs::metadata(dir.path().join(format!("{VOLUME}.map")))?.len();
    println!(
        "a new map: {:.2} s; {:.1} MiB on the disk",
        took.as_secs_f64(),
        file as f64 / MIB as f64
    );
    assert_eq!(file, 2 * bitmap::file_bytes(regions), "two copies");
    assert!(file <= 66 * MIB, "{file} bytes on the disk");

    // The first sync ends, but for one region on every page.
    let start = Instant::now();
    let mut from = 0;
    while let Some(index) = vast.map.uncaptured(VOLUME).next(from) {
        from = index + 1;
        if index % PAGE_REGIONS != 7 {
            vast.map.caught_up(RegionId { volume: VOLUME, index });
        }
    }
    let last = vast.step("a look for a region", |map| map.uncaptured(VOLUME).next(regions - 2));
    assert_eq!(last, None);
    vast.tell("regions caught up", start);
    let start = Instant::now();
    vast.settle(1)?;
    assert_eq!(vast.map.counts(), (0, 0));
    vast.tell("their epoch", start);

    // Writes all over the volume: almost all evict a region.
    let start = Instant::now();
    let mut seq = 1;
    let scattered: Vec<RegionId> = (0..40_000_u32)
        .map(|number| number.wrapping_mul(2_654_435_761) % regions)
        .map(|index| RegionId { volume: VOLUME, index })
        .collect();
    for together in scattered.chunks(active::CHANGES_MAX) {
        together.iter().for_each(|region| assert!(!vast.map.ready(*region, region.start())));
        vast.commit(1)?;
        for region in together {
            seq += 1;
            vast.map.hold(*region);
            vast.map.drawn(*region, Seq(seq));
            vast.map.release(*region);
        }
    }
    let (active, dirty) = vast.map.counts();
    assert_eq!(active, SLOTS);
    assert!(dirty > 30_000, "{dirty} dirty regions");
    vast.tell("writes all over it", start);
    let start = Instant::now();
    vast.settle(seq)?;
    vast.tell("their epoch", start);
    // Every set has been all over its memory by now.
    let memory = anonymous_bytes()?.saturating_sub(before);
    println!("{:.1} MiB in memory", memory as f64 / MIB as f64);
    assert!((24 * MIB..28 * MIB).contains(&memory), "{memory} bytes in memory");

    // A crash: a start finds the active regions and what was never caught up, and nothing else.
    let left = vast.map.uncaptured(VOLUME).clone();
    assert_eq!(left.count(), 4162);
    drop(vast);
    let start = Instant::now();
    let mut vast = Vast::found(dir.path(), regions)?;
    vast.tell("a start", start);
    let found = vast.map.uncaptured(VOLUME);
    assert!(left.iter().all(|region| found.get(region)));
    let both = found.count();
    assert!((SLOTS as u32..=4162 + SLOTS as u32).contains(&both), "{both}");

    // What marks many at once.
    let start = Instant::now();
    vast.map.uncaptured(VOLUME).clone().iter().for_each(|index| {
        vast.map.caught_up(RegionId { volume: VOLUME, index });
    });
    vast.step("a failed flush", |map| map.flush_failed(VOLUME));
    assert_eq!(vast.map.uncaptured(VOLUME).count(), both);
    assert!(vast.map.is_marking_any(VOLUME));
    vast.commit(seq)?;
    assert!(!vast.map.is_marking_any(VOLUME));
    vast.tell("a failed flush", start);
    let start = Instant::now();
    vast.step("a doubt", |map| map.doubt(VOLUME));
    vast.commit(seq)?;
    assert!(vast.map.is_settled());
    vast.tell("a doubt", start);
    drop(vast);
    let found = Vast::found(dir.path(), regions)?;
    let mut all = Bits::new(regions);
    all.fill();
    assert_eq!(found.map.uncaptured(VOLUME), &all);
    Ok(())
}
