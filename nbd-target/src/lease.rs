//! What may be said of the writes that a group's source has answered: the lease of a replica.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tidemark_control::target::ZeroLoss;
use tidemark_link::lease::{Claim, Holder, Moment};

use crate::replica::Replica;

/// The lease of one replica. It is kept in memory alone: after a restart nothing is said until the
/// next grant.
#[derive(Default)]
pub struct Lease(Mutex<State>);

#[derive(Default)]
struct State {
    holder: Holder,
    /// The source that greeted last grants leases.
    wanted: bool,
}

/// What a replica is worth as of now.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Soundness {
    /// All that is durable can be recovered at its end.
    Sound,
    /// It can be at some position before: a volume is in a gap.
    Gap,
    /// What was there cannot be read any more, or what comes is not kept.
    Damaged,
}

impl Lease {
    /// A source has greeted that grants leases, or does not.
    pub fn greeted(&self, wanted: bool) {
        self.state().wanted = wanted;
    }

    /// It has granted one up to this moment.
    pub fn hold(&self, until: Moment) {
        self.state().holder.hold(until);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What may be said of a group now; none if its source does not grant leases. To be called at least
/// as often as the source is asked: a claim that ends without a lease's end ends with the last look.
pub fn look(replica: &Replica) -> Option<ZeroLoss> {
    // The clock first: what is found to be sound was so then.
    let machine = replica.catalogue().machine();
    let (now, wall_ns) = (Moment(machine.boot_ns()), machine.wall_ns());
    let soundness = soundness(replica);
    let mut state = replica.lease().state();
    let claim = state.holder.look(now, soundness == Soundness::Sound);
    if !state.wanted {
        return None;
    }
    Some(match claim {
        _ if soundness == Soundness::Damaged => ZeroLoss::None,
        Claim::None => ZeroLoss::None,
        Claim::Held => ZeroLoss::Held,
        Claim::Until(through) => {
            let ago_ns = i64::try_from(now.0.saturating_sub(through.0)).unwrap_or(i64::MAX);
            ZeroLoss::Until { wall_ns: wall_ns.saturating_sub(ago_ns) }
        }
    })
}

fn soundness(replica: &Replica) -> Soundness {
    let progress = replica.journal().progress();
    let damages = replica.damages();
    if progress.failed.is_some()
        || damages.unlisted() > 0
        || !damages.at(progress.durable.seq).is_empty()
    {
        return Soundness::Damaged;
    }
    let gap = replica.ledger().history(|history| {
        let mut present = history.volumes.iter().filter(|volume| volume.removed.is_none());
        present.any(|volume| volume.open_gap().is_some())
    });
    if gap { Soundness::Gap } else { Soundness::Sound }
}
