//! The rings of all groups, kept by the service manager from one process to the next.

use std::{
    collections::BTreeMap,
    os::fd::OwnedFd,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tidemark_journal::GroupId;

use crate::{
    capture::ring::RingMemory,
    kernel::process::fdstore::{self, Store},
};

const PREFIX: &str = "ring-";

/// What the service manager keeps for the agent.
#[derive(Default)]
pub struct Rings {
    store: Option<Store>,
    found: Mutex<BTreeMap<String, Vec<OwnedFd>>>,
}

impl Rings {
    /// Takes what the service manager has passed to this process. Without one there is nothing, and
    /// nothing is kept.
    pub fn from_environment() -> Rings {
        let store = Store::from_environment().unwrap_or_else(|error| {
            tracing::warn!(%error, "the service manager cannot be asked to keep rings");
            None
        });
        let mut found = BTreeMap::<String, Vec<OwnedFd>>::new();
        match fdstore::inherited() {
            // Whatever else it passes is not for us and is closed.
            Ok(passed) => passed
                .into_iter()
                .filter(|(name, _)| name.starts_with(PREFIX))
                .for_each(|(name, fd)| found.entry(name).or_default().push(fd)),
            Err(error) => tracing::warn!(%error, "no rings can be taken over"),
        }
        Rings { store, found: Mutex::new(found) }
    }

    /// The rings that were left behind for a group: one, unless the manager has missed a message.
    pub fn take(&self, group: GroupId) -> Vec<OwnedFd> {
        self.found().remove(&name(group)).unwrap_or_default()
    }

    /// Has a ring kept, instead of all others of its group.
    pub fn keep(&self, group: GroupId, ring: &RingMemory) {
        let (Some(store), Some(fd)) = (&self.store, ring.region().fd()) else { return };
        let kept = store.remove(&name(group)).and_then(|()| store.keep(&name(group), fd));
        if let Err(error) = kept {
            tracing::warn!(%group, %error, "the service manager does not keep the ring: should the \
                agent die, what may differ is compared");
        }
    }

    /// Has nothing kept for a group any more.
    pub fn forget(&self, group: GroupId) {
        drop(self.take(group));
        self.remove(&name(group));
    }

    /// Drops what was left behind for groups that are not among these.
    pub fn forget_others(&self, groups: &[GroupId]) {
        let names: Vec<String> = groups.iter().map(|group| name(*group)).collect();
        let stale: Vec<String> =
            self.found().keys().filter(|found| !names.contains(found)).cloned().collect();
        for name in stale {
            self.found().remove(&name);
            self.remove(&name);
        }
    }

    fn remove(&self, name: &str) {
        if let Some(Err(error)) = self.store.as_ref().map(|store| store.remove(name)) {
            tracing::warn!(name, %error, "the service manager goes on keeping a ring");
        }
    }

    fn found(&self) -> MutexGuard<'_, BTreeMap<String, Vec<OwnedFd>>> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn name(group: GroupId) -> String {
    format!("{PREFIX}{group}")
}
