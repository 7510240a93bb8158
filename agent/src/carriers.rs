//! The threads that carry away what was captured: the encoder and the link.
//!
//! They let the application and the capture thread go first, which have somebody waiting, and get
//! their usual share of the processors back before the ring is full: a processor that is short is
//! paid for in lag, up to half of the ring, and never in a gap. In sync mode an application waits for them
//! too, and they have their usual share all the time.

use std::sync::{Arc, Mutex, PoisonError};

use crate::{
    encoder::Pace,
    kernel::process::priority::{self, ThreadId},
};

/// The ring's fill, in thousandths, above which they get their usual share, and below which they
/// let others go first again.
const HURRY_ABOVE_PERMILLE: u64 = 500;
const REST_BELOW_PERMILLE: u64 = 250;

/// A group's threads of that kind.
#[derive(Debug)]
pub struct Carriers {
    state: Mutex<State>,
    pace: Arc<Pace>,
}

#[derive(Debug)]
struct State {
    threads: Vec<ThreadId>,
    behind: bool,
    /// An application waits for them.
    hurry: bool,
    ring_permille: u64,
    /// Whether this process may give them their usual share again: if not, they keep it.
    may_return: bool,
}

impl Carriers {
    /// None yet, of a group that shares its pace with others.
    pub fn new(pace: Arc<Pace>) -> Carriers {
        let state = State {
            threads: Vec::new(),
            behind: true,
            hurry: false,
            ring_permille: 0,
            may_return: priority::may_return(),
        };
        Carriers { state: Mutex::new(state), pace }
    }

    /// How close frames follow each other.
    pub fn pace(&self) -> &Arc<Pace> {
        &self.pace
    }

    /// Makes the calling thread one of them.
    pub fn join(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.threads.push(priority::this_thread());
        if state.behind {
            state.apply();
        }
    }

    /// To be told now and then how full the ring is.
    pub fn ring_filled(&self, permille: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.ring_permille = permille;
        state.decide();
    }

    /// An application waits for what they do, or no longer.
    pub fn hurry(&self, hurry: bool) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.hurry = hurry;
        state.decide();
    }
}

impl State {
    fn decide(&mut self) {
        let behind = !self.hurry && goes_behind(self.behind, self.ring_permille);
        if std::mem::replace(&mut self.behind, behind) != behind {
            self.apply();
        }
    }

    fn apply(&self) {
        if !self.may_return {
            return;
        }
        for thread in &self.threads {
            // Of a thread that has ended there is nothing to say, and all else is as it was.
            if let Err(error) = priority::let_others_first(*thread, self.behind) {
                tracing::debug!(%error, "a thread keeps its share of the processors");
            }
        }
    }
}

fn goes_behind(behind: bool, ring_permille: u64) -> bool {
    if behind { ring_permille <= HURRY_ABOVE_PERMILLE } else { ring_permille < REST_BELOW_PERMILLE }
}

#[cfg(test)]
mod tests {
    use super::goes_behind;

    #[test]
    fn a_ring_that_fills_ends_the_rest_until_it_is_emptier_again() {
        let mut behind = true;
        let mut seen = Vec::new();
        for permille in [0, 500, 501, 400, 250, 249, 400] {
            behind = goes_behind(behind, permille);
            seen.push(behind);
        }
        assert_eq!(seen, [true, true, false, false, false, true, true]);
    }
}
