//! Handshake messages: the greeting, options and option replies.

use bytes::{BufMut, BytesMut};

use super::{
    Cursor, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, INIT_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC,
    STRING_BYTES_MAX, wire_str,
};

/// Longest option data that is parsed; an honest client stays far below it.
pub const OPTION_BYTES_MAX: usize = 64 * 1024;
/// Bytes of an option header: magic, option, length.
pub const OPTION_HEADER_BYTES: usize = 16;
/// Bytes of an option reply header: magic, option, type, length.
pub const OPTION_REPLY_HEADER_BYTES: usize = 20;
/// The one metadata context this library serves.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// The id by which `base:allocation` goes once selected.
pub const BASE_ALLOCATION_ID: u32 = 1;

/// Option numbers (`NBD_OPT_*`).
#[allow(missing_docs)] // the names are those of the protocol document
pub mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Information types of `INFO` and `GO` (`NBD_INFO_*`).
#[allow(missing_docs)] // the names are those of the protocol document
pub mod info {
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Type of an option reply (`NBD_REP_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs)] // the names are those of the protocol document
pub enum ReplyType {
    Ack = 1,
    Server = 2,
    Info = 3,
    MetaContext = 4,
    ErrUnsup = 0x8000_0001,
    ErrPolicy = 0x8000_0002,
    ErrInvalid = 0x8000_0003,
    ErrPlatform = 0x8000_0004,
    ErrTlsReqd = 0x8000_0005,
    ErrUnknown = 0x8000_0006,
    ErrShutdown = 0x8000_0007,
    ErrBlockSizeReqd = 0x8000_0008,
    ErrTooBig = 0x8000_0009,
}

/// The server's first 18 bytes: both magics and the handshake flags.
pub fn greeting() -> [u8; 18] {
    let mut out = [0; 18];
    out[..8].copy_from_slice(&INIT_MAGIC.to_be_bytes());
    out[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    out[16..].copy_from_slice(&(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
    out
}

/// The client's answer to the greeting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientFlags {
    /// Whether the client speaks fixed newstyle, so options may be answered.
    pub fixed_newstyle: bool,
    /// Whether the 124 zero bytes after `EXPORT_NAME` are left out.
    pub no_zeroes: bool,
}

impl ClientFlags {
    /// Parses the four bytes; `None` when a flag is unknown, which ends the session.
    pub fn parse(raw: [u8; 4]) -> Option<Self> {
        let flags = u32::from_be_bytes(raw);
        let known = u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        (flags & !known == 0).then_some(Self {
            fixed_newstyle: flags & u32::from(FLAG_FIXED_NEWSTYLE) != 0,
            no_zeroes: flags & u32::from(FLAG_NO_ZEROES) != 0,
        })
    }
}

/// Header of an option: its number and the length of its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// Option number, known or not.
    pub option: u32,
    /// Length of the data that follows, in bytes; unchecked.
    pub length: u32,
}

impl OptionHeader {
    /// Parses an option header; `None` on a wrong magic, which ends the session.
    pub fn parse(raw: &[u8; OPTION_HEADER_BYTES]) -> Option<Self> {
        let mut cursor = Cursor(raw);
        if cursor.u64()? != OPTION_MAGIC {
            return None;
        }
        Some(Self { option: cursor.u32()?, length: cursor.u32()? })
    }

    /// Appends the header.
    pub fn encode(self, out: &mut BytesMut) {
        out.put_u64(OPTION_MAGIC);
        out.put_u32(self.option);
        out.put_u32(self.length);
    }
}

/// Data of `INFO` and `GO`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InfoRequest {
    /// Export name; empty means the default export.
    pub name: String,
    /// Information types asked for, known or not.
    pub wanted: Vec<u16>,
}

/// Data of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaContextRequest {
    /// Export the contexts are for.
    pub name: String,
    /// Queries, each `namespace:leaf`.
    pub queries: Vec<String>,
}

/// A parsed option.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the names are those of the protocol document
pub enum ClientOption {
    ExportName(String),
    Abort,
    List,
    StartTls,
    Info(InfoRequest),
    Go(InfoRequest),
    StructuredReply,
    ListMetaContext(MetaContextRequest),
    SetMetaContext(MetaContextRequest),
    /// Not known here: answered `ERR_UNSUP`.
    Unknown(u32),
}

impl ClientOption {
    /// Parses an option's data. An `Err` is the sentence to answer `ERR_INVALID` with.
    pub fn parse(number: u32, data: &[u8]) -> Result<Self, &'static str> {
        let empty = |parsed: Self| {
            if data.is_empty() { Ok(parsed) } else { Err("this option takes no data") }
        };
        match number {
            option::EXPORT_NAME => Ok(Self::ExportName(name(data)?)),
            option::ABORT => Ok(Self::Abort),
            option::LIST => empty(Self::List),
            option::STARTTLS => empty(Self::StartTls),
            option::INFO => Ok(Self::Info(InfoRequest::parse(data)?)),
            option::GO => Ok(Self::Go(InfoRequest::parse(data)?)),
            option::STRUCTURED_REPLY => empty(Self::StructuredReply),
            option::LIST_META_CONTEXT => {
                Ok(Self::ListMetaContext(MetaContextRequest::parse(data)?))
            }
            option::SET_META_CONTEXT => Ok(Self::SetMetaContext(MetaContextRequest::parse(data)?)),
            other => Ok(Self::Unknown(other)),
        }
    }
}

impl InfoRequest {
    fn parse(data: &[u8]) -> Result<Self, &'static str> {
        const SHORT: &str = "the option data is shorter than its lengths say";
        let mut cursor = Cursor(data);
        let name = counted_name(&mut cursor)?;
        let count = cursor.u16().ok_or(SHORT)?;
        if cursor.0.len() != usize::from(count) * 2 {
            return Err("the number of information requests does not fit the option's length");
        }
        let wanted = std::iter::from_fn(|| cursor.u16()).collect();
        Ok(Self { name, wanted })
    }

    /// Appends the option's data.
    pub fn encode(&self, out: &mut BytesMut) {
        put_string(out, &self.name);
        out.put_u16(u16::try_from(self.wanted.len()).unwrap_or(u16::MAX));
        for wanted in self.wanted.iter().take(usize::from(u16::MAX)) {
            out.put_u16(*wanted);
        }
    }
}

impl MetaContextRequest {
    fn parse(data: &[u8]) -> Result<Self, &'static str> {
        let mut cursor = Cursor(data);
        let name = counted_name(&mut cursor)?;
        let count = cursor.u32().ok_or("the option data ends before the number of queries")?;
        let mut queries = Vec::new(); // grows with the data received, not with the count claimed
        for _ in 0..count {
            queries.push(counted_name(&mut cursor)?);
        }
        if !cursor.0.is_empty() {
            return Err("the option data is longer than its queries");
        }
        Ok(Self { name, queries })
    }

    /// Appends the option's data.
    pub fn encode(&self, out: &mut BytesMut) {
        put_string(out, &self.name);
        out.put_u32(u32::try_from(self.queries.len()).unwrap_or(u32::MAX));
        for query in &self.queries {
            put_string(out, query);
        }
    }

    /// Whether the queries of a `SET_META_CONTEXT` select `base:allocation`.
    pub fn selects_allocation(&self) -> bool {
        self.queries.iter().any(|query| query == BASE_ALLOCATION)
    }

    /// Whether `base:allocation` is an answer to a `LIST_META_CONTEXT`.
    pub fn lists_allocation(&self) -> bool {
        self.queries.is_empty()
            || self.queries.iter().any(|query| query == "base:" || query == BASE_ALLOCATION)
    }
}

/// Header of an option reply, as a client reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option that is answered.
    pub option: u32,
    /// Raw reply type; bit 31 marks an error.
    pub kind: u32,
    /// Bytes of data that follow; unchecked.
    pub length: u32,
}

impl OptionReplyHeader {
    /// Parses a header; `None` on a wrong magic.
    pub fn parse(raw: &[u8; OPTION_REPLY_HEADER_BYTES]) -> Option<Self> {
        let mut cursor = Cursor(raw);
        if cursor.u64()? != OPTION_REPLY_MAGIC {
            return None;
        }
        Some(Self { option: cursor.u32()?, kind: cursor.u32()?, length: cursor.u32()? })
    }
}

/// Appends one option reply; `data` must be shorter than 4 GiB.
pub fn put_reply(out: &mut BytesMut, option: u32, kind: ReplyType, data: &[u8]) {
    out.put_u64(OPTION_REPLY_MAGIC);
    out.put_u32(option);
    out.put_u32(kind as u32);
    out.put_u32(u32::try_from(data.len()).unwrap_or(u32::MAX));
    out.put_slice(data);
}

/// Appends an error reply with a sentence for the user.
pub fn put_error(out: &mut BytesMut, option: u32, kind: ReplyType, message: &str) {
    put_reply(out, option, kind, wire_str(message).as_bytes());
}

/// Appends an `NBD_REP_SERVER`: an export's name and, when there is one, its description.
pub fn put_server(out: &mut BytesMut, name: &str, description: &str) {
    let (name, description) = (wire_str(name), wire_str(description));
    let mut data = BytesMut::with_capacity(4 + name.len() + description.len());
    put_string(&mut data, name);
    data.put_slice(description.as_bytes());
    put_reply(out, option::LIST, ReplyType::Server, &data);
}

/// Appends an `NBD_REP_INFO` of type `NBD_INFO_EXPORT`.
pub fn put_info_export(out: &mut BytesMut, option: u32, size: u64, flags: u16) {
    let mut data = [0; 12];
    data[..2].copy_from_slice(&info::EXPORT.to_be_bytes());
    data[2..10].copy_from_slice(&size.to_be_bytes());
    data[10..].copy_from_slice(&flags.to_be_bytes());
    put_reply(out, option, ReplyType::Info, &data);
}

/// Appends an `NBD_REP_INFO` that carries a string (name or description).
pub fn put_info_text(out: &mut BytesMut, option: u32, kind: u16, text: &str) {
    let text = wire_str(text);
    let mut data = BytesMut::with_capacity(2 + text.len());
    data.put_u16(kind);
    data.put_slice(text.as_bytes());
    put_reply(out, option, ReplyType::Info, &data);
}

/// Appends an `NBD_REP_INFO` of type `NBD_INFO_BLOCK_SIZE`; sizes in bytes.
pub fn put_info_block_size(out: &mut BytesMut, option: u32, sizes: [u32; 3]) {
    let mut data = BytesMut::with_capacity(14);
    data.put_u16(info::BLOCK_SIZE);
    for size in sizes {
        data.put_u32(size);
    }
    put_reply(out, option, ReplyType::Info, &data);
}

/// Appends an `NBD_REP_META_CONTEXT` naming `base:allocation`.
pub fn put_meta_context(out: &mut BytesMut, option: u32, id: u32) {
    let mut data = BytesMut::with_capacity(4 + BASE_ALLOCATION.len());
    data.put_u32(id);
    data.put_slice(BASE_ALLOCATION.as_bytes());
    put_reply(out, option, ReplyType::MetaContext, &data);
}

/// Appends the answer to `EXPORT_NAME`, which has no reply header.
pub fn put_export_name_reply(out: &mut BytesMut, size: u64, flags: u16, no_zeroes: bool) {
    out.put_u64(size);
    out.put_u16(flags);
    if !no_zeroes {
        out.put_bytes(0, 124);
    }
}

fn put_string(out: &mut BytesMut, text: &str) {
    let text = wire_str(text);
    out.put_u32(u32::try_from(text.len()).unwrap_or(u32::MAX));
    out.put_slice(text.as_bytes());
}

fn counted_name(cursor: &mut Cursor<'_>) -> Result<String, &'static str> {
    const SHORT: &str = "the option data is shorter than its lengths say";
    let length = cursor.u32().ok_or(SHORT)?;
    name(cursor.bytes(length as usize).ok_or(SHORT)?)
}

fn name(raw: &[u8]) -> Result<String, &'static str> {
    if raw.len() > STRING_BYTES_MAX {
        return Err("a string is longer than 4096 bytes");
    }
    match std::str::from_utf8(raw) {
        Ok(text) if !text.contains('\0') => Ok(text.to_owned()),
        _ => Err("a string is not UTF-8 free of NUL"),
    }
}
