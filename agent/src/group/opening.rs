//! How a group is opened: from what its state directory and a ring that was left behind say, to
//! everything that then runs, but for threads, disks and the network.

use std::{os::fd::OwnedFd, path::Path, sync::Arc, time::Duration};

use anyhow::Context;
use tidemark_journal::{GroupId, Seq, VolumeId};

use super::handover::{self, Left};
use crate::{
    capture::{
        core::{Core, VolumeStart},
        ring::{About, Layout, RingReader},
    },
    clock::JournalClock,
    dirty::{map::DirtyMap, regions_in},
    encoder::Place,
    lease::SyncMode,
    outbox::Outbox,
    state::{
        block::GroupState,
        files::{Found, StateFiles},
        recovery::{self, LeftSpool, TIME_RESERVE_NS},
    },
};

/// What is to be opened.
pub struct Opening<'a> {
    /// The group.
    pub group: GroupId,
    /// Its name, for people.
    pub name: &'a str,
    /// Its volumes and their sectors.
    pub volumes: &'a [(VolumeId, u64)],
    /// How a ring's memory is divided.
    pub layout: Layout,
    /// How many regions are active at once at most: what is compared after a power cut.
    pub active_max: usize,
    /// Rings that were left behind.
    pub rings: Vec<OwnedFd>,
    /// How long an answer waits for the target; none if the group is not to be in sync.
    pub sync_timeout: Option<Duration>,
    /// Ids for what has to be made: a term, a map, a ring.
    pub fresh: [[u8; 16]; 3],
}

/// A group that can run.
pub struct Opened {
    /// The state's files.
    pub files: StateFiles,
    /// What was written there just now.
    pub state: GroupState,
    /// The path of terms.
    pub ancestry: tidemark_journal::Ancestry,
    /// Journal time.
    pub clock: JournalClock,
    /// Where encoded history goes on.
    pub place: Place,
    /// The encoder's end of the ring.
    pub reader: RingReader,
    /// The frames.
    pub outbox: Arc<Outbox>,
    /// The capture core, which has taken over what another agent was in the middle of.
    pub core: Core,
    /// Whether a ring that was left behind is gone on with.
    pub with_ring: bool,
    /// Whether the ring in use is to be kept instead of all others.
    pub keep_ring: bool,
    /// Whether what is in the spool is sent; else it is removed.
    pub with_spool: bool,
    /// Why everything is compared, for people, as far as it follows from the state's files.
    pub doubts: Vec<&'static str>,
}

/// The regions of volumes with so many sectors.
pub fn regions(volumes: &[(VolumeId, u64)]) -> Vec<(VolumeId, u32)> {
    volumes.iter().map(|(id, sectors)| (*id, regions_in(*sectors))).collect()
}

impl Opening<'_> {
    /// Decides how the group goes on, makes that durable, and makes the parts ready. `spool` is what
    /// was found in the spool.
    ///
    /// # Errors
    /// The state cannot be written or contradicts itself; there is no memory for a ring.
    pub fn open(
        self,
        dir: &Path,
        mut files: StateFiles,
        found: &Found,
        spool: Option<LeftSpool>,
    ) -> anyhow::Result<Opened> {
        let regions = regions(self.volumes);
        let mut about = About {
            group: self.group,
            id: 0,
            clock: JournalClock::after(0),
            volumes: self.volumes.to_vec(),
        };
        let several = self.rings.len() > 1;
        let spool_end = spool.map(|spool| spool.end);
        let left = handover::find(self.rings, self.name, found, &mut about, self.layout, spool_end);
        let fresh = [self.fresh[0], self.fresh[1]];
        let said = left.as_ref().map(Left::says);
        let start =
            recovery::decide(dir, self.group, &regions, found, said.as_ref(), spool, fresh)?;
        match (&said, start.with_ring) {
            (Some(said), true) => tracing::info!(
                group = self.name,
                sequence = said.last_seq.0,
                "going on with the ring of the agent before"
            ),
            (Some(_), false) => tracing::warn!(
                group = self.name,
                "the ring of the agent before does not fit the state, and is dropped"
            ),
            (None, _) => {}
        }
        let left = left.filter(|_| start.with_ring);
        if start.new_term {
            files.write_terms(&start.ancestry)?;
        }
        let mut map =
            DirtyMap::new(start.state.map_id, start.generation, start.transaction, start.maps);
        map.limit_active(self.active_max);
        // What recovery found is made durable before anything can be marked on top of it.
        while let Some(commit) = map.begin_commit(Seq::ZERO) {
            files.write_commit(&commit)?;
            map.commit_written();
        }
        let mut state = start.state;
        let ring = match left {
            Some(left) => left.ring(),
            None => {
                about.id = u128::from_le_bytes(self.fresh[2]) as u64;
                about.clock = JournalClock::after(start.time_base_ns);
                handover::new_ring(&about, self.layout)?
            }
        };
        let clock = about.clock;
        state.ring = about.id;
        state.time_ceiling_ns = state.time_ceiling_ns.max(clock.now_ns() + TIME_RESERVE_NS);
        files.write_state(&state).context("the group's state")?;
        if !start.with_ring {
            // The state names it now, and none before it.
            ring.writer.memory().begin_term(state.term, start.last_seq);
        }
        let starts: Vec<VolumeStart> = self
            .volumes
            .iter()
            .zip(&start.gaps)
            .map(|((id, sectors), (_, gap))| VolumeStart { id: *id, sectors: *sectors, gap: *gap })
            .collect();
        let mut core = Core::new(&starts, map, ring.writer, start.last_seq, state.ceiling);
        core.set_now(clock.now_ns());
        core.begin_sync(SyncMode::new(self.sync_timeout, found.lease, clock.now_ns()));
        core.noted(state.acked.seq, state.spooled.seq);
        core.take_over(&ring.redo, &ring.failed);
        if start.new_term {
            core.open_term();
        }
        Ok(Opened {
            files,
            state,
            ancestry: start.ancestry,
            clock,
            place: start.place,
            reader: ring.reader,
            outbox: ring.outbox,
            core,
            with_ring: start.with_ring,
            keep_ring: several || !start.with_ring,
            with_spool: start.with_spool,
            doubts: start.doubts,
        })
    }
}

#[cfg(test)]
mod tests;
