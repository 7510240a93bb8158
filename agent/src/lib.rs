//! The agent: sits in front of a disk, captures every write in order and sends it.
//!
//! The way of a write: a [`front`] hands it to the [`engine`], which does what the [`capture`] core
//! decides: range lock, [`dirty`] map, ring slot, sequence, local disk. The [`encoder`] makes frames
//! of committed records, the [`outbox`] keeps them (and the [`spool`], on a disk, what does not fit in
//! memory), the [`link`] sends them until the target has them durably; in sync mode ([`lease`]) answers wait for
//! that. [`state`] is what survives a
//! crash of the machine, and [`rings`] one of the agent; [`disks`] tells whether the disks are those
//! that were protected; [`verify`] is the comparison on a schedule; [`group`] puts the parts together;
//! [`agent::Agent`] holds the groups and answers the local [`api`]; [`passthrough`] serves the devices
//! without any of that. [`kernel`] is where kernel
//! interfaces are spoken.

pub mod agent;
pub mod api;
pub mod capture;
pub mod carriers;
pub mod clock;
pub mod config;
pub mod daemon;
pub mod dirty;
pub mod disks;
pub mod encoder;
pub mod engine;
pub mod front;
pub mod group;
pub mod kernel;
pub mod ladder;
pub mod lag;
pub mod lease;
pub mod link;
pub mod outbox;
pub mod passthrough;
pub mod progress;
pub mod rings;
pub mod spool;
pub mod state;
pub mod verify;

pub use agent::Agent;
