//! The link's sockets.

use std::{
    cell::OnceCell,
    future::Future,
    io::{self, IoSlice},
    net::{Shutdown, SocketAddr, ToSocketAddrs},
    os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
    pin::Pin,
    rc::{Rc, Weak},
    time::Duration,
};

use nix::sys::socket::{MsgFlags, sendmsg, setsockopt, sockopt};
use tokio::io::{Interest, unix::AsyncFd};
use tokio_uring::net::{TcpListener, TcpStream, UnixStream};

/// How long a connection may be silent before the kernel asks the other end whether it lives.
const KEEPALIVE_IDLE_S: u32 = 10;
/// The pause between such questions.
const KEEPALIVE_INTERVAL_S: u32 = 5;

/// A stream socket: TCP, or a Unix one between two parts of one machine. Dropping it shuts it down,
/// which ends its pending operations.
pub struct Stream {
    socket: Rc<Socket>,
    /// Tells when there is room to write, once that had to be waited for.
    room: OnceCell<AsyncFd<OwnedFd>>,
}

enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn new(socket: Socket) -> Stream {
        Stream { socket: Rc::new(socket), room: OnceCell::new() }
    }

    /// Connects to `address` (`host:port`), trying each address of the host in turn, and tunes the
    /// connection as [`tune`](Self::tune) does. `timeout` is for each of them.
    ///
    /// # Errors
    /// The last address's error, or that of finding any.
    pub async fn connect(address: &str, timeout: Duration) -> io::Result<Stream> {
        // On a thread of its own: looking up a name blocks, and a connect submitted to the ring
        // could not be given up.
        let wanted = address.to_owned();
        let connect = move || {
            let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
            for address in wanted.to_socket_addrs()? {
                match std::net::TcpStream::connect_timeout(&address, timeout) {
                    Ok(stream) => return Ok(stream),
                    Err(error) => last = error,
                }
            }
            Err(last)
        };
        let stream = tokio::task::spawn_blocking(connect).await.map_err(io::Error::other)??;
        Ok(Stream::from_tcp(stream))
    }

    /// A connected socket. It must be a blocking one, as sockets are when they are made.
    pub fn from_tcp(stream: std::net::TcpStream) -> Stream {
        Stream::new(Socket::Tcp(TcpStream::from_std(stream)))
    }

    /// A connected socket. It must be a blocking one, as sockets are when they are made.
    pub fn from_unix(stream: std::os::unix::net::UnixStream) -> Stream {
        Stream::new(Socket::Unix(UnixStream::from_std(stream)))
    }

    /// Two ends that are connected to each other.
    ///
    /// # Errors
    /// Those of socketpair(2).
    pub fn pair() -> io::Result<(Stream, Stream)> {
        let (one, other) = std::os::unix::net::UnixStream::pair()?;
        Ok((Stream::from_unix(one), Stream::from_unix(other)))
    }

    /// Makes a TCP connection send at once, ask a silent peer whether it lives, and give up when
    /// nothing of what was sent is taken for `stall`. Does nothing to a Unix socket.
    ///
    /// # Errors
    /// Those of setsockopt(2).
    pub fn tune(&self, stall: Duration) -> io::Result<()> {
        let Socket::Tcp(stream) = &*self.socket else { return Ok(()) };
        stream.set_nodelay(true)?;
        // SAFETY: the descriptor is open as long as `stream`, which outlives this function.
        let fd = unsafe { BorrowedFd::borrow_raw(stream.as_raw_fd()) };
        let stall_ms = u32::try_from(stall.as_millis()).unwrap_or(u32::MAX);
        setsockopt(&fd, sockopt::KeepAlive, &true)?;
        setsockopt(&fd, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE_S)?;
        setsockopt(&fd, sockopt::TcpKeepInterval, &KEEPALIVE_INTERVAL_S)?;
        setsockopt(&fd, sockopt::TcpUserTimeout, &stall_ms)?;
        Ok(())
    }

    /// Reads into the whole capacity of `buffer`, whose old content is dropped. Zero bytes mean the
    /// end. The future may outlive `self`, and ends with it.
    pub fn read(
        &self,
        mut buffer: Vec<u8>,
    ) -> impl Future<Output = (io::Result<usize>, Vec<u8>)> + use<> {
        let socket = self.socket.clone();
        buffer.clear();
        async move {
            match &*socket {
                Socket::Tcp(stream) => stream.read(buffer).await,
                Socket::Unix(stream) => stream.read(buffer).await,
            }
        }
    }

    /// Gives the socket as much of `parts` as it takes at once, and says how much.
    ///
    /// # Errors
    /// [`WouldBlock`](io::ErrorKind::WouldBlock) when it takes nothing: wait with [`Self::writable`]. Else those of
    /// sendmsg(2).
    pub fn write_now(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        Ok(sendmsg::<()>(self.socket.as_raw_fd(), parts, &[], flags, None)?)
    }

    /// Waits until the socket may take more, which is to be tried then. The future may be dropped.
    ///
    /// # Errors
    /// There is no descriptor left to wait with, or the kernel has no room to watch it.
    pub async fn writable(&self) -> io::Result<()> {
        let room = match self.room.get() {
            Some(room) => room,
            None => {
                // One of its own, since the socket's is closed by the ring, at a time that it chooses.
                // SAFETY: the descriptor is open as long as `self.socket`, which outlives the call.
                let fd = unsafe { BorrowedFd::borrow_raw(self.socket.as_raw_fd()) };
                let own = fd.try_clone_to_owned()?;
                // SAFETY: an owned descriptor is open until it is dropped, and nothing changes or takes it out.
                let waiting = unsafe { AsyncFd::register_with_interest(own, Interest::WRITABLE) }?;
                self.room.get_or_init(|| waiting)
            }
        };
        // Whoever waited tries again after this: what is known of the socket until now is used up.
        room.writable().await?.clear_ready();
        Ok(())
    }

    /// Shuts the connection down, which ends pending operations. What was written is still sent.
    pub fn shutdown(&self, how: Shutdown) {
        self.socket.shutdown(how);
    }

    /// What ends this connection from outside.
    pub fn closer(&self) -> StreamCloser {
        StreamCloser(Rc::downgrade(&self.socket))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.shutdown(Shutdown::Both);
    }
}

impl Socket {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Socket::Tcp(stream) => stream.as_raw_fd(),
            Socket::Unix(stream) => stream.as_raw_fd(),
        }
    }

    fn shutdown(&self, how: Shutdown) {
        // The only error is that the connection is gone, which is what was wanted.
        let _ = match self {
            Socket::Tcp(stream) => stream.shutdown(how),
            Socket::Unix(stream) => stream.shutdown(how),
        };
    }
}

/// Ends a connection from outside.
pub struct StreamCloser(Weak<Socket>);

impl StreamCloser {
    /// Shuts the connection down, if it is still there.
    pub fn close(&self) {
        if let Some(socket) = self.0.upgrade() {
            socket.shutdown(Shutdown::Both);
        }
    }
}

type Accepting = Pin<Box<dyn Future<Output = io::Result<(TcpStream, SocketAddr)>>>>;

/// A socket that takes connections. Dropping it ends a pending accept.
pub struct Listener {
    socket: Rc<TcpListener>,
    accepting: Option<Accepting>,
}

impl Listener {
    /// Listens on `address`; port 0 means any.
    ///
    /// # Errors
    /// Those of bind(2) and listen(2).
    pub fn bind(address: SocketAddr) -> io::Result<Listener> {
        Ok(Listener::from_std(std::net::TcpListener::bind(address)?))
    }

    /// A socket that listens already, such as one passed on by the service manager. It must be a
    /// blocking one.
    pub fn from_std(listener: std::net::TcpListener) -> Listener {
        Listener { socket: Rc::new(TcpListener::from_std(listener)), accepting: None }
    }

    /// Where it listens.
    ///
    /// # Errors
    /// Those of getsockname(2).
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// The next connection. The future may be dropped: no connection is lost.
    ///
    /// # Errors
    /// Those of accept(2). Most pass (no descriptor free): wait a moment and call again.
    pub async fn accept(&mut self) -> io::Result<(Stream, SocketAddr)> {
        let socket = self.socket.clone();
        let accepting =
            self.accepting.get_or_insert_with(|| Box::pin(async move { socket.accept().await }));
        let accepted = accepting.await;
        self.accepting = None;
        let (stream, address) = accepted?;
        Ok((Stream::new(Socket::Tcp(stream)), address))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // The only error is that the socket does not listen, and then nothing is pending.
        let _ =
            nix::sys::socket::shutdown(self.socket.as_raw_fd(), nix::sys::socket::Shutdown::Both);
    }
}
