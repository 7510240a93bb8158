//! Segments: files of frames.
//!
//! ```text
//! header block (4096) | frame frame .. pad | frame .. pad | ... | index | trailer block (4096)
//! ```
//!
//! Frames are appended in batches; each batch begins at a multiple of 4096 and is filled up with
//! zeros to the next one, so that a batch is written with direct I/O and never rewrites a block that
//! an earlier batch made durable. A sealed segment goes on with an index (opaque here; its reader
//! defines it) and ends with a trailer block. The trailer holds the BLAKE3 hash of everything before
//! the index, chained to the segment before, so that no segment can be exchanged or left out
//! unnoticed.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{I64, U64},
};

use crate::{
    checksum::crc64,
    frame::{FrameError, FrameHeader, FrameView, HEADER_BYTES},
    ids::{GroupId, Position, Seq, TermId},
};

/// The unit of layout, writing and alignment.
pub const BLOCK_BYTES: u64 = 4096;
/// First bytes of a segment.
pub const SEGMENT_MAGIC: [u8; 8] = *b"TMSEG\0\0\x01";
/// First bytes of a sealed segment's trailer.
pub const TRAILER_MAGIC: [u8; 8] = *b"TMSEAL\0\x01";

/// The header at the start of a segment, 160 bytes; the rest of its block is zeros.
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 8 | magic `TMSEG` 0 0, version 1 |
/// | 8 | 8 | number of the segment in its journal, from 0 |
/// | 16 | 16 | group |
/// | 32 | 16 | term of the position before the first frame |
/// | 48 | 8 | its sequence |
/// | 56 | 8 | wall clock at creation, nanoseconds since 1970 |
/// | 64 | 32 | chain hash of the segment before, zero for the first |
/// | 96 | 56 | reserved, zero |
/// | 152 | 8 | CRC-64/NVME of the first 152 bytes |
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SegmentHeader {
    magic: [u8; 8],
    number: U64,
    group: [u8; 16],
    before_term: [u8; 16],
    before_seq: U64,
    created_ns: I64,
    chain_before: [u8; 32],
    reserved: [u8; 56],
    crc: U64,
}

/// The trailer at the end of a sealed segment, 192 bytes; the rest of its block is zeros.
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 8 | magic `TMSEAL` 0, version 1 |
/// | 8 | 8 | number of the segment |
/// | 16 | 8 | byte at which the frames end and the index begins |
/// | 24 | 8 | bytes of the index |
/// | 32 | 16 | term of the last position |
/// | 48 | 8 | its sequence |
/// | 56 | 32 | BLAKE3 of the bytes before the index |
/// | 88 | 32 | chain hash: BLAKE3 of the chain hash before and the hash above |
/// | 120 | 8 | CRC-64/NVME of the index |
/// | 128 | 56 | reserved, zero |
/// | 184 | 8 | CRC-64/NVME of the first 184 bytes |
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SegmentTrailer {
    magic: [u8; 8],
    number: U64,
    index_at: U64,
    index_bytes: U64,
    last_term: [u8; 16],
    last_seq: U64,
    data_hash: [u8; 32],
    chain: [u8; 32],
    index_crc: U64,
    reserved: [u8; 56],
    crc: U64,
}

const _: () = assert!(size_of::<SegmentHeader>() == 160 && size_of::<SegmentTrailer>() == 192);

/// Why bytes are not a segment's header or trailer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SegmentError {
    /// Too short, or other first bytes.
    #[error("these bytes are not the {0} of a segment")]
    Magic(&'static str),
    /// Not what was written.
    #[error("the checksum of the segment's {0} does not match its bytes")]
    Checksum(&'static str),
    /// Something that no segment can say.
    #[error("the segment's {0} names a sequence above the last there can be")]
    Sequence(&'static str),
}

/// What a segment's header says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentStart {
    /// Place in the journal, from 0.
    pub number: u64,
    /// The group.
    pub group: GroupId,
    /// The position before the first frame.
    pub before: Position,
    /// Wall clock at creation, nanoseconds since 1970.
    pub created_ns: i64,
    /// Chain hash of the segment before.
    pub chain_before: [u8; 32],
}

/// What a sealed segment's trailer says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentEnd {
    /// Place in the journal, from 0.
    pub number: u64,
    /// Byte at which the frames end and the index begins.
    pub index_at: u64,
    /// Bytes of the index.
    pub index_bytes: u64,
    /// The position at the segment's end.
    pub last: Position,
    /// BLAKE3 of the bytes before the index.
    pub data_hash: [u8; 32],
    /// The chain hash after this segment.
    pub chain: [u8; 32],
    /// CRC-64/NVME of the index.
    pub index_crc: u64,
}

impl SegmentStart {
    /// The header block.
    pub fn encode(&self) -> Vec<u8> {
        let mut header = SegmentHeader {
            magic: SEGMENT_MAGIC,
            number: self.number.into(),
            group: self.group.0,
            before_term: self.before.term.0,
            before_seq: self.before.seq.0.into(),
            created_ns: self.created_ns.into(),
            chain_before: self.chain_before,
            reserved: [0; 56],
            crc: 0.into(),
        };
        header.crc = crc64(&header.as_bytes()[..152]).into();
        block(header.as_bytes())
    }

    /// Reads a header block.
    ///
    /// # Errors
    /// [`SegmentError`].
    pub fn decode(bytes: &[u8]) -> Result<SegmentStart, SegmentError> {
        const WHAT: &str = "header";
        let (header, _) =
            SegmentHeader::ref_from_prefix(bytes).map_err(|_| SegmentError::Magic(WHAT))?;
        if header.magic != SEGMENT_MAGIC {
            return Err(SegmentError::Magic(WHAT));
        }
        if crc64(&header.as_bytes()[..152]) != header.crc.get() {
            return Err(SegmentError::Checksum(WHAT));
        }
        if header.before_seq.get() > Seq::MAX.0 {
            return Err(SegmentError::Sequence(WHAT));
        }
        Ok(SegmentStart {
            number: header.number.get(),
            group: GroupId(header.group),
            before: Position {
                term: TermId(header.before_term),
                seq: Seq(header.before_seq.get()),
            },
            created_ns: header.created_ns.get(),
            chain_before: header.chain_before,
        })
    }
}

impl SegmentEnd {
    /// The chain hash that follows from the one before and a segment's data hash.
    pub fn chain_hash(chain_before: &[u8; 32], data_hash: &[u8; 32]) -> [u8; 32] {
        *blake3::Hasher::new().update(chain_before).update(data_hash).finalize().as_bytes()
    }

    /// The trailer block.
    pub fn encode(&self) -> Vec<u8> {
        let mut trailer = SegmentTrailer {
            magic: TRAILER_MAGIC,
            number: self.number.into(),
            index_at: self.index_at.into(),
            index_bytes: self.index_bytes.into(),
            last_term: self.last.term.0,
            last_seq: self.last.seq.0.into(),
            data_hash: self.data_hash,
            chain: self.chain,
            index_crc: self.index_crc.into(),
            reserved: [0; 56],
            crc: 0.into(),
        };
        trailer.crc = crc64(&trailer.as_bytes()[..184]).into();
        block(trailer.as_bytes())
    }

    /// Reads a trailer block: the last 4096 bytes of a sealed segment.
    ///
    /// # Errors
    /// [`SegmentError`].
    pub fn decode(bytes: &[u8]) -> Result<SegmentEnd, SegmentError> {
        const WHAT: &str = "trailer";
        let (trailer, _) =
            SegmentTrailer::ref_from_prefix(bytes).map_err(|_| SegmentError::Magic(WHAT))?;
        if trailer.magic != TRAILER_MAGIC {
            return Err(SegmentError::Magic(WHAT));
        }
        if crc64(&trailer.as_bytes()[..184]) != trailer.crc.get() {
            return Err(SegmentError::Checksum(WHAT));
        }
        if trailer.last_seq.get() > Seq::MAX.0 {
            return Err(SegmentError::Sequence(WHAT));
        }
        Ok(SegmentEnd {
            number: trailer.number.get(),
            index_at: trailer.index_at.get(),
            index_bytes: trailer.index_bytes.get(),
            last: Position { term: TermId(trailer.last_term), seq: Seq(trailer.last_seq.get()) },
            data_hash: trailer.data_hash,
            chain: trailer.chain,
            index_crc: trailer.index_crc.get(),
        })
    }
}

fn block(bytes: &[u8]) -> Vec<u8> {
    let mut block = bytes.to_vec();
    block.resize(BLOCK_BYTES as usize, 0);
    block
}

/// Zeros to add after `bytes` bytes so that the next batch begins at a multiple of 4096.
pub fn padding(bytes: u64) -> u64 {
    bytes.next_multiple_of(BLOCK_BYTES) - bytes
}

/// What stands at an offset among a segment's frames.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Next {
    /// A frame of so many bytes begins here (its lengths are plausible; it is not checked yet).
    Frame(usize),
    /// The batch ends here; look again at the next multiple of 4096, which is this offset.
    Pad(u64),
    /// No frame: the end of what was written, or damage (the reason says which it looks like).
    End(FrameError),
}

/// Says what stands at `offset` of a segment, given the bytes there (at least a header's worth,
/// unless the file ends before).
pub fn next(offset: u64, bytes: &[u8]) -> Next {
    match FrameHeader::peek(bytes) {
        Ok(header) => Next::Frame(header.frame_bytes()),
        Err(error) => {
            let pad = padding(offset);
            let rest = bytes.get(..(pad as usize).min(HEADER_BYTES)).unwrap_or(bytes);
            if pad > 0 && rest.iter().all(|byte| *byte == 0) {
                Next::Pad(offset + pad)
            } else {
                Next::End(error)
            }
        }
    }
}

/// Walks over the frames of a segment that is wholly in memory, from just after its header block.
/// Yields each frame's offset and view; ends with the error where no further frame stands. For
/// tools and tests.
pub fn frames(segment: &[u8]) -> impl Iterator<Item = (u64, Result<FrameView<'_>, FrameError>)> {
    let mut offset = BLOCK_BYTES;
    let mut done = false;
    std::iter::from_fn(move || {
        while !done {
            let bytes = segment.get(offset as usize..).unwrap_or_default();
            match next(offset, bytes) {
                Next::Pad(further) => offset = further,
                Next::Frame(frame_bytes) => {
                    let at = offset;
                    offset += frame_bytes as u64;
                    let view = FrameView::parse(bytes);
                    done = view.is_err();
                    return Some((at, view));
                }
                Next::End(error) => {
                    done = true;
                    let clean = bytes.iter().take(BLOCK_BYTES as usize).all(|byte| *byte == 0);
                    return (!clean).then_some((offset, Err(error)));
                }
            }
        }
        None
    })
}
