//! How fast frames may be sent, by the time of day.
//!
//! [`Throttle`] is pure: it is told the time and says how long to wait.

use std::{num::NonZeroU64, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};

const MINUTES_PER_DAY: u16 = 24 * 60;
/// How far sending may run ahead of its rate after a pause.
const BURST: Duration = Duration::from_millis(100);
/// The fewest and the most bytes between two waits.
const PIECE_BYTES: (u64, u64) = (4 << 10, 256 << 10);

/// A minute of the day, local time, written `HH:MM`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Minute(u16);

/// A text that is no time of day.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("'{0}' is not a time of day: HH:MM from 00:00 to 23:59 is wanted")]
pub struct NotATime(String);

impl Minute {
    /// The minute in which so many seconds have passed since midnight (a day's worth at most).
    pub fn of_second(seconds: u32) -> Minute {
        Minute((seconds / 60 % u32::from(MINUTES_PER_DAY)) as u16)
    }
}

impl FromStr for Minute {
    type Err = NotATime;

    fn from_str(text: &str) -> Result<Minute, NotATime> {
        let number = |digits: &str, below: u16| {
            let plain = digits.len() == 2 && digits.bytes().all(|byte| byte.is_ascii_digit());
            digits.parse().ok().filter(|number: &u16| plain && *number < below)
        };
        text.split_once(':')
            .and_then(|(hour, minute)| Some(number(hour, 24)? * 60 + number(minute, 60)?))
            .map(Minute)
            .ok_or_else(|| NotATime(text.chars().take(16).collect()))
    }
}

impl TryFrom<String> for Minute {
    type Error = NotATime;

    fn try_from(text: String) -> Result<Minute, NotATime> {
        text.parse()
    }
}

impl From<Minute> for String {
    fn from(minute: Minute) -> String {
        format!("{:02}:{:02}", minute.0 / 60, minute.0 % 60)
    }
}

/// A time of day with a rate of its own. It may go over midnight; from and to being equal means the
/// whole day.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// Its first minute.
    pub from: Minute,
    /// The minute after its last.
    pub to: Minute,
    /// The rate in it; none means unlimited.
    #[serde(default)]
    pub bytes_per_second: Option<NonZeroU64>,
}

impl Window {
    fn holds(&self, minute: Minute) -> bool {
        if self.from < self.to {
            self.from <= minute && minute < self.to
        } else {
            self.from <= minute || minute < self.to
        }
    }
}

/// Which rate holds when.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// The rate outside every window; none means unlimited.
    #[serde(default)]
    pub bytes_per_second: Option<NonZeroU64>,
    /// Times of day with a rate of their own; where several hold, the first counts.
    #[serde(default)]
    pub windows: Vec<Window>,
}

impl Schedule {
    /// The rate at a minute of the day; none means unlimited.
    pub fn rate(&self, minute: Minute) -> Option<NonZeroU64> {
        let window = self.windows.iter().find(|window| window.holds(minute));
        window.map_or(self.bytes_per_second, |window| window.bytes_per_second)
    }
}

/// A token bucket, kept as the time at which it would be full again.
#[derive(Debug)]
pub struct Throttle {
    schedule: Schedule,
    /// When everything taken so far has been paid for, on the caller's monotone clock.
    paid_at: Duration,
}

impl Throttle {
    /// A throttle with a full bucket.
    pub fn new(schedule: Schedule) -> Throttle {
        Throttle { schedule, paid_at: Duration::ZERO }
    }

    /// Another schedule from now on.
    pub fn set_schedule(&mut self, schedule: Schedule) {
        self.schedule = schedule;
    }

    /// How many bytes to take at once, so that no wait is long and the rate still even.
    pub fn piece_bytes(&self, minute: Minute) -> usize {
        let rate = self.schedule.rate(minute).map_or(u64::MAX, NonZeroU64::get);
        (rate / 20).clamp(PIECE_BYTES.0, PIECE_BYTES.1) as usize
    }

    /// Takes `bytes` at the time `now` of a monotone clock (from any origin) and says how long to
    /// wait before they are sent.
    pub fn take(&mut self, bytes: usize, now: Duration, minute: Minute) -> Duration {
        let Some(rate) = self.schedule.rate(minute) else {
            self.paid_at = now;
            return Duration::ZERO;
        };
        let cost_ns = bytes as u128 * 1_000_000_000 / u128::from(rate.get());
        let cost = Duration::from_nanos(u64::try_from(cost_ns).unwrap_or(u64::MAX));
        let start = self.paid_at.max(now);
        self.paid_at = start.saturating_add(cost);
        start.saturating_sub(BURST).saturating_sub(now)
    }
}

#[cfg(test)]
mod tests;
