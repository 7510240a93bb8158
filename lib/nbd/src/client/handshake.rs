//! The client's side of option haggling.

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{ConnectError, Options, Stream};
use crate::export::{BlockSizes, ExportEntry, ExportInfo, Features};
use crate::proto::options::{
    BASE_ALLOCATION, InfoRequest, MetaContextRequest, OPTION_REPLY_HEADER_BYTES, OptionHeader,
    OptionReplyHeader, ReplyType, info, option,
};
use crate::proto::{Cursor, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, INIT_MAGIC, OPTION_MAGIC};

/// Longest option reply that is taken.
const REPLY_BYTES_MAX: u32 = 64 * 1024;
/// Most bytes of replies to one option, with their headers.
const REPLIES_BYTES_MAX: usize = 16 << 20;
const ERROR_BIT: u32 = 1 << 31;

pub(super) async fn greet(stream: &mut Box<dyn Stream>) -> Result<(), ConnectError> {
    let magics = (stream.read_u64().await?, stream.read_u64().await?);
    let flags = stream.read_u16().await?;
    if magics != (INIT_MAGIC, OPTION_MAGIC) || flags & FLAG_FIXED_NEWSTYLE == 0 {
        return Err(protocol("no fixed newstyle greeting"));
    }
    let ours = FLAG_FIXED_NEWSTYLE | flags & FLAG_NO_ZEROES;
    stream.write_u32(u32::from(ours)).await?;
    Ok(())
}

pub(super) async fn start_tls(stream: &mut Box<dyn Stream>) -> Result<(), ConnectError> {
    ask(stream, option::STARTTLS, &[]).await.map(drop)
}

pub(super) async fn list(stream: &mut Box<dyn Stream>) -> Result<Vec<ExportEntry>, ConnectError> {
    let mut entries = Vec::new();
    for (kind, data) in ask(stream, option::LIST, &[]).await? {
        if kind != ReplyType::Server as u32 {
            return Err(protocol("an unexpected reply to LIST"));
        }
        let mut cursor = Cursor(&data);
        let name = cursor.u32().and_then(|length| cursor.bytes(length as usize));
        let name = name.ok_or_else(|| protocol("a truncated list entry"))?;
        entries.push(ExportEntry { name: text(name), description: text(cursor.0) });
    }
    send(stream, option::ABORT, &[]).await?;
    Ok(entries)
}

pub(super) async fn info(
    stream: &mut Box<dyn Stream>,
    export: &str,
) -> Result<ExportInfo, ConnectError> {
    let found = enter(stream, option::INFO, export).await?;
    send(stream, option::ABORT, &[]).await?;
    Ok(found)
}

/// Enters an export: what it is, and whether structured replies are on.
pub(super) async fn go(
    stream: &mut Box<dyn Stream>,
    export: &str,
    options: &Options,
) -> Result<(ExportInfo, bool), ConnectError> {
    let mut structured = false;
    if !options.simple_replies_only {
        structured = match ask(stream, option::STRUCTURED_REPLY, &[]).await {
            Ok(_) => true,
            Err(ConnectError::Refused { .. }) => false,
            Err(error) => return Err(error),
        };
    }
    if structured {
        let queries = vec![BASE_ALLOCATION.to_owned()];
        let mut data = BytesMut::new();
        MetaContextRequest { name: export.to_owned(), queries }.encode(&mut data);
        ask(stream, option::SET_META_CONTEXT, &data).await?;
    }
    Ok((enter(stream, option::GO, export).await?, structured))
}

async fn enter(
    stream: &mut Box<dyn Stream>,
    number: u32,
    export: &str,
) -> Result<ExportInfo, ConnectError> {
    let wanted = vec![info::NAME, info::DESCRIPTION, info::BLOCK_SIZE];
    let mut data = BytesMut::new();
    InfoRequest { name: export.to_owned(), wanted }.encode(&mut data);
    let mut found = None;
    let mut rest = ExportInfo::default();
    for (kind, data) in ask(stream, number, &data).await? {
        let mut cursor = Cursor(&data);
        if kind != ReplyType::Info as u32 {
            continue;
        }
        match cursor.u16() {
            Some(info::EXPORT) => found = cursor.u64().zip(cursor.u16()),
            Some(info::NAME) => rest.canonical_name = Some(text(cursor.0)),
            Some(info::DESCRIPTION) => rest.description = Some(text(cursor.0)),
            Some(info::BLOCK_SIZE) => {
                let sizes = (cursor.u32(), cursor.u32(), cursor.u32());
                let (Some(minimum), Some(preferred), Some(maximum)) = sizes else {
                    return Err(protocol("truncated block sizes"));
                };
                rest.block_sizes = BlockSizes { minimum, preferred, maximum };
            }
            _ => {}
        }
    }
    let (size, flags) = found.ok_or_else(|| protocol("no export information"))?;
    Ok(ExportInfo { size, features: Features::from_wire(flags), ..rest })
}

/// Sends an option and gathers its replies up to the acknowledgement.
async fn ask(
    stream: &mut Box<dyn Stream>,
    number: u32,
    data: &[u8],
) -> Result<Vec<(u32, Vec<u8>)>, ConnectError> {
    send(stream, number, data).await?;
    let mut replies = Vec::new();
    let mut bytes = 0;
    loop {
        let mut raw = [0; OPTION_REPLY_HEADER_BYTES];
        stream.read_exact(&mut raw).await?;
        let header = OptionReplyHeader::parse(&raw)
            .ok_or_else(|| protocol("an option reply with a wrong magic"))?;
        if header.option != number || header.length > REPLY_BYTES_MAX {
            return Err(protocol("a reply to another option, or of absurd length"));
        }
        bytes += OPTION_REPLY_HEADER_BYTES + header.length as usize;
        if bytes > REPLIES_BYTES_MAX {
            return Err(protocol("more replies to an option than are taken"));
        }
        let mut data = vec![0; header.length as usize];
        stream.read_exact(&mut data).await?;
        if header.kind & ERROR_BIT != 0 {
            return Err(ConnectError::Refused { kind: header.kind, message: text(&data) });
        }
        if header.kind == ReplyType::Ack as u32 {
            return Ok(replies);
        }
        replies.push((header.kind, data));
    }
}

async fn send(stream: &mut Box<dyn Stream>, number: u32, data: &[u8]) -> Result<(), ConnectError> {
    let mut out = BytesMut::new();
    let length = u32::try_from(data.len()).map_err(|_| protocol("an option too long to send"))?;
    OptionHeader { option: number, length }.encode(&mut out);
    out.extend_from_slice(data);
    stream.write_all(&out).await?;
    stream.flush().await?;
    Ok(())
}

fn text(raw: &[u8]) -> String {
    String::from_utf8_lossy(raw).into_owned()
}

fn protocol(message: &str) -> ConnectError {
    ConnectError::Protocol(message.to_owned())
}
