//! Disks under load.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::{FallocateFlags, fallocate};

use super::content::SECTOR_BYTES;

/// A disk as its user sees it. Calls come from many threads at once, each returning when the disk has
/// acknowledged it; offsets and lengths are whole sectors within the disk.
pub trait Disk: Sync {
    /// Writes the bytes. They are aligned to 4096 bytes in memory.
    fn write(&self, offset_bytes: u64, bytes: &[u8]) -> io::Result<()>;
    /// Writes zeroes.
    fn zero(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<()>;
    /// Discards the range.
    fn discard(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<()>;
    /// Makes durable what was acknowledged.
    fn flush(&self) -> io::Result<()>;
    /// Reads into the buffer, whose memory is aligned to 4096 bytes.
    fn read(&self, offset_bytes: u64, buffer: &mut [u8]) -> io::Result<()>;
}

/// A block device, past the page cache, or a file, through it.
pub struct FileDisk {
    file: File,
    device: bool,
}

impl FileDisk {
    /// Opens a block device or a file for reading and writing.
    pub fn open(path: &Path) -> io::Result<FileDisk> {
        let device = path.metadata()?.file_type().is_block_device();
        let flags = if device { libc::O_DIRECT } else { 0 };
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?;
        Ok(FileDisk { file, device })
    }
}

impl Disk for FileDisk {
    fn write(&self, offset_bytes: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset_bytes)
    }

    fn zero(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        self.allocate(FallocateFlags::FALLOC_FL_ZERO_RANGE, offset_bytes, length_bytes)
    }

    fn discard(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        if self.device {
            return discard(&self.file, offset_bytes, length_bytes);
        }
        self.allocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset_bytes, length_bytes)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn read(&self, offset_bytes: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset_bytes)
    }
}

impl FileDisk {
    fn allocate(
        &self,
        mode: FallocateFlags,
        offset_bytes: u64,
        length_bytes: u64,
    ) -> io::Result<()> {
        let signed = |bytes: u64| i64::try_from(bytes).map_err(io::Error::other);
        let mode = mode | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        Ok(fallocate(&self.file, mode, signed(offset_bytes)?, signed(length_bytes)?)?)
    }
}

/// `BLKDISCARD` of `<linux/fs.h>`: `_IO(0x12, 119)`.
const BLKDISCARD: libc::c_ulong = 0x1277;

fn discard(device: &File, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
    let range = [offset_bytes, length_bytes];
    // SAFETY: the request reads two u64 from the address, which is that of an array of two.
    if unsafe { libc::ioctl(device.as_raw_fd(), BLKDISCARD, range.as_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Memory for I/O, aligned to its own unit as O_DIRECT wants it.
#[derive(Default)]
pub struct Buffer {
    pages: Vec<Page>,
}

#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Page([[u8; SECTOR_BYTES as usize]; 8]);

impl Buffer {
    /// The first `length_bytes` of the memory, which grows to hold them and keeps its content otherwise.
    pub fn bytes(&mut self, length_bytes: u64) -> &mut [u8] {
        let length = usize::try_from(length_bytes).unwrap_or(usize::MAX);
        let pages = length.div_ceil(size_of::<Page>());
        if self.pages.len() < pages {
            self.pages.resize(pages, Page([[0; SECTOR_BYTES as usize]; 8]));
        }
        let start = self.pages.as_mut_ptr().cast::<u8>();
        // SAFETY: the vector holds at least `length` bytes of plain u8 arrays without padding (a page is as
        // long as its alignment), all initialised, and is borrowed for as long as the slice lives.
        unsafe { std::slice::from_raw_parts_mut(start, length) }
    }
}
