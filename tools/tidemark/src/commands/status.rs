//! `status`.

use std::fmt::Write as _;
use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, anyhow};
use serde::Serialize;
use tidemark_control::ClientError;
use tidemark_control::agent::AgentStatus;
use tidemark_control::target::TargetStatus;

use crate::cli::{Global, Status};
use crate::output::{self, Output};
use crate::{daemons, words};

mod tree;

#[cfg(test)]
pub use tree::tests;
pub use tree::{real_lag_ns, zero_loss};

/// What the daemons of this machine say.
#[derive(Serialize)]
struct Seen {
    /// None if this machine has no agent, or it does not answer.
    agent: Option<AgentStatus>,
    /// None if this machine has no target, or it does not answer.
    target: Option<TargetStatus>,
    /// Daemons that should answer and do not: a sentence each.
    missing: Vec<String>,
}

/// Shows what the daemons do, once or again and again.
pub fn run(args: &Status, global: &Global, output: Output) -> Result<ExitCode> {
    if !args.watch {
        let seen = look(global)?;
        output.answer(&seen, || show(&seen))?;
        let idle = seen.agent.as_ref().is_some_and(|agent| !agent.unprotected.is_empty());
        return Ok(if seen.missing.is_empty() && !idle {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        });
    }
    let screen = !output.is_json() && io::stdout().is_terminal();
    loop {
        let seen = look(global)?;
        if screen {
            // Home, the picture with each line's rest erased, then everything below it.
            let picture = show(&seen).replace('\n', "\x1b[K\n");
            output::print(&format!("\x1b[H{picture}\x1b[J"))?;
        } else {
            output.answer(&seen, || show(&seen) + "\n")?;
        }
        std::thread::sleep(Duration::from_secs(args.interval.into()));
    }
}

fn look(global: &Global) -> Result<Seen> {
    let (agent, target) = (daemons::agent(global), daemons::target(global));
    let mut missing = Vec::new();
    let agent_status = agent.client.client().wait(agent.client.status());
    let target_status = target.client.client().wait(target.client.status());
    let seen = Seen {
        agent: present(agent_status, agent.expected, &mut missing)?,
        target: present(target_status, target.expected, &mut missing)?,
        missing,
    };
    match &seen {
        Seen { agent: None, target: None, missing } if missing.is_empty() => Err(anyhow!(
            "neither an agent nor a target is configured in {} or running on this machine",
            global.config_dir.display()
        )),
        _ => Ok(seen),
    }
}

/// The answer, or nothing from a daemon that does not run.
fn present<T>(
    answer: Result<T, ClientError>,
    expected: bool,
    missing: &mut Vec<String>,
) -> Result<Option<T>> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(error @ ClientError::NotRunning { .. }) => {
            if expected {
                missing.push(error.to_string());
            }
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

fn show(seen: &Seen) -> String {
    let mut out = String::new();
    let now = words::now_ns();
    if let Some(agent) = &seen.agent {
        tree::agent(&mut out, agent, now);
    }
    if let Some(target) = &seen.target {
        tree::target(&mut out, target, now);
    }
    for sentence in &seen.missing {
        let _ = writeln!(out, "{sentence}");
    }
    out
}
