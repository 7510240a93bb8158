//! At most two guests run at a time on one machine, whatever runs the tests: each needs about a core.
//!
//! A test takes all its slots at once, so that no two tests wait for each other, and it waits for them behind
//! one door, so that a test of two guests gets its turn.

use std::fs::{self, File};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// How many guests run at a time.
pub const SLOTS: usize = 2;

/// How long a test waits for its turn before it fails.
const TURN_WAIT_MAX: Duration = Duration::from_secs(15 * 60);

/// The right to run a number of guests; ends when dropped, or with the process.
pub struct Slots {
    _held: Vec<Flock<File>>,
}

impl Slots {
    /// Waits for `count` slots, whose lock files are in `directory`.
    pub fn take(directory: &Path, count: usize) -> Result<Slots> {
        if count > SLOTS {
            bail!("a test may run at most {SLOTS} guests, not {count}");
        }
        fs::create_dir_all(directory)?;
        let deadline = Instant::now() + TURN_WAIT_MAX;
        let door = loop {
            if let Some(lock) = try_lock(&directory.join("door"))? {
                break lock;
            }
            pause(deadline)?;
        };
        let mut held = Vec::new();
        while held.len() < count {
            let before = held.len();
            for slot in 0..SLOTS {
                // A slot held already refuses its lock to this test as to any other.
                if held.len() < count {
                    held.extend(try_lock(&directory.join(format!("slot{slot}")))?);
                }
            }
            if held.len() == before {
                pause(deadline)?;
            }
        }
        drop(door);
        Ok(Slots { _held: held })
    }
}

fn try_lock(path: &Path) -> Result<Option<Flock<File>>> {
    let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
    }
}

fn pause(deadline: Instant) -> Result<()> {
    if Instant::now() > deadline {
        bail!("other tests' guests have run for {} minutes", TURN_WAIT_MAX.as_secs() / 60);
    }
    thread::sleep(Duration::from_millis(50));
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;
    use std::time::Duration;

    use super::{SLOTS, Slots};

    #[test]
    fn never_more_than_the_slots_and_all_get_their_turn() {
        let directory = tempfile::tempdir().unwrap();
        let (running, peak, done) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
        thread::scope(|scope| {
            for test in 0..8 {
                let count = 1 + test % 2;
                let (running, peak, done, path) = (&running, &peak, &done, directory.path());
                scope.spawn(move || {
                    let _slots = Slots::take(path, count).unwrap();
                    let now = running.fetch_add(count, Ordering::SeqCst) + count;
                    peak.fetch_max(now, Ordering::SeqCst);
                    thread::sleep(Duration::from_millis(5));
                    running.fetch_sub(count, Ordering::SeqCst);
                    done.fetch_add(1, Ordering::SeqCst);
                });
            }
        });
        assert_eq!(done.into_inner(), 8);
        assert_eq!(peak.into_inner(), SLOTS, "slots are used in full and never exceeded");
    }

    #[test]
    fn more_guests_than_slots_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        assert!(Slots::take(directory.path(), SLOTS + 1).is_err());
    }
}
