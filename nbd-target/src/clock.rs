//! Wall clock times as people read them.

/// A wall clock time as people read it, in UTC with what fraction there is.
pub fn format_wall(wall_ns: i64) -> String {
    jiff::Timestamp::from_nanosecond(wall_ns.into())
        .map_or_else(|_| format!("{wall_ns} ns"), |time| time.to_string())
}
