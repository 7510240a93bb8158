//! Transmission messages: requests, simple replies and structured reply chunks.

use bytes::{BufMut, BytesMut};

use super::{Cursor, Errno, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, wire_str};

/// Bytes of a request header.
pub const REQUEST_BYTES: usize = 28;
/// Bytes of a simple reply header.
pub const SIMPLE_REPLY_BYTES: usize = 16;
/// Bytes of a structured chunk header.
pub const CHUNK_HEADER_BYTES: usize = 20;

/// Chunk flag: the last chunk of its reply.
pub const CHUNK_DONE: u16 = 1;

/// Chunk types (`NBD_REPLY_TYPE_*`).
#[allow(missing_docs)] // the names are those of the protocol document
pub mod chunk {
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const ERROR: u16 = 0x8001;
    pub const ERROR_OFFSET: u16 = 0x8002;
}

/// A request's type (`NBD_CMD_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the names are those of the protocol document
pub enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    Cache,
    WriteZeroes,
    BlockStatus,
    /// Not known here: answered `EINVAL`.
    Unknown(u16),
}

impl Command {
    /// The command for a wire value.
    pub fn from_wire(value: u16) -> Self {
        match value {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disconnect,
            3 => Self::Flush,
            4 => Self::Trim,
            5 => Self::Cache,
            6 => Self::WriteZeroes,
            7 => Self::BlockStatus,
            other => Self::Unknown(other),
        }
    }

    /// The wire value.
    pub fn to_wire(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Disconnect => 2,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::Cache => 5,
            Self::WriteZeroes => 6,
            Self::BlockStatus => 7,
            Self::Unknown(other) => other,
        }
    }
}

/// A request header. A write's payload follows it on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Command flags, see [`super::command_flags`].
    pub flags: u16,
    /// What is asked.
    pub command: Command,
    /// The client's name for this request, returned with the reply.
    pub cookie: u64,
    /// Start, in bytes.
    pub offset: u64,
    /// Length, in bytes.
    pub length: u32,
}

impl Request {
    /// Parses a header; `None` on a wrong magic, after which the stream cannot be followed.
    pub fn parse(raw: &[u8; REQUEST_BYTES]) -> Option<Self> {
        let mut cursor = Cursor(raw);
        if cursor.u32()? != REQUEST_MAGIC {
            return None;
        }
        Some(Self {
            flags: cursor.u16()?,
            command: Command::from_wire(cursor.u16()?),
            cookie: cursor.u64()?,
            offset: cursor.u64()?,
            length: cursor.u32()?,
        })
    }

    /// Appends the header.
    pub fn encode(&self, out: &mut BytesMut) {
        out.put_u32(REQUEST_MAGIC);
        out.put_u16(self.flags);
        out.put_u16(self.command.to_wire());
        out.put_u64(self.cookie);
        out.put_u64(self.offset);
        out.put_u32(self.length);
    }
}

/// Appends a simple reply; `None` is success. A read's data follows it.
pub fn put_simple_reply(out: &mut BytesMut, cookie: u64, error: Option<Errno>) {
    out.put_u32(SIMPLE_REPLY_MAGIC);
    out.put_u32(error.map_or(0, |errno| errno as u32));
    out.put_u64(cookie);
}

/// Appends a chunk header.
pub fn put_chunk(out: &mut BytesMut, done: bool, kind: u16, cookie: u64, length: u32) {
    out.put_u32(STRUCTURED_REPLY_MAGIC);
    out.put_u16(if done { CHUNK_DONE } else { 0 });
    out.put_u16(kind);
    out.put_u64(cookie);
    out.put_u32(length);
}

/// Appends the head of an `OFFSET_DATA` chunk; `length` bytes of data follow it.
pub fn put_data_chunk(out: &mut BytesMut, done: bool, cookie: u64, offset: u64, length: u32) {
    put_chunk(out, done, chunk::OFFSET_DATA, cookie, length.saturating_add(8));
    out.put_u64(offset);
}

/// Appends an `OFFSET_HOLE` chunk: `length` zero bytes that are not sent.
pub fn put_hole_chunk(out: &mut BytesMut, done: bool, cookie: u64, offset: u64, length: u32) {
    put_chunk(out, done, chunk::OFFSET_HOLE, cookie, 12);
    out.put_u64(offset);
    out.put_u32(length);
}

/// Appends an `ERROR` chunk, final, with a sentence for the user.
pub fn put_error_chunk(out: &mut BytesMut, cookie: u64, errno: Errno, message: &str) {
    let message = wire_str(message);
    let length = u16::try_from(message.len()).unwrap_or(0);
    put_chunk(out, true, chunk::ERROR, cookie, 6 + u32::from(length));
    out.put_u32(errno as u32);
    out.put_u16(length);
    out.put_slice(message.as_bytes());
}

/// Appends a final `BLOCK_STATUS` chunk: `(length in bytes, state flags)` per extent.
pub fn put_block_status(
    out: &mut BytesMut,
    cookie: u64,
    context: u32,
    extents: impl ExactSizeIterator<Item = (u32, u32)>,
) {
    let length = u32::try_from(extents.len() * 8 + 4).unwrap_or(u32::MAX);
    put_chunk(out, true, chunk::BLOCK_STATUS, cookie, length);
    out.put_u32(context);
    for (bytes, flags) in extents {
        out.put_u32(bytes);
        out.put_u32(flags);
    }
}

/// The head of a server's message, as a client reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyHeader {
    /// A simple reply; a read's data follows when `error` is `None`.
    Simple {
        /// The request answered.
        cookie: u64,
        /// `None` is success.
        error: Option<Errno>,
    },
    /// A structured chunk; `length` payload bytes follow.
    Chunk {
        /// The request answered.
        cookie: u64,
        /// Whether this is the reply's last chunk.
        done: bool,
        /// Raw chunk type.
        kind: u16,
        /// Payload length in bytes; unchecked.
        length: u32,
    },
}

impl ReplyHeader {
    /// Parses the head at the start of `raw`: it and its length in bytes, `Ok(None)` when more
    /// bytes are needed, `Err` on a wrong magic.
    pub fn parse(raw: &[u8]) -> Result<Option<(Self, usize)>, WrongMagic> {
        let mut cursor = Cursor(raw);
        let Some(magic) = cursor.u32() else { return Ok(None) };
        let parsed = match magic {
            SIMPLE_REPLY_MAGIC => cursor.u32().zip(cursor.u64()).map(|(error, cookie)| {
                let error = (error != 0).then(|| Errno::from_wire(error));
                (Self::Simple { cookie, error }, SIMPLE_REPLY_BYTES)
            }),
            STRUCTURED_REPLY_MAGIC => {
                let fields = (cursor.u16(), cursor.u16(), cursor.u64(), cursor.u32());
                let (Some(flags), Some(kind), Some(cookie), Some(length)) = fields else {
                    return Ok(None);
                };
                let done = flags & CHUNK_DONE != 0;
                Some((Self::Chunk { cookie, done, kind, length }, CHUNK_HEADER_BYTES))
            }
            _ => return Err(WrongMagic(magic)),
        };
        Ok(parsed)
    }
}

/// A message that starts with no magic of the protocol; the stream is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a message starts with {0:#010x}, which is no magic of the protocol")]
pub struct WrongMagic(pub u32);
