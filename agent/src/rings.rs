//! The rings of all groups, kept by the service manager from one process to the next, and here from
//! one attempt to start a group to the next.

use std::{
    collections::BTreeMap,
    io,
    os::fd::OwnedFd,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tidemark_journal::GroupId;

use crate::{
    capture::ring::RingMemory,
    kernel::process::fdstore::{self, Store},
};

const PREFIX: &str = "ring-";

/// The rings with which groups start.
#[derive(Default)]
pub struct Rings {
    store: Option<Store>,
    /// What the service manager keeps too, but for what it has missed: the ring that was used last, or
    /// what was left behind for this process.
    kept: Mutex<BTreeMap<String, Vec<OwnedFd>>>,
}

impl Rings {
    /// Takes what the service manager has passed to this process. Without one there is nothing, and
    /// nothing is kept beyond this process.
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
        Rings { store, kept: Mutex::new(found) }
    }

    /// The rings that were left behind for a group: one, unless the manager has missed a message. They are
    /// there for the next attempt too, if this one fails.
    ///
    /// # Errors
    /// There is no descriptor for them.
    pub fn left(&self, group: GroupId) -> io::Result<Vec<OwnedFd>> {
        let kept = self.kept();
        kept.get(&name(group)).into_iter().flatten().map(OwnedFd::try_clone).collect()
    }

    /// Has a ring kept, instead of all others of its group. To be called when it is the one of which the
    /// group's state speaks.
    pub fn keep(&self, group: GroupId, ring: &RingMemory) {
        let Some(fd) = ring.region().fd() else { return };
        match fd.try_clone_to_owned() {
            Ok(fd) => drop(self.kept().insert(name(group), vec![fd])),
            Err(error) => {
                self.kept().remove(&name(group));
                tracing::warn!(%group, %error, "the ring is not kept: should the start fail, what may differ \
                    is compared");
            }
        }
        let Some(store) = &self.store else { return };
        let kept = store.remove(&name(group)).and_then(|()| store.keep(&name(group), fd));
        if let Err(error) = kept {
            tracing::warn!(%group, %error, "the service manager does not keep the ring: should the \
                agent die, what may differ is compared");
        }
    }

    /// Has nothing kept for a group any more.
    pub fn forget(&self, group: GroupId) {
        self.kept().remove(&name(group));
        self.remove(&name(group));
    }

    /// Drops what was left behind for groups that are not among these.
    pub fn forget_others(&self, groups: &[GroupId]) {
        let names: Vec<String> = groups.iter().map(|group| name(*group)).collect();
        let stale: Vec<String> =
            self.kept().keys().filter(|kept| !names.contains(kept)).cloned().collect();
        for name in stale {
            self.kept().remove(&name);
            self.remove(&name);
        }
    }

    fn remove(&self, name: &str) {
        if let Some(Err(error)) = self.store.as_ref().map(|store| store.remove(name)) {
            tracing::warn!(name, %error, "the service manager goes on keeping a ring");
        }
    }

    fn kept(&self) -> MutexGuard<'_, BTreeMap<String, Vec<OwnedFd>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn name(group: GroupId) -> String {
    format!("{PREFIX}{group}")
}
