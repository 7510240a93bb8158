//! The zero-loss lease, as the target holds it.
//!
//! While a target holds a lease of a group, every write that the source has answered is durable
//! here: a failover loses none of them. The target asks with a number, and notes its boot clock as
//! it does ([`Asks`]). The source grants a duration, and from then on answers nothing that is not
//! final-durable until that duration and a margin have passed on its own boot clock
//! ([`outlived_ns`]). The target counts from its *asking* ([`Holder`]), which was before the grant;
//! so its lease ends first, as long as the two clocks' rates differ by less than the margin. No wall
//! clock is asked.

use std::{collections::VecDeque, time::Duration};

/// How long a lease lasts from the asking for it.
pub const LEASE: Duration = Duration::from_secs(2);
/// The longest lease that a target takes, whatever version the source is of.
pub const LEASE_MAX: Duration = Duration::from_secs(10);
/// How often a target asks: some answers may be late or lost, and it holds the lease all the same.
pub const ASK_EVERY: Duration = Duration::from_millis(500);
/// One part in so many by which the rates of the two sides' boot clocks may differ.
pub const DRIFT_PARTS: u64 = 20;
/// The most asks of a session that wait for an answer.
const OPEN_MAX: usize = 16;

/// When, by its boot clock, a source that grants a lease now may take it to be over.
pub fn outlived_ns(now_ns: u64, lease: Duration) -> u64 {
    let lease_ns = u64::try_from(lease.as_nanos()).unwrap_or(u64::MAX);
    now_ns.saturating_add(lease_ns).saturating_add(lease_ns.div_ceil(DRIFT_PARTS))
}

/// A moment on this machine's boot clock, nanoseconds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Moment(pub u64);

impl Moment {
    fn after(self, duration: Duration) -> Moment {
        let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        Moment(self.0.saturating_add(ns))
    }
}

/// A grant that answers nothing this session has asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a lease is granted that was not asked for (number {0})")]
pub struct Unasked(pub u64);

/// What one session has asked, and when. Its numbers mean nothing to another.
#[derive(Debug, Default)]
pub struct Asks {
    last: u64,
    open: VecDeque<(u64, Moment)>,
}

impl Asks {
    /// Asks now; the number to be sent. The clock was read before the message leaves.
    pub fn ask(&mut self, now: Moment) -> u64 {
        self.last += 1;
        if self.open.len() == OPEN_MAX {
            self.open.pop_front();
        }
        self.open.push_back((self.last, now));
        self.last
    }

    /// A grant has come; until when it lasts. None if it answers what was given up or answered.
    ///
    /// # Errors
    /// [`Unasked`].
    pub fn granted(&mut self, number: u64, lease: Duration) -> Result<Option<Moment>, Unasked> {
        if number == 0 || number > self.last {
            return Err(Unasked(number));
        }
        let mut asked = None;
        while let Some((open, at)) = self.open.front().copied()
            && open <= number
        {
            self.open.pop_front();
            asked = (open == number).then_some(at);
        }
        Ok(asked.map(|at| at.after(lease.min(LEASE_MAX))))
    }
}

/// What a target may say of a group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Claim {
    /// Every write answered up to now is here.
    Held,
    /// Every write answered up to this moment is here.
    Until(Moment),
    /// Nothing.
    None,
}

/// The lease of a group.
#[derive(Debug, Default)]
pub struct Holder {
    until: Option<Moment>,
    held_through: Option<Moment>,
}

impl Holder {
    /// Holds the lease up to this moment.
    pub fn hold(&mut self, until: Moment) {
        self.until = self.until.max(Some(until));
    }

    /// What may be said now. `sound`: all that is durable here can be recovered as of now. Where it
    /// cannot, the claim ends with the last look that found it so, until another grant. To be
    /// called now and then, also when nobody wants to know.
    pub fn look(&mut self, now: Moment, sound: bool) -> Claim {
        if let Some(until) = self.until {
            if sound {
                self.held_through = self.held_through.max(Some(now.min(until)));
            }
            if !sound || now >= until {
                self.until = None;
            }
        }
        match (self.until, self.held_through) {
            (Some(_), _) => Claim::Held,
            (None, Some(through)) => Claim::Until(through),
            (None, None) => Claim::None,
        }
    }
}

#[cfg(test)]
mod tests;
