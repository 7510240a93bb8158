//! Sealing: the index and the trailer at a segment's end.

use std::{io, sync::Arc};

use tidemark_journal::{
    checksum::crc64,
    segment::{BLOCK_BYTES, SegmentEnd},
};

use tokio::task::JoinHandle;

use super::scarce::final_sync;
use crate::{
    machine::How,
    store::{index::sealed, journal::Follower, segment::Segment},
};

/// A segment that has ended.
#[derive(Clone)]
pub(super) struct Job {
    pub segment: Arc<Segment>,
    pub end: u64,
    pub data_hash: [u8; 32],
    pub chain: [u8; 32],
    pub follower: Arc<dyn Follower>,
}

/// One that is being sealed in the background.
pub(super) struct Sealing {
    pub job: Job,
    pub task: JoinHandle<io::Result<()>>,
}

impl Job {
    /// Has it sealed, or tries that again: nothing counts before the trailer is there.
    pub fn begin(self) -> Sealing {
        let Job { segment, end, data_hash, chain, follower } = self.clone();
        let seal = move || seal(&segment, end, data_hash, chain, &*follower);
        let task = self.segment.machine().spawn_blocking(seal);
        Sealing { job: self, task }
    }
}

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
    file.sync_data().map_err(final_sync)?;
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
    file.sync_all().map_err(final_sync)?;
    segment.become_sealed(end);
    if let Err(error) = follower.sealed(segment, &trailer) {
        tracing::error!(segment = segment.number(), "the catalogue did not take it in: {error:#}");
    }
    Ok(())
}
