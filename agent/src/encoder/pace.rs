//! How close small frames follow each other. What a frame costs hardly depends on its size: two threads change places
//! on either side, something is encrypted, sent and decrypted, and a disk is flushed. So one group's are some time
//! apart, and those of all groups of an agent share a number of them that leaves most of a processor to other work.

use std::sync::atomic::{AtomicU64, Ordering};

/// From any group's to any other's, as long as there are many.
const AGENT_NS: u64 = 1_000_000;

/// The times at which an agent's groups may make small frames.
#[derive(Debug, Default)]
pub struct Pace {
    /// Time on the boot clock at which the next one has its turn.
    free_ns: AtomicU64,
}

impl Pace {
    /// The shortest time from a group's frame to its next that is not worth it.
    pub const GROUP_NS: u64 = 48_000_000;

    /// A group has made a frame now: the time from which on its next may be a small one.
    pub fn next_ns(&self, now_ns: u64) -> u64 {
        let turn = |free_ns: u64| free_ns.max(now_ns + Pace::GROUP_NS);
        let taken = self.free_ns.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |free_ns| {
            Some(turn(free_ns) + AGENT_NS)
        });
        // It always gives a new value.
        let (Ok(free_ns) | Err(free_ns)) = taken;
        turn(free_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::Pace;

    const MS: u64 = 1_000_000;

    #[test]
    fn one_group_has_its_own_pace_and_many_share_one() {
        let pace = Pace::default();
        let mut now = 5 * MS;
        for _ in 0..100 {
            let next = pace.next_ns(now);
            assert_eq!(next, now + 48 * MS);
            now = next;
        }
        let pace = Pace::default();
        let mut times = [0; 64];
        let mut made = 0;
        while let Some(group) = (0..64).min_by_key(|group| times[*group])
            && times[group] < 10_000 * MS
        {
            times[group] = pace.next_ns(times[group]);
            made += 1;
        }
        assert!((9_900..=10_064).contains(&made), "{made} frames in ten seconds");
    }
}
