//! `verify`.

use std::process::ExitCode;

use anyhow::Result;

use crate::cli::{Global, Verify};
use crate::daemons;
use crate::output::Output;

/// Begins to compare a group with its replica.
pub fn run(args: &Verify, global: &Global, output: Output) -> Result<ExitCode> {
    let agent = daemons::agent(global).client;
    let volume = args.scope.volume.as_ref().map(|name| name.as_str());
    let started = agent.client().wait(agent.verify(args.scope.group.as_str(), volume))?;
    output.answer(&started, || {
        format!(
            "Comparing {} of group {} with the target; 'tidemark status --watch' shows how far it \
             is.\n",
            started.volumes.join(", "),
            args.scope.group
        )
    })?;
    Ok(ExitCode::SUCCESS)
}
