//! Comparing what a source offers with what the replica holds.

use tidemark_journal::{
    Record, SECTOR_BYTES, Seq, VolumeId,
    record::{OFFER_BLOCK_BYTES, OFFER_HASH_BYTES},
};
use tidemark_link::message::Need;

use crate::replica::Replica;

/// Hashes of a range's content at a sequence.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Offer {
    /// The sequence.
    pub seq: Seq,
    volume: VolumeId,
    start: u64,
    end: u64,
    hashes: Vec<u8>,
}

impl Offer {
    /// The offer of a record with its payload.
    pub fn new(record: &Record, hashes: Vec<u8>) -> Offer {
        let (start, end) = (record.start.0, record.end().0);
        Offer { seq: record.seq, volume: record.volume, start, end, hashes }
    }

    /// Compares with the replica's content at the same position. A block that cannot be read here
    /// is wanted; it blocks on the disk.
    pub fn compare(&self, replica: &Replica) -> Need {
        // Nothing may be folded beyond the position meanwhile.
        let pin = replica.pin(self.seq, "an offer");
        let mut own = vec![0; ((self.end - self.start) * SECTOR_BYTES) as usize];
        let read = replica.read(self.volume, self.seq, self.start, self.end, &mut own);
        if pin.is_ok() && read.is_ok() {
            return self.differing(&own, &[]);
        }
        // Some of it is damaged or no longer there: look block by block.
        let mut unreadable = Vec::new();
        if pin.is_err() {
            unreadable.extend(0..Need::BLOCKS_MAX);
            return self.differing(&own, &unreadable);
        }
        let sectors = OFFER_BLOCK_BYTES / SECTOR_BYTES;
        for (block, content) in own.chunks_mut(OFFER_BLOCK_BYTES as usize).enumerate() {
            let start = self.start + block as u64 * sectors;
            let end = (start + sectors).min(self.end);
            content.fill(0);
            match replica.read(self.volume, self.seq, start, end, content) {
                Ok(()) => {}
                Err(error) => {
                    // Once per place: all of a base may be lost.
                    replica.met(&error);
                    tracing::debug!(group = replica.name(), "sent for again: {error}");
                    unreadable.push(block);
                }
            }
        }
        self.differing(&own, &unreadable)
    }

    fn differing(&self, own: &[u8], unreadable: &[usize]) -> Need {
        let mut need = Need::nothing(self.seq);
        let blocks =
            own.chunks(OFFER_BLOCK_BYTES as usize).zip(self.hashes.chunks(OFFER_HASH_BYTES));
        for (number, (block, hash)) in blocks.enumerate().take(Need::BLOCKS_MAX) {
            let equal = blake3::hash(block).as_bytes()[..OFFER_HASH_BYTES] == *hash;
            if !equal || unreadable.contains(&number) {
                need.want(number);
            }
        }
        need
    }
}
