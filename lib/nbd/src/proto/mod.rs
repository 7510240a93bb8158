//! The NBD wire format as pure functions: no sockets, no clocks, no allocation driven by a peer.
//!
//! Source: the `NetworkBlockDevice/nbd` project's `doc/proto.md`. All integers are big-endian.
//! [`options`] is the handshake (haggling) half, [`transmission`] the data half.

pub mod options;
pub mod transmission;

/// First eight bytes of every server: `NBDMAGIC`.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second eight bytes of a newstyle server, and the start of each option: `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Start of each option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Start of each request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Start of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Start of a structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Longest string in the protocol (export names, messages), in bytes.
pub const STRING_BYTES_MAX: usize = 4096;

/// Handshake flag `NBD_FLAG_FIXED_NEWSTYLE`; the client echoes it at the same bit.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flag `NBD_FLAG_NO_ZEROES`; the client echoes it at the same bit.
pub const FLAG_NO_ZEROES: u16 = 1 << 1;

/// Transmission flags (`NBD_FLAG_*`), sent once per export.
#[allow(missing_docs)] // the names are those of the protocol document
pub mod transmission_flags {
    pub const HAS_FLAGS: u16 = 1 << 0;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const ROTATIONAL: u16 = 1 << 4;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Command flags (`NBD_CMD_FLAG_*`), sent with each request.
#[allow(missing_docs)] // the names are those of the protocol document
pub mod command_flags {
    pub const FUA: u16 = 1 << 0;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// An error value of the protocol. Their numbers are Linux's errno values, by design.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Errno {
    /// Operation not permitted (a write to a read-only export).
    Perm = 1,
    /// Input/output error.
    Io = 5,
    /// Cannot allocate memory.
    NoMem = 12,
    /// Invalid argument.
    Inval = 22,
    /// No space left on device; also a write beyond its end.
    NoSpc = 28,
    /// Value too large.
    Overflow = 75,
    /// Operation not supported (a fast zero that would not be fast).
    NotSup = 95,
    /// The server is being shut down.
    Shutdown = 108,
}

impl Errno {
    /// The error for a wire value; anything the protocol does not define reads as `Inval`.
    pub fn from_wire(value: u32) -> Self {
        match value {
            1 => Self::Perm,
            5 => Self::Io,
            12 => Self::NoMem,
            28 => Self::NoSpc,
            75 => Self::Overflow,
            95 => Self::NotSup,
            108 => Self::Shutdown,
            _ => Self::Inval,
        }
    }

    /// The error for an errno of this system, the way the protocol asks for it.
    pub fn from_system(errno: i32) -> Self {
        match errno {
            1 | 13 | 30 => Self::Perm,    // EPERM EACCES EROFS
            12 => Self::NoMem,            // ENOMEM
            22 => Self::Inval,            // EINVAL
            27 | 28 | 122 => Self::NoSpc, // EFBIG ENOSPC EDQUOT
            75 => Self::Overflow,         // EOVERFLOW
            95 => Self::NotSup,           // EOPNOTSUPP
            108 => Self::Shutdown,        // ESHUTDOWN
            _ => Self::Io,
        }
    }
}

/// Cuts a string for the wire to [`STRING_BYTES_MAX`], at a character boundary.
pub(crate) fn wire_str(text: &str) -> &str {
    let mut end = text.len().min(STRING_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default()
}

/// Reads big-endian fields off a slice; `None` when it is too short.
pub(crate) struct Cursor<'a>(pub &'a [u8]);

impl<'a> Cursor<'a> {
    pub(crate) fn bytes(&mut self, length: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(length)?;
        self.0 = tail;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk::<N>()?;
        self.0 = tail;
        Some(*head)
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }
}

#[cfg(test)]
mod tests;
