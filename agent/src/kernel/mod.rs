//! The faces of the kernel: each module wraps one kernel interface, keeps its `unsafe` to itself,
//! pins the ABI with compile-time size checks and golden bytes, and offers a safe face.
//!
//! - [`ublk`]: block devices served from user space (control device, queues).
//! - [`blockdev`]: what a backing disk or image is, can do, and who uses it; claiming it.
//! - [`memfd`]: shared memory that outlives a process in the service manager's descriptor store.
//! - [`uring`]: one io_uring for a single-threaded event loop.

pub mod blockdev;
pub mod memfd;
pub mod ublk;
pub mod uring;
