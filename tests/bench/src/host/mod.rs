//! On this machine, everything native: sockets, files, TLS.

pub mod growth;
pub mod ingest;
pub mod initial_sync;
pub mod instructions;
pub mod lag;
mod load;
mod peers;
pub mod writes;

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tidemark_tests::site::Site;

/// How long the sync of the largest disks may take.
const SYNC_MAX: Duration = Duration::from_secs(6 * 3600);

/// The program of a side in a process of its own, which lies beside this one.
fn node() -> Result<String> {
    let path = std::env::current_exe()?.with_file_name("node");
    path.to_str().map(str::to_owned).context("a path that is no text")
}

/// Waits until the replica is in sync, longer than a test would.
fn wait_in_sync(site: &Site) -> Result<()> {
    let start = Instant::now();
    while let Err(error) = site.wait_in_sync() {
        site.status().context("the agent is gone")?;
        if start.elapsed() > SYNC_MAX {
            return Err(error);
        }
    }
    Ok(())
}
