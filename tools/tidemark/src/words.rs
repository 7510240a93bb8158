//! Figures in words.

use std::path::Path;

use jiff::{RoundMode, Timestamp, TimestampRound, Unit};
use tidemark_control::agent::{Ladder, Rung};
use tidemark_control::client::segment;

const SECOND_NS: u64 = 1_000_000_000;

/// `12 B`, `1.5 GiB`.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut rest = count;
    let mut below = 0;
    let mut unit = "B";
    for name in UNITS {
        if rest < 1024 {
            break;
        }
        (below, rest) = (rest % 1024, rest / 1024);
        unit = name;
    }
    if unit == "B" || rest >= 100 {
        format!("{rest} {unit}")
    } else {
        format!("{rest}.{} {unit}", below * 10 / 1024)
    }
}

/// How far ahead the next rung of a ladder is told of.
const NEXT_RUNG_WITHIN_S: u64 = 2 * 3600;

/// The warning that the next rung of a source's ladder will be reached, if that is soon.
pub fn next_rung(ladder: &Ladder) -> Option<String> {
    let left_s = ladder.next_in_s.filter(|seconds| *seconds <= NEXT_RUNG_WITHIN_S)?;
    let what = match ladder.next? {
        Rung::Ring => return None,
        Rung::Spool => "the spool will be used",
        Rung::Gap => "writes will no longer be captured",
    };
    let minutes = match left_s / 60 {
        0 => "less than a minute".to_owned(),
        minutes => format!("{minutes} min"),
    };
    Some(format!(
        "{what} in {minutes}, as what waits has grown by {}/s over the last {}",
        bytes(u64::try_from(ladder.growth_bytes_per_s).unwrap_or(0)),
        duration_s(ladder.window_s)
    ))
}

/// The URI by which NBD clients name an export on a Unix socket.
pub fn nbd_uri(socket: &Path, export: &str) -> String {
    let socket = socket.to_string_lossy();
    let socket: Vec<String> = socket.split('/').map(segment).collect();
    format!("nbd+unix:///{}?socket={}", segment(export), socket.join("/"))
}

/// `0.4 s`, `12 s`, `5 min`, `3 h 5 min`, `2 d 4 h`.
pub fn duration_ns(ns: u64) -> String {
    let seconds = ns / SECOND_NS;
    match seconds {
        0..10 => format!("{seconds}.{} s", ns % SECOND_NS / (SECOND_NS / 10)),
        _ => duration_s(seconds),
    }
}

/// The same from whole seconds.
pub fn duration_s(seconds: u64) -> String {
    let two = |first: u64, unit, second: u64, small| match second {
        0 => format!("{first} {unit}"),
        _ => format!("{first} {unit} {second} {small}"),
    };
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => two(seconds / 3600, "h", seconds % 3600 / 60, "min"),
        _ => two(seconds / 86_400, "d", seconds % 86_400 / 3600, "h"),
    }
}

/// How long ago a wall time is; nothing for one that lies ahead.
pub fn age_ns(wall_ns: i64, now_ns: i64) -> u64 {
    u64::try_from(now_ns.saturating_sub(wall_ns)).unwrap_or(0)
}

/// A wall time as it is written after an `@`, in milliseconds at or before it.
pub fn time_before(wall_ns: i64) -> String {
    time(wall_ns, RoundMode::Floor)
}

/// The same at or after it.
pub fn time_after(wall_ns: i64) -> String {
    time(wall_ns, RoundMode::Ceil)
}

fn time(wall_ns: i64, mode: RoundMode) -> String {
    let rounding = TimestampRound::new().smallest(Unit::Millisecond).mode(mode);
    Timestamp::from_nanosecond(i128::from(wall_ns))
        .and_then(|time| time.round(rounding))
        .map_or_else(|_| format!("{wall_ns} ns"), |time| time.to_string())
}

/// The wall clock, nanoseconds since 1970.
pub fn now_ns() -> i64 {
    i64::try_from(Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX)
}

/// `one volume`, `3 volumes`.
pub fn count(number: usize, what: &str) -> String {
    match number {
        1 => format!("one {what}"),
        _ => format!("{number} {what}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_put_into_words() {
        for (count, expected) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536 << 20, "1.5 GiB"),
            (99 << 30, "99.0 GiB"),
            (500 << 30, "500 GiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(bytes(count), expected);
        }
        for (seconds, expected) in [
            (0, "0 s"),
            (119, "119 s"),
            (120, "2 min"),
            (7199, "119 min"),
            (7200, "2 h"),
            (3 * 3600 + 300, "3 h 5 min"),
            (2 * 86_400 + 4 * 3600, "2 d 4 h"),
        ] {
            assert_eq!(duration_s(seconds), expected);
        }
        assert_eq!(duration_ns(450_000_000), "0.4 s");
        assert_eq!(duration_ns(12 * SECOND_NS), "12 s");
    }

    #[test]
    fn times_are_never_rounded_out_of_a_range() {
        let wall_ns = 1_795_427_970_123_456_789;
        assert_eq!(time_before(wall_ns), "2026-11-23T09:59:30.123Z");
        assert_eq!(time_after(wall_ns), "2026-11-23T09:59:30.124Z");
        assert_eq!(time_after(1_795_427_970_000_000_000), "2026-11-23T09:59:30Z");
        assert_eq!(age_ns(5, 3), 0);
    }
}
