//! Gaps: the stretches of a volume's order that were not captured.

use tidemark_journal::{GapReason, Seq};

/// An open gap of a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gap {
    /// Why it began.
    pub reason: GapReason,
    /// Its gap-begin; none while the ring has no room for that record. No other record of the
    /// group is drawn before it.
    pub begin: Option<Seq>,
}

impl Gap {
    /// A gap that still owes its record.
    pub fn owed(reason: GapReason) -> Gap {
        Gap { reason, begin: None }
    }
}
