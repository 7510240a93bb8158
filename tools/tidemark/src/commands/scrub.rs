//! `scrub`.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, anyhow};
use tidemark_control::target::{ReplicaStatus, ScrubStatus};

use crate::cli::{Global, Scrub};
use crate::output::Output;
use crate::{daemons, words};

/// How often the target is asked how far it is.
const STEP: Duration = Duration::from_secs(1);

/// Has a group's replica read and checked.
pub fn run(args: &Scrub, global: &Global, output: Output) -> Result<ExitCode> {
    let target = daemons::target(global).client;
    let group = args.group.as_str();
    let look = || -> Result<ReplicaStatus> {
        let status = target.client().wait(target.status())?;
        let found = status.groups.into_iter().find(|found| found.name == group);
        found.ok_or_else(|| anyhow!("the target has no group '{group}' any more"))
    };
    let before = look().ok().map(|status| status.scrub.finished_wall_ns);
    let started = target.client().wait(target.scrub(group))?;
    if !args.wait {
        output.answer(&started, || {
            format!("Checking {}; 'tidemark status --watch' shows how far it is.\n", args.group)
        })?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut told = Duration::ZERO;
    let ended = loop {
        let status = look()?;
        if !status.scrub.running && Some(status.scrub.finished_wall_ns) != before {
            break status;
        }
        if !output.is_json() && told.as_secs().is_multiple_of(60) {
            eprintln!("{}", progress(&status.scrub));
        }
        std::thread::sleep(STEP);
        told += STEP;
    };
    let whole = ended.scrub.finished_found == 0 && ended.damage.is_empty();
    output.answer(&ended, || {
        let mut out = words::count(ended.scrub.finished_found as usize, "damaged place");
        out.push_str(" found.\n");
        for damage in &ended.damage {
            out.push_str(&format!("  {}\n", super::points::damage(&ended.name, damage)));
        }
        out
    })?;
    Ok(if whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// How far a pass is.
pub fn progress(scrub: &ScrubStatus) -> String {
    let (read, all) = (scrub.read_bytes, scrub.total_bytes.max(scrub.read_bytes));
    format!(
        "checking what is kept: {} of {}, {} found",
        words::bytes(read),
        words::bytes(all),
        words::count(scrub.found as usize, "damaged place")
    )
}
