//! The joint simulator: the agent and the target, whose real code runs on simulated disks, a simulated
//! network and simulated clocks, under a workload and faults that follow from a seed.
//!
//! [`run`] plays one seed. A violation is a sentence; the same seed gives it again.

pub mod agent;
pub mod checks;
pub mod content;
mod faults;
pub mod real;
pub mod requests;
pub mod script;
pub mod spool_disk;
pub mod state_disk;
pub mod target;
pub mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

use world::{Counts, World};

/// What came of a seed.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What happened.
    pub counts: Counts,
    /// A hash of everything that happened.
    pub trace: u64,
    /// What was violated.
    pub violation: Option<String>,
}

/// Plays a seed: so many steps in which anything may go wrong, and then until everything is at rest.
/// With `tell` it says what happens.
pub fn run(seed: u64, steps: u64, tell: bool) -> Outcome {
    let mut world = World::new(seed, |sizes, rng| -> Box<dyn target::Target> {
        // The plain one shows what the agent does without the other's delays.
        if seed % 3 == 2 {
            Box::new(target::Plain::new(sizes, rng))
        } else {
            Box::new(real::Real::new(rng))
        }
    });
    world.tell = tell;
    let played = catch_unwind(AssertUnwindSafe(|| world.run(steps)));
    let violation = played.err().map(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_else(|| "a panic".into())
    });
    Outcome { counts: world.counts, trace: world.trace, violation }
}
