//! What the engine decides between the core and its neighbours: acknowledgements, doubts and terms.
//! It does no I/O and owns no thread, so that the simulator runs it as it is.

use std::sync::Arc;

use tidemark_journal::{Ancestry, Position, Seq, TermId};

use crate::{
    capture::core::Core,
    encoder::Place,
    outbox::Outbox,
    state::{
        keeper::{Done, Job},
        recovery::opening,
    },
};

/// Sequences reserved with a new term.
const TERM_RESERVE: u64 = 1 << 24;

/// A term that has begun: to be told to the encoder and the link.
#[derive(Clone, Debug)]
pub struct NewTerm {
    /// The path that ends with it.
    pub ancestry: Ancestry,
    /// Sequences reserved for it.
    pub ceiling: Seq,
    /// Where its first frame goes.
    pub place: Place,
}

/// What the term that ends a doubt has to continue, and must not be below.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AfterDoubt {
    /// What disagrees, for people.
    pub why: String,
    /// Where the replica ends.
    pub end: Seq,
    /// The generation of the state that its target has seen.
    pub generation: u64,
    /// The path to the replica's end, if this side has forgotten it.
    pub path: Option<Ancestry>,
}

/// The path of terms and what may change it.
pub struct Course {
    ancestry: Ancestry,
    outbox: Arc<Outbox>,
    /// A doubt whose end is being prepared.
    doubt: Option<AfterDoubt>,
    doubted: Option<String>,
    tracking_lost: Option<String>,
}

impl Course {
    /// Goes on with this path.
    pub fn new(ancestry: Ancestry, outbox: Arc<Outbox>) -> Course {
        Course { ancestry, outbox, doubt: None, doubted: None, tracking_lost: None }
    }

    /// Whether so much waits for the link that catch-up should not add to it.
    pub fn is_backlogged(&self) -> bool {
        self.outbox.is_backlogged()
    }

    /// How full the place of the frames is, 0 to 1000.
    pub fn frames_permille(&self) -> u64 {
        self.outbox.backlog().fill_permille
    }

    /// The path of terms.
    pub fn ancestry(&self) -> &Ancestry {
        &self.ancestry
    }

    /// Why the two sides' memories last disagreed, if they did.
    pub fn doubted(&self) -> Option<&str> {
        self.doubted.as_deref()
    }

    /// Why changes are not tracked any more, if the state disk has failed.
    pub fn tracking_lost(&self) -> Option<&str> {
        self.tracking_lost.as_deref()
    }

    /// Everything up to `seq` is final-durable; what the keeper is to note of it.
    pub fn durable(&self, core: &mut Core, seq: Seq) -> Option<Job> {
        core.final_durable(seq);
        // A replica that has nothing of the path: what was kept before still holds.
        let first = self.ancestry.terms().first()?;
        (seq >= first.fork_seq).then(|| Job::Acked(self.ancestry.at(seq)))
    }

    /// Everything up to `position` is final-durable or lies in the spool; what the keeper is to note
    /// of it, unless everything was dropped since.
    pub fn spooled(&self, position: Position, epoch: u64) -> Option<Job> {
        (epoch == self.outbox.epoch()).then_some(Job::Spooled(position))
    }

    /// The two sides' memories disagree. The encoder is to be woken.
    pub fn doubt(&mut self, core: &mut Core, after: AfterDoubt) {
        self.doubted = Some(after.why.clone());
        self.doubt = Some(after);
        self.outbox.discard();
        core.begin_doubt();
    }

    /// Goes on with a doubt; to be called every turn. When nothing captured is on its way and every
    /// region is durably marked, a new term is to be written, with the id that `fresh` gives; until
    /// then the encoder is to be woken.
    pub fn advance(&mut self, core: &mut Core, fresh: impl FnOnce() -> Option<TermId>) -> Advance {
        let Some(after) = &self.doubt else { return Advance::Nothing };
        if !core.is_ready_for_term() {
            core.maintain();
            return Advance::Waits;
        }
        let path = after.path.as_ref().unwrap_or(&self.ancestry);
        let fork_seq = core.last_seq().max(after.end).max(path.current().fork_seq);
        let next = fresh().and_then(|id| path.fork(id, fork_seq).ok());
        let Some(ancestry) = next else { return Advance::Waits };
        let generation = after.generation;
        // Not again: the answer ends the doubt.
        self.doubt = None;
        Advance::Write(Job::Term(ancestry, Seq(fork_seq.0 + TERM_RESERVE), generation))
    }

    /// The keeper has finished something. Returns a term that begins with that.
    pub fn kept(&mut self, core: &mut Core, done: Done) -> Option<NewTerm> {
        match done {
            Done::Committed => core.map_committed(),
            Done::Reserved(seq) => core.ceiling_reserved(seq),
            Done::LeaseNoted => core.lease_noted(),
            Done::Noted { acked, spooled } => {
                self.outbox.forget(acked);
                core.noted(acked, spooled);
            }
            Done::Failed(sentence) => {
                // What the state disk was to say cannot be relied on after a restart.
                core.ring_memory().end_term();
                self.tracking_lost = Some(sentence);
            }
            Done::Term(ancestry, ceiling) => {
                let fork_seq = ancestry.current().fork_seq;
                self.outbox.rewind(fork_seq);
                self.outbox.resume();
                core.end_doubt(ancestry.current().id, fork_seq, ceiling);
                self.ancestry = ancestry.clone();
                self.doubt = None;
                let place = opening(&ancestry);
                return Some(NewTerm { ancestry, ceiling, place });
            }
        }
        None
    }
}

/// How a doubt goes on.
pub enum Advance {
    /// There is none.
    Nothing,
    /// It waits for what is on its way.
    Waits,
    /// The keeper is to write this.
    Write(Job),
}
