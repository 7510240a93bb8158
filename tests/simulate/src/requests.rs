//! What a source's disk may hold: for each sector, the writes that were asked for and what became of
//! them.

use crate::content::Stamp;

/// A write of one sector.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    stamp: Stamp,
    submitted: u64,
    /// When nothing of it could happen any more.
    ended: Option<u64>,
    /// It was answered as done.
    done: bool,
    /// It was done and then flushed.
    stable: bool,
    /// A flush has failed since some of it may have been done: it may be gone.
    lost: bool,
}

/// What one sector may hold.
#[derive(Clone, Debug)]
pub struct Sector(Vec<Candidate>);

impl Sector {
    /// It holds this, for certain.
    pub fn new(stamp: Stamp, now: u64) -> Sector {
        let ended = Some(now);
        let (done, stable, lost) = (true, true, false);
        Sector(vec![Candidate { stamp, submitted: now, ended, done, stable, lost }])
    }

    /// A write was asked for.
    pub fn submitted(&mut self, stamp: Stamp, now: u64) {
        let (ended, done, stable, lost) = (None, false, false, false);
        self.0.push(Candidate { stamp, submitted: now, ended, done, stable, lost });
    }

    /// It was answered.
    pub fn answered(&mut self, submitted: u64, done: bool, fua: bool, now: u64) {
        for one in self.0.iter_mut().filter(|one| one.submitted == submitted) {
            (one.ended, one.done) = (Some(now), done && (fua || !one.lost));
            one.stable = one.done && fua;
        }
        self.prune();
    }

    /// A flush that was asked for at `submitted` was answered as done.
    pub fn flushed(&mut self, submitted: u64) {
        for one in &mut self.0 {
            one.stable |= one.done && one.ended.is_some_and(|ended| ended < submitted);
        }
        self.prune();
    }

    /// A flush has failed: what is not stable may be there or not.
    pub fn lost(&mut self) {
        for one in self.0.iter_mut().filter(|one| !one.stable) {
            (one.done, one.lost) = (false, true);
        }
    }

    /// Nobody works on it any more: what was not answered may have happened or not.
    pub fn left(&mut self, now: u64) {
        for one in &mut self.0 {
            one.ended.get_or_insert(now);
        }
    }

    /// Whether it may hold this now, or (`after_cut`) after a power cut.
    pub fn may_hold(&self, stamp: Stamp, after_cut: bool) -> bool {
        let superseded = |one: &Candidate| {
            self.0.iter().any(|other| {
                other.done
                    && (other.stable || !after_cut)
                    && one.ended.is_some_and(|ended| ended < other.submitted)
            })
        };
        self.0.iter().any(|one| one.stamp == stamp && !superseded(one))
    }

    /// What it may hold, for people.
    pub fn describe(&self) -> String {
        format!("{:x?}", self.0)
    }

    fn prune(&mut self) {
        let newest = self.0.iter().filter(|one| one.stable).map(|one| one.submitted).max();
        if let Some(newest) = newest {
            self.0.retain(|one| one.ended.is_none_or(|ended| ended >= newest));
        }
    }
}
