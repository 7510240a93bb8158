//! The groups of a target: which are configured, which have a replica, who is connected.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::Context;
use tidemark_link::message::{Heartbeat, Hello};
use tokio::{
    sync::{Notify, mpsc},
    time::Instant,
};

use crate::{
    catalogue::{Catalogue, GroupRow},
    config::{GroupConfig, StoreConfig},
    machine::Machine,
    receiver::driver::blocking,
    replica::Replica,
    store::{log::Owner, segment::Caches},
};

/// The groups of a target.
pub struct Groups {
    configs: Vec<GroupConfig>,
    store: StoreConfig,
    dir: PathBuf,
    catalogue: Arc<Catalogue>,
    caches: Arc<Caches>,
    /// Owners of logs, for the logs' thread to run.
    owners: mpsc::UnboundedSender<Owner>,
    /// A window should be looked at.
    attention: Arc<Notify>,
    table: Mutex<BTreeMap<String, Entry>>,
    /// Held while a replica is made: a source may greet again before that has come to its end.
    making: Mutex<()>,
}

#[derive(Default)]
struct Entry {
    replica: Option<Arc<Replica>>,
    /// Why there is a replica and it could not be opened: it is left alone until the next start.
    failure: Option<Arc<str>>,
    session: Option<SessionStatus>,
    received: Received,
}

/// What has been received since the start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Received {
    /// Frames.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// A connected source.
#[derive(Clone, Copy, Debug)]
pub struct SessionStatus {
    /// Since when, nanoseconds since 1970.
    pub since_wall_ns: i64,
    /// When the last heartbeat came.
    pub heard: Option<Instant>,
    /// The source's wall clock less this one's at the last heartbeat, nanoseconds; the time the
    /// heartbeat took is in it.
    pub clock_ahead_ns: i64,
}

impl Groups {
    /// The groups of a configuration, with the replicas that the catalogue knows. One that cannot be
    /// opened does not keep the others from it.
    pub fn open(
        configs: &[GroupConfig],
        store: StoreConfig,
        dir: &Path,
        catalogue: &Arc<Catalogue>,
        owners: mpsc::UnboundedSender<Owner>,
    ) -> Groups {
        let pages = store.page_cache.0 / 4096;
        let chunks = store.chunk_cache.0 / tidemark_journal::chunk::CHUNK_BYTES_MAX as u64;
        let groups = Groups {
            configs: configs.to_vec(),
            store,
            dir: dir.to_owned(),
            catalogue: Arc::clone(catalogue),
            caches: Caches::on(catalogue.machine(), pages as usize, chunks as usize),
            owners,
            attention: Arc::default(),
            table: Mutex::default(),
            making: Mutex::default(),
        };
        for config in configs {
            let name = config.name.as_str();
            let known = groups.row(name).and_then(|row| match row {
                Some(_) => groups.open_replica(config).map(Some),
                None => Ok(None),
            });
            let mut entry = Entry::default();
            match known {
                Ok(replica) => entry.replica = replica,
                Err(error) => {
                    let why = format!(
                        "the replica of '{name}' could not be opened ({error:#}): put right what \
                         is wrong there and restart the target"
                    );
                    tracing::error!(group = name, "{why}");
                    entry.failure = Some(why.into());
                }
            }
            groups.table().insert(name.to_owned(), entry);
        }
        groups
    }

    /// What the configuration says.
    pub fn configs(&self) -> &[GroupConfig] {
        &self.configs
    }

    /// The catalogue.
    pub fn catalogue(&self) -> &Arc<Catalogue> {
        &self.catalogue
    }

    /// The machine that everything is kept on.
    pub fn machine(&self) -> &Machine {
        self.catalogue.machine()
    }

    /// How logs are kept.
    pub fn store(&self) -> &StoreConfig {
        &self.store
    }

    /// The caches of all logs.
    pub fn caches(&self) -> &Arc<Caches> {
        &self.caches
    }

    /// Waits until a window should be looked at before its time.
    pub async fn attention(&self) {
        self.attention.notified().await;
    }

    /// Has a log's owner run on the logs' thread.
    ///
    /// # Errors
    /// When the target is ending.
    pub fn run_owner(&self, owner: Owner) -> anyhow::Result<()> {
        self.owners.send(owner).ok().context("the target is ending")
    }

    /// A group's row in the catalogue.
    ///
    /// # Errors
    /// When the catalogue or the row cannot be read.
    pub fn row(&self, name: &str) -> anyhow::Result<Option<GroupRow>> {
        self.catalogue.group(name).context("cannot read its row in the catalogue")
    }

    /// Why a group's replica could not be opened, if that is so.
    pub fn failure(&self, name: &str) -> Option<Arc<str>> {
        self.table().get(name)?.failure.clone()
    }

    /// Why there is no replica of this name to be used, as a sentence.
    pub fn absence(&self, name: &str) -> String {
        self.failure(name).map_or_else(
            || format!("this target has no replica of a group '{name}'"),
            |why| why.to_string(),
        )
    }

    /// A group's replica.
    pub fn replica(&self, name: &str) -> Option<Arc<Replica>> {
        self.table().get(name)?.replica.clone()
    }

    /// All replicas.
    pub fn replicas(&self) -> Vec<Arc<Replica>> {
        self.table().values().filter_map(|entry| entry.replica.clone()).collect()
    }

    /// A configured group's replica, made when it is greeted for the first time.
    ///
    /// # Errors
    /// When the catalogue or the log cannot be written.
    pub async fn take_on(
        self: &Arc<Self>,
        name: &str,
        hello: &Hello,
    ) -> anyhow::Result<Arc<Replica>> {
        if let Some(replica) = self.replica(name) {
            return Ok(replica);
        }
        if let Some(why) = self.failure(name) {
            anyhow::bail!("{why}");
        }
        let (groups, name, hello) = (Arc::clone(self), name.to_owned(), hello.clone());
        blocking(&self.machine().clone(), move || {
            let _making = groups.making.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(replica) = groups.replica(&name) {
                return Ok(replica);
            }
            let config = groups.configs.iter().find(|config| config.name.as_str() == name);
            let config = config.context("the group is not configured")?;
            if groups.row(&name)?.is_none() {
                Replica::create(config, &groups.catalogue, &hello)?;
            }
            let replica = groups.open_replica(config)?;
            groups.table().entry(name).or_default().replica = Some(Arc::clone(&replica));
            Ok(replica)
        })
        .await
    }

    /// Groups of which there is a replica and no configuration.
    ///
    /// # Errors
    /// When the catalogue cannot be read.
    pub fn unconfigured(&self) -> anyhow::Result<Vec<String>> {
        let mut names = self.catalogue.groups()?;
        names.retain(|name| !self.is_configured(name));
        Ok(names)
    }

    /// Removes all that is kept of a group that is not configured any more, so that nobody uses
    /// it. False if nothing is. What was cut short is finished by another call.
    ///
    /// # Errors
    /// When it is configured, or the catalogue or the files cannot be removed.
    pub fn forget(&self, name: &str) -> anyhow::Result<bool> {
        anyhow::ensure!(!self.is_configured(name), "the group '{name}' is configured");
        if self.catalogue.group(name)?.is_none() {
            return Ok(false);
        }
        let dir = self.dir.join(name);
        let removed = self.machine().remove_dir_all(&dir);
        removed.with_context(|| format!("cannot remove {}", dir.display()))?;
        self.catalogue.forget(name)?;
        tracing::info!(group = name, "forgotten");
        Ok(true)
    }

    /// Lets the owners of all logs end.
    pub fn end_logs(&self) {
        self.replicas().iter().for_each(|replica| replica.writer().end());
    }

    /// A source's session has begun.
    pub fn connected(&self, name: &str) {
        let status = SessionStatus {
            since_wall_ns: self.machine().wall_ns(),
            heard: None,
            clock_ahead_ns: 0,
        };
        self.table().entry(name.to_owned()).or_default().session = Some(status);
    }

    /// A source's session has ended.
    pub fn disconnected(&self, name: &str) {
        if let Some(entry) = self.table().get_mut(name) {
            entry.session = None;
        }
    }

    /// A frame of so many bytes has come.
    pub fn received(&self, name: &str, bytes: u64) {
        if let Some(entry) = self.table().get_mut(name) {
            entry.received.frames += 1;
            entry.received.bytes += bytes;
        }
    }

    /// A heartbeat has come.
    pub fn heard(&self, name: &str, heartbeat: &Heartbeat, received_wall_ns: i64) {
        if let Some(session) = self.table().get_mut(name).and_then(|entry| entry.session.as_mut()) {
            session.heard = Some(Instant::now());
            session.clock_ahead_ns = heartbeat.wall_ns.saturating_sub(received_wall_ns);
        }
    }

    /// A group's session, and what has been received since the start.
    pub fn session(&self, name: &str) -> (Option<SessionStatus>, Received) {
        let table = self.table();
        table.get(name).map(|entry| (entry.session, entry.received)).unwrap_or_default()
    }

    fn open_replica(&self, config: &GroupConfig) -> anyhow::Result<Arc<Replica>> {
        let dir = self.dir.join(config.name.as_str());
        // What a crash has left in the middle is brought to its end, which takes room.
        let open = || {
            Replica::open(config, &self.store, &dir, &self.catalogue, &self.caches, &self.attention)
        };
        let (replica, owner) = self.catalogue.reserve().with_room(open)?;
        self.run_owner(owner)?;
        Ok(Arc::new(replica))
    }

    fn is_configured(&self, name: &str) -> bool {
        self.configs.iter().any(|config| config.name.as_str() == name)
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
