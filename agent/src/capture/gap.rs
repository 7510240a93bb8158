//! Gaps: the stretches of a volume's order that were not captured.

use tidemark_journal::GapReason;

/// An open gap of a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gap {
    /// Why it began.
    pub reason: GapReason,
    /// Whether its gap-begin is recorded: not while the ring has no room for it. No other record of
    /// the group is drawn before it.
    pub begun: bool,
}

impl Gap {
    /// A gap that still owes its record.
    pub fn owed(reason: GapReason) -> Gap {
        Gap { reason, begun: false }
    }
}
