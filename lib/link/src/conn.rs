//! TLS and messages on a socket.
//!
//! rustls does no I/O of its own: its state stands between a [`Sender`] and a [`Receiver`], the two
//! halves of a [`Connection`], which two tasks of one thread may use at the same time. Every wait
//! has a bound: a peer that is silent, that stops reading, or that is gone without a word ends the
//! connection with an error, never hangs it.

mod receiver;
mod sender;

use std::{
    cell::RefCell,
    io,
    net::Shutdown,
    rc::{Rc, Weak},
    sync::Arc,
    time::Duration,
};

use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection};
use tokio::time::timeout;

pub use self::{receiver::Receiver, sender::Sender};
use crate::{
    message::{DecodeError, Message, TooLong},
    pki::{self, NodeName, PkiError},
    seam::Stream,
};

/// How long to wait for what.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timeouts {
    /// For each address of the peer to answer.
    pub connect: Duration,
    /// For TLS to be agreed on: long, since a busy or emulated machine needs seconds of work for it.
    pub handshake: Duration,
    /// For the peer to send anything at all: more than one heartbeat's interval.
    pub idle: Duration,
    /// For the peer to take anything of what is being sent.
    pub stall: Duration,
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        let seconds = Duration::from_secs;
        Timeouts {
            connect: seconds(10),
            handshake: seconds(30),
            idle: seconds(30),
            stall: seconds(30),
        }
    }
}

/// Why a connection is of no use, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The peer cannot be reached.
    #[error("cannot connect to {address}: {error}")]
    Connect {
        /// The address, as given.
        address: String,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// The socket failed.
    #[error("the connection failed: {0}")]
    Io(io::Error),
    /// TLS failed: above all, a certificate that this side or the other does not accept.
    #[error("no secure connection with this peer: {}", tls_sentence(.0))]
    Tls(rustls::Error),
    /// The peer speaks TLS and means another service.
    #[error("the peer does not speak the link's protocol: is this the right port?")]
    NotALink,
    /// The peer's certificate names no node.
    #[error(transparent)]
    Name(#[from] PkiError),
    /// The peer did nothing for too long.
    #[error("the peer {did} for {} s", .after.as_secs_f32())]
    Timeout {
        /// What it did, or did not.
        did: &'static str,
        /// For how long.
        after: Duration,
    },
    /// The connection ended without TLS saying so, or in the middle of a message.
    #[error("the connection was cut")]
    Cut,
    /// The peer sent what is no message.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// This side wanted to send what is too long.
    #[error(transparent)]
    TooLong(#[from] TooLong),
    /// The connection failed before, or sending was given up in the middle of a message.
    #[error("the connection has ended")]
    Ended,
}

// The sentences above hold the causes already: none is a source, to be told once more.
impl From<io::Error> for LinkError {
    fn from(error: io::Error) -> LinkError {
        LinkError::Io(error)
    }
}

impl From<rustls::Error> for LinkError {
    fn from(error: rustls::Error) -> LinkError {
        LinkError::Tls(error)
    }
}

/// What is wrong with whose certificate, where that is it.
fn tls_sentence(error: &rustls::Error) -> String {
    use rustls::{AlertDescription as Alert, CertificateError, Error};
    match error {
        Error::AlertReceived(Alert::UnknownCA) => {
            "the peer does not accept this node's certificate, which is of another authority: \
             issue one by the authority that the peer trusts"
                .to_owned()
        }
        Error::AlertReceived(Alert::CertificateExpired) => {
            "the peer does not accept this node's certificate, which has expired".to_owned()
        }
        Error::AlertReceived(
            alert
            @ (Alert::BadCertificate | Alert::CertificateUnknown | Alert::CertificateRequired),
        ) => format!("the peer does not accept this node's certificate ({alert:?})"),
        Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "its certificate is not of the authority that this side trusts".to_owned()
        }
        other => other.to_string(),
    }
}

/// What both halves share.
struct Shared {
    tls: RefCell<rustls::Connection>,
    stream: Stream,
}

/// Ends a connection from outside its halves.
#[derive(Clone)]
pub struct Closer(Weak<Shared>);

impl Closer {
    /// Ends the connection at once: both halves fail or end.
    pub fn close(&self) {
        if let Some(shared) = self.0.upgrade() {
            shared.stream.shutdown(Shutdown::Both);
        }
    }
}

/// A secure connection to a known peer.
pub struct Connection {
    peer: NodeName,
    sender: Sender,
    receiver: Receiver,
}

impl Connection {
    /// Connects to `address` (`host:port`) and makes sure that it is the node `expected`.
    ///
    /// The target judges this side's certificate only after that, so its refusal comes as the error
    /// of the first [`recv`](Receiver::recv) or [`ask`](Self::ask).
    ///
    /// # Errors
    /// Any [`LinkError`].
    pub async fn connect(
        address: &str,
        tls: &Arc<ClientConfig>,
        expected: &NodeName,
        timeouts: &Timeouts,
    ) -> Result<Connection, LinkError> {
        let stream = Stream::connect(address, timeouts.connect)
            .await
            .map_err(|error| LinkError::Connect { address: address.to_owned(), error })?;
        Connection::client(stream, tls, expected, timeouts).await
    }

    /// Takes up the connecting side on a stream.
    ///
    /// # Errors
    /// Any [`LinkError`].
    pub async fn client(
        stream: Stream,
        tls: &Arc<ClientConfig>,
        expected: &NodeName,
        timeouts: &Timeouts,
    ) -> Result<Connection, LinkError> {
        let tls = ClientConnection::new(tls.clone(), expected.server_name())?;
        Connection::handshake(stream, tls.into(), timeouts).await
    }

    /// Takes up the accepting side on a stream. Run it in a task of its own: a client that says
    /// nothing holds it until the timeout.
    ///
    /// # Errors
    /// Any [`LinkError`].
    pub async fn accept(
        stream: Stream,
        tls: &Arc<ServerConfig>,
        timeouts: &Timeouts,
    ) -> Result<Connection, LinkError> {
        let tls = ServerConnection::new(tls.clone())?;
        Connection::handshake(stream, tls.into(), timeouts).await
    }

    async fn handshake(
        stream: Stream,
        mut tls: rustls::Connection,
        timeouts: &Timeouts,
    ) -> Result<Connection, LinkError> {
        // The sender bounds what it lets rustls keep.
        tls.set_buffer_limit(None);
        stream.tune(timeouts.stall)?;
        let shared = Rc::new(Shared { tls: RefCell::new(tls), stream });
        let mut sender = Sender::new(shared.clone(), timeouts.stall);
        let mut receiver = Receiver::new(shared.clone(), timeouts.idle);
        let agree = async {
            loop {
                sender.write_out().await?;
                if !shared.tls.borrow().is_handshaking() {
                    return Ok(());
                }
                if !receiver.fill().await? {
                    return Err(LinkError::Cut);
                }
                receiver.handshake_step()?;
            }
        };
        let after = timeouts.handshake;
        let agreed = timeout(after, agree).await.unwrap_or_else(|_| {
            Err(LinkError::Timeout { did: "did not agree on a secure connection", after })
        });
        if let Err(error) = agreed {
            // The peer should learn why: rustls has put an alert in its output.
            let _ = timeout(ALERT_WAIT, sender.write_out()).await;
            shared.stream.shutdown(Shutdown::Write);
            return Err(error);
        }
        let peer = {
            let tls = shared.tls.borrow();
            if tls.alpn_protocol() != Some(pki::ALPN) {
                return Err(LinkError::NotALink);
            }
            pki::peer_name(tls.peer_certificates().unwrap_or_default())?
        };
        Ok(Connection { peer, sender, receiver })
    }

    /// Who the peer is.
    pub fn peer(&self) -> &NodeName {
        &self.peer
    }

    /// Sends a message and waits for the answer. When sending fails, the error is the peer's reason
    /// if it gave one.
    ///
    /// # Errors
    /// Any [`LinkError`]; an end without an answer is [`LinkError::Cut`].
    pub async fn ask(&mut self, message: &Message) -> Result<Message, LinkError> {
        let sent = self.sender.send(message).await;
        match (sent, self.receiver.recv().await) {
            (Ok(()), Ok(answer)) => answer.ok_or(LinkError::Cut),
            (Err(_), Ok(Some(answer))) => Ok(answer),
            (_, Err(reason @ LinkError::Tls(_))) | (Ok(()), Err(reason)) => Err(reason),
            (Err(error), _) => Err(error),
        }
    }

    /// The two halves, for two tasks of this thread. The connection ends when both are dropped.
    pub fn split(self) -> (Sender, Receiver) {
        (self.sender, self.receiver)
    }
}

/// How long to try to tell a refused peer why.
const ALERT_WAIT: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests;
