//! `/dev/ublk-control`: making, starting, taking over and removing devices.
//!
//! Every command is bounded by a timeout. The ring's kernel threads run the commands, so one that
//! never returns (some kernels oops in `ADD_DEV`) costs a kernel thread, not the caller. Its buffer
//! is then leaked, for the kernel may still write to it, and the [`Control`] refuses further work.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::abi::{self, CtrlCmd, DevInfo};
use super::{DeviceParams, Features, params::ParamsError};

/// The control device.
pub struct Control {
    file: File,
    ring: IoUring<squeue::Entry128, cqueue::Entry>,
    timeout: Duration,
    stuck: Option<&'static str>,
}

/// What [`Control::add`] makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewDevice {
    /// A wanted number, or the first that is free.
    pub dev_id: Option<u32>,
    /// Hardware queues; one where one thread serves the device.
    pub queues: u16,
    /// Requests per queue, at most [`abi::MAX_QUEUE_DEPTH`].
    pub queue_depth: u16,
    /// Largest request, a multiple of the page size.
    pub max_io_bytes: u32,
    /// Features to switch on, all of which must be had.
    pub features: Features,
    /// Whose device it is: the driver keeps it with the device and reads nothing out of it.
    pub identity: u64,
}

/// A device as the driver knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The N of `/dev/ublkbN`.
    pub dev_id: u32,
    /// Hardware queues.
    pub queues: u16,
    /// Requests per queue.
    pub queue_depth: u16,
    /// Largest request.
    pub max_io_bytes: u32,
    /// Features that are on.
    pub features: Features,
    /// What its maker gave as [`NewDevice::identity`]; other programs have their own use for it,
    /// or leave it 0.
    pub identity: u64,
    /// Whether it is served.
    pub state: DeviceState,
    /// Process that serves or served it; 0 or less: none.
    pub server_pid: i32,
}

impl DeviceInfo {
    /// The block device, `/dev/ublkbN`.
    pub fn block_path(&self) -> std::path::PathBuf {
        format!("/dev/ublkb{}", self.dev_id).into()
    }
}

/// State of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceState {
    /// Made and not started, or stopped.
    Dead,
    /// Served, or its server has just died.
    Live,
    /// Its server is gone; requests wait for the next.
    Quiesced,
    /// Its server is gone; requests fail until the next.
    Failing,
    /// A state this program does not know.
    Unknown(u16),
}

/// Why a control command failed. Each is a sentence that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The driver is not there.
    #[error(
        "/dev/ublk-control does not exist: load the driver with `modprobe ublk_drv` (Linux 6.1 or \
         later; some distributions keep it in an extra modules package), or use the NBD front"
    )]
    NoDriver,
    /// Not allowed to open it.
    #[error("not allowed to open /dev/ublk-control: ublk devices need root (CAP_SYS_ADMIN)")]
    Forbidden,
    /// The control device or its ring failed.
    #[error("ublk control device: {0}")]
    System(#[from] io::Error),
    /// The driver is too old, or built without something.
    #[error("this kernel's ublk driver lacks {missing}: update the kernel, or use the NBD front")]
    Lacks {
        /// What is missing.
        missing: Features,
    },
    /// No such device.
    #[error("there is no ublk device {dev_id}")]
    NoDevice {
        /// Its number.
        dev_id: u32,
    },
    /// The driver has as many devices as it takes.
    #[error(
        "the ublk driver takes no more devices: raise its limit (`echo N > \
         /sys/module/ublk_drv/parameters/ublks_max`, or `options ublk_drv ublks_max=N` in \
         /etc/modprobe.d) or delete unused ones"
    )]
    TooMany,
    /// The wanted number is taken.
    #[error("ublk device number {dev_id} is taken")]
    Taken {
        /// The number.
        dev_id: u32,
    },
    /// Its former server still runs or is still exiting.
    #[error(
        "ublk device {dev_id} is not ready to be taken over: its former server (process {pid}) is \
         still there"
    )]
    StillServed {
        /// Its number.
        dev_id: u32,
        /// The server's process.
        pid: i32,
    },
    /// A command did not return in time.
    #[error(
        "the ublk driver did not finish {command} within {seconds} s: look at the kernel's log \
         (dmesg); the machine may need a reboot before ublk works again"
    )]
    TimedOut {
        /// The command.
        command: &'static str,
        /// The limit.
        seconds: u64,
    },
    /// The driver said no.
    #[error("the ublk driver refused {command} for device {dev_id}: {source}")]
    Refused {
        /// The command.
        command: &'static str,
        /// The device; [`abi::ANY_DEVICE`] for a new one.
        dev_id: u32,
        /// Its reason.
        source: io::Error,
    },
    /// The parameters cannot be expressed.
    #[error(transparent)]
    Params(#[from] ParamsError),
}

/// A control command: its name and number.
#[derive(Clone, Copy)]
struct Command {
    name: &'static str,
    number: u32,
}

macro_rules! commands {
    ($($name:ident = $number:ident;)*) => {
        $(const $name: Command = Command { name: stringify!($name), number: abi::$number };)*
    };
}

commands! {
    GET_FEATURES = CMD_GET_FEATURES;
    GET_DEV_INFO = CMD_GET_DEV_INFO;
    ADD_DEV = CMD_ADD_DEV;
    DEL_DEV = CMD_DEL_DEV;
    START_DEV = CMD_START_DEV;
    STOP_DEV = CMD_STOP_DEV;
    SET_PARAMS = CMD_SET_PARAMS;
    GET_PARAMS = CMD_GET_PARAMS;
    START_USER_RECOVERY = CMD_START_USER_RECOVERY;
    END_USER_RECOVERY = CMD_END_USER_RECOVERY;
}

impl Control {
    /// Opens the control device. Each command may take up to `timeout`.
    ///
    /// # Errors
    /// No driver, not allowed, or no io_uring.
    pub fn open(timeout: Duration) -> Result<Self, ControlError> {
        let file = OpenOptions::new().read(true).write(true).open("/dev/ublk-control").map_err(
            |e| match e.raw_os_error() {
                Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => ControlError::NoDriver,
                Some(libc::EACCES | libc::EPERM) => ControlError::Forbidden,
                _ => ControlError::System(e),
            },
        )?;
        let ring = IoUring::builder().build(8)?;
        Ok(Self { file, ring, timeout, stuck: None })
    }

    /// What the driver can do.
    ///
    /// # Errors
    /// The driver is too old to be asked (before 6.3), or does not answer.
    pub fn features(&mut self) -> Result<Features, ControlError> {
        match self.exchange(GET_FEATURES, abi::ANY_DEVICE, 0u64, 0) {
            Ok(bits) => Ok(Features::from_bits(bits)),
            Err(ControlError::Refused { source, .. })
                if matches!(source.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL)) =>
            {
                Err(ControlError::Lacks { missing: Features::CMD_IOCTL_ENCODE })
            }
            Err(e) => Err(e),
        }
    }

    /// Makes a device. It has no parameters yet and serves nothing.
    ///
    /// # Errors
    /// Features that the driver lacks, no more devices, number taken, or the driver does not answer.
    pub fn add(&mut self, device: &NewDevice) -> Result<DeviceInfo, ControlError> {
        let missing = device.features.without(self.features()?);
        if missing != Features::default() {
            return Err(ControlError::Lacks { missing });
        }
        let dev_id = device.dev_id.unwrap_or(abi::ANY_DEVICE);
        let info = DevInfo {
            nr_hw_queues: device.queues,
            queue_depth: device.queue_depth,
            max_io_buf_bytes: device.max_io_bytes,
            dev_id,
            flags: device.features.bits(),
            ublksrv_flags: device.identity,
            ..DevInfo::default()
        };
        let made = self.exchange(ADD_DEV, dev_id, info, 0).map_err(|e| match e {
            ControlError::Refused { source, .. } if source.raw_os_error() == Some(libc::EACCES) => {
                ControlError::TooMany
            }
            ControlError::Refused { source, .. } if source.raw_os_error() == Some(libc::EEXIST) => {
                ControlError::Taken { dev_id }
            }
            other => other,
        })?;
        let made = describe(&made);
        // The driver clears what it will not do instead of refusing (user copy without privilege).
        let missing = device.features.without(made.features);
        if missing != Features::default() {
            self.delete(made.dev_id)?;
            return Err(ControlError::Lacks { missing });
        }
        Ok(made)
    }

    /// Tells what the disk looks like, before it is started.
    ///
    /// # Errors
    /// Parameters that ublk cannot express or the driver refuses.
    pub fn set_params(&mut self, dev_id: u32, params: &DeviceParams) -> Result<(), ControlError> {
        self.exchange(SET_PARAMS, dev_id, params.encode()?, 0).map(drop)
    }

    /// The parameters of a device, for comparing before a takeover.
    ///
    /// # Errors
    /// No such device.
    pub fn params(&mut self, dev_id: u32) -> Result<abi::Params, ControlError> {
        let head = abi::Params { len: size_of::<abi::Params>() as u32, ..Default::default() };
        self.exchange(GET_PARAMS, dev_id, head, 0)
    }

    /// Makes the block device appear. All queues must have been fetched by this process; they must
    /// be served meanwhile, for the partition table is read before this returns.
    ///
    /// # Errors
    /// The driver refuses, or the queues are not served in time.
    pub fn start(&mut self, dev_id: u32) -> Result<(), ControlError> {
        self.command(START_DEV, dev_id, u64::from(std::process::id()))
    }

    /// Stops a device: the block device disappears, waiting requests fail, and every fetch completes
    /// with [`abi::RES_ABORT`]. Requests under way are waited for, so the queues must be served.
    ///
    /// # Errors
    /// No such device, or the driver does not answer.
    pub fn stop(&mut self, dev_id: u32) -> Result<(), ControlError> {
        self.command(STOP_DEV, dev_id, 0)
    }

    /// Removes a device that is stopped. Waits until nobody has `/dev/ublkcN` open, so drop its
    /// [`super::Queue`]s, and rings that hold them, before.
    ///
    /// # Errors
    /// No such device, or it is still open when the time is up.
    pub fn delete(&mut self, dev_id: u32) -> Result<(), ControlError> {
        self.command(DEL_DEV, dev_id, 0)
    }

    /// The device, if there is one of that number.
    ///
    /// # Errors
    /// The driver does not answer.
    pub fn find(&mut self, dev_id: u32) -> Result<Option<DeviceInfo>, ControlError> {
        match self.exchange(GET_DEV_INFO, dev_id, DevInfo::default(), 0) {
            Ok(info) => Ok(Some(describe(&info))),
            Err(ControlError::NoDevice { .. }) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Takes over a device whose server died. The kernel lets go of the old server only when it is
    /// wholly gone (its last I/O done), so this tries again until `patience` has passed. Afterwards
    /// fetch its queues and call [`Control::end_recovery`].
    ///
    /// # Errors
    /// No such device, not recoverable, or its server is still there.
    pub fn start_recovery(
        &mut self,
        dev_id: u32,
        patience: Duration,
    ) -> Result<DeviceInfo, ControlError> {
        let deadline = Instant::now() + patience;
        loop {
            let info = self.find(dev_id)?.ok_or(ControlError::NoDevice { dev_id })?;
            match self.command(START_USER_RECOVERY, dev_id, 0) {
                Ok(()) => return Ok(info),
                Err(ControlError::Refused { source, .. })
                    if source.raw_os_error() == Some(libc::EBUSY) =>
                {
                    if Instant::now() >= deadline {
                        return Err(ControlError::StillServed { dev_id, pid: info.server_pid });
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Ends a takeover: waiting requests and those the old server had not answered are handed out.
    ///
    /// # Errors
    /// The driver refuses, or the queues were not fetched in time.
    pub fn end_recovery(&mut self, dev_id: u32) -> Result<(), ControlError> {
        self.command(END_USER_RECOVERY, dev_id, u64::from(std::process::id()))
    }

    /// A command without a buffer.
    fn command(&mut self, command: Command, dev_id: u32, data: u64) -> Result<(), ControlError> {
        self.run::<[u8; 0]>(command, dev_id, None, data).map(drop)
    }

    /// A command with a buffer, returned as the driver left it.
    fn exchange<B>(
        &mut self,
        command: Command,
        dev_id: u32,
        buffer: B,
        data: u64,
    ) -> Result<B, ControlError>
    where
        B: FromBytes + IntoBytes + Immutable + KnownLayout,
    {
        let answer = self.run(command, dev_id, Some(Box::new(buffer)), data)?;
        answer.map(|boxed| *boxed).ok_or_else(|| io::Error::other("no answer").into())
    }

    fn run<B>(
        &mut self,
        command: Command,
        dev_id: u32,
        buffer: Option<Box<B>>,
        data: u64,
    ) -> Result<Option<Box<B>>, ControlError>
    where
        B: FromBytes + IntoBytes + Immutable + KnownLayout,
    {
        let seconds = self.timeout.as_secs();
        let timed_out = |command| ControlError::TimedOut { command, seconds };
        if let Some(stuck) = self.stuck {
            return Err(timed_out(stuck));
        }
        // Raw from here to the completion: the kernel may write to it at any moment.
        let buffer = buffer.map(Box::into_raw);
        let header = CtrlCmd {
            dev_id,
            queue_id: abi::NO_QUEUE,
            len: if buffer.is_some() { size_of::<B>() as u16 } else { 0 },
            addr: buffer.map_or(0, |at| at as usize as u64),
            data,
            ..CtrlCmd::default()
        };
        let mut area = [0u8; 80];
        area[..size_of::<CtrlCmd>()].copy_from_slice(header.as_bytes());
        let entry = opcode::UringCmd80::new(types::Fd(self.file.as_raw_fd()), command.number)
            .cmd(area)
            .build();
        // ASYNC: on a kernel thread from the start, whatever this kernel would do inline.
        let entry = entry.flags(squeue::Flags::ASYNC);
        // SAFETY: the descriptor is open for as long as `self`; the buffer is a live allocation of
        // the stated length that is freed only after the completion, and leaked without one.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        let result = match pushed {
            Ok(()) => self.result(),
            Err(_) => Err(io::Error::other("submission queue full")),
        };
        let result = match result {
            Ok(result) => result,
            Err(e) => {
                self.stuck = Some(command.name);
                let late = e.kind() == io::ErrorKind::TimedOut;
                return Err(if late { timed_out(command.name) } else { e.into() });
            }
        };
        // SAFETY: from `Box::into_raw` above, and the kernel is done with it. Any bytes are a valid
        // `B` (FromBytes).
        let buffer = buffer.map(|at| unsafe { Box::from_raw(at) });
        match result {
            0.. => Ok(buffer),
            _ if result == -libc::ENODEV => Err(ControlError::NoDevice { dev_id }),
            _ => Err(ControlError::Refused {
                command: command.name,
                dev_id,
                source: io::Error::from_raw_os_error(result.saturating_neg()),
            }),
        }
    }

    /// Submits and waits for the one completion.
    fn result(&mut self) -> io::Result<i32> {
        let deadline = Instant::now() + self.timeout;
        loop {
            if let Some(done) = self.ring.completion().next() {
                return Ok(done.result());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let limit = types::Timespec::from(left);
            let args = types::SubmitArgs::new().timespec(&limit);
            match self.ring.submitter().submit_with_args(1, &args) {
                Ok(_) => {}
                Err(e) if matches!(e.raw_os_error(), Some(libc::ETIME | libc::EINTR)) => {}
                Err(e) => return Err(e),
            }
        }
    }
}

fn describe(info: &DevInfo) -> DeviceInfo {
    DeviceInfo {
        dev_id: info.dev_id,
        queues: info.nr_hw_queues,
        queue_depth: info.queue_depth,
        max_io_bytes: info.max_io_buf_bytes,
        features: Features::from_bits(info.flags),
        identity: info.ublksrv_flags,
        state: match info.state {
            abi::STATE_DEAD => DeviceState::Dead,
            abi::STATE_LIVE => DeviceState::Live,
            abi::STATE_QUIESCED => DeviceState::Quiesced,
            abi::STATE_FAIL_IO => DeviceState::Failing,
            other => DeviceState::Unknown(other),
        },
        server_pid: info.ublksrv_pid,
    }
}
