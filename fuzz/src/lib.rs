//! What the fuzz targets share: checksums put right, and the walk over a frame.
//!
//! A fuzzer does not guess a checksum, so without help it would test checksums alone. Each target
//! therefore reads its input as it is, and once more with the checksums made to match: that is what
//! a hostile peer would send, who can compute them too.

pub mod files;
pub mod stream;

use std::ops::Range;

use tidemark_journal::checksum::crc64;
use tidemark_journal::frame::{FrameHeader, HEADER_BYTES};
use tidemark_journal::segment::{BLOCK_BYTES, Next, next};
use tidemark_journal::{FrameView, cut, dump};
use tidemark_link::Message;
use tidemark_link::message::Decoder;

/// Patches of a large memory or file, most of which is as it would be without them: 3 bytes place, 1 byte
/// length, content. The last one may be cut short.
pub fn patches(mut bytes: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    std::iter::from_fn(move || {
        let ([a, b, c, length], further) = bytes.split_first_chunk()?;
        let (content, rest) = further.split_at(further.len().min(usize::from(*length)));
        bytes = rest;
        Some((u64::from(u32::from_le_bytes([*a, *b, *c, 0])), content))
    })
}

/// The patches that put `content` at a place.
pub fn patch(at: u64, content: &[u8]) -> Vec<u8> {
    let mut patches = Vec::new();
    for (index, part) in content.chunks(255).enumerate() {
        let place = (at + index as u64 * 255).to_le_bytes();
        patches.extend_from_slice(&[place[0], place[1], place[2], part.len() as u8]);
        patches.extend_from_slice(part);
    }
    patches
}

/// Puts a patch into bytes that are as long as they are; what does not fit is left out.
pub fn apply(bytes: &mut [u8], (at, content): (u64, &[u8])) {
    if let Some(place) = bytes.get_mut(at as usize..) {
        let fits = content.len().min(place.len());
        place[..fits].copy_from_slice(&content[..fits]);
    }
}

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

/// The same for all frames of a segment.
pub fn seal_frames(segment: &mut [u8]) {
    let mut at = BLOCK_BYTES;
    while let Some(rest) = segment.get_mut(at as usize..) {
        match next(at, rest) {
            Next::Frame(bytes) => {
                seal_frame(rest);
                at += bytes as u64;
            }
            Next::Pad(further) => at = further,
            Next::End(_) => return,
        }
    }
}

/// The messages in a stream, up to the first thing that is none, with the checksums of frames put right.
pub fn messages(mut bytes: &[u8]) -> Vec<Message> {
    let (mut decoder, mut messages) = (Decoder::new(), Vec::new());
    while !bytes.is_empty() {
        let Ok((taken, message)) = decoder.feed(bytes) else { break };
        bytes = &bytes[taken..];
        messages.extend(message.map(|message| match message {
            Message::Frame(mut frame) => {
                seal_frame(&mut frame);
                Message::Frame(frame)
            }
            other => other,
        }));
    }
    messages
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
