//! `agent run` and `target run`: either daemon in this process.

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use anyhow::Result;
use tracing_subscriber::EnvFilter;

use crate::cli::{DaemonAction, Global};
use crate::daemons::TARGET_FILE;

/// Runs the agent until it is interrupted.
pub fn agent(action: &DaemonAction, global: &Global) -> Result<ExitCode> {
    let DaemonAction::Run = action;
    log_to_stderr();
    tidemark_agent::daemon::run(&global.config_dir)?;
    Ok(ExitCode::SUCCESS)
}

/// Runs the target until it is interrupted.
pub fn target(action: &DaemonAction, global: &Global) -> Result<ExitCode> {
    let DaemonAction::Run = action;
    log_to_stderr();
    tidemark_target::daemon::run(&global.config_dir.join(TARGET_FILE))?;
    Ok(ExitCode::SUCCESS)
}

fn log_to_stderr() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .init();
}
