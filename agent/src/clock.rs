//! Journal time and wall time of a source.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::state::COUNT_MAX;

/// Clocks that a simulator sets, for the thread that sets them.
#[cfg(feature = "simulation")]
pub mod simulated {
    use std::cell::Cell;

    thread_local! {
        static NOW: Cell<Option<(u64, i64)>> = const { Cell::new(None) };
    }

    /// The boot clock and the wall clock of this thread from now on, nanoseconds.
    pub fn set(boot_ns: u64, wall_ns: i64) {
        NOW.set(Some((boot_ns, wall_ns)));
    }

    pub(super) fn boot_ns() -> Option<u64> {
        NOW.get().map(|(boot_ns, _)| boot_ns)
    }

    pub(super) fn wall_ns() -> Option<i64> {
        NOW.get().map(|(_, wall_ns)| wall_ns)
    }
}

/// Nanoseconds on the boot clock, which goes on while the machine sleeps and is never set.
fn boot_ns() -> u64 {
    #[cfg(feature = "simulation")]
    if let Some(boot_ns) = simulated::boot_ns() {
        return boot_ns;
    }
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
    time.map_or(0, |time| Duration::from(time).as_nanos() as u64)
}

/// The time on the boot clock, for what has to be waited for.
pub fn since_boot() -> Duration {
    Duration::from_nanos(boot_ns())
}

/// Journal time: continues where the source's last life had reserved to, at the pace of the boot
/// clock. It orders and ages; it never goes back and has no date.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct JournalClock {
    base_ns: u64,
    started_ns: u64,
}

impl JournalClock {
    /// Goes on after `base_ns`.
    pub fn after(base_ns: u64) -> JournalClock {
        JournalClock { base_ns: base_ns + 1, started_ns: boot_ns() }
    }

    /// Goes on with a clock of which [`Self::parts`] is known; none if the machine was started since.
    pub fn going_on(base_ns: u64, started_ns: u64) -> Option<JournalClock> {
        let clock = JournalClock { base_ns, started_ns };
        let elapsed_ns = boot_ns().checked_sub(started_ns)?;
        base_ns.checked_add(elapsed_ns).filter(|now_ns| *now_ns <= COUNT_MAX).map(|_| clock)
    }

    /// Journal time when it was started and the boot clock at that time, nanoseconds: with them it
    /// goes on in another process.
    pub fn parts(&self) -> (u64, u64) {
        (self.base_ns, self.started_ns)
    }

    /// Journal time now, nanoseconds.
    pub fn now_ns(&self) -> u64 {
        self.base_ns + (boot_ns() - self.started_ns)
    }
}

/// The wall clock, nanoseconds since 1970.
pub fn wall_ns() -> i64 {
    #[cfg(feature = "simulation")]
    if let Some(wall_ns) = simulated::wall_ns() {
        return wall_ns;
    }
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// The local time of day, for throttle schedules.
pub fn minute_of_day() -> tidemark_link::throttle::Minute {
    let now = jiff::Zoned::now();
    let seconds = u32::try_from(now.hour()).unwrap_or(0) * 3600
        + u32::try_from(now.minute()).unwrap_or(0) * 60;
    tidemark_link::throttle::Minute::of_second(seconds)
}
