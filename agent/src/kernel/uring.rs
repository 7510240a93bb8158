//! One io_uring for a single-threaded event loop, with a safe face.
//!
//! # Ownership
//!
//! The kernel reads and writes the buffers of an operation until its completion arrives, so the
//! ring, not the caller, keeps them alive: buffers are ranges ([`Buf`]) of a [`Region`] the ring
//! holds an `Arc` of, and files are entries ([`FileId`]) of a table that keeps them open. When the
//! ring is dropped with operations under way, its regions are leaked rather than unmapped. What the
//! caller still owes is order: not to reuse a range before its completion (else bytes mix).
//!
//! The one exception is [`Ring::push`], `unsafe`, for commands built elsewhere (ublk).
//!
//! # Its end
//!
//! A ring that carries ublk commands must be closed after its thread is gone: see [`Closer`].

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::memfd::{Region, RegionError};

/// What an operation was for; comes back with its completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token {
    /// The caller's kind of operation, at most [`Token::KIND_MAX`].
    pub kind: u8,
    /// The caller's unit, such as a volume of the group.
    pub unit: u16,
    /// The caller's index, such as a tag or a slot.
    pub index: u32,
}

impl Token {
    /// The largest `kind`; the top bit of the packed form belongs to the ring itself.
    pub const KIND_MAX: u8 = 0x7f;

    /// A token; `kind` must not exceed [`Token::KIND_MAX`] (checked in debug builds, else masked).
    pub const fn new(kind: u8, unit: u16, index: u32) -> Self {
        debug_assert!(kind <= Self::KIND_MAX);
        Self { kind: kind & Self::KIND_MAX, unit, index }
    }

    /// `kind << 56 | unit << 32 | index`.
    const fn pack(self) -> u64 {
        (self.kind as u64) << 56 | (self.unit as u64) << 32 | self.index as u64
    }

    const fn unpack(value: u64) -> Self {
        Self {
            kind: (value >> 56) as u8 & Self::KIND_MAX,
            unit: (value >> 32) as u16,
            index: value as u32,
        }
    }
}

/// A finished operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// What the operation was for.
    pub token: Token,
    /// Bytes done (or another non-negative result), or a negative error number.
    pub result: i32,
}

impl Completion {
    /// The result as a count or an error.
    ///
    /// # Errors
    /// The operation's error.
    pub fn outcome(&self) -> io::Result<u32> {
        u32::try_from(self.result)
            .map_err(|_| io::Error::from_raw_os_error(self.result.saturating_neg()))
    }
}

/// A file the ring keeps open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId(u16);

/// A memory region the ring keeps mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RegionId(u16);

/// A range of a region, the buffer of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buf {
    /// The region.
    pub region: RegionId,
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub len: u32,
}

/// How zeroes are made; see [`crate::kernel::blockdev::ZeroMode`] for what each promises.
pub use super::blockdev::ZeroMode;

/// Why an operation was not queued.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The kernel refused the ring or a submission.
    #[error("io_uring: {0}")]
    System(#[from] io::Error),
    /// The file is not (or no longer) in the ring's table.
    #[error("io_uring: file {0:?} is not registered with this ring")]
    NoFile(FileId),
    /// The region is not in the ring's table.
    #[error("io_uring: region {0:?} is not registered with this ring")]
    NoRegion(RegionId),
    /// A table is full.
    #[error("io_uring: too many files or regions in one ring")]
    TableFull,
    /// The buffer leaves its region.
    #[error(transparent)]
    Region(#[from] RegionError),
}

/// Wakes the loop of a [`Ring`] from any thread. Cheap to clone; wakes are merged.
#[derive(Clone, Debug)]
pub struct Waker(Arc<File>);

impl Waker {
    /// Makes the ring's [`Ring::wait`] return, now or the next time it is called.
    pub fn wake(&self) {
        // An eventfd write of 1 fails only when 2^64-2 wakes are pending: then it is awake anyway.
        let _ = io::Write::write(&mut &*self.0, &1u64.to_ne_bytes());
    }
}

/// Keeps a dropped ring open until its thread is gone, and closes it then.
///
/// When a ring is closed, the ublk driver takes back, once, the requests that the ring's thread has been
/// handed. One that came since the thread last looked is handed to it even now, if the thread still runs:
/// nobody takes that back, and the driver waits for its answer for ever, with the device locked (seen with
/// Linux 6.12; no later server gets the device). Of a thread that is gone it is taken back like the others.
#[derive(Clone, Default)]
pub struct Closer(Arc<Mutex<Vec<IoUring>>>);

impl Closer {
    /// Closes the rings it has been given. Call it when their threads have been joined.
    pub fn close(&self) {
        self.rings().clear();
    }

    fn rings(&self) -> std::sync::MutexGuard<'_, Vec<IoUring>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The ring. Create it and use it on one thread only.
pub struct Ring {
    /// `None` only while being dropped.
    inner: Option<IoUring>,
    files: Vec<Option<Arc<File>>>,
    regions: Vec<Arc<Region>>,
    /// Operations the kernel still owns buffers of, without the wake-up read.
    in_flight: u64,
    backlog: VecDeque<squeue::Entry>,
    wake: Wake,
    closer: Option<Closer>,
    /// The ring belongs to the thread that made it (the kernel insists under SINGLE_ISSUER).
    _not_send: std::marker::PhantomData<*const ()>,
}

struct Wake {
    event: Arc<File>,
    armed: bool,
}

/// `user_data` of the wake-up poll.
const WAKE: u64 = 1 << 63;

impl Ring {
    /// A ring for `depth` submissions at a time (rounded up to a power of two) and four times as
    /// many completions. More operations than that may be in flight.
    ///
    /// # Errors
    /// No io_uring in this kernel, forbidden by `kernel.io_uring_disabled` or seccomp, or no memory.
    pub fn new(depth: u32) -> Result<Self, RingError> {
        let inner = build(depth)?;
        let flags =
            nix::sys::eventfd::EfdFlags::EFD_CLOEXEC | nix::sys::eventfd::EfdFlags::EFD_NONBLOCK;
        let event =
            nix::sys::eventfd::EventFd::from_value_and_flags(0, flags).map_err(io::Error::from)?;
        let event = Arc::new(File::from(std::os::fd::OwnedFd::from(event)));
        Ok(Self {
            inner: Some(inner),
            files: Vec::new(),
            regions: Vec::new(),
            in_flight: 0,
            backlog: VecDeque::with_capacity(64),
            wake: Wake { event, armed: false },
            closer: None,
            _not_send: std::marker::PhantomData,
        })
    }

    /// Leaves it to `closer` to close the ring.
    pub fn close_with(&mut self, closer: Closer) {
        self.closer = Some(closer);
    }

    /// A handle for other threads to interrupt [`Ring::wait`].
    pub fn waker(&self) -> Waker {
        Waker(self.wake.event.clone())
    }

    /// Keeps `file` open for operations until [`Ring::remove_file`].
    ///
    /// # Errors
    /// [`RingError::TableFull`] after 65,536 files.
    pub fn add_file(&mut self, file: Arc<File>) -> Result<FileId, RingError> {
        if let Some(free) = self.files.iter().position(Option::is_none) {
            self.files[free] = Some(file);
            return Ok(FileId(free as u16));
        }
        let id = u16::try_from(self.files.len()).map_err(|_| RingError::TableFull)?;
        self.files.push(Some(file));
        Ok(FileId(id))
    }

    /// Lets go of a file. Operations under way on it go on to their completion.
    ///
    /// # Errors
    /// The pending submissions, which still need the descriptor, could not be handed over.
    pub fn remove_file(&mut self, id: FileId) -> Result<(), RingError> {
        self.submit()?;
        if let Some(entry) = self.files.get_mut(usize::from(id.0)) {
            *entry = None;
        }
        Ok(())
    }

    /// Keeps `region` mapped for as long as the ring lives.
    ///
    /// # Errors
    /// [`RingError::TableFull`] after 65,536 regions.
    pub fn add_region(&mut self, region: Arc<Region>) -> Result<RegionId, RingError> {
        let id = u16::try_from(self.regions.len()).map_err(|_| RingError::TableFull)?;
        self.regions.push(region);
        Ok(RegionId(id))
    }

    /// Queues a read of `buf.len` bytes at `position` of the file into `buf`.
    ///
    /// # Errors
    /// An unknown file or a buffer out of bounds; nothing is queued then.
    pub fn read(
        &mut self,
        file: FileId,
        position: u64,
        buf: Buf,
        token: Token,
    ) -> Result<(), RingError> {
        let (fd, at) = (self.fd(file)?, self.address(buf)?);
        let entry = opcode::Read::new(fd, at, buf.len).offset(position).build();
        self.enqueue(entry, token)
    }

    /// Queues a write of `buf` at `position` of the file. With `durable` it completes only when the
    /// data is on stable storage (FUA where the device has it, else write and flush).
    ///
    /// # Errors
    /// An unknown file or a buffer out of bounds; nothing is queued then.
    pub fn write(
        &mut self,
        file: FileId,
        position: u64,
        buf: Buf,
        durable: bool,
        token: Token,
    ) -> Result<(), RingError> {
        let (fd, at) = (self.fd(file)?, self.address(buf)?);
        let flags = if durable { libc::RWF_DSYNC } else { 0 };
        let entry = opcode::Write::new(fd, at.cast_const(), buf.len)
            .offset(position)
            .rw_flags(flags)
            .build();
        self.enqueue(entry, token)
    }

    /// Queues a flush: what completed before is on stable storage when this completes. It orders
    /// nothing by itself: operations queued before it may still be under way.
    ///
    /// # Errors
    /// An unknown file.
    pub fn flush(&mut self, file: FileId, token: Token) -> Result<(), RingError> {
        let fd = self.fd(file)?;
        let entry = opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build();
        self.enqueue(entry, token)
    }

    /// Queues zeroing of a range, which must be aligned to logical blocks on a device.
    ///
    /// # Errors
    /// An unknown file.
    pub fn zero(
        &mut self,
        file: FileId,
        position: u64,
        len: u64,
        mode: ZeroMode,
        token: Token,
    ) -> Result<(), RingError> {
        let fd = self.fd(file)?;
        let entry =
            opcode::Fallocate::new(fd, len).offset(position).mode(mode.fallocate_mode()).build();
        self.enqueue(entry, token)
    }

    /// Queues an operation built elsewhere, such as a ublk command.
    ///
    /// # Errors
    /// The submission queue is full and the kernel takes nothing.
    ///
    /// # Safety
    /// Descriptors and memory the entry names stay valid until its completion (memory: also after
    /// the ring is dropped without one; regions added to the ring do).
    pub unsafe fn push(&mut self, entry: squeue::Entry, token: Token) -> Result<(), RingError> {
        self.enqueue(entry, token)
    }

    /// Hands queued operations to the kernel without waiting.
    ///
    /// # Errors
    /// The kernel refused; what it did not take stays queued.
    pub fn submit(&mut self) -> Result<(), RingError> {
        self.fill();
        loop {
            if !self.ring().submission().is_empty() {
                match self.ring().submit() {
                    Ok(_) => {}
                    Err(e) if again(&e) => return Ok(()),
                    Err(e) => return Err(e.into()),
                }
            }
            if self.backlog.is_empty() {
                return Ok(());
            }
            let waiting = self.backlog.len();
            self.fill();
            if self.backlog.len() == waiting {
                return Ok(());
            }
        }
    }

    /// Hands queued operations to the kernel and waits until a completion is ready, the ring is
    /// woken, or `timeout` has passed, whichever is first. Wake-ups yield no completion.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn wait(&mut self, timeout: Option<Duration>) -> Result<(), RingError> {
        self.arm_wake();
        self.fill();
        if !self.backlog.is_empty() {
            self.submit()?;
        }
        if !self.ring().completion().is_empty() {
            return self.submit();
        }
        // One call hands over and waits.
        let waited = match timeout {
            None => self.ring().submit_and_wait(1),
            Some(limit) => {
                let limit = types::Timespec::from(limit);
                let args = types::SubmitArgs::new().timespec(&limit);
                self.ring().submitter().submit_with_args(1, &args)
            }
        };
        match waited {
            Ok(_) => Ok(()),
            Err(e) if again(&e) || e.raw_os_error() == Some(libc::ETIME) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// The next finished operation, if there is one.
    pub fn completion(&mut self) -> Option<Completion> {
        loop {
            let entry = self.ring().completion().next()?;
            if entry.user_data() == WAKE {
                self.wake.armed = false;
                let mut count = [0u8; 8];
                // Not readable means that the wake was taken already: fine as well.
                let _ = io::Read::read(&mut &*self.wake.event, &mut count);
                continue;
            }
            self.in_flight = self.in_flight.saturating_sub(1);
            return Some(Completion {
                token: Token::unpack(entry.user_data()),
                result: entry.result(),
            });
        }
    }

    /// Operations queued or under way.
    pub fn in_flight(&self) -> u64 {
        self.in_flight
    }

    fn ring(&mut self) -> &mut IoUring {
        // Present from construction until `drop` takes it.
        self.inner.as_mut().unwrap_or_else(|| unreachable!("ring used while being dropped"))
    }

    fn fd(&self, id: FileId) -> Result<types::Fd, RingError> {
        self.files
            .get(usize::from(id.0))
            .and_then(Option::as_ref)
            .map(|file| types::Fd(file.as_raw_fd()))
            .ok_or(RingError::NoFile(id))
    }

    fn address(&self, buf: Buf) -> Result<*mut u8, RingError> {
        let region =
            self.regions.get(usize::from(buf.region.0)).ok_or(RingError::NoRegion(buf.region))?;
        Ok(region.pointer(buf.offset, u64::from(buf.len))?.as_ptr())
    }

    fn enqueue(&mut self, entry: squeue::Entry, token: Token) -> Result<(), RingError> {
        self.push_raw(entry.user_data(token.pack()));
        self.in_flight += 1;
        Ok(())
    }

    /// Into the submission queue, or behind it when that is full.
    fn push_raw(&mut self, entry: squeue::Entry) {
        if !self.backlog.is_empty() || !try_push(self.ring(), &entry) {
            self.backlog.push_back(entry);
        }
    }

    fn fill(&mut self) {
        while let Some(entry) = self.backlog.front().cloned() {
            if !try_push(self.ring(), &entry) {
                return;
            }
            self.backlog.pop_front();
        }
    }

    fn arm_wake(&mut self) {
        if self.wake.armed {
            return;
        }
        let fd: RawFd = self.wake.event.as_raw_fd();
        let poll = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32);
        self.push_raw(poll.build().user_data(WAKE));
        self.wake.armed = true;
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        match &self.closer {
            Some(closer) => closer.rings().extend(self.inner.take()),
            None => drop(self.inner.take()),
        }
        if self.in_flight > 0 {
            // The kernel cancels what is under way some time after the ring is closed.
            for region in self.regions.drain(..) {
                std::mem::forget(region);
            }
        }
    }
}

/// The best ring this kernel offers: completions run when we ask for them, not by interrupting us.
fn build(depth: u32) -> io::Result<IoUring> {
    let completions = depth.saturating_mul(4);
    let mut best = IoUring::builder();
    best.setup_cqsize(completions).setup_single_issuer().setup_defer_taskrun();
    let mut plain = IoUring::builder();
    plain.setup_cqsize(completions);
    match best.build(depth) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => plain.build(depth),
        other => other,
    }
}

fn try_push(ring: &mut IoUring<squeue::Entry, cqueue::Entry>, entry: &squeue::Entry) -> bool {
    // SAFETY: the entry's buffers lie in regions and its descriptors in files the ring keeps, or
    // the caller of `Ring::push` vouched for them.
    unsafe { ring.submission().push(entry) }.is_ok()
}

/// Interrupted, or the kernel wants completions taken first.
fn again(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
}

#[cfg(test)]
mod tests;
