//! On this machine, everything native: sockets, files, TLS.

pub mod ingest;
mod peers;
pub mod writes;

use anyhow::{Context, Result};

/// The program of a side in a process of its own, which lies beside this one.
fn node() -> Result<String> {
    let path = std::env::current_exe()?.with_file_name("node");
    path.to_str().map(str::to_owned).context("a path that is no text")
}
