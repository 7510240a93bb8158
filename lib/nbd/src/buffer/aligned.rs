//! Aligned memory that need not be initialised, and a small pool of it.
//!
//! Without the pool, each large payload costs a mapping, a page fault for every 4 KiB and an
//! unmapping, which is more than receiving it.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::BUFFER_ALIGN;

/// Smallest and largest allocation that is pooled, as powers of two: 64 KiB and 4 MiB.
const POOLED: std::ops::RangeInclusive<u32> = 16..=22;
const CLASSES: usize = (*POOLED.end() - *POOLED.start() + 1) as usize;
/// Most that the process keeps for later, in bytes.
const POOL_BYTES_MAX: usize = 16 << 20;

static POOL: Mutex<Pool> = Mutex::new(Pool { free: [const { Vec::new() }; CLASSES], bytes: 0 });

/// An owned allocation of `capacity` bytes, aligned to [`BUFFER_ALIGN`].
pub(super) struct Aligned {
    capacity: usize,
    /// Taken out only when dropped.
    block: Option<Block>,
}

/// Unused blocks by size class.
struct Pool {
    free: [Vec<Block>; CLASSES],
    bytes: usize,
}

struct Block {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: it owns its memory, which nothing else refers to.
unsafe impl Send for Block {}
// SAFETY: the memory is written through `&mut` only.
unsafe impl Sync for Block {}

impl Aligned {
    pub(super) fn new(capacity: usize) -> Self {
        let block = match class(capacity) {
            Some(class) => pool().take(class).unwrap_or_else(|| Block::new(size_of_class(class))),
            None => Block::new(capacity),
        };
        Self { capacity, block: Some(block) }
    }

    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    /// All of it, initialised or not.
    pub(super) fn uninit_mut(&mut self) -> &mut [MaybeUninit<u8>] {
        // SAFETY: the block holds at least `capacity` bytes, which need not be initialised for
        // this type, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start().cast(), self.capacity) }
    }

    /// The first `length` bytes.
    ///
    /// # Safety
    /// They have been written, and `length` is at most the capacity.
    pub(super) unsafe fn init(&self, length: usize) -> &[u8] {
        // SAFETY: as the caller promises.
        unsafe { std::slice::from_raw_parts(self.start(), length) }
    }

    /// The first `length` bytes.
    ///
    /// # Safety
    /// They have been written, and `length` is at most the capacity.
    pub(super) unsafe fn init_mut(&mut self, length: usize) -> &mut [u8] {
        // SAFETY: as the caller promises, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start(), length) }
    }

    fn start(&self) -> *mut u8 {
        self.block.as_ref().map_or(std::ptr::dangling_mut(), |block| block.start.as_ptr())
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        if let Some(class) = class(self.capacity) {
            self.block = self.block.take().and_then(|block| pool().put(class, block));
        }
    }
}

impl Pool {
    fn take(&mut self, class: usize) -> Option<Block> {
        let block = self.free.get_mut(class)?.pop()?;
        self.bytes -= block.layout.size();
        Some(block)
    }

    /// Keeps a block, or returns it when there is no room.
    fn put(&mut self, class: usize, block: Block) -> Option<Block> {
        let bytes = self.bytes + block.layout.size();
        match self.free.get_mut(class) {
            Some(free) if bytes <= POOL_BYTES_MAX => {
                self.bytes = bytes;
                free.push(block);
                None
            }
            _ => Some(block),
        }
    }
}

impl Block {
    fn new(bytes: usize) -> Self {
        let layout = Layout::from_size_align(bytes.max(1), BUFFER_ALIGN)
            .expect("lengths have 32 bits, far below isize::MAX");
        // SAFETY: the layout's size is not zero.
        let start = unsafe { alloc(layout) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout) };
        Self { start, layout }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, and dropped once.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

fn pool() -> MutexGuard<'static, Pool> {
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The size class, a power of two, for `capacity` bytes; none for small and very large ones.
fn class(capacity: usize) -> Option<usize> {
    let power = capacity.checked_next_power_of_two()?.trailing_zeros();
    POOLED.contains(&power).then(|| (power - POOLED.start()) as usize)
}

fn size_of_class(class: usize) -> usize {
    1 << (*POOLED.start() as usize + class)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_hold_what_they_are_for() {
        assert_eq!(class(4096), None);
        assert_eq!(class(1 << 16), Some(0));
        assert_eq!(class((1 << 16) + 1), Some(1));
        assert_eq!(class(1 << 22), Some(CLASSES - 1));
        assert_eq!(class((1 << 22) + 1), None);
        for capacity in [40_000, 1 << 16, 100_000, 1 << 20, 3 << 20] {
            let class = class(capacity).expect("pooled");
            assert!(size_of_class(class) >= capacity);
        }
    }

    #[test]
    fn the_pool_is_bounded_and_counts_right() {
        let mut pool = Pool { free: [const { Vec::new() }; CLASSES], bytes: 0 };
        let class = CLASSES - 1;
        for _ in 0..10 {
            drop(pool.put(class, Block::new(size_of_class(class))));
        }
        assert_eq!((pool.bytes, pool.free[class].len()), (POOL_BYTES_MAX, 4));
        while pool.take(class).is_some() {}
        assert_eq!(pool.bytes, 0);
    }
}
