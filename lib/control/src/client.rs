//! Asking a daemon over its Unix socket.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::{Answer, ApiError, SCHEMA};

/// The longest answer that is taken.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// How long an answer may take unless told otherwise.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why there is no answer. Each is a sentence for the person who asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error(
        "the {daemon} is not running: nothing answers on {} ({source}); start it with \
         'systemctl start tidemark-{daemon}' or 'tidemark {daemon} run'",
        path.display()
    )]
    NotRunning {
        /// Which daemon.
        daemon: &'static str,
        /// Its socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The socket is there, but not for this user.
    #[error("no permission to ask the {daemon} on {}; run this as root", path.display())]
    NotAllowed {
        /// Which daemon.
        daemon: &'static str,
        /// Its socket.
        path: PathBuf,
    },
    /// The daemon refused or failed.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// The other end is of another version.
    #[error(
        "the {daemon} answers in version {theirs} of the local interface and this command knows \
         {SCHEMA}; install the same version of both and restart the {daemon}"
    )]
    Schema {
        /// Which daemon.
        daemon: &'static str,
        /// Its version.
        theirs: u32,
    },
    /// No answer in time.
    #[error("the {daemon} did not answer within {} s", patience.as_secs())]
    TimedOut {
        /// Which daemon.
        daemon: &'static str,
        /// How long it was waited for.
        patience: Duration,
    },
    /// The connection broke, or the answer is not one.
    #[error("the {daemon} gave no usable answer: {why}")]
    Broken {
        /// Which daemon.
        daemon: &'static str,
        /// What is wrong.
        why: String,
    },
}

/// A daemon's address. Each question is one connection.
#[derive(Clone, Debug)]
pub struct Client {
    daemon: &'static str,
    path: PathBuf,
    patience: Duration,
}

impl Client {
    /// `daemon` is what it is called in sentences: `agent` or `target`.
    pub fn new(daemon: &'static str, path: &Path) -> Client {
        Client { daemon, path: path.to_owned(), patience: PATIENCE }
    }

    /// The same, waiting so long for each answer.
    pub fn with_patience(self, patience: Duration) -> Client {
        Client { patience, ..self }
    }

    /// The daemon's socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Asks for something.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.ask(Method::GET, path, Bytes::new()).await
    }

    /// Has something done.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|error| self.broken(error))?;
        self.ask(Method::POST, path, body.into()).await
    }

    /// Has something removed.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.ask(Method::DELETE, path, Bytes::new()).await
    }

    /// Runs a question to its end on this thread, for callers without a runtime.
    ///
    /// # Errors
    /// The question's own, or [`ClientError::Broken`] when no runtime can be made.
    pub fn wait<T>(
        &self,
        question: impl Future<Output = Result<T, ClientError>>,
    ) -> Result<T, ClientError> {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| self.broken(error))?
            .block_on(question)
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<T, ClientError> {
        let (status, answer) =
            tokio::time::timeout(self.patience, self.exchange(method, path, body)).await.map_err(
                |_| ClientError::TimedOut { daemon: self.daemon, patience: self.patience },
            )??;
        self.schema(&answer)?;
        if status.is_success() {
            let answer: Answer<T> =
                serde_json::from_slice(&answer).map_err(|error| self.broken(error))?;
            return Ok(answer.body);
        }
        match serde_json::from_slice::<ApiError>(&answer) {
            Ok(error) => Err(error.into()),
            Err(_) => Err(self.broken(format!("status {status}"))),
        }
    }

    /// Looked at before anything else of the answer, which may have any shape in another version.
    fn schema(&self, answer: &[u8]) -> Result<(), ClientError> {
        #[derive(serde::Deserialize)]
        struct Version {
            schema: u32,
        }
        let version: Version =
            serde_json::from_slice(answer).map_err(|error| self.broken(error))?;
        if version.schema == SCHEMA {
            Ok(())
        } else {
            Err(ClientError::Schema { daemon: self.daemon, theirs: version.schema })
        }
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), ClientError> {
        let stream = UnixStream::connect(&self.path).await.map_err(|error| self.refused(error))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.broken(error))?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "localhost")
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(|error| self.broken(error))?;
        let asked = async {
            let response =
                sender.send_request(request).await.map_err(|error| self.broken(error))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX)
                .collect()
                .await
                .map_err(|error| self.broken(error))?;
            Ok((status, body.to_bytes()))
        };
        // The connection's end says nothing that the answer does not say better.
        let driven = async {
            let _ = connection.await;
            std::future::pending().await
        };
        tokio::select! {
            answer = asked => answer,
            never = driven => never,
        }
    }

    fn refused(&self, source: io::Error) -> ClientError {
        let (daemon, path) = (self.daemon, self.path.clone());
        if source.kind() == io::ErrorKind::PermissionDenied {
            ClientError::NotAllowed { daemon, path }
        } else {
            ClientError::NotRunning { daemon, path, source }
        }
    }

    fn broken(&self, why: impl ToString) -> ClientError {
        ClientError::Broken { daemon: self.daemon, why: why.to_string() }
    }
}

/// Writes a name into a path of the API: what is not plain is percent-encoded.
pub fn segment(name: &str) -> String {
    let mut out = String::new();
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~') {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}
