//! Either side stopped, restarted or killed under load, and a network that cuts and resets: nothing is lost,
//! and nothing is compared that need not be.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tidemark_control::agent::LinkState;
use tidemark_journal::{GapReason, Kind, Seq};
use tidemark_tests::journal::{self, Logged, Replay};
use tidemark_tests::site::{Plan, Site};
use tidemark_tests::workload::history::History;
use tidemark_tests::workload::nbd::NbdDisk;
use tidemark_tests::workload::{self, Log, Operation, Shape, order};

const NODE: &str = env!("CARGO_BIN_EXE_node");
const MIB: u64 = 1 << 20;
const SIZES_BYTES: [u64; 2] = [48 * MIB, 48 * MIB];

fn plan() -> Plan {
    let mut plan = Plan::new(&SIZES_BYTES);
    plan.ring_bytes = 512 * MIB;
    plan.target_tables = "[store]\nsegment = \"16 MiB\"\n".to_owned();
    plan
}

fn shape(seed: u64, operations: usize) -> Shape {
    Shape {
        seed,
        operations,
        sizes_bytes: SIZES_BYTES.to_vec(),
        block_bytes: 4096,
        blocks_max: 8,
        zeroes_percent: 5,
        discards_percent: 5,
        flushes_percent: 5,
        hot_bytes: 2 * MIB,
    }
}

fn disks(site: &Site) -> Result<[NbdDisk; 2]> {
    Ok([site.disk(0, 1)?, site.disk(1, 1)?])
}

/// Carries out a load with pauses, so that it lasts; meanwhile `trouble` is made. All of it is acknowledged.
fn load_meanwhile(
    site: &mut Site,
    operations: &[Operation],
    trouble: impl FnOnce(&mut Site) -> Result<()>,
) -> Result<Log> {
    let disks = disks(site)?;
    let never = AtomicBool::new(false);
    let slow = disks.each_ref().map(|disk| Slow(disk, Duration::from_millis(2)));
    let log = std::thread::scope(|scope| {
        let load = scope.spawn(|| workload::run(&[&slow[0], &slow[1]], operations, 8, &never));
        let made = trouble(site);
        let log = load.join().map_err(|_| anyhow::anyhow!("the load panicked"))?;
        made.map(|()| log)
    })?;
    ensure!(log.error().is_none(), "{:?}", log.error());
    ensure!(log.entries.len() == operations.len(), "a part of the load was left out");
    Ok(log)
}

/// A disk whose user thinks for a while before each request.
struct Slow<'a>(&'a NbdDisk, Duration);

impl workload::Disk for Slow<'_> {
    fn write(&self, offset_bytes: u64, bytes: &[u8]) -> std::io::Result<()> {
        std::thread::sleep(self.1);
        self.0.write(offset_bytes, bytes)
    }
    fn zero(&self, offset_bytes: u64, length_bytes: u64) -> std::io::Result<()> {
        std::thread::sleep(self.1);
        self.0.zero(offset_bytes, length_bytes)
    }
    fn discard(&self, offset_bytes: u64, length_bytes: u64) -> std::io::Result<()> {
        std::thread::sleep(self.1);
        self.0.discard(offset_bytes, length_bytes)
    }
    fn flush(&self) -> std::io::Result<()> {
        self.0.flush()
    }
    fn read(&self, offset_bytes: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        self.0.read(offset_bytes, buffer)
    }
}

/// Waits for the replica, and proves that the journal after `start` is the load, each operation once and in
/// an order that its user could have seen, without any gap; and that the replica is the disks.
fn judge_without_gap(site: &Site, operations: &[Operation], log: &Log, start: u64) -> Result<()> {
    site.wait_in_sync()?;
    let logged = journal::of_load(&site.log_dir(), Seq(start))?;
    let records: Vec<order::Record> = logged.iter().map(|(_, record)| *record).collect();
    let parts = order::of_journal(log, &records)?;
    let model = History::of_parts(&SIZES_BYTES, operations, &parts);
    site.check_end(&model)
}

#[test]
fn a_clean_restart_of_the_agent_compares_nothing() -> Result<()> {
    let mut site = Site::started(plan())?;
    site.wait_in_sync()?;
    let start = site.mark("the start")?;
    let term = site.status()?.position.term;
    let operations = shape(1, 4000).operations()?;
    let never = AtomicBool::new(false);
    let before = disks(&site)?;
    let log = workload::run(&[&before[0], &before[1]], &operations[..2000], 16, &never);
    drop(before);
    ensure!(site.stop_agent()?, "the agent did not end cleanly");
    site.start_agent()?;
    let after = disks(&site)?;
    let log = workload::go_on(log, &[&after[0], &after[1]], &operations, 16, &never);
    ensure!(log.error().is_none(), "{:?}", log.error());
    judge_without_gap(&site, &operations, &log, start)?;
    let status = site.status()?;
    ensure!(status.position.term == term, "a new term was begun");
    // `judge_without_gap` has shown that nothing but the load is in the journal: no gap, no offer, no sync.
    Ok(())
}

#[test]
fn a_target_that_is_restarted_under_load_goes_on_where_it_was() -> Result<()> {
    let mut site = Site::started(plan())?;
    site.wait_in_sync()?;
    let start = site.mark("the start")?;
    let operations = shape(2, 8000).operations()?;
    let log = load_meanwhile(&mut site, &operations, |site| {
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(300));
            site.stop_target()?;
            std::thread::sleep(Duration::from_millis(200));
            site.start_target()?;
        }
        Ok(())
    })?;
    judge_without_gap(&site, &operations, &log, start)
}

#[test]
fn a_target_that_is_killed_under_load_goes_on_where_it_was() -> Result<()> {
    let mut site = Site::new(plan())?;
    site.spawn_target(NODE)?;
    site.start_agent()?;
    site.wait_in_sync()?;
    let start = site.mark("the start")?;
    let operations = shape(3, 8000).operations()?;
    let log = load_meanwhile(&mut site, &operations, |site| {
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(300));
            site.kill_target()?;
            std::thread::sleep(Duration::from_millis(100));
            site.spawn_target(NODE)?;
        }
        Ok(())
    })?;
    judge_without_gap(&site, &operations, &log, start)
}

#[test]
fn a_network_that_cuts_frames_costs_time_only() -> Result<()> {
    let mut site = Site::started(plan())?;
    site.wait_in_sync()?;
    let start = site.mark("the start")?;
    let operations = shape(4, 12_000).operations()?;
    let mut resets = 0;
    let log = load_meanwhile(&mut site, &operations, |site| {
        for round in 0..8u64 {
            // Odd numbers of bytes, so that headers and payloads are hit anywhere.
            site.network().reset_after(10_007 + round * 77_777);
            for _ in 0..20 {
                std::thread::sleep(Duration::from_millis(25));
                if site.network().was_reset() {
                    resets += 1;
                    break;
                }
            }
            if round % 3 == 0 {
                site.network().cut();
            }
        }
        Ok(())
    })?;
    ensure!(resets >= 2, "only {resets} connections were reset");
    judge_without_gap(&site, &operations, &log, start)
}

#[test]
fn a_network_that_corrupts_slows_down_and_forgets_costs_time_only() -> Result<()> {
    let mut site = Site::started(plan())?;
    site.wait_in_sync()?;
    let start = site.mark("the start")?;
    let operations = shape(9, 12_000).operations()?;
    let mut corrupted = 0;
    let log = load_meanwhile(&mut site, &operations, |site| {
        for round in 0..4u64 {
            site.wait("the link", |status| status.link.state == LinkState::Up)?;
            site.network().corrupt_after(20_011 + round * 33_333);
            for _ in 0..40 {
                std::thread::sleep(Duration::from_millis(25));
                if site.network().was_corrupted() {
                    corrupted += 1;
                    break;
                }
            }
        }
        site.wait("the link", |status| status.link.state == LinkState::Up)?;
        site.network().slow(Some(128 << 10));
        std::thread::sleep(Duration::from_secs(1));
        site.network().slow(None);
        // Neither end hears anything of the other any more, nor of that.
        site.network().forget();
        site.wait("the loss to be noticed", |status| status.link.state != LinkState::Up)
    })?;
    ensure!(corrupted >= 2, "only {corrupted} bytes were changed");
    judge_without_gap(&site, &operations, &log, start)
}

#[test]
fn an_agent_that_is_killed_compares_only_what_was_being_written() -> Result<()> {
    const LARGE_BYTES: u64 = 512 * MIB;
    const HOT_BYTES: u64 = 8 * MIB;
    let mut plan = Plan::new(&[LARGE_BYTES]);
    plan.ring_bytes = 128 * MIB;
    let mut site = Site::new(plan)?;
    site.start_target()?;
    site.spawn_agent(NODE)?;
    site.wait_in_sync()?;

    // Content all over the disk, flushed and final-durable, long before.
    let disk = site.disk(0, 1)?;
    let never = AtomicBool::new(false);
    let everywhere = Shape { sizes_bytes: vec![LARGE_BYTES], hot_bytes: 0, ..shape(5, 2000) };
    let log = workload::run(&[&disk], &everywhere.operations()?, 16, &never);
    ensure!(log.error().is_none(), "{:?}", log.error());
    ensure!(site_stop_and_start(&mut site)?, "the agent did not end cleanly");
    let mark = site.mark("before")?;
    let before = std::fs::read(site.image(0))?;
    site.wait_in_sync()?;
    let term = site.status()?.position.term;

    // Then one area only, and a death in the middle of it.
    let disk = site.disk(0, 1)?;
    let hot = Shape { sizes_bytes: vec![HOT_BYTES], ..shape(6, 1_000_000) };
    let operations = hot.operations()?;
    let stop = AtomicBool::new(false);
    let log = std::thread::scope(|scope| {
        let load = scope.spawn(|| workload::run(&[&disk], &operations, 8, &stop));
        std::thread::sleep(Duration::from_millis(700));
        let killed = site.kill_agent();
        stop.store(true, Ordering::Relaxed);
        let log = load.join().map_err(|_| anyhow::anyhow!("the load panicked"))?;
        killed.map(|()| log)
    })?;
    let acknowledged = log.entries.iter().filter(|entry| entry.acknowledged.is_some()).count();
    ensure!(acknowledged > 100 && log.error().is_some(), "it was not killed under load");

    site.spawn_agent(NODE)?;
    site.wait_in_sync()?;
    let status = site.status()?;
    ensure!(status.position.term != term, "there is no new term");
    let image = std::fs::read(site.image(0))?;
    ensure!(site.read_export("/v0@latest")? == image, "the replica is not the disk");
    ensure!(site.read_export(&format!("/v0@seq:{mark}"))? == before, "an old point has changed");
    ensure!(site.read_export("/v0@mark:before")? == before, "an old mark has changed");

    let replay = Replay::read(&site.log_dir(), &[LARGE_BYTES])?;
    let gap = replay.gaps(0).last().context("no gap")?;
    ensure!(gap.reason == GapReason::Crash && gap.begin.0 > mark, "{gap:?}");

    // What was compared or sent again: some of the area, and nothing else.
    let mut regions = BTreeSet::new();
    journal::walk(&site.log_dir(), |Logged { term: of, record, .. }| {
        if of == status.position.term && matches!(record.kind, Kind::Offer | Kind::Sync) {
            regions.insert(record.start.bytes() / MIB);
        }
        Ok(())
    })?;
    ensure!(!regions.is_empty(), "nothing was compared");
    let safe = regions.range(HOT_BYTES / MIB..).count();
    ensure!(safe == 0, "{safe} regions were compared that were safe");
    println!("{} of {} regions compared", regions.len(), LARGE_BYTES / MIB);
    Ok(())
}

#[test]
fn an_agent_that_is_killed_under_load_goes_on_with_its_ring() -> Result<()> {
    let mut site = Site::new(plan())?;
    site.manage_agents()?;
    site.start_target()?;
    site.spawn_agent(NODE)?;
    site.wait_in_sync()?;
    let start = site.mark("the start")?;
    let before = site.status()?;
    let operations = shape(8, 1_000_000).operations()?;
    let mut log = Log::default();
    for round in 0..4u64 {
        let disks = disks(&site)?;
        let stop = AtomicBool::new(false);
        let first = log.entries.len();
        // In every other round the target gets nothing meanwhile, and frames are kept.
        if round % 2 == 1 {
            site.network().stall(true);
        }
        let from = site.status()?.position.seq;
        log = std::thread::scope(|scope| {
            let so_far = std::mem::take(&mut log);
            let disks = [&disks[0] as &dyn workload::Disk, &disks[1]];
            let (operations, stop) = (&operations, &stop);
            let load = scope.spawn(move || workload::go_on(so_far, &disks, operations, 16, stop));
            let killed = site
                .wait("the load", |status| status.position.seq.0 > from.0 + 500)
                .and_then(|()| site.kill_agent());
            stop.store(true, Ordering::Relaxed);
            let log = load.join().map_err(|_| anyhow::anyhow!("the load panicked"))?;
            killed.map(|()| log)
        })?;
        let entries = &log.entries[first..];
        ensure!(entries.iter().any(|entry| entry.error.is_some()), "it was not killed under load");
        ensure!(site.kept()?.len() == 1, "the manager keeps {:?}", site.kept()?);
        site.network().stall(false);
        site.spawn_agent(NODE)?;
    }
    site.wait_in_sync()?;
    // The same ring after a stop in order, and after it the same order still.
    ensure!(site_stop_and_start(&mut site)?, "the agent did not end cleanly");
    let until = log.entries.len() + 500;
    let disks = disks(&site)?;
    let never = AtomicBool::new(false);
    log = workload::go_on(log, &[&disks[0], &disks[1]], &operations[..until], 8, &never);
    ensure!(log.entries[until - 500..].iter().all(|entry| entry.error.is_none()));
    let after = site.status()?;
    ensure!(after.position.term == before.position.term, "a new term was begun");
    let operations = &operations[..log.entries.len()];
    // It has the load alone, without any gap, sync or offer.
    judge_without_gap(&site, operations, &log, start)
}

#[test]
fn an_idle_agent_that_is_killed_again_and_again_compares_nothing() -> Result<()> {
    let mut site = Site::new(plan())?;
    site.start_target()?;
    site.spawn_agent(NODE)?;
    site.wait_in_sync()?;
    ensure!(site_stop_and_start(&mut site)?, "the agent did not end cleanly");
    let start = site.mark("the start")?;
    site.wait_in_sync()?;
    for _ in 0..3 {
        site.wait("the link", |status| status.link.state == LinkState::Up)?;
        // Long enough for what the agent keeps of an acknowledgement to be on its disk.
        std::thread::sleep(Duration::from_secs(3));
        site.kill_agent()?;
        site.spawn_agent(NODE)?;
    }
    let disks = disks(&site)?;
    let operations = shape(7, 500).operations()?;
    let never = AtomicBool::new(false);
    let log = workload::run(&[&disks[0], &disks[1]], &operations, 8, &never);
    judge_without_gap(&site, &operations, &log, start)
}

fn site_stop_and_start(site: &mut Site) -> Result<bool> {
    let clean = site.stop_agent()?;
    site.spawn_agent(NODE)?;
    Ok(clean)
}
