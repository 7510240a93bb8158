//! Records: the events of a group's order, and their 32-byte descriptors.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

use crate::ids::{SECTOR_BYTES, Sector, Seq, VolumeId};

/// Bytes of content that one hash of an offer stands for.
pub const OFFER_BLOCK_BYTES: u64 = 4096;
/// Bytes of one hash in an offer: the first half of a BLAKE3 hash.
pub const OFFER_HASH_BYTES: usize = 16;
/// The longest content of one record. Content records never cross a multiple of it.
pub const RECORD_BYTES_MAX: u64 = 1 << 20;
/// The longest name of a mark in bytes.
pub const MARK_NAME_BYTES_MAX: usize = 255;
/// Bytes before the name in a mark's payload: an id shared by marks of several groups, or zeros.
pub const MARK_ID_BYTES: usize = 16;

/// What a record says happened.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Kind {
    /// A write by the application; the payload is its content.
    Write = 1,
    /// The range reads as zeros from here on.
    Zero = 2,
    /// The range was given up by the application; it reads as zeros.
    Discard = 3,
    /// The application asked for all earlier writes to be durable.
    Flush = 4,
    /// A named point.
    Mark = 5,
    /// The volume has a new size: `start` is its number of sectors.
    Resize = 6,
    /// Content read off the disk at this sequence (flag [`flag::ZEROS`]: all of it is zeros).
    Sync = 7,
    /// Hashes of the disk's content at this sequence, one for each 4 KiB.
    Offer = 8,
    /// From here on the write order of the volume is not captured.
    GapBegin = 9,
    /// From here on the volume is whole and its write order captured again.
    GapEnd = 10,
    /// The range could not be read from the source's disk.
    Unreadable = 11,
    /// A sequence that was drawn and never used.
    Void = 12,
}

impl Kind {
    /// Every kind, in the order of their numbers.
    pub const ALL: [Kind; 12] = [
        Kind::Write,
        Kind::Zero,
        Kind::Discard,
        Kind::Flush,
        Kind::Mark,
        Kind::Resize,
        Kind::Sync,
        Kind::Offer,
        Kind::GapBegin,
        Kind::GapEnd,
        Kind::Unreadable,
        Kind::Void,
    ];

    /// The kind with this number, if there is one.
    pub fn from_u8(number: u8) -> Option<Kind> {
        Kind::ALL.get(usize::from(number).checked_sub(1)?).copied()
    }

    /// The word for people.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Write => "write",
            Kind::Zero => "zero",
            Kind::Discard => "discard",
            Kind::Flush => "flush",
            Kind::Mark => "mark",
            Kind::Resize => "resize",
            Kind::Sync => "sync",
            Kind::Offer => "offer",
            Kind::GapBegin => "gap-begin",
            Kind::GapEnd => "gap-end",
            Kind::Unreadable => "unreadable",
            Kind::Void => "void",
        }
    }

    /// Whether the record changes what the volume reads as.
    pub fn changes_content(self) -> bool {
        matches!(self, Kind::Write | Kind::Zero | Kind::Discard | Kind::Sync)
    }

    /// Whether the record names a range of the volume by `start` and `sectors`.
    pub fn has_range(self) -> bool {
        self.changes_content() || matches!(self, Kind::Offer | Kind::Unreadable)
    }
}

/// Bits of [`Record::flags`].
pub mod flag {
    /// On a write: it was to be durable before its acknowledgement.
    pub const FUA: u8 = 1;
    /// On a sync: the range is all zeros and there is no payload.
    pub const ZEROS: u8 = 2;
    /// On a discard or zero: the source's disk unmapped the range.
    pub const UNMAP: u8 = 4;
}

/// Why a gap began: the `flags` of a gap-begin.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum GapReason {
    /// The volume is sent for the first time.
    FirstSync = 1,
    /// The ring was full.
    Overflow = 2,
    /// The source stopped without being able to say what was on its way.
    Crash = 3,
    /// The two sides' memories disagree, so everything is compared.
    Doubt = 4,
}

impl GapReason {
    /// The reason with this number, if there is one.
    pub fn from_u8(number: u8) -> Option<GapReason> {
        [GapReason::FirstSync, GapReason::Overflow, GapReason::Crash, GapReason::Doubt]
            .into_iter()
            .find(|reason| *reason as u8 == number)
    }

    /// A short clause for people.
    pub fn describe(self) -> &'static str {
        match self {
            GapReason::FirstSync => "the volume is being sent for the first time",
            GapReason::Overflow => "writes came faster than they could be sent",
            GapReason::Crash => "the source stopped unexpectedly",
            GapReason::Doubt => "the two sides' records disagreed and everything is compared",
        }
    }
}

/// One event of a group's order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Record {
    /// What happened.
    pub kind: Kind,
    /// Bits of [`flag`]; on a gap-begin, a [`GapReason`].
    pub flags: u8,
    /// The volume concerned; zero on a mark.
    pub volume: VolumeId,
    /// The place in the order.
    pub seq: Seq,
    /// Journal time in nanoseconds: monotone along a path of terms.
    pub time_ns: u64,
    /// First sector of the range; on a resize, the new number of sectors.
    pub start: Sector,
    /// Sectors in the range; on a mark, the bytes of its payload.
    pub sectors: u32,
}

impl Record {
    /// The bytes of payload that belong to this record.
    pub fn payload_bytes(&self) -> u64 {
        match self.kind {
            Kind::Write => u64::from(self.sectors) * SECTOR_BYTES,
            Kind::Sync if self.flags & flag::ZEROS == 0 => u64::from(self.sectors) * SECTOR_BYTES,
            Kind::Offer => {
                let bytes = u64::from(self.sectors) * SECTOR_BYTES;
                bytes.div_ceil(OFFER_BLOCK_BYTES) * OFFER_HASH_BYTES as u64
            }
            Kind::Mark => u64::from(self.sectors),
            _ => 0,
        }
    }

    /// The sector after the range.
    pub fn end(&self) -> Sector {
        Sector(self.start.0 + u64::from(self.sectors))
    }

    /// Whether the fields agree with each other, or the sentence that says why not.
    pub fn check(&self) -> Result<(), &'static str> {
        if self.kind.has_range() {
            if self.sectors == 0 {
                return Err("a range of no sectors");
            }
            if self.start.0.checked_add(u64::from(self.sectors)).is_none_or(|end| end > 1 << 48) {
                return Err("a range beyond 2^48 sectors");
            }
        }
        match self.kind {
            Kind::Write | Kind::Sync | Kind::Offer if self.payload_bytes() > 0 => {
                let region = RECORD_BYTES_MAX / SECTOR_BYTES;
                if self.start.0 / region != (self.end().0 - 1) / region {
                    return Err("content that crosses a multiple of 1 MiB");
                }
            }
            Kind::Mark => {
                let bytes = self.sectors as usize;
                if !(MARK_ID_BYTES + 1..=MARK_ID_BYTES + MARK_NAME_BYTES_MAX).contains(&bytes) {
                    return Err("a mark whose name is empty or longer than 255 bytes");
                }
            }
            Kind::Resize if self.start.0 == 0 || self.start.0 > 1 << 48 => {
                return Err("a resize to nothing or beyond 2^48 sectors");
            }
            Kind::GapBegin if GapReason::from_u8(self.flags).is_none() => {
                return Err("a gap without a known reason");
            }
            _ => {}
        }
        Ok(())
    }
}

/// A record's descriptor inside a frame, 32 bytes.
///
/// `kind` and `flags` come first so that a hex dump reads well; what a lookup compares (volume,
/// start) is naturally aligned inside the 32 bytes, which themselves start at a multiple of 32
/// from the header's end.
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 1 | kind |
/// | 1 | 1 | flags |
/// | 2 | 2 | volume |
/// | 4 | 4 | sequence less the frame's first |
/// | 8 | 4 | journal time less the frame's, in microseconds, rounded down |
/// | 12 | 4 | sectors (a mark: bytes of payload) |
/// | 16 | 8 | first sector (a resize: the new number of sectors) |
/// | 24 | 4 | chunk in which the payload begins (no payload: 0) |
/// | 28 | 4 | byte in that chunk's raw content where it begins (no payload: 0) |
///
/// A payload that does not end in its first chunk goes on at the start of the next.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Descriptor {
    /// Number of a [`Kind`].
    pub kind: u8,
    /// Bits of [`flag`].
    pub flags: u8,
    /// Volume number.
    pub volume: U16,
    /// Sequence less the frame's first.
    pub seq_delta: U32,
    /// Microseconds after the frame's time.
    pub time_delta_us: U32,
    /// Sectors, or a mark's bytes.
    pub sectors: U32,
    /// First sector.
    pub start: U64,
    /// Chunk of the payload's first byte.
    pub chunk: U32,
    /// Its place in that chunk.
    pub chunk_offset: U32,
}

impl Descriptor {
    /// That of a record in a frame that begins with `first`, whose payload begins at a byte of a chunk (zeros without one).
    pub(crate) fn of(record: &Record, first: &Record, chunk: usize, offset: usize) -> Descriptor {
        Descriptor {
            kind: record.kind as u8,
            flags: record.flags,
            volume: record.volume.0.into(),
            seq_delta: ((record.seq.0 - first.seq.0) as u32).into(),
            time_delta_us: ((record.time_ns.saturating_sub(first.time_ns) / 1000) as u32).into(),
            sectors: record.sectors.into(),
            start: record.start.0.into(),
            chunk: (chunk as u32).into(),
            chunk_offset: (offset as u32).into(),
        }
    }
}

const _: () = assert!(size_of::<Descriptor>() == 32);
