//! The state block: what must be durable before sequences are used.

use tidemark_journal::{GroupId, Position, Seq, TermId, checksum::crc64};
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U64},
};

use super::COUNT_MAX;

/// Bytes of a block; the file holds two.
pub const STATE_BLOCK_BYTES: usize = 4096;
const MAGIC: [u8; 4] = *b"TMST";
const CLEAN: u16 = 1;

/// What a group remembers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GroupState {
    /// The group.
    pub group: GroupId,
    /// Id of the dirty map's files.
    pub map_id: [u8; 16],
    /// The term being written.
    pub term: TermId,
    /// Sequences up to here may have been used.
    pub ceiling: Seq,
    /// Journal times up to here may have been used, nanoseconds.
    pub time_ceiling_ns: u64,
    /// The last position known to be final-durable.
    pub acked: Position,
    /// Counts the writings of this state of which a target may have been told.
    pub generation: u64,
    /// Set by a clean stop: the last sequence used; everything is final-durable and flushed.
    pub clean: Option<Seq>,
    /// Id of the ring that holds what is not final-durable; another one is of an earlier life.
    pub ring: u64,
    /// Everything up to here is final-durable or lies in the spool, and the dirty map relies on
    /// that; zero if it relies on no spool.
    pub spooled: Position,
}

/// A state block, 136 bytes; the rest of 4096 is zeros. What identifies it comes first.
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 4 | magic `TMST` |
/// | 4 | 2 | version, 1 or 2 |
/// | 6 | 2 | flags: bit 0, cleanly stopped |
/// | 8 | 8 | counter: the higher of the two blocks counts |
/// | 16 | 16 | group |
/// | 32 | 16 | id of the dirty map |
/// | 48 | 16 | term |
/// | 64 | 8 | ceiling of sequences |
/// | 72 | 8 | ceiling of journal time, nanoseconds |
/// | 80 | 16 | term of the last final-durable position |
/// | 96 | 8 | its sequence |
/// | 104 | 8 | generation: counts the writings of this state of which a target may have been told |
/// | 112 | 8 | after a clean stop: last sequence used |
/// | 120 | 8 | id of the ring |
/// | 128 | 8 | CRC-64/NVME of the first 128 bytes |
///
/// If the map relies on a spool, the version is 2 and this follows:
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 136 | 16 | term of the position up to which it does |
/// | 152 | 8 | its sequence |
/// | 160 | 8 | CRC-64/NVME of the 24 bytes before |
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Block {
    magic: [u8; 4],
    version: U16,
    flags: U16,
    counter: U64,
    group: [u8; 16],
    map_id: [u8; 16],
    term: [u8; 16],
    ceiling: U64,
    time_ceiling_ns: U64,
    acked_term: [u8; 16],
    acked_seq: U64,
    generation: U64,
    last_seq: U64,
    ring: U64,
    crc: U64,
}

const _: () = assert!(size_of::<Block>() == 136);

/// What version 2 has behind the block.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct SpoolPart {
    term: [u8; 16],
    seq: U64,
    crc: U64,
}

const SPOOL_PART_CHECKED_BYTES: usize = 24;
const _: () = assert!(size_of::<SpoolPart>() == SPOOL_PART_CHECKED_BYTES + 8);

impl GroupState {
    /// The block for the `counter`-th writing.
    pub fn encode(&self, counter: u64) -> Vec<u8> {
        let mut block = Block {
            magic: MAGIC,
            version: if self.spooled.seq == Seq::ZERO { 1 } else { 2 }.into(),
            flags: self.clean.map_or(0, |_| CLEAN).into(),
            counter: counter.into(),
            group: self.group.0,
            map_id: self.map_id,
            term: self.term.0,
            ceiling: self.ceiling.0.into(),
            time_ceiling_ns: self.time_ceiling_ns.into(),
            acked_term: self.acked.term.0,
            acked_seq: self.acked.seq.0.into(),
            generation: self.generation.into(),
            last_seq: self.clean.map_or(0, |seq| seq.0).into(),
            ring: self.ring.into(),
            crc: 0.into(),
        };
        block.crc = crc64(&block.as_bytes()[..128]).into();
        let mut bytes = block.as_bytes().to_vec();
        if self.spooled.seq > Seq::ZERO {
            let Position { term, seq } = self.spooled;
            let mut part = SpoolPart { term: term.0, seq: seq.0.into(), crc: 0.into() };
            part.crc = crc64(&part.as_bytes()[..SPOOL_PART_CHECKED_BYTES]).into();
            bytes.extend_from_slice(part.as_bytes());
        }
        bytes.resize(STATE_BLOCK_BYTES, 0);
        bytes
    }

    /// Reads a block: its counter and content. None if it is damaged, of another version, or has a
    /// number that no group comes to.
    pub fn decode(bytes: &[u8]) -> Option<(u64, GroupState)> {
        let (block, rest) = Block::ref_from_prefix(bytes).ok()?;
        let spooled = match block.version.get() {
            1 => Position::default(),
            2 => SpoolPart::decode(rest)?,
            _ => return None,
        };
        let numbers = [
            block.counter,
            block.ceiling,
            block.time_ceiling_ns,
            block.acked_seq,
            block.generation,
            block.last_seq,
            spooled.seq.0.into(),
        ];
        let sound = block.magic == MAGIC
            && crc64(&block.as_bytes()[..128]) == block.crc.get()
            && numbers.iter().all(|number| number.get() <= COUNT_MAX);
        sound.then(|| {
            let acked_seq = Seq(block.acked_seq.get());
            let state = GroupState {
                group: GroupId(block.group),
                map_id: block.map_id,
                term: TermId(block.term),
                ceiling: Seq(block.ceiling.get()),
                time_ceiling_ns: block.time_ceiling_ns.get(),
                acked: Position { term: TermId(block.acked_term), seq: acked_seq },
                generation: block.generation.get(),
                clean: (block.flags.get() & CLEAN != 0).then_some(Seq(block.last_seq.get())),
                ring: block.ring.get(),
                spooled,
            };
            (block.counter.get(), state)
        })
    }
}

impl SpoolPart {
    fn decode(bytes: &[u8]) -> Option<Position> {
        let (part, _) = SpoolPart::ref_from_prefix(bytes).ok()?;
        let sound = crc64(&part.as_bytes()[..SPOOL_PART_CHECKED_BYTES]) == part.crc.get();
        sound.then(|| Position { term: TermId(part.term), seq: Seq(part.seq.get()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> GroupState {
        GroupState {
            group: GroupId([1; 16]),
            map_id: [2; 16],
            term: TermId([3; 16]),
            ceiling: Seq(4),
            time_ceiling_ns: 5,
            acked: Position { term: TermId([6; 16]), seq: Seq(7) },
            generation: 8,
            clean: Some(Seq(9)),
            ring: 11,
            spooled: Position::default(),
        }
    }

    #[test]
    fn golden_bytes_of_what_a_spool_adds() {
        let spooled = Position { term: TermId([12; 16]), seq: Seq(13) };
        let state = GroupState { spooled, ..state() };
        let bytes = state.encode(10);
        assert_eq!(bytes[4..6], [2, 0]);
        assert_eq!(bytes[136..152], [12; 16]);
        assert_eq!(bytes[152..160], 13u64.to_le_bytes());
        assert_eq!(bytes[160..168], crc64(&bytes[136..160]).to_le_bytes());
        assert_eq!(GroupState::decode(&bytes), Some((10, state)));
        for at in 136..168 {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x40;
            assert_eq!(GroupState::decode(&damaged), None, "byte {at}");
        }
    }

    #[test]
    fn golden_bytes() {
        let bytes = state().encode(10);
        let hex: String = bytes[..128].iter().map(|byte| format!("{byte:02x}")).collect();
        let expected = [
            "544d535401000100",
            "0a00000000000000",
            &"01".repeat(16),
            &"02".repeat(16),
            &"03".repeat(16),
            "0400000000000000",
            "0500000000000000",
            &"06".repeat(16),
            "0700000000000000",
            "0800000000000000",
            "0900000000000000",
            "0b00000000000000",
        ];
        assert_eq!(hex, expected.concat());
        assert_eq!(bytes[128..136], crc64(&bytes[..128]).to_le_bytes());
        assert_eq!(GroupState::decode(&bytes), Some((10, state())));
    }

    /// A block that named the highest ceiling of 64 bits had the next term begin at sequence 0, in a
    /// release build, where sums wrap: below all that the replica has.
    #[test]
    fn a_number_that_cannot_be_counted_on_from_is_refused() {
        let spooled = Position { term: TermId([12; 16]), seq: Seq(13) };
        let good = GroupState { spooled, ..state() }.encode(10);
        let seal = |mut bytes: Vec<u8>| {
            let (block, spool) = (crc64(&bytes[..128]), crc64(&bytes[136..160]));
            bytes[128..136].copy_from_slice(&block.to_le_bytes());
            bytes[160..168].copy_from_slice(&spool.to_le_bytes());
            bytes
        };
        for at in [8, 64, 72, 96, 104, 112, 152] {
            for (number, taken) in [(COUNT_MAX, true), (COUNT_MAX + 1, false), (u64::MAX, false)] {
                let mut bytes = good.clone();
                bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
                let read = GroupState::decode(&seal(bytes)).is_some();
                assert_eq!(read, taken, "{number:#x} at byte {at}");
            }
        }
    }

    #[test]
    fn any_flipped_byte_is_noticed() {
        let bytes = state().encode(10);
        for at in 0..136 {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x40;
            assert_eq!(GroupState::decode(&damaged), None, "byte {at}");
        }
        assert_eq!(GroupState::decode(&bytes[..100]), None);
    }
}
