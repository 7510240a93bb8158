//! The target's clocks.

use std::time::{SystemTime, UNIX_EPOCH};

/// The wall clock, nanoseconds since 1970.
pub fn wall_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// A wall clock time as people read it, in UTC with what fraction there is.
pub fn format_wall(wall_ns: i64) -> String {
    jiff::Timestamp::from_nanosecond(wall_ns.into())
        .map_or_else(|_| format!("{wall_ns} ns"), |time| time.to_string())
}
