//! The side of a log that feeds its owner: a queue with bounds.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use crate::store::journal::Journal;

/// The most bytes of frames waiting for the owner.
pub const QUEUE_BYTES_MAX: usize = 48 << 20;
const QUEUE_FRAMES_MAX: usize = 4096;

/// Feeds a log's owner.
#[derive(Clone)]
pub struct LogWriter {
    queue: mpsc::Sender<Request>,
    room: Arc<Semaphore>,
    journal: Arc<Journal>,
    ending: Arc<watch::Sender<bool>>,
}

pub(super) enum Request {
    Frame(Vec<u8>, OwnedSemaphorePermit),
    Sync(oneshot::Sender<Result<(), Closed>>),
}

/// The log takes nothing more in.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the log takes nothing more in: {0}")]
pub struct Closed(pub Arc<str>);

impl LogWriter {
    /// A writer with the queue that it feeds, and the word that the log is to end.
    pub(super) fn new(
        journal: Arc<Journal>,
    ) -> (LogWriter, mpsc::Receiver<Request>, watch::Receiver<bool>) {
        let (queue, requests) = mpsc::channel(QUEUE_FRAMES_MAX);
        let (end, ending) = watch::channel(false);
        let room = Arc::new(Semaphore::new(QUEUE_BYTES_MAX));
        (LogWriter { queue, room, journal, ending: Arc::new(end) }, requests, ending)
    }

    /// Hands a frame over, which has been checked and continues the one before. Waits while the
    /// queue is full. How far it has come is seen at the journal.
    ///
    /// # Errors
    /// [`Closed`] when the log has failed or ends.
    pub async fn append(&self, frame: Vec<u8>) -> Result<(), Closed> {
        let bytes = frame.len().min(QUEUE_BYTES_MAX) as u32;
        let closed = |_| self.closed();
        let permit =
            Arc::clone(&self.room).acquire_many_owned(bytes).await.map_err(|_| self.closed())?;
        self.queue.send(Request::Frame(frame, permit)).await.map_err(closed)
    }

    /// Makes everything handed over before durable.
    ///
    /// # Errors
    /// [`Closed`] when the log has failed or ends.
    pub async fn sync(&self) -> Result<(), Closed> {
        let (done, synced) = oneshot::channel();
        self.queue.send(Request::Sync(done)).await.map_err(|_| self.closed())?;
        synced.await.map_err(|_| self.closed())?
    }

    /// Whether frames wait for the owner.
    pub fn is_busy(&self) -> bool {
        self.room.available_permits() < QUEUE_BYTES_MAX
    }

    /// Lets the owner end once what was handed over is stored, or at once where it waits for room.
    pub fn end(&self) {
        self.ending.send_replace(true);
    }

    /// Whether the owner is to end.
    pub fn is_ending(&self) -> bool {
        *self.ending.borrow()
    }

    /// Waits until the owner has ended, and with it all that was done for the log in the background.
    pub async fn ended(&self) {
        // The owner alone listens.
        self.ending.closed().await;
    }

    /// The log's read side.
    pub fn journal(&self) -> &Arc<Journal> {
        &self.journal
    }

    fn closed(&self) -> Closed {
        Closed(self.journal.progress().failed.unwrap_or_else(|| "it is being closed".into()))
    }
}
