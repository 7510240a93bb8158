//! ublk: block devices whose requests a user-space process answers, through io_uring commands
//! (`include/uapi/linux/ublk_cmd.h`, `Documentation/block/ublk.rst`).
//!
//! The life of a device:
//!
//! 1. [`Control::add`] makes `/dev/ublkcN` (or [`Control::start_recovery`] takes over one whose
//!    server died);
//! 2. [`Control::set_params`] says what the disk looks like ([`params`]; not on recovery);
//! 3. the capture thread opens a [`Queue`] and fetches requests on its ring;
//! 4. [`Control::start`] (or [`Control::end_recovery`]) makes `/dev/ublkbN` appear (or go on). It
//!    returns when the partition table has been read *through the queue*, so it must not be called
//!    on the capture thread;
//! 5. [`Control::stop`] ends it: every fetch completes with [`abi::RES_ABORT`]; then
//!    [`Control::delete`].
//!
//! A device made with [`Features::USER_RECOVERY`] and [`Features::USER_RECOVERY_REISSUE`] outlives
//! its server: requests wait, and those the dead server had not answered are handed out again.

pub mod abi;
mod control;
mod features;
pub mod params;
mod queue;

pub use control::{Control, ControlError, DeviceInfo, DeviceState, NewDevice};
pub use features::Features;
pub use params::DeviceParams;
pub use queue::{IoDesc, IoOp, Queue, QueueError};
