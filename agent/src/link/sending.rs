//! The sending side of a session: frames out of the outbox, and heartbeats between them.

use std::{cell::RefCell, rc::Rc, sync::Arc, time::Instant};

use anyhow::Context;
use tidemark_journal::{Ancestry, Position, Seq};
use tidemark_link::{
    conn::Sender,
    message::{Heartbeat, Message},
    throttle::{Schedule, Throttle},
};

use super::{HEARTBEAT, Shared, grants::Grants, session::to_send, spooled::SpoolEnd};
use crate::{encoder, engine::Engine, outbox::Outbox, state::keeper::Keeper};

/// What sends, while a session lasts.
pub(super) struct SendLoop {
    pub sender: Sender,
    pub from: Position,
    pub ancestry: Ancestry,
    pub outbox: Arc<Outbox>,
    pub encoder: encoder::Waker,
    pub engine: Engine,
    pub keeper: Keeper,
    pub shared: Arc<Shared>,
    pub beats: Rc<RefCell<Option<(u64, Instant)>>>,
    pub grants: Grants,
    pub throttle: Schedule,
    pub spool: SpoolEnd,
}

impl SendLoop {
    /// Sends until the connection ends.
    pub async fn run(mut self) -> anyhow::Result<()> {
        self.sender.set_throttle(Throttle::new(self.throttle.clone()), crate::clock::minute_of_day);
        let mut beat_at = tokio::time::Instant::now();
        let mut number = 0;
        // Until something can be vouched for, a heartbeat says only that we are alive.
        let mut vouch = Heartbeat {
            number: 0,
            journal_ns: 0,
            wall_ns: 0,
            vouched: self.from,
            map_generation: self.keeper.generation(),
        };
        let outbox = self.outbox.clone();
        let mut bytes = Vec::new();
        loop {
            // Either wakes it; what there is to do is looked at below. While frames are held, since
            // the target is full, that is heartbeats alone.
            let _ = tokio::time::timeout_at(beat_at, outbox.filled.notified()).await;
            loop {
                if tokio::time::Instant::now() >= beat_at {
                    beat_at = tokio::time::Instant::now() + HEARTBEAT;
                    number += 1;
                    self.heartbeat(number, &mut vouch).await?;
                }
                if let Some(grant) = self.grants.take() {
                    self.sender.send(&Message::LeaseGrant(grant)).await?;
                }
                if let Some((after, index)) = outbox.next_in_spool() {
                    let frame;
                    (frame, bytes) = self.spool.read(&outbox, after, index, bytes).await?;
                    self.encoder.wake();
                    self.send(frame.before.seq, &bytes).await?;
                    outbox.sent_spooled(&frame);
                    continue;
                }
                let Some(frame) = outbox.take(&mut bytes) else { break };
                self.encoder.wake();
                self.send(frame.before.seq, &bytes).await?;
            }
            self.encoder.wake();
            self.sender.flush().await?;
        }
    }

    /// Sends what the replica lacks of a frame that continues `before`.
    async fn send(&mut self, before: Seq, frame: &[u8]) -> anyhow::Result<()> {
        let bytes = to_send(frame, before, self.from).context("a frame of our own is damaged")?;
        if let Some(bytes) = bytes {
            self.sender.send_frame(&[&bytes]).await?;
            self.shared.status().sent_bytes += bytes.len() as u64;
        }
        Ok(())
    }

    async fn heartbeat(&mut self, number: u64, vouch: &mut Heartbeat) -> anyhow::Result<()> {
        let snapshot = self.engine.snapshot();
        // Only what has been sent can be vouched for.
        if let Some(seq) = snapshot.vouched.filter(|seq| self.outbox.sent_through(*seq)) {
            vouch.vouched = self.ancestry.at(seq);
            (vouch.journal_ns, vouch.wall_ns) = (snapshot.journal_ns, snapshot.wall_ns);
        }
        (vouch.number, vouch.map_generation) = (number, self.keeper.generation());
        *self.beats.borrow_mut() = Some((number, Instant::now()));
        self.sender.send(&Message::Heartbeat(*vouch)).await?;
        Ok(())
    }
}
