//! The agent: its groups, and the local API through which people reach them.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{
        Arc, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use rustls::ClientConfig;
use tidemark_control::{
    ApiError,
    agent::{AgentStatus, GroupFailure, Marked, Reloaded, VerifyStarted},
    config::files_in,
};
use tidemark_journal::GroupId;
use tidemark_link::pki;
use tokio::{sync::Mutex, task::JoinSet};

use crate::{
    api::Control,
    clock::wall_ns,
    config::{AgentConfig, GROUP_DIRECTORY, GroupConfig, Loaded, NodeConfig},
    group::Group,
    rings::Rings,
};

/// How long a stop waits for the target to have everything.
pub const STOP_PATIENCE: Duration = Duration::from_secs(20);

/// Why a group does not run whose file the agent has not read.
const NOT_TAKEN_UP: &str = "the agent does not run it: its file was written since the agent looked, \
                            or the group was stopped; restart the agent";

/// A running agent.
pub struct Agent {
    directory: Option<PathBuf>,
    node: NodeConfig,
    tls: Arc<ClientConfig>,
    rings: Rings,
    groups: Mutex<BTreeMap<String, Group>>,
    /// Groups that could not be started, each with the reason told last.
    late: std::sync::Mutex<BTreeMap<String, String>>,
    /// Held while groups are started or all are stopped, so that only one task does so.
    starting: Mutex<()>,
    /// No group is started any more.
    ending: AtomicBool,
}

impl Agent {
    /// Starts an agent with a configuration at hand. A group that does not start, or whose file
    /// cannot be used, is told in the log and in the status, and tried again with each
    /// [`reload`](Control::reload) and [`start_late_groups`](Self::start_late_groups).
    ///
    /// # Errors
    /// The node's certificates cannot be used.
    pub async fn start(
        config: impl Into<Loaded>,
        directory: Option<&Path>,
    ) -> anyhow::Result<Arc<Agent>> {
        let Loaded { config, faults } = config.into();
        let (identity, trust) = config.node.tls.read(&config.node.node)?;
        let tls = pki::client_config(&identity, &trust).context("this node's certificate")?;
        let agent = Arc::new(Agent {
            directory: directory.map(Path::to_owned),
            node: config.node,
            tls,
            rings: Rings::from_environment(),
            groups: Mutex::default(),
            late: std::sync::Mutex::default(),
            starting: Mutex::default(),
            ending: AtomicBool::new(false),
        });
        let starting = agent.starting.lock().await;
        for fault in &faults {
            agent.put_off(&fault.group, fault.error.to_string());
        }
        for group in &config.groups {
            agent.try_start(group).await;
        }
        drop(starting);
        Ok(agent)
    }

    /// Tries to start the groups that could not be when the agent was started, as far as they are
    /// still configured: at a machine's start, disks may appear after it.
    pub async fn start_late_groups(&self) {
        let _starting = self.starting.lock().await;
        let names: Vec<String> = self.late().keys().cloned().collect();
        if names.is_empty() || self.ending.load(Ordering::Relaxed) {
            return;
        }
        let Some(directory) = &self.directory else { return };
        // A node's file that became wrong meanwhile is told by a reload.
        let Ok(loaded) = AgentConfig::load(directory) else { return };
        for name in names {
            if let Some(group) = loaded.config.group(&name) {
                self.try_start(group).await;
            } else if let Some(fault) = loaded.faults.iter().find(|fault| fault.group == name) {
                self.put_off(&name, fault.error.to_string());
            } else {
                self.late().remove(&name);
            }
        }
    }

    /// Starts a group, or remembers that it could not be.
    async fn try_start(&self, group: &GroupConfig) {
        let name = group.name.as_str();
        match self.start_group(group).await {
            Ok(()) => drop(self.late().remove(name)),
            Err(error) => self.put_off(name, format!("{error:#}")),
        }
    }

    /// Remembers that a group could not be started, and says why, once.
    fn put_off(&self, group: &str, reason: String) {
        let mut late = self.late();
        if late.get(group) != Some(&reason) {
            tracing::error!(group, error = reason, "not protected; it is tried again");
            late.insert(group.to_owned(), reason);
        }
    }

    fn late(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.late.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The groups that are configured, by what lies in the directory now, and not among the
    /// running ones: each with the reason.
    fn unprotected(&self, running: &BTreeMap<String, Group>) -> Vec<GroupFailure> {
        let directory = self.directory.as_ref().map(|path| path.join(GROUP_DIRECTORY));
        let files = directory.and_then(|path| files_in(&path).ok());
        let late = self.late();
        let configured: BTreeSet<String> = match files {
            Some(files) => files
                .iter()
                .filter_map(|path| Some(path.file_stem()?.to_string_lossy().into_owned()))
                .collect(),
            None => late.keys().cloned().collect(),
        };
        let without = configured.into_iter().filter(|name| !running.contains_key(name));
        without
            .map(|group| {
                let error = if self.ending.load(Ordering::Relaxed) {
                    "the agent is stopping"
                } else {
                    late.get(&group).map_or(NOT_TAKEN_UP, String::as_str)
                };
                GroupFailure { error: error.to_owned(), group }
            })
            .collect()
    }

    /// Starts a group.
    ///
    /// # Errors
    /// A sentence that says what is in the way.
    pub async fn start_group(&self, config: &GroupConfig) -> anyhow::Result<()> {
        let group = Group::start(&self.node, config, self.tls.clone(), &self.rings).await?;
        self.groups.lock().await.insert(config.name.as_str().to_owned(), group);
        Ok(())
    }

    /// Stops all groups, leaving their devices to the next agent. Returns whether each ended
    /// cleanly.
    pub async fn stop(&self) -> bool {
        self.stop_within(STOP_PATIENCE).await
    }

    /// The same with a bound on how long all of them together wait for the target.
    pub async fn stop_within(&self, patience: Duration) -> bool {
        // An attempt to start a group ends first, and there is no other.
        let _starting = self.starting.lock().await;
        self.ending.store(true, Ordering::Relaxed);
        let mut stops = JoinSet::new();
        for (name, mut group) in std::mem::take(&mut *self.groups.lock().await) {
            stops.spawn(async move {
                let clean = group.stop(patience).await;
                tracing::info!(group = name, clean, "the group has ended");
                clean
            });
        }
        stops.join_all().await.into_iter().all(|clean| clean)
    }

    /// Whether every capture thread still takes its turns. It waits for them.
    pub async fn is_alive(&self) -> bool {
        for group in self.groups.lock().await.values() {
            if !group.is_alive().await {
                return false;
            }
        }
        true
    }

    /// Has the service manager forget the rings of groups that are not among these.
    pub fn forget_other_rings(&self, groups: &[GroupId]) {
        self.rings.forget_others(groups);
    }

    /// How long records of a group took to become final-durable.
    pub async fn lag(&self, group: &str) -> Option<crate::lag::LagHistogram> {
        self.groups.lock().await.get(group).map(Group::lag)
    }
}

fn unknown(group: &str) -> ApiError {
    ApiError::not_found(format!("no group '{group}' is protected here"))
}

impl Control for Agent {
    async fn status(&self) -> AgentStatus {
        let running = self.groups.lock().await;
        let mut groups = Vec::new();
        for group in running.values() {
            groups.push(group.status().await);
        }
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let unprotected = self.unprotected(&running);
        AgentStatus { node: self.node.node.to_string(), version, groups, unprotected }
    }

    async fn mark(&self, group: &str, name: &str) -> Result<Marked, ApiError> {
        let groups = self.groups.lock().await;
        let found = groups.get(group).ok_or_else(|| unknown(group))?;
        let position = found.mark(name).await.map_err(ApiError::conflict)?;
        Ok(Marked { position, durable_seq: found.durable(), wall_ns: wall_ns() })
    }

    async fn verify(&self, group: &str, volume: Option<&str>) -> Result<VerifyStarted, ApiError> {
        let groups = self.groups.lock().await;
        let found = groups.get(group).ok_or_else(|| unknown(group))?;
        let all = &found.config().volumes;
        let chosen = match volume {
            None => None,
            Some(name) => {
                let volume = all.iter().find(|volume| volume.name.as_str() == name);
                let sentence = || format!("group '{group}' has no volume '{name}'");
                Some(volume.ok_or_else(|| ApiError::not_found(sentence()))?.id)
            }
        };
        found.verify(chosen);
        let named = all.iter().filter(|volume| chosen.is_none_or(|id| id == volume.id));
        Ok(VerifyStarted { volumes: named.map(|volume| volume.name.as_str().to_owned()).collect() })
    }

    async fn reload(&self) -> Result<Reloaded, ApiError> {
        let Some(directory) = &self.directory else {
            return Err(ApiError::conflict("this agent has no configuration directory"));
        };
        let loaded =
            AgentConfig::load(directory).map_err(|error| ApiError::conflict(error.to_string()))?;
        let _starting = self.starting.lock().await;
        if self.ending.load(Ordering::Relaxed) {
            return Err(ApiError::unavailable("the agent is stopping"));
        }
        let mut reloaded = Reloaded::default();
        for fault in loaded.faults {
            let error = fault.error.to_string();
            if !self.groups.lock().await.contains_key(&fault.group) {
                self.put_off(&fault.group, error.clone());
            }
            reloaded.failed.push(GroupFailure { group: fault.group, error });
        }
        let broken = |name: &str| reloaded.failed.iter().any(|failure| failure.group == name);
        let running: Vec<String> = self.groups.lock().await.keys().cloned().collect();
        for name in running.into_iter().filter(|name| !broken(name)).collect::<Vec<_>>() {
            if loaded.config.group(&name).is_some() {
                continue;
            }
            match self.stop_group(&name).await {
                Ok(()) => reloaded.stopped.push(name),
                Err(error) => {
                    reloaded.failed.push(GroupFailure { group: name, error: error.to_string() });
                }
            }
        }
        for group in &loaded.config.groups {
            let name = group.name.as_str().to_owned();
            if self.groups.lock().await.contains_key(&name) {
                continue;
            }
            self.try_start(group).await;
            match self.late().get(&name).cloned() {
                None => reloaded.started.push(name),
                Some(error) => reloaded.failed.push(GroupFailure { group: name, error }),
            }
        }
        Ok(reloaded)
    }

    async fn stop_group(&self, group: &str) -> Result<(), ApiError> {
        let taken = self.groups.lock().await.remove(group);
        let mut found = taken.ok_or_else(|| unknown(group))?;
        if let Err(error) = found.remove_devices().await {
            self.groups.lock().await.insert(group.to_owned(), found);
            return Err(ApiError::conflict(format!("{error:#}")));
        }
        found.stop(STOP_PATIENCE).await;
        self.rings.forget(found.config().id);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
