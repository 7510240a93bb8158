//! `detach`.

use std::fmt::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;
use tidemark_agent::kernel::blockdev;
use tidemark_agent::kernel::nbd_netlink::NbdControl;
use tidemark_control::{ClientError, ErrorCode};

use super::record::{self, Record};
use crate::cli::{Detach, Global};
use crate::daemons;
use crate::output::Output;

/// How long a worker may take to end.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Serialize)]
struct Detached {
    dry_run: bool,
    devices: Vec<DetachedDevice>,
    dropped_branches: Vec<String>,
}

#[derive(Serialize)]
struct DetachedDevice {
    device: String,
    #[serde(flatten)]
    record: Record,
}

/// Takes devices away, and the branches that were made for them.
pub fn run(args: &Detach, global: &Global, output: Output) -> Result<ExitCode> {
    let all = record::all()?;
    let (chosen, others): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|(index, record)| matches(&args.what, *index, record));
    if chosen.is_empty() {
        bail!("nothing called '{}' is attached here", args.what);
    }
    for (index, _) in &chosen {
        free(&device(*index))?;
    }
    let mut branches: Vec<(String, String)> =
        chosen.iter().filter_map(|(_, record)| temporary(record)).collect();
    branches.sort();
    branches.dedup();
    branches
        .retain(|branch| others.iter().all(|(_, other)| temporary(other).as_ref() != Some(branch)));
    if !args.dry_run {
        for (index, _) in &chosen {
            disconnect(&device(*index))?;
        }
        let target = daemons::target(global).client;
        for (group, branch) in &branches {
            match target.client().wait(target.drop_branch(group, branch)) {
                // After a long time without a client the target has dropped it already.
                Err(ClientError::Api(error)) if error.code == ErrorCode::NotFound => {}
                dropped => {
                    dropped.with_context(|| {
                        format!("the devices are gone, but not their branch '{branch}'")
                    })?;
                }
            }
        }
    }
    let detached = Detached {
        dry_run: args.dry_run,
        devices: chosen
            .into_iter()
            .map(|(index, record)| DetachedDevice { device: device(index), record })
            .collect(),
        dropped_branches: branches.into_iter().map(|(_, branch)| branch).collect(),
    };
    output.answer(&detached, || say(&detached))?;
    Ok(ExitCode::SUCCESS)
}

/// The group and the name of the branch that was made for a device.
fn temporary(record: &Record) -> Option<(String, String)> {
    Some((record.group.clone(), record.temporary_branch.clone()?))
}

/// Takes a device away and waits for its worker to end.
pub fn disconnect(device: &str) -> Result<()> {
    let index: u32 = device
        .strip_prefix("/dev/nbd")
        .and_then(|number| number.parse().ok())
        .ok_or_else(|| anyhow!("{device} is no NBD device"))?;
    let mut control = NbdControl::open()?;
    if control.status(Some(index))?.iter().any(|status| status.connected) {
        control.disconnect(index)?;
    }
    let deadline = Instant::now() + PATIENCE;
    while record::exists(index) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    // Of a worker that was killed nothing else remains.
    record::remove(index);
    Ok(())
}

fn free(device: &str) -> Result<()> {
    let users = blockdev::users(Path::new(device))
        .with_context(|| format!("cannot tell who uses {device}"))?;
    match users.first() {
        None => Ok(()),
        Some(_) => {
            let users: Vec<String> = users.iter().map(ToString::to_string).collect();
            bail!("{device} is in use: {}; end that first", users.join(", "))
        }
    }
}

fn matches(what: &str, index: u32, record: &Record) -> bool {
    what == device(index)
        || what == record.group
        || what == format!("{}/{}", record.group, record.volume)
        || what == record.export
}

fn device(index: u32) -> String {
    format!("/dev/nbd{index}")
}

fn say(detached: &Detached) -> String {
    let mut out = String::new();
    let would = if detached.dry_run { "Would detach" } else { "Detached" };
    for device in &detached.devices {
        let _ = writeln!(out, "{would} {} ({})", device.device, device.record.export);
    }
    let would = if detached.dry_run { "Would drop" } else { "Dropped" };
    for branch in &detached.dropped_branches {
        let _ = writeln!(out, "{would} branch {branch} and what was written into it");
    }
    out
}
