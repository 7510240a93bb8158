//! `mark`.

use std::process::ExitCode;

use anyhow::Result;

use crate::cli::{Global, Mark};
use crate::output::Output;
use crate::{daemons, words};

/// Names the present moment of a group.
pub fn run(args: &Mark, global: &Global, output: Output) -> Result<ExitCode> {
    let agent = daemons::agent(global).client;
    let marked = agent.client().wait(agent.mark(args.group.as_str(), &args.name))?;
    output.answer(&marked, || {
        format!(
            "{group}@mark:{name} is the state at {time} (@seq:{seq}).\n",
            group = args.group,
            name = args.name,
            time = words::time_before(marked.wall_ns),
            seq = marked.position.seq,
        )
    })?;
    Ok(ExitCode::SUCCESS)
}
