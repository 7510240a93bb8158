//! Drives [`Negotiation`] over a stream, with a deadline for every step and for the whole.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use super::clients::Account;
use super::negotiation::{Negotiation, Opening, Step};
use super::transmission::{Opened, Session};
use crate::export::{ClientInfo, ExportInfo, Exports, OpenError, Purpose};
use crate::proto::options::{
    ClientFlags, InfoRequest, OPTION_BYTES_MAX, OPTION_HEADER_BYTES, OptionHeader, ReplyType,
    greeting, option, put_error,
};

/// Longest option that is skipped and refused; a longer one ends the session.
const SKIP_BYTES_MAX: u32 = 1 << 20;
/// Replies are sent on when this much has gathered.
const SEND_BYTES: usize = 64 * 1024;

/// How haggling ended.
pub(crate) enum Outcome {
    Transmission(Session),
    StartTls,
    Ended(&'static str),
}

/// Sends the greeting and reads the client's flags; `None` when they are not acceptable.
pub(crate) async fn greet<S>(stream: &mut S, step: Duration) -> io::Result<Option<ClientFlags>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let exchange = async {
        stream.write_all(&greeting()).await?;
        let mut flags = [0; 4];
        stream.read_exact(&mut flags).await?;
        Ok(ClientFlags::parse(flags))
    };
    within(step, exchange).await
}

/// Haggles until transmission, TLS or the end. `enter` counts a connection that is to enter an export;
/// `step` bounds each option.
pub(crate) async fn haggle<S>(
    stream: &mut S,
    negotiation: &mut Negotiation,
    exports: &Arc<dyn Exports>,
    client: &ClientInfo,
    enter: impl Fn() -> Result<Account, OpenError>,
    step: Duration,
) -> io::Result<Outcome>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut out = BytesMut::new();
    loop {
        let next = match within(step, read_option(stream)).await? {
            Incoming::Option(number, data) => negotiation.option(number, &data, &mut out),
            Incoming::TooBig(number) => {
                if number == option::EXPORT_NAME {
                    return Ok(Outcome::Ended("an export name that is too long"));
                }
                let message = format!("an option may have at most {OPTION_BYTES_MAX} bytes");
                put_error(&mut out, number, ReplyType::ErrTooBig, &message);
                Step::Continue
            }
            Incoming::WrongMagic => return Ok(Outcome::Ended("an option with a wrong magic")),
            Incoming::Absurd => return Ok(Outcome::Ended("an option of absurd length")),
        };
        let ended = match next {
            Step::Continue => None,
            Step::End(reason) => Some(Outcome::Ended(reason)),
            Step::StartTls => Some(Outcome::StartTls),
            Step::List => {
                let entries = exports.list(client).await;
                for entries in entries.chunks(256) {
                    if out.len() > SEND_BYTES {
                        within(step, stream.write_all_buf(&mut out)).await?;
                    }
                    negotiation.list_entries(entries, &mut out);
                }
                negotiation.list_done(&mut out);
                None
            }
            Step::Open { how, request } => {
                open(negotiation, exports, client, &enter, how, request, &mut out).await
            }
        };
        within(step, send(stream, &mut out)).await?;
        if let Some(outcome) = ended {
            return Ok(outcome);
        }
    }
}

async fn open(
    negotiation: &Negotiation,
    exports: &Arc<dyn Exports>,
    client: &ClientInfo,
    enter: impl Fn() -> Result<Account, OpenError>,
    how: Opening,
    request: InfoRequest,
    out: &mut BytesMut,
) -> Option<Outcome> {
    let purpose = match how {
        Opening::Info => Purpose::Information,
        Opening::Go | Opening::Bare => Purpose::Transmission,
    };
    let refuse = |error: OpenError, out: &mut BytesMut| {
        let reason = error.to_string();
        tracing::info!(export = request.name, client = %client.origin, reason, "export refused");
        match negotiation.refused(how, &error, out) {
            Step::End(reason) => Some(Outcome::Ended(reason)),
            _ => None,
        }
    };
    let account = match how {
        Opening::Info => Ok(Account::default()),
        Opening::Go | Opening::Bare => enter(),
    };
    let account = match account {
        Ok(account) => account,
        Err(error) => return refuse(error, out),
    };
    let opened = match exports.open(&request.name, purpose, client).await {
        Ok(export) => Opened::new(export),
        Err(error) => return refuse(error, out),
    };
    let info = opened.export.info();
    if let Err(message) = check(&info) {
        opened.close().await;
        return refuse(OpenError::unavailable(message), out);
    }
    negotiation.opened(how, &request, &info, out);
    if how == Opening::Info {
        opened.close().await;
        return None;
    }
    Some(Outcome::Transmission(Session {
        structured: negotiation.structured(),
        allocation: negotiation.allocation_selected(&request.name),
        resends: false,
        name: request.name,
        opened,
        info,
        account,
    }))
}

/// Whether an export's own description keeps the rules of the protocol.
pub(crate) fn check(info: &ExportInfo) -> Result<(), &'static str> {
    let sizes = info.block_sizes;
    if !sizes.minimum.is_power_of_two() || sizes.minimum > 1 << 16 {
        return Err("the export's minimum block size is not a power of two up to 64 KiB");
    }
    if !sizes.preferred.is_power_of_two() || sizes.preferred < sizes.minimum.max(512) {
        return Err("the export's preferred block size is not a power of two from 512 up");
    }
    if sizes.maximum < sizes.preferred || sizes.maximum > 1 << 30 {
        return Err("the export's maximum payload is below its preferred block size or over 1 GiB");
    }
    if !info.size.is_multiple_of(u64::from(sizes.minimum)) {
        return Err("the export's size is not a multiple of its minimum block size");
    }
    Ok(())
}

enum Incoming {
    Option(u32, Vec<u8>),
    TooBig(u32),
    WrongMagic,
    Absurd,
}

/// Reads exactly one option: nothing of what follows it, which may be TLS.
async fn read_option<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<Incoming> {
    let mut raw = [0; OPTION_HEADER_BYTES];
    stream.read_exact(&mut raw).await?;
    let Some(OptionHeader { option, length }) = OptionHeader::parse(&raw) else {
        return Ok(Incoming::WrongMagic);
    };
    if length > SKIP_BYTES_MAX {
        return Ok(Incoming::Absurd);
    }
    if length as usize > OPTION_BYTES_MAX {
        let skipped =
            tokio::io::copy(&mut stream.take(u64::from(length)), &mut tokio::io::sink()).await?;
        if skipped < u64::from(length) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        return Ok(Incoming::TooBig(option));
    }
    let mut data = vec![0; length as usize];
    stream.read_exact(&mut data).await?;
    Ok(Incoming::Option(option, data))
}

async fn send<S: AsyncWrite + Unpin>(stream: &mut S, out: &mut BytesMut) -> io::Result<()> {
    stream.write_all_buf(out).await?;
    stream.flush().await
}

pub(crate) async fn within<T>(
    limit: Duration,
    work: impl Future<Output = io::Result<T>>,
) -> io::Result<T> {
    timeout(limit, work).await.unwrap_or_else(|_| {
        Err(io::Error::new(io::ErrorKind::TimedOut, "the peer took too long over a handshake step"))
    })
}
