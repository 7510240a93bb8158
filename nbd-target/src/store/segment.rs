//! One segment of a log, as a source of extents.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock, RwLock,
        atomic::{AtomicU64, Ordering},
    },
};

use tidemark_journal::{FrameView, Position, segment::BLOCK_BYTES};

use super::{
    Damage, ReadError, Where,
    cache::Cache,
    index::{
        ChunkRow, Content, FrameRow, Key, MemoryIndex, Query, SealedIndex,
        page::{PageCache, PageReader},
    },
};
use crate::machine::{File, How, Machine};

/// What all logs of a target share: the machine they are kept on, and caches, which are the bound of
/// what reading takes in memory.
pub struct Caches {
    /// Where the logs are.
    pub machine: Machine,
    /// Pages of sealed indexes.
    pub pages: PageCache,
    /// Unpacked chunks.
    pub chunks: Cache<(u64, u32), Arc<Vec<u8>>>,
}

impl Caches {
    /// Caches of so many pages of 4 KiB and chunks of up to 128 KiB, for logs on this machine.
    pub fn new(pages: usize, chunks: usize) -> Arc<Caches> {
        Caches::on(&Machine::Real, pages, chunks)
    }

    /// The same for logs on any machine.
    pub fn on(machine: &Machine, pages: usize, chunks: usize) -> Arc<Caches> {
        let machine = machine.clone();
        Arc::new(Caches { machine, pages: Cache::new(pages), chunks: Cache::new(chunks) })
    }
}

/// What is known of a segment without looking into it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Summary {
    /// The position before the first frame.
    pub before: Position,
    /// The position at the end; equal to `before` in an empty segment.
    pub last: Position,
    /// Bytes of frames, with header and padding.
    pub data_bytes: u64,
    /// The earliest wall clock of a frame in it.
    pub wall_min_ns: i64,
    /// The latest wall clock of a record in it.
    pub wall_max_ns: i64,
    /// The received history's age counter at the end, nanoseconds.
    pub received_ns: u64,
}

impl Summary {
    /// An empty segment after a position.
    pub fn empty(before: Position) -> Summary {
        Summary {
            before,
            last: before,
            data_bytes: BLOCK_BYTES,
            wall_min_ns: i64::MAX,
            wall_max_ns: i64::MIN,
            received_ns: 0,
        }
    }

    /// Takes a frame in.
    pub fn extend(&mut self, frame: &FrameView<'_>, end_bytes: u64, received_ns: u64) {
        let header = frame.header();
        self.last = header.last();
        self.data_bytes = end_bytes;
        self.wall_min_ns = self.wall_min_ns.min(header.wall_ns.get());
        let last_wall = frame.records().last().map(|record| frame.wall_ns(&record));
        self.wall_max_ns = self.wall_max_ns.max(last_wall.unwrap_or(i64::MIN));
        self.received_ns = self.received_ns.max(received_ns);
    }
}

/// One segment: its file, what is known of it, and its index.
pub struct Segment {
    number: u64,
    id: u64,
    path: PathBuf,
    file: OnceLock<File>,
    caches: Arc<Caches>,
    state: RwLock<State>,
}

struct State {
    summary: Summary,
    index: Index,
}

enum Index {
    Memory(MemoryIndex),
    Sealed { index_at: u64, head: OnceLock<SealedIndex> },
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

impl Segment {
    /// A segment that is being written, with what is already in it.
    pub fn open(
        path: PathBuf,
        number: u64,
        summary: Summary,
        index: MemoryIndex,
        caches: &Arc<Caches>,
    ) -> Segment {
        Segment::with(path, number, State { summary, index: Index::Memory(index) }, caches)
    }

    /// A sealed segment. Its file is not touched until something is read.
    pub fn sealed(
        path: PathBuf,
        number: u64,
        summary: Summary,
        index_at: u64,
        caches: &Arc<Caches>,
    ) -> Segment {
        let index = Index::Sealed { index_at, head: OnceLock::new() };
        Segment::with(path, number, State { summary, index }, caches)
    }

    fn with(path: PathBuf, number: u64, state: State, caches: &Arc<Caches>) -> Segment {
        Segment {
            number,
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            path,
            file: OnceLock::new(),
            caches: Arc::clone(caches),
            state: RwLock::new(state),
        }
    }

    /// Takes in a frame that is stored at byte `offset` and visible from now on.
    pub fn publish(&self, frame: &FrameView<'_>, offset: u64, end_bytes: u64, received_ns: u64) {
        let mut state = self.state.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        state.summary.extend(frame, end_bytes, received_ns);
        if let Index::Memory(index) = &mut state.index {
            index.insert(frame, offset);
        }
    }

    /// Removes its file. Whoever holds the segment still reads it: it is opened before.
    ///
    /// # Errors
    /// When the file cannot be opened or removed.
    pub fn remove(&self) -> io::Result<()> {
        self.file()?;
        self.machine().remove_file(&self.path)
    }

    /// Goes over to the index on disk, which has been written and synced.
    pub fn become_sealed(&self, index_at: u64) {
        let mut state = self.state.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        state.index = Index::Sealed { index_at, head: OnceLock::new() };
    }

    /// Runs `f` on the index in memory; nothing when the segment is sealed.
    pub fn with_memory<T>(&self, f: impl FnOnce(&MemoryIndex) -> T) -> Option<T> {
        match &self.read().index {
            Index::Memory(index) => Some(f(index)),
            Index::Sealed { .. } => None,
        }
    }

    /// Whether the index is on disk.
    pub fn is_sealed(&self) -> bool {
        matches!(self.read().index, Index::Sealed { .. })
    }

    /// Its place in the log.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// An id of this segment's content, unique in the process.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The machine that its file is on.
    pub fn machine(&self) -> &Machine {
        &self.caches.machine
    }

    /// Where its file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it is read through.
    pub fn caches(&self) -> &Arc<Caches> {
        &self.caches
    }

    /// What is known of it.
    pub fn summary(&self) -> Summary {
        self.read().summary
    }

    /// Collects the extents that overlap the query: of each extent the newest version that counts.
    ///
    /// # Errors
    /// When the index on disk cannot be read or is damaged.
    pub fn find(&self, query: &Query, found: impl FnMut(Key, Content)) -> Result<(), ReadError> {
        let state = self.read();
        if state.summary.before.seq >= query.at {
            return Ok(());
        }
        match &state.index {
            Index::Memory(index) => index.find(query, found),
            Index::Sealed { index_at, head } => {
                let reader = self.reader(*index_at)?;
                self.head(head, reader)
                    .and_then(|head| head.find(reader, query, found))
                    .map_err(|error| self.bad_index(error))?;
            }
        }
        Ok(())
    }

    /// Hands out all entries in their order.
    ///
    /// # Errors
    /// When the index on disk cannot be read or is damaged.
    pub fn for_each(&self, mut each: impl FnMut(Key, Content)) -> Result<(), ReadError> {
        match &self.read().index {
            Index::Memory(index) => {
                index.entries().iter().for_each(|(key, content)| each(*key, *content));
            }
            Index::Sealed { index_at, head } => {
                let reader = self.reader(*index_at)?;
                self.head(head, reader)
                    .and_then(|head| head.for_each(reader, each))
                    .map_err(|error| self.bad_index(error))?;
            }
        }
        Ok(())
    }

    /// The place of a frame.
    ///
    /// # Errors
    /// When the index on disk cannot be read or is damaged.
    pub fn frame(&self, number: u32) -> Result<Option<FrameRow>, ReadError> {
        match &self.read().index {
            Index::Memory(index) => Ok(index.frames().get(number as usize).copied()),
            Index::Sealed { index_at, head } => {
                let reader = self.reader(*index_at)?;
                self.head(head, reader)
                    .and_then(|head| {
                        (number < head.frames()).then(|| head.frame(reader, number)).transpose()
                    })
                    .map_err(|error| self.bad_index(error))
            }
        }
    }

    /// The number of frames.
    ///
    /// # Errors
    /// When the index on disk cannot be read or is damaged.
    pub fn frames(&self) -> Result<u32, ReadError> {
        match &self.read().index {
            Index::Memory(index) => Ok(index.frames().len() as u32),
            Index::Sealed { index_at, head } => {
                let reader = self.reader(*index_at)?;
                self.head(head, reader)
                    .map(SealedIndex::frames)
                    .map_err(|error| self.bad_index(error))
            }
        }
    }

    /// The meta part of a frame, checked by its reader.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn frame_meta(&self, row: &FrameRow) -> Result<Vec<u8>, ReadError> {
        let mut bytes = vec![0; row.meta_bytes as usize];
        let read = self.file().and_then(|file| file.read_exact_at(&mut bytes, row.offset.into()));
        read.map_err(|error| ReadError::io(self.name(), error))?;
        Ok(bytes)
    }

    /// A chunk, unpacked, from the cache or the file.
    ///
    /// # Errors
    /// When it cannot be read or is damaged.
    pub fn chunk(&self, number: u32) -> Result<Arc<Vec<u8>>, ReadError> {
        if let Some(raw) = self.caches.chunks.get(&(self.id, number)) {
            return Ok(raw);
        }
        let row = self.chunk_row(number)?;
        let file = self.file().map_err(|error| ReadError::io(self.name(), error))?;
        let mut stored = vec![0; row.stored_bytes as usize];
        let mut raw = Vec::new();
        let mut outcome = Ok(());
        for attempt in 0..2 {
            file.read_exact_at(&mut stored, row.offset.into())
                .map_err(|error| ReadError::io(self.name(), error))?;
            outcome = row.unpack(&stored, &mut raw);
            if outcome.is_ok() || attempt > 0 {
                break;
            }
            // The log is written around the page cache: a page that was read ahead of the write
            // may be stale in spite of the kernel's invalidation. Ask the disk before judging.
            file.drop_cached(row.offset.into(), row.stored_bytes.into());
        }
        outcome.map_err(|error| {
            let place = Where::Segment { id: self.id, chunk: Some(number) };
            let text = format!(
                "{}, chunk {number} at byte {} ({} bytes): {error}",
                self.name(),
                row.offset,
                row.stored_bytes
            );
            ReadError::Damaged(Damage::at(place, text))
        })?;
        let raw = Arc::new(raw);
        self.caches.chunks.put((self.id, number), Arc::clone(&raw));
        Ok(raw)
    }

    /// The number of chunks.
    ///
    /// # Errors
    /// When the index on disk cannot be read or is damaged.
    pub fn chunks(&self) -> Result<u32, ReadError> {
        match &self.read().index {
            Index::Memory(index) => Ok(index.chunks().len() as u32),
            Index::Sealed { index_at, head } => {
                let reader = self.reader(*index_at)?;
                let head = self.head(head, reader).map_err(|error| self.bad_index(error))?;
                Ok(head.chunks())
            }
        }
    }

    /// A chunk's place.
    ///
    /// # Errors
    /// When the index on disk cannot be read or is damaged, or there is no such chunk.
    pub fn chunk_row(&self, number: u32) -> Result<ChunkRow, ReadError> {
        let row = match &self.read().index {
            Index::Memory(index) => index.chunk(number).copied(),
            Index::Sealed { index_at, head } => {
                let reader = self.reader(*index_at)?;
                let row = self.head(head, reader).and_then(|head| head.chunk(reader, number));
                Some(row.map_err(|error| self.bad_index(error))?)
            }
        };
        row.ok_or_else(|| {
            let place = Where::Segment { id: self.id, chunk: None };
            let text = format!("{} has no chunk {number}", self.name());
            ReadError::Damaged(Damage::at(place, text))
        })
    }

    fn head<'a>(
        &self,
        head: &'a OnceLock<SealedIndex>,
        reader: PageReader<'_>,
    ) -> io::Result<&'a SealedIndex> {
        if let Some(head) = head.get() {
            return Ok(head);
        }
        let opened = SealedIndex::open(reader)?;
        Ok(head.get_or_init(|| opened))
    }

    fn reader(&self, index_at: u64) -> Result<PageReader<'_>, ReadError> {
        let file = self.file().map_err(|error| ReadError::io(self.name(), error))?;
        Ok(PageReader {
            file,
            file_id: self.id,
            segment: self.number,
            index_at,
            cache: &self.caches.pages,
        })
    }

    fn bad_index(&self, error: io::Error) -> ReadError {
        ReadError::io(self.name(), error).met_at(Where::Segment { id: self.id, chunk: None })
    }

    pub(super) fn file(&self) -> io::Result<&File> {
        if let Some(file) = self.file.get() {
            return Ok(file);
        }
        match self.machine().open(&self.path, How::Read) {
            Ok(file) => Ok(self.file.get_or_init(|| file)),
            // Removed meanwhile, and opened before that.
            Err(error) => self.file.get().ok_or(error),
        }
    }

    pub(super) fn name(&self) -> String {
        format!("segment {} ({})", self.number, self.path.display())
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// The name of a segment's file.
pub fn file_name(number: u64) -> String {
    format!("{number:016}.seg")
}

/// The number in the name of a segment's file.
pub fn number_of(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".seg").filter(|digits| digits.len() == 16)?;
    digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok())?
}
