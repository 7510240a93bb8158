//! The spool: frames on a disk that is not protected, when the ring cannot hold them all.
//!
//! The second rung of the ladder below the application: the ring's memory, the spool, and a gap.
//! The oldest frames of the [outbox](crate::outbox) are appended here as they are, in the journal's
//! own segments, several with one sync, and leave the memory when that is durable; the sender reads
//! them back in order. A segment is removed when all of it is final-durable.
//!
//! ```text
//! oldest                                                    newest
//! | removed | spool: segment, segment, .. | memory: frame, frame, .. | slots |
//!           ^ final-durable, durably known
//! ```
//!
//! So everything up to the spool's end is final-durable or on stable storage here, and no dirty bit
//! is needed for it (invariant 2): the map takes it for final-durable as soon as the state block names
//! the spool's end ([`GroupState::spooled`](crate::state::block::GroupState::spooled)). A start that
//! does not find what is named there compares everything.
//!
//! - [`media`]: the files, or what a test puts in their place
//! - [`store`]: segments, appended to and removed
//! - [`recover()`]: finding them again
//! - [`reader`]: frames for the sender
//! - [`own_disk`]: where a spool must not lie

pub mod media;
pub mod own_disk;
pub mod reader;
mod recover;
pub mod store;
mod walk;

#[cfg(test)]
mod tests;

use std::{
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tidemark_journal::{Position, Seq, frame::FRAME_BYTES_MAX};
use tidemark_link::seam::AlignedBuf;

use crate::outbox::{Chore, Outbox};

pub use reader::{ReadError, Reader, Spooled};
pub use recover::recover;
pub use store::{Batch, Index, Limits, SpoolError, Store};

/// How long the thread waits at most for something to do.
const WAIT: Duration = Duration::from_millis(500);
/// A failure that goes on is told again after this.
const TELL_AGAIN: Duration = Duration::from_secs(60);

/// What the thread tells.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Told {
    /// Everything up to here is final-durable or lies in the spool, durably, unless the outbox has
    /// dropped everything since ([`Outbox::epoch`]).
    Spooled(Position, u64),
    /// What is final-durable is to be noted durably now: there is no room for more before that.
    Settle,
}

/// Starts the thread that does an outbox's chores for a spool. It ends when the outbox is closed.
///
/// # Errors
/// The thread cannot be started.
pub fn start(
    store: Store,
    outbox: Arc<Outbox>,
    tell: impl Fn(Told) + Send + 'static,
) -> std::io::Result<JoinHandle<()>> {
    let mut worker = Worker::new(store, outbox);
    std::thread::Builder::new().name("tm-spool".into()).spawn(
        move || {
            while worker.turn(WAIT, &tell) {}
        },
    )
}

/// What the thread does; it waits for nothing but the spool's disk.
pub struct Worker {
    store: Store,
    outbox: Arc<Outbox>,
    buffer: AlignedBuf,
    /// What people were last told of a failure, and when.
    told: Option<(String, Instant)>,
}

impl Worker {
    /// Does the chores of an outbox.
    pub fn new(store: Store, outbox: Arc<Outbox>) -> Worker {
        Worker { store, outbox, buffer: AlignedBuf::new(FRAME_BYTES_MAX), told: None }
    }

    /// Does the next chore, if one comes up before `wait` is over. False at the end.
    pub fn turn(&mut self, wait: Duration, tell: &dyn Fn(Told)) -> bool {
        match self.outbox.chore(&mut self.buffer, wait) {
            Chore::None => {}
            Chore::Append(batch, epoch) => self.append(&batch, epoch, tell),
            Chore::Forget(seq) => self.forget(seq),
            Chore::Settle => {
                tell(Told::Settle);
                std::thread::sleep(wait.min(Duration::from_millis(10)));
            }
            Chore::Clear => match self.store.clear() {
                Ok(()) => self.outbox.spool_cleared(),
                Err(error) => {
                    self.failed(&SpoolError::Io(error));
                    std::thread::sleep(wait);
                }
            },
            Chore::Stop => return false,
        }
        true
    }

    fn append(&mut self, batch: &Batch, epoch: u64, tell: &dyn Fn(Told)) {
        match self.store.append(batch, &self.buffer) {
            Ok(()) => {
                if self.outbox.spooled(batch, epoch) {
                    tell(Told::Spooled(batch.last, epoch));
                }
            }
            Err(error) => {
                if matches!(error, SpoolError::Full) {
                    tell(Told::Settle);
                }
                self.failed(&error);
            }
        }
    }

    fn forget(&mut self, seq: Seq) {
        if let Err(error) = self.store.forget(seq) {
            // The next start removes it.
            tracing::warn!(%error, "a file of the spool cannot be removed");
        }
    }

    fn failed(&mut self, error: &SpoolError) {
        let sentence = self.outbox.not_spooled(error);
        // At its limit it is full again and again, for a moment.
        let now = Instant::now();
        let known = |(said, at): &(String, Instant)| *said == sentence && now - *at < TELL_AGAIN;
        if !self.told.as_ref().is_some_and(known) {
            tracing::warn!("{sentence}");
            self.told = Some((sentence, now));
        }
    }
}
