//! Overflow: a link that is throttled far below the write rate until all rungs are used, and then released. The
//! application's throughput stays, the replica is equal at the end, and older points are as they were.
//!
//! What is measured: a closed loop of eight writers, each of which writes as fast as it is answered, in windows of some
//! 8 MiB. An application that asks for less than the disk gives would hide what a write costs. Each round has windows
//! over a free link, then over one on which nothing moves: while frames wait in the ring, while they go to the spool,
//! and in the gap; then over one that is free again, while all that has piled up is sent and catch-up waits for its
//! turn. Then the next round begins, so a machine that is slow for a while is so for all of them. A window belongs to
//! the rung on which it ends, so none is left out. The medians of the rungs over all rounds are compared with that over
//! the free link, where the application pays for replication as well: encoder, sender and target run on the same processors, and
//! the target's log, like the spool, is on the same disk. So the rate on the ring alone, where nothing else runs, is
//! above it; it is printed what the others leave of that, and the rate while what has piled up is sent.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use tidemark_control::agent::Rung;
use tidemark_control::target::TargetClient;
use tidemark_journal::GapReason;
use tidemark_tests::journal;
use tidemark_tests::site::{GROUP, Plan, Site};
use tidemark_tests::workload::nbd::NbdDisk;
use tidemark_tests::workload::{self, Shape};

const MIB: u64 = 1 << 20;
const SIZE_BYTES: u64 = 128 * MIB;
const ROUNDS: u64 = 4;
/// Windows over the free link in a round, in the gap and after it.
const WINDOWS: usize = 4;
/// The least windows of a rung that make a median.
const WINDOWS_MIN: usize = 11;
/// A round that has not come to the gap by then never will.
const WINDOWS_MAX: usize = 200;
/// What is left of the throughput over a free link, at least.
const LEFT_MIN: f64 = 0.85;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Stage {
    Free,
    Ring,
    Spool,
    Gap,
    Released,
}

/// Rates of windows in MiB a second.
#[derive(Default)]
struct Rates {
    of: BTreeMap<Stage, Vec<f64>>,
    windows: u64,
}

impl Rates {
    /// Writes for a window, which `stage` then names.
    fn window(&mut self, disk: &NbdDisk, stage: impl FnOnce() -> Result<Stage>) -> Result<Stage> {
        self.windows += 1;
        let shape = Shape {
            seed: self.windows,
            operations: 240,
            sizes_bytes: vec![SIZE_BYTES],
            block_bytes: 4096,
            blocks_max: 32,
            zeroes_percent: 0,
            discards_percent: 0,
            flushes_percent: 0,
            hot_bytes: 8 * MIB,
        };
        let operations = shape.operations()?;
        let ranges = operations.iter().filter_map(|operation| operation.action.range());
        let bytes: u64 = ranges.map(|(_, bytes)| bytes).sum();
        let start = Instant::now();
        let log = workload::run(&[disk], &operations, 8, &AtomicBool::new(false));
        let seconds = start.elapsed().as_secs_f64();
        ensure!(log.error().is_none(), "{:?}", log.error());
        let stage = stage()?;
        self.of.entry(stage).or_default().push(bytes as f64 / MIB as f64 / seconds);
        Ok(stage)
    }

    fn median(&self, stage: Stage) -> Result<f64> {
        let mut rates = self.of.get(&stage).cloned().unwrap_or_default();
        ensure!(rates.len() >= WINDOWS_MIN, "{} windows of {stage:?}", rates.len());
        rates.sort_by(f64::total_cmp);
        Ok(rates[rates.len() / 2])
    }
}

fn stage(site: &Site) -> Result<Stage> {
    Ok(match site.status()?.rung {
        Rung::Ring => Stage::Ring,
        Rung::Spool => Stage::Spool,
        Rung::Gap => Stage::Gap,
    })
}

/// A round over a site that is in sync; says whether the gap was foreseen.
fn round(site: &Site, disk: &NbdDisk, rates: &mut Rates) -> Result<bool> {
    for _ in 0..WINDOWS {
        rates.window(disk, || Ok(Stage::Free))?;
    }
    site.wait_in_sync()?;
    site.network().stall(true);
    let (mut foreseen, mut in_gap) = (false, 0);
    for _ in 0..WINDOWS_MAX {
        in_gap += usize::from(rates.window(disk, || stage(site))? == Stage::Gap);
        foreseen |= site.status()?.ladder.next == Some(Rung::Gap);
        if in_gap == WINDOWS {
            break;
        }
    }
    ensure!(in_gap == WINDOWS, "no gap: {:#?}", site.status()?);
    match site.mark("inside") {
        Ok(seq) => bail!("a mark inside a gap was set, at {seq}"),
        Err(error) => {
            let (sentence, reason) = (format!("{error:#}"), GapReason::Overflow.describe());
            ensure!(sentence.contains("inside a gap") && sentence.contains(reason), "{sentence}");
        }
    }
    site.network().stall(false);
    for _ in 0..WINDOWS {
        rates.window(disk, || Ok(Stage::Released))?;
    }
    site.wait_in_sync()?;
    site.wait("the spool to be left", |status| {
        status.rung == Rung::Ring && status.ladder.spool_bytes == 0
    })?;
    Ok(foreseen)
}

#[test]
fn an_application_does_not_notice_which_rung_is_used() -> Result<()> {
    let mut plan = Plan::new(&[SIZE_BYTES]);
    plan.ring_bytes = 128 * MIB;
    plan.compression = "off";
    plan.spool_bytes_max = Some(128 * MIB);
    let mut site = Site::started(plan)?;
    site.wait_in_sync()?;
    let (disk, mut rates) = (site.disk(0, 1)?, Rates::default());
    // The regions are active from here on.
    for _ in 0..WINDOWS {
        rates.window(&disk, || Ok(Stage::Free))?;
    }
    rates.of.clear();
    site.wait_in_sync()?;
    let content = |site: &Site| std::fs::read(site.image(0)).context("the image");
    let (older, then) = (site.mark("before")?, content(&site)?);
    let mut foreseen = false;
    for _ in 0..ROUNDS {
        foreseen |= round(&site, &disk, &mut rates)?;
    }
    let ladder = site.status()?.ladder;
    println!("{ladder:?}; the gap was foreseen: {foreseen}");
    ensure!(ladder.spool_s_total > 0 && ladder.gap_s_total > 0, "{ladder:?}");

    ensure!(site.read_export("/v0@latest")? == content(&site)?, "the replica");
    ensure!(site.read_export(&format!("/v0@seq:{older}"))? == then, "the older point");
    ensure!(site.read_export("/v0@mark:before")? == then, "the mark");
    let gaps = journal::gaps(&site.log_dir(), 1)?.remove(0);
    let overflows = gaps.iter().filter(|gap| gap.reason == GapReason::Overflow);
    ensure!(overflows.clone().count() as u64 >= ROUNDS, "{gaps:?}");
    let client = TargetClient::new(&site.dir().join("target.sock"));
    let points = site.runtime().block_on(client.points(GROUP))?;
    let offered =
        |seq: u64| points.ranges.iter().any(|r| (r.first_seq.0..=r.last_seq.0).contains(&seq));
    for gap in overflows {
        let (begin, end) = (gap.begin.0, gap.end.context("a gap that has no end")?.0);
        ensure!(offered(begin - 1) && offered(end), "{gap:?}: {points:#?}");
        ensure!(!offered(begin) && !offered(end - 1), "{gap:?}: {points:#?}");
    }

    let free = rates.median(Stage::Free)?;
    println!(
        "{free:.0} MiB/s over a free link, the median of {} windows",
        rates.of[&Stage::Free].len()
    );
    let ring = rates.median(Stage::Ring)?;
    let mut too_slow = Vec::new();
    for stage in [Stage::Ring, Stage::Spool, Stage::Gap, Stage::Released] {
        let median = rates.median(stage)?;
        let windows = rates.of[&stage].len();
        let (of_free, of_ring) = (median / free, median / ring);
        println!(
            "{stage:?}: {median:.0} MiB/s, the median of {windows}: {of_free:.2}; of the ring's {of_ring:.2}"
        );
        if stage != Stage::Released && median < LEFT_MIN * free {
            too_slow.push(stage);
        }
    }
    ensure!(too_slow.is_empty(), "the application pays on {too_slow:?}: {:.0?}", rates.of);
    site.stop_agent()?;
    Ok(())
}
