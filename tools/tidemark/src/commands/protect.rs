//! `protect`: writes a group's file and has the agent take it up.
//!
//! Everything is looked at before anything is written; what the agent then refuses is taken back.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;
use tidemark_agent::config::{
    AgentConfig, GROUP_DIRECTORY, GroupConfig, NODE_FILE, TlsConfig, VolumeConfig,
};
use tidemark_agent::kernel::udev;
use tidemark_control::ClientError;
use tidemark_control::agent::{AgentStatus, FrontKind};
use tidemark_control::config::{ConfigError, Source};
use tidemark_journal::GroupId;
use tidemark_link::pki;

use crate::cli::{Global, Protect};
use crate::output::{Output, Usage};
use crate::{daemons, words};

mod disk;
pub mod files;

use disk::Disk;

/// What was done, or would be.
#[derive(Serialize)]
struct Protected {
    group: String,
    id: GroupId,
    dry_run: bool,
    /// Files written, or that would be.
    files: Vec<PathBuf>,
    /// The agent took the group up; false if no agent runs.
    running: bool,
    volumes: Vec<ProtectedVolume>,
}

#[derive(Serialize)]
struct ProtectedVolume {
    name: String,
    backing: PathBuf,
    size_bytes: u64,
    /// What to use from now on: a device, or the socket of a plain NBD front.
    device: PathBuf,
    /// The same as NBD clients name it, when it is a socket.
    uri: Option<String>,
}

impl ProtectedVolume {
    fn new(config: &AgentConfig, group: &GroupConfig, volume: &VolumeConfig, disk: &Disk) -> Self {
        let device = match volume.front.kind() {
            Some(FrontKind::NbdSocket) => config.node.socket_of(&group.name, volume),
            _ => Path::new("/dev/tidemark").join(group.name.as_str()).join(volume.name.as_str()),
        };
        let mut protected = ProtectedVolume {
            name: volume.name.to_string(),
            backing: volume.backing.clone(),
            size_bytes: disk.inspection.geometry.size_bytes,
            device: PathBuf::new(),
            uri: None,
        };
        protected.is_at(device);
        protected
    }

    fn is_at(&mut self, device: PathBuf) {
        let uri = || words::nbd_uri(&device, &self.name);
        self.uri = (!device.starts_with("/dev")).then(uri);
        self.device = device;
    }

    fn place(&self) -> String {
        self.uri.clone().unwrap_or_else(|| self.device.display().to_string())
    }
}

/// Protects disks.
pub fn run(args: &Protect, global: &Global, output: Output) -> Result<ExitCode> {
    let directory = &global.config_dir;
    let file = directory.join(GROUP_DIRECTORY).join(format!("{}.toml", args.group));
    if file.exists() {
        bail!(
            "the group '{group}' is protected already by {file}; 'tidemark unprotect {group}' ends \
             that",
            group = args.group,
            file = file.display()
        );
    }
    let node = node_file(directory)?;
    for volume in &args.volumes {
        not_twice(directory, &volume.path)?;
    }
    let disks = args
        .volumes
        .iter()
        .map(|volume| Disk::look(args.group.as_str(), volume))
        .collect::<Result<Vec<_>>>()?;
    let id = GroupId::random().context("no randomness for the group's id")?;
    let text = group_file(args, id, &disks);
    let config = admit(directory, node.as_ref(), &Source::new(&file, text.as_str()))?;

    let mut plan = Vec::new();
    plan.extend(node.map(|node| (directory.join(NODE_FILE), node)));
    for disk in &disks {
        plan.extend(disk.hide_rule(args.group.as_str())?);
    }
    plan.push((file.clone(), text));
    let group = config.group(args.group.as_str()).context("the group that was just added")?;
    let mut done = Protected {
        group: args.group.to_string(),
        id,
        dry_run: args.dry_run,
        files: plan.iter().map(|(path, _)| path.clone()).collect(),
        running: false,
        volumes: group
            .volumes
            .iter()
            .zip(&disks)
            .map(|(volume, disk)| ProtectedVolume::new(&config, group, volume, disk))
            .collect(),
    };
    if args.dry_run {
        output.answer(&done, || {
            let mut out = String::new();
            for (path, text) in &plan {
                let _ = writeln!(out, "Would write {}:\n{text}", path.display());
            }
            out
        })?;
        return Ok(ExitCode::SUCCESS);
    }
    for (path, text) in &plan {
        files::write(path, text)?;
    }
    if let Some(refusal) = start(global, &mut done)? {
        take_back(&plan, &disks);
        // Else it might try again what it could not do. If it is gone, there is nobody to tell.
        let agent = daemons::agent(global).client;
        let _ = agent.client().wait(agent.reload());
        bail!("the agent cannot protect the group: {refusal}");
    }
    files::udev_look_again(&disks.iter().map(|disk| disk.kernel_name()).collect::<Vec<_>>());
    output.answer(&done, || say(&done, &file))?;
    Ok(ExitCode::SUCCESS)
}

/// A node's file, if there is none yet: named as its certificate says.
fn node_file(directory: &Path) -> Result<Option<String>> {
    let file = directory.join(NODE_FILE);
    if file.exists() {
        return Ok(None);
    }
    let certificate = TlsConfig::default().certificate;
    let make = || -> Result<String> {
        let pem = fs::read(&certificate)?;
        let key = fs::read(TlsConfig::default().key)?;
        let identity = pki::Identity::from_pem(&pem, &key)?;
        Ok(format!("# The agent of this machine.\nnode = \"{}\"\n", identity.name()))
    };
    make().map(Some).with_context(|| {
        format!(
            "there is no {} and no certificate to tell this node's name from in {}; 'tidemark \
             init' makes certificates",
            file.display(),
            certificate.display()
        )
    })
}

/// Refuses a disk of another group by that group's name: to the kernel it is only in use.
fn not_twice(directory: &Path, path: &Path) -> Result<()> {
    let (Ok(loaded), Ok(real)) = (AgentConfig::load(directory), fs::canonicalize(path)) else {
        return Ok(());
    };
    for group in &loaded.config.groups {
        let same = |backing: &Path| fs::canonicalize(backing).is_ok_and(|taken| taken == real);
        if group.volumes.iter().any(|volume| same(&volume.backing)) {
            let path = path.display();
            let sentence = format!("{path} is protected by the group '{}' already", group.name);
            return Err(Usage(sentence).into());
        }
    }
    Ok(())
}

/// What is configured with the group, if they go together.
fn admit(directory: &Path, node: Option<&String>, source: &Source) -> Result<AgentConfig> {
    let mut config = match node {
        Some(node) => AgentConfig::of_node(&Source::new(&directory.join(NODE_FILE), node.as_str())),
        None => AgentConfig::load(directory).map(|loaded| loaded.config),
    }?;
    config.add(source).map_err(|error| match error {
        ConfigError::Content { sentence, .. } => anyhow!(Usage(sentence)),
        error => error.into(),
    })?;
    Ok(config)
}

/// Has a running agent take the group up, and learns its devices; or learns why it cannot. Without
/// an answer it stays open whether it did.
fn start(global: &Global, done: &mut Protected) -> Result<Option<String>> {
    let agent = daemons::agent(global).client;
    let reloaded = match agent.client().wait(agent.reload()) {
        Ok(reloaded) => reloaded,
        Err(ClientError::NotRunning { .. }) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if let Some(failure) = reloaded.failed.iter().find(|failure| failure.group == done.group) {
        return Ok(Some(failure.error.clone()));
    }
    done.running = true;
    let status: AgentStatus = agent.client().wait(agent.status())?;
    let group = status.groups.into_iter().find(|group| group.name == done.group);
    for seen in group.into_iter().flat_map(|group| group.volumes) {
        if let Some(volume) = done.volumes.iter_mut().find(|volume| volume.name == seen.name) {
            volume.is_at(seen.device);
        }
    }
    Ok(None)
}

fn take_back(plan: &[(PathBuf, String)], disks: &[Disk]) {
    for (path, _) in plan {
        if path.file_name().is_some_and(|name| name != NODE_FILE) {
            // What stays behind is refused or replaced by the next attempt.
            let _ = fs::remove_file(path);
        }
    }
    files::udev_look_again(&disks.iter().map(Disk::kernel_name).collect::<Vec<_>>());
}

fn say(done: &Protected, file: &Path) -> String {
    let mut out = String::new();
    if done.running {
        let _ = writeln!(out, "Group {} is protected. From now on use", done.group);
    } else {
        let _ = writeln!(
            out,
            "Group {} is written to {}. No agent runs: start it with 'systemctl start \
             tidemark-agent', then use",
            done.group,
            file.display()
        );
    }
    for volume in &done.volumes {
        let _ = writeln!(
            out,
            "  {} in place of {} ({})",
            volume.place(),
            volume.backing.display(),
            words::bytes(volume.size_bytes)
        );
    }
    if done.volumes.iter().any(|volume| volume.uri.is_none()) {
        let _ =
            writeln!(out, "In /etc/fstab, a device under /dev/tidemark needs the option _netdev.");
    }
    let _ = writeln!(
        out,
        "The target takes the group when its {} has a [[group]] named \"{}\" for this node.\n\
         'tidemark status --watch' shows the first sync.",
        daemons::TARGET_FILE,
        done.group
    );
    out
}

/// The group's file.
fn group_file(args: &Protect, id: GroupId, disks: &[Disk]) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "# Group {}, made by 'tidemark protect'. Ids never change.\n\
         id = \"{id}\"\n\
         front = \"{}\"",
        args.group,
        args.front.name()
    );
    if let Some(ring) = args.ring_bytes {
        let _ = writeln!(out, "ring_bytes = \"{ring}\"");
    }
    if let Some(target) = args.rpo_target {
        let _ = writeln!(out, "rpo_target_s = \"{target}\"");
    }
    if args.sync {
        let _ = writeln!(out, "sync = true");
    }
    let _ =
        writeln!(out, "\n[target]\naddress = \"{}\"\nname = \"{}\"", args.target, args.target_name);
    for (number, disk) in (1..).zip(disks) {
        let _ = writeln!(
            out,
            "\n[[volume]]\nid = {number}\nname = \"{}\"\nbacking = {}",
            disk.name,
            toml::Value::String(disk.backing.to_string_lossy().into_owned())
        );
    }
    out
}

/// Where the rules that hide disks go.
pub fn hide_rule_path(group: &str, volume: &str) -> Result<PathBuf> {
    Ok(Path::new("/etc/udev/rules.d").join(udev::hide_rule_file(group, volume)?))
}

#[cfg(test)]
mod tests;
