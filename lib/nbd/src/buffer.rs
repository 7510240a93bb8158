//! The memory a write's payload is received into, and that an export may return from a read.
//!
//! By default it is allocated 4 KiB-aligned, so it can go to `O_DIRECT` as it is, and is not
//! zeroed first. An export that wants payloads somewhere else (a ring, registered memory) hands
//! out its own [`Memory`] and gets it back by [`Buffer::into_memory`].

mod aligned;

use std::any::Any;
use std::io;
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use tokio::io::{AsyncRead, ReadBuf};

use aligned::Aligned;

/// Alignment of a [`Buffer`] allocated here, in bytes.
pub const BUFFER_ALIGN: usize = 4096;

/// An export's own memory for payloads. Both views must be the same bytes, of constant length.
pub trait Memory: Any + Send + Sync + AsRef<[u8]> + AsMut<[u8]> {}

impl<T: Any + Send + Sync + AsRef<[u8]> + AsMut<[u8]>> Memory for T {}

/// An owned byte buffer of fixed capacity that is filled from its start.
///
/// It dereferences to the bytes filled so far; a write gets it full.
pub struct Buffer {
    filled: usize,
    storage: Storage,
}

enum Storage {
    Aligned(Aligned),
    Own(Box<dyn Memory>),
}

impl Buffer {
    /// An empty, aligned buffer that takes `capacity` bytes.
    pub fn with_capacity(capacity: usize) -> Self {
        Self { filled: 0, storage: Storage::Aligned(Aligned::new(capacity)) }
    }

    /// A full, aligned buffer of zeros.
    pub fn zeroed(length: usize) -> Self {
        let mut buffer = Self::with_capacity(length);
        buffer.spare().fill(MaybeUninit::new(0));
        buffer.filled = length;
        buffer
    }

    /// An empty buffer over an export's own memory.
    pub fn from_memory(memory: Box<dyn Memory>) -> Self {
        Self { filled: 0, storage: Storage::Own(memory) }
    }

    /// Appends as much of `bytes` as there is room for; returns how much that was.
    pub fn extend(&mut self, bytes: &[u8]) -> usize {
        let spare = self.spare();
        let count = spare.len().min(bytes.len());
        for (to, from) in spare.iter_mut().zip(bytes) {
            to.write(*from);
        }
        self.filled += count;
        count
    }

    /// Reads once from `stream` into the room left; returns the bytes added, 0 at its end.
    pub(crate) fn poll_fill<S: AsyncRead>(
        &mut self,
        stream: Pin<&mut S>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let spare = self.spare();
        let start = spare.as_ptr();
        let mut read = ReadBuf::uninit(spare);
        ready!(stream.poll_read(cx, &mut read))?;
        // A stream that swaps the ReadBuf for another must not make us trust unread memory.
        assert_eq!(start.cast(), read.filled().as_ptr(), "the stream replaced its buffer");
        let count = read.filled().len();
        self.filled += count;
        Poll::Ready(Ok(count))
    }

    /// Gives an export its own memory back; `Err` if it came from elsewhere.
    pub fn into_memory<T: Memory>(self) -> Result<Box<T>, Self> {
        match self.storage {
            Storage::Own(memory) if (&*memory as &dyn Any).is::<T>() => {
                let any: Box<dyn Any> = memory;
                any.downcast().map_err(|_| unreachable!("the type was checked"))
            }
            storage => Err(Self { filled: self.filled, storage }),
        }
    }

    /// Bytes it takes in all.
    pub fn capacity(&self) -> usize {
        match &self.storage {
            Storage::Aligned(memory) => memory.capacity(),
            Storage::Own(memory) => (**memory).as_ref().len(),
        }
    }

    /// Whether it has been filled to its capacity.
    pub fn is_full(&self) -> bool {
        self.filled >= self.capacity()
    }

    fn spare(&mut self) -> &mut [MaybeUninit<u8>] {
        let filled = self.filled;
        let all = match &mut self.storage {
            Storage::Aligned(memory) => memory.uninit_mut(),
            Storage::Own(memory) => {
                let bytes = (**memory).as_mut();
                // SAFETY: initialised bytes are valid as MaybeUninit, and this module only ever
                // writes initialised bytes through the result (`extend`, `zeroed`, ReadBuf).
                unsafe { &mut *(std::ptr::from_mut(bytes) as *mut [MaybeUninit<u8>]) }
            }
        };
        all.get_mut(filled..).unwrap_or_default()
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.storage {
            // SAFETY: the first `filled` bytes have been written.
            Storage::Aligned(memory) => unsafe { memory.init(self.filled) },
            Storage::Own(memory) => (**memory).as_ref().get(..self.filled).unwrap_or_default(),
        }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.storage {
            // SAFETY: the first `filled` bytes have been written.
            Storage::Aligned(memory) => unsafe { memory.init_mut(self.filled) },
            Storage::Own(memory) => (**memory).as_mut().get_mut(..self.filled).unwrap_or_default(),
        }
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffer").field("filled", &self.filled).finish_non_exhaustive()
    }
}

impl From<Buffer> for Bytes {
    /// Without a copy.
    fn from(buffer: Buffer) -> Self {
        Self::from_owner(buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fills_from_the_start_and_keeps_alignment() {
        let mut buffer = Buffer::with_capacity(6);
        assert_eq!(buffer.as_ptr() as usize % BUFFER_ALIGN, 0);
        assert_eq!(buffer.extend(b"abcd"), 4);
        assert!(!buffer.is_full());
        assert_eq!(buffer.extend(b"efgh"), 2);
        assert!(buffer.is_full());
        assert_eq!(&buffer[..], b"abcdef");
        assert_eq!(&Bytes::from(buffer)[..], b"abcdef");
        assert_eq!(&Buffer::zeroed(3)[..], [0; 3]);
    }

    #[test]
    fn gives_an_export_its_memory_back() {
        let mut buffer = Buffer::from_memory(Box::new(vec![0u8; 4]));
        assert_eq!(buffer.len(), 0);
        buffer.extend(b"wxyz!");
        assert_eq!(&buffer[..], b"wxyz");
        let buffer = buffer.into_memory::<[u8; 4]>().expect_err("not an array");
        assert_eq!(*buffer.into_memory::<Vec<u8>>().expect("a vector"), b"wxyz");
        assert!(Buffer::with_capacity(1).into_memory::<Vec<u8>>().is_err());
    }
}
