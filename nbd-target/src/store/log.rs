//! The log's owner: the one task that writes a log's files.
//!
//! It is fed by a bounded queue and never cancelled, since a write that has been submitted lands in
//! any case. What comes while a batch is on its way to the disk is gathered and hashed, and becomes the
//! next one: one write, one fdatasync, then everything in it is acknowledged (invariant 4). Each batch
//! begins at a multiple of 4096, and inside a batch no further frame does; so a frame that is found at
//! such an offset *after* a damaged one proves that the damaged one had been synced before
//! (see [`super::recover`]).

mod batch;
mod scarce;
mod seal;
mod writer;

use std::{io, path::PathBuf, pin::pin, sync::Arc, time::Duration};

use tidemark_control::config::Bytes;
use tidemark_journal::{
    FrameView, Position,
    frame::FrameHeader,
    segment::{BLOCK_BYTES, SegmentEnd, SegmentStart},
};
use tidemark_link::seam::{AlignedBuf, How};
use tokio::sync::{mpsc, watch};

use super::{
    index::{MemoryIndex, sealed},
    journal::{Follower, Journal},
    segment::{Segment, Summary, file_name},
};
use batch::{Batch, Content, Needs};

use crate::machine::log::{LogFile, sync_dir};
pub use scarce::no_room;
use scarce::{final_sync, passing};
pub use seal::seal;
use seal::{Job, Sealing};
pub use writer::{Closed, LogWriter, NoRoom, QUEUE_BYTES_MAX};
use writer::{Request, Waiting};

/// How long to wait before asking again for room.
const RETRY: Duration = Duration::from_secs(1);

/// How a log is written.
#[derive(Clone, Copy, Debug)]
pub struct LogOptions {
    /// Bytes of a segment's file, index and trailer included.
    pub segment_bytes: u64,
    /// Entries after which a segment is sealed in any case: the bound of an index in memory.
    pub entries_max: usize,
    /// Whether each batch is synced before it counts; else only on request.
    pub sync_batches: bool,
    /// Bytes that the log never exceeds: what comes then waits until history has left.
    pub bytes_max: Option<u64>,
}

/// The last segment, to go on with.
pub struct Tail {
    /// The segment.
    pub segment: Arc<Segment>,
    /// Byte at which the next batch begins.
    pub end: u64,
    /// Bytes of its file.
    pub file_bytes: u64,
    /// Over the bytes before `end`.
    pub hasher: blake3::Hasher,
    /// Chain hash of the segment before.
    pub chain_before: [u8; 32],
}

/// Where a log goes on.
pub enum Start {
    /// In its last segment.
    Tail(Box<Tail>),
    /// In a new segment of this number, after that chain hash.
    Next {
        /// The number.
        number: u64,
        /// The chain hash before.
        chain_before: [u8; 32],
    },
}

/// A log's owner, to be run on a thread of the seam.
pub struct Owner {
    journal: Arc<Journal>,
    follower: Arc<dyn Follower>,
    options: LogOptions,
    queue: mpsc::Receiver<Request>,
    /// Why history does not leave at present, from whoever decides that.
    held: watch::Receiver<Option<Arc<str>>>,
    ending: watch::Receiver<bool>,
    start: Option<Start>,
}

/// A writer and the owner it feeds.
pub fn new(
    journal: Arc<Journal>,
    follower: Arc<dyn Follower>,
    options: LogOptions,
    held: watch::Receiver<Option<Arc<str>>>,
    start: Start,
) -> (LogWriter, Owner) {
    let (writer, queue, ending) = LogWriter::new(Arc::clone(&journal));
    (writer, Owner { journal, follower, options, queue, held, ending, start: Some(start) })
}

/// The segment that is being written.
struct Active {
    file: LogFile,
    segment: Arc<Segment>,
    end: u64,
    file_bytes: u64,
    content: Content,
    chain_before: [u8; 32],
    unsynced: bool,
}

/// A file that has its room and no content yet.
struct Spare {
    file: LogFile,
    path: PathBuf,
    number: u64,
    bytes: u64,
}

impl Owner {
    /// Takes frames in until all writers are gone; then syncs and ends. Nothing of the log goes on in
    /// the background after that.
    pub async fn run(mut self) {
        let mut sealing = None;
        let done = self.work(&mut sealing).await;
        self.told(done);
        // Writers that wait are told by the queue's end.
        self.queue.close();
        while self.queue.recv().await.is_some() {}
        if let Some(Sealing { task, .. }) = sealing {
            let sealed = task.await.map_err(io::Error::other).flatten();
            // What is not sealed is found again at the next start.
            self.told(sealed.or_else(|error| if passing(&error) { Ok(()) } else { Err(error) }));
        }
    }

    /// Says what a part of the work has failed of.
    fn told(&self, done: io::Result<()>) {
        let Err(error) = done else { return };
        let log = self.journal.dir().display();
        // What waited is with the source still.
        if error.get_ref().is_some_and(|reason| reason.is::<Ended>()) {
            tracing::info!(%log, "{error}");
            return;
        }
        let text: Arc<str> = format!("{error:#}").into();
        tracing::error!(%log, "the log has failed: {text}");
        self.journal.advance(|progress| {
            progress.failed.get_or_insert(text);
        });
    }

    async fn work(&mut self, sealing: &mut Option<Sealing>) -> io::Result<()> {
        let (mut active, mut next) = match self.start.take() {
            Some(Start::Tail(tail)) => {
                let next = (tail.segment.number() + 1, [0; 32]);
                (Some(self.reopen(tail).await?), next)
            }
            Some(Start::Next { number, chain_before }) => (None, (number, chain_before)),
            None => return Ok(()),
        };
        let mut spare = None;
        let mut carried = None;
        // One is gathered while the other is on its way.
        let (mut batch, mut gathered) = (Batch::new(), Batch::new());
        loop {
            if batch.is_empty() {
                let request = match carried.take() {
                    Some(request) => request,
                    None => match self.next().await {
                        Some(request) => request,
                        None => break,
                    },
                };
                let first = match request {
                    Request::Frame(waiting) => waiting,
                    Request::Sync(done) => {
                        let outcome = self.sync(active.as_mut()).await;
                        let told = outcome.as_ref().map_err(|e| Closed(e.to_string().into()));
                        let _ = done.send(told.copied());
                        outcome?;
                        continue;
                    }
                };
                if first.asked.is_some() && !self.continues(&first.bytes)? {
                    first.tell(Err(NoRoom("there was no room for what came before".into())));
                    continue;
                }
                let needs = Needs::of(&first.bytes)?;
                self.wait_for_size(&needs).await?;
                let full = active.as_ref().is_none_or(|active| !self.fits(active, &needs));
                if full {
                    if let Some(old) = active.take() {
                        self.sealed(sealing).await?;
                        let number = old.segment.number() + 1;
                        let (chain, begun) = self.roll(old).await?;
                        *sealing = Some(begun);
                        next = (number, chain);
                    }
                    let waits = first.asked.is_none();
                    match self.begin(next, needs, &mut spare, sealing, waits).await? {
                        Ok(opened) => active = Some(opened),
                        Err(no_room) => {
                            first.tell(Err(no_room));
                            continue;
                        }
                    }
                }
                let Some(open) = active.as_mut() else { continue };
                batch.begin(open.end);
                if open.end == 0 {
                    // The journal counts a segment's header from its beginning.
                    let start = SegmentStart {
                        number: open.segment.number(),
                        group: self.journal.group(),
                        before: open.segment.summary().before,
                        created_ns: self.journal.machine().wall_ns(),
                        chain_before: open.chain_before,
                    };
                    batch.put_start(&start, &mut open.content)?;
                }
                batch.push(first, &needs, &mut open.content)?;
            }
            let Some(open) = active.as_mut() else { continue };
            while batch.is_open()
                && carried.is_none()
                && let Ok(request) = self.queue.try_recv()
            {
                carried = self.join(request, &mut batch, &mut open.content, open.file_bytes, 0)?;
            }
            batch.close(&mut open.content);
            gathered.begin(batch.end());
            self.land(open, &mut batch, &mut gathered, &mut carried).await?;
            self.publish(open, &batch.frames)?;
            self.journal.grew(batch.buffer.len() as u64 - batch.header_bytes);
            batch.frames.drain(..).for_each(|(_, waiting)| waiting.tell(Ok(())));
            std::mem::swap(&mut batch, &mut gathered);
            if spare.is_none() && open.end > open.file_bytes / 2 {
                // Ahead of need, so that it is known early whether there is room.
                match self.prepare(open.segment.number() + 1, self.options.segment_bytes).await {
                    Ok(file) => spare = Some(file),
                    Err(error) if passing(&error) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        self.sync(active.as_mut()).await
    }

    /// Waits until the segment before is sealed, which is tried again as long as what it lacks may come.
    async fn sealed(&mut self, sealing: &mut Option<Sealing>) -> io::Result<()> {
        while let Some(Sealing { job, task }) = sealing.take() {
            match task.await.map_err(io::Error::other)? {
                Err(error) if passing(&error) => {
                    let number = job.segment.number();
                    self.stall(&format!("segment {number} cannot be sealed at present: {error}"))
                        .await?;
                    *sealing = Some(job.begin());
                }
                done => return done,
            }
        }
        Ok(())
    }

    /// The next request; none when all writers are gone, or the log ends and nothing is left.
    async fn next(&mut self) -> Option<Request> {
        tokio::select! {
            biased;
            request = self.queue.recv() => return request,
            () = ended(&mut self.ending) => {}
        }
        self.queue.close();
        self.queue.recv().await
    }

    /// Waits until a frame goes into the log without exceeding its size.
    async fn wait_for_size(&mut self, needs: &Needs) -> io::Result<()> {
        let mut bytes = self.journal.watch_bytes();
        while let Some(max) =
            self.options.bytes_max.filter(|_| needs.exceed(&self.journal, &self.options, 0))
        {
            if self.journal.want(needs.room_bytes()) {
                self.follower.pressed();
            }
            let held = self.held.borrow_and_update().clone();
            let why = held.as_deref().unwrap_or("its oldest history is about to leave");
            let text = format!("the log has reached its size of {} and {why}", Bytes(max));
            self.journal.advance(|progress| progress.stalled = Some(text.into()));
            tokio::select! {
                biased;
                () = ended(&mut self.ending) => return Err(io::Error::other(Ended)),
                changed = self.held.changed() => changed.map_err(io::Error::other)?,
                changed = bytes.changed() => changed.map_err(io::Error::other)?,
            }
        }
        self.journal.want(0);
        self.journal.advance(|progress| progress.stalled = None);
        Ok(())
    }

    fn fits(&self, active: &Active, needs: &Needs) -> bool {
        active.content.fits(needs, active.end, active.file_bytes, &self.options)
    }

    /// Has a frame join a batch, with so many bytes on their way before it; what may not is given back.
    fn join(
        &self,
        request: Request,
        batch: &mut Batch,
        content: &mut Content,
        file_bytes: u64,
        under_way: u64,
    ) -> io::Result<Option<Request>> {
        let Request::Frame(waiting) = request else { return Ok(Some(request)) };
        let needs = Needs::of(&waiting.bytes)?;
        let under_way = under_way + batch.buffer.len() as u64;
        if !content.fits(&needs, batch.end(), file_bytes, &self.options)
            || needs.exceed(&self.journal, &self.options, under_way)
        {
            return Ok(Some(Request::Frame(waiting)));
        }
        batch.push(waiting, &needs, content)?;
        Ok(None)
    }

    async fn reopen(&mut self, tail: Box<Tail>) -> io::Result<Active> {
        let tail = *tail;
        let file = loop {
            match LogFile::open(self.journal.machine(), tail.segment.path(), How::WRITE_DIRECT)
                .await
            {
                Ok(file) => break file,
                Err(error) if passing(&error) => self.stall(&error.to_string()).await?,
                Err(error) => return Err(error),
            }
        };
        self.journal.advance(|progress| progress.stalled = None);
        // What was found may still be in the kernel's memory only.
        file.sync_data().await?;
        let counts = tail.segment.with_memory(|index| {
            (index.entries().len(), index.chunks().len(), index.frames().len())
        });
        let (entries, chunks, frames) = counts.unwrap_or_default();
        Ok(Active {
            file,
            segment: tail.segment,
            end: tail.end,
            file_bytes: tail.file_bytes,
            content: Content { hasher: tail.hasher, entries, chunks, frames },
            chain_before: tail.chain_before,
            unsynced: false,
        })
    }

    /// Makes a file with its room set aside.
    async fn prepare(&self, number: u64, bytes: u64) -> io::Result<Spare> {
        self.follower.may_grow()?;
        let path = self.journal.dir().join(file_name(number));
        let machine = self.journal.machine();
        let file = LogFile::open(machine, &path, How::NEW_DIRECT).await?;
        let made = match file.preallocate(0, bytes).await {
            Ok(_) => sync_dir(machine, self.journal.dir()).await.map_err(final_sync),
            Err(error) => Err(error),
        };
        if let Err(error) = made {
            let _ = machine.remove_file(&path);
            return Err(error);
        }
        Ok(Spare { file, path, number, bytes })
    }

    /// Whether a frame follows what is in the log: it does not when the one before it was refused.
    fn continues(&self, frame: &[u8]) -> io::Result<bool> {
        let header = FrameHeader::peek(frame).map_err(io::Error::other)?;
        Ok(header.before() == self.journal.progress().written)
    }

    /// Begins a segment. As long as there is no room it waits, or says so.
    async fn begin(
        &mut self,
        (number, chain_before): (u64, [u8; 32]),
        needs: Needs,
        spare: &mut Option<Spare>,
        sealing: &mut Option<Sealing>,
        waits: bool,
    ) -> io::Result<Result<Active, NoRoom>> {
        let index = sealed::bytes_max(needs.entries, needs.chunks, 1);
        let least = 2 * BLOCK_BYTES + (needs.bytes as u64).next_multiple_of(BLOCK_BYTES) + index;
        let bytes = self.options.segment_bytes.max(least);
        let spare = loop {
            let made = match spare.take().filter(|spare| spare.number == number) {
                Some(spare) if spare.bytes >= bytes => Ok(spare),
                Some(spare) => {
                    let more = spare.file.preallocate(0, bytes).await;
                    more.map(|_| Spare { bytes, ..spare })
                }
                None => self.prepare(number, bytes).await,
            };
            match made {
                Ok(spare) => break spare,
                Err(error) if passing(&error) => {
                    let text = if no_room(&error) {
                        let mib = bytes >> 20;
                        format!("there is no room for another segment of {mib} MiB: {error}")
                    } else {
                        format!("another segment cannot be begun at present: {error}")
                    };
                    let path = self.journal.dir().join(file_name(number));
                    let _ = self.journal.machine().remove_file(&path);
                    if !waits {
                        return Ok(Err(NoRoom(text.into())));
                    }
                    self.stall(&text).await?;
                    // Only what is sealed can leave, and give room.
                    if sealing.as_ref().is_some_and(|sealing| sealing.task.is_finished()) {
                        self.sealed(sealing).await?;
                    }
                }
                Err(error) => return Err(error),
            }
        };
        self.journal.advance(|progress| progress.stalled = None);
        let before = self.journal.progress().written;
        let segment = Arc::new(Segment::open(
            spare.path,
            number,
            Summary::empty(before),
            MemoryIndex::default(),
            self.journal.caches(),
        ));
        self.journal.push(Arc::clone(&segment));
        self.follower.pressed();
        Ok(Ok(Active {
            file: spare.file,
            segment,
            end: 0,
            file_bytes: spare.bytes,
            content: Content::default(),
            chain_before,
            unsynced: false,
        }))
    }

    /// Writes a batch, and syncs it if each one is, waiting for room where the file system gives less than it
    /// had promised. Meanwhile the next one is gathered.
    async fn land(
        &mut self,
        open: &mut Active,
        batch: &mut Batch,
        gathered: &mut Batch,
        carried: &mut Option<Request>,
    ) -> io::Result<()> {
        let (at, bytes) = (open.end, batch.buffer.len() as u64);
        let file = &open.file;
        let buffer = std::mem::replace(&mut batch.buffer, AlignedBuf::new(0));
        let (journal, mut ending) = (Arc::clone(&self.journal), self.ending.clone());
        let sync = self.options.sync_batches;
        let landing = async {
            let buffer = write(file, buffer, at, &journal, &mut ending).await?;
            if sync {
                file.sync_data().await?;
            }
            Ok::<_, io::Error>(buffer)
        };
        let mut landing = pin!(landing);
        let mut over = false;
        batch.buffer = loop {
            tokio::select! {
                biased;
                landed = &mut landing => break landed?,
                request = self.queue.recv(), if !over && carried.is_none() && gathered.is_open() => {
                    let Some(request) = request else {
                        over = true;
                        continue;
                    };
                    // What was asked of the disk so far is to be on its way while this is worked on.
                    file.submit().await?;
                    let refusable =
                        matches!(&request, Request::Frame(waiting) if waiting.asked.is_some());
                    *carried = if refusable {
                        Some(request)
                    } else {
                        self.join(request, gathered, &mut open.content, open.file_bytes, bytes)?
                    };
                }
            }
        };
        open.end += bytes;
        open.unsynced = !sync;
        Ok(())
    }

    async fn stall(&mut self, text: &str) -> io::Result<()> {
        stall(&self.journal, &mut self.ending, text).await
    }

    fn publish(&self, open: &Active, batch: &[(u64, Waiting)]) -> io::Result<()> {
        let received_ns = self.follower.received_ns();
        let mut end = None;
        for (at, waiting) in batch {
            let view = FrameView::parse(&waiting.bytes).map_err(io::Error::other)?;
            open.segment.publish(&view, *at, open.end, received_ns);
            self.follower.stored(&view);
            end = Some(view.header().last());
        }
        if let Some(end) = end {
            self.moved(end, self.options.sync_batches);
        }
        Ok(())
    }

    fn moved(&self, end: Position, durable: bool) {
        self.journal.advance(|progress| {
            progress.written = end;
            if durable {
                progress.durable = end;
            }
        });
    }

    async fn sync(&self, active: Option<&mut Active>) -> io::Result<()> {
        if let Some(active) = active.filter(|active| active.unsynced) {
            active.file.sync_data().await?;
            active.unsynced = false;
        }
        self.journal.advance(|progress| progress.durable = progress.written);
        Ok(())
    }

    /// Ends a segment and has it sealed in the background; its chain hash.
    async fn roll(&self, mut old: Active) -> io::Result<([u8; 32], Sealing)> {
        self.sync(Some(&mut old)).await?;
        let data_hash = *old.content.hasher.finalize().as_bytes();
        let chain = SegmentEnd::chain_hash(&old.chain_before, &data_hash);
        let (segment, follower) = (old.segment, Arc::clone(&self.follower));
        Ok((chain, Job { segment, end: old.end, data_hash, chain, follower }.begin()))
    }
}

/// Writes the whole buffer, waiting for room if there is none, and gives it back.
async fn write(
    file: &LogFile,
    mut buffer: AlignedBuf,
    at: u64,
    journal: &Journal,
    ending: &mut watch::Receiver<bool>,
) -> io::Result<AlignedBuf> {
    loop {
        let (result, back) = file.write_all_at(buffer, at).await;
        buffer = back;
        match result {
            Ok(()) => break,
            Err(error) if passing(&error) => stall(journal, ending, &error.to_string()).await?,
            Err(error) => return Err(error),
        }
    }
    journal.advance(|progress| progress.stalled = None);
    Ok(buffer)
}

/// Says why nothing is accepted at present, and waits before it is tried again.
async fn stall(
    journal: &Journal,
    ending: &mut watch::Receiver<bool>,
    text: &str,
) -> io::Result<()> {
    let stalled: Arc<str> = text.into();
    if journal.progress().stalled.as_ref() != Some(&stalled) {
        tracing::warn!(log = %journal.dir().display(), "not accepting: {text}");
    }
    journal.advance(|progress| progress.stalled = Some(stalled));
    tokio::select! {
        biased;
        () = ended(ending) => Err(io::Error::other(Ended)),
        () = tokio::time::sleep(RETRY) => Ok(()),
    }
}

async fn ended(ending: &mut watch::Receiver<bool>) {
    // An error means that all writers are gone, which the queue says too.
    if ending.wait_for(|ending| *ending).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// A stop, and no failure.
#[derive(Debug, thiserror::Error)]
#[error("the log was ended while it waited for room")]
struct Ended;
