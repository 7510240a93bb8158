//! What both examples do.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use tidemark_agent::kernel::blockdev::{Backing, BackingError};

/// How long the kernel, and a process that ends, are waited for.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A process that died may still have its last writes under way.
pub fn claim(path: &Path) -> Result<Backing> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match Backing::claim(path) {
            Err(BackingError::InUse { .. }) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            claimed => return Ok(claimed?),
        }
    }
}
