//! `config check`.

use std::fmt::Write;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;
use tidemark_agent::config::{AgentConfig, GROUP_DIRECTORY, NODE_FILE, TlsConfig};
use tidemark_link::pki;
use tidemark_target::Config as TargetConfig;

use crate::cli::{ConfigAction, Global};
use crate::daemons::TARGET_FILE;
use crate::output::Output;
use crate::words;

#[derive(Default, Serialize)]
struct Findings {
    /// What was looked at and found good, in words.
    good: Vec<String>,
    /// What would keep a daemon from working, a sentence each.
    faults: Vec<String>,
    /// What works and should be changed, a sentence each.
    warnings: Vec<String>,
}

/// Says whether the daemons could start with the configuration.
pub fn run(action: &ConfigAction, global: &Global, output: Output) -> Result<ExitCode> {
    let ConfigAction::Check = action;
    let directory = &global.config_dir;
    let mut found = Findings::default();
    let agent = directory.join(NODE_FILE);
    let target = directory.join(TARGET_FILE);
    if agent.exists() || directory.join(GROUP_DIRECTORY).exists() {
        check_agent(directory, &mut found);
    }
    if target.exists() {
        check_target(&target, &mut found);
    }
    if let (Ok(agent), Ok(target)) = (AgentConfig::load(directory), TargetConfig::load(&target)) {
        check_both(&agent.config.node.api_socket, &target, &mut found);
    }
    if found.good.is_empty() && found.faults.is_empty() {
        found.faults.push(format!(
            "{} has neither {NODE_FILE} nor {TARGET_FILE}: nothing is configured here",
            directory.display()
        ));
    }
    output.answer(&found, || {
        let mut out = String::new();
        for line in &found.good {
            let _ = writeln!(out, "ok: {line}");
        }
        for line in &found.warnings {
            let _ = writeln!(out, "warning: {line}");
        }
        for line in &found.faults {
            let _ = writeln!(out, "fault: {line}");
        }
        out
    })?;
    Ok(if found.faults.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn check_agent(directory: &Path, found: &mut Findings) {
    let loaded = match AgentConfig::load(directory) {
        Ok(loaded) => loaded,
        Err(error) => return found.faults.push(error.to_string()),
    };
    let config = &loaded.config;
    found.good.push(format!(
        "agent of node {}, {}",
        config.node.node,
        words::count(config.groups.len(), "group")
    ));
    found.faults.extend(loaded.faults.iter().map(ToString::to_string));
    match config.node.tls.read(&config.node.node) {
        Err(error) => found.faults.push(error.to_string()),
        Ok((identity, trust)) => {
            if let Err(error) = pki::client_config(&identity, &trust) {
                let TlsConfig { certificate, key, .. } = &config.node.tls;
                let (certificate, key) = (certificate.display(), key.display());
                found.faults.push(format!("{certificate} with {key}: {error}"));
            }
        }
    }
    if config.groups.is_empty() && loaded.faults.is_empty() {
        found.warnings.push("no group is configured; 'tidemark protect' begins one".to_owned());
    }
    check_key(&config.node.tls.key, found);
    if let Err(error) = tidemark_agent::spool::own_disk::check(&config.node, &config.groups) {
        found.faults.push(error.to_string());
    }
    for group in &config.groups {
        found.good.push(format!(
            "group {} with {}, to {} ({})",
            group.name,
            words::count(group.volumes.len(), "volume"),
            group.target.name,
            group.target.address
        ));
        for volume in &group.volumes {
            if let Err(error) = tidemark_agent::kernel::blockdev::inspect(&volume.backing) {
                found.faults.push(format!("volume {}/{}: {error}", group.name, volume.name));
            }
        }
    }
}

fn check_target(file: &Path, found: &mut Findings) {
    let config = match TargetConfig::load(file) {
        Ok(config) => config,
        Err(error) => return found.faults.push(format!("{error:#}")),
    };
    found.good.push(format!(
        "target in {}, {}",
        config.data_dir.display(),
        words::count(config.groups.len(), "group")
    ));
    if let Err(error) = config.link.tls() {
        found.faults.push(format!("{error:#}"));
    }
    if config.groups.is_empty() {
        found.warnings.push(format!("no [[group]] is in {}: nothing is taken", file.display()));
    }
    check_key(&config.link.key, found);
}

/// What only both daemons on one machine can get wrong.
fn check_both(agent: &Path, target: &TargetConfig, found: &mut Findings) {
    if [Some(&target.api.socket), target.nbd.unix.as_ref()].contains(&Some(&agent.to_owned())) {
        let agent = agent.display();
        found.faults.push(format!("agent and target both want to listen on {agent}"));
    }
}

/// A private key that others can read.
fn check_key(key: &Path, found: &mut Findings) {
    if fs::metadata(key).is_ok_and(|metadata| metadata.permissions().mode() & 0o077 != 0) {
        found.warnings.push(format!(
            "others than the owner may use the private key {key}; run: chmod 600 {key}",
            key = key.display()
        ));
    }
}
