//! What the link decides, without I/O: what to greet with, what a welcome means, what follows from an
//! acknowledgement, and which bytes of a frame are sent.

use std::borrow::Cow;

use tidemark_journal::{Ancestry, FrameError, FrameView, Position, Seq, TermId, cut};
use tidemark_link::{
    hello::{TargetMemory, Verdict, compare},
    message::{
        Ack, GroupHello, Hello, ProtocolRange, REPAIR_FEATURE, Refuse, SYNC_FEATURE, VolumeHello,
        Welcome,
    },
};

use crate::{capture::catchup::Mode, engine::course::AfterDoubt, lease::Peer, outbox::Outbox};

/// What the source says of itself, from one session to the next.
pub struct Greeter {
    /// The group, as the target knows it.
    pub group: GroupHello,
    /// Its volumes.
    pub volumes: Vec<VolumeHello>,
    /// What is known to be final-durable from an earlier life.
    pub acked: Position,
    /// The generation of the state when it was opened.
    pub generation_found: u64,
    /// A target has been told of the state that was found, and of everything since.
    pub greeted: bool,
    /// The term in which the two sides' memories came to disagree: until another has begun, the state
    /// that was found is what there is to compare.
    pub doubted: Option<TermId>,
    /// The group is to be in sync, so the target may ask for leases.
    pub sync: bool,
}

/// What a welcome means.
#[derive(Debug)]
pub enum Start {
    /// Everything up to `from` is final-durable, and frames go on after it.
    Stream {
        /// The durable end of the replica.
        from: Position,
        /// How catch-up sends content.
        mode: Mode,
    },
    /// The two sides' memories disagree.
    Doubt {
        /// What disagrees, and what the next term follows.
        after: AfterDoubt,
    },
    /// Nothing may be sent.
    Refused(Refuse),
}

impl Greeter {
    /// The greeting. `durable` is the highest position known to be final-durable in this life (or
    /// none), `generation` that of the durable state.
    pub fn hello(
        &self,
        ancestry: Ancestry,
        durable: Position,
        ceiling: Seq,
        generation: u64,
    ) -> Hello {
        let sync = self.sync.then_some(SYNC_FEATURE);
        let ended = self.doubted.is_some_and(|term| term != ancestry.current().id);
        Hello {
            protocol: ProtocolRange::OWN,
            features: [REPAIR_FEATURE].into_iter().chain(sync).map(str::to_owned).collect(),
            software: env!("CARGO_PKG_VERSION").to_owned(),
            group: self.group.clone(),
            ancestry,
            volumes: self.volumes.clone(),
            acked: if durable.seq > Seq::ZERO { durable } else { self.acked },
            ceiling,
            map_generation: if self.greeted || ended { generation } else { self.generation_found },
        }
    }

    /// Decides what follows from the answer to `hello`, and makes the outbox ready for it.
    pub fn welcomed(&mut self, hello: &Hello, welcome: &Welcome, outbox: &Outbox) -> Start {
        let (from, mode) = match compare(hello, &TargetMemory::from(welcome)) {
            Verdict::Resume { from } => (from, Mode::Offer),
            Verdict::Fresh => {
                let first = hello.ancestry.terms()[0];
                (Position { term: first.id, seq: first.fork_seq }, Mode::Send)
            }
            Verdict::Doubt { why, path } => {
                return self.doubt(why.sentence().to_owned(), hello, welcome, path);
            }
            Verdict::Refuse(refuse) => return Start::Refused(refuse),
        };
        outbox.release(from.seq);
        if !outbox.covers(from, &hello.ancestry) {
            let why = "records that the target lacks are no longer kept";
            return self.doubt(why.to_owned(), hello, welcome, None);
        }
        outbox.rewind(from.seq);
        // If it is full still, its next acknowledgement says so.
        outbox.hold(false);
        self.greeted = true;
        Start::Stream { from, mode }
    }

    fn doubt(
        &mut self,
        why: String,
        hello: &Hello,
        welcome: &Welcome,
        path: Option<Ancestry>,
    ) -> Start {
        self.doubted = Some(hello.ancestry.current().id);
        // Nothing of the next term is acknowledged yet.
        self.acked = Position::default();
        let end = welcome.position.map_or(Seq::ZERO, |position| position.seq);
        let generation = welcome.map_generation;
        Start::Doubt { after: AfterDoubt { why, end, generation, path } }
    }
}

/// Whether a target that welcomes so asks for leases.
pub fn peer(welcome: &Welcome) -> Peer {
    let able = welcome.features.iter().any(|feature| feature == SYNC_FEATURE);
    if able { Peer::Able } else { Peer::Unable }
}

/// Takes an acknowledgement in. Returns the new final-durable position, if it is higher than
/// `durable`; [`Outbox::release`] is for the caller, who may look at the frames before.
pub fn acknowledged(
    ack: &Ack,
    ancestry: &Ancestry,
    durable: Position,
    outbox: &Outbox,
) -> Option<Position> {
    // Else it is of a path that has been left.
    if ack.term != ancestry.current().id {
        return None;
    }
    outbox.hold(ack.flags.full);
    (ack.final_durable > durable.seq).then(|| ancestry.at(ack.final_durable))
}

/// The bytes of a frame that continues `before`, to be sent to a replica that ended at `from` when the
/// session began: the first frame may begin before that. None if nothing of it is left.
///
/// # Errors
/// The frame is damaged.
pub fn to_send(
    frame: &[u8],
    before: Seq,
    from: Position,
) -> Result<Option<Cow<'_, [u8]>>, FrameError> {
    if before >= from.seq {
        return Ok(Some(Cow::Borrowed(frame)));
    }
    let view = FrameView::parse(frame)?;
    Ok(cut::tail(&view, from.seq).map(Cow::Owned))
}
