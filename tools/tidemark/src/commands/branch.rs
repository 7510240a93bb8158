//! `branch`.

use std::fmt::Write;
use std::process::ExitCode;

use anyhow::{Result, anyhow, bail};
use tidemark_control::target::{BranchRequest, BranchStatus, Branches, TargetClient};
use tidemark_target::points::PointName;

use crate::cli::{BranchAction, Global};
use crate::output::{Output, Usage};
use crate::{daemons, words};

/// Makes, lists or drops branches.
pub fn run(action: &BranchAction, global: &Global, output: Output) -> Result<ExitCode> {
    let target = daemons::target(global).client;
    match action {
        BranchAction::Create { name, point } => {
            let point = PointName::parse(point).map_err(Usage)?;
            let request = BranchRequest {
                name: Some(name.to_string()),
                group: point.group,
                volume: point.volume,
                point: point.spec.to_string(),
                temporary: false,
            };
            let branch = target.client().wait(target.create_branch(&request))?;
            output.answer(&branch, || {
                format!(
                    "Branch {name} begins at {time}. 'tidemark attach {group}@branch:{name}' \
                     presents it.\n",
                    time = words::time_before(branch.wall_ns),
                    group = branch.group,
                )
            })?;
        }
        BranchAction::List => {
            let branches = target.client().wait(target.branches())?;
            output.answer(&branches, || show(&branches))?;
        }
        BranchAction::Drop { branch, dry_run } => {
            let branch = find(&target, branch)?;
            if !dry_run {
                target.client().wait(target.drop_branch(&branch.group, &branch.name))?;
            }
            let verb = if *dry_run { "Would drop" } else { "Dropped" };
            output.answer(&branch, || {
                format!(
                    "{verb} branch {} of group {} and the {} written into it.\n",
                    branch.name,
                    branch.group,
                    words::bytes(branch.written_bytes)
                )
            })?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The branch of this name, or of this group and name.
fn find(target: &TargetClient, wanted: &str) -> Result<BranchStatus> {
    let (group, name) = match wanted.split_once("@branch:") {
        Some((group, name)) => (Some(group), name),
        None => (None, wanted),
    };
    let Branches { branches: mut all, unread } = target.client().wait(target.branches())?;
    all.retain(|branch| branch.name == name && group.is_none_or(|group| branch.group == group));
    if all.len() > 1 {
        let names = all.iter().map(|branch| format!("{}@branch:{name}", branch.group));
        let names: Vec<String> = names.collect();
        bail!("several groups have a branch '{name}': say which of {}", names.join(", "));
    }
    let none = || match unread.first() {
        Some(why) => anyhow!("no branch '{wanted}' is known: {why}"),
        None => anyhow!("there is no branch '{wanted}'; 'tidemark branch list' shows all"),
    };
    all.pop().ok_or_else(none)
}

fn show(branches: &Branches) -> String {
    let mut out = String::new();
    for why in &branches.unread {
        let _ = writeln!(out, "{why}");
    }
    if branches.branches.is_empty() && branches.unread.is_empty() {
        out.push_str("There are no branches.\n");
    }
    for branch in &branches.branches {
        let _ = write!(
            out,
            "{}  of {} at {}, {} written",
            branch.name,
            branch.group,
            words::time_before(branch.wall_ns),
            words::bytes(branch.written_bytes)
        );
        if branch.temporary {
            out.push_str(", temporary");
        }
        if branch.clients > 0 {
            let _ = write!(out, ", {}", words::count(branch.clients as usize, "client"));
        }
        if let Some(problem) = &branch.problem {
            let _ = write!(out, "\n  {problem}");
        }
        if let Some(damage) = &branch.damage {
            let _ = write!(out, "\n  damaged: {damage} cannot be read");
        }
        out.push('\n');
    }
    out
}
