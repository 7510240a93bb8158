//! What a user of the library implements: [`Exports`] finds an export by name, [`Export`] serves it.

use std::fmt;
use std::future::Future;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use rustls_pki_types::CertificateDer;

use crate::buffer::Buffer;
use crate::proto::{Errno, options::ReplyType, transmission_flags as flag};

/// A boxed future.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Finds exports by name. Names are resolved each time they are asked for.
pub trait Exports: Send + Sync + 'static {
    /// The exports this client may see, for `NBD_OPT_LIST`.
    fn list<'a>(&'a self, client: &'a ClientInfo) -> BoxFuture<'a, Vec<ExportEntry>>;

    /// Opens an export; an empty name means the default export.
    ///
    /// With [`Purpose::Information`] the export is asked for its [`info`](Export::info) and closed
    /// at once: nothing should be pinned for it.
    fn open<'a>(
        &'a self,
        name: &'a str,
        purpose: Purpose,
        client: &'a ClientInfo,
    ) -> BoxFuture<'a, Result<Arc<dyn Export>, OpenError>>;
}

/// What an export is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// `NBD_OPT_INFO`: size and abilities only.
    Information,
    /// `NBD_OPT_GO` or `NBD_OPT_EXPORT_NAME`: to be read and written.
    Transmission,
}

/// A line of `NBD_OPT_LIST`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExportEntry {
    /// The name to open it by, at most 4096 bytes.
    pub name: String,
    /// A description for people; may be empty.
    pub description: String,
}

/// Who is asking.
#[derive(Clone, Debug, Default)]
pub struct ClientInfo {
    /// Where the connection came from.
    pub origin: Origin,
    /// Whether the connection is encrypted.
    pub tls: bool,
    /// Name in the client's verified certificate: its first DNS name, else its common name.
    pub peer_name: Option<String>,
    /// The client's verified certificate.
    pub certificate: Option<CertificateDer<'static>>,
}

/// Where a connection came from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Origin {
    /// A Unix socket; ids are those of the connecting process.
    Unix {
        /// User id.
        uid: u32,
        /// Process id, where the kernel tells it.
        pid: Option<i32>,
    },
    /// TCP.
    Tcp(SocketAddr),
    /// A stream the caller brought along.
    #[default]
    Other,
}

impl Origin {
    /// The network that a connection over TCP comes from, by which strangers are told apart: the
    /// address, of IPv6 the 64 bits that a site is given.
    pub fn network(self) -> Option<IpAddr> {
        let Self::Tcp(address) = self else { return None };
        Some(match address.ip().to_canonical() {
            IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64).into(),
            ip => ip,
        })
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix { uid, pid: Some(pid) } => write!(f, "unix (uid {uid}, pid {pid})"),
            Self::Unix { uid, pid: None } => write!(f, "unix (uid {uid})"),
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Other => f.write_str("a stream"),
        }
    }
}

/// Why an export cannot be opened. The message is a sentence for the person at the client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct OpenError {
    kind: ReplyType,
    message: String,
}

impl OpenError {
    /// There is no such export, or not now (`NBD_REP_ERR_UNKNOWN`).
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self { kind: ReplyType::ErrUnknown, message: message.into() }
    }

    /// This client may not have it (`NBD_REP_ERR_POLICY`).
    pub fn denied(message: impl Into<String>) -> Self {
        Self { kind: ReplyType::ErrPolicy, message: message.into() }
    }

    /// It is served over TLS only (`NBD_REP_ERR_TLS_REQD`).
    pub fn tls_required(message: impl Into<String>) -> Self {
        Self { kind: ReplyType::ErrTlsReqd, message: message.into() }
    }

    /// The option reply this becomes.
    pub fn reply_type(&self) -> ReplyType {
        self.kind
    }
}

/// One open disk.
///
/// Every method that returns a [`Reply`] is called in the order in which the requests arrived on
/// a connection, and the reply is polled once before the next request is looked at. So whatever
/// must follow arrival order (such as drawing a sequence) belongs in the method itself or before
/// the first await. Many replies are under way at once and may complete in any order.
///
/// A reply is always driven to its end, also when the client has gone. Replies are polled on the
/// connection's task: work that blocks or computes for long belongs on another thread.
///
/// Requests are within the export's size, aligned to its minimum block size, of nonzero length,
/// and use only features that [`info`](Self::info) offers.
pub trait Export: Send + Sync + 'static {
    /// Size and abilities; asked once per open, constant while it is open.
    fn info(&self) -> ExportInfo;

    /// An empty buffer of exactly `length` bytes for the payload of a write.
    fn buffer(&self, length: u32) -> Buffer {
        Buffer::with_capacity(length as usize)
    }

    /// Reads `length` bytes from `offset`: pieces in order that cover exactly that range.
    fn read(self: Arc<Self>, offset: u64, length: u32) -> Reply<Vec<Chunk>>;

    /// Writes `data` at `offset`; with `fua` it is durable before the reply.
    fn write(self: Arc<Self>, offset: u64, data: Buffer, fua: bool) -> Reply<()> {
        let _ = (offset, data, fua);
        Reply::error(Error::read_only())
    }

    /// Writes zeros.
    fn write_zeroes(self: Arc<Self>, offset: u64, length: u64, how: Zeroing) -> Reply<()> {
        let _ = (offset, length, how);
        Reply::error(Error::read_only())
    }

    /// A hint that the content is no longer needed; it may read as anything afterwards.
    fn trim(self: Arc<Self>, offset: u64, length: u64, fua: bool) -> Reply<()> {
        let _ = (offset, length, fua);
        Reply::error(Error::read_only())
    }

    /// Makes every write that has been answered durable, on whichever connection it came.
    fn flush(self: Arc<Self>) -> Reply<()> {
        Reply::ready(())
    }

    /// A hint that the range will be read soon.
    fn cache(self: Arc<Self>, offset: u64, length: u64) -> Reply<()> {
        let _ = (offset, length);
        Reply::ready(())
    }

    /// The state of the extents from `offset` on, in order; at least one. They may cover less than
    /// `length`, and the last may go beyond it. `one` says that only the first will be used.
    fn block_status(self: Arc<Self>, offset: u64, length: u64, one: bool) -> Reply<Vec<Extent>> {
        let _ = (offset, one);
        Reply::ready(vec![Extent { length, hole: false, zero: false }])
    }

    /// The end of one open, after its last reply; called exactly once per successful open.
    fn close(self: Arc<Self>) -> Reply<()> {
        Reply::ready(())
    }
}

/// How to write zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Zeroing {
    /// Durable before the reply.
    pub fua: bool,
    /// Leave no hole: later writes to the range must not run out of space.
    pub no_hole: bool,
    /// Fail with [`Errno::NotSup`] unless it is faster than writing the zeros.
    pub fast_only: bool,
}

/// A piece of a read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// Bytes.
    Data(Bytes),
    /// That many zero bytes, which need not be sent to a client that understands holes.
    Hole(u32),
}

/// A range with one allocation state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, nonzero.
    pub length: u64,
    /// Not allocated (`NBD_STATE_HOLE`).
    pub hole: bool,
    /// Known to read as zeros (`NBD_STATE_ZERO`).
    pub zero: bool,
}

/// Size and abilities of an export.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExportInfo {
    /// Size in bytes; a multiple of the minimum block size.
    pub size: u64,
    /// Block sizes that requests must keep to.
    pub block_sizes: BlockSizes,
    /// What may be asked of it.
    pub features: Features,
    /// Its full name where that differs from the one asked for (a resolved `@latest`).
    pub canonical_name: Option<String>,
    /// A description for people.
    pub description: Option<String>,
}

/// Block size constraints, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Alignment of every request; a power of two, at most 64 KiB.
    pub minimum: u32,
    /// Alignment that is efficient; a power of two, at least 512 and the minimum.
    pub preferred: u32,
    /// Longest payload of a read or write.
    pub maximum: u32,
}

impl Default for BlockSizes {
    fn default() -> Self {
        Self { minimum: 1, preferred: 4096, maximum: 32 << 20 }
    }
}

/// What an export can do. Only what is set is advertised, and only that is passed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// No writes of any kind.
    pub read_only: bool,
    /// [`Export::flush`].
    pub flush: bool,
    /// The `fua` argument.
    pub fua: bool,
    /// It is a spinning disk.
    pub rotational: bool,
    /// [`Export::trim`].
    pub trim: bool,
    /// [`Export::write_zeroes`].
    pub write_zeroes: bool,
    /// [`Zeroing::fast_only`].
    pub fast_zero: bool,
    /// [`Export::cache`].
    pub cache: bool,
    /// Every connection to this name sees the same disk, and a flush on one covers them all.
    pub multi_conn: bool,
}

impl Features {
    /// The transmission flags (`NBD_FLAG_...`); `DF` is offered with structured replies only.
    pub fn to_wire(self, structured: bool) -> u16 {
        let writable = !self.read_only;
        [
            (flag::READ_ONLY, self.read_only),
            (flag::SEND_FLUSH, self.flush),
            (flag::SEND_FUA, self.fua),
            (flag::ROTATIONAL, self.rotational),
            (flag::SEND_TRIM, self.trim && writable),
            (flag::SEND_WRITE_ZEROES, self.write_zeroes && writable),
            (flag::SEND_DF, structured),
            (flag::CAN_MULTI_CONN, self.multi_conn),
            (flag::SEND_CACHE, self.cache),
            (flag::SEND_FAST_ZERO, self.fast_zero && self.write_zeroes && writable),
        ]
        .into_iter()
        .filter(|(_, set)| *set)
        .fold(flag::HAS_FLAGS, |flags, (bit, _)| flags | bit)
    }

    /// The features behind transmission flags, as a client sees them.
    pub(crate) fn from_wire(flags: u16) -> Self {
        let has = |bit| flags & bit != 0;
        Self {
            read_only: has(flag::READ_ONLY),
            flush: has(flag::SEND_FLUSH),
            fua: has(flag::SEND_FUA),
            rotational: has(flag::ROTATIONAL),
            trim: has(flag::SEND_TRIM),
            write_zeroes: has(flag::SEND_WRITE_ZEROES),
            fast_zero: has(flag::SEND_FAST_ZERO),
            cache: has(flag::SEND_CACHE),
            multi_conn: has(flag::CAN_MULTI_CONN),
        }
    }
}

/// A failed request: an error number and a sentence, which clients with structured replies get.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message} ({errno:?})")]
pub struct Error {
    /// The number every client gets.
    pub errno: Errno,
    /// The sentence; may be empty.
    pub message: String,
}

impl Error {
    /// An error with its sentence.
    pub fn new(errno: Errno, message: impl Into<String>) -> Self {
        Self { errno, message: message.into() }
    }

    fn read_only() -> Self {
        Self::new(Errno::Perm, "this export is read-only")
    }
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        let errno = error.raw_os_error().map_or(Errno::Io, Errno::from_system);
        Self::new(errno, error.to_string())
    }
}

/// The outcome of a request: at hand, or a future.
pub struct Reply<T>(State<T>);

enum State<T> {
    Ready(Option<Result<T, Error>>),
    Future(BoxFuture<'static, Result<T, Error>>),
}

impl<T> Reply<T> {
    /// Success at hand; costs no allocation.
    pub fn ready(value: T) -> Self {
        Self(State::Ready(Some(Ok(value))))
    }

    /// Failure at hand.
    pub fn error(error: Error) -> Self {
        Self(State::Ready(Some(Err(error))))
    }

    /// An outcome at hand.
    pub fn result(result: Result<T, Error>) -> Self {
        Self(State::Ready(Some(result)))
    }

    /// An outcome that is still to come.
    pub fn future(future: impl Future<Output = Result<T, Error>> + Send + 'static) -> Self {
        Self(State::Future(Box::pin(future)))
    }
}

impl<T: Unpin> Future for Reply<T> {
    type Output = Result<T, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            State::Ready(result) => match result.take() {
                Some(result) => Poll::Ready(result),
                None => Poll::Pending, // polled again after its end
            },
            State::Future(future) => future.as_mut().poll(cx),
        }
    }
}
