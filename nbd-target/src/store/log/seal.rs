//! Sealing: the index and the trailer at a segment's end.

use std::io;

use tidemark_journal::{
    checksum::crc64,
    segment::{BLOCK_BYTES, SegmentEnd},
};

use crate::{
    machine::How,
    store::{index::sealed, journal::Follower, segment::Segment},
};

/// Writes the index after the frames, which end at byte `end` and are durable, then the trailer, and
/// goes over to reading from disk. The trailer is written last: with it the segment is sealed.
///
/// # Errors
/// When the file cannot be written or synced.
pub fn seal(
    segment: &Segment,
    end: u64,
    data_hash: [u8; 32],
    chain: [u8; 32],
    follower: &dyn Follower,
) -> io::Result<()> {
    let summary = segment.summary();
    let base = summary.before.seq;
    let build = |index: &_| sealed::build(index, segment.number(), base);
    let Some(index) = segment.with_memory(build) else { return Ok(()) };
    let file = segment.machine().open(segment.path(), How::Write)?;
    file.write_all_at(&index, end)?;
    file.sync_data()?;
    let trailer = SegmentEnd {
        number: segment.number(),
        index_at: end,
        index_bytes: index.len() as u64,
        last: summary.last,
        data_hash,
        chain,
        index_crc: crc64(&index),
    };
    let trailer_at = end + index.len() as u64;
    file.write_all_at(&trailer.encode(), trailer_at)?;
    file.set_len(trailer_at + BLOCK_BYTES)?;
    file.sync_all()?;
    segment.become_sealed(end);
    if let Err(error) = follower.sealed(segment, &trailer) {
        tracing::error!(segment = segment.number(), "the catalogue did not take it in: {error:#}");
    }
    Ok(())
}
