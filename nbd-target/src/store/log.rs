//! The log's owner: the one task that writes a log's files.
//!
//! It is fed by a bounded queue and never cancelled, since a write that has been submitted lands in
//! any case. What has queued up while the last batch was being synced becomes the next batch: one
//! write, one fdatasync, then everything in it is acknowledged (invariant 4). Each batch begins at
//! a multiple of 4096, and inside a batch no further frame does; so a frame that is found at such
//! an offset *after* a damaged one proves that the damaged one had been synced before
//! (see [`super::recover`]).

mod scarce;
mod seal;
mod writer;

use std::{io, path::PathBuf, sync::Arc, time::Duration};

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

use crate::machine::log::{LogFile, sync_dir};
pub use scarce::no_room;
use scarce::{final_sync, passing};
pub use seal::seal;
use seal::{Job, Sealing};
pub use writer::{Closed, LogWriter, NoRoom, QUEUE_BYTES_MAX};
use writer::{Request, Waiting};

/// The most bytes in a batch; a longer frame is a batch by itself.
const BATCH_BYTES_MAX: usize = 8 << 20;
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
    hasher: blake3::Hasher,
    chain_before: [u8; 32],
    /// Upper bounds of what the index will hold.
    entries: usize,
    chunks: usize,
    frames: usize,
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
        let mut buffer = AlignedBuf::new(
            tidemark_journal::frame::FRAME_BYTES_MAX + 2 * BLOCK_BYTES as usize + BATCH_BYTES_MAX,
        );
        let mut carried = None;
        loop {
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
                    let told = outcome.as_ref().map_err(|e| Closed(e.to_string().into())).copied();
                    let _ = done.send(told);
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
            let full = active.as_ref().is_none_or(|active| !self.fits(active, &needs, 0));
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
            buffer.clear();
            // The journal counts a segment's header from its beginning.
            let header_bytes = if open.end == 0 { BLOCK_BYTES } else { 0 };
            if open.end == 0 {
                let start = SegmentStart {
                    number: open.segment.number(),
                    group: self.journal.group(),
                    before: open.segment.summary().before,
                    created_ns: self.journal.machine().wall_ns(),
                    chain_before: open.chain_before,
                };
                buffer.extend(&start.encode()).map_err(io::Error::other)?;
            }
            let mut batch = Vec::new();
            let mut candidate = Some((first, needs));
            while let Some((waiting, needs)) = candidate.take() {
                let at = open.end + buffer.len() as u64;
                buffer.extend(&waiting.bytes).map_err(io::Error::other)?;
                open.entries += needs.entries;
                open.chunks += needs.chunks;
                open.frames += 1;
                batch.push((at, waiting));
                // A further frame joins unless it would begin at a multiple of 4096 (see above).
                let aligned = (buffer.len() as u64).is_multiple_of(BLOCK_BYTES);
                if aligned || buffer.len() >= BATCH_BYTES_MAX {
                    break;
                }
                match self.queue.try_recv() {
                    Ok(Request::Frame(waiting)) => {
                        let needs = Needs::of(&waiting.bytes)?;
                        let buffered = buffer.len() as u64;
                        if self.fits(open, &needs, buffered) && !self.exceeds(&needs, buffered) {
                            candidate = Some((waiting, needs));
                        } else {
                            carried = Some(Request::Frame(waiting));
                        }
                    }
                    Ok(sync) => carried = Some(sync),
                    Err(_) => {}
                }
            }
            buffer.pad_to_block();
            buffer = self.write(open, buffer).await?;
            open.hasher.update(buffer.as_slice());
            open.end += buffer.len() as u64;
            open.unsynced = true;
            if self.options.sync_batches {
                open.file.sync_data().await?;
                open.unsynced = false;
            }
            self.publish(open, &batch)?;
            self.journal.grew(buffer.len() as u64 - header_bytes);
            batch.into_iter().for_each(|(_, waiting)| waiting.tell(Ok(())));
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
        while let Some(max) = self.options.bytes_max.filter(|_| self.exceeds(needs, 0)) {
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

    /// Whether a frame would make the log larger than it may be. One segment may always grow: only
    /// what follows it lets it be sealed, and only what is sealed can leave.
    fn exceeds(&self, needs: &Needs, buffered: u64) -> bool {
        let after = self.journal.bytes() + buffered + needs.room_bytes();
        self.options.bytes_max.is_some_and(|max| after > max && self.journal.segments().len() > 1)
    }

    fn fits(&self, active: &Active, needs: &Needs, buffered: u64) -> bool {
        let index = sealed::bytes_max(
            active.entries + needs.entries,
            active.chunks + needs.chunks,
            active.frames + 1,
        );
        let data = (active.end + buffered + needs.bytes as u64).next_multiple_of(BLOCK_BYTES);
        data + index + BLOCK_BYTES <= active.file_bytes
            && active.entries + needs.entries <= self.options.entries_max
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
            hasher: tail.hasher,
            chain_before: tail.chain_before,
            entries,
            chunks,
            frames,
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
            hasher: blake3::Hasher::new(),
            chain_before,
            entries: 0,
            chunks: 0,
            frames: 0,
            unsynced: false,
        }))
    }

    /// Writes a batch, waiting for room where the file system gives less than it had promised.
    async fn write(&mut self, open: &Active, mut buffer: AlignedBuf) -> io::Result<AlignedBuf> {
        loop {
            let (result, back) = open.file.write_all_at(buffer, open.end).await;
            buffer = back;
            match result {
                Ok(()) => break,
                Err(error) if passing(&error) => self.stall(&error.to_string()).await?,
                Err(error) => return Err(error),
            }
        }
        self.journal.advance(|progress| progress.stalled = None);
        Ok(buffer)
    }

    async fn stall(&mut self, text: &str) -> io::Result<()> {
        let stalled: Arc<str> = text.into();
        if self.journal.progress().stalled.as_ref() != Some(&stalled) {
            tracing::warn!(log = %self.journal.dir().display(), "not accepting: {text}");
        }
        self.journal.advance(|progress| progress.stalled = Some(stalled));
        tokio::select! {
            biased;
            () = ended(&mut self.ending) => Err(io::Error::other(Ended)),
            () = tokio::time::sleep(RETRY) => Ok(()),
        }
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
        let data_hash = *old.hasher.finalize().as_bytes();
        let chain = SegmentEnd::chain_hash(&old.chain_before, &data_hash);
        let (segment, follower) = (old.segment, Arc::clone(&self.follower));
        Ok((chain, Job { segment, end: old.end, data_hash, chain, follower }.begin()))
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

/// What a frame takes.
#[derive(Clone, Copy)]
struct Needs {
    bytes: usize,
    entries: usize,
    chunks: usize,
}

impl Needs {
    /// The most bytes by which the log grows: with padding, and the header of a segment.
    fn room_bytes(&self) -> u64 {
        (self.bytes as u64).next_multiple_of(BLOCK_BYTES) + BLOCK_BYTES
    }

    fn of(frame: &[u8]) -> io::Result<Needs> {
        let header = FrameHeader::peek(frame).map_err(io::Error::other)?;
        let chunks = header.chunks.get() as usize;
        // A record has an entry for each chunk it lies in; only its last one is shared.
        let entries = header.records.get() as usize + chunks;
        Ok(Needs { bytes: frame.len(), entries, chunks })
    }
}
