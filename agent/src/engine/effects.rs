//! Carrying out effects: the backing disks, the buffers and the answers.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, mpsc},
};

use bytes::Bytes;
use tidemark_journal::VolumeId;
use tokio::sync::oneshot;

use super::{
    EngineVolume,
    buffers::{Buffer, Pool},
    hasher::{self, Hashed, Place, Seen},
    requests::{Answer, FrontAsk, FrontRequest},
    run::Loop,
};
use crate::{
    capture::{
        Ask, Effect, LocalIo, OpId, Payload, Request, RequestId,
        catchup::{READS_MAX, ReadBack},
    },
    dirty::REGION_BYTES,
    kernel::{
        blockdev::{Backing, ZeroMode},
        memfd::Region,
        uring::{Buf, Completion, FileId, RegionId, Ring, RingError, Token},
    },
    state::keeper::Job,
};

/// What a completion of the ring belongs to: the `kind` of its token.
pub(super) mod kind {
    /// A write, zeroing or flush of the core; the index is its op.
    pub const LOCAL: u8 = 1;
    /// A read of a front; the index is its request.
    pub const READ: u8 = 2;
    /// A read of the core for catch-up; the index is its op.
    pub const CATCH_UP: u8 = 3;
    /// A command of a ublk queue; the unit is the queue and the index the tag.
    pub const UBLK: u8 = 4;
}

struct Volume {
    id: VolumeId,
    sectors: u64,
    file: FileId,
    backing: Arc<Backing>,
}

/// Who asked.
pub(super) enum Asker {
    Front { payload: Option<tidemark_nbd::Buffer>, answer: Option<oneshot::Sender<Answer>> },
    Ublk { queue: u16, tag: u16 },
}

struct Pending {
    asker: Asker,
    /// The buffer of a read, and its length.
    read: Option<(Option<Buffer>, u32)>,
}

#[derive(Clone, Copy, Default)]
struct Local {
    /// Bytes that a complete result counts; none where zero means success.
    bytes: Option<u32>,
    bounce: Option<Buffer>,
    /// A flush has to follow, of this file.
    then_flush: Option<FileId>,
}

/// A read for catch-up.
#[derive(Clone, Copy)]
struct CatchUpRead {
    file: FileId,
    position: u64,
    buf: Buf,
    /// Hash its blocks too.
    hash: bool,
}

/// A read of a front that waits for a buffer.
struct WaitingRead {
    request: u32,
    volume: VolumeId,
    position: u64,
    bytes: u32,
}

/// The backing disks, their buffers, and the requests under way.
pub(super) struct Disk {
    pub ring: Ring,
    volumes: Vec<Volume>,
    ring_region: Arc<Region>,
    ring_region_id: RegionId,
    pool: Pool,
    pool_id: RegionId,
    catch_up: Arc<Region>,
    catch_up_id: RegionId,
    catch_up_free: Vec<u64>,
    catch_up_reads: HashMap<OpId, CatchUpRead>,
    hasher: Option<mpsc::Sender<hasher::Job>>,
    pending: Vec<Option<Pending>>,
    pending_free: Vec<u32>,
    locals: Vec<Local>,
    waiting_reads: VecDeque<WaitingRead>,
    /// Local writes that wait for a bounce buffer.
    waiting_writes: VecDeque<Effect>,
}

impl Disk {
    pub fn new(ring_region: Arc<Region>, volumes: &[EngineVolume]) -> anyhow::Result<Disk> {
        let mut ring = Ring::new(256)?;
        let pool = Pool::new()?;
        let catch_up = Arc::new(Region::anonymous(READS_MAX as u64 * REGION_BYTES)?);
        let ring_region_id = ring.add_region(ring_region.clone())?;
        let pool_id = ring.add_region(pool.region().clone())?;
        let catch_up_id = ring.add_region(catch_up.clone())?;
        let mut own = Vec::new();
        for volume in volumes {
            own.push(Volume {
                id: volume.id,
                sectors: volume.sectors,
                file: ring.add_file(volume.backing.file().clone())?,
                backing: volume.backing.clone(),
            });
        }
        Ok(Disk {
            ring,
            volumes: own,
            ring_region,
            ring_region_id,
            pool,
            pool_id,
            catch_up,
            catch_up_id,
            catch_up_free: (0..READS_MAX as u64).map(|index| index * REGION_BYTES).collect(),
            catch_up_reads: HashMap::new(),
            hasher: None,
            pending: Vec::with_capacity(1024),
            pending_free: Vec::with_capacity(1024),
            locals: Vec::with_capacity(1024),
            waiting_reads: VecDeque::new(),
            waiting_writes: VecDeque::new(),
        })
    }

    pub fn start_hasher(&mut self, done: impl Fn(Seen) + Send + 'static) -> std::io::Result<()> {
        let (jobs, _) = hasher::start(self.catch_up.clone(), done)?;
        self.hasher = Some(jobs);
        Ok(())
    }

    pub fn volume_ids(&self) -> Vec<VolumeId> {
        self.volumes.iter().map(|volume| volume.id).collect()
    }

    pub fn volume_sectors(&self, id: VolumeId) -> Option<u64> {
        self.volumes.iter().find(|volume| volume.id == id).map(|volume| volume.sectors)
    }

    fn volume(&self, id: VolumeId) -> &Volume {
        let volume = self.volumes.iter().find(|volume| volume.id == id);
        volume.expect("a volume of this group")
    }

    fn file(&self, id: VolumeId) -> FileId {
        self.volume(id).file
    }

    pub fn requests_under_way(&self) -> usize {
        self.pending.len() - self.pending_free.len()
    }

    pub fn is_idle(&self) -> bool {
        self.requests_under_way() == 0
    }

    fn insert(&mut self, pending: Pending) -> u32 {
        match self.pending_free.pop() {
            Some(index) => {
                self.pending[index as usize] = Some(pending);
                index
            }
            None => {
                self.pending.push(Some(pending));
                (self.pending.len() - 1) as u32
            }
        }
    }

    fn remove(&mut self, index: u32) -> Pending {
        self.pending_free.push(index);
        self.pending[index as usize].take().expect("a request under way")
    }

    /// Takes a front's request: a read is submitted, anything else is for the core.
    pub fn front_request(&mut self, request: FrontRequest) -> Option<Request> {
        let FrontRequest { volume, ask, range, answer } = request;
        let mut pending =
            Pending { asker: Asker::Front { payload: None, answer: Some(answer) }, read: None };
        let ask = match ask {
            FrontAsk::Read => {
                let index = self.insert(pending);
                self.read(index, volume, range.start.bytes(), (range.sectors * 512) as u32);
                return None;
            }
            FrontAsk::Write { payload, fua } => {
                pending.asker = match pending.asker {
                    Asker::Front { answer, .. } => Asker::Front { payload: Some(payload), answer },
                    ublk @ Asker::Ublk { .. } => ublk,
                };
                Ask::Write { fua }
            }
            FrontAsk::Zero { unmap, fua } => Ask::Zero { unmap, fua },
            FrontAsk::Discard => Ask::Discard,
            FrontAsk::Flush => Ask::Flush,
        };
        let id = RequestId(u64::from(self.insert(pending)));
        Some(Request { id, volume, ask, start: range.start, sectors: range.sectors })
    }

    /// Takes a ublk request for the core.
    pub fn ublk_request(&mut self, queue: u16, tag: u16) -> RequestId {
        let pending = Pending { asker: Asker::Ublk { queue, tag }, read: None };
        RequestId(u64::from(self.insert(pending)))
    }

    /// Submits a read of a front, or lets it wait for a buffer.
    fn read(&mut self, request: u32, volume: VolumeId, position: u64, bytes: u32) {
        let Some(buffer) = self.pool.take(u64::from(bytes)) else {
            let waiting = WaitingRead { request, volume, position, bytes };
            return self.waiting_reads.push_back(waiting);
        };
        if let Some(Some(pending)) = self.pending.get_mut(request as usize) {
            pending.read = Some((Some(buffer), bytes));
        }
        let file = self.file(volume);
        let buf = Buf { region: self.pool_id, offset: buffer.offset, len: bytes };
        let queued = self.ring.read(file, position, buf, Token::new(kind::READ, 0, request));
        debug_assert!(queued.is_ok(), "a read of a file and a buffer of this ring: {queued:?}");
    }

    /// Submits a read of a ublk queue into its tag's buffer.
    pub fn ublk_read(
        &mut self,
        request: RequestId,
        volume: VolumeId,
        position: u64,
        buf: Buf,
    ) -> Result<(), RingError> {
        if let Some(Some(pending)) = self.pending.get_mut(request.0 as usize) {
            pending.read = Some((None, buf.len));
        }
        let file = self.file(volume);
        self.ring.read(file, position, buf, Token::new(kind::READ, 0, request.0 as u32))
    }

    /// Begins a read for catch-up. Of an image, first it is looked whether there is something to be read; but where
    /// content is hashed, to be compared, the disk itself has to say it.
    fn catch_up_read(&mut self, op: OpId, volume: VolumeId, position: u64, bytes: u64, hash: bool) {
        let offset = self.catch_up_free.pop().expect("as many buffers as reads");
        let buf = Buf { region: self.catch_up_id, offset, len: bytes as u32 };
        let Volume { file, backing, .. } = self.volume(volume);
        let image = (!hash && backing.device().is_none()).then(|| backing.file().clone());
        let read = CatchUpRead { file: *file, position, buf, hash };
        self.catch_up_reads.insert(op, read);
        let asked = image.is_some_and(|image| {
            let at = Place::Image(image, position);
            self.ask_hasher(hasher::Job { op, at, bytes })
        });
        if !asked {
            self.submit_catch_up_read(op);
        }
    }

    /// The disk has something to be read for catch-up.
    pub fn submit_catch_up_read(&mut self, op: OpId) {
        let CatchUpRead { file, position, buf, .. } = self.catch_up_reads[&op];
        let queued = self.ring.read(file, position, buf, Token::new(kind::CATCH_UP, 0, op.0));
        debug_assert!(queued.is_ok(), "a read of a file and a buffer of this ring: {queued:?}");
    }

    fn ask_hasher(&self, job: hasher::Job) -> bool {
        self.hasher.as_ref().is_some_and(|hasher| hasher.send(job).is_ok())
    }

    /// What the hasher saw of a read for catch-up.
    pub fn hashed<'a>(&'a self, hashed: &'a Hashed) -> ReadBack<'a> {
        let Buf { offset, len, .. } = self.catch_up_reads[&hashed.op].buf;
        let data = if hashed.zeros {
            &[]
        } else {
            // SAFETY: the read that filled the buffer has completed; the buffer is given to another
            // read only by `catch_up_read_ended`, after this borrow has ended.
            unsafe { self.catch_up.slice(offset, u64::from(len)) }.expect("inside the region")
        };
        ReadBack { data, zeros: hashed.zeros, hashes: &hashed.hashes }
    }

    /// The buffer of a read for catch-up is free again.
    pub fn catch_up_read_ended(&mut self, op: OpId) {
        if let Some(read) = self.catch_up_reads.remove(&op) {
            self.catch_up_free.push(read.buf.offset);
        }
    }

    fn local(&mut self, op: OpId) -> &mut Local {
        let index = op.0 as usize;
        if index >= self.locals.len() {
            self.locals.resize(index + 1, Local::default());
        }
        &mut self.locals[index]
    }
}

impl Loop {
    /// Carries out what the core decided. True if records may have been committed.
    pub(super) fn carry_out(&mut self) -> bool {
        let mut any = false;
        while let Some(effect) = self.core.effect() {
            any = true;
            match effect {
                Effect::Copy { op, request, offset, slot } => {
                    let copied = self.copy(request, offset, slot.payload_at, slot.payload_bytes);
                    self.core.copied(op, copied);
                }
                Effect::Local { .. } => self.submit_local(effect),
                Effect::Complete { request, result } => self.complete(request, result),
                Effect::CommitMap(commit) => self.keep(Job::Commit(commit)),
                Effect::Reserve(seq) => self.keep(Job::Reserve(seq)),
                Effect::NoteLease(lease) => self.keep(Job::NoteLease(lease)),
            }
        }
        any
    }

    /// Copies part of a request's payload to a place in the ring.
    fn copy(&mut self, request: RequestId, from: u64, to: u64, bytes: u64) -> Result<(), i32> {
        let region = self.disk.ring_region.clone();
        match &self.disk.pending[request.0 as usize].as_ref().expect("under way").asker {
            Asker::Front { payload, .. } => {
                let payload = payload.as_ref().ok_or(libc::EINVAL)?;
                let part =
                    payload.get(from as usize..(from + bytes) as usize).ok_or(libc::EINVAL)?;
                region.copy_in(to, part).map_err(|_| libc::EIO)
            }
            Asker::Ublk { queue, tag } => {
                self.devices.fetch(*queue, *tag, from, &region, to, bytes)
            }
        }
    }

    fn submit_local(&mut self, effect: Effect) {
        let Effect::Local { op, volume, io, start, sectors } = effect else { return };
        let file = self.disk.file(volume);
        let (position, bytes) = (start.bytes(), sectors * 512);
        let token = Token::new(kind::LOCAL, 0, op.0);
        *self.disk.local(op) = Local::default();
        let queued = match io {
            LocalIo::Write { payload, fua } => {
                let buf = match payload {
                    Payload::Ring(slot) => Some(Buf {
                        region: self.disk.ring_region_id,
                        offset: slot.payload_at,
                        len: bytes as u32,
                    }),
                    Payload::Request(request, from) => {
                        match self.own_buffer(op, request, from, bytes) {
                            Ok(buf) => buf,
                            Err(errno) => return self.core.local_ended(op, Err(errno)),
                        }
                    }
                };
                let Some(buf) = buf else {
                    return self.disk.waiting_writes.push_back(Effect::Local {
                        op,
                        volume,
                        io,
                        start,
                        sectors,
                    });
                };
                self.disk.local(op).bytes = Some(bytes as u32);
                self.disk.ring.write(file, position, buf, fua, token)
            }
            LocalIo::Zero { unmap, fua } => {
                self.disk.local(op).then_flush = fua.then_some(file);
                let mode = if unmap { ZeroMode::Unmap } else { ZeroMode::Keep };
                self.disk.ring.zero(file, position, bytes, mode, token)
            }
            LocalIo::Flush => self.disk.ring.flush(file, token),
            LocalIo::Read { hash } => {
                return self.disk.catch_up_read(op, volume, position, bytes, hash);
            }
        };
        debug_assert!(queued.is_ok(), "files and buffers of this ring: {queued:?}");
    }

    /// A buffer with part of a request's payload, for a write without a record. None if all are on
    /// loan.
    fn own_buffer(
        &mut self,
        op: OpId,
        request: RequestId,
        from: u64,
        bytes: u64,
    ) -> Result<Option<Buf>, i32> {
        let pending = self.disk.pending[request.0 as usize].as_ref().expect("under way");
        if let Asker::Ublk { queue, tag } = pending.asker {
            return self.devices.own_buffer(queue, tag, from, bytes).map(Some);
        }
        let Asker::Front { payload: Some(payload), .. } = &pending.asker else {
            return Err(libc::EINVAL);
        };
        let part = payload.get(from as usize..(from + bytes) as usize).ok_or(libc::EINVAL)?;
        let Some(buffer) = self.disk.pool.take(bytes) else { return Ok(None) };
        let copied = self.disk.pool.region().copy_in(buffer.offset, part);
        copied.expect("a buffer of at least so many bytes");
        self.disk.local(op).bounce = Some(buffer);
        Ok(Some(Buf { region: self.disk.pool_id, offset: buffer.offset, len: bytes as u32 }))
    }

    /// A completion of the ring.
    pub(super) fn completed(&mut self, completion: Completion) {
        let index = completion.token.index;
        match completion.token.kind {
            kind::LOCAL => self.local_completed(OpId(index), completion.result),
            kind::READ => self.read_completed(index, completion.result),
            kind::CATCH_UP => self.catch_up_completed(OpId(index), completion.result),
            kind::UBLK => {
                self.ublk_completed(completion.token.unit, index as u16, completion.result)
            }
            _ => {}
        }
    }

    fn local_completed(&mut self, op: OpId, result: i32) {
        let local = *self.disk.local(op);
        let ended = match (result, local.bytes) {
            (..0, _) => Err(-result),
            (done, Some(bytes)) if done as u32 != bytes => Err(libc::EIO),
            _ => Ok(()),
        };
        if let (Some(file), Ok(())) = (local.then_flush, ended) {
            self.disk.local(op).then_flush = None;
            let queued = self.disk.ring.flush(file, Token::new(kind::LOCAL, 0, op.0));
            debug_assert!(queued.is_ok(), "a file of this ring: {queued:?}");
            return;
        }
        if let Some(buffer) = local.bounce {
            self.give(buffer);
        }
        if let Err(errno) = ended {
            let error = std::io::Error::from_raw_os_error(errno);
            tracing::warn!(%error, "the disk below refused a write or flush");
        }
        self.core.local_ended(op, ended);
    }

    fn read_completed(&mut self, index: u32, result: i32) {
        let pending = self.disk.remove(index);
        let Some((buffer, bytes)) = pending.read else { return };
        let ended = match result {
            ..0 => Err(-result),
            done if done as u32 != bytes => Err(libc::EIO),
            _ => Ok(()),
        };
        match pending.asker {
            Asker::Front { answer, .. } => {
                let content = ended.and_then(|()| {
                    let mut content = vec![0; bytes as usize];
                    let at = buffer.map_or(0, |buffer| buffer.offset);
                    let copied = self.disk.pool.region().copy_out(at, &mut content);
                    copied.map(|()| Bytes::from(content)).map_err(|_| libc::EIO)
                });
                // The front may have gone; the read is then of no use to anybody.
                let _ = answer.map(|answer| answer.send(content));
            }
            Asker::Ublk { queue, tag } => {
                let result = ended.map_or_else(|errno| -errno, |()| bytes as i32);
                self.devices.answer_read(queue, tag, result, &mut self.disk.ring);
            }
        }
        if let Some(buffer) = buffer {
            self.give(buffer);
        }
    }

    /// Ends the loan of a buffer, which writes wait for before reads do: theirs hold range locks.
    fn give(&mut self, buffer: Buffer) {
        self.disk.pool.give(buffer);
        for _ in 0..self.disk.waiting_writes.len() {
            let waiting = self.disk.waiting_writes.len();
            if let Some(effect) = self.disk.waiting_writes.pop_front() {
                self.submit_local(effect);
            }
            if self.disk.waiting_writes.len() == waiting {
                // It waits again: there is nothing large enough.
                return;
            }
        }
        if let Some(read) = self.disk.waiting_reads.pop_front() {
            self.disk.read(read.request, read.volume, read.position, read.bytes);
        }
    }

    fn catch_up_completed(&mut self, op: OpId, result: i32) {
        let Some(CatchUpRead { buf, hash, .. }) = self.disk.catch_up_reads.get(&op) else { return };
        if result == buf.len as i32 {
            let at = Place::Buffer { offset: buf.offset, hash: *hash };
            if self.disk.ask_hasher(hasher::Job { op, at, bytes: u64::from(buf.len) }) {
                return;
            }
        }
        let errno = if result < 0 { -result } else { libc::EIO };
        self.core.read_ended(op, Err(errno));
        self.disk.catch_up_read_ended(op);
    }

    /// Answers a request that went through the core.
    fn complete(&mut self, request: RequestId, result: Result<(), i32>) {
        match self.disk.remove(request.0 as u32).asker {
            Asker::Front { answer, .. } => {
                // The front may have gone; its write has been made all the same.
                let _ = answer.map(|answer| answer.send(result.map(|()| Bytes::new())));
            }
            Asker::Ublk { queue, tag } => {
                self.devices.answer(queue, tag, result, &mut self.disk.ring);
            }
        }
    }
}
