//! The spool: what the ring cannot hold goes there and comes back in order, over cuts, restarts, kills and lost rings.
//! `overflow` goes down the whole ladder and up again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tidemark_control::agent::Rung;
use tidemark_journal::{GapReason, Seq};
use tidemark_tests::journal::{self, Logged, Replay};
use tidemark_tests::site::{Plan, Site};
use tidemark_tests::workload::history::History;
use tidemark_tests::workload::nbd::NbdDisk;
use tidemark_tests::workload::{self, Log, Operation, Shape, order};

const NODE: &str = env!("CARGO_BIN_EXE_node");
const MIB: u64 = 1 << 20;
const SIZES_BYTES: [u64; 1] = [64 * MIB];
/// Operations between two looks at the ring; some 2 MiB, which fit beside what was there at the last look.
const PART: usize = 30;

/// A ring that is soon half full, and a spool of this size.
fn plan(spool_mib: u64) -> Plan {
    let mut plan = Plan::new(&SIZES_BYTES);
    plan.ring_bytes = 32 * MIB;
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

fn load(disk: &NbdDisk, operations: &[Operation], before: Log) -> Result<Log> {
    let log = workload::go_on(before, &[disk], operations, 8, &AtomicBool::new(false));
    ensure!(log.error().is_none(), "{:?}", log.error());
    ensure!(log.entries.len() == operations.len(), "a part of the load was left out");
    Ok(log)
}

/// A load that is never faster than the spool's disk, whatever that is: it waits for room in the ring.
fn paced_load(site: &Site, disk: &NbdDisk, operations: &[Operation]) -> Result<Log> {
    let mut log = Log::default();
    for part in operations.chunks(PART) {
        log = load(disk, &operations[..log.entries.len() + part.len()], log)?;
        site.wait("room in the ring", |status| status.ring_fill_permille < 700)?;
    }
    Ok(log)
}

/// Files of the spool of the group.
fn spooled_files(site: &Site) -> usize {
    let directory = site.spool_dir().join("shop");
    std::fs::read_dir(directory).map_or(0, Iterator::count)
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
fn what_the_ring_cannot_hold_goes_through_the_spool_without_a_gap() -> Result<()> {
    let mut site = Site::started(plan(1024))?;
    site.wait_in_sync()?;
    let start = site.mark("the start")?;
    let gaps = site.status()?.gaps_total;
    let operations = shape(1, 1200).operations()?;
    let disk = site.disk(0, 1)?;
    site.network().stall(true);
    let log = paced_load(&site, &disk, &operations)?;
    let status = site.status()?;
    ensure!(status.rung == Rung::Spool && status.ladder.spool_bytes > 0, "{status:#?}");
    ensure!(spooled_files(&site) > 0, "the spool has no files");
    site.network().stall(false);
    judge_exactly(&site, &operations, &log, start)?;
    site.wait("the spool to be left", |status| {
        status.rung == Rung::Ring && status.ladder.spool_bytes == 0
    })?;
    let status = site.status()?;
    ensure!(status.gaps_total == gaps, "{status:#?}");
    ensure!(spooled_files(&site) == 0, "files of the spool are left");
    ensure!(site.stop_agent()?, "the agent did not end cleanly");
    Ok(())
}

#[test]
fn the_little_that_waits_for_a_cut_link_goes_to_the_spool_too() -> Result<()> {
    let mut site = Site::started(plan(1024))?;
    site.wait_in_sync()?;
    let start = site.mark("the start")?;
    let operations = shape(6, 20).operations()?;
    let disk = site.disk(0, 1)?;
    site.network().dead(true);
    let log = load(&disk, &operations, Log::default())?;
    site.wait("no mark for want of the target's word", |status| {
        status.rung == Rung::Spool && status.volumes.iter().all(|volume| volume.dirty_regions == 0)
    })?;
    site.network().dead(false);
    judge_exactly(&site, &operations, &log, start)?;
    site.stop_agent()?;
    Ok(())
}

#[test]
fn a_link_that_is_cut_and_comes_back_resumes_inside_the_spool() -> Result<()> {
    let mut site = Site::started(plan(1024))?;
    site.wait_in_sync()?;
    let start = site.mark("the start")?;
    let operations = shape(2, 2000).operations()?;
    let disk = site.disk(0, 1)?;
    site.network().dead(true);
    let done = AtomicBool::new(false);
    let mut spooled = false;
    let log = std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let log = paced_load(&site, &disk, &operations);
            done.store(true, Ordering::Relaxed);
            log
        });
        while !done.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(700));
            spooled |= site.status()?.rung == Rung::Spool;
            site.network().dead(false);
            std::thread::sleep(Duration::from_millis(400));
            site.network().dead(true);
        }
        load.join().map_err(|_| anyhow::anyhow!("the load panicked"))?
    })?;
    ensure!(spooled, "the spool was not used");
    site.network().dead(false);
    judge_exactly(&site, &operations, &log, start)?;
    site.stop_agent()?;
    Ok(())
}

/// An agent that is killed while frames wait in its spool: with its ring there is no gap; without it, a
/// new term begins, what is in the spool is sent first, and only what is not there is compared.
fn killed(with_ring: bool) -> Result<()> {
    let mut site = Site::new(plan(1024))?;
    if with_ring {
        site.manage_agents()?;
    }
    site.start_target()?;
    site.spawn_agent(NODE)?;
    site.wait_in_sync()?;
    let start = site.mark("the start")?;
    let first = site.status()?.position.term;
    let operations = shape(3, 1200).operations()?;
    let disk = site.disk(0, 1)?;
    site.network().dead(true);
    let log = paced_load(&site, &disk, &operations)?;
    let status = site.status()?;
    ensure!(status.rung == Rung::Spool, "{status:#?}");
    let last = status.position.seq;
    // What is in the spool is noted in the state every other second, and clears marks every five.
    site.wait("the marks of what is in the spool to go", |status| {
        status.volumes.iter().all(|volume| volume.dirty_regions < SIZES_BYTES[0] / MIB / 2)
    })?;
    site.kill_agent()?;
    drop(disk);
    site.spawn_agent(NODE)?;
    site.network().dead(false);
    if with_ring {
        judge_exactly(&site, &operations, &log, start)?;
        ensure!(site.status()?.position.term == first, "a new term was begun");
        return Ok(());
    }
    site.wait_in_sync()?;
    let status = site.status()?;
    ensure!(status.position.term != first, "no ring was left, and the term goes on");
    let mut replay = Replay::read(&site.log_dir(), &SIZES_BYTES)?;
    let gaps = replay.gaps(0).to_vec();
    let crash: Vec<_> = gaps.iter().filter(|gap| gap.reason == GapReason::Crash).collect();
    ensure!(gaps.iter().all(|gap| gap.reason != GapReason::Doubt), "{gaps:?}");
    ensure!(crash.len() <= 1, "{gaps:?}");
    // The spool's part of the first term has arrived, and its points are good.
    let mut newest = 0;
    journal::walk(&site.log_dir(), |Logged { record, .. }| {
        newest = if record.seq <= last { record.seq.0 } else { newest };
        Ok(())
    })?;
    println!("{} of {} records came out of the spool", newest - start, last.0 - start);
    ensure!(newest > start + (last.0 - start) / 2, "only up to {newest} of {last:?}");
    for seq in [start, start + (newest - start) / 2, newest] {
        let content = replay.advance(Seq(seq))?.first().context("a volume")?.clone();
        ensure!(site.read_export(&format!("/v0@seq:{seq}"))? == content, "point {seq}");
    }
    ensure!(site.read_export("/v0@latest")? == std::fs::read(site.image(0))?, "the replica");
    Ok(())
}

#[test]
fn an_agent_that_dies_goes_on_with_its_ring_and_its_spool() -> Result<()> {
    killed(true)
}

#[test]
fn without_the_ring_what_is_in_the_spool_is_sent_first() -> Result<()> {
    killed(false)
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
    let log = paced_load(&site, &disk, &operations)?;
    ensure!(site.status()?.rung == Rung::Spool, "the spool was not used");
    drop(disk);
    ensure!(!site.stop_agent()?, "it cannot have ended cleanly");
    site.spawn_agent(NODE)?;
    site.network().dead(false);
    judge_exactly(&site, &operations, &log, start)
}

#[test]
fn a_spool_that_is_taken_away_is_noticed_and_everything_compared() -> Result<()> {
    let mut site = Site::new(plan(1024))?;
    site.start_target()?;
    site.spawn_agent(NODE)?;
    site.wait_in_sync()?;
    let operations = shape(5, 1000).operations()?;
    let disk = site.disk(0, 1)?;
    site.network().dead(true);
    paced_load(&site, &disk, &operations)?;
    site.wait("the marks of what is in the spool to go", |status| {
        status.volumes.iter().all(|volume| volume.dirty_regions < SIZES_BYTES[0] / MIB / 2)
    })?;
    site.kill_agent()?;
    drop(disk);
    std::fs::remove_dir_all(site.spool_dir())?;
    site.spawn_agent(NODE)?;
    site.network().dead(false);
    site.wait_in_sync()?;
    let replay = Replay::read(&site.log_dir(), &SIZES_BYTES)?;
    let gaps = replay.gaps(0);
    ensure!(gaps.iter().any(|gap| gap.reason == GapReason::Doubt), "{gaps:?}");
    ensure!(site.read_export("/v0@latest")? == std::fs::read(site.image(0))?, "the replica");
    Ok(())
}
