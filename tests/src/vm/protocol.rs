//! What the harness and the server in a guest say to each other over a virtio serial port.
//!
//! Each message is one line of JSON. A guest may be reset between any two bytes, so both sides skip a line
//! they cannot read, and each side's first line after a (re)start is preceded by an empty one that ends what
//! a former life left unfinished. [`FromGuest::Hello`] says that the guest's server has started: whatever was
//! asked of it before is lost.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The name of the guest's serial device: the first port after the one reserved for a console.
pub const PORT: &str = "/dev/vport0p1";

/// The most of each output stream of a command that the guest keeps.
pub const OUTPUT_BYTES_MAX: usize = 32 << 20;

/// The most file content in one message; long files go in several.
pub const PIECE_BYTES_MAX: usize = 512 << 10;

/// A request to the guest.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToGuest {
    /// Run a program; answered by [`FromGuest::Ended`] when it has ended.
    Run {
        /// Names this request in its answer.
        id: u64,
        /// The program and its arguments.
        arguments: Vec<String>,
        /// What it reads from its standard input.
        input: Bytes,
        /// When to kill it with all it started.
        timeout_ms: u64,
    },
    /// Send a signal to the process group of a running request; not answered.
    Signal {
        /// The request that runs the program.
        id: u64,
        /// The signal's number.
        signal: i32,
    },
    /// Write a piece of a file; answered by [`FromGuest::Written`].
    Write {
        /// Names this request in its answer.
        id: u64,
        /// The file; its directory is made if it is missing.
        path: String,
        /// The piece.
        data: Bytes,
        /// Whether the piece goes to the file's end instead of replacing the file.
        append: bool,
        /// The file's permission bits.
        mode: u32,
    },
    /// Read a piece of a file; answered by [`FromGuest::Piece`].
    Read {
        /// Names this request in its answer.
        id: u64,
        /// The file.
        path: String,
        /// Where the piece starts.
        offset_bytes: u64,
    },
}

/// A message from the guest.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromGuest {
    /// The server has started.
    Hello,
    /// A program has ended.
    Ended {
        /// The request.
        id: u64,
        /// What came of it.
        output: Output,
    },
    /// A piece is written.
    Written {
        /// The request.
        id: u64,
    },
    /// A piece of a file; an empty one is its end.
    Piece {
        /// The request.
        id: u64,
        /// The piece.
        data: Bytes,
    },
    /// A request could not be carried out.
    Failed {
        /// The request.
        id: u64,
        /// Why.
        reason: String,
    },
}

impl FromGuest {
    /// The request that this answers.
    pub fn id(&self) -> Option<u64> {
        match self {
            FromGuest::Hello => None,
            FromGuest::Ended { id, .. }
            | FromGuest::Written { id }
            | FromGuest::Piece { id, .. }
            | FromGuest::Failed { id, .. } => Some(*id),
        }
    }
}

/// How a program ended and what it printed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Output {
    /// The exit status, unless a signal ended it.
    pub status: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Whether it was killed because its time was over.
    pub timed_out: bool,
    /// Its standard output, cut at [`OUTPUT_BYTES_MAX`].
    pub stdout: Bytes,
    /// Its standard error, cut at [`OUTPUT_BYTES_MAX`].
    pub stderr: Bytes,
}

impl Output {
    /// Whether the program ended by itself with status 0.
    pub fn success(&self) -> bool {
        self.status == Some(0) && !self.timed_out
    }

    /// The standard output as text; what is not UTF-8 is replaced.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout.0).into_owned()
    }

    /// The standard error as text; what is not UTF-8 is replaced.
    pub fn error_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr.0).into_owned()
    }
}

/// Bytes that travel as base64.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64_STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
        let text = String::deserialize(deserializer)?;
        BASE64_STANDARD.decode(text).map(Bytes).map_err(serde::de::Error::custom)
    }
}
