//! Groups that could not be started: why, and when they are tried again.
//!
//! | what was in the way | the next attempt |
//! |---|---|
//! | the group's file, or its disk | after half a second: nothing was begun, and whoever mounts the device waits for it |
//! | anything else | after half a second, and after twice as long for as long as the reason stays the same, up to 30 seconds |

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// The shortest time between two attempts.
pub(crate) const RETRY: Duration = Duration::from_millis(500);
/// The longest.
const RETRY_MAX: Duration = Duration::from_secs(30);

/// The groups that could not be started.
#[derive(Default)]
pub(super) struct Late(Mutex<BTreeMap<String, Attempt>>);

struct Attempt {
    reason: String,
    wait: Duration,
    next: Instant,
}

/// How far an attempt came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Came {
    /// It has changed nothing.
    NotFar,
    /// It has opened the group's state.
    Far,
}

impl Late {
    /// Remembers that a group could not be started, and says why, once.
    pub fn put_off(&self, group: &str, reason: String, came: Came, now: Instant) {
        let mut late = self.attempts();
        let before = late.get(group).filter(|before| before.reason == reason);
        if before.is_none() {
            tracing::error!(group, error = reason, "not protected; it is tried again");
        }
        let wait = match (before, came) {
            (Some(before), Came::Far) => (2 * before.wait).min(RETRY_MAX),
            _ => RETRY,
        };
        late.insert(group.to_owned(), Attempt { reason, wait, next: now + wait });
    }

    /// It runs, or is not wanted any more.
    pub fn forget(&self, group: &str) {
        self.attempts().remove(group);
    }

    /// The groups that are to be tried now.
    pub fn due(&self, now: Instant) -> Vec<String> {
        let late = self.attempts();
        let due = late.iter().filter(|(_, attempt)| attempt.next <= now);
        due.map(|(group, _)| group.clone()).collect()
    }

    /// All of them.
    pub fn groups(&self) -> Vec<String> {
        self.attempts().keys().cloned().collect()
    }

    /// Why a group could not be started last.
    pub fn reason(&self, group: &str) -> Option<String> {
        self.attempts().get(group).map(|attempt| attempt.reason.clone())
    }

    fn attempts(&self) -> MutexGuard<'_, BTreeMap<String, Attempt>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_that_come_far_are_spaced_out_while_the_reason_stays_the_same() {
        let (late, start) = (Late::default(), Instant::now());
        let wait_of = |reason: &str, came| {
            late.put_off("shop", reason.to_owned(), came, start);
            let wait = (0..=60).find(|halves| !late.due(start + *halves * RETRY).is_empty());
            wait.expect("a next attempt")
        };
        let waits: Vec<u32> = (0..8).map(|_| wait_of("no memory", Came::Far)).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(wait_of("another reason", Came::Far), 1);
        assert_eq!([wait_of("no disk", Came::NotFar), wait_of("no disk", Came::NotFar)], [1, 1]);
        late.forget("shop");
        assert!(late.due(start + RETRY_MAX).is_empty() && late.reason("shop").is_none());
    }
}
