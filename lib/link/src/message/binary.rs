//! The bodies of a fixed structure.

use tidemark_journal::{Position, Seq, TermId};

use super::greeting::generation;
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{I64, U32, U64},
};

/// How far the records of a term and its past have come. Each sequence is the last such record;
/// zero means none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ack {
    /// The term at the end of the path on which the sequences lie.
    pub term: TermId,
    /// The next hop has received it.
    pub hop_received: Seq,
    /// The next hop has made it durable.
    pub hop_durable: Seq,
    /// The last hop has made it durable: only this frees or cleans anything at the source.
    pub final_durable: Seq,
    /// What keeps the target from going on.
    pub flags: AckFlags,
}

/// What keeps a target from going on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct AckFlags {
    /// It accepts nothing more until there is room on its disk.
    pub full: bool,
}

impl AckFlags {
    const FULL: u32 = 1;
}

/// The body of an [`Ack`], 48 bytes.
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 16 | term |
/// | 16 | 8 | sequence received by the next hop |
/// | 24 | 8 | sequence durable at the next hop |
/// | 32 | 8 | sequence durable at the last hop |
/// | 40 | 4 | flags: bit 0, the disk is full |
/// | 44 | 4 | reserved, zero |
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct AckBody {
    term: [u8; 16],
    hop_received: U64,
    hop_durable: U64,
    final_durable: U64,
    flags: U32,
    reserved: U32,
}

impl From<&Ack> for AckBody {
    fn from(ack: &Ack) -> AckBody {
        AckBody {
            term: ack.term.0,
            hop_received: ack.hop_received.0.into(),
            hop_durable: ack.hop_durable.0.into(),
            final_durable: ack.final_durable.0.into(),
            flags: (if ack.flags.full { AckFlags::FULL } else { 0 }).into(),
            reserved: 0.into(),
        }
    }
}

impl AckBody {
    pub(super) fn checked(self) -> Result<Ack, String> {
        let ack = Ack {
            term: TermId(self.term),
            hop_received: Seq(self.hop_received.get()),
            hop_durable: Seq(self.hop_durable.get()),
            final_durable: Seq(self.final_durable.get()),
            flags: AckFlags { full: self.flags.get() & AckFlags::FULL != 0 },
        };
        // A relay may pass on what it does not keep, so final may lie above its own durable.
        if ack.hop_durable > ack.hop_received || ack.final_durable > ack.hop_received {
            return Err("it calls durable what was not received".into());
        }
        possible(ack.hop_received)?;
        if self.flags.get() & !AckFlags::FULL != 0 {
            return Err("it has unknown flags".into());
        }
        Ok(ack)
    }
}

/// The source is alive, and what it has sent is all there was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Heartbeat {
    /// Counts up from 1 on each connection; its echo carries the same.
    pub number: u64,
    /// Journal time of sending, nanoseconds.
    pub journal_ns: u64,
    /// The source's wall clock at that time, nanoseconds since 1970.
    pub wall_ns: i64,
    /// Everything up to here has been sent, and nothing newer existed at `wall_ns`: the target may
    /// offer points up to that time.
    pub vouched: Position,
    /// Generation of the source's dirty map.
    pub map_generation: u64,
}

/// The body of a [`Heartbeat`], 56 bytes.
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 8 | number |
/// | 8 | 8 | journal time, nanoseconds |
/// | 16 | 8 | wall clock, nanoseconds since 1970 |
/// | 24 | 16 | term of the position vouched for |
/// | 40 | 8 | its sequence |
/// | 48 | 8 | generation of the dirty map |
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct HeartbeatBody {
    number: U64,
    journal_ns: U64,
    wall_ns: I64,
    vouched_term: [u8; 16],
    vouched_seq: U64,
    map_generation: U64,
}

impl From<&Heartbeat> for HeartbeatBody {
    fn from(heartbeat: &Heartbeat) -> HeartbeatBody {
        HeartbeatBody {
            number: heartbeat.number.into(),
            journal_ns: heartbeat.journal_ns.into(),
            wall_ns: heartbeat.wall_ns.into(),
            vouched_term: heartbeat.vouched.term.0,
            vouched_seq: heartbeat.vouched.seq.0.into(),
            map_generation: heartbeat.map_generation.into(),
        }
    }
}

impl HeartbeatBody {
    pub(super) fn checked(self) -> Result<Heartbeat, String> {
        let seq = possible(Seq(self.vouched_seq.get()))?;
        Ok(Heartbeat {
            number: self.number.get(),
            journal_ns: self.journal_ns.get(),
            wall_ns: self.wall_ns.get(),
            vouched: Position { term: TermId(self.vouched_term), seq },
            map_generation: generation(self.map_generation.get())?,
        })
    }
}

/// The target has received a heartbeat and everything before it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Echo {
    /// The heartbeat's number.
    pub number: u64,
    /// The target's wall clock when it came, nanoseconds since 1970; against the heartbeat's it
    /// shows the difference of the clocks.
    pub received_wall_ns: i64,
}

/// The body of an [`Echo`], 16 bytes.
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 8 | number of the heartbeat |
/// | 8 | 8 | the target's wall clock, nanoseconds since 1970 |
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct EchoBody {
    number: U64,
    received_wall_ns: I64,
}

impl From<&Echo> for EchoBody {
    fn from(echo: &Echo) -> EchoBody {
        EchoBody { number: echo.number.into(), received_wall_ns: echo.received_wall_ns.into() }
    }
}

impl From<EchoBody> for Echo {
    fn from(body: EchoBody) -> Echo {
        Echo { number: body.number.get(), received_wall_ns: body.received_wall_ns.get() }
    }
}

/// Which blocks of an offer the target wants to be sent. No block wanted means that all are equal.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Need {
    /// The offer's sequence.
    pub seq: Seq,
    /// One bit for each 4 KiB of the offer, the first in the lowest bit of the first byte; set
    /// means "send it".
    pub blocks: [u8; 32],
}

impl Need {
    /// The most blocks in an offer.
    pub const BLOCKS_MAX: usize = 256;

    /// A need of nothing.
    pub fn nothing(seq: Seq) -> Need {
        Need { seq, blocks: [0; 32] }
    }

    /// Asks for a block, counted from the offer's start.
    ///
    /// # Panics
    /// When there is no such block: `block` must be below [`BLOCKS_MAX`](Self::BLOCKS_MAX).
    pub fn want(&mut self, block: usize) {
        self.blocks[block / 8] |= 1 << (block % 8);
    }

    /// Whether a block is wanted.
    pub fn wants(&self, block: usize) -> bool {
        self.blocks.get(block / 8).is_some_and(|byte| byte & (1 << (block % 8)) != 0)
    }

    /// Whether nothing is wanted.
    pub fn is_empty(&self) -> bool {
        self.blocks == [0; 32]
    }

    /// The blocks wanted, in their order.
    pub fn wanted(&self) -> impl Iterator<Item = usize> + '_ {
        (0..Need::BLOCKS_MAX).filter(|block| self.wants(*block))
    }
}

/// The body of a [`Need`], 40 bytes.
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 8 | sequence of the offer |
/// | 8 | 32 | a bit for each 4 KiB block, lowest first |
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct NeedBody {
    seq: U64,
    blocks: [u8; 32],
}

impl From<&Need> for NeedBody {
    fn from(need: &Need) -> NeedBody {
        NeedBody { seq: need.seq.0.into(), blocks: need.blocks }
    }
}

impl NeedBody {
    pub(super) fn checked(self) -> Result<Need, String> {
        Ok(Need { seq: possible(Seq(self.seq.get()))?, blocks: self.blocks })
    }
}

/// A sequence, if there can be such a one.
fn possible(seq: Seq) -> Result<Seq, String> {
    let sentence = || format!("its sequence {seq} is above the last there can be");
    (seq <= Seq::MAX).then_some(seq).ok_or_else(sentence)
}

const _: () = assert!(
    size_of::<AckBody>() == 48
        && size_of::<HeartbeatBody>() == 56
        && size_of::<EchoBody>() == 16
        && size_of::<NeedBody>() == 40
);
