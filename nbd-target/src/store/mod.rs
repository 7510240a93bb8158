//! What the target keeps: the log of frames, its index, and the base below it.

pub mod base;
pub mod cache;
pub mod check;
pub mod index;
pub mod journal;
pub mod log;
pub mod place;
pub mod read;
pub mod rebuild;
pub mod recover;
pub mod segment;

pub use place::{Damage, Where};

/// Why stored content cannot be given.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The file system refused.
    #[error("{what}: {error}")]
    Io {
        /// What was being read.
        what: String,
        /// What it said.
        error: std::io::Error,
    },
    /// The bytes are not those that were written; the text names the place.
    #[error("{0}")]
    Damaged(Damage),
    /// Unknown: the source could not read its own disk here, or what it sent was damaged since.
    #[error(
        "sectors {start}..{end} are unknown before this position: the source could not read its \
         disk there, or its copy here was damaged; 'tidemark verify' at the source sends them again"
    )]
    Unreadable {
        /// First sector.
        start: u64,
        /// The sector after the last.
        end: u64,
    },
    /// The position has left the window since.
    #[error("the position is no longer retained; the oldest is @seq:{oldest}")]
    NotRetained {
        /// The oldest position still good.
        oldest: tidemark_journal::Seq,
    },
}

impl ReadError {
    /// The same, with the place if it is damage and does not name one.
    #[must_use]
    pub fn met_at(self, place: Where) -> ReadError {
        match self {
            ReadError::Damaged(Damage { text, at: None }) => {
                ReadError::Damaged(Damage::at(place, text))
            }
            other => other,
        }
    }

    /// An error of the file system, or damage that a checksum showed.
    pub fn io(what: impl Into<String>, error: std::io::Error) -> ReadError {
        match error.kind() {
            std::io::ErrorKind::InvalidData => ReadError::Damaged(error.to_string().into()),
            std::io::ErrorKind::UnexpectedEof => {
                ReadError::Damaged(format!("{} is cut short", what.into()).into())
            }
            _ => ReadError::Io { what: what.into(), error },
        }
    }
}
