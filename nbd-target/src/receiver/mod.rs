//! A source's session: what it says, and what follows from that.
//!
//! [`Session`] decides without I/O; [`driver`] carries it out on the link.

pub mod driver;
pub mod offers;
mod pending;
mod repairs;

use std::collections::HashMap;

use tidemark_journal::{
    Ancestry, FrameView, GroupId, Kind, Position, Record, SECTOR_BYTES, VolumeId,
};
use tidemark_link::{
    hello::{TargetMemory, Verdict, compare},
    lease::{Asks, Moment},
    message::{
        Ack, AckFlags, Heartbeat, Hello, LeaseAsk, Message, ProtocolRange, REPAIR_FEATURE, Refuse,
        RefuseCode, Repair, SYNC_FEATURE, VolumeSize, Welcome,
    },
};

use crate::{catalogue::GroupRow, config::GroupConfig, store::journal::Progress};
use offers::Offer;
use repairs::Repairs;

/// What this target says of itself in a greeting.
pub const SOFTWARE: &str = concat!("tidemark-target ", env!("CARGO_PKG_VERSION"));

/// Checks who greets and for what, before the replica is looked at.
///
/// # Errors
/// What to answer instead of a welcome.
pub fn admit<'c>(
    hello: &Hello,
    peer: &tidemark_link::NodeName,
    groups: &'c [GroupConfig],
    known: impl FnOnce(&str) -> Option<GroupRow>,
) -> Result<(&'c GroupConfig, u16), Refuse> {
    let protocol = ProtocolRange::OWN.common(hello.protocol).ok_or_else(|| {
        let (own, other) = (ProtocolRange::OWN, hello.protocol);
        let text = format!(
            "this target speaks protocol {} to {}, the source {} to {}: upgrade the older one",
            own.min, own.max, other.min, other.max
        );
        Refuse::new(RefuseCode::Version, text)
    })?;
    let name = &hello.group.name;
    let Some(config) = groups.iter().find(|group| group.name.as_str() == name) else {
        let text = format!(
            "this target does not know the group '{name}': add a [[group]] with that name and \
             node = \"{peer}\" to its configuration"
        );
        return Err(Refuse::new(RefuseCode::UnknownGroup, text));
    };
    if config.node != *peer {
        let text = format!("the node '{peer}' may not write the group '{name}'");
        return Err(Refuse::new(RefuseCode::NotAllowed, text));
    }
    if let Some(row) = known(name).filter(|row| row.id != hello.group.id) {
        let text = format!(
            "the replica of '{name}' at this target belongs to the group id {}, the source has {}: \
             if the old replica is no longer wanted, let the target forget it first",
            row.id, hello.group.id
        );
        return Err(Refuse::new(RefuseCode::Diverged, text));
    }
    Ok((config, protocol))
}

/// A session after its greeting.
pub struct Session {
    group: GroupId,
    ancestry: Ancestry,
    /// The sectors of each volume, as far as the frames received say.
    volumes: HashMap<VolumeId, u64>,
    /// The end of what has been accepted.
    accepted: Position,
    /// Nothing may be resumed: the source must come back with a new term.
    doubt: Option<&'static str>,
    acked: Option<Ack>,
    repairs: Repairs,
    /// Leases that were asked for; none if the source grants none.
    asks: Option<Asks>,
}

/// What to do after a message.
#[derive(Debug)]
pub enum Step {
    /// Append the frame; afterwards compare the offers in it.
    Append {
        /// The frame, verbatim.
        frame: Vec<u8>,
        /// The offers, in order.
        offers: Vec<Offer>,
    },
    /// Take the heartbeat in and echo it.
    Heartbeat(Heartbeat),
    /// The source has granted a lease, up to this moment; or one that comes too late.
    Lease(Option<Moment>),
    /// The source says that it ends.
    End,
}

impl Session {
    /// Answers a greeting that was admitted, given what the replica knows.
    ///
    /// # Errors
    /// What to answer instead of a welcome.
    pub fn greet(
        hello: &Hello,
        protocol: u16,
        memory: TargetMemory,
    ) -> Result<(Session, Welcome), Refuse> {
        let doubt = match compare(hello, &memory) {
            Verdict::Resume { .. } | Verdict::Fresh => None,
            Verdict::Doubt { why, .. } => Some(why.sentence()),
            Verdict::Refuse(refuse) => return Err(refuse),
        };
        let has = |wanted: &&str| hello.features.iter().any(|feature| feature == wanted);
        let (repairs, leases) = (has(&REPAIR_FEATURE), has(&SYNC_FEATURE));
        let common = [REPAIR_FEATURE, SYNC_FEATURE].into_iter().filter(has);
        let welcome = Welcome {
            protocol,
            features: common.map(str::to_owned).collect(),
            software: SOFTWARE.to_owned(),
            position: memory.position,
            path: memory.path,
            map_generation: memory.map_generation,
            volumes: memory.volumes,
        };
        let session = Session {
            group: hello.group.id,
            ancestry: hello.ancestry.clone(),
            volumes: hello.volumes.iter().map(|volume| (volume.id, volume.sectors)).collect(),
            accepted: memory.position.unwrap_or_default(),
            doubt,
            acked: None,
            repairs: Repairs::new(repairs),
            asks: leases.then(Asks::default),
        };
        Ok((session, welcome))
    }

    /// Takes a message in.
    ///
    /// # Errors
    /// Why the session ends, to be told to the source.
    pub fn receive(&mut self, message: Message) -> Result<Step, Refuse> {
        match message {
            Message::Frame(frame) => {
                let offers = self.check(&frame).map_err(|sentence| {
                    Refuse::new(RefuseCode::Other, format!("a frame is refused: {sentence}"))
                })?;
                Ok(Step::Append { frame, offers })
            }
            Message::Heartbeat(heartbeat) => Ok(Step::Heartbeat(heartbeat)),
            Message::LeaseGrant(grant) if let Some(asks) = &mut self.asks => {
                let until = asks.granted(grant.number, grant.lease);
                let until =
                    until.map_err(|unasked| Refuse::new(RefuseCode::Other, unasked.to_string()))?;
                Ok(Step::Lease(until))
            }
            Message::Bye => Ok(Step::End),
            Message::Refuse(refuse) => {
                tracing::warn!("the source ends the session: {refuse}");
                Ok(Step::End)
            }
            other => {
                let text = format!("a source does not send a {:?} message here", other.kind());
                Err(Refuse::new(RefuseCode::Other, text))
            }
        }
    }

    /// What to acknowledge, when something that the source waits for has changed: what was received is told along with
    /// what is durable, and not by itself.
    pub fn acknowledge(&mut self, progress: &Progress) -> Option<Ack> {
        let durable = progress.durable.seq;
        let ack = Ack {
            term: self.ancestry.current().id,
            hop_received: self.accepted.seq.max(durable),
            hop_durable: durable,
            final_durable: durable,
            flags: AckFlags { full: progress.stalled.is_some() },
        };
        let news = |ack: Ack| (ack.term, ack.hop_durable, ack.final_durable, ack.flags);
        let before = self.acked.replace(ack);
        (before.map(news) != Some(news(ack))).then_some(ack)
    }

    /// What to ask the source for again, of the regions (volume, first, number) that are damaged.
    pub fn ask(&mut self, damaged: &[(VolumeId, u64, u64)]) -> Option<Repair> {
        let known: Vec<(VolumeId, u64, u64)> =
            damaged.iter().filter(|(id, ..)| self.volumes.contains_key(id)).copied().collect();
        self.repairs.ask(&known)
    }

    /// Whether the source grants leases.
    pub fn has_leases(&self) -> bool {
        self.asks.is_some()
    }

    /// Asks for a lease, if the source grants any; `now` was read before the message leaves.
    pub fn ask_lease(&mut self, now: Moment) -> Option<LeaseAsk> {
        let asks = self.asks.as_mut()?;
        Some(LeaseAsk { number: asks.ask(now) })
    }

    /// Has the next acknowledgement made even if nothing has changed.
    pub fn repeat(&mut self) {
        self.acked = None;
    }

    /// Checks that a frame may be appended, and takes its offers out.
    fn check(&mut self, frame: &[u8]) -> Result<Vec<Offer>, String> {
        if let Some(why) = self.doubt {
            return Err(format!("{why}; come back with a new term"));
        }
        let view = FrameView::parse(frame).map_err(|error| error.to_string())?;
        view.verify_chunks().map_err(|error| error.to_string())?;
        let header = view.header();
        if view.bytes().len() != frame.len() {
            return Err("bytes follow it in its message".into());
        }
        if header.group() != self.group {
            return Err(format!("it belongs to the group {}", header.group()));
        }
        if !self.ancestry.contains(header.last()) {
            return Err(format!("{} is not on the source's own path", header.last()));
        }
        if !self.continues(header.before()) || header.first_seq.get() <= self.accepted.seq.0 {
            return Err(format!(
                "it follows {}, and the replica ends at {}",
                header.before(),
                self.accepted
            ));
        }
        let mut offers = Vec::new();
        for (index, record) in view.records().enumerate() {
            self.check_record(&record)?;
            if record.kind.changes_content() {
                let whole = |piece: tidemark_journal::frame::Piece| {
                    (piece.bytes as u64).is_multiple_of(SECTOR_BYTES)
                };
                if !view.pieces(index).all(whole) {
                    return Err("a chunk ends inside a sector".into());
                }
            }
            if record.kind == Kind::Offer {
                let hashes = view.payload(index).map_err(|error| error.to_string())?;
                offers.push(Offer::new(&record, hashes));
            }
        }
        self.accepted = header.last();
        Ok(offers)
    }

    /// Whether a frame may follow what has been accepted. A new replica begins anywhere on the
    /// source's path: until its volumes' first gaps end it offers nothing.
    fn continues(&self, before: Position) -> bool {
        if self.accepted.term.is_nil() {
            return before == Position::default() || self.ancestry.contains(before);
        }
        self.ancestry.continues(self.accepted, before)
    }

    fn check_record(&mut self, record: &Record) -> Result<(), String> {
        let of_group = matches!(record.kind, Kind::Mark | Kind::Flush | Kind::Void);
        let Some(sectors) = self.volumes.get_mut(&record.volume) else {
            // What concerns the group as a whole names no volume.
            return if of_group {
                Ok(())
            } else {
                Err(format!("volume {} was not announced", record.volume))
            };
        };
        if record.kind == Kind::Resize {
            *sectors = record.start.0;
        }
        if record.kind.has_range() && record.end().0 > *sectors {
            return Err(format!(
                "sectors {}..{} are beyond the end of volume {} ({sectors} sectors)",
                record.start.0,
                record.end().0,
                record.volume
            ));
        }
        Ok(())
    }
}

/// The sizes that a replica compares with a greeting's.
pub fn sizes(history: &crate::history::History) -> Vec<VolumeSize> {
    let present = history.volumes.iter().filter(|volume| volume.removed.is_none());
    present.map(|volume| VolumeSize { id: volume.id, sectors: volume.sectors() }).collect()
}

#[cfg(test)]
mod tests;
