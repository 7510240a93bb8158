//! One request, without I/O: checking it, calling the export, encoding the reply.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;

use super::inflight::Task;
use super::out::OutQueue;
use super::transmission::Session;
use crate::buffer::Buffer;
use crate::export::{Chunk, Error, Export, Extent, Reply, Zeroing};
use crate::proto::command_flags::{DF, FAST_ZERO, FUA, NO_HOLE, REQ_ONE};
use crate::proto::options::BASE_ALLOCATION_ID;
use crate::proto::transmission::{
    Command, Request, put_block_status, put_chunk, put_data_chunk, put_error_chunk, put_hole_chunk,
    put_simple_reply,
};
use crate::proto::{Errno, transmission::chunk};

/// Extents in one block status reply at most; a client asks again for the rest.
pub(crate) const EXTENTS_MAX: usize = 8192;

static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// Checks a request against what the export offers; what passes may be given to the export.
pub(crate) fn check(request: &Request, session: &Session) -> Result<(), Error> {
    let features = session.info.features;
    let sizes = session.info.block_sizes;
    let invalid = |message: &str| Err(Error::new(Errno::Inval, message));

    let (offered, allowed_flags) = match request.command {
        Command::Read => (true, if session.structured { DF } else { 0 }),
        Command::Write => (true, 0),
        Command::Flush => (features.flush, 0),
        Command::Trim => (features.trim, 0),
        Command::Cache => (features.cache, 0),
        Command::WriteZeroes => {
            (features.write_zeroes, NO_HOLE | if features.fast_zero { FAST_ZERO } else { 0 })
        }
        Command::BlockStatus => (session.allocation, REQ_ONE),
        Command::Disconnect | Command::Unknown(_) => return invalid("unknown command"),
    };
    let changes = matches!(request.command, Command::Write | Command::Trim | Command::WriteZeroes);
    if changes && features.read_only {
        return Err(Error::new(Errno::Perm, "this export is read-only"));
    }
    if !offered {
        return invalid("this command was not offered for this export");
    }
    let allowed_flags = allowed_flags | if features.fua { FUA } else { 0 };
    if request.flags & !allowed_flags != 0 {
        return invalid("a command flag that was not offered for this command");
    }
    if request.command == Command::Flush {
        if request.offset != 0 || request.length != 0 {
            return invalid("a flush has neither offset nor length");
        }
        return Ok(());
    }
    if request.length == 0 {
        return invalid("a length of zero");
    }
    let minimum = u64::from(sizes.minimum);
    if !request.offset.is_multiple_of(minimum) || !u64::from(request.length).is_multiple_of(minimum)
    {
        return Err(Error::new(
            Errno::Inval,
            format!("offset and length must be multiples of {minimum} bytes"),
        ));
    }
    let end = request.offset.checked_add(u64::from(request.length));
    if end.is_none_or(|end| end > session.info.size) {
        let errno = match request.command {
            Command::Write | Command::WriteZeroes => Errno::NoSpc,
            _ => Errno::Inval,
        };
        return Err(Error::new(errno, "beyond the end of the export"));
    }
    let has_payload = matches!(request.command, Command::Read | Command::Write);
    if has_payload && request.length > sizes.maximum {
        let errno = if request.flags & DF != 0 { Errno::Overflow } else { Errno::Inval };
        return Err(Error::new(
            errno,
            format!("a payload may have at most {} bytes", sizes.maximum),
        ));
    }
    Ok(())
}

/// What a request costs of the connection's byte budget while it is under way.
pub(crate) fn charge(request: &Request) -> usize {
    match request.command {
        Command::Read | Command::Write => request.length as usize,
        Command::BlockStatus => EXTENTS_MAX * 8,
        _ => 0,
    }
}

/// A request that the export is working on.
pub(crate) struct Running {
    request: Request,
    charge: usize,
    call: Call,
}

enum Call {
    Read(Reply<Vec<Chunk>>),
    Status(Reply<Vec<Extent>>),
    Plain(Reply<()>),
}

/// A request that has ended, to be encoded.
pub(crate) struct Ended {
    pub(crate) request: Request,
    pub(crate) charge: usize,
    pub(crate) result: Result<Answer, Error>,
}

pub(crate) enum Answer {
    Data(Vec<Chunk>),
    Extents(Vec<Extent>),
    Done,
}

impl Running {
    /// Hands a checked request to the export. `payload` is a write's.
    pub(crate) fn call(
        request: Request,
        charge: usize,
        payload: Buffer,
        session: &Session,
    ) -> Self {
        let export: Arc<dyn Export> = Arc::clone(&session.opened.export);
        let (offset, length) = (request.offset, u64::from(request.length));
        let has = |flag| request.flags & flag != 0;
        let fua = has(FUA);
        let call = match request.command {
            Command::Read => Call::Read(export.read(offset, request.length)),
            Command::Write => Call::Plain(export.write(offset, payload, fua)),
            Command::Flush => Call::Plain(export.flush()),
            Command::Trim => Call::Plain(export.trim(offset, length, fua)),
            Command::Cache => Call::Plain(export.cache(offset, length)),
            Command::WriteZeroes => {
                let how = Zeroing { fua, no_hole: has(NO_HOLE), fast_only: has(FAST_ZERO) };
                Call::Plain(export.write_zeroes(offset, length, how))
            }
            Command::BlockStatus => Call::Status(export.block_status(offset, length, has(REQ_ONE))),
            Command::Disconnect | Command::Unknown(_) => {
                Call::Plain(Reply::error(Error::new(Errno::Inval, "unknown command")))
            }
        };
        Self { request, charge, call }
    }
}

impl Task for Running {
    type Output = Ended;

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        let result = match &mut self.call {
            Call::Read(reply) => Pin::new(reply).poll(cx).map_ok(Answer::Data),
            Call::Status(reply) => Pin::new(reply).poll(cx).map_ok(Answer::Extents),
            Call::Plain(reply) => Pin::new(reply).poll(cx).map_ok(|()| Answer::Done),
        };
        result.map(|result| Ended { request: self.request, charge: self.charge, result })
    }
}

impl Ended {
    /// Encodes the reply.
    pub(crate) fn encode(self, structured: bool, out: &mut OutQueue) {
        let Self { request, charge, result } = self;
        let cookie = request.cookie;
        let result = result.and_then(|answer| well_formed(&request, answer));
        match result {
            Err(error) => {
                let errno = permitted(error.errno, &request);
                tracing::debug!(?request, ?errno, error.message, "request failed");
                if structured {
                    put_error_chunk(out.head(), cookie, errno, &error.message);
                } else {
                    put_simple_reply(out.head(), cookie, Some(errno));
                }
            }
            Ok(Answer::Done) => put_simple_reply(out.head(), cookie, None),
            Ok(Answer::Extents(extents)) => {
                let extents = status(&request, &extents);
                put_block_status(out.head(), cookie, BASE_ALLOCATION_ID, extents.into_iter());
            }
            Ok(Answer::Data(chunks)) if !structured => {
                put_simple_reply(out.head(), cookie, None);
                chunks.into_iter().for_each(|piece| put_piece(piece, out));
            }
            Ok(Answer::Data(chunks)) if request.flags & DF != 0 && chunks.len() > 1 => {
                put_data_chunk(out.head(), true, cookie, request.offset, request.length);
                chunks.into_iter().for_each(|piece| put_piece(piece, out));
            }
            Ok(Answer::Data(chunks)) => put_chunks(&request, chunks, out),
        }
        out.end_reply(charge);
    }
}

/// An export's mistake must not lose the client its place in the stream.
fn well_formed(request: &Request, answer: Answer) -> Result<Answer, Error> {
    let fault = match &answer {
        Answer::Data(chunks) => {
            let sum: u64 = chunks.iter().map(Chunk::length).sum();
            (sum != u64::from(request.length) || chunks.iter().any(|chunk| chunk.length() == 0))
                .then_some("the export returned pieces that do not cover the read")
        }
        Answer::Extents(extents) => (extents.is_empty()
            || extents.iter().any(|extent| extent.length == 0))
        .then_some("the export returned no extent, or an empty one"),
        Answer::Done => None,
    };
    match fault {
        Some(message) => {
            tracing::error!(?request, message);
            Err(Error::new(Errno::Io, message))
        }
        None => Ok(answer),
    }
}

/// The protocol allows some errors for some commands only.
fn permitted(errno: Errno, request: &Request) -> Errno {
    let has_payload = matches!(request.command, Command::Read | Command::Write);
    match errno {
        Errno::Overflow if has_payload && request.flags & DF == 0 => Errno::Inval,
        Errno::NotSup
            if request.command != Command::WriteZeroes || request.flags & FAST_ZERO == 0 =>
        {
            Errno::Inval
        }
        errno => errno,
    }
}

fn put_chunks(request: &Request, chunks: Vec<Chunk>, out: &mut OutQueue) {
    let mut offset = request.offset;
    let last = chunks.len().saturating_sub(1);
    if chunks.is_empty() {
        put_chunk(out.head(), true, chunk::NONE, request.cookie, 0);
    }
    for (index, piece) in chunks.into_iter().enumerate() {
        let length = piece.length();
        let short = u32::try_from(length).unwrap_or(u32::MAX); // at most the request's length
        match piece {
            Chunk::Data(bytes) => {
                put_data_chunk(out.head(), index == last, request.cookie, offset, short);
                out.payload(bytes);
            }
            Chunk::Hole(_) => {
                put_hole_chunk(out.head(), index == last, request.cookie, offset, short);
            }
        }
        offset += length;
    }
}

fn put_piece(piece: Chunk, out: &mut OutQueue) {
    match piece {
        Chunk::Data(bytes) => out.payload(bytes),
        Chunk::Hole(length) => {
            let mut left = length as usize;
            while left > 0 {
                let count = left.min(ZEROS.len());
                out.payload(Bytes::from_static(ZEROS.get(..count).unwrap_or_default()));
                left -= count;
            }
        }
    }
}

/// Fits an export's extents to the rules: merged, bounded, the last one cut where asked.
fn status(request: &Request, extents: &[Extent]) -> Vec<(u32, u32)> {
    let wanted = u64::from(request.length);
    let mut merged: Vec<(u64, u32)> = Vec::new();
    let mut covered = 0;
    for extent in extents {
        let flags = u32::from(extent.hole) | u32::from(extent.zero) << 1;
        let full = covered >= wanted || merged.len() == EXTENTS_MAX;
        match merged.last_mut() {
            Some((length, last)) if *last == flags => *length += extent.length,
            _ if full => break,
            _ => merged.push((extent.length, flags)),
        }
        covered += extent.length;
    }
    // A wire length has 32 bits: an extent that does not fit ends the reply, cut to a round size.
    let one = request.flags & REQ_ONE != 0;
    let longest = if one { wanted } else { 0xffff_0000 };
    let mut out = Vec::with_capacity(merged.len());
    for (length, flags) in merged {
        out.push((u32::try_from(length.min(longest)).unwrap_or(u32::MAX), flags));
        if one || length > longest {
            break;
        }
    }
    out
}

impl Chunk {
    fn length(&self) -> u64 {
        match self {
            Self::Data(bytes) => bytes.len() as u64,
            Self::Hole(length) => u64::from(*length),
        }
    }
}
