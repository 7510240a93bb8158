//! What the agent keeps of a group on its own disk, and what follows from it after a restart.
//!
//! ```text
//! STATE-DIR/GROUP/
//!   state        two blocks, written in turn: the reserved ceilings, the last acknowledgement
//!   terms.json   the path of terms, replaced as a whole; and terms.copy.json, the same again
//!   active.log   the dirty map's log of active regions
//!   N.map        the dirty map's bitmap of volume N
//!   leases       whether the target may hold a zero-loss lease, replaced as a whole
//!   disks.json   which disks they are (see [`crate::disks`]), replaced as a whole
//!   verify.json  the last verify and the one under way (see [`crate::verify`]), replaced as a whole
//! ```
//!
//! Of the first four there are two copies of everything that is in them, so that what rots in one is no loss.
//!
//! [`block`] is the state block, [`files`] reads and writes the directory on its [`disk`], [`keeper`] is
//! the thread that does so while the group runs, [`leases`] what it says of leases, [`recovery`] decides what a restart means, [`replace`]
//! replaces small files, [`terms`] is how the path is written down.

pub mod block;
pub mod disk;
pub mod files;
pub mod keeper;
pub mod leases;
pub mod recovery;
pub mod replace;
pub mod terms;

/// The highest that anything counted by an agent has come to: above it, what a file or a ring says is
/// damaged, since sums with it would overflow.
pub const COUNT_MAX: u64 = 1 << 62;

/// Why a group's state cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file system said no.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// The step, as a verb.
        what: &'static str,
        /// The file.
        path: std::path::PathBuf,
        /// The error.
        source: std::io::Error,
    },
    /// Another process has the group.
    #[error("{0} is in use by another agent; stop that one first")]
    Locked(std::path::PathBuf),
    /// The directory belongs to another group.
    #[error(
        "{path} holds the state of group id {found}, not of {expected}; give this group another \
         name, or unprotect the old one first"
    )]
    OtherGroup {
        /// The directory.
        path: std::path::PathBuf,
        /// The id in the configuration.
        expected: tidemark_journal::GroupId,
        /// The id in the directory.
        found: tidemark_journal::GroupId,
    },
    /// No copy of the state block, or of the terms, can be read.
    #[error(
        "{0} is damaged; its history cannot be continued. Move the directory away to start anew: \
         everything will be compared with the target"
    )]
    Damaged(std::path::PathBuf),
}
