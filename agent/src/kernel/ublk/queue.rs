//! A queue of a ublk device: requests handed out by the driver, and their answers.
//!
//! A request lives in a *tag*. [`Queue::fetch_all`] offers all tags to the driver; a completion with
//! the tag's token hands out a request, read with [`Queue::desc`]; [`Queue::commit`] answers it and
//! offers the tag again. All of it happens on one thread and one [`Ring`], which may carry the
//! queues of many devices.
//!
//! The driver copies payloads between a request and a buffer of its tag ([`Queue::buffer_offset`]): a write's is
//! there when it is handed out, a read's must be there when it is answered.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::{opcode, squeue, types};
use zerocopy::IntoBytes;

use super::DeviceInfo;
use super::abi::{self, IoCmd, RawIoDesc};
use crate::kernel::memfd::{Region, RegionError};
use crate::kernel::uring::{FileId, RegionId, Ring, RingError, Token};

/// A request's operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoOp {
    /// Answer with the bytes and their count.
    Read,
    /// Store the bytes.
    Write,
    /// Make completed writes durable.
    Flush,
    /// Zero and give the space back (as this program advertises it).
    Discard,
    /// Zero.
    WriteZeroes,
    /// Something this program never advertised.
    Unknown(u8),
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoDesc {
    /// What to do.
    pub op: IoOp,
    /// First sector of 512 bytes.
    pub start_sector: u64,
    /// Length in sectors; 0 for a flush.
    pub sectors: u32,
    /// It must be durable when answered.
    pub fua: bool,
    /// Zeroes must stay allocated.
    pub no_unmap: bool,
}

impl IoDesc {
    /// Position in bytes.
    pub const fn position(&self) -> u64 {
        self.start_sector.saturating_mul(512)
    }

    /// Length in bytes. Of a read or write it is at most the device's largest request; a discard
    /// may be larger.
    pub const fn len_bytes(&self) -> u64 {
        self.sectors as u64 * 512
    }

    fn decode(raw: RawIoDesc) -> Self {
        let op = match raw.op_flags as u8 {
            abi::OP_READ => IoOp::Read,
            abi::OP_WRITE => IoOp::Write,
            abi::OP_FLUSH => IoOp::Flush,
            abi::OP_DISCARD => IoOp::Discard,
            abi::OP_WRITE_ZEROES => IoOp::WriteZeroes,
            other => IoOp::Unknown(other),
        };
        Self {
            op,
            start_sector: raw.start_sector,
            sectors: raw.nr_sectors,
            fua: raw.op_flags & abi::IO_F_FUA != 0,
            no_unmap: raw.op_flags & abi::IO_F_NOUNMAP != 0,
        }
    }
}

/// Why a queue cannot be opened or used.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The character device cannot be opened, or mapped.
    #[error("cannot {what} /dev/ublkc{dev_id}: {source}")]
    System {
        /// The step, as a verb.
        what: &'static str,
        /// The device.
        dev_id: u32,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A tag beyond the queue's depth.
    #[error("ublk tag {tag} does not exist in a queue of {depth}")]
    BadTag {
        /// The tag.
        tag: u16,
        /// The depth.
        depth: u16,
    },
    /// Memory.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The ring.
    #[error(transparent)]
    Ring(#[from] RingError),
}

/// One queue, open. Dropping it (and its ring) lets go of the device.
pub struct Queue {
    info: DeviceInfo,
    queue_id: u16,
    device: Arc<File>,
    registered: FileId,
    descriptors: Descriptors,
    buffers: Arc<Region>,
    buffers_id: RegionId,
}

impl Queue {
    /// Opens queue `queue_id` of a device that was added or is being recovered, for use with `ring`.
    /// The device's node appears a moment after the device; this waits for it up to `patience`.
    ///
    /// Every tag gets a buffer of the device's largest request.
    ///
    /// # Errors
    /// No node, another server has it open, or no memory.
    pub fn open(
        info: &DeviceInfo,
        queue_id: u16,
        patience: Duration,
        ring: &mut Ring,
    ) -> Result<Self, QueueError> {
        let system = |what| move |source| QueueError::System { what, dev_id: info.dev_id, source };
        let device = Arc::new(open_node(info.dev_id, patience).map_err(system("open"))?);
        let stride = u64::from(info.max_io_bytes).next_multiple_of(4096);
        let buffers = Arc::new(Region::anonymous(stride * u64::from(info.queue_depth.max(1)))?);
        let buffers_id = ring.add_region(buffers.clone())?;
        let registered = ring.add_file(device.clone())?;
        // The last that can fail: between this and the last fetch of a recovery, the driver (6.12) would let no
        // other process go on with it.
        let descriptors = Descriptors::map(device.as_raw_fd(), queue_id, info.queue_depth)
            .map_err(system("map"))?;
        Ok(Self { info: *info, queue_id, device, registered, descriptors, buffers, buffers_id })
    }

    /// The device.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// The tags' buffers; see [`Queue::buffer_offset`].
    pub fn buffers(&self) -> &Arc<Region> {
        &self.buffers
    }

    /// The tags' buffers in the ring's table.
    pub fn buffers_id(&self) -> RegionId {
        self.buffers_id
    }

    /// Where a tag's buffer begins in [`Queue::buffers`].
    pub fn buffer_offset(&self, tag: u16) -> u64 {
        u64::from(self.info.max_io_bytes).next_multiple_of(4096) * u64::from(tag)
    }

    /// Offers every tag to the driver; `token` names each. Call once, then submit the ring.
    ///
    /// # Errors
    /// The ring takes nothing.
    pub fn fetch_all(
        &self,
        ring: &mut Ring,
        token: impl Fn(u16) -> Token,
    ) -> Result<(), QueueError> {
        for tag in 0..self.info.queue_depth {
            self.command(ring, abi::IO_FETCH_REQ, tag, 0, self.buffer(tag)?, token(tag))?;
        }
        Ok(())
    }

    /// The request in a tag that the driver has handed out.
    ///
    /// # Errors
    /// No such tag.
    pub fn desc(&self, tag: u16) -> Result<IoDesc, QueueError> {
        self.check(tag)?;
        Ok(IoDesc::decode(self.descriptors.read(tag)))
    }

    /// Answers the request in a tag (bytes done, 0 for a flush or zeroing, or a negative error
    /// number) and offers the tag again.
    ///
    /// # Errors
    /// No such tag, or the ring takes nothing.
    pub fn commit(
        &self,
        ring: &mut Ring,
        tag: u16,
        result: i32,
        token: Token,
    ) -> Result<(), QueueError> {
        self.command(ring, abi::IO_COMMIT_AND_FETCH_REQ, tag, result, self.buffer(tag)?, token)
    }

    /// Lets go of the device's entry in the ring's table, when all fetches have been aborted. The
    /// buffers' addresses stay reserved while the ring lives; their memory is given back.
    ///
    /// # Errors
    /// The ring's pending submissions could not be handed over.
    pub fn close(self, ring: &mut Ring) -> Result<(), QueueError> {
        self.buffers.give_back();
        Ok(ring.remove_file(self.registered)?)
    }

    /// The address for the driver's copying.
    fn buffer(&self, tag: u16) -> Result<NonNull<u8>, QueueError> {
        let len = u64::from(self.info.max_io_bytes);
        Ok(self.buffers.pointer(self.buffer_offset(tag), len)?)
    }

    fn command(
        &self,
        ring: &mut Ring,
        number: u32,
        tag: u16,
        result: i32,
        address: NonNull<u8>,
        token: Token,
    ) -> Result<(), QueueError> {
        self.check(tag)?;
        let address = address.as_ptr() as usize as u64;
        let entry = entry(self.device.as_raw_fd(), number, self.queue_id, tag, result, address);
        // SAFETY: the ring holds the device open (`add_file`) and the buffers mapped (`add_region`).
        Ok(unsafe { ring.push(entry, token) }?)
    }

    fn check(&self, tag: u16) -> Result<(), QueueError> {
        let depth = self.info.queue_depth;
        if tag < depth { Ok(()) } else { Err(QueueError::BadTag { tag, depth }) }
    }
}

/// A queue command as a submission.
fn entry(fd: RawFd, number: u32, q_id: u16, tag: u16, result: i32, addr: u64) -> squeue::Entry {
    let command = IoCmd { q_id, tag, result, addr };
    let mut area = [0u8; 16];
    area.copy_from_slice(command.as_bytes());
    opcode::UringCmd16::new(types::Fd(fd), number).cmd(area).build()
}

fn open_node(dev_id: u32, patience: Duration) -> io::Result<File> {
    let path = format!("/dev/ublkc{dev_id}");
    let deadline = Instant::now() + patience;
    loop {
        match OpenOptions::new().read(true).write(true).open(&path) {
            Err(e)
                if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::EBUSY))
                    && Instant::now() < deadline =>
            {
                std::thread::sleep(Duration::from_millis(2));
            }
            outcome => return outcome,
        }
    }
}

/// The queue's descriptor array, written by the driver before it hands out a request.
struct Descriptors {
    start: NonNull<RawIoDesc>,
    bytes: usize,
    depth: u16,
}

// SAFETY: a read-only mapping, valid in every thread.
unsafe impl Send for Descriptors {}

impl Descriptors {
    fn map(fd: RawFd, queue_id: u16, depth: u16) -> io::Result<Self> {
        let bytes = (usize::from(depth) * size_of::<RawIoDesc>()).next_multiple_of(4096);
        let position = abi::descriptors_position(queue_id) as i64;
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ, flags, fd, position)
        };
        match NonNull::new(at.cast::<RawIoDesc>()) {
            Some(start) if at != libc::MAP_FAILED => Ok(Self { start, bytes, depth }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// `tag` was checked against the depth by the caller; beyond it, an empty descriptor.
    fn read(&self, tag: u16) -> RawIoDesc {
        if tag >= self.depth {
            return RawIoDesc::default();
        }
        // SAFETY: in bounds of the mapping, aligned (it starts on a page). Volatile, for the driver
        // writes it; not while the request is handed out, which the completion (an acquire of the
        // queue's tail) announces.
        unsafe { self.start.add(usize::from(tag)).read_volatile() }
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: our own mapping, whole; descriptors are only ever copied out.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_decode_operation_and_flags() {
        let raw = RawIoDesc {
            op_flags: u32::from(abi::OP_WRITE) | abi::IO_F_FUA | 1 << 11,
            nr_sectors: 8,
            start_sector: 1 << 33,
            addr: 0,
        };
        let desc = IoDesc::decode(raw);
        assert_eq!((desc.op, desc.fua, desc.no_unmap), (IoOp::Write, true, false));
        assert_eq!((desc.position(), desc.len_bytes()), (1 << 42, 4096));
        let raw =
            RawIoDesc { op_flags: u32::from(abi::OP_WRITE_ZEROES) | abi::IO_F_NOUNMAP, ..raw };
        let desc = IoDesc::decode(raw);
        assert_eq!((desc.op, desc.fua, desc.no_unmap), (IoOp::WriteZeroes, false, true));
        for (op, expected) in [
            (abi::OP_READ, IoOp::Read),
            (abi::OP_FLUSH, IoOp::Flush),
            (abi::OP_DISCARD, IoOp::Discard),
            (15, IoOp::Unknown(15)),
        ] {
            let raw = RawIoDesc { op_flags: u32::from(op), ..raw };
            assert_eq!(IoDesc::decode(raw).op, expected);
        }
    }

    #[test]
    fn a_submission_carries_the_command_where_the_driver_reads_it() {
        let built = entry(7, abi::IO_FETCH_REQ, 0, 5, -5, 0x1234_5678_9abc);
        // struct io_uring_sqe: opcode 0, fd 4, cmd_op 8, cmd 48.
        // SAFETY: an entry is a 64-byte plain struct.
        let bytes: [u8; 64] = unsafe { std::mem::transmute(built) };
        assert_eq!(bytes[0], opcode::UringCmd16::CODE);
        assert_eq!(bytes[4..8], 7i32.to_ne_bytes());
        assert_eq!(bytes[8..12], 0xc010_7520u32.to_ne_bytes());
        assert_eq!(
            bytes[48..64],
            [0, 0, 5, 0, 0xfb, 0xff, 0xff, 0xff, 0xbc, 0x9a, 0x78, 0x56, 0x34, 0x12, 0, 0]
        );
    }
}
