//! `mark`.

use std::process::ExitCode;
use std::thread::sleep;
use std::time::Duration;

use anyhow::Result;
use tidemark_control::ClientError;
use tidemark_control::agent::{AgentClient, LinkState, Marked};

use crate::cli::{Global, Mark};
use crate::output::Output;
use crate::{daemons, words};

/// How often it is looked whether the target has the mark, and how long between two looks.
const LOOKS: u32 = 20;
const PAUSE: Duration = Duration::from_millis(100);

/// Names the present moment of a group.
pub fn run(args: &Mark, global: &Global, output: Output) -> Result<ExitCode> {
    let agent = daemons::agent(global).client;
    let group = args.group.as_str();
    let mut marked = agent.client().wait(agent.mark(group, &args.name))?;
    // The mark is made whatever becomes of this.
    let _ = follow(&agent, group, &mut marked);
    output.answer(&marked, || {
        let at_target = match marked.durable_seq >= marked.position.seq {
            true => " The target has it.".to_owned(),
            false => {
                format!("\nThe target does not have it yet: it is at @seq:{}.", marked.durable_seq)
            }
        };
        format!(
            "{group}@mark:{name} is the state at {time} (@seq:{seq}).{at_target}\n",
            name = args.name,
            time = words::time_before(marked.wall_ns),
            seq = marked.position.seq,
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Looks for a moment whether the target gets it, as it does at once while it keeps up.
fn follow(agent: &AgentClient, group: &str, marked: &mut Marked) -> Result<(), ClientError> {
    for look in 0..LOOKS {
        let status = agent.client().wait(agent.status())?;
        let found = status.groups.into_iter().find(|found| found.name == group);
        let Some(found) = found.filter(|found| found.position.term == marked.position.term) else {
            break;
        };
        marked.durable_seq = found.durable_seq;
        let arrived = marked.durable_seq >= marked.position.seq;
        if arrived || found.link.state != LinkState::Up || look + 1 == LOOKS {
            break;
        }
        sleep(PAUSE);
    }
    Ok(())
}
