//! The writer of a branch: what has queued up becomes one frame.

use bytes::Bytes;
use tidemark_journal::{
    Compression, FrameBuilder, FrameMeta, GroupId, Kind, Position, Record, SECTOR_BYTES, Sector,
    Seq, TermId, VolumeId, record::RECORD_BYTES_MAX,
};
use tokio::sync::{mpsc, oneshot};

use crate::store::log::{LogWriter, NoRoom};

/// The most bytes gathered into one frame.
const FRAME_PAYLOAD_MAX: u64 = 4 << 20;

/// A change of a volume's content.
#[derive(Clone, Debug)]
pub struct Change {
    /// The volume.
    pub volume: VolumeId,
    /// First sector.
    pub start: u64,
    /// What the sectors get.
    pub content: Content,
}

/// What sectors get.
#[derive(Clone, Debug)]
pub enum Content {
    /// Bytes, a whole number of sectors.
    Data(Bytes),
    /// So many sectors of zeros.
    Zeros(u64),
    /// So many sectors given up; they read as zeros.
    Discard(u64),
}

/// Why a change was not made.
#[derive(Clone, Debug, thiserror::Error)]
pub enum WriteError {
    /// There is no room on the target's disk. Nothing of it comes later.
    #[error("the branch takes nothing in at present: {0}")]
    Full(String),
    /// The log has failed or the target ends.
    #[error("the branch takes nothing more in: {0}")]
    Closed(String),
}

pub(super) struct Request {
    change: Option<Change>,
    durable: bool,
    done: oneshot::Sender<Result<(), WriteError>>,
}

pub(super) async fn ask(
    queue: &mpsc::Sender<Request>,
    change: Option<Change>,
    durable: bool,
) -> Result<(), WriteError> {
    let closed = || WriteError::Closed("it has been dropped".to_owned());
    let (done, outcome) = oneshot::channel();
    queue.send(Request { change, durable, done }).await.map_err(|_| closed())?;
    outcome.await.map_err(|_| closed())?
}

/// Takes changes in until the branch is gone.
pub(super) async fn run(
    log: LogWriter,
    group: GroupId,
    term: TermId,
    end: Position,
    mut queue: mpsc::Receiver<Request>,
) {
    let started = tokio::time::Instant::now();
    let mut writer = Writer {
        log,
        builder: FrameBuilder::new(Compression::Zstd(1)),
        group,
        term,
        before: end,
        last: end.seq,
        offered: Vec::new(),
    };
    while let Some(request) = queue.recv().await {
        let mut batch = vec![request];
        let mut bytes = 0;
        while bytes < FRAME_PAYLOAD_MAX {
            let Ok(request) = queue.try_recv() else { break };
            if let Some(Change { content: Content::Data(data), .. }) = &request.change {
                bytes += data.len() as u64;
            }
            batch.push(request);
        }
        let time_ns = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let written = writer.write(&batch, time_ns).await;
        let durable = batch.iter().any(|request| request.durable);
        // What was taken in before is made durable also where there is no room for more.
        let synced = if durable { writer.sync().await } else { Ok(()) };
        for request in batch {
            let written = request.change.map_or(Ok(()), |_| written.clone());
            let outcome = if request.durable { written.and(synced.clone()) } else { written };
            // A client that has gone does not wait for its answer.
            let _ = request.done.send(outcome);
        }
    }
}

struct Writer {
    log: LogWriter,
    builder: FrameBuilder,
    group: GroupId,
    term: TermId,
    before: Position,
    last: Seq,
    /// The answers to come for the frames that were handed over.
    offered: Vec<oneshot::Receiver<Result<(), NoRoom>>>,
}

impl Writer {
    /// Takes the changes of a batch in. A flush is recorded only behind changes: it needs room.
    async fn write(&mut self, batch: &[Request], time_ns: u64) -> Result<(), WriteError> {
        for change in batch.iter().filter_map(|request| request.change.as_ref()) {
            for (record, payload) in records(change, time_ns) {
                self.push(record, payload).await?;
            }
        }
        if !self.builder.is_empty() && batch.iter().any(|request| request.durable) {
            let flush = record(Kind::Flush, VolumeId(0), 0, 0, time_ns);
            self.push(flush, &[]).await?;
        }
        self.flush().await?;
        self.written().await
    }

    async fn sync(&self) -> Result<(), WriteError> {
        self.log.sync().await.map_err(|error| WriteError::Closed(error.to_string()))
    }

    async fn push(&mut self, record: Record, payload: &[u8]) -> Result<(), WriteError> {
        let record = Record { seq: self.last.next(), ..record };
        if !self.builder.fits(&record) {
            self.flush().await?;
        }
        self.builder.push(&record, [payload]);
        self.last = record.seq;
        Ok(())
    }

    /// Hands the frame in the making over.
    async fn flush(&mut self) -> Result<(), WriteError> {
        if self.builder.is_empty() {
            return Ok(());
        }
        let wall_ns = self.log.journal().machine().wall_ns();
        let meta = FrameMeta { group: self.group, term: self.term, before: self.before, wall_ns };
        let frame = self.builder.finish(&meta);
        let (bytes, last) = (frame.to_vec(), frame.last);
        self.builder.clear();
        self.before = Position { term: self.term, seq: last };
        let offered = self.log.offer(bytes).await;
        self.offered.push(offered.map_err(|error| WriteError::Closed(error.to_string()))?);
        Ok(())
    }

    /// Waits until everything handed over can be read, or has been refused.
    async fn written(&mut self) -> Result<(), WriteError> {
        let mut refused = None;
        for answer in self.offered.drain(..) {
            match answer.await {
                Ok(Ok(())) => {}
                Ok(Err(NoRoom(why))) => refused = refused.or(Some(why)),
                Err(_) => return Err(WriteError::Closed(self.log.closed().to_string())),
            }
        }
        let Some(why) = refused else { return Ok(()) };
        // The next frame follows what is in the log.
        self.before = self.log.journal().progress().written;
        self.last = self.before.seq;
        Err(WriteError::Full(why.to_string()))
    }
}

/// The records of a change, each with its payload: content does not cross a multiple of 1 MiB.
fn records(change: &Change, time_ns: u64) -> Vec<(Record, &[u8])> {
    const REGION: u64 = RECORD_BYTES_MAX / SECTOR_BYTES;
    let (volume, mut start) = (change.volume, change.start);
    let mut records = Vec::new();
    let mut zeros = |kind, mut left: u64| {
        while left > 0 {
            let sectors = left.min(u64::from(u32::MAX));
            records.push((record(kind, volume, start, sectors as u32, time_ns), &[][..]));
            (start, left) = (start + sectors, left - sectors);
        }
    };
    match &change.content {
        Content::Zeros(sectors) => zeros(Kind::Zero, *sectors),
        Content::Discard(sectors) => zeros(Kind::Discard, *sectors),
        Content::Data(data) => {
            let mut rest: &[u8] = data;
            while !rest.is_empty() {
                let room = (REGION - start % REGION) * SECTOR_BYTES;
                let (part, after) = rest.split_at(rest.len().min(room as usize));
                let sectors = part.len() as u64 / SECTOR_BYTES;
                records.push((record(Kind::Write, volume, start, sectors as u32, time_ns), part));
                (start, rest) = (start + sectors, after);
            }
        }
    }
    records
}

fn record(kind: Kind, volume: VolumeId, start: u64, sectors: u32, time_ns: u64) -> Record {
    Record { kind, flags: 0, volume, seq: Seq::ZERO, time_ns, start: Sector(start), sectors }
}
