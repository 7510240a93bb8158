//! The ring with which a group starts: the one that was left behind for it, or a new one.

use std::{os::fd::OwnedFd, sync::Arc};

use anyhow::Context;
use tidemark_journal::{Position, Record};

use crate::{
    capture::ring::{
        self, About, Inherited, Layout, NotOurs, RingMemory, RingReader, RingWriter, SlotRef,
    },
    clock::JournalClock,
    dirty::RegionId,
    outbox::{self, Kept, Outbox},
    state::{files::Found, recovery::LeftRing},
};

/// A ring that was left behind, and that can be gone on with.
pub(super) struct Left {
    inherited: Inherited,
    frames: Kept,
    beyond_spool: bool,
}

/// Both ends of a ring and its frames, ready to be used.
pub(super) struct ReadyRing {
    pub writer: RingWriter,
    pub reader: RingReader,
    pub outbox: Arc<Outbox>,
    /// What the disk may not have of it, and what it refused.
    pub redo: Vec<(SlotRef, Record)>,
    pub failed: Vec<(SlotRef, Record)>,
}

/// The ring that was left behind for a group, if it is the one of which its state speaks. `about`
/// then says what it is. One that is not is told in the log. `spool_end` is the last position in the
/// spool.
pub(super) fn find(
    passed: Vec<OwnedFd>,
    group: &str,
    found: &Found,
    about: &mut About,
    layout: Layout,
    spool_end: Option<Position>,
) -> Option<Left> {
    let state = found.state?;
    let fork_seq = found.ancestry.as_ref()?.current().fork_seq;
    for fd in passed {
        let wanted = About { id: state.ring, ..about.clone() };
        let adopt = || -> Result<(Left, JournalClock), NotOurs> {
            let (memory, clock) = RingMemory::adopt(fd, &wanted, layout, state.term)?;
            let mut frames = outbox::kept(&memory, about.group, state.term)?;
            let beyond_spool = frames.join(&memory, spool_end, state.acked.seq, fork_seq)?;
            let term = fork_seq..=state.ceiling;
            let inherited = ring::inherit(memory, &about.volumes, frames.last(), term)?;
            Ok((Left { inherited, frames, beyond_spool }, clock))
        };
        match adopt() {
            Ok((left, clock)) => {
                *about = About { clock, ..wanted };
                return Some(left);
            }
            Err(error) => tracing::warn!(
                group,
                %error,
                "the ring of the agent before is dropped, and what may differ is compared"
            ),
        }
    }
    None
}

impl Left {
    /// What it says, for the decision whether it counts.
    pub fn says(&self) -> LeftRing {
        let regions = |(_, record): &(SlotRef, Record)| {
            let (volume, last) = (record.volume, tidemark_journal::Sector(record.end().0 - 1));
            let first = RegionId::of(volume, record.start).index;
            (first..=RegionId::of(volume, last).index).map(move |index| RegionId { volume, index })
        };
        LeftRing {
            last_seq: self.inherited.last_seq,
            framed: self.inherited.framed,
            gaps: self.inherited.gaps.clone(),
            unflushed: self.inherited.unflushed.clone(),
            failed: self.inherited.failed.iter().flat_map(regions).collect(),
            beyond_spool: self.beyond_spool,
        }
    }

    /// Goes on with it.
    pub fn ring(self) -> ReadyRing {
        ReadyRing {
            writer: self.inherited.writer(),
            reader: self.inherited.reader(),
            outbox: self.frames.outbox(self.inherited.memory().clone()),
            redo: self.inherited.redo,
            failed: self.inherited.failed,
        }
    }
}

/// A new, empty ring.
pub(super) fn new_ring(about: &About, layout: Layout) -> anyhow::Result<ReadyRing> {
    let memory = RingMemory::create(about, layout).context("memory for the ring")?;
    Ok(ReadyRing {
        writer: RingWriter::new(memory.clone()),
        reader: RingReader::new(memory.clone()),
        outbox: Outbox::new(memory),
        redo: Vec::new(),
        failed: Vec::new(),
    })
}
