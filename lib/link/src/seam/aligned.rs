//! Memory for direct I/O.

use tokio_uring::buf::{IoBuf, IoBufMut};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// The alignment of direct I/O: of the memory, the offset and the length.
pub const BLOCK_BYTES: usize = 4096;

#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
struct Block([u8; BLOCK_BYTES]);

const _: () = assert!(size_of::<Block>() == BLOCK_BYTES && align_of::<Block>() == BLOCK_BYTES);

/// A buffer for direct I/O: aligned, growing up to a bound, to be used again and again.
pub struct AlignedBuf {
    blocks: Vec<Block>,
    bytes: usize,
    bytes_max: usize,
}

/// What was to be added does not fit below the buffer's bound.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the buffer is full: {add} bytes on top of {have} are more than {max}")]
pub struct BufferFull {
    /// Bytes in the buffer.
    pub have: usize,
    /// Bytes that were to be added.
    pub add: usize,
    /// The bound.
    pub max: usize,
}

impl AlignedBuf {
    /// An empty buffer that grows up to `bytes_max` bytes, rounded up to whole blocks.
    pub fn new(bytes_max: usize) -> AlignedBuf {
        let bytes_max = bytes_max.next_multiple_of(BLOCK_BYTES);
        AlignedBuf { blocks: Vec::new(), bytes: 0, bytes_max }
    }

    /// Adds bytes at the end.
    ///
    /// # Errors
    /// [`BufferFull`]; the buffer is then as it was.
    pub fn extend(&mut self, bytes: &[u8]) -> Result<(), BufferFull> {
        let start = self.bytes;
        self.resize(start.saturating_add(bytes.len()))?;
        self.as_mut_slice()[start..].copy_from_slice(bytes);
        Ok(())
    }

    /// Fills up with zeros to the next multiple of 4096 bytes.
    pub fn pad_to_block(&mut self) {
        let start = self.bytes;
        self.bytes = start.next_multiple_of(BLOCK_BYTES);
        self.as_mut_slice()[start..].fill(0);
    }

    /// Changes the length. What is added holds zeros or what the buffer held there before.
    ///
    /// # Errors
    /// [`BufferFull`]; the buffer is then as it was.
    pub fn resize(&mut self, bytes: usize) -> Result<(), BufferFull> {
        if bytes > self.bytes_max {
            let (have, max) = (self.bytes, self.bytes_max);
            return Err(BufferFull { have, add: bytes - have, max });
        }
        let blocks = bytes.div_ceil(BLOCK_BYTES);
        if blocks > self.blocks.len() {
            // Twice as much each time, so that filling a buffer bit by bit copies little.
            let more = blocks.max(self.blocks.len() * 2).min(self.bytes_max / BLOCK_BYTES);
            self.blocks.resize(more, Block::new_zeroed());
        }
        self.bytes = bytes;
        Ok(())
    }

    /// Empties the buffer and keeps its memory.
    pub fn clear(&mut self) {
        self.bytes = 0;
    }

    /// Bytes in the buffer.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// The most bytes it can hold.
    pub fn bytes_max(&self) -> usize {
        self.bytes_max
    }

    /// The content.
    pub fn as_slice(&self) -> &[u8] {
        &self.blocks.as_bytes()[..self.bytes]
    }

    /// The content, to be changed.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.blocks.as_mut_slice().as_mut_bytes()[..self.bytes]
    }
}

impl std::fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBuf({} of {} bytes)", self.bytes, self.bytes_max)
    }
}

/// The buffer's content as tokio-uring takes it: its length never changes under way.
pub(super) struct Handed(pub AlignedBuf);

// SAFETY: the pointer is to the vector's heap memory, which neither moves nor shrinks while the
// operation owns `Handed`; `bytes` of it are initialised, since every block is.
unsafe impl IoBuf for Handed {
    fn stable_ptr(&self) -> *const u8 {
        self.0.blocks.as_ptr().cast()
    }

    fn bytes_init(&self) -> usize {
        self.0.bytes
    }

    fn bytes_total(&self) -> usize {
        self.0.bytes
    }
}

// SAFETY: as above, and the memory is owned alone; all `bytes` are initialised already, so
// `set_init` has nothing to do.
unsafe impl IoBufMut for Handed {
    fn stable_mut_ptr(&mut self) -> *mut u8 {
        self.0.blocks.as_mut_ptr().cast()
    }

    unsafe fn set_init(&mut self, _bytes: usize) {}
}
