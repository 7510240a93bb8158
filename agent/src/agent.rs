//! The agent: its groups, and the local API through which people reach them.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use rustls::ClientConfig;
use tidemark_control::{
    ApiError,
    agent::{AgentStatus, GroupFailure, Marked, Reloaded, VerifyStarted},
};
use tidemark_journal::GroupId;
use tidemark_link::pki;
use tokio::sync::Mutex;

use crate::{
    api::Control,
    clock::wall_ns,
    config::{AgentConfig, GroupConfig, NodeConfig},
    group::Group,
    rings::Rings,
};

/// How long a stop waits for the target to have everything.
pub const STOP_PATIENCE: Duration = Duration::from_secs(20);

/// A running agent.
pub struct Agent {
    directory: Option<PathBuf>,
    node: NodeConfig,
    tls: Arc<ClientConfig>,
    rings: Rings,
    groups: Mutex<BTreeMap<String, Group>>,
    /// Groups that could not be started, each with the reason told last. Held while groups are
    /// started or stopped, so that only one task does so.
    late: Mutex<BTreeMap<String, String>>,
}

impl Agent {
    /// Starts an agent with a configuration at hand. A group that does not start is told in the log
    /// and tried again with each [`reload`](Control::reload) and
    /// [`start_late_groups`](Self::start_late_groups).
    ///
    /// # Errors
    /// The node's certificates cannot be used.
    pub async fn start(
        config: AgentConfig,
        directory: Option<&Path>,
    ) -> anyhow::Result<Arc<Agent>> {
        let (identity, trust) = config.node.tls.read(&config.node.node)?;
        let tls = pki::client_config(&identity, &trust).context("this node's certificate")?;
        let agent = Arc::new(Agent {
            directory: directory.map(Path::to_owned),
            node: config.node,
            tls,
            rings: Rings::from_environment(),
            groups: Mutex::default(),
            late: Mutex::default(),
        });
        let mut late = agent.late.lock().await;
        for group in &config.groups {
            agent.try_start(group, &mut late).await;
        }
        drop(late);
        Ok(agent)
    }

    /// Tries to start the groups that could not be when the agent was started, as far as they are
    /// still configured: at a machine's start, disks may appear after it.
    pub async fn start_late_groups(&self) {
        let mut late = self.late.lock().await;
        let Some(directory) = self.directory.as_ref().filter(|_| !late.is_empty()) else { return };
        // A node's file that became wrong meanwhile is told by a reload.
        let Ok(loaded) = AgentConfig::load(directory) else { return };
        late.retain(|name, _| loaded.config.group(name).is_some());
        for name in late.keys().cloned().collect::<Vec<_>>() {
            if let Some(group) = loaded.config.group(&name) {
                self.try_start(group, &mut late).await;
            }
        }
    }

    /// Starts a group, or remembers that it could not be; says why, once.
    async fn try_start(&self, group: &GroupConfig, late: &mut BTreeMap<String, String>) {
        let name = group.name.as_str().to_owned();
        match self.start_group(group).await {
            Ok(()) => {
                late.remove(&name);
            }
            Err(error) => {
                let error = format!("{error:#}");
                if late.get(&name) != Some(&error) {
                    tracing::error!(group = name, error, "not protected; it is tried again");
                    late.insert(name, error);
                }
            }
        }
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
        // An attempt to start a group ends first, and there is no other.
        let mut late = self.late.lock().await;
        late.clear();
        let mut clean = true;
        let groups = std::mem::take(&mut *self.groups.lock().await);
        for (name, mut group) in groups {
            let ended = group.stop(STOP_PATIENCE).await;
            tracing::info!(group = name, clean = ended, "the group has ended");
            clean &= ended;
        }
        clean
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
        let mut groups = Vec::new();
        for group in self.groups.lock().await.values() {
            groups.push(group.status().await);
        }
        let version = env!("CARGO_PKG_VERSION").to_owned();
        AgentStatus { node: self.node.node.to_string(), version, groups }
    }

    async fn mark(&self, group: &str, name: &str) -> Result<Marked, ApiError> {
        let groups = self.groups.lock().await;
        let found = groups.get(group).ok_or_else(|| unknown(group))?;
        let position = found.mark(name).await.map_err(ApiError::conflict)?;
        Ok(Marked { position, wall_ns: wall_ns() })
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
        let mut late = self.late.lock().await;
        let mut reloaded = Reloaded::default();
        for fault in loaded.faults {
            let error = fault.error.to_string();
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
            match self.start_group(group).await {
                Ok(()) => {
                    late.remove(&name);
                    reloaded.started.push(name);
                }
                Err(error) => {
                    let error = format!("{error:#}");
                    reloaded.failed.push(GroupFailure { group: name, error });
                }
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
