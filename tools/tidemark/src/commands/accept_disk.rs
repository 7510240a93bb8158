//! `accept-disk`: the group's record of its disks takes what is there, and everything is compared.

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use tidemark_agent::config::{GROUP_DIRECTORY, GroupConfig, NODE_FILE, NodeConfig};
use tidemark_agent::disks::{self, Place};
use tidemark_control::ClientError;
use tidemark_control::config::Source;

use crate::cli::{AcceptDisk, Global};
use crate::daemons;
use crate::output::Output;

#[derive(Serialize)]
struct Accepted {
    group: String,
    dry_run: bool,
    /// The volumes whose disks are accepted.
    volumes: Vec<String>,
    /// The agent took the group up; false if no agent runs.
    running: bool,
}

/// Accepts the disks of a group.
pub fn run(args: &AcceptDisk, global: &Global, output: Output) -> Result<ExitCode> {
    let group = args.scope.group.as_str();
    let file = global.config_dir.join(GROUP_DIRECTORY).join(format!("{group}.toml"));
    if !file.exists() {
        bail!("no group '{group}' is protected: there is no {}", file.display());
    }
    let config = GroupConfig::parse(&Source::read(&file)?)?;
    let node = NodeConfig::parse(&Source::read(&global.config_dir.join(NODE_FILE))?)?;
    let chosen = match &args.scope.volume {
        None => None,
        Some(name) => {
            let volume = config.volumes.iter().find(|volume| volume.name == *name);
            Some(volume.with_context(|| format!("group '{group}' has no volume '{name}'"))?.id)
        }
    };
    let agent = daemons::agent(global).client;
    let status = match agent.client().wait(agent.status()) {
        Err(ClientError::NotRunning { .. }) => None,
        status => Some(status?),
    };
    if status.iter().flat_map(|status| &status.groups).any(|running| running.name == group) {
        bail!(
            "the group '{group}' runs with the disks that it has; 'tidemark verify {group}' compares \
             them with the target"
        );
    }
    let of_them = config.volumes.iter().filter(|volume| chosen.is_none_or(|id| id == volume.id));
    let mut done = Accepted {
        group: group.to_owned(),
        dry_run: args.dry_run,
        volumes: of_them.map(|volume| volume.name.to_string()).collect(),
        running: false,
    };
    if !args.dry_run {
        let dir = node.state_of(&config.name);
        disks::accept(Place { dir: &dir, group: config.id, name: group }, chosen)?;
        if status.is_some() {
            let reloaded = agent.client().wait(agent.reload())?;
            if let Some(failure) = reloaded.failed.iter().find(|failure| failure.group == group) {
                bail!("the disks are accepted, but the agent does not start: {}", failure.error);
            }
            done.running = true;
        }
    }
    output.answer(&done, || say(&done))?;
    Ok(ExitCode::SUCCESS)
}

fn say(done: &Accepted) -> String {
    let (group, volumes) = (&done.group, done.volumes.join(", "));
    if done.dry_run {
        return format!("Would accept the disks of {volumes} of group {group} as they are.\n");
    }
    let when = if done.running { "now" } else { "when the agent is started" };
    format!(
        "The disks of {volumes} of group {group} are accepted as they are. All of them are compared with \
         the target {when}; older points stay as they are.\n"
    )
}
