//! The faces of the kernel: each module wraps one kernel interface, keeps its `unsafe` to itself,
//! pins the ABI with compile-time size checks and golden bytes, and offers a safe face.
//!
//! - [`ublk`]: block devices served from user space (control device, queues).
//! - [`nbd_netlink`]: the kernel's NBD client, configured over generic netlink.
//! - [`blockdev`]: what a backing disk or image is, can do, and who uses it; claiming it.
//! - [`memfd`]: shared memory that outlives a process in the service manager's descriptor store.
//! - [`uring`]: one io_uring for a single-threaded event loop.
//! - [`process`]: what a daemon below a filesystem must ask for itself.
//! - [`udev`]: stable names of devices, and hiding raw disks.

pub mod blockdev;
pub mod memfd;
pub mod nbd_netlink;
pub mod process;
pub mod ublk;
pub mod udev;
pub mod uring;
