//! The service manager's descriptor store: descriptors that outlive a process (sd_notify(3),
//! `FDSTORE=1`, with `FileDescriptorStoreMax=` in the unit). The capture ring is kept there.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, sendmsg, socket,
};

/// The manager that started us, if it listens.
#[derive(Clone, Debug)]
pub struct Store {
    address: UnixAddr,
}

impl Store {
    /// From `NOTIFY_SOCKET`; none without a service manager.
    ///
    /// # Errors
    /// The variable holds no socket address.
    pub fn from_environment() -> io::Result<Option<Self>> {
        std::env::var_os("NOTIFY_SOCKET").map(|path| Self::at(&path)).transpose()
    }

    /// At a socket: a path, or `@` and an abstract name.
    fn at(path: &OsString) -> io::Result<Self> {
        let address = match path.as_bytes() {
            [b'@', name @ ..] => UnixAddr::new_abstract(name)?,
            path => UnixAddr::new(path)?,
        };
        Ok(Self { address })
    }

    /// Keeps a copy of `fd` under `name` until it is removed or the unit's store is emptied. The same
    /// name may be stored more than once. The manager's log says so if its store is full or off.
    ///
    /// # Errors
    /// A bad name, or the manager cannot be reached.
    pub fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        check_name(name)?;
        self.send(&format!("FDSTORE=1\nFDNAME={name}\n"), &[fd.as_raw_fd()])
    }

    /// Drops all that is kept under `name`.
    ///
    /// # Errors
    /// A bad name, or the manager cannot be reached.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        check_name(name)?;
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}\n"), &[])
    }

    fn send(&self, message: &str, fds: &[i32]) -> io::Result<()> {
        let socket = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        let parts = [io::IoSlice::new(message.as_bytes())];
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights[..] };
        let flags = MsgFlags::MSG_NOSIGNAL;
        sendmsg(socket.as_raw_fd(), &parts, control, flags, Some(&self.address))?;
        Ok(())
    }
}

/// Takes over the descriptors the service manager passed to this process (stored ones and sockets
/// it activates), with their names. Yields them once; later calls and child processes get none.
///
/// # Errors
/// The environment's description of them is broken.
pub fn inherited() -> io::Result<Vec<(String, OwnedFd)>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::SeqCst) {
        return Ok(Vec::new());
    }
    let passed = sd_notify::listen_fds_with_names()?;
    // SAFETY: the service manager opened these for this process (`LISTEN_PID` was checked), and the
    // flag above makes us take each one once.
    Ok(passed.map(|(fd, name)| (name, unsafe { OwnedFd::from_raw_fd(fd) })).collect())
}

/// systemd's rule for descriptor names: up to 255 ASCII characters, no control characters, no colon.
fn check_name(name: &str) -> io::Result<()> {
    let good = |b: u8| b.is_ascii() && !b.is_ascii_control() && b != b':';
    if !name.is_empty() && name.len() <= 255 && name.bytes().all(good) {
        return Ok(());
    }
    let message = format!("{name:?} cannot name a stored descriptor");
    Err(io::Error::new(io::ErrorKind::InvalidInput, message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::memfd::Region;
    use nix::sys::socket::{ControlMessageOwned, recvmsg};
    use std::os::unix::net::UnixDatagram;

    /// What a manager gets: the message and the descriptor.
    fn receive(manager: &UnixDatagram) -> (String, Option<OwnedFd>) {
        let mut text = [0u8; 512];
        let mut space = nix::cmsg_space!([i32; 4]);
        let mut parts = [io::IoSliceMut::new(&mut text)];
        let fd = manager.as_raw_fd();
        let got = recvmsg::<()>(fd, &mut parts, Some(&mut space), MsgFlags::empty()).unwrap();
        let mut found = None;
        for control in got.cmsgs().unwrap() {
            if let ControlMessageOwned::ScmRights(fds) = control {
                // SAFETY: just received, ours alone.
                found = fds.first().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) });
            }
        }
        let len = got.bytes;
        (String::from_utf8_lossy(&text[..len]).into_owned(), found)
    }

    #[test]
    fn a_region_is_kept_and_adopted_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        let store = Store::at(&path.into_os_string()).unwrap();
        let region = Region::create("ring", 4096).unwrap();
        region.copy_in(10, b"slots").unwrap();
        store.keep("ring-db", region.fd().unwrap()).unwrap();
        let (message, fd) = receive(&manager);
        assert_eq!(message, "FDSTORE=1\nFDNAME=ring-db\n");
        drop(region);
        let again = Region::adopt(fd.unwrap(), Some(4096)).unwrap();
        let mut out = [0u8; 5];
        again.copy_out(10, &mut out).unwrap();
        assert_eq!(&out, b"slots");

        store.remove("ring-db").unwrap();
        let (message, fd) = receive(&manager);
        assert_eq!(message, "FDSTOREREMOVE=1\nFDNAME=ring-db\n");
        assert!(fd.is_none());
    }

    #[test]
    fn names_that_would_break_the_message_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(&dir.path().join("none").into_os_string()).unwrap();
        for bad in ["", "a:b", "a\nFDSTORE=1", "\u{e9}", &"x".repeat(256)] {
            assert_eq!(store.remove(bad).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
        let unreachable = store.remove("good").unwrap_err();
        assert_eq!(unreachable.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn without_a_manager_nothing_is_inherited() {
        assert!(std::env::var_os("LISTEN_PID").is_none(), "run this outside a socket unit");
        assert!(inherited().unwrap().is_empty());
    }
}
