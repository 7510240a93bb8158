//! `attach` and `detach`: points as block devices of this machine.
//!
//! The kernel's NBD client speaks neither the handshake nor TLS. So each device has a
//! [`worker`] process of its own: it connects to the target, enters the export, gives the kernel one
//! end of a socket pair and carries the bytes between the two for as long as the device is there. If
//! the target goes away, the kernel keeps the requests and the worker connects again. Workers end
//! with their device; a [`record`] file says which device shows what.
//!
//! A target on this machine is asked over its local API, which resolves a point once for all volumes
//! and makes the temporary branch. A remote one is known by its NBD port alone: there a point is
//! resolved on the first volume and the others take the same sequence; branches are made on the
//! target itself.

use std::fmt::Write;
use std::process::ExitCode;

use anyhow::{Result, anyhow, bail};
use serde::Serialize;
use tidemark_control::target::{
    BranchRequest, ExportName, ResolveRequest, TargetClient, TargetStatus,
};
use tidemark_target::points::{PointName, Spec};

use crate::cli::{Attach, Global};
use crate::output::{Output, Usage};
use crate::{daemons, words};

mod content;
pub mod detach;
mod record;
mod remote;
pub mod worker;

use content::Content;
use record::Record;
use worker::{Job, Server};

/// What is to be attached.
struct Plan {
    server: Server,
    exports: Vec<ExportName>,
    /// A branch made for it, which goes away with it.
    temporary_branch: Option<String>,
    read_only: bool,
    /// The source's clock at the point, where the target tells.
    wall_ns: Option<i64>,
    /// What cannot be read of it, where the target tells.
    damage: Option<String>,
}

#[derive(Serialize)]
struct Attached {
    group: String,
    wall_ns: Option<i64>,
    temporary_branch: Option<String>,
    read_only: bool,
    damage: Option<String>,
    devices: Vec<AttachedDevice>,
}

#[derive(Serialize)]
struct AttachedDevice {
    volume: String,
    export: String,
    device: String,
    content: Content,
}

/// Presents a point as block devices.
pub fn run(args: &Attach, global: &Global, output: Output) -> Result<ExitCode> {
    let point = PointName::parse(&args.point).map_err(Usage)?;
    let target = daemons::target(global).client;
    let plan = match (&args.target, &args.target_name) {
        (Some(address), Some(name)) => remote::plan(args, &point, address, name, global)?,
        _ => local(args, &point, &target)?,
    };
    let mut records = Vec::new();
    for export in &plan.exports {
        let record = Record {
            group: point.group.clone(),
            volume: export.volume.clone(),
            export: export.export.clone(),
            temporary_branch: plan.temporary_branch.clone(),
        };
        match worker::start(&Job { server: plan.server.clone(), record: record.clone() }) {
            Ok(device) => records.push((record, device)),
            Err(error) => {
                // All or nothing; what cannot be undone is shown by the error of the next attempt.
                for (_, device) in &records {
                    let _ = detach::disconnect(device);
                }
                if let Some(branch) = &plan.temporary_branch {
                    let _ = target.client().wait(target.drop_branch(&point.group, branch));
                }
                return Err(error);
            }
        }
    }
    let devices = records
        .into_iter()
        .map(|(record, device)| AttachedDevice {
            content: Content::of(&device),
            volume: record.volume,
            export: record.export,
            device,
        })
        .collect();
    let attached = Attached {
        group: point.group,
        wall_ns: plan.wall_ns,
        temporary_branch: plan.temporary_branch,
        read_only: plan.read_only,
        damage: plan.damage,
        devices,
    };
    output.answer(&attached, || say(&attached))?;
    Ok(ExitCode::SUCCESS)
}

/// Asks the target on this machine.
fn local(args: &Attach, point: &PointName, target: &TargetClient) -> Result<Plan> {
    let status: TargetStatus = target.client().wait(target.status())?;
    let socket = status.nbd_socket.ok_or_else(|| {
        anyhow!(
            "the target serves no NBD on a Unix socket: set 'unix' in [nbd] of its configuration"
        )
    })?;
    let plan = |exports, temporary_branch, read_only, wall_ns, damage| Plan {
        server: Server::Unix { path: socket },
        exports,
        temporary_branch,
        read_only,
        wall_ns: Some(wall_ns),
        damage,
    };
    if let Spec::Branch(name) = &point.spec {
        let all = target.client().wait(target.branches())?;
        let found = all.branches.into_iter().find(|b| b.name == *name && b.group == point.group);
        let branch = found.ok_or_else(|| match all.unread.first() {
            Some(why) => anyhow!("no branch '{name}' is known: {why}"),
            None => {
                let group = &point.group;
                anyhow!("group '{group}' has no branch '{name}'; see 'tidemark branch list'")
            }
        })?;
        let mut exports = branch.exports;
        exports.retain(|e| point.volume.as_ref().is_none_or(|volume| *volume == e.volume));
        if exports.is_empty() {
            bail!("the branch '{name}' has no such volume");
        }
        return Ok(plan(exports, None, args.read_only, branch.wall_ns, branch.damage));
    }
    let (group, volume) = (point.group.clone(), point.volume.clone());
    let point = point.spec.to_string();
    if args.read_only {
        let request = ResolveRequest { group, volume, point };
        let resolved = target.client().wait(target.resolve(&request))?;
        return Ok(plan(resolved.exports, None, true, resolved.wall_ns, resolved.damage));
    }
    let request = BranchRequest { name: None, group, volume, point, temporary: true };
    let branch = target.client().wait(target.create_branch(&request))?;
    Ok(plan(branch.exports, Some(branch.name), false, branch.wall_ns, branch.damage))
}

fn say(attached: &Attached) -> String {
    let mut out = String::new();
    let when = attached
        .wall_ns
        .map_or_else(String::new, |wall_ns| format!(" as of {}", words::time_before(wall_ns)));
    let how = match (&attached.temporary_branch, attached.read_only) {
        (Some(branch), _) => format!("writable; branch {branch} goes away with it"),
        (None, true) => "read-only".to_owned(),
        (None, false) => "writable".to_owned(),
    };
    let _ = writeln!(out, "Group {}{when} ({how}):", attached.group);
    for device in &attached.devices {
        let _ = writeln!(out, "  {}  {}", device.device, device.volume);
        for hint in device.content.hints(&device.device, &device.volume, attached.read_only) {
            let _ = writeln!(out, "    {hint}");
        }
    }
    if let Some(damage) = &attached.damage {
        let _ = writeln!(out, "WARNING: {damage} is damaged: reads of it fail at this point.");
    }
    let _ = writeln!(out, "Unmount, then 'tidemark detach {}' takes it away.", attached.group);
    out
}
