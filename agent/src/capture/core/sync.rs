//! Sync mode in the core: which answers are held back, and what is granted.

use std::time::Duration;

use tidemark_journal::Seq;

use super::{
    super::{Effect, RequestId},
    Core,
};
use crate::lease::{Facts, Peer, SyncMode, View};

impl Core {
    /// Begins with this; to be called first of all. Without it, answers wait for nothing.
    pub fn begin_sync(&mut self, sync: SyncMode) {
        self.sync = sync;
    }

    /// The link has come to another end, or to none.
    pub fn peer(&mut self, peer: Peer) {
        self.peer = peer;
    }

    /// The target asks for a lease. The core has to have been told the time since the question came
    /// ([`Self::set_now`]). How long the target may hold one, if it may.
    pub fn lease_asked(&mut self) -> Option<Duration> {
        let facts = self.facts();
        self.sync.asked(&facts)
    }

    /// The state says durably what [`Effect::NoteLease`] wanted.
    pub fn lease_noted(&mut self) {
        self.sync.noted();
    }

    /// No lease is granted any more.
    pub fn stop_leases(&mut self) {
        self.sync.stop();
    }

    /// Whether a target may hold a lease.
    pub fn has_granted(&self) -> bool {
        self.sync.has_granted()
    }

    /// Whether answers wait for the target: then what is on its way to it should hurry.
    pub fn holds_answers(&self) -> bool {
        self.sync.holds()
    }

    /// How sync mode stands, and how many answers are held back.
    pub fn sync_view(&self) -> (View, usize) {
        (self.sync.view(), self.answers.len())
    }

    /// All parts of a request are through: it is answered, now or when it may be.
    pub(super) fn answer(
        &mut self,
        request: RequestId,
        result: Result<(), i32>,
        needs: Option<Seq>,
    ) {
        if self.sync.holds() {
            self.answers.hold((request, result), needs, self.now_ns);
        } else {
            self.effects.push_back(Effect::Complete { request, result });
        }
    }

    /// What was captured and is on its way to the target is dropped: no later acknowledgement is about it.
    pub(super) fn forget_what_is_on_its_way(&mut self) {
        self.answers.make_endless();
        for request in self.requests.iter_mut() {
            request.needs = None;
        }
    }

    pub(super) fn poll_sync(&mut self) {
        if self.sync.is_idle() {
            return;
        }
        let facts = self.facts();
        self.sync.turn(&facts);
        if let Some(lease) = self.sync.to_note() {
            self.effects.push_back(Effect::NoteLease(lease));
        }
        let (durable, holds, effects) = (self.durable, self.sync.holds(), &mut self.effects);
        self.answers.release(durable, holds, |(request, result)| {
            effects.push_back(Effect::Complete { request, result });
        });
    }

    fn facts(&self) -> Facts {
        Facts {
            now_ns: self.now_ns,
            last_seq: self.last_seq,
            durable: self.durable,
            whole: self.is_whole(),
            peer: self.peer,
            waiting_since_ns: self.answers.waiting_since_ns(),
        }
    }

    /// Whether everything on the disks is what its last record says.
    fn is_whole(&self) -> bool {
        !self.overflow
            && !self.doubt
            && self.failed.is_empty()
            && self.volumes.iter().all(|volume| volume.gap.is_none())
            && !self.map.has_uncaptured()
            && !self.catch_up.has_found_differences()
            && !self.answers.has_endless()
    }
}
