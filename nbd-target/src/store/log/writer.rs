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
    Frame(Waiting),
    Sync(oneshot::Sender<Result<(), Closed>>),
}

/// A frame that waits for the owner.
pub(super) struct Waiting {
    pub bytes: Vec<u8>,
    /// Who is told that it can be read, or that it is refused. One that nobody asks about waits for
    /// room instead.
    pub asked: Option<oneshot::Sender<Result<(), NoRoom>>>,
    /// Its part of the queue.
    _room: OwnedSemaphorePermit,
}

impl Waiting {
    /// Tells what has become of it. Who has asked may be gone.
    pub fn tell(self, outcome: Result<(), NoRoom>) {
        if let Some(asked) = self.asked {
            let _ = asked.send(outcome);
        }
    }
}

/// There is no room for a frame: it is not in the log, and never will be.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct NoRoom(pub Arc<str>);

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
        self.hand_over(frame, None).await
    }

    /// Hands a frame over as [`append`](Self::append) does; but it is refused, and all that was handed
    /// over after it, when it needs another segment and none can be begun at present. The answer
    /// comes when it can be read or has been refused; none when the log has failed or ends.
    ///
    /// # Errors
    /// [`Closed`] when the log has failed or ends.
    pub async fn offer(
        &self,
        frame: Vec<u8>,
    ) -> Result<oneshot::Receiver<Result<(), NoRoom>>, Closed> {
        let (asked, answer) = oneshot::channel();
        self.hand_over(frame, Some(asked)).await?;
        Ok(answer)
    }

    async fn hand_over(
        &self,
        bytes: Vec<u8>,
        asked: Option<oneshot::Sender<Result<(), NoRoom>>>,
    ) -> Result<(), Closed> {
        let part = bytes.len().min(QUEUE_BYTES_MAX) as u32;
        let room = Arc::clone(&self.room).acquire_many_owned(part).await;
        let waiting = Waiting { bytes, asked, _room: room.map_err(|_| self.closed())? };
        self.queue.send(Request::Frame(waiting)).await.map_err(|_| self.closed())
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

    /// Why it takes nothing more in.
    pub fn closed(&self) -> Closed {
        Closed(self.journal.progress().failed.unwrap_or_else(|| "it is being closed".into()))
    }
}
