//! The agent's end of the link, and what the engine hears of it.

use std::sync::atomic::Ordering;

use tidemark_agent::{
    engine::Command,
    link::session::{Start, acknowledged, to_send},
    spool::{ReadError, Reader},
    state::keeper::Job,
};
use tidemark_journal::{Ancestry, Position};
use tidemark_link::message::{Ack, Heartbeat, Hello, Need, Repair, Welcome};

use super::Agent;

/// A session as the agent sees it.
pub enum Session {
    /// There is none.
    Down,
    /// This greeting was sent.
    Greeted(Box<Hello>),
    /// Frames go over it.
    Up {
        /// The path that was greeted with.
        ancestry: Ancestry,
        /// The replica's end then.
        from: Position,
        /// What was last vouched for.
        vouch: Heartbeat,
    },
}

impl Agent {
    /// What to greet with now.
    pub fn greet(&mut self) -> Hello {
        (self.changed, self.reader) = (false, None);
        let generation = self.generation();
        let ceiling = self.core.ceiling().max(self.told.1);
        let hello = self.greeter.hello(self.told.0.clone(), self.durable, ceiling, generation);
        self.session = Session::Greeted(Box::new(hello.clone()));
        hello
    }

    /// The target has welcomed it. Where the stream goes on, or none if it does not.
    ///
    /// # Errors
    /// The refusal's sentence.
    pub fn welcomed(&mut self, welcome: &Welcome) -> Result<Option<Position>, String> {
        let Session::Greeted(hello) = std::mem::replace(&mut self.session, Session::Down) else {
            return Ok(None);
        };
        match self.greeter.welcomed(&hello, welcome, &self.outbox) {
            Start::Stream { from, mode } => {
                let written = self.written.clone();
                let then = move || written.store(true, Ordering::Release);
                self.jobs.push_back(Job::Welcomed(Box::new(then)));
                self.commands.push_back(Command::Durable(from.seq));
                self.commands.push_back(Command::Link(Some(mode)));
                self.durable = from;
                let generation = self.generation();
                let vouch = Heartbeat {
                    number: 0,
                    journal_ns: 0,
                    wall_ns: 0,
                    vouched: from,
                    map_generation: generation,
                };
                let ancestry = hello.ancestry;
                self.session = Session::Up { ancestry, from, vouch };
                Ok(Some(from))
            }
            Start::Doubt { after } => {
                self.commands.push_back(Command::Doubt(after));
                self.hang_up();
                Ok(None)
            }
            Start::Refused(refuse) => {
                self.hang_up();
                Err(refuse.sentence)
            }
        }
    }

    /// The session has ended.
    pub fn hang_up(&mut self) {
        self.session = Session::Down;
        self.commands.push_back(Command::Link(None));
    }

    /// Whether the path of terms has changed, so that the session has to end.
    pub fn has_changed(&self) -> bool {
        self.changed
    }

    /// The target acknowledges.
    pub fn acknowledged(&mut self, ack: &Ack) {
        let Session::Up { ancestry, .. } = &self.session else { return };
        if let Some(durable) = acknowledged(ack, ancestry, self.durable, &self.outbox) {
            self.durable = durable;
            self.outbox.release(durable.seq);
            self.commands.push_back(Command::Durable(durable.seq));
        }
    }

    /// The target answers an offer.
    pub fn needed(&mut self, need: &Need) {
        self.commands.push_back(Command::Needed(need.seq, need.blocks));
    }

    /// The target has lost what it had of some regions.
    pub fn damaged(&mut self, repair: Repair) {
        self.commands.push_back(Command::Repair(repair.runs));
    }

    /// The next frame to send.
    pub fn next_frame(&mut self) -> Option<Vec<u8>> {
        let Session::Up { from, .. } = self.session else { return None };
        if !self.written.load(Ordering::Acquire) {
            return None;
        }
        let mut bytes = Vec::new();
        let before = match self.outbox.next_in_spool() {
            Some((after, index)) => {
                let reader = self.reader.get_or_insert_with(|| Reader::new(index));
                match reader.next(after, &mut bytes) {
                    Ok(frame) => {
                        self.outbox.sent_spooled(&frame);
                        frame.before
                    }
                    Err(error) => {
                        if matches!(error, ReadError::Damage(_)) {
                            self.outbox.spool_lost(error.to_string());
                        }
                        self.hang_up();
                        return None;
                    }
                }
            }
            None => self.outbox.take(&mut bytes)?.before,
        };
        let bytes = to_send(&bytes, before.seq, from).expect("a frame of its own")?;
        Some(bytes.into_owned())
    }

    /// A heartbeat.
    pub fn heartbeat(&mut self) -> Option<Heartbeat> {
        let generation = self.generation();
        if !self.written.load(Ordering::Acquire) {
            return None;
        }
        let Session::Up { ancestry, vouch, .. } = &mut self.session else { return None };
        if let Some(seq) = self.core.vouched().filter(|seq| self.outbox.sent_through(*seq)) {
            vouch.vouched = ancestry.at(seq);
            vouch.journal_ns = self.clock.now_ns();
            vouch.wall_ns = tidemark_agent::clock::wall_ns();
        }
        self.number += 1;
        (vouch.number, vouch.map_generation) = (self.number, generation);
        Some(*vouch)
    }

    /// The engine hears the link's next command.
    pub fn hear_link(&mut self) {
        match self.commands.pop_front() {
            Some(Command::Durable(seq)) => {
                if let Some(job) = self.course.durable(&mut self.core, seq) {
                    self.jobs.push_back(job);
                }
            }
            Some(Command::Link(mode)) => self.core.link(mode),
            Some(Command::Needed(seq, bits)) => self.core.needed(seq, |block| {
                bits.get(block as usize / 8).is_some_and(|byte| byte & (1 << (block % 8)) != 0)
            }),
            Some(Command::Repair(runs)) => {
                for run in runs {
                    self.core.compare(run.volume, run.first, run.regions);
                }
            }
            Some(Command::Spooled(position, epoch)) => {
                self.jobs.extend(self.course.spooled(position, epoch));
            }
            Some(Command::Settle) => self.jobs.push_back(Job::Settle),
            Some(Command::Doubt(after)) => self.course.doubt(&mut self.core, after),
            _ => {}
        }
        self.turn();
    }
}
