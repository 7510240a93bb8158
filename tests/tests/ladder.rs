//! A link that is slower than the writes: ring, spool and gap one after the other and back again by
//! themselves, with nothing lost on the way; and the spool over a restart.

use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tidemark_control::agent::Rung;
use tidemark_journal::{GapReason, Seq};
use tidemark_tests::journal::{self, Replay};
use tidemark_tests::site::{Plan, Site};
use tidemark_tests::workload::history::History;
use tidemark_tests::workload::nbd::NbdDisk;
use tidemark_tests::workload::{self, Log, Operation, Shape, order};

const NODE: &str = env!("CARGO_BIN_EXE_node");
const MIB: u64 = 1 << 20;
const SIZES_BYTES: [u64; 1] = [64 * MIB];

/// A ring that is soon half full, and a spool of this size.
fn plan(spool_mib: u64) -> Plan {
    let mut plan = Plan::new(&SIZES_BYTES);
    plan.ring_bytes = 16 * MIB;
    plan.compression = "off";
    plan.spool_bytes_max = Some(spool_mib * MIB);
    plan
}

fn shape(seed: u64, operations: usize) -> Shape {
    Shape {
        seed,
        operations,
        sizes_bytes: SIZES_BYTES.to_vec(),
        block_bytes: 4096,
        blocks_max: 32,
        zeroes_percent: 5,
        discards_percent: 5,
        flushes_percent: 5,
        hot_bytes: 8 * MIB,
    }
}

fn load(disk: &NbdDisk, operations: &[Operation]) -> Result<Log> {
    let log = workload::run(&[disk], operations, 8, &AtomicBool::new(false));
    ensure!(log.error().is_none(), "{:?}", log.error());
    ensure!(log.entries.len() == operations.len(), "a part of the load was left out");
    Ok(log)
}

/// The journal after `start` is the load, each operation once and in an order that its user could have
/// seen; and the replica is the disk.
fn judge_exactly(site: &Site, operations: &[Operation], log: &Log, start: u64) -> Result<()> {
    site.wait_in_sync()?;
    let logged = journal::of_load(&site.log_dir(), Seq(start))?;
    let records: Vec<order::Record> = logged.iter().map(|(_, record)| *record).collect();
    let parts = order::of_journal(log, &records)?;
    site.check_end(&History::of_parts(&SIZES_BYTES, operations, &parts))
}

#[test]
fn a_stop_in_order_leaves_the_spool_to_the_next_agent() -> Result<()> {
    let mut site = Site::new(plan(1024))?;
    site.manage_agents()?;
    site.start_target()?;
    site.spawn_agent(NODE)?;
    site.wait_in_sync()?;
    let start = site.mark("the start")?;
    let operations = shape(4, 1000).operations()?;
    let disk = site.disk(0, 1)?;
    site.network().dead(true);
    let log = load(&disk, &operations)?;
    ensure!(site.status()?.rung == Rung::Spool, "the spool was not used");
    drop(disk);
    ensure!(!site.stop_agent()?, "it cannot have ended cleanly");
    site.spawn_agent(NODE)?;
    site.network().dead(false);
    judge_exactly(&site, &operations, &log, start)
}

/// Overflow: the link is throttled far below the write rate until all rungs were used, then released.
#[test]
fn all_rungs_are_used_and_left_again() -> Result<()> {
    let mut site = Site::started(plan(64))?;
    site.wait_in_sync()?;
    let disk = site.disk(0, 1)?;
    let content = |site: &Site| std::fs::read(site.image(0));
    // A point at a quiet moment, and the unthrottled rate.
    let unthrottled = rate(&disk, 1)?;
    site.wait_in_sync()?;
    let older = (site.mark("before")?, content(&site)?);
    site.wait_in_sync()?;
    site.network().stall(true);
    let (mut rungs, mut throttled, mut round) = (BTreeSet::new(), Vec::new(), 2);
    let mut warned = false;
    let deadline = Instant::now() + Duration::from_secs(100);
    while !rungs.contains("gap") {
        throttled.push(rate(&disk, round)?);
        round += 1;
        let status = site.status()?;
        rungs.insert(match status.rung {
            Rung::Ring => "ring",
            Rung::Spool => "spool",
            Rung::Gap => "gap",
        });
        warned |= status.ladder.next == Some(Rung::Gap);
        ensure!(Instant::now() < deadline, "{rungs:?}: {status:#?}");
    }
    ensure!(rungs.contains("spool"), "{rungs:?}");
    ensure!(site.mark("inside").is_err(), "a mark inside a gap was set");
    let in_gap = rate(&disk, round)?;
    throttled.sort_by(f64::total_cmp);
    println!(
        "MiB/s: {unthrottled:.0} unthrottled; {:.0} throttled, the median of {}; {in_gap:.0} in the gap; \
         a forecast of the gap: {warned}",
        throttled[throttled.len() / 2],
        throttled.len()
    );
    site.network().stall(false);
    site.wait_in_sync()?;
    let ladder = site.status()?.ladder;
    println!("{ladder:?}");
    site.wait("the spool to be left", |status| {
        status.rung == Rung::Ring && status.ladder.spool_bytes == 0
    })?;
    ensure!(site.read_export("/v0@latest")? == content(&site)?, "the replica");
    ensure!(site.read_export(&format!("/v0@seq:{}", older.0))? == older.1, "the older point");
    let replay = Replay::read(&site.log_dir(), &SIZES_BYTES)?;
    let gaps = replay.gaps(0);
    ensure!(gaps.iter().all(|gap| gap.end.is_some()), "{gaps:?}");
    ensure!(gaps.iter().filter(|gap| gap.reason == GapReason::Overflow).count() >= 1, "{gaps:?}");
    site.stop_agent()?;
    Ok(())
}

/// Writes for a while; MiB a second.
fn rate(disk: &NbdDisk, seed: u64) -> Result<f64> {
    let shape =
        Shape { zeroes_percent: 0, discards_percent: 0, flushes_percent: 0, ..shape(seed, 150) };
    let operations = shape.operations()?;
    let bytes: u64 = operations
        .iter()
        .filter_map(|operation| operation.action.range())
        .map(|(_, bytes)| bytes)
        .sum();
    let start = Instant::now();
    load(disk, &operations)?;
    Ok(bytes as f64 / MIB as f64 / start.elapsed().as_secs_f64())
}
