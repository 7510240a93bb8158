//! Disks that are not what the agent left behind: another one in the place of the protected one, one that was
//! written past the agent, and devices that were served without capture.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;

use anyhow::{Result, bail, ensure};
use bytes::Bytes;
use tidemark_agent::disks::{self, Place};
use tidemark_journal::GapReason;
use tidemark_nbd::Zeroing;
use tidemark_tests::journal::Replay;
use tidemark_tests::site::{GROUP, Plan, Site};

const NODE: &str = env!("CARGO_BIN_EXE_node");
const MIB: u64 = 1 << 20;
const SIZE_BYTES: u64 = 32 * MIB;

fn write(site: &Site, offset_bytes: u64, byte: u8) -> Result<()> {
    let disk = site.open_front(0)?;
    site.runtime().block_on(async {
        disk.write(offset_bytes, Bytes::from(vec![byte; 8192]), false).await?;
        disk.flush().await
    })?;
    Ok(())
}

/// The replica is the disk, and an old point what it was.
fn expect_replica(site: &Site, mark: u64, old: &[u8]) -> Result<()> {
    site.wait_in_sync()?;
    let seq = site.mark("now")?;
    site.wait_in_sync()?;
    let image = fs::read(site.image(0))?;
    ensure!(site.read_export(&format!("/v0@seq:{seq}"))? == image, "the replica is not the disk");
    ensure!(site.read_export(&format!("/v0@seq:{mark}"))? == old, "an old point has changed");
    Ok(())
}

fn last_gap(site: &Site) -> Result<GapReason> {
    let replay = Replay::read(&site.log_dir(), &[SIZE_BYTES])?;
    match replay.gaps(0).last() {
        Some(gap) => Ok(gap.reason),
        None => bail!("there is no gap"),
    }
}

/// Something protected that has a mark, and what it held then.
fn begin(site: &Site) -> Result<(u64, Vec<u8>)> {
    site.wait_in_sync()?;
    write(site, 3 * MIB, 1)?;
    let mark = site.mark("before")?;
    site.wait_in_sync()?;
    Ok((mark, fs::read(site.image(0))?))
}

#[test]
fn a_disk_that_was_written_while_no_agent_ran_is_compared() -> Result<()> {
    let mut site = Site::started(Plan::new(&[SIZE_BYTES]))?;
    let (mark, old) = begin(&site)?;
    ensure!(site.stop_agent()?, "the agent did not end cleanly");
    // Somewhere that no sample is taken from: its time of modification tells.
    File::options().write(true).open(site.image(0))?.write_all_at(b"past the agent", 20 * MIB)?;
    site.start_agent()?;
    site.wait_in_sync()?;
    expect_replica(&site, mark, &old)?;
    ensure!(last_gap(&site)? == GapReason::Doubt, "it was not noticed");
    // And once noticed it is over.
    ensure!(site.stop_agent()?, "the agent did not end cleanly");
    let term = site_term(&mut site)?;
    ensure!(site.stop_agent()? && site_term(&mut site)? == term, "there was another comparison");
    Ok(())
}

fn site_term(site: &mut Site) -> Result<tidemark_journal::TermId> {
    site.start_agent()?;
    site.wait_in_sync()?;
    Ok(site.status()?.position.term)
}

#[test]
fn another_disk_is_refused_before_the_ring_writes_to_it_and_can_be_accepted() -> Result<()> {
    let mut site = Site::new(Plan::new(&[SIZE_BYTES]))?;
    site.manage_agents()?;
    site.start_target()?;
    site.spawn_agent(NODE)?;
    let (mark, old) = begin(&site)?;
    // Its ring is left behind, with writes that the target has not got.
    site.network().stall(true);
    write(&site, 9 * MIB, 2)?;
    site.kill_agent()?;
    site.network().stall(false);
    ensure!(site.kept()?.len() == 1, "no ring was left behind");
    let stranger = site.dir().join("stranger.img");
    File::create(&stranger)?.set_len(SIZE_BYTES)?;
    OpenOptions::new().write(true).open(&stranger)?.write_all_at(&[9; 4096], 7 * MIB)?;
    fs::rename(site.image(0), site.dir().join("right.img"))?;
    fs::rename(&stranger, site.image(0))?;
    let before = fs::read(site.image(0))?;
    for _ in 0..2 {
        ensure!(site.spawn_agent(NODE).is_err(), "another disk is protected");
        ensure!(fs::read(site.image(0))? == before, "the other disk was written to");
    }
    ensure!(site.read_export(&format!("/v0@seq:{mark}"))? == old, "an old point has changed");
    let dir = site.dir().join(format!("state/{GROUP}"));
    disks::accept(Place { dir: &dir, group: site.group_id(), name: GROUP }, None)?;
    site.spawn_agent(NODE)?;
    site.wait_in_sync()?;
    ensure!(fs::read(site.image(0))? == before, "the accepted disk was written to");
    expect_replica(&site, mark, &old)?;
    ensure!(last_gap(&site)? == GapReason::Doubt, "it was not compared");
    Ok(())
}

#[test]
fn the_right_disk_put_back_goes_on_with_its_ring() -> Result<()> {
    let mut site = Site::new(Plan::new(&[SIZE_BYTES]))?;
    site.manage_agents()?;
    site.start_target()?;
    site.spawn_agent(NODE)?;
    let (mark, old) = begin(&site)?;
    let term = site.status()?.position.term;
    site.kill_agent()?;
    let aside = site.dir().join("aside.img");
    fs::rename(site.image(0), &aside)?;
    File::create(site.image(0))?.set_len(SIZE_BYTES)?;
    ensure!(site.spawn_agent(NODE).is_err(), "another disk is protected");
    fs::rename(&aside, site.image(0))?;
    site.spawn_agent(NODE)?;
    expect_replica(&site, mark, &old)?;
    ensure!(site.status()?.position.term == term, "the ring was given up");
    Ok(())
}

#[test]
fn without_capture_the_application_goes_on_and_everything_is_compared_afterwards() -> Result<()> {
    let mut plan = Plan::new(&[SIZE_BYTES]);
    // The comparison lasts long enough to be looked at.
    plan.group_lines = "catch_up_bytes_per_s = \"8 MiB\"".into();
    let mut site = Site::new(plan)?;
    site.manage_agents()?;
    site.start_target()?;
    site.spawn_agent(NODE)?;
    let (mark, old) = begin(&site)?;
    write(&site, 5 * MIB, 2)?;
    site.kill_agent()?;
    for round in 0..2u8 {
        site.spawn_passthrough(NODE)?;
        let disk = site.open_front(0)?;
        let read = site.runtime().block_on(disk.read(5 * MIB, 8192))?;
        ensure!(read[..] == [2 + round; 8192], "it does not serve what is on the disk");
        let holes = Zeroing { fua: false, no_hole: false, fast_only: false };
        site.runtime().block_on(async {
            disk.write_zeroes(11 * MIB, (4 * MIB) as u32, holes).await?;
            disk.write(5 * MIB, Bytes::from(vec![3 + round; 8192]), true).await?;
            disk.write(26 * MIB + 512, Bytes::from(vec![7; 512]), false).await?;
            disk.flush().await
        })?;
        drop(disk);
        if round == 0 {
            ensure!(site.stop_agent()?, "it did not end in order");
        } else {
            site.kill_agent()?;
        }
        ensure!(site.kept()?.len() == 1, "the ring of the agent before is gone");
    }
    // The manager hands over the ring of the agent before, which knows nothing of all that.
    site.spawn_agent(NODE)?;
    site.wait("the reason", |status| status.doubt.is_some())?;
    site.kill_agent()?;
    site.spawn_agent(NODE)?;
    site.wait("the reason after another start", |status| status.doubt.is_some())?;
    expect_replica(&site, mark, &old)?;
    ensure!(last_gap(&site)? == GapReason::Doubt, "it was not compared");
    let image = fs::read(site.image(0))?;
    ensure!(image[5 << 20] == 4 && image[(26 << 20) + 512] == 7, "a write was lost");
    ensure!(site.status()?.doubt.is_none(), "the doubt is over");
    Ok(())
}
