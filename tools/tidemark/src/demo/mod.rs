//! `tidemark demo`: the whole way from a protected disk to two recovered moments, on this machine.
//!
//! One process, no root, no kernel module, nothing to configure: [`site`] makes a source and a
//! target in a directory, [`ledger`] is a bank that works on the protected disk, [`story`] tells
//! what happens and proves it, and [`interrupt`] has it clean up when it is ended early.

mod interrupt;
mod ledger;
mod site;
mod story;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::output::Output;

/// What the demo is asked to do.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// A disk image to work on a copy of.
    pub image: Option<PathBuf>,
    /// Leave everything running at the end.
    pub keep: bool,
}

/// Runs the demo.
///
/// # Errors
/// What went wrong; a recovery that breaks the workload's rules is an error.
pub fn run(request: &Request, output: Output) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the async runtime")?;
    story::tell(&runtime, request, output)?;
    Ok(ExitCode::SUCCESS)
}
