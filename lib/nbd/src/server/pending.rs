//! Connections that have not entered an export yet: whoever can reach the port can make them, so they
//! are few, and one makes room when there are too many: the oldest of the network that has the most.
//! Whoever makes many cuts its own.
//!
//! A client that says nothing, or speaks slowly, therefore costs others nothing: it is cut as soon as
//! somebody else wants its place, and else after [`Limits::option_timeout`](super::Limits).

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// The connections in their handshake, in the order in which they came.
#[derive(Default)]
pub(super) struct Pending(Mutex<Waiting>);

#[derive(Default)]
struct Waiting {
    next: u64,
    cut: BTreeMap<u64, (Option<IpAddr>, Arc<Notify>)>,
}

/// One of them; dropped, it is none any more.
pub(super) struct Newcomer {
    pending: Arc<Pending>,
    number: u64,
    cut: Arc<Notify>,
}

impl Pending {
    /// Takes a connection in. If there are `max` already, one is cut.
    pub(super) fn admit(self: &Arc<Self>, max: usize, from: Option<IpAddr>) -> Newcomer {
        while self.waiting().cut.len() >= max.max(1) {
            self.cut_one();
        }
        let cut = Arc::new(Notify::new());
        let mut waiting = self.waiting();
        let number = waiting.next;
        waiting.next += 1;
        waiting.cut.insert(number, (from, Arc::clone(&cut)));
        Newcomer { pending: Arc::clone(self), number, cut }
    }

    /// Cuts one, so that its place becomes free.
    pub(super) fn cut_one(&self) {
        let mut waiting = self.waiting();
        let mut numbers: HashMap<Option<IpAddr>, usize> = HashMap::new();
        for (from, _) in waiting.cut.values() {
            *numbers.entry(*from).or_default() += 1;
        }
        let most = numbers.values().copied().max();
        let oldest = waiting.cut.iter().find(|(_, (from, _))| numbers.get(from).copied() == most);
        let oldest = oldest.map(|(number, _)| *number);
        if let Some((_, cut)) = oldest.and_then(|number| waiting.cut.remove(&number)) {
            cut.notify_one();
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Newcomer {
    /// The handshake is over: it is not cut for others any more.
    pub(super) fn entered(&self) {
        self.pending.waiting().cut.remove(&self.number);
    }

    /// Resolves when its place is wanted for another; never once it has entered.
    pub(super) async fn unwanted(&self) {
        self.cut.notified().await;
    }
}

impl Drop for Newcomer {
    fn drop(&mut self) {
        self.entered();
    }
}
