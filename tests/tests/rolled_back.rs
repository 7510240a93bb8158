//! One side's memory restored from an earlier time: it is noticed, everything is compared, and then it goes on.

use std::{path::Path, process::Command, time::Duration};

use anyhow::{Result, ensure};
use bytes::Bytes;
use tidemark_tests::site::{Plan, Site};

const SIZE: u64 = 24 << 20;

fn copy(from: &Path, to: &Path) -> Result<()> {
    if to.exists() {
        std::fs::remove_dir_all(to)?;
    }
    let copied = Command::new("cp").args(["-a", "--sparse=always"]).arg(from).arg(to).status()?;
    ensure!(copied.success(), "cp failed");
    Ok(())
}

/// Writes to every other megabyte, each time something else.
fn write(site: &Site, byte: u8) -> Result<()> {
    let disk = site.open_front(0)?;
    site.runtime().block_on(async {
        for at in (0..SIZE).step_by(2 << 20) {
            disk.write(at, Bytes::from(vec![byte; 12288]), false).await?;
        }
        disk.flush().await
    })?;
    Ok(())
}

/// The replica equals the disk, now and after further writes; few terms were made on the way.
fn judge(site: &Site, byte: u8) -> Result<()> {
    site.wait_in_sync()?;
    write(site, byte)?;
    site.wait_in_sync()?;
    let seq = site.mark("after")?;
    site.wait_in_sync()?;
    let replica = site.read_export(&format!("/v0@seq:{seq}"))?;
    ensure!(replica == std::fs::read(site.image(0))?, "the replica differs from the disk");
    let terms = std::fs::read_to_string(site.dir().join("state/shop/terms.json"))?;
    // Its checksum follows in a line of its own.
    let terms = terms.lines().next().unwrap_or_default();
    let terms: Vec<serde_json::Value> = serde_json::from_str(terms)?;
    ensure!(terms.len() <= 4, "a doubt made {} terms", terms.len());
    Ok(())
}

#[test]
fn a_target_from_an_earlier_time_is_compared_and_goes_on() -> Result<()> {
    let mut site = Site::started(Plan::new(&[SIZE]))?;
    site.wait_in_sync()?;
    write(&site, 1)?;
    site.wait_in_sync()?;
    site.stop_target()?;
    let (now, then) = (site.dir().join("target"), site.dir().join("target-then"));
    copy(&now, &then)?;
    site.start_target()?;
    write(&site, 2)?;
    site.wait_in_sync()?;
    // The source writes down what was acknowledged every few seconds; here it remembers by itself.
    site.stop_target()?;
    copy(&then, &now)?;
    site.start_target()?;
    judge(&site, 3)
}

#[test]
fn a_source_whose_state_is_from_an_earlier_time_is_compared_and_goes_on() -> Result<()> {
    let mut site = Site::started(Plan::new(&[SIZE]))?;
    site.wait_in_sync()?;
    write(&site, 1)?;
    site.wait_in_sync()?;
    site.stop_agent()?;
    let (now, then) = (site.dir().join("state"), site.dir().join("state-then"));
    copy(&now, &then)?;
    site.start_agent()?;
    // The second time the replica ends in a term that was begun by the first.
    for byte in [2, 4] {
        write(&site, byte)?;
        site.wait_in_sync()?;
        // Long enough for the state to be written and told in a heartbeat.
        std::thread::sleep(Duration::from_secs(4));
        site.stop_agent()?;
        copy(&then, &now)?;
        site.start_agent()?;
        judge(&site, byte + 1)?;
    }
    Ok(())
}
