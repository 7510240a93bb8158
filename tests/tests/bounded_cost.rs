//! What a power cut of the source costs: no more is read than the active regions and the dirty ones that the durable
//! spool does not cover, and no more is sent than twice what was not final-durable, and hashes.
//!
//! By default the volume has 16 GiB; `TIDEMARK_COST_FULL=1` makes it 1 TiB. Writes of 4 KiB, each into a region of its
//! own: first into many more than can be active, all of which become final-durable and clean; then, over a dead link,
//! into others, until the spool has them and that is durably noted; then into some more, and at once the agent is
//! killed and its ring is gone. (That a cut may also lose or tear what was not flushed is another test's matter.)
//!
//! The bounds, in what the test itself knows. Read: as many regions as may be active and as were written after the spool
//! was last known to have everything; and of these once more the blocks that the target asks for. Sent, as the network
//! counts it with TLS, frames and heartbeats: twice the bytes of the writes that were not final-durable, and 16 bytes
//! for each 4 KiB that was read.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use tidemark_agent::dirty::active::SLOTS;
use tidemark_control::agent::Rung;
use tidemark_tests::site::{Plan, Site};
use tidemark_tests::workload::content;
use tidemark_tests::workload::rng::Rng;

const NODE: &str = env!("CARGO_BIN_EXE_node");
const MIB: u64 = 1 << 20;
const BLOCK_BYTES: u64 = 4096;
const DEPTH: usize = 128;
/// Places that are looked at in the replica, of the first writes and of the last.
const SAMPLE: usize = 500;

/// A size, and how many regions are written in each of the three parts.
struct Scale {
    size_bytes: u64,
    clean: usize,
    spooled: usize,
    uncovered: usize,
}

const SHORT: Scale = Scale { size_bytes: 16 << 30, clean: 16384, spooled: 8000, uncovered: 5000 };
const FULL: Scale = Scale { size_bytes: 1 << 40, clean: 200_000, spooled: 20_000, uncovered: 6000 };

/// A write's number and its place.
type Write = (usize, u64);

/// Places for so many writes, no two in one region, each in a block that no write was to yet.
fn scatter(rng: &mut Rng, size_bytes: u64, count: usize, taken: &mut HashSet<u64>) -> Vec<Write> {
    let mut regions = HashSet::new();
    let mut writes = Vec::new();
    while writes.len() < count {
        let region = rng.below(size_bytes / MIB);
        let place = region * MIB + rng.below(MIB / BLOCK_BYTES) * BLOCK_BYTES;
        if regions.insert(region) && taken.insert(place) {
            writes.push((taken.len(), place));
        }
    }
    writes
}

fn block((number, place): Write) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK_BYTES as usize];
    content::fill(number, place, &mut bytes);
    bytes
}

fn write(site: &Site, writes: &[Write]) -> Result<()> {
    let front = site.open_front(0)?;
    site.runtime().block_on(async {
        let mut under_way = tokio::task::JoinSet::new();
        for write in writes.iter().copied() {
            let front = front.clone();
            let bytes = Bytes::from(block(write));
            under_way.spawn(async move { front.write(write.1, bytes, false).await });
            if under_way.len() >= DEPTH {
                under_way.join_next().await.context("a write under way")???;
            }
        }
        while let Some(done) = under_way.join_next().await {
            done??;
        }
        anyhow::Ok(())
    })
}

/// Waits as long as it takes, for what takes longer than a test waits otherwise.
fn wait_in_sync(site: &Site, start: Instant) -> Result<()> {
    while site.wait_in_sync().is_err() {
        ensure!(start.elapsed() < Duration::from_secs(2 * 3600), "{:#?}", site.status()?);
    }
    Ok(())
}

#[test]
fn a_power_cut_costs_what_was_not_safe_and_no_more() -> Result<()> {
    let full = std::env::var_os("TIDEMARK_COST_FULL").is_some();
    let Scale { size_bytes, clean, spooled, uncovered } = if full { FULL } else { SHORT };
    let (mut rng, mut taken) = (Rng::new(11), HashSet::new());
    let clean = scatter(&mut rng, size_bytes, clean, &mut taken);
    let spooled = scatter(&mut rng, size_bytes, spooled, &mut taken);
    let uncovered = scatter(&mut rng, size_bytes, uncovered, &mut taken);

    let mut plan = Plan::new(&[size_bytes]);
    plan.compression = "off";
    plan.ring_bytes = 256 * MIB;
    plan.spool_bytes_max = Some(1024 * MIB);
    let mut site = Site::new(plan)?;
    site.start_target()?;
    site.spawn_agent(NODE)?;
    let start = Instant::now();
    wait_in_sync(&site, start)?;
    let synced = start.elapsed();
    write(&site, &clean)?;
    let none_dirty = |status: &tidemark_control::agent::GroupStatus| {
        status.volumes.iter().all(|volume| volume.dirty_regions == 0)
    };
    wait_in_sync(&site, start)?;
    site.wait("the marks to go", none_dirty)?;
    site.network().dead(true);
    write(&site, &spooled)?;
    site.wait("no mark for want of the target's word", |status| {
        status.rung == Rung::Spool && none_dirty(status)
    })?;
    ensure!(site.status()?.gaps_total == 0, "the ring was to hold it");
    write(&site, &uncovered)?;
    let before = site.status()?;
    site.kill_agent()?;
    site.spawn_agent(NODE)?;
    let sent_before = site.network().forwarded_bytes();
    let restart = Instant::now();
    site.network().dead(false);
    wait_in_sync(&site, start)?;
    let (read, sent) =
        (site.status()?.compared_bytes_total, site.network().forwarded_bytes() - sent_before);

    let uncovered_bytes = uncovered.len() as u64 * BLOCK_BYTES;
    let not_durable = spooled.len() as u64 * BLOCK_BYTES + uncovered_bytes;
    let hashes = read / BLOCK_BYTES * 16;
    let read_max = (SLOTS + uncovered.len()) as u64 * MIB + uncovered_bytes;
    let mib = |bytes: u64| bytes as f64 / MIB as f64;
    let volume = &before.volumes[0];
    println!(
        "{} GiB, synced in {:.0} s; {} writes final-durable, {} in the spool, {} not covered; at the cut {} regions \
         active and {} dirty; in sync again after {:.1} s: {:.0} MiB read of {:.0} at most, {:.1} MiB sent of {:.1} at \
         most ({:.1} MiB were not final-durable, {:.1} MiB of hashes)",
        size_bytes >> 30,
        synced.as_secs_f64(),
        clean.len(),
        spooled.len(),
        uncovered.len(),
        volume.active_regions,
        volume.dirty_regions,
        restart.elapsed().as_secs_f64(),
        mib(read),
        mib(read_max),
        mib(sent),
        mib(2 * not_durable + hashes),
        mib(not_durable),
        mib(hashes),
    );
    ensure!(read >= uncovered.len() as u64 * MIB, "what was written last was not compared");
    ensure!(read <= read_max, "{read} bytes read, {read_max} at most");
    ensure!(sent <= 2 * not_durable + hashes, "{sent} bytes sent");

    let export = site.open_export("/v0@latest")?;
    let last = clean.iter().chain(&spooled).chain(&uncovered).rev().take(SAMPLE);
    let first = clean.iter().take(SAMPLE);
    for write in last.chain(first).copied() {
        let content = site.read(&export, write.1, BLOCK_BYTES)?;
        ensure!(content == block(write), "write {} is not in the replica", write.0);
    }
    Ok(())
}
