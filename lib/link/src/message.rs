//! The wire: what the two ends of a link say to each other.
//!
//! Each message is an [`Envelope`] of eight bytes and a body. What is said once per connection is
//! JSON, so that two versions can still explain to each other why they do not get along; what is
//! said all the time is a fixed structure; a frame is the journal's bytes, verbatim. After TLS the
//! source says [`Hello`] and the target answers [`Welcome`] or [`Refuse`]; then frames, heartbeats,
//! grants of leases and at last [`Message::Bye`] go one way, acknowledgements, echoes, needs, notices
//! and asks the other.

mod binary;
mod greeting;
mod lease;
mod repair;

use serde::{Serialize, de::DeserializeOwned};
use tidemark_journal::frame::FRAME_BYTES_MAX;
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32},
};

pub use binary::{Ack, AckFlags, Echo, Heartbeat, Need};
pub use greeting::{
    GroupHello, Hello, Notice, ProtocolRange, Refuse, RefuseCode, SENTENCE_CHARS_MAX, Severity,
    VolumeHello, VolumeSize, Welcome,
};
pub use lease::{LeaseAsk, LeaseGrant, SYNC_FEATURE};
pub use repair::{REPAIR_FEATURE, REPAIR_ROWS_MAX, RegionRun, Repair};

/// The newest protocol that this program speaks.
pub const PROTOCOL_MAX: u16 = 1;
/// The oldest protocol that this program speaks.
pub const PROTOCOL_MIN: u16 = 1;
/// The layout of the bodies described here.
pub const LAYOUT_VERSION: u16 = 1;
/// Bytes in an [`Envelope`].
pub const ENVELOPE_BYTES: usize = size_of::<Envelope>();

/// What stands before every body, 8 bytes.
///
/// The kind comes first, since it decides what the rest may be.
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 1 | kind, a [`MessageKind`] |
/// | 1 | 1 | flags, zero |
/// | 2 | 2 | version of the body's layout, 1 |
/// | 4 | 4 | bytes of the body, bounded by the kind |
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Envelope {
    kind: u8,
    flags: u8,
    version: U16,
    body_bytes: U32,
}

const _: () = assert!(ENVELOPE_BYTES == 8);

/// The kinds of messages.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum MessageKind {
    /// JSON [`Hello`], source to target.
    Hello = 1,
    /// JSON [`Welcome`], target to source.
    Welcome = 2,
    /// JSON [`Refuse`], either way.
    Refuse = 3,
    /// A frame's bytes, source to target.
    Frame = 4,
    /// [`Ack`], target to source.
    Ack = 5,
    /// [`Heartbeat`], source to target.
    Heartbeat = 6,
    /// [`Echo`], target to source.
    Echo = 7,
    /// [`Need`], target to source.
    Need = 8,
    /// JSON [`Notice`], target to source.
    Notice = 9,
    /// No body, either way.
    Bye = 10,
    /// [`Repair`], target to source, if both have [`REPAIR_FEATURE`].
    Repair = 11,
    /// [`LeaseAsk`], target to source, if both have [`SYNC_FEATURE`].
    LeaseAsk = 12,
    /// [`LeaseGrant`], source to target, for an ask.
    LeaseGrant = 13,
}

impl MessageKind {
    /// Every kind, in the order of their numbers.
    pub const ALL: [MessageKind; 13] = [
        MessageKind::Hello,
        MessageKind::Welcome,
        MessageKind::Refuse,
        MessageKind::Frame,
        MessageKind::Ack,
        MessageKind::Heartbeat,
        MessageKind::Echo,
        MessageKind::Need,
        MessageKind::Notice,
        MessageKind::Bye,
        MessageKind::Repair,
        MessageKind::LeaseAsk,
        MessageKind::LeaseGrant,
    ];

    /// The kind with this number, if there is one.
    pub fn from_u8(number: u8) -> Option<MessageKind> {
        MessageKind::ALL.get(usize::from(number).checked_sub(1)?).copied()
    }

    /// The fewest and the most bytes that a body of this kind has.
    pub fn body_bytes(self) -> (usize, usize) {
        let fixed = |bytes| (bytes, bytes);
        match self {
            MessageKind::Hello | MessageKind::Welcome => (2, 256 << 10),
            MessageKind::Refuse | MessageKind::Notice => (2, 16 << 10),
            MessageKind::Frame => (1, FRAME_BYTES_MAX),
            MessageKind::Ack => fixed(size_of::<binary::AckBody>()),
            MessageKind::Heartbeat => fixed(size_of::<binary::HeartbeatBody>()),
            MessageKind::Echo => fixed(size_of::<binary::EchoBody>()),
            MessageKind::Need => fixed(size_of::<binary::NeedBody>()),
            MessageKind::Bye => fixed(0),
            MessageKind::Repair => (repair::ROW_BYTES, REPAIR_ROWS_MAX * repair::ROW_BYTES),
            MessageKind::LeaseAsk => fixed(size_of::<lease::LeaseAskBody>()),
            MessageKind::LeaseGrant => fixed(size_of::<lease::LeaseGrantBody>()),
        }
    }
}

/// A message with its body.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Message {
    /// The source greets.
    Hello(Hello),
    /// The target takes the source on.
    Welcome(Welcome),
    /// Either end ends the connection and says why.
    Refuse(Refuse),
    /// A frame, not looked into.
    Frame(Vec<u8>),
    /// How far the target has come.
    Ack(Ack),
    /// The source is alive and vouches for what it has sent.
    Heartbeat(Heartbeat),
    /// The target has seen a heartbeat.
    Echo(Echo),
    /// What the target wants of an offer.
    Need(Need),
    /// The target has something to tell people at the source.
    Notice(Notice),
    /// A planned end.
    Bye,
    /// What the target has lost and wants to be compared afresh.
    Repair(Repair),
    /// The target asks for a zero-loss lease.
    LeaseAsk(LeaseAsk),
    /// The source grants it.
    LeaseGrant(LeaseGrant),
}

/// Why bytes are not a message. The connection is of no use after it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DecodeError {
    /// A kind that this version does not know.
    #[error("the peer sent a message of unknown kind {0}")]
    Kind(u8),
    /// Flags or a layout that this version does not know.
    #[error(
        "the peer sent a {kind:?} message of layout version {version} with flags {flags:#04x}; this program reads version {LAYOUT_VERSION} without flags"
    )]
    Layout {
        /// The kind.
        kind: MessageKind,
        /// Its layout's version.
        version: u16,
        /// Its flags.
        flags: u8,
    },
    /// A length that its kind cannot have.
    #[error("the peer sent a {kind:?} message of {bytes} bytes")]
    Length {
        /// The kind.
        kind: MessageKind,
        /// The length stated.
        bytes: usize,
    },
    /// A body that cannot be read or contradicts itself.
    #[error("the peer's {kind:?} message is refused: {why}")]
    Body {
        /// The kind.
        kind: MessageKind,
        /// What is wrong.
        why: String,
    },
}

/// A message that is too long to be sent; its parts are larger than what this program allows.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a {kind:?} message of {bytes} bytes is longer than {max} bytes")]
pub struct TooLong {
    /// The kind.
    pub kind: MessageKind,
    /// Its length.
    pub bytes: usize,
    /// The longest allowed.
    pub max: usize,
}

impl Envelope {
    /// The envelope of a body.
    ///
    /// # Errors
    /// [`TooLong`].
    pub fn new(kind: MessageKind, body_bytes: usize) -> Result<Envelope, TooLong> {
        let (_, max) = kind.body_bytes();
        let bytes = u32::try_from(body_bytes).ok().filter(|bytes| *bytes as usize <= max);
        let bytes = bytes.ok_or(TooLong { kind, bytes: body_bytes, max })?;
        Ok(Envelope {
            kind: kind as u8,
            flags: 0,
            version: LAYOUT_VERSION.into(),
            body_bytes: bytes.into(),
        })
    }

    /// Checks an envelope from the peer: its kind and the bytes of body that follow.
    ///
    /// # Errors
    /// Any [`DecodeError`] but that of a body.
    pub fn check(&self) -> Result<(MessageKind, usize), DecodeError> {
        let kind = MessageKind::from_u8(self.kind).ok_or(DecodeError::Kind(self.kind))?;
        let (version, flags) = (self.version.get(), self.flags);
        if version != LAYOUT_VERSION || flags != 0 {
            return Err(DecodeError::Layout { kind, version, flags });
        }
        let bytes = self.body_bytes.get() as usize;
        let (min, max) = kind.body_bytes();
        if bytes < min || bytes > max {
            return Err(DecodeError::Length { kind, bytes });
        }
        Ok((kind, bytes))
    }
}

impl Message {
    /// The kind.
    pub fn kind(&self) -> MessageKind {
        match self {
            Message::Hello(_) => MessageKind::Hello,
            Message::Welcome(_) => MessageKind::Welcome,
            Message::Refuse(_) => MessageKind::Refuse,
            Message::Frame(_) => MessageKind::Frame,
            Message::Ack(_) => MessageKind::Ack,
            Message::Heartbeat(_) => MessageKind::Heartbeat,
            Message::Echo(_) => MessageKind::Echo,
            Message::Need(_) => MessageKind::Need,
            Message::Notice(_) => MessageKind::Notice,
            Message::Bye => MessageKind::Bye,
            Message::Repair(_) => MessageKind::Repair,
            Message::LeaseAsk(_) => MessageKind::LeaseAsk,
            Message::LeaseGrant(_) => MessageKind::LeaseGrant,
        }
    }

    /// Appends envelope and body to `out`.
    ///
    /// # Errors
    /// [`TooLong`]; `out` is then as it was.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), TooLong> {
        let start = out.len();
        out.extend_from_slice(&[0; ENVELOPE_BYTES]);
        match self {
            Message::Hello(body) => json(body, out),
            Message::Welcome(body) => json(body, out),
            Message::Refuse(body) => json(body, out),
            Message::Notice(body) => json(body, out),
            Message::Frame(frame) => out.extend_from_slice(frame),
            Message::Ack(body) => out.extend_from_slice(binary::AckBody::from(body).as_bytes()),
            Message::Heartbeat(body) => {
                out.extend_from_slice(binary::HeartbeatBody::from(body).as_bytes());
            }
            Message::Echo(body) => out.extend_from_slice(binary::EchoBody::from(body).as_bytes()),
            Message::Need(body) => out.extend_from_slice(binary::NeedBody::from(body).as_bytes()),
            Message::Bye => {}
            Message::Repair(body) => body.encode(out),
            Message::LeaseAsk(body) => {
                out.extend_from_slice(lease::LeaseAskBody::from(body).as_bytes());
            }
            Message::LeaseGrant(body) => {
                out.extend_from_slice(lease::LeaseGrantBody::from(body).as_bytes());
            }
        }
        match Envelope::new(self.kind(), out.len() - start - ENVELOPE_BYTES) {
            Ok(envelope) => {
                out[start..start + ENVELOPE_BYTES].copy_from_slice(envelope.as_bytes());
                Ok(())
            }
            Err(error) => {
                out.truncate(start);
                Err(error)
            }
        }
    }

    /// Reads the body of a message of this kind.
    ///
    /// # Errors
    /// [`DecodeError::Length`] or [`DecodeError::Body`].
    pub fn decode(kind: MessageKind, body: Vec<u8>) -> Result<Message, DecodeError> {
        let (min, max) = kind.body_bytes();
        if body.len() < min || body.len() > max {
            return Err(DecodeError::Length { kind, bytes: body.len() });
        }
        let message = match kind {
            MessageKind::Hello => from_json(&body).and_then(Hello::checked).map(Message::Hello),
            MessageKind::Welcome => {
                from_json(&body).and_then(Welcome::checked).map(Message::Welcome)
            }
            MessageKind::Refuse => {
                from_json(&body).map(|body: Refuse| Message::Refuse(body.cleaned()))
            }
            MessageKind::Notice => {
                from_json(&body).map(|body: Notice| Message::Notice(body.cleaned()))
            }
            MessageKind::Frame => Ok(Message::Frame(body)),
            MessageKind::Ack => fixed::<binary::AckBody>(&body).checked().map(Message::Ack),
            MessageKind::Heartbeat => {
                fixed::<binary::HeartbeatBody>(&body).checked().map(Message::Heartbeat)
            }
            MessageKind::Echo => Ok(Message::Echo(fixed::<binary::EchoBody>(&body).into())),
            MessageKind::Need => fixed::<binary::NeedBody>(&body).checked().map(Message::Need),
            MessageKind::Bye => Ok(Message::Bye),
            MessageKind::Repair => Repair::decode(&body).map(Message::Repair),
            MessageKind::LeaseAsk => {
                Ok(Message::LeaseAsk(fixed::<lease::LeaseAskBody>(&body).into()))
            }
            MessageKind::LeaseGrant => {
                fixed::<lease::LeaseGrantBody>(&body).checked().map(Message::LeaseGrant)
            }
        };
        message.map_err(|why| DecodeError::Body { kind, why })
    }
}

fn json(body: &impl Serialize, out: &mut Vec<u8>) {
    // Strings, numbers and lists alone: neither the types nor a vector can fail.
    serde_json::to_writer(out, body).expect("plain data always has a JSON form");
}

fn from_json<T: DeserializeOwned>(body: &[u8]) -> Result<T, String> {
    serde_json::from_slice(body).map_err(|error| error.to_string())
}

/// The fixed structure in a body whose length has been checked.
fn fixed<T: FromBytes>(body: &[u8]) -> T {
    T::read_from_bytes(body).expect("the length was checked against the structure's")
}

/// Puts messages together from pieces of the stream, however they are cut.
#[derive(Debug)]
pub struct Decoder {
    envelope: [u8; ENVELOPE_BYTES],
    envelope_bytes: usize,
    body: Vec<u8>,
    want: Option<(MessageKind, usize)>,
    body_bytes_max: usize,
}

impl Default for Decoder {
    fn default() -> Decoder {
        Decoder::new()
    }
}

impl Decoder {
    /// A decoder at the start of a stream.
    pub fn new() -> Decoder {
        Decoder {
            envelope: [0; ENVELOPE_BYTES],
            envelope_bytes: 0,
            body: Vec::new(),
            want: None,
            body_bytes_max: usize::MAX,
        }
    }

    /// Refuses messages with a longer body than this from now on, whatever their kind allows.
    pub fn set_body_bytes_max(&mut self, most: usize) {
        self.body_bytes_max = most;
    }

    /// Takes bytes from the stream up to the end of the next message: how many were taken, and the
    /// message if it is complete. Call again with the rest. A body's memory grows as its bytes
    /// arrive, not by what the envelope claims.
    ///
    /// # Errors
    /// Any [`DecodeError`]; the stream cannot be read on.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(usize, Option<Message>), DecodeError> {
        let mut rest = bytes;
        let (kind, body_bytes) = match self.want {
            Some(want) => want,
            None => {
                let head = rest.split_off(..rest.len().min(ENVELOPE_BYTES - self.envelope_bytes));
                let head = head.unwrap_or_default();
                self.envelope[self.envelope_bytes..][..head.len()].copy_from_slice(head);
                self.envelope_bytes += head.len();
                if self.envelope_bytes < ENVELOPE_BYTES {
                    return Ok((bytes.len(), None));
                }
                let envelope: Envelope = zerocopy::transmute!(self.envelope);
                let (kind, bytes) = envelope.check()?;
                if bytes > self.body_bytes_max {
                    return Err(DecodeError::Length { kind, bytes });
                }
                *self.want.insert((kind, bytes))
            }
        };
        let part = rest.split_off(..rest.len().min(body_bytes - self.body.len()));
        let part = part.unwrap_or_default();
        if self.body.is_empty() {
            self.body.reserve_exact(body_bytes.min(BODY_STEP_BYTES));
        }
        for piece in part.chunks(COPY_BYTES) {
            self.body.extend_from_slice(piece);
        }
        if self.body.len() < body_bytes {
            return Ok((bytes.len() - rest.len(), None));
        }
        (self.envelope_bytes, self.want) = (0, None);
        let message = Message::decode(kind, std::mem::take(&mut self.body))?;
        Ok((bytes.len() - rest.len(), Some(message)))
    }

    /// Whether a message has begun and not ended.
    pub fn in_message(&self) -> bool {
        self.envelope_bytes > 0
    }
}

/// What is copied at once. More than about this, glibc copies by `rep movsb` on processors that call
/// it fast; AMD's are several times slower at it when source and destination lie alike in their
/// pages, as they do here. Measured: a quarter of the link's processor time.
const COPY_BYTES: usize = 2 << 10;

/// What is set aside for a body before any of it has come.
const BODY_STEP_BYTES: usize = 1 << 20;

#[cfg(test)]
mod tests;
