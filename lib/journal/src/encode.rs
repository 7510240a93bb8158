//! Building frames.
//!
//! A [`FramePlan`] takes records one by one and knows at any time how many bytes their frame has at most, since chunks
//! are parted by their raw bytes. A [`FrameWriter`] puts the frame where it belongs, straight from where the payloads
//! lie. A [`FrameBuilder`] is both, for payloads that it has to keep itself. All of them keep their buffers for the next
//! frame, so that a busy encoder allocates nothing. A content record of at most one chunk is never split over two, so
//! that a small read unpacks one chunk.

mod builder;
mod plan;
mod shrink;

use zerocopy::IntoBytes;

use self::shrink::Shrinker;
pub use self::{
    builder::{EncodedFrame, FrameBuilder},
    plan::FramePlan,
    shrink::Compression,
};
use crate::{
    checksum::crc64,
    chunk::{ChunkEntry, Codec},
    frame::{FRAME_MAGIC, FRAME_VERSION, FrameHeader, HEADER_BYTES, meta_crc},
    ids::{GroupId, Position, TermId},
};

/// What a frame says of itself as a whole.
#[derive(Clone, Copy, Debug)]
pub struct FrameMeta {
    /// The group.
    pub group: GroupId,
    /// The writer's term.
    pub term: TermId,
    /// The position that the frame continues.
    pub before: Position,
    /// The source's wall clock at the first record, nanoseconds since 1970.
    pub wall_ns: i64,
}

/// Writes planned frames.
pub struct FrameWriter {
    shrinker: Shrinker,
    table: Vec<ChunkEntry>,
}

impl FrameWriter {
    /// One that compresses so.
    pub fn new(compression: Compression) -> FrameWriter {
        FrameWriter { shrinker: Shrinker::new(compression), table: Vec::new() }
    }

    /// Changes the compression from the next frame on.
    pub fn set_compression(&mut self, compression: Compression) {
        self.shrinker = Shrinker::new(compression);
    }

    /// The compression in force.
    pub fn compression(&self) -> Compression {
        self.shrinker.compression()
    }

    /// Writes the planned frame to the begin of `out`, and returns how many bytes it has. `payloads` are those of its
    /// records, one after the other, in pieces of any length.
    ///
    /// # Panics
    /// On an empty plan, a position before that is not below the first record, payloads of another length than was
    /// planned, or less room than [`FramePlan::frame_bytes_max`]: all of these are mistakes of the caller.
    pub fn write<'p>(
        &mut self,
        plan: &FramePlan,
        about: &FrameMeta,
        payloads: impl IntoIterator<Item = &'p [u8]>,
        out: &mut [u8],
    ) -> usize {
        let first = plan.first().expect("a frame holds at least one record");
        assert!(about.before.seq < first.seq, "a frame that does not go forward");
        let meta_bytes = plan.meta_bytes();
        let (meta, room) = out.split_at_mut(meta_bytes);
        let payload_bytes = self.write_payload(plan, payloads, room);
        let mut header = FrameHeader {
            magic: FRAME_MAGIC,
            version: FRAME_VERSION.into(),
            flags: 0.into(),
            meta_bytes: (meta_bytes as u32).into(),
            records: (plan.descriptors().len() as u32).into(),
            chunks: (self.table.len() as u32).into(),
            hash_bytes: 0.into(),
            payload_bytes: (payload_bytes as u64).into(),
            raw_bytes: plan.raw_bytes().into(),
            group: about.group.0,
            term: about.term.0,
            before_term: about.before.term.0,
            before_seq: about.before.seq.0.into(),
            first_seq: first.seq.0.into(),
            last_seq: plan.last_seq().0.into(),
            time_ns: first.time_ns.into(),
            wall_ns: about.wall_ns.into(),
            key_epoch: [0; 16],
            nonce: 0.into(),
            reserved: [0; 32],
            crc: 0.into(),
        };
        let descriptors = plan.descriptors().as_bytes();
        let table_at = HEADER_BYTES + descriptors.len();
        meta[..HEADER_BYTES].copy_from_slice(header.as_bytes());
        meta[HEADER_BYTES..table_at].copy_from_slice(descriptors);
        meta[table_at..].copy_from_slice(self.table.as_slice().as_bytes());
        header.crc = meta_crc(meta).into();
        meta[..HEADER_BYTES].copy_from_slice(header.as_bytes());
        meta_bytes + payload_bytes
    }

    /// Writes the chunks, enters them in the table, and returns how many bytes they have.
    fn write_payload<'p>(
        &mut self,
        plan: &FramePlan,
        payloads: impl IntoIterator<Item = &'p [u8]>,
        room: &mut [u8],
    ) -> usize {
        let (mut payloads, mut rest): (_, &[u8]) = (payloads.into_iter(), &[]);
        self.table.clear();
        let mut at = 0;
        for raw_bytes in plan.chunks() {
            let raw = &mut room[at..at + raw_bytes];
            let mut filled = 0;
            while filled < raw_bytes {
                if rest.is_empty() {
                    rest = payloads.next().expect("payloads as long as was planned");
                }
                let (head, tail) = rest.split_at(rest.len().min(raw_bytes - filled));
                raw[filled..filled + head.len()].copy_from_slice(head);
                (filled, rest) = (filled + head.len(), tail);
            }
            let (codec, stored_bytes) = match self.shrinker.shrink(raw) {
                Some(shrunk) => {
                    raw[..shrunk.len()].copy_from_slice(shrunk);
                    (Codec::Zstd, shrunk.len())
                }
                None => (Codec::Raw, raw_bytes),
            };
            self.table.push(ChunkEntry {
                raw_bytes: (raw_bytes as u32).into(),
                stored_bytes: (stored_bytes as u32).into(),
                codec: codec as u8,
                reserved: [0; 7],
                crc: crc64(&raw[..stored_bytes]).into(),
                tag: [0; 16],
            });
            at += stored_bytes;
        }
        let left = rest.len() + payloads.map(<[u8]>::len).sum::<usize>();
        assert_eq!(left, 0, "payloads longer than was planned");
        at
    }
}
