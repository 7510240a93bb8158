//! Capture: what happens between a front and the disk below.
//!
//! [`core::Core`] is a state machine without I/O that holds all volumes of a group. It is fed with
//! requests and completions and answers with [`Effect`]s, which the
//! [engine](crate::engine) carries out on one thread. So taking the range lock, finding room in
//! the ring, drawing the sequence and reserving the slot are one step, and nothing that may block
//! comes after the draw (design invariant 1):
//!
//! 1. the request takes its range lock, or waits its turn;
//! 2. its regions are made active on stable storage (dirty map), or it waits for the next commit;
//! 3. room in the ring is found, or the group falls to the next rung: the write is let through with
//!    its region durably marked *uncaptured*, inside a gap;
//! 4. sequence and slot are drawn; the payload is copied; the slot is committed;
//! 5. the local write is submitted; its completion answers the application, in sync mode
//!    ([`lease`](crate::lease)) when the record is final-durable as well.

pub mod catchup;
pub mod core;
pub mod gap;
pub mod range_lock;
pub mod ring;
mod slab;
#[cfg(test)]
mod tests;

use std::time::Duration;

use tidemark_journal::{Sector, Seq, VolumeId};

use crate::dirty::map::Commit;
use ring::SlotRef;

/// The engine's name for a request of a front.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RequestId(pub u64);

/// The core's name for one part of a request, or for a read of its own.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct OpId(pub u32);

/// What a front asks for. Reads do not pass through the core.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ask {
    /// Write the request's payload.
    Write {
        /// Durable before the answer.
        fua: bool,
    },
    /// Make the range read as zeros.
    Zero {
        /// The disk may unmap it.
        unmap: bool,
        /// Durable before the answer.
        fua: bool,
    },
    /// The range is given up; it reads as zeros afterwards.
    Discard,
    /// Make all completed writes durable.
    Flush,
}

impl Ask {
    /// Whether it is a write that is durable before its answer.
    pub fn is_fua(self) -> bool {
        matches!(self, Ask::Write { fua: true } | Ask::Zero { fua: true, .. })
    }
}

/// A request of a front.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// Its name.
    pub id: RequestId,
    /// The volume.
    pub volume: VolumeId,
    /// What to do.
    pub ask: Ask,
    /// First sector; of no meaning for a flush.
    pub start: Sector,
    /// Sectors; zero for a flush.
    pub sectors: u64,
}

/// Where the bytes of a local write lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Payload {
    /// In the ring.
    Ring(SlotRef),
    /// In the request's own buffer, from this byte on.
    Request(RequestId, u64),
}

/// What to do on the local disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LocalIo {
    /// Write `sectors` from the payload.
    Write {
        /// The bytes.
        payload: Payload,
        /// Durable before completion.
        fua: bool,
    },
    /// Zero the range.
    Zero {
        /// The disk may unmap it.
        unmap: bool,
        /// Durable before completion.
        fua: bool,
    },
    /// Flush the disk's cache.
    Flush,
    /// Read the range into a buffer of the engine, for catch-up.
    Read {
        /// Hash its blocks of 4 KiB as well, for an offer.
        hash: bool,
    },
}

/// What the engine is to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Effect {
    /// Copy the request's payload from `offset` on into the slot, then call
    /// [`core::Core::copied`]. Must not block.
    Copy {
        /// To be named in the call.
        op: OpId,
        /// The request whose payload it is.
        request: RequestId,
        /// Byte of the request's payload.
        offset: u64,
        /// Where it goes.
        slot: SlotRef,
    },
    /// Submit to the local disk; call [`core::Core::local_ended`] (a read: [`core::Core::read_ended`])
    /// when it completes.
    Local {
        /// To be named in the call.
        op: OpId,
        /// The volume.
        volume: VolumeId,
        /// What to do.
        io: LocalIo,
        /// First sector.
        start: Sector,
        /// Sectors.
        sectors: u64,
    },
    /// Answer the front. An error is an errno.
    Complete {
        /// The request.
        request: RequestId,
        /// Whether it succeeded.
        result: Result<(), i32>,
    },
    /// Write a commit of the dirty map: pages, then the log, each durable; then call
    /// [`core::Core::map_committed`].
    CommitMap(Commit),
    /// Durably reserve sequences up to this one, then call [`core::Core::ceiling_reserved`].
    Reserve(Seq),
    /// Durably note that leases of up to so long are granted, or with zero that none are, then call
    /// [`core::Core::lease_noted`].
    NoteLease(Duration),
}
