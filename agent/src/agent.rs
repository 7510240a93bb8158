//! The agent: its groups, and the local API through which people reach them.

use std::{
    collections::{BTreeMap, BTreeSet},
    error::Error,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use rustls::ClientConfig;
use tidemark_control::{
    ApiError, ErrorCode,
    agent::{AgentStatus, GroupFailure, Marked, Reloaded, VerifyStarted},
    config::files_in,
};
use tidemark_journal::GroupId;
use tidemark_link::pki;
use tokio::{
    sync::{Mutex, watch},
    task::JoinSet,
};

use crate::{
    api::Control,
    clock::wall_ns,
    config::{AgentConfig, Fault, GROUP_DIRECTORY, GroupConfig, Loaded, NodeConfig},
    disks::DiskError,
    encoder::Pace,
    group::Group,
    kernel::blockdev::BackingError,
    rings::Rings,
};

mod changes;
mod late;

pub(crate) use late::RETRY;

use changes::Changes;
use late::{Came, Late};

/// How long a stop waits for the target to have everything.
pub const STOP_PATIENCE: Duration = Duration::from_secs(20);

/// Why a group does not run whose file the agent has not read.
const NOT_TAKEN_UP: &str = "the agent does not run it: its file was written since the agent looked, \
                            or the group was stopped; restart the agent";
const BEING_CHANGED: &str = "it is being started or stopped; look again in a moment";
const STOPPING: &str = "the agent is stopping";

/// A running agent.
pub struct Agent {
    directory: Option<PathBuf>,
    node: NodeConfig,
    tls: Arc<ClientConfig>,
    rings: Arc<Rings>,
    pace: Arc<Pace>,
    groups: Mutex<BTreeMap<String, Group>>,
    /// Groups that could not be started.
    late: Late,
    /// Whoever puts a group into `groups`, or takes it out, has begun a change.
    changes: Changes,
    /// Held by a reload: what one has read must not undo what another has done since.
    reloading: Mutex<()>,
    /// Whether no group is started any more.
    ending: watch::Sender<bool>,
}

impl Agent {
    /// An agent with a configuration at hand, none of whose groups has been started.
    ///
    /// # Errors
    /// The node's certificates cannot be used.
    pub fn new(loaded: &Loaded, directory: Option<&Path>) -> anyhow::Result<Arc<Agent>> {
        let node = &loaded.config.node;
        let (identity, trust) = node.tls.read(&node.node)?;
        let tls = pki::client_config(&identity, &trust).context("this node's certificate")?;
        let agent = Arc::new(Agent {
            directory: directory.map(Path::to_owned),
            node: node.clone(),
            tls,
            rings: Arc::new(Rings::from_environment()),
            pace: Arc::default(),
            groups: Mutex::default(),
            late: Late::default(),
            changes: Changes::default(),
            reloading: Mutex::default(),
            ending: watch::Sender::new(false),
        });
        for fault in &loaded.faults {
            agent.put_off_file(&fault.group, fault.error.to_string());
        }
        Ok(agent)
    }

    /// Tries to start configured groups, side by side. One that does not start is told in the log and in the
    /// status, and tried again with each [`reload`](Control::reload) and, in time, by
    /// [`start_late_groups`](Self::start_late_groups).
    pub async fn start_groups(self: &Arc<Self>, names: Vec<String>) {
        side_by_side(names.into_iter().map(|name| {
            let agent = self.clone();
            async move {
                let _change = agent.changes.begin(&name).await;
                // Told in the log and in the status.
                let _ = agent.start_configured(&name).await;
            }
        }))
        .await;
    }

    /// Tries to start the groups that could not be when the agent was started, as far as they are
    /// still configured and it is time for it: at a machine's start, disks may appear after it.
    pub async fn start_late_groups(self: &Arc<Self>) {
        let due = self.late.due(Instant::now()).into_iter();
        // Somebody else may be at it, or have ended it.
        let due = due.filter_map(|name| Some((self.changes.try_begin(&name)?, name)));
        let due = due.filter(|(_, name)| self.late.reason(name).is_some() && !self.is_ending());
        side_by_side(due.map(|(change, name)| {
            let agent = self.clone();
            async move {
                let _change = change;
                // Told in the log and in the status.
                let _ = agent.start_configured(&name).await;
            }
        }))
        .await;
    }

    /// Tries to start a group whose change has been begun, as its file says now: somebody may have changed or
    /// removed it since it was seen. None if the group is not to run any more.
    async fn start_configured(&self, name: &str) -> Option<Result<(), String>> {
        let loaded = AgentConfig::load(self.directory.as_ref()?).and_then(Loaded::whole);
        let fault = match &loaded {
            Ok(loaded) => match loaded.config.group(name) {
                Some(group) => return Some(self.try_start(group).await),
                None => {
                    loaded.faults.iter().find(|fault| fault.group == name).map(Fault::to_string)
                }
            },
            Err(error) => Some(error.to_string()),
        };
        match fault {
            Some(fault) => {
                self.put_off_file(name, fault.clone());
                Some(Err(fault))
            }
            None => {
                self.late.forget(name);
                None
            }
        }
    }

    /// Starts a group whose change has been begun, or remembers that it could not be.
    async fn try_start(&self, group: &GroupConfig) -> Result<(), String> {
        let name = group.name.as_str();
        match self.start_changing(group).await {
            Ok(()) => {
                self.late.forget(name);
                Ok(())
            }
            Err(error) => {
                let reason = format!("{error:#}");
                let came = if error.chain().any(is_of_the_disk) { Came::NotFar } else { Came::Far };
                if !self.is_ending() {
                    self.late.put_off(name, reason.clone(), came, Instant::now());
                }
                Err(reason)
            }
        }
    }

    fn put_off_file(&self, group: &str, reason: String) {
        self.late.put_off(group, reason, Came::NotFar, Instant::now());
    }

    /// Why nothing can be asked of a group that does not run.
    fn absent(&self, group: &str) -> ApiError {
        if self.is_ending() {
            return ApiError::unavailable(STOPPING);
        }
        if let Some(reason) = self.late.reason(group) {
            return ApiError::conflict(format!("group '{group}' is not protected: {reason}"));
        }
        match self.changes.under_way().iter().any(|changing| changing == group) {
            true => ApiError::unavailable(format!("group '{group}': {BEING_CHANGED}")),
            false => unknown(group),
        }
    }

    fn is_ending(&self) -> bool {
        *self.ending.borrow()
    }

    /// The groups that are configured, by what lies in the directory now, and not among the
    /// running ones: each with the reason.
    fn unprotected(&self, running: &BTreeMap<String, Group>) -> Vec<GroupFailure> {
        let directory = self.directory.as_ref().map(|path| path.join(GROUP_DIRECTORY));
        let files = directory.and_then(|path| files_in(&path).ok());
        let configured: BTreeSet<String> = match files {
            Some(files) => files
                .iter()
                .filter_map(|path| Some(path.file_stem()?.to_string_lossy().into_owned()))
                .collect(),
            None => self.late.groups().into_iter().collect(),
        };
        let changing = self.changes.under_way();
        let without = configured.into_iter().filter(|name| !running.contains_key(name));
        without
            .map(|group| {
                let changed = changing.contains(&group).then(|| BEING_CHANGED.to_owned());
                let error = match self.is_ending() {
                    true => Some(STOPPING.to_owned()),
                    false => self.late.reason(&group).or(changed),
                };
                GroupFailure { error: error.unwrap_or_else(|| NOT_TAKEN_UP.to_owned()), group }
            })
            .collect()
    }

    /// Starts a group, unless it runs.
    ///
    /// # Errors
    /// A sentence that says what is in the way.
    pub async fn start_group(&self, config: &GroupConfig) -> anyhow::Result<()> {
        let _change = self.changes.begin(config.name.as_str()).await;
        self.start_changing(config).await
    }

    async fn start_changing(&self, config: &GroupConfig) -> anyhow::Result<()> {
        let name = config.name.as_str();
        ensure!(!self.is_ending(), STOPPING);
        if self.groups.lock().await.contains_key(name) {
            return Ok(());
        }
        let mut ending = self.ending.subscribe();
        let ended = async {
            // Cannot fail: the sender lives in `self`.
            let _ = ending.wait_for(|ending| *ending).await;
        };
        let (tls, rings, pace) = (self.tls.clone(), &self.rings, &self.pace);
        let group = Group::start(&self.node, config, tls, rings, pace, ended).await?;
        self.groups.lock().await.insert(name.to_owned(), group);
        Ok(())
    }

    /// Stops all groups, leaving their devices to the next agent. Returns whether each ended
    /// cleanly.
    pub async fn stop(self: &Arc<Self>) -> bool {
        self.stop_within(STOP_PATIENCE).await
    }

    /// The same with a bound on how long all of them together wait for the target.
    pub async fn stop_within(self: &Arc<Self>, patience: Duration) -> bool {
        self.ending.send_replace(true);
        // Whoever begins a change from now on sees that; who has begun one before is waited for, by
        // the group concerned alone.
        let mut names: BTreeSet<String> = self.changes.under_way().into_iter().collect();
        names.extend(self.groups.lock().await.keys().cloned());
        let mut stops = JoinSet::new();
        for name in names {
            let agent = self.clone();
            stops.spawn(async move {
                let _change = agent.changes.begin(&name).await;
                let taken = agent.groups.lock().await.remove(&name);
                let Some(mut group) = taken else { return true };
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

    /// Has the rings forgotten of groups that are neither configured nor running.
    pub async fn forget_stale_rings(&self) {
        let loaded =
            self.directory.as_ref().and_then(|directory| AgentConfig::load(directory).ok());
        // A group whose file is at fault, or out of sight, may need its ring once that is mended.
        let Some(loaded) =
            loaded.filter(|loaded| loaded.faults.is_empty() && loaded.missing.is_none())
        else {
            return;
        };
        let mut kept: Vec<GroupId> = loaded.config.groups.iter().map(|group| group.id).collect();
        kept.extend(self.groups.lock().await.values().map(|group| group.config().id));
        self.rings.forget_others(&kept);
    }

    /// How long records of a group took to become final-durable.
    pub async fn lag(&self, group: &str) -> Option<crate::lag::LagHistogram> {
        self.groups.lock().await.get(group).map(Group::lag)
    }
}

/// Runs tasks side by side, each to its end even when nobody waits for it any more.
async fn side_by_side<T: Send + 'static>(
    tasks: impl IntoIterator<Item = impl Future<Output = T> + Send + 'static>,
) -> Vec<T> {
    let running: Vec<_> = tasks.into_iter().map(tokio::spawn).collect();
    let mut outcomes = Vec::with_capacity(running.len());
    for task in running {
        // A panic there has been reported already.
        outcomes.extend(task.await);
    }
    outcomes
}

/// Whether an attempt has failed at a disk, before it had opened the group's state.
fn is_of_the_disk(cause: &(dyn Error + 'static)) -> bool {
    use DiskError::{Damaged, Other, Resized};
    let judged = cause.downcast_ref::<DiskError>();
    cause.is::<BackingError>()
        || judged
            .is_some_and(|error| matches!(error, Other { .. } | Resized { .. } | Damaged { .. }))
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
        let found = groups.get(group).ok_or_else(|| self.absent(group))?;
        let position = found.mark(name).await.map_err(ApiError::conflict)?;
        Ok(Marked { position, durable_seq: found.durable(), wall_ns: wall_ns() })
    }

    async fn verify(&self, group: &str, volume: Option<&str>) -> Result<VerifyStarted, ApiError> {
        let groups = self.groups.lock().await;
        let found = groups.get(group).ok_or_else(|| self.absent(group))?;
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

    async fn reload(self: &Arc<Self>) -> Result<Reloaded, ApiError> {
        let Some(directory) = &self.directory else {
            return Err(ApiError::conflict("this agent has no configuration directory"));
        };
        let _reloading = self.reloading.lock().await;
        let loaded = AgentConfig::load(directory).and_then(Loaded::whole);
        let loaded =
            loaded.map_err(|error| ApiError::conflict(format!("{error}; nothing was changed")))?;
        if self.is_ending() {
            return Err(ApiError::unavailable(STOPPING));
        }
        let mut reloaded = Reloaded::default();
        // Those that are being started may run in a moment.
        let mut known: BTreeSet<String> = self.changes.under_way().into_iter().collect();
        known.extend(self.groups.lock().await.keys().cloned());
        known.retain(|name| loaded.config.group(name).is_none());
        for fault in loaded.faults {
            let error = fault.error.to_string();
            known.remove(&fault.group);
            if !self.groups.lock().await.contains_key(&fault.group) {
                self.put_off_file(&fault.group, error.clone());
            }
            reloaded.failed.push(GroupFailure { group: fault.group, error });
        }
        let stops = known.into_iter().map(|name| {
            let agent = self.clone();
            async move {
                let stopped = agent.stop_group(&name).await;
                (name, stopped)
            }
        });
        for (name, stopped) in side_by_side(stops).await {
            match stopped {
                Ok(()) => reloaded.stopped.push(name),
                // It did not run, or another has stopped it.
                Err(error) if error.code == ErrorCode::NotFound => {}
                Err(error) => {
                    reloaded.failed.push(GroupFailure { group: name, error: error.to_string() });
                }
            }
        }
        let starts = loaded.config.groups.into_iter().map(|group| {
            let agent = self.clone();
            async move {
                let name = group.name.as_str().to_owned();
                let _change = agent.changes.begin(&name).await;
                let running = agent.groups.lock().await.contains_key(&name);
                let started = if running { None } else { agent.start_configured(&name).await };
                (name, started)
            }
        });
        for (name, started) in side_by_side(starts).await {
            match started {
                Some(Ok(())) => reloaded.started.push(name),
                Some(Err(error)) => reloaded.failed.push(GroupFailure { group: name, error }),
                None => {}
            }
        }
        self.forget_stale_rings().await;
        Ok(reloaded)
    }

    async fn stop_group(&self, group: &str) -> Result<(), ApiError> {
        let _change = self.changes.begin(group).await;
        if self.is_ending() {
            return Err(ApiError::unavailable(STOPPING));
        }
        let Some(reserving) = self.groups.lock().await.get(group).map(Group::reserve) else {
            // Nor is it tried again, before somebody asks for it.
            self.late.forget(group);
            self.forget_stale_rings().await;
            return Err(unknown(group));
        };
        let conflict = |error: anyhow::Error| ApiError::conflict(format!("{error:#}"));
        let reserved = reserving.await.map_err(conflict)?;
        // Nobody else takes it out.
        let taken = self.groups.lock().await.remove(group);
        let mut found = taken.ok_or_else(|| unknown(group))?;
        if let Err(error) = found.remove_devices(reserved).await {
            self.groups.lock().await.insert(group.to_owned(), found);
            return Err(conflict(error));
        }
        found.stop(STOP_PATIENCE).await;
        self.rings.forget(found.config().id);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
