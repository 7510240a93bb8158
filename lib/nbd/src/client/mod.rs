//! A small NBD client: many requests in flight through one cloneable handle.
//!
//! It is made for tests and demonstrations of the server; it speaks fixed newstyle, `GO`,
//! structured replies with `base:allocation`, and STARTTLS.

mod handshake;
mod session;

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;

use crate::export::{Error, ExportEntry, ExportInfo, Extent, Zeroing};
use crate::proto::command_flags::{DF, FAST_ZERO, FUA, NO_HOLE, REQ_ONE};
use crate::proto::options::ReplyType;
use crate::proto::transmission::Command;
use session::{Answer, Session};

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// TCP.
    Tcp(SocketAddr),
}

impl From<&Path> for Address {
    fn from(path: &Path) -> Self {
        Self::Unix(path.to_owned())
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self::Tcp(address)
    }
}

/// How to connect.
#[derive(Clone, Default)]
pub struct Options {
    /// Encrypt the connection and expect this server name; refuse to go on without.
    pub tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
    /// Do without structured replies, as the Linux kernel does.
    pub simple_replies_only: bool,
}

/// A failed connection attempt.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The connection broke, or was ended by the server.
    #[error("the connection to the server failed: {0}")]
    Io(#[from] io::Error),
    /// The server refused an option; the message is its own.
    #[error("the server refused: {message} ({kind:#x})")]
    Refused {
        /// Raw `NBD_REP_ERR_*` value.
        kind: u32,
        /// The server's sentence.
        message: String,
    },
    /// The server does not keep to the protocol.
    #[error("the server broke the protocol: {0}")]
    Protocol(String),
}

impl ConnectError {
    /// Whether the server refused with this kind of reply.
    pub fn is(&self, expected: ReplyType) -> bool {
        matches!(self, Self::Refused { kind, .. } if *kind == expected as u32)
    }
}

/// A connection to a server, encrypted or not.
pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// Connects, enters an export and hands the connection over as it is, for somebody else who speaks
/// the transmission phase: above all the Linux kernel, which wants
/// [`simple_replies_only`](Options::simple_replies_only).
pub async fn hand_over(
    address: impl Into<Address>,
    export: &str,
    options: &Options,
) -> Result<(ExportInfo, Box<dyn Stream>), ConnectError> {
    let mut stream = begin(connect(address.into()).await?, options).await?;
    let (info, _) = handshake::go(&mut stream, export, options).await?;
    Ok((info, stream))
}

/// A connection in the transmission phase. Clones share it; it ends with the last of them.
#[derive(Clone)]
pub struct Client {
    session: Arc<Session>,
    info: Arc<ExportInfo>,
}

impl Client {
    /// Connects and enters an export.
    pub async fn connect(
        address: impl Into<Address>,
        export: &str,
        options: &Options,
    ) -> Result<Self, ConnectError> {
        Self::over(connect(address.into()).await?, export, options).await
    }

    /// Enters an export over a connection on which nothing has been said yet.
    pub async fn over(
        stream: Box<dyn Stream>,
        export: &str,
        options: &Options,
    ) -> Result<Self, ConnectError> {
        let mut stream = begin(stream, options).await?;
        let (info, structured) = handshake::go(&mut stream, export, options).await?;
        Ok(Self { session: Arc::new(Session::start(stream, structured)), info: Arc::new(info) })
    }

    /// The server's list of exports.
    pub async fn list(
        address: impl Into<Address>,
        options: &Options,
    ) -> Result<Vec<ExportEntry>, ConnectError> {
        Self::list_over(connect(address.into()).await?, options).await
    }

    /// The same over a connection on which nothing has been said yet.
    pub async fn list_over(
        stream: Box<dyn Stream>,
        options: &Options,
    ) -> Result<Vec<ExportEntry>, ConnectError> {
        handshake::list(&mut begin(stream, options).await?).await
    }

    /// What the server says about an export, without entering it.
    pub async fn info_of(
        address: impl Into<Address>,
        export: &str,
        options: &Options,
    ) -> Result<ExportInfo, ConnectError> {
        let stream = connect(address.into()).await?;
        handshake::info(&mut begin(stream, options).await?, export).await
    }

    /// Size and abilities of the export.
    pub fn info(&self) -> &ExportInfo {
        &self.info
    }

    /// Reads a range.
    pub async fn read(&self, offset: u64, length: u32) -> Result<Bytes, Error> {
        self.read_with(0, offset, length).await
    }

    /// Reads a range with the "don't fragment" flag.
    pub async fn read_unfragmented(&self, offset: u64, length: u32) -> Result<Bytes, Error> {
        self.read_with(DF, offset, length).await
    }

    async fn read_with(&self, flags: u16, offset: u64, length: u32) -> Result<Bytes, Error> {
        match self.session.call(Command::Read, flags, offset, length, Bytes::new()).await? {
            Answer::Data(bytes) => Ok(bytes),
            _ => Err(session::lost("a read was answered without data")),
        }
    }

    /// Writes; with `fua` durably.
    pub async fn write(&self, offset: u64, data: Bytes, fua: bool) -> Result<(), Error> {
        let length = u32::try_from(data.len())
            .map_err(|_| Error::new(crate::Errno::Inval, "a write of 4 GiB or more"))?;
        self.plain(Command::Write, if fua { FUA } else { 0 }, offset, length, data).await
    }

    /// Writes zeros.
    pub async fn write_zeroes(&self, offset: u64, length: u32, how: Zeroing) -> Result<(), Error> {
        let flags = [(how.fua, FUA), (how.no_hole, NO_HOLE), (how.fast_only, FAST_ZERO)];
        let flags = flags.iter().filter(|(set, _)| *set).fold(0, |all, (_, flag)| all | flag);
        self.plain(Command::WriteZeroes, flags, offset, length, Bytes::new()).await
    }

    /// Discards a range.
    pub async fn trim(&self, offset: u64, length: u32) -> Result<(), Error> {
        self.plain(Command::Trim, 0, offset, length, Bytes::new()).await
    }

    /// Asks for a range to be cached.
    pub async fn cache(&self, offset: u64, length: u32) -> Result<(), Error> {
        self.plain(Command::Cache, 0, offset, length, Bytes::new()).await
    }

    /// Makes every answered write durable.
    pub async fn flush(&self) -> Result<(), Error> {
        self.plain(Command::Flush, 0, 0, 0, Bytes::new()).await
    }

    /// Allocation states from `offset` on; `one` asks for a single extent within the range.
    pub async fn block_status(
        &self,
        offset: u64,
        length: u32,
        one: bool,
    ) -> Result<Vec<Extent>, Error> {
        let flags = if one { REQ_ONE } else { 0 };
        match self.session.call(Command::BlockStatus, flags, offset, length, Bytes::new()).await? {
            Answer::Extents(extents) => Ok(extents),
            _ => Err(session::lost("block status was answered without extents")),
        }
    }

    /// Sends any request as it is; for tests of the server.
    pub async fn raw(
        &self,
        command: Command,
        flags: u16,
        offset: u64,
        length: u32,
        payload: Bytes,
    ) -> Result<(), Error> {
        self.session.call(command, flags, offset, length, payload).await.map(drop)
    }

    /// Leaves in order: after every request under way, on all clones, has been sent.
    pub async fn disconnect(self) {
        self.session.disconnect().await;
    }

    async fn plain(
        &self,
        command: Command,
        flags: u16,
        offset: u64,
        length: u32,
        payload: Bytes,
    ) -> Result<(), Error> {
        self.session.call(command, flags, offset, length, payload).await.map(drop)
    }
}

async fn connect(address: Address) -> Result<Box<dyn Stream>, ConnectError> {
    Ok(match address {
        Address::Unix(path) => Box::new(UnixStream::connect(path).await?),
        Address::Tcp(address) => {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            Box::new(stream)
        }
    })
}

/// Exchanges greetings and encrypts.
async fn begin(
    mut stream: Box<dyn Stream>,
    options: &Options,
) -> Result<Box<dyn Stream>, ConnectError> {
    handshake::greet(&mut stream).await?;
    if let Some((config, name)) = &options.tls {
        handshake::start_tls(&mut stream).await?;
        let connector = TlsConnector::from(Arc::clone(config));
        stream = Box::new(connector.connect(name.clone(), stream).await?);
    }
    Ok(stream)
}
