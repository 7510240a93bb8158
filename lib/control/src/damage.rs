//! What a target says of what has rotted there, and of looking for it.

use serde::{Deserialize, Serialize};
use tidemark_journal::Seq;

/// Points at which some of a volume cannot be read: reads of it fail there, all else is right.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamagedPoints {
    /// The volume.
    pub volume: String,
    /// How much of it cannot be read.
    pub bytes: u64,
    /// The first position concerned.
    pub first_seq: Seq,
    /// The last one; none when the newest is concerned.
    pub last_seq: Option<Seq>,
}

/// How far a group's scrub is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubStatus {
    /// Whether a pass is under way.
    pub running: bool,
    /// When it began, nanoseconds since 1970; zero when none is under way.
    pub started_wall_ns: i64,
    /// Bytes that it has read.
    pub read_bytes: u64,
    /// Bytes that it has to read in all, about.
    pub total_bytes: u64,
    /// Damaged places that it has found.
    pub found: u64,
    /// When the last pass ended, nanoseconds since 1970; zero when there was none.
    pub finished_wall_ns: i64,
    /// Damaged places that it found.
    pub finished_found: u64,
    /// Indexes and ends of segments that were damaged and have been made anew so far.
    pub mended_total: u64,
}
