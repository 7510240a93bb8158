//! Requests that make no record cost the encoder nothing: reads, and writes while nothing is captured.

use std::fs;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use tidemark_tests::site::{Plan, Site};

const NODE: &str = env!("CARGO_BIN_EXE_node");
const SIZE_BYTES: u64 = 32 << 20;
const REQUESTS: u64 = 2000;

/// How often the encoder of the only group has gone to sleep.
fn sleeps(site: &Site) -> Result<u64> {
    let agent = site.process_ids().0.context("there is no agent")?;
    for task in fs::read_dir(format!("/proc/{agent}/task"))? {
        let task = task?.path();
        if fs::read_to_string(task.join("comm"))?.trim() == "tm-encoder" {
            let status = fs::read_to_string(task.join("status"))?;
            let sleeps =
                status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            return Ok(sleeps.context("the kernel does not count them")?.trim().parse()?);
        }
    }
    anyhow::bail!("there is no encoder")
}

/// The encoder sleeps through most of what is done, so much it looks by itself.
fn is_left_alone(site: &Site, requests: impl FnOnce(&Site) -> Result<()>) -> Result<()> {
    let before = sleeps(site)?;
    requests(site)?;
    let woken = sleeps(site)? - before;
    ensure!(woken < REQUESTS / 4, "it was woken {woken} times by {REQUESTS} requests");
    Ok(())
}

#[test]
fn reads_and_uncaptured_writes_do_not_wake_it() -> Result<()> {
    let mut site = Site::new(Plan::new(&[SIZE_BYTES]))?;
    site.start_target()?;
    site.spawn_agent(NODE)?;
    site.wait_in_sync()?;
    is_left_alone(&site, |site| {
        let disk = site.open_front(0)?;
        site.runtime().block_on(async {
            for number in 0..REQUESTS {
                disk.read(number * 4096, 4096).await?;
            }
            anyhow::Ok(())
        })
    })?;
    ensure!(site.stop_agent()?, "the agent did not end cleanly");
    site.spawn_passthrough(NODE)?;
    is_left_alone(&site, |site| {
        let disk = site.open_front(0)?;
        site.runtime().block_on(async {
            for number in 0..REQUESTS {
                disk.write(number * 4096, Bytes::from(vec![1; 4096]), false).await?;
            }
            anyhow::Ok(())
        })
    })
}
