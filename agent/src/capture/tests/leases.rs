//! Sync mode in the simulator: a target that asks for leases, and what it may lack while it holds one.

use std::time::Duration;

use tidemark_link::lease::LEASE;

use super::{super::Request, sim::Sim};
use crate::{
    capture::catchup::Mode,
    lease::{Peer, SyncMode},
};

/// What concerns leases.
pub struct Leases {
    /// How long answers wait, if the group is to be in sync.
    pub timeout: Option<Duration>,
    /// The longest lease that the state disk names.
    pub noted: Option<Duration>,
    /// The target holds a lease until then.
    until_ns: u64,
    /// Until then nothing is to be seen from the disks.
    blind_until_ns: u64,
    /// Requests that died with their agent, and when.
    lost: Vec<(u64, Request)>,
    /// Looks at what the target lacks.
    pub looks: u64,
}

impl Leases {
    pub fn new(timeout: Option<Duration>) -> Leases {
        let lost = Vec::new();
        Leases { timeout, noted: None, until_ns: 0, blind_until_ns: 0, lost, looks: 0 }
    }
}

fn lease_ns() -> u64 {
    LEASE.as_nanos() as u64
}

impl Sim {
    /// A core begins; with what an earlier one has left.
    pub fn begin_sync(&mut self) {
        let mode = SyncMode::new(self.leases.timeout, self.leases.noted, self.now_ns);
        self.core.set_now(self.now_ns);
        self.core.begin_sync(mode);
    }

    /// The link is up or down for leases as well.
    pub fn set_peer(&mut self, link: Option<Mode>) {
        self.core.peer(if link.is_some() { Peer::Able } else { Peer::Away });
    }

    /// The target asks now and then, and keeps up better than without.
    pub fn step_leases(&mut self) {
        if self.leases.timeout.is_none() {
            return;
        }
        if self.random.percent(30) {
            self.encode(20);
            self.acknowledge(20);
        }
        if self.link.is_some()
            && self.random.percent(20)
            && let Some(lease) = self.core.lease_asked()
        {
            self.leases.until_ns = self.now_ns + lease.as_nanos() as u64;
        }
        self.check_lease();
    }

    /// The agent dies with these requests.
    pub fn lost_for_leases(&mut self, lost: &[Request]) {
        let now_ns = self.now_ns;
        self.leases.lost.retain(|(at, _)| at + lease_ns() > now_ns);
        self.leases.lost.extend(lost.iter().map(|request| (now_ns, *request)));
    }

    /// The disk has lost what the target has.
    pub fn disk_is_behind(&mut self) {
        self.leases.blind_until_ns = self.now_ns + lease_ns();
    }

    /// The target is another, and holds nothing.
    pub fn other_target(&mut self) {
        self.leases.until_ns = 0;
    }

    /// While the target holds a lease, it has what the disks have, but for what nobody was answered.
    pub fn check_lease(&mut self) {
        let now_ns = self.now_ns;
        if now_ns >= self.leases.until_ns || now_ns < self.leases.blind_until_ns || self.rotten {
            return;
        }
        self.leases.looks += 1;
        let mut open: Vec<Vec<bool>> =
            self.disks.iter().map(|disk| vec![false; disk.len()]).collect();
        let unanswered =
            self.asked.iter().filter(|asked| asked.answered_at.is_none() && !asked.lost);
        let lost = self.leases.lost.iter().filter(|(at, _)| at + lease_ns() > now_ns);
        let requests = unanswered.map(|asked| asked.request).chain(lost.map(|(_, lost)| *lost));
        for request in requests {
            let range = self.grain.range(request.start.0, request.sectors);
            open[usize::from(request.volume.0) - 1][range].fill(true);
        }
        for (volume, disk) in self.disks.iter().enumerate() {
            let durable = &self.durable.volumes[volume];
            for (grain, number) in disk.iter().enumerate() {
                assert!(
                    durable[grain] == *number
                        || open[volume][grain]
                        || self.durable.unknown[volume][grain],
                    "a lease is held, and the target has {:x} of volume {volume}, grain {grain}, which \
                     is {number:x} on the disk",
                    durable[grain]
                );
            }
        }
    }
}
