//! One change to a group at a time: whoever starts or stops it, or looks whether to, has the others wait.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::OwnedMutexGuard;

/// The changes under way. Those to different groups do not wait for each other.
#[derive(Default)]
pub(super) struct Changes(Mutex<BTreeMap<String, Arc<tokio::sync::Mutex<()>>>>);

/// The right to change a group, until it is dropped.
pub(super) type Change = OwnedMutexGuard<()>;

impl Changes {
    /// Waits until nobody else changes the group.
    pub async fn begin(&self, group: &str) -> Change {
        self.lock_of(group).lock_owned().await
    }

    /// The same, but none if somebody does.
    pub fn try_begin(&self, group: &str) -> Option<Change> {
        self.lock_of(group).try_lock_owned().ok()
    }

    /// The groups that are being changed, or that somebody waits to change.
    pub fn under_way(&self) -> Vec<String> {
        let locks = self.locks();
        let used = locks.iter().filter(|(_, lock)| Arc::strong_count(lock) > 1);
        used.map(|(group, _)| group.clone()).collect()
    }

    fn lock_of(&self, group: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut locks = self.locks();
        // Those that nobody holds or waits for are kept for nothing.
        locks.retain(|_, lock| Arc::strong_count(lock) > 1);
        locks.entry(group.to_owned()).or_default().clone()
    }

    fn locks(&self) -> MutexGuard<'_, BTreeMap<String, Arc<tokio::sync::Mutex<()>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
