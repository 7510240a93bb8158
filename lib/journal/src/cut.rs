//! Shortening a frame, for a resume at a position in its middle.

use zerocopy::IntoBytes;

use crate::{
    chunk::ChunkEntry,
    frame::{FrameView, HEADER_BYTES, meta_crc},
    ids::{Position, Seq, TermId},
    record::Descriptor,
};

/// The part of a frame after the record `after`, as a frame of its own, or `None` when nothing is
/// left. The chunks still needed are carried over verbatim; their checksums stay as they were.
///
/// A frame that begins after `after` comes back as it is.
pub fn tail(frame: &FrameView<'_>, after: Seq) -> Option<Vec<u8>> {
    let records: Vec<_> = frame.records().collect();
    let skip = records.partition_point(|record| record.seq <= after);
    let first = records.get(skip)?;
    if skip == 0 {
        return Some(frame.bytes().to_vec());
    }
    let old = frame.header();
    let needed: Vec<usize> =
        (skip..records.len()).flat_map(|index| frame.pieces(index)).map(|p| p.chunk).collect();
    let first_chunk = needed.iter().min().copied();
    let kept_from = first_chunk.unwrap_or(frame.table().len());
    let table: &[ChunkEntry] = &frame.table()[kept_from..];
    let sum =
        |field: fn(&ChunkEntry) -> u32| table.iter().map(|e| u64::from(field(e))).sum::<u64>();
    let payload_bytes = sum(|entry| entry.stored_bytes.get());
    let payload_at = frame.bytes().len() - payload_bytes as usize;

    let mut header = *old;
    header.records = ((records.len() - skip) as u32).into();
    header.chunks = (table.len() as u32).into();
    header.hash_bytes = 0.into();
    header.payload_bytes = payload_bytes.into();
    header.raw_bytes = sum(|entry| entry.raw_bytes.get()).into();
    let before = Position { term: TermId(old.term), seq: after };
    header.before_term = before.term.0;
    header.before_seq = before.seq.0.into();
    header.first_seq = first.seq.0.into();
    header.time_ns = first.time_ns.into();
    header.wall_ns = frame.wall_ns(first).into();
    let meta_bytes =
        HEADER_BYTES + (records.len() - skip) * size_of::<Descriptor>() + size_of_val(table);
    header.meta_bytes = (meta_bytes as u32).into();

    let mut bytes = Vec::with_capacity(meta_bytes + payload_bytes as usize);
    bytes.extend_from_slice(header.as_bytes());
    for (index, record) in records.iter().enumerate().skip(skip) {
        let place = frame.pieces(index).next();
        let (chunk, offset) = place.map_or((0, 0), |piece| (piece.chunk - kept_from, piece.offset));
        let descriptor = Descriptor::of(record, first, chunk, offset);
        bytes.extend_from_slice(descriptor.as_bytes());
    }
    bytes.extend_from_slice(table.as_bytes());
    header.crc = meta_crc(&bytes).into();
    bytes[..HEADER_BYTES].copy_from_slice(header.as_bytes());
    bytes.extend_from_slice(&frame.bytes()[payload_at..]);
    Some(bytes)
}
