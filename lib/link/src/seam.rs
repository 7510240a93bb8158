//! The streaming path's sockets and files. Nothing outside this module names tokio-uring.
//!
//! Writing to a socket is a plain system call, which the kernel copies from; it is told of room by epoll, as this thread's
//! runtime is of its ring. The rules for all else, since an io_uring operation belongs to the kernel until it completes:
//!
//! - Buffers are handed over with the operation and come back with its result.
//! - Nothing can be cancelled. Dropping a future leaves its operation submitted: a socket's ends by
//!   shutdown(2), which dropping a [`Stream`] or [`Listener`] does; a file's is carried out anyway.
//! - So a [`File`] belongs to one task that is never cancelled and is fed by a bounded queue.
//!
//! Everything here lives on the thread that called [`run`]; time and channels of tokio work there.

mod aligned;
mod file;
mod net;

use std::{future::Future, io};

pub use aligned::{AlignedBuf, BLOCK_BYTES, BufferFull};
pub use file::{File, How, sync_dir};
pub use net::{Listener, Stream, StreamCloser};

/// Entries of a thread's submission queue.
const RING_ENTRIES: u32 = 256;

/// Runs the future on this thread, and the tasks that it [`spawn`]s until it ends.
///
/// # Errors
/// When the kernel gives no io_uring: it is older than 5.11, or io_uring is switched off.
pub fn run<F: Future>(future: F) -> io::Result<F::Output> {
    let mut builder = tokio_uring::builder();
    let runtime = tokio_uring::Runtime::new(builder.entries(RING_ENTRIES)).map_err(|error| {
        io::Error::new(
            error.kind(),
            format!(
                "the kernel gives no io_uring ({error}): Linux 5.11 or later is needed, with \
                 kernel.io_uring_disabled=0"
            ),
        )
    })?;
    Ok(runtime.block_on(future))
}

/// Starts a task on this thread. It ends with the future given to [`run`], at the latest.
///
/// # Panics
/// Outside [`run`].
pub fn spawn<F: Future + 'static>(future: F) -> tokio::task::JoinHandle<F::Output> {
    tokio_uring::spawn(future)
}

/// Hands over to the kernel what this thread has asked for so far, which else waits until all of its
/// tasks have nothing to do, and lets the others go on. For a task that has much to do of its own while the kernel works.
///
/// # Errors
/// The ring's.
pub async fn submit() -> io::Result<()> {
    // It is answered only after it has been handed over, and all that was asked for before it.
    tokio_uring::no_op().await
}

#[cfg(test)]
mod tests;
