//! Unix and TCP listeners, bound here or handed over by the service manager.

use std::fs::Permissions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrLike, SockaddrStorage, UnixAddr, bind,
    listen, setsockopt, socket, sockopt,
};
use nix::sys::stat::{Mode, fchmod};
use tokio::net::{TcpListener, TcpStream, ToSocketAddrs, UnixListener, UnixStream};

use crate::export::Origin;
use crate::tls::Tls;

/// First descriptor of socket activation.
const LISTEN_FDS_START: RawFd = 3;
/// Keep-alive on TCP: first probe, distance of probes, number of probes, all unanswered time.
const KEEPALIVE_IDLE_S: u32 = 30;
const KEEPALIVE_INTERVAL_S: u32 = 10;
const KEEPALIVE_PROBES: u32 = 6;
const USER_TIMEOUT_MS: u32 = 90_000;

/// A place where clients connect.
pub struct Listener {
    socket: Socket,
    tls: Tls,
    plain_tcp_allowed: bool,
    /// Removed with the listener, unless the service manager owns it.
    _path: Option<RemovedOnDrop>,
}

struct RemovedOnDrop(PathBuf);

impl Drop for RemovedOnDrop {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

enum Socket {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// A connection, with where it came from.
pub(super) enum Accepted {
    Unix(UnixStream, Origin),
    Tcp(TcpStream, Origin),
}

impl Listener {
    /// Listens on a Unix socket with these permissions (such as `0o600`), without TLS unless
    /// [`with_tls`](Self::with_tls) follows. A dead socket in the way is removed, a live one is an
    /// error.
    pub async fn unix(path: impl AsRef<Path>, mode: u32) -> io::Result<Self> {
        let path = path.as_ref();
        remove_dead_socket(path).await?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        // Before it has a name, so that there is no moment with wider permissions.
        fchmod(&fd, Mode::from_bits_truncate(mode))?;
        bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        let removed = RemovedOnDrop(path.to_owned());
        std::fs::set_permissions(path, Permissions::from_mode(mode))?; // what the umask took
        listen(&fd, Backlog::MAXCONN)?;
        Ok(Self { _path: Some(removed), ..Self::from_fd(fd)? })
    }

    /// Listens on TCP. [`with_tls`](Self::with_tls) with [`Tls::Required`] must follow, or
    /// [`allow_plain_tcp`](Self::allow_plain_tcp).
    pub async fn tcp(address: impl ToSocketAddrs) -> io::Result<Self> {
        Ok(Self::from_socket(Socket::Tcp(TcpListener::bind(address).await?)))
    }

    /// The sockets a service manager passed (`LISTEN_FDS`), once in a process; empty without any.
    pub fn activated() -> io::Result<Vec<Self>> {
        static TAKEN: AtomicBool = AtomicBool::new(false);
        let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
        let ours = number("LISTEN_PID") == Some(std::process::id());
        let count = number("LISTEN_FDS").filter(|_| ours).unwrap_or(0);
        if count == 0 || TAKEN.swap(true, Ordering::SeqCst) {
            return Ok(Vec::new());
        }
        let last = LISTEN_FDS_START + i32::try_from(count).unwrap_or(0);
        (LISTEN_FDS_START..last)
            // SAFETY: the service manager passed these descriptors to this process, and they are
            // taken once in its life.
            .map(|raw| Self::from_fd(unsafe { OwnedFd::from_raw_fd(raw) }))
            .collect()
    }

    /// A listener over a listening socket of either kind.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
        fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let address: SockaddrStorage = nix::sys::socket::getsockname(fd.as_raw_fd())?;
        let socket = match address.family() {
            Some(AddressFamily::Unix) => Socket::Unix(UnixListener::from_std(fd.into())?),
            Some(AddressFamily::Inet | AddressFamily::Inet6) => {
                Socket::Tcp(TcpListener::from_std(fd.into())?)
            }
            _ => return Err(invalid("the socket is neither a Unix nor a TCP socket")),
        };
        Ok(Self::from_socket(socket))
    }

    /// Sets whether its connections are encrypted.
    #[must_use]
    pub fn with_tls(self, tls: Tls) -> Self {
        Self { tls, ..self }
    }

    /// Lets TCP go without required TLS: for tests and networks that are encrypted otherwise.
    #[must_use]
    pub fn allow_plain_tcp(self) -> Self {
        Self { plain_tcp_allowed: true, ..self }
    }

    /// The address of a TCP listener.
    pub fn tcp_address(&self) -> Option<std::net::SocketAddr> {
        match &self.socket {
            Socket::Tcp(socket) => socket.local_addr().ok(),
            Socket::Unix(_) => None,
        }
    }

    fn from_socket(socket: Socket) -> Self {
        Self { socket, tls: Tls::Off, plain_tcp_allowed: false, _path: None }
    }

    pub(super) fn tls(&self) -> &Tls {
        &self.tls
    }

    pub(super) fn check_policy(&self) -> io::Result<()> {
        let plain = matches!(self.socket, Socket::Tcp(_)) && !matches!(self.tls, Tls::Required(_));
        if plain && !self.plain_tcp_allowed {
            return Err(invalid("TLS is required on TCP: give the listener a certificate"));
        }
        Ok(())
    }

    /// The next connection. What goes wrong with one is logged and the next is waited for.
    pub(super) async fn accept(&self) -> Accepted {
        loop {
            let accepted = match &self.socket {
                Socket::Unix(socket) => socket.accept().await.and_then(|(stream, _)| {
                    let peer = stream.peer_cred()?;
                    Ok(Accepted::Unix(stream, Origin::Unix { uid: peer.uid(), pid: peer.pid() }))
                }),
                Socket::Tcp(socket) => socket.accept().await.and_then(|(stream, address)| {
                    prepare_tcp(&stream)?;
                    Ok(Accepted::Tcp(stream, Origin::Tcp(address)))
                }),
            };
            match accepted {
                Ok(accepted) => return accepted,
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    // Out of descriptors, most likely: do not spin until some are free.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

impl Accepted {
    pub(super) fn origin(&self) -> Origin {
        match self {
            Self::Unix(_, origin) | Self::Tcp(_, origin) => *origin,
        }
    }
}

/// Small replies at once, and half-open connections noticed.
fn prepare_tcp(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE_S)?;
    setsockopt(stream, sockopt::TcpKeepInterval, &KEEPALIVE_INTERVAL_S)?;
    setsockopt(stream, sockopt::TcpKeepCount, &KEEPALIVE_PROBES)?;
    setsockopt(stream, sockopt::TcpUserTimeout, &USER_TIMEOUT_MS)?;
    Ok(())
}

async fn remove_dead_socket(path: &Path) -> io::Result<()> {
    let Ok(metadata) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if !metadata.file_type().is_socket() {
        return Err(invalid(&format!("{} exists and is no socket", path.display())));
    }
    match UnixStream::connect(path).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)
        }
        Ok(_) => Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            format!("another server listens on {}", path.display()),
        )),
        Err(error) => Err(error),
    }
}

fn invalid(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}
