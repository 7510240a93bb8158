//! Verifies: what they find is mended and told, they begin by themselves, and a restart of either side does not begin
//! them anew.

use std::fs;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tidemark_agent::api::Control;
use tidemark_journal::Kind;
use tidemark_tests::journal;
use tidemark_tests::site::{GROUP, Plan, Site};

const NODE: &str = env!("CARGO_BIN_EXE_node");
const MIB: u64 = 1 << 20;
const SIZE_BYTES: u64 = 48 * MIB;

fn plan(lines: &str) -> Plan {
    let mut plan = Plan::new(&[SIZE_BYTES]);
    plan.group_lines = lines.to_owned();
    plan
}

/// Content on the first half of the disk, known to the target.
fn fill(site: &Site) -> Result<()> {
    let disk = site.open_front(0)?;
    site.runtime().block_on(async {
        for at in (0..SIZE_BYTES / 2).step_by(MIB as usize) {
            let byte = 1 + u8::try_from(at / MIB).unwrap_or(0);
            disk.write(at, vec![byte; 64 << 10].into(), false).await?;
        }
        disk.flush().await
    })?;
    site.wait_in_sync()
}

/// Changes the disk behind the agent's back, once in content and once in zeros.
fn rot(site: &Site) -> Result<()> {
    let image = fs::OpenOptions::new().write(true).open(site.image(0))?;
    image.write_all_at(&[0x77; 4096], 5 * MIB + 4096)?;
    image.write_all_at(&vec![0; 64 << 10], 9 * MIB)?;
    image.sync_all()?;
    Ok(())
}

fn expect_found(site: &Site, bytes: u64) -> Result<()> {
    site.wait("the verify", |status| status.verified.ended_wall_ns.is_some())?;
    let found = site.status()?.verified;
    ensure!(found.differing_bytes == bytes, "{found:?}");
    expect_synced(site)
}

#[test]
fn a_verify_finds_and_mends_what_differs_and_says_so() -> Result<()> {
    let mut site = Site::started(plan(""))?;
    fill(&site)?;
    rot(&site)?;
    site.runtime().block_on(site.agent()?.verify(GROUP, None))?;
    // One block of content, and sixteen of zeros where the target has other content.
    expect_found(&site, 17 * 4096)?;
    // It is remembered.
    ensure!(site.stop_agent()?, "the agent did not end cleanly");
    site.start_agent()?;
    ensure!(site.status()?.verified.differing_bytes == 17 * 4096, "{:?}", site.status()?.verified);
    Ok(())
}

#[test]
fn a_schedule_begins_a_verify() -> Result<()> {
    let site = Site::started(plan("verify.every = \"2 s\""))?;
    fill(&site)?;
    let due = site.status()?.verified.due_wall_ns.context("nothing is due")?;
    site.wait("the verify", |status| status.verified.begun_wall_ns.is_some_and(|at| at >= due))?;
    let first = site.status()?.verified;
    site.wait("another", |status| status.verified.begun_wall_ns > first.ended_wall_ns)
}

#[test]
fn a_verify_goes_on_after_a_restart_of_either_side() -> Result<()> {
    // Four regions a second.
    let mut site = Site::started(plan(""))?;
    fill(&site)?;
    ensure!(site.stop_agent()?, "the agent did not end cleanly");
    site.plan_mut().group_lines = "catch_up_bytes_per_s = \"4 MiB\"".to_owned();
    site.start_agent()?;
    site.runtime().block_on(site.agent()?.verify(GROUP, None))?;
    let done = |status: &tidemark_control::agent::GroupStatus| {
        status.volumes[0].verify.map_or(0, |progress| progress.done_regions)
    };
    site.wait("a part of it", |status| done(status) >= 12)?;
    // The target's restart costs what was under way.
    site.stop_target()?;
    std::thread::sleep(Duration::from_millis(200));
    site.start_target()?;
    let before = done(&site.status()?);
    ensure!((12..48).contains(&before), "{before}");
    site.stop_agent()?;
    site.start_agent()?;
    site.wait("the verify", |status| status.volumes[0].verify.is_some())?;
    let after = done(&site.status()?);
    ensure!(after + 8 >= before, "it had compared {before} regions, and is at {after} now");
    expect_found(&site, 0)?;
    // Every region of content was offered at least once, and only few of them twice.
    let mut offers = 0;
    journal::walk(&site.log_dir(), |logged| {
        offers += u64::from(logged.record.kind == Kind::Offer);
        Ok(())
    })?;
    ensure!((48..48 + 24).contains(&offers), "{offers} offers");
    Ok(())
}

/// A site whose disk of so many regions holds something in each, before the first sync.
fn unsynced(regions: u64, catch_up_bytes_per_s: &str) -> Result<Site> {
    let mut plan = Plan::new(&[regions * MIB]);
    plan.group_lines = format!("catch_up_bytes_per_s = \"{catch_up_bytes_per_s}\"");
    let site = Site::new(plan)?;
    let image = fs::OpenOptions::new().write(true).open(site.image(0))?;
    for region in 0..regions {
        image.write_all_at(&[0x33; 8192], region * MIB)?;
    }
    Ok(site)
}

/// Regions read since the agent's start, with what was read of them once more because the target lacked it.
fn compared_regions(site: &Site) -> Result<u64> {
    Ok(site.status()?.compared_bytes_total.div_ceil(MIB + 8192))
}

fn expect_synced(site: &Site) -> Result<()> {
    site.wait_in_sync()?;
    let seq = site.mark("after")?;
    site.wait_in_sync()?;
    let replica = site.read_export(&format!("/v0@seq:{seq}"))?;
    ensure!(replica == fs::read(site.image(0))?, "the replica differs from the disk");
    Ok(())
}

/// Regions that may be read once more than needed: those whose reads or records a restart interrupts.
const UNDER_WAY: u64 = 8;

#[test]
fn a_first_sync_ends_in_spite_of_restarts_of_either_side() -> Result<()> {
    let mut site = unsynced(48, "4 MiB")?;
    site.start_target()?;
    site.start_agent()?;
    site.wait("a part of it", |status| status.volumes[0].uncaptured_regions <= 24)?;
    site.stop_target()?;
    site.start_target()?;
    site.wait("more of it", |status| status.volumes[0].uncaptured_regions <= 12)?;
    let compared = compared_regions(&site)?;
    ensure!(compared <= 36 + 2 * UNDER_WAY, "{compared} regions after the target's restart");
    let left = site.status()?.volumes[0].uncaptured_regions;
    site.stop_agent()?;
    site.start_agent()?;
    expect_synced(&site)?;
    let compared = compared_regions(&site)?;
    ensure!(compared <= left + UNDER_WAY, "{compared} regions were compared, and {left} were left");
    Ok(())
}

/// What was sent, and known to be final-durable, more than ten seconds before is not compared again, though the
/// ring is gone.
#[test]
fn a_first_sync_whose_agent_is_killed_goes_on_near_where_it_was() -> Result<()> {
    let mut site = unsynced(160, "8 MiB")?;
    site.start_target()?;
    site.spawn_agent(NODE)?;
    site.wait("most of it", |status| status.volumes[0].uncaptured_regions <= 24)?;
    let left = site.status()?.volumes[0].uncaptured_regions;
    site.kill_agent()?;
    site.spawn_agent(NODE)?;
    expect_synced(&site)?;
    let compared = compared_regions(&site)?;
    println!("{compared} regions were compared, and {left} were left");
    ensure!(compared <= left + 10 * 8 + UNDER_WAY, "{compared} regions, and {left} were left");
    Ok(())
}
