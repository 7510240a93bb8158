//! A simulated disk with files and directories on it, for tests of what survives.
//!
//! It behaves as the least that a POSIX file system on an honest disk promises, and no better:
//!
//! | what was done | until it is synced | what makes it last |
//! |---|---|---|
//! | a write | each sector of 512 bytes by itself may be there or not after a power cut; of several writes to one sector, any | [`SimFile::sync`] |
//! | a change of length, a hole, room set aside | those of one file survive up to some point, in order | [`SimFile::sync`] |
//! | a file made, renamed, removed | each by itself may have happened or not; a rename is whole or not at all | [`SimDisk::sync_dir`] of its directory |
//! | a directory made | it may be gone, with all that is in it | [`SimDisk::sync_dir`] of its *parent* |
//!
//! Reads see the newest of everything, as through a page cache, until the power is cut.
//!
//! **Lives.** A process that dies ([`SimDisk::kill`]) loses nothing but its handles. A power cut
//! ([`SimDisk::crash`]) decides by the seed what was kept. Handles of an earlier life fail for ever.
//! To cut at an exact place, [`SimDisk::cut_after`] lets so many more *effects* happen (writes,
//! syncs, changes of length and of names), after which everything fails with `EIO` until `crash`.
//! So a test can walk over all effects of a run, one cut at a time.
//!
//! **Faults.** By chance ([`Faults`]) or at a stated place ([`SimDisk::fail`]): reads, writes and
//! syncs that fail, writes that are lost or land elsewhere though they are said to be done.
//! [`SimDisk::rot`] flips a bit, [`SimDisk::set_capacity`] makes the disk small, [`SimDisk::image`]
//! and [`SimDisk::restore`] roll it back. After a failed sync of a file each sector concerned is on the
//! disk or not, by the seed, while reads go on to show it, and no later sync brings it back: as Linux
//! does. (Lengths stay: a file system that cannot write those any more goes read-only.)
//!
//! **Determinism.** Everything follows from the seed and the calls; nothing depends on time, memory
//! or a hash map's order. [`SimDisk::fingerprint`] is a hash of all calls and their outcomes.
//!
//! A block device is a file whose length never changes, made and synced before the test begins.

mod content;
mod disk;
mod fault;
mod file;
mod names;
mod rng;
#[cfg(test)]
mod tests;

pub use disk::{Entry, Image, SimDisk};
pub use fault::{Faults, Op, errno};
pub use file::{How, SimFile};
pub use rng::Rng;

/// What a disk writes whole or not at all.
pub const SECTOR_BYTES: u64 = 512;
