//! `unprotect`: the agent lets go of a group's disks, then its files go.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;
use tidemark_agent::config::{GROUP_DIRECTORY, GroupConfig, NODE_FILE, NodeConfig, VolumeConfig};
use tidemark_agent::kernel::blockdev::{self, BackingError};
use tidemark_control::config::Source;
use tidemark_control::{ApiError, ClientError, ErrorCode};

use super::protect::{files, hide_rule_path};
use crate::cli::{Global, Unprotect};
use crate::daemons;
use crate::output::Output;

/// Where the devices of groups are.
const DEVICES: &str = "/dev/tidemark";
/// What is to be done before a group's devices can go.
const FIRST: &str = "stop what uses the protected devices, unmount them, put the disks' own names back into \
                     /etc/fstab, then run this again";

#[derive(Serialize)]
struct Unprotected {
    group: String,
    dry_run: bool,
    /// Files and directories removed, or that would be.
    removed: Vec<PathBuf>,
    /// Disks that may be used directly again.
    backings: Vec<PathBuf>,
}

/// Ends the protection of a group.
pub fn run(args: &Unprotect, global: &Global, output: Output) -> Result<ExitCode> {
    let group = args.group.as_str();
    let file = global.config_dir.join(GROUP_DIRECTORY).join(format!("{group}.toml"));
    let aside = file.with_extension("unprotected");
    // One that is aside is of an attempt that was cut short.
    let Some(found) = [&file, &aside].into_iter().find(|path| path.exists()) else {
        bail!("no group '{group}' is protected: there is no {}", file.display());
    };
    let config = GroupConfig::parse(&Source::read(found)?)?;
    let node = NodeConfig::parse(&Source::read(&global.config_dir.join(NODE_FILE))?)?;
    let backings: Vec<PathBuf> =
        config.volumes.iter().map(|volume| volume.backing.clone()).collect();
    let mut removed = vec![found.clone()];
    for volume in &config.volumes {
        removed.push(hide_rule_path(group, volume.name.as_str())?);
    }
    removed.push(node.state_of(&config.name));
    removed.retain(|path| path.exists());
    let done = Unprotected { group: group.to_owned(), dry_run: args.dry_run, removed, backings };
    if args.dry_run {
        output.answer(&done, || say(&done))?;
        return Ok(ExitCode::SUCCESS);
    }
    let device = |volume: &VolumeConfig| Path::new(DEVICES).join(group).join(volume.name.as_str());
    unused(config.volumes.iter().map(device))?;
    // From here on no agent takes the group up: it would find its state half removed.
    let moved = fs::rename(found, &aside);
    moved.with_context(|| format!("cannot set {} aside", found.display()))?;
    if let Err(error) = stop(global, group) {
        let back = fs::rename(&aside, &file);
        back.with_context(|| format!("cannot put {} back: {error}", file.display()))?;
        return Err(error);
    }
    for path in done.removed.iter().chain([&aside]) {
        remove(path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    let names: Vec<Option<String>> = done.backings.iter().map(|path| kernel_name(path)).collect();
    files::udev_look_again(&names.iter().map(Option::as_deref).collect::<Vec<_>>());
    output.answer(&done, || say(&done))?;
    Ok(ExitCode::SUCCESS)
}

/// Has a running agent let go; one that does not run has nothing to let go of.
fn stop(global: &Global, group: &str) -> Result<()> {
    let agent = daemons::agent(global).client;
    match agent.client().wait(agent.stop_group(group)) {
        Ok(_) | Err(ClientError::NotRunning { .. }) => Ok(()),
        // It never took the group up.
        Err(ClientError::Api(ApiError { code: ErrorCode::NotFound, .. })) => Ok(()),
        Err(ClientError::Api(error)) if error.code == ErrorCode::Conflict => {
            Err(anyhow!("{error}; {FIRST}"))
        }
        Err(error) => Err(error.into()),
    }
}

/// Makes sure that nobody uses the devices, also those that an agent which has ended left: their users wait for
/// an agent, and none could take them back without the group's state.
fn unused(devices: impl Iterator<Item = PathBuf>) -> Result<()> {
    for path in devices {
        match blockdev::users(&path) {
            Ok(users) if users.is_empty() => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Ok(users) => {
                let error = BackingError::InUse { path, users };
                bail!("{error}; {FIRST}. If no agent runs, what uses them waits: start it first");
            }
            Err(error) => {
                return Err(error).with_context(|| format!("find the users of {}", path.display()));
            }
        }
    }
    Ok(())
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        // What is remembered of a disk is worth nothing once it is written without the agent.
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
    }
}

fn kernel_name(path: &Path) -> Option<String> {
    let inspection = blockdev::inspect(path).ok()?;
    inspection.device.map(|_| inspection.identity.kernel_name)
}

fn say(done: &Unprotected) -> String {
    let mut out = String::new();
    if done.dry_run {
        let _ = writeln!(out, "Would end the protection of group {} and remove", done.group);
    } else {
        let _ = writeln!(out, "Group {} is no longer protected. Removed", done.group);
    }
    for path in &done.removed {
        let _ = writeln!(out, "  {}", path.display());
    }
    let disks: Vec<String> = done.backings.iter().map(|path| path.display().to_string()).collect();
    let _ = writeln!(
        out,
        "{} can be used directly{}. The points received so far stay at the target.",
        disks.join(", "),
        if done.dry_run { " then" } else { " again" }
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Such as one that an agent which was killed left.
    #[test]
    fn a_device_in_use_is_not_given_up() {
        let directory = tempfile::tempdir().unwrap();
        let (device, none) = (directory.path().join("data"), directory.path().join("log"));
        fs::write(&device, "").unwrap();
        let devices = || [none.clone(), device.clone()].into_iter();
        unused(devices()).unwrap();
        let mut user = std::process::Command::new("sleep")
            .arg("600")
            .stdout(fs::OpenOptions::new().append(true).open(&device).unwrap())
            .spawn()
            .unwrap();
        let refused = unused(devices()).unwrap_err().to_string();
        user.kill().unwrap();
        user.wait().unwrap();
        assert!(refused.contains("data is in use: process"), "{refused}");
        assert!(refused.contains("has it open; stop it first; stop what uses"), "{refused}");
        unused(devices()).unwrap();
    }
}
