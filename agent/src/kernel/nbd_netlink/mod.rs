//! The kernel's NBD client, configured over generic netlink (family `nbd`,
//! `include/uapi/linux/nbd-netlink.h`). For kernels without ublk, and for attaching an export.
//!
//! The transmission phase is spoken over socket pairs: the kernel gets one end of each, and
//! [`NbdControl::connect`] and [`NbdControl::reconnect`] return the others, to be served. When the
//! server dies, the kernel keeps the requests for `dead_connection_timeout`; whoever reconnects in
//! time gets them again, without an I/O error above. A request reissued so is a new request: its
//! bytes may have changed.

mod codec;

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    self, AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, sockopt,
};

use codec::{Writer, messages};

/// The netlink socket.
#[derive(Debug)]
pub struct NbdControl {
    socket: OwnedFd,
    family: u16,
    sequence: u32,
}

/// Settings of a device. Times are whole seconds, at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceSettings {
    /// Size of the disk.
    pub size_bytes: u64,
    /// Logical block size, a power of two from 512 to the page size.
    pub block_bytes: u32,
    /// What the server can do: the transmission flags of the NBD protocol (`NBD_FLAG_...`).
    pub transmission_flags: u16,
    /// When the kernel gives up on an answer. Requests that a dead server had taken are sent again
    /// only then (not at the reconnect), so this is how long they stall after a crash; but a live
    /// server that takes longer loses the connection. Well above what the disk ever takes, such as
    /// 10 s. Without it the kernel takes 30 s.
    pub request_timeout: Duration,
    /// How long the kernel keeps requests when no connection is left.
    pub dead_connection_timeout: Duration,
    /// Name by which a later process recognises the device (Linux 5.14, in
    /// `/sys/block/nbdN/backend`); a reconnect must give the same.
    pub identifier: Option<String>,
}

/// A device and whether it is configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceStatus {
    /// The N of `/dev/nbdN`.
    pub index: u32,
    /// It has a configuration; its connections may be dead all the same.
    pub connected: bool,
}

/// Why a request failed. Each is a sentence that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// No such family.
    #[error(
        "the kernel has no NBD client: load it with `modprobe nbd` (some distributions keep it in \
         an extra modules package)"
    )]
    NoDriver,
    /// Not allowed.
    #[error("not allowed to configure NBD devices: that needs root (CAP_SYS_ADMIN)")]
    Forbidden,
    /// The wanted index is in use.
    #[error("/dev/nbd{0} is in use by another server; disconnect it first or choose another")]
    InUse(u32),
    /// No connection was taken.
    #[error(
        "/dev/nbd{index} takes no new connection: its old one is still open; stop the process that \
         serves it (waited {seconds} s)"
    )]
    StillConnected {
        /// Its index.
        index: u32,
        /// How long it was tried.
        seconds: u64,
    },
    /// The kernel refused.
    #[error("the kernel refused to {what} the NBD device: {source} (see its log, dmesg)")]
    Refused {
        /// What was asked, as a verb.
        what: &'static str,
        /// Its answer.
        source: io::Error,
    },
    /// The netlink socket failed.
    #[error("netlink: {0}")]
    System(#[from] io::Error),
    /// A setting is out of range.
    #[error("NBD device settings: {0}")]
    BadSettings(&'static str),
}

// The controller family, which knows the numbers of the others (`linux/genetlink.h`).
const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_VERSION: u8 = 2;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

const NBD_VERSION: u8 = 1;
const CMD_CONNECT: u8 = 1;
const CMD_DISCONNECT: u8 = 2;
const CMD_RECONFIGURE: u8 = 3;
const CMD_STATUS: u8 = 5;

const ATTR_INDEX: u16 = 1;
const ATTR_SIZE_BYTES: u16 = 2;
const ATTR_BLOCK_SIZE_BYTES: u16 = 3;
const ATTR_TIMEOUT: u16 = 4;
const ATTR_SERVER_FLAGS: u16 = 5;
const ATTR_CLIENT_FLAGS: u16 = 6;
const ATTR_SOCKETS: u16 = 7;
const ATTR_DEAD_CONN_TIMEOUT: u16 = 8;
const ATTR_DEVICE_LIST: u16 = 9;
const ATTR_BACKEND_IDENTIFIER: u16 = 10;
const SOCK_ITEM: u16 = 1;
const SOCK_FD: u16 = 1;
const DEVICE_INDEX: u16 = 1;
const DEVICE_CONNECTED: u16 = 2;

/// Neither destroy the device on disconnect nor disconnect it when its last opener closes it.
const CLIENT_FLAGS: u64 = 0;
/// The kernel answers from its own memory; this is only a bound.
const ANSWER_SECONDS: i64 = 30;
const IDENTIFIER_MAX: usize = 255;

impl NbdControl {
    /// Opens a netlink socket and finds the family.
    ///
    /// # Errors
    /// No NBD client in the kernel.
    pub fn open() -> Result<Self, NbdError> {
        let os = |e: nix::Error| io::Error::from(e);
        let socket = socket::socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkGeneric,
        )
        .map_err(os)?;
        socket::bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0)).map_err(os)?;
        let limit = nix::sys::time::TimeVal::new(ANSWER_SECONDS, 0);
        socket::setsockopt(&socket, sockopt::ReceiveTimeout, &limit).map_err(os)?;
        let mut control = Self { socket, family: GENL_ID_CTRL, sequence: 0 };
        let mut request = control.request(CTRL_CMD_GETFAMILY, CTRL_VERSION);
        request.string(CTRL_ATTR_FAMILY_NAME, "nbd");
        let mut family = None;
        control
            .exchange(request, "find", |attributes| {
                family = attributes.find(CTRL_ATTR_FAMILY_ID).and_then(|a| a.u16());
            })
            .map_err(|e| match e {
                NbdError::Refused { source, .. } if is(&source, libc::ENOENT) => NbdError::NoDriver,
                other => other,
            })?;
        control.family = family.ok_or(NbdError::NoDriver)?;
        Ok(control)
    }

    /// Configures a device, `index` or any that is free, with `connections` connections (more than
    /// one only if the server promises `NBD_FLAG_CAN_MULTI_CONN`). Returns its index and the ends to
    /// serve.
    ///
    /// # Errors
    /// In use, not allowed, or settings the kernel refuses.
    pub fn connect(
        &mut self,
        index: Option<u32>,
        settings: &DeviceSettings,
        connections: usize,
    ) -> Result<(u32, Vec<UnixStream>), NbdError> {
        let (ours, theirs) = pairs(connections)?;
        let mut request = self.request(CMD_CONNECT, NBD_VERSION);
        if let Some(index) = index {
            request.u32(ATTR_INDEX, index);
        }
        encode(&mut request, settings, &theirs)?;
        let mut connected = None;
        self.exchange(request, "connect", |attributes| {
            connected = attributes.find(ATTR_INDEX).and_then(|a| a.u32());
        })
        .map_err(|e| match (e, index) {
            (NbdError::Refused { source, .. }, Some(index)) if is(&source, libc::EBUSY) => {
                NbdError::InUse(index)
            }
            (e, _) => e,
        })?;
        let connected = connected.or(index);
        let index = connected.ok_or_else(|| io::Error::other("no index in the kernel's answer"))?;
        Ok((index, ours))
    }

    /// Gives a configured device fresh connections in place of dead ones, and `settings` as they
    /// are now. The kernel quietly ignores a connection for which none has died yet, so this tries
    /// again until all are taken or `patience` has passed; it then serves with what was taken.
    ///
    /// # Errors
    /// Not configured (or its requests have timed out), another identifier, or nothing was taken.
    pub fn reconnect(
        &mut self,
        index: u32,
        settings: &DeviceSettings,
        connections: usize,
        patience: Duration,
    ) -> Result<Vec<UnixStream>, NbdError> {
        let deadline = Instant::now() + patience;
        let mut taken = Vec::new();
        loop {
            let (ours, theirs) = pairs(connections.saturating_sub(taken.len()))?;
            let mut request = self.request(CMD_RECONFIGURE, NBD_VERSION);
            request.u32(ATTR_INDEX, index);
            encode(&mut request, settings, &theirs)?;
            self.exchange(request, "reconnect", |_| {})?;
            // With our copy closed, an end that the kernel did not keep has hung up.
            drop(theirs);
            for stream in ours {
                if !hung_up(&stream)? {
                    taken.push(stream);
                }
            }
            if taken.len() >= connections {
                return Ok(taken);
            }
            if Instant::now() >= deadline {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        match taken.is_empty() {
            true => Err(NbdError::StillConnected { index, seconds: patience.as_secs() }),
            false => Ok(taken),
        }
    }

    /// Ends a device: its waiting requests fail, and the served ends get a disconnect request.
    ///
    /// # Errors
    /// Not allowed, or no such device.
    pub fn disconnect(&mut self, index: u32) -> Result<(), NbdError> {
        let mut request = self.request(CMD_DISCONNECT, NBD_VERSION);
        request.u32(ATTR_INDEX, index);
        self.exchange(request, "disconnect", |_| {})
    }

    /// All devices, or one.
    ///
    /// # Errors
    /// The netlink socket failed.
    pub fn status(&mut self, index: Option<u32>) -> Result<Vec<DeviceStatus>, NbdError> {
        let mut request = self.request(CMD_STATUS, NBD_VERSION);
        if let Some(index) = index {
            request.u32(ATTR_INDEX, index);
        }
        let mut devices = Vec::new();
        self.exchange(request, "list", |attributes| {
            let list = attributes.find(ATTR_DEVICE_LIST).map(|list| list.nested());
            for item in list.into_iter().flatten() {
                let found = item.nested();
                if let Some(index) = found.clone().find(DEVICE_INDEX).and_then(|a| a.u32()) {
                    let connected = found.find(DEVICE_CONNECTED).and_then(|a| a.u8()) == Some(1);
                    devices.push(DeviceStatus { index, connected });
                }
            }
        })?;
        Ok(devices)
    }

    /// The configured device that was given this identifier.
    ///
    /// # Errors
    /// The netlink socket failed.
    pub fn find(&mut self, identifier: &str) -> Result<Option<u32>, NbdError> {
        let devices = self.status(None)?;
        let named = |index: u32| self.identifier(index).is_some_and(|found| found == identifier);
        Ok(devices.iter().find(|d| d.connected && named(d.index)).map(|d| d.index))
    }

    /// The identifier that a device was given. None if it was given none, or the kernel keeps none.
    pub fn identifier(&self, index: u32) -> Option<String> {
        let text = std::fs::read_to_string(format!("/sys/block/nbd{index}/backend")).ok()?;
        Some(text.trim_end().to_owned())
    }

    /// The size that a device shows.
    ///
    /// # Errors
    /// There is no such device.
    pub fn sectors(&self, index: u32) -> io::Result<u64> {
        let text = std::fs::read_to_string(format!("/sys/block/nbd{index}/size"))?;
        text.trim_end().parse().map_err(io::Error::other)
    }

    fn request(&mut self, command: u8, version: u8) -> Writer {
        self.sequence = self.sequence.wrapping_add(1);
        Writer::request(self.family, command, version, self.sequence)
    }

    /// Sends a request and reads answers until its acknowledgement.
    fn exchange(
        &mut self,
        request: Writer,
        what: &'static str,
        mut answer: impl FnMut(codec::Attributes<'_>),
    ) -> Result<(), NbdError> {
        let os = |e: nix::Error| io::Error::from(e);
        let fd = self.socket.as_raw_fd();
        socket::send(fd, &request.finish(), MsgFlags::empty()).map_err(os)?;
        let mut datagram = vec![0u8; 64 << 10];
        loop {
            let len = match socket::recv(fd, &mut datagram, MsgFlags::empty()) {
                Err(nix::Error::EINTR) => continue,
                other => other.map_err(os)?,
            };
            for message in messages(datagram.get(..len).unwrap_or_default()) {
                if message.sequence != self.sequence {
                    continue; // the rest of an earlier exchange that failed half-way
                }
                match message.error() {
                    None => answer(message.attributes()),
                    Some(0) => return Ok(()),
                    Some(libc::EPERM) => return Err(NbdError::Forbidden),
                    Some(number) => {
                        let source = io::Error::from_raw_os_error(number);
                        return Err(NbdError::Refused { what, source });
                    }
                }
            }
        }
    }
}

fn encode(
    request: &mut Writer,
    settings: &DeviceSettings,
    sockets: &[UnixStream],
) -> Result<(), NbdError> {
    let block = settings.block_bytes;
    if !block.is_power_of_two() || !(512..=4096).contains(&block) {
        return Err(NbdError::BadSettings("the block size must be a power of two, 512 to 4096"));
    }
    if settings.size_bytes == 0 || !settings.size_bytes.is_multiple_of(u64::from(block)) {
        return Err(NbdError::BadSettings(
            "the size must be a non-zero multiple of the block size",
        ));
    }
    let times = [settings.request_timeout, settings.dead_connection_timeout];
    if times.iter().any(|time| time.as_secs() == 0) {
        return Err(NbdError::BadSettings("timeouts must be a second or more"));
    }
    request.u64(ATTR_SIZE_BYTES, settings.size_bytes);
    request.u64(ATTR_BLOCK_SIZE_BYTES, u64::from(block));
    request.u64(ATTR_SERVER_FLAGS, u64::from(settings.transmission_flags));
    request.u64(ATTR_CLIENT_FLAGS, CLIENT_FLAGS);
    request.u64(ATTR_TIMEOUT, settings.request_timeout.as_secs());
    request.u64(ATTR_DEAD_CONN_TIMEOUT, settings.dead_connection_timeout.as_secs());
    if let Some(identifier) = &settings.identifier {
        if identifier.is_empty() || identifier.len() > IDENTIFIER_MAX || identifier.contains('\0') {
            return Err(NbdError::BadSettings("an identifier must have 1 to 255 bytes, none zero"));
        }
        request.string(ATTR_BACKEND_IDENTIFIER, identifier);
    }
    request.nested(ATTR_SOCKETS, |list| {
        for socket in sockets {
            let fd = socket.as_raw_fd() as u32; // never negative for an open descriptor
            list.nested(SOCK_ITEM, |item| item.u32(SOCK_FD, fd));
        }
    });
    Ok(())
}

/// Our ends and the kernel's.
fn pairs(count: usize) -> io::Result<(Vec<UnixStream>, Vec<UnixStream>)> {
    (0..count)
        .map(|_| UnixStream::pair())
        .collect::<io::Result<Vec<_>>>()
        .map(|all| all.into_iter().unzip())
}

fn hung_up(stream: &UnixStream) -> io::Result<bool> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut watched = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
    poll(&mut watched, PollTimeout::ZERO)?;
    Ok(watched[0].revents().is_some_and(|seen| seen.contains(PollFlags::POLLHUP)))
}

fn is(error: &io::Error, number: i32) -> bool {
    error.raw_os_error() == Some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> DeviceSettings {
        DeviceSettings {
            size_bytes: 1 << 30,
            block_bytes: 4096,
            transmission_flags: 0x0d,
            request_timeout: Duration::from_secs(60),
            dead_connection_timeout: Duration::from_secs(3600),
            identifier: Some("db/data".into()),
        }
    }

    #[test]
    fn settings_encode_as_the_header_lays_them_out() {
        let (ours, theirs) = pairs(1).unwrap();
        let fd = theirs[0].as_raw_fd() as u8;
        let mut request = Writer::request(0x1c, CMD_CONNECT, NBD_VERSION, 1);
        encode(&mut request, &settings(), &theirs).unwrap();
        let golden = [
            12, 0, 2, 0, 0, 0, 0, 0x40, 0, 0, 0, 0, // size
            12, 0, 3, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, // block size
            12, 0, 5, 0, 0x0d, 0, 0, 0, 0, 0, 0, 0, // server flags
            12, 0, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0, // client flags
            12, 0, 4, 0, 60, 0, 0, 0, 0, 0, 0, 0, // request timeout
            12, 0, 8, 0, 0x10, 0x0e, 0, 0, 0, 0, 0, 0, // dead connection timeout
            12, 0, 10, 0, b'd', b'b', b'/', b'd', b'a', b't', b'a', 0, // identifier
            16, 0, 7, 0x80, 12, 0, 1, 0x80, 8, 0, 1, 0, fd, 0, 0, 0, // socket
        ];
        assert_eq!(&request.finish()[20..], golden);
        drop(ours);
    }

    #[test]
    fn settings_the_kernel_would_misread_are_refused() {
        for bad in [
            DeviceSettings { block_bytes: 0, ..settings() },
            DeviceSettings { block_bytes: 8192, ..settings() },
            DeviceSettings { size_bytes: 0, ..settings() },
            DeviceSettings { size_bytes: 4097, ..settings() },
            DeviceSettings { request_timeout: Duration::from_millis(999), ..settings() },
            DeviceSettings { dead_connection_timeout: Duration::ZERO, ..settings() },
            DeviceSettings { identifier: Some(String::new()), ..settings() },
            DeviceSettings { identifier: Some("x".repeat(256)), ..settings() },
        ] {
            let mut request = Writer::request(0x1c, CMD_CONNECT, NBD_VERSION, 1);
            let refused = encode(&mut request, &bad, &[]);
            assert!(matches!(refused, Err(NbdError::BadSettings(_))), "{bad:?}");
        }
    }

    #[test]
    fn an_end_that_was_not_taken_is_seen_to_hang_up() {
        let (ours, theirs) = pairs(2).unwrap();
        assert!(!hung_up(&ours[0]).unwrap());
        drop(theirs);
        assert!(hung_up(&ours[0]).unwrap());
    }
}
