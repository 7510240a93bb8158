//! What fronts ask of the engine, and how they are answered.

use bytes::Bytes;
use tidemark_journal::VolumeId;
use tidemark_nbd::Buffer;
use tokio::sync::oneshot;

use super::Range;

/// A request of a front that is not ublk.
pub struct FrontRequest {
    /// The volume.
    pub volume: VolumeId,
    /// What to do.
    pub ask: FrontAsk,
    /// Where; empty for a flush. At most [`super::READ_BYTES_MAX`] for a read.
    pub range: Range,
    /// Gets the answer: a read's content, else nothing; or an errno.
    pub answer: oneshot::Sender<Answer>,
}

/// The answer to a request.
pub type Answer = Result<Bytes, i32>;

/// What a front asks for.
pub enum FrontAsk {
    /// The range's content.
    Read,
    /// Store these bytes, as many as the range has.
    Write {
        /// The bytes.
        payload: Buffer,
        /// Durable before the answer.
        fua: bool,
    },
    /// Zeros.
    Zero {
        /// The disk may unmap.
        unmap: bool,
        /// Durable before the answer.
        fua: bool,
    },
    /// Give the range up.
    Discard,
    /// Make completed writes durable.
    Flush,
}
