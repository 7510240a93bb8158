//! What the fuzz targets share: checksums put right, and the walk over a frame.
//!
//! A fuzzer does not guess a checksum, so without help it would test checksums alone. Each target
//! therefore reads its input as it is, and once more with the checksums made to match: that is what
//! a hostile peer would send, who can compute them too.

use std::ops::Range;

use tidemark_journal::checksum::crc64;
use tidemark_journal::frame::{FrameHeader, HEADER_BYTES};
use tidemark_journal::segment::BLOCK_BYTES;
use tidemark_journal::{FrameView, cut, dump};

/// Puts the checksum of `covered` at `at`; nothing if the bytes are too few.
pub fn seal(bytes: &mut [u8], covered: Range<usize>, at: usize) {
    if let Some(crc) = bytes.get(covered).map(crc64)
        && let Some(place) = bytes.get_mut(at..at + 8)
    {
        place.copy_from_slice(&crc.to_le_bytes());
    }
}

/// Puts the checksum of each block of 4096 bytes at `at` in it, counted with those eight bytes zero.
pub fn seal_blocks(bytes: &mut [u8], at: usize) {
    for block in bytes.chunks_exact_mut(BLOCK_BYTES as usize) {
        block[at..at + 8].fill(0);
        let crc = crc64(block);
        block[at..at + 8].copy_from_slice(&crc.to_le_bytes());
    }
}

/// Puts the checksum of a frame's meta right, and gives the frame's length, if the lengths in its
/// header are possible.
pub fn seal_frame(bytes: &mut [u8]) -> Option<usize> {
    let header = FrameHeader::peek(bytes).ok()?;
    let (meta_bytes, frame_bytes) = (header.meta_bytes.get() as usize, header.frame_bytes());
    let meta = bytes.get(..meta_bytes)?;
    let crc = crc64(&[&meta[..HEADER_BYTES - 8], &meta[HEADER_BYTES..]].concat());
    bytes[HEADER_BYTES - 8..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
    Some(frame_bytes)
}

/// Reads everything that a frame offers, and checks what a frame that was accepted promises.
pub fn walk(frame: &FrameView<'_>) {
    let whole = frame.bytes().len() == frame.header().frame_bytes();
    let sound = frame.verify_chunks().is_ok();
    assert!(whole || !sound || frame.table().is_empty(), "chunks beyond the frame's end");
    let mut text = String::new();
    dump::frame(&mut text, frame).expect("text never fails");
    for (index, record) in frame.records().enumerate() {
        assert!(record.check().is_ok());
        let pieces: u64 = frame.pieces(index).map(|piece| piece.bytes as u64).sum();
        assert_eq!(pieces, record.payload_bytes(), "a payload's pieces are all of it");
        if let Ok(payload) = frame.payload(index) {
            assert_eq!(payload.len() as u64, record.payload_bytes());
        }
        assert!(frame.wall_ns(&record) >= frame.header().wall_ns.get());
        if whole && let Some(tail) = cut::tail(frame, record.seq) {
            let tail = FrameView::parse(&tail).expect("a frame's tail is a frame");
            assert_eq!(tail.header().last(), frame.header().last());
            assert_eq!(tail.header().before().seq, record.seq);
            assert_eq!(tail.records().len(), frame.records().len() - index - 1);
        }
    }
}
