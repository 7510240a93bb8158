//! Memory regions that are shared: with a later process (a sealed memfd kept in the service
//! manager's descriptor store), with the kernel (io_uring buffers) and between threads.
//!
//! # Rules
//!
//! A region is *shared mutable memory*, so it is never lent as `&[u8]` by a safe method. Safe code
//! copies in and out with bounds checks, and coordinates through [`Region::atomic_u64`] words: the
//! writer fills a range, then publishes it with a `Release` store; the reader takes it with an
//! `Acquire` load. Bytes have no invalid values, so a copy that races with a writer yields mixed
//! bytes; the protocol above the region (slot states) is what rules that out.
//!
//! io_uring gets at a region through [`crate::kernel::uring::Ring::add_region`], which keeps the
//! mapping alive for as long as an operation may touch it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Why a region could not be made, adopted or accessed.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// A system call failed; `what` says which step it was.
    #[error("cannot {what} a memory region of {len} bytes: {source}")]
    System {
        /// The step that failed, as a verb.
        what: &'static str,
        /// The region's size.
        len: u64,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The size is zero, not a multiple of the page size, or larger than the address space.
    #[error("a memory region cannot be {0} bytes: it must be a non-zero multiple of 4096")]
    BadSize(u64),
    /// An inherited descriptor has another size than the caller remembers.
    #[error("the inherited memory region is {found} bytes, expected {expected}: it is not ours")]
    WrongSize {
        /// What the caller expected.
        expected: u64,
        /// What the descriptor has.
        found: u64,
    },
    /// An inherited descriptor could shrink under its readers, so touching it could kill us.
    #[error("the inherited memory region is not sealed against resizing: it is not ours")]
    NotSealed,
    /// An access beyond the end of the region.
    #[error("access to bytes {offset}+{len} of a memory region of {size} bytes")]
    OutOfBounds {
        /// First byte of the access.
        offset: u64,
        /// Length of the access.
        len: u64,
        /// The region's size.
        size: u64,
    },
    /// An atomic word must lie on a multiple of 8 bytes.
    #[error("atomic word at offset {0} is not aligned to 8 bytes")]
    Misaligned(u64),
}

/// A mapped, fixed-size memory region. See the module for the rules of sharing.
#[derive(Debug)]
pub struct Region {
    start: NonNull<u8>,
    len: usize,
    fd: Option<OwnedFd>,
}

// SAFETY: the mapping belongs to the value alone, is valid in every thread, and is only reached
// through raw copies, atomics, or `slice`, whose contract forbids concurrent writers.
unsafe impl Send for Region {}
// SAFETY: as above; shared access never hands out a plain reference from a safe method.
unsafe impl Sync for Region {}

impl Region {
    /// Makes a zeroed region of `len` bytes in a memfd called `name` (seen in `/proc/PID/maps`),
    /// sealed so that nobody can ever resize it.
    ///
    /// # Errors
    /// A bad size, or the kernel refuses the memory.
    pub fn create(name: &str, len: u64) -> Result<Self, RegionError> {
        checked_len(len)?;
        let system =
            |what| move |e: nix::Error| RegionError::System { what, len, source: e.into() };
        let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)
            .map_err(system("create"))?;
        let signed = i64::try_from(len).map_err(|_| RegionError::BadSize(len))?;
        nix::unistd::ftruncate(&fd, signed).map_err(system("size"))?;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(SIZE_SEALS | SealFlag::F_SEAL_SEAL))
            .map_err(system("seal"))?;
        Self::map(len, Some(fd))
    }

    /// Adopts an inherited descriptor of a region made by [`Region::create`]. `expected_len`, where
    /// the caller knows it, must match.
    ///
    /// # Errors
    /// The descriptor is not a memfd sealed against resizing, or has the wrong size.
    pub fn adopt(fd: OwnedFd, expected_len: Option<u64>) -> Result<Self, RegionError> {
        let file = File::from(fd);
        let len = file
            .metadata()
            .map_err(|source| RegionError::System { what: "look at", len: 0, source })?
            .len();
        if let Some(expected) = expected_len
            && expected != len
        {
            return Err(RegionError::WrongSize { expected, found: len });
        }
        let seals = fcntl(&file, FcntlArg::F_GET_SEALS).map_err(|_| RegionError::NotSealed)?;
        if !SealFlag::from_bits_truncate(seals).contains(SIZE_SEALS) {
            return Err(RegionError::NotSealed);
        }
        Self::map(len, Some(OwnedFd::from(file)))
    }

    /// Makes a zeroed private region of `len` bytes, for buffers that need not outlive us.
    ///
    /// # Errors
    /// A bad size, or the kernel refuses the memory.
    pub fn anonymous(len: u64) -> Result<Self, RegionError> {
        Self::map(len, None)
    }

    /// Size in bytes, never zero.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Never true: a region has at least one page.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The memfd, to be kept by the service manager; none for an anonymous region.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd)
    }

    /// Makes all pages present and keeps them in memory, so that no access ever waits for reclaim.
    ///
    /// # Errors
    /// The kernel's answer, usually `ENOMEM` (the lock limit) or `EPERM`.
    pub fn lock_in_memory(&self) -> io::Result<()> {
        // SAFETY: the range is exactly our own live mapping.
        let rc = unsafe { libc::mlock(self.start.as_ptr().cast(), self.len) };
        if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Gives the memory of an anonymous region back; it reads as zeroes afterwards and costs nothing
    /// until it is written again. Nothing happens to a memfd, which others may share.
    pub fn give_back(&self) {
        if self.fd.is_none() {
            // SAFETY: our own private mapping, whole; only its content changes, as by `zero`.
            unsafe { libc::madvise(self.start.as_ptr().cast(), self.len, libc::MADV_DONTNEED) };
        }
    }

    /// Copies `data` to `offset`.
    ///
    /// # Errors
    /// [`RegionError::OutOfBounds`]; nothing is copied then.
    pub fn copy_in(&self, offset: u64, data: &[u8]) -> Result<(), RegionError> {
        let to = self.pointer(offset, data.len() as u64)?;
        // SAFETY: `to` has room for `data.len()` bytes inside our mapping (checked above), and
        // `data` cannot overlap it: a region is never lent as a slice except by `slice`, whose
        // contract forbids writing meanwhile, and by `slice_mut`, whose forbids all else.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to.as_ptr(), data.len()) };
        Ok(())
    }

    /// Fills `out` from `offset`.
    ///
    /// # Errors
    /// [`RegionError::OutOfBounds`]; `out` is untouched then.
    pub fn copy_out(&self, offset: u64, out: &mut [u8]) -> Result<(), RegionError> {
        let from = self.pointer(offset, out.len() as u64)?;
        // SAFETY: `from` has `out.len()` readable bytes (checked above); `out` is exclusive memory
        // elsewhere.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    /// Copies `len` bytes inside the region or from another one; the ranges may overlap.
    ///
    /// # Errors
    /// [`RegionError::OutOfBounds`] for either side; nothing is copied then.
    pub fn copy_from(
        &self,
        offset: u64,
        source: &Region,
        source_offset: u64,
        len: u64,
    ) -> Result<(), RegionError> {
        let to = self.pointer(offset, len)?;
        let from = source.pointer(source_offset, len)?;
        // SAFETY: both ranges lie in live mappings (checked above); `copy` allows overlap.
        unsafe { std::ptr::copy(from.as_ptr(), to.as_ptr(), len as usize) };
        Ok(())
    }

    /// Sets `len` bytes from `offset` to zero.
    ///
    /// # Errors
    /// [`RegionError::OutOfBounds`]; nothing is written then.
    pub fn zero(&self, offset: u64, len: u64) -> Result<(), RegionError> {
        let to = self.pointer(offset, len)?;
        // SAFETY: the range lies in our live mapping (checked above).
        unsafe { std::ptr::write_bytes(to.as_ptr(), 0, len as usize) };
        Ok(())
    }

    /// The 8-byte word at `offset`, for slot states and counters shared between threads and
    /// processes. Do not mix with `copy_in` on the same word.
    ///
    /// # Errors
    /// Out of bounds or not on a multiple of 8.
    pub fn atomic_u64(&self, offset: u64) -> Result<&AtomicU64, RegionError> {
        let word = self.pointer(offset, 8)?;
        if !offset.is_multiple_of(8) {
            return Err(RegionError::Misaligned(offset));
        }
        // SAFETY: in bounds and aligned (the mapping starts on a page); the mapping lives as long
        // as `self`; the word is shared through atomics only.
        Ok(unsafe { AtomicU64::from_ptr(word.as_ptr().cast()) })
    }

    /// A range as a raw pointer, for system calls. It is valid while the region lives.
    ///
    /// # Errors
    /// [`RegionError::OutOfBounds`].
    pub fn pointer(&self, offset: u64, len: u64) -> Result<NonNull<u8>, RegionError> {
        let size = self.len as u64;
        let end = offset.checked_add(len);
        if end.is_none_or(|end| end > size) {
            return Err(RegionError::OutOfBounds { offset, len, size });
        }
        // SAFETY: `offset` is at most `self.len`, so the pointer stays in (or just past) our
        // mapping.
        Ok(unsafe { self.start.add(offset as usize) })
    }

    /// A range as a slice, without a copy: for encoding a committed slot.
    ///
    /// # Errors
    /// [`RegionError::OutOfBounds`].
    ///
    /// # Safety
    /// Until the slice is dropped nobody writes to the range: no thread, no other process that
    /// maps the memfd, no io_uring operation reading into it.
    pub unsafe fn slice(&self, offset: u64, len: u64) -> Result<&[u8], RegionError> {
        let start = self.pointer(offset, len)?;
        // SAFETY: in bounds of a live mapping; the caller promises that it does not change.
        Ok(unsafe { std::slice::from_raw_parts(start.as_ptr(), len as usize) })
    }

    /// A range to be written in place: for building a frame.
    ///
    /// # Errors
    /// [`RegionError::OutOfBounds`].
    ///
    /// # Safety
    /// Until the slice is dropped nobody else reads or writes the range: no thread, no other process that maps the memfd,
    /// no io_uring operation.
    #[expect(
        clippy::mut_from_ref,
        reason = "a region is shared; the caller promises that the range is not"
    )]
    pub unsafe fn slice_mut(&self, offset: u64, len: u64) -> Result<&mut [u8], RegionError> {
        let start = self.pointer(offset, len)?;
        // SAFETY: in bounds of a live mapping; the caller promises that nobody else uses it.
        Ok(unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), len as usize) })
    }

    fn map(len: u64, fd: Option<OwnedFd>) -> Result<Self, RegionError> {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous};
        let size = checked_len(len)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let mapped = match &fd {
            // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing of
            // ours; the seals keep the file from shrinking below it.
            Some(fd) => unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, fd, 0) },
            // SAFETY: as above, without a file.
            None => unsafe { mmap_anonymous(None, size, protection, MapFlags::MAP_PRIVATE) },
        };
        let start = mapped
            .map_err(|e| RegionError::System { what: "map", len, source: e.into() })?
            .cast::<u8>();
        Ok(Self { start, len: size.get(), fd })
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, whole, and no reference to it can be alive: they all borrow
        // `self`, and a ring holds an `Arc` of it.
        let unmapped = unsafe { nix::sys::mman::munmap(self.start.cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "unmapping our own region: {unmapped:?}");
    }
}

const SIZE_SEALS: SealFlag = SealFlag::F_SEAL_SHRINK.union(SealFlag::F_SEAL_GROW);

fn checked_len(len: u64) -> Result<std::num::NonZeroUsize, RegionError> {
    match usize::try_from(len).ok().and_then(std::num::NonZeroUsize::new) {
        Some(size) if len.is_multiple_of(4096) && isize::try_from(len).is_ok() => Ok(size),
        _ => Err(RegionError::BadSize(len)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn copies_are_bounds_checked_at_both_ends() {
        let region = Region::create("test", 8192).unwrap();
        region.copy_in(8188, b"tail").unwrap();
        let mut out = [0u8; 4];
        region.copy_out(8188, &mut out).unwrap();
        assert_eq!(&out, b"tail");
        for (offset, len) in [(8189, 4), (8192, 1), (u64::MAX, 1), (u64::MAX - 2, 8), (0, 8193)] {
            let refused = region.pointer(offset, len).unwrap_err();
            assert!(matches!(refused, RegionError::OutOfBounds { size: 8192, .. }), "{refused}");
        }
        assert!(region.copy_in(8189, b"tail").is_err());
        assert!(region.copy_out(8189, &mut out).is_err());
        assert!(region.zero(8000, 193).is_err());
        assert!(region.pointer(8192, 0).is_ok());
    }

    #[test]
    fn an_adopted_descriptor_shows_the_same_memory() {
        let first = Region::create("test", 4096).unwrap();
        let fd = first.fd().unwrap().try_clone_to_owned().unwrap();
        let second = Region::adopt(fd, Some(4096)).unwrap();
        first.copy_in(100, b"inherited").unwrap();
        first.atomic_u64(8).unwrap().store(7, Ordering::Release);
        let mut out = [0u8; 9];
        second.copy_out(100, &mut out).unwrap();
        assert_eq!(&out, b"inherited");
        assert_eq!(second.atomic_u64(8).unwrap().load(Ordering::Acquire), 7);
    }

    #[test]
    fn a_descriptor_of_another_size_or_without_seals_is_refused() {
        let region = Region::create("test", 4096).unwrap();
        let fd = region.fd().unwrap().try_clone_to_owned().unwrap();
        let refused = Region::adopt(fd, Some(8192)).unwrap_err();
        assert!(matches!(refused, RegionError::WrongSize { expected: 8192, found: 4096 }));

        let unsealed = memfd_create("test", MFdFlags::MFD_ALLOW_SEALING).unwrap();
        nix::unistd::ftruncate(&unsealed, 4096).unwrap();
        assert!(matches!(Region::adopt(unsealed, None).unwrap_err(), RegionError::NotSealed));
        let plain = tempfile::tempfile().unwrap();
        plain.set_len(4096).unwrap();
        let refused = Region::adopt(plain.into(), None).unwrap_err();
        assert!(matches!(refused, RegionError::NotSealed));
    }

    #[test]
    fn a_sealed_region_cannot_be_resized() {
        let region = Region::create("test", 4096).unwrap();
        let file = File::from(region.fd().unwrap().try_clone_to_owned().unwrap());
        assert!(file.set_len(0).is_err());
        assert!(file.set_len(8192).is_err());
    }

    #[test]
    fn memory_given_back_reads_as_zeroes_unless_it_is_shared() {
        let mut out = [0u8; 4];
        for (region, expected) in [
            (Region::anonymous(4096).unwrap(), [0; 4]),
            (Region::create("test", 4096).unwrap(), *b"kept"),
        ] {
            region.copy_in(0, b"kept").unwrap();
            region.give_back();
            region.copy_out(0, &mut out).unwrap();
            assert_eq!(out, expected);
        }
    }

    #[test]
    fn odd_sizes_and_odd_words_are_refused() {
        for len in [0, 1, 4095, 4097, u64::MAX - 4095] {
            assert!(matches!(Region::anonymous(len).unwrap_err(), RegionError::BadSize(_)));
        }
        let region = Region::anonymous(4096).unwrap();
        assert!(matches!(region.atomic_u64(4).unwrap_err(), RegionError::Misaligned(4)));
        assert!(region.atomic_u64(4096).is_err());
    }
}
