//! Frames in a segment are found again, however it ends.

use proptest::{collection::vec, prelude::*};
use tidemark_journal::{
    Compression, FrameView, Kind, Position, Record, Sector, Seq, VolumeId,
    frame::HEADER_BYTES,
    record::MARK_ID_BYTES,
    segment::{self, BLOCK_BYTES, SegmentEnd, SegmentStart},
};

use crate::random::{Content, GROUP, TERM, content};

fn start() -> SegmentStart {
    SegmentStart {
        number: 3,
        group: GROUP,
        before: Position { term: TERM, seq: Seq(8) },
        created_ns: 1,
        chain_before: [7; 32],
    }
}

/// A segment of batches, and where its frames are.
fn segment_of(batches: &[Vec<Content>]) -> (Vec<u8>, Vec<(u64, Vec<u8>)>) {
    let mut bytes = start().encode();
    let mut frames = Vec::new();
    for batch in batches {
        for content in batch {
            let frame = content.encode();
            frames.push((bytes.len() as u64, frame.clone()));
            bytes.extend(frame);
        }
        bytes.resize(bytes.len() + segment::padding(bytes.len() as u64) as usize, 0);
    }
    (bytes, frames)
}

/// The frames that a scan finds good, up to the first that is not.
fn scan(bytes: &[u8]) -> Vec<(u64, Vec<u8>)> {
    segment::frames(bytes)
        .map_while(|(at, view)| view.ok().map(|view: FrameView<'_>| (at, view)))
        .take_while(|(_, view)| view.verify_chunks().is_ok())
        .map(|(at, view)| (at, view.bytes().to_vec()))
        .collect()
}

fn batches() -> impl Strategy<Value = Vec<Vec<Content>>> {
    vec(vec(content(10, 12), 1..4), 0..4)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn every_frame_is_found_where_it_is(batches in batches(), more_blocks in 0usize..3) {
        let (mut bytes, frames) = segment_of(&batches);
        prop_assert!(bytes.len().is_multiple_of(BLOCK_BYTES as usize));
        // Space set aside and not written yet holds zeros.
        bytes.resize(bytes.len() + more_blocks * BLOCK_BYTES as usize, 0);
        let found: Vec<_> = segment::frames(&bytes)
            .map(|(at, view)| (at, view.unwrap().bytes().to_vec()))
            .collect();
        prop_assert_eq!(found, frames);
    }

    #[test]
    fn a_torn_end_leaves_the_frames_before_it(batches in batches(), tear in any::<usize>()) {
        let (bytes, frames) = segment_of(&batches);
        let tear = BLOCK_BYTES as usize + tear % (bytes.len() + 1 - BLOCK_BYTES as usize);
        let whole = frames.iter().take_while(|(at, frame)| *at as usize + frame.len() <= tear);
        let whole: Vec<_> = whole.cloned().collect();
        // The file ends there.
        prop_assert_eq!(scan(&bytes[..tear]), &whole[..]);
        // Zeros or rubbish follow: what was not written, or not by us. A frame of which only zeros
        // were lost is whole.
        for rubbish in [0u8, 0xff, b'T'] {
            let mut torn = bytes.clone();
            torn[tear..].fill(rubbish);
            let found = scan(&torn);
            prop_assert!(found.len() >= whole.len());
            for (found, wanted) in found.iter().zip(&frames) {
                prop_assert_eq!(found, wanted);
            }
        }
    }

    #[test]
    fn a_lost_block_ends_the_scan_before_it(batches in batches(), block in any::<usize>()) {
        // A batch's blocks may reach the disk in any order before its sync: a later one can be
        // there when an earlier one is not.
        let (mut bytes, frames) = segment_of(&batches);
        let blocks = bytes.len() / BLOCK_BYTES as usize - 1;
        prop_assume!(blocks > 0);
        let lost = (1 + block % blocks) * BLOCK_BYTES as usize;
        bytes[lost..lost + BLOCK_BYTES as usize].fill(0);
        let found = scan(&bytes);
        let before = frames.iter().take_while(|(at, frame)| *at as usize + frame.len() <= lost);
        prop_assert!(found.len() >= before.count());
        for (found, wanted) in found.iter().zip(&frames) {
            prop_assert_eq!(found, wanted);
        }
    }

    #[test]
    fn random_bytes_after_the_header_never_panic(after in vec(any::<u8>(), 0..10_000)) {
        let bytes = [start().encode(), after].concat();
        for (at, view) in segment::frames(&bytes) {
            prop_assert!(at >= BLOCK_BYTES && view.is_err());
        }
    }

    #[test]
    fn any_flipped_bit_of_header_or_trailer_is_noticed(bit in 0u32..8) {
        let end = SegmentEnd {
            number: 3,
            index_at: 8192,
            index_bytes: 100,
            last: Position { term: TERM, seq: Seq(900) },
            data_hash: [5; 32],
            chain: [6; 32],
            index_crc: 77,
        };
        let (header, trailer) = (start().encode(), end.encode());
        prop_assert_eq!(SegmentStart::decode(&header).unwrap(), start());
        prop_assert_eq!(SegmentEnd::decode(&trailer).unwrap(), end);
        let flipped = |block: &[u8], at: usize| {
            let mut block = block.to_vec();
            block[at] ^= 1 << bit;
            block
        };
        for at in 0..160 {
            prop_assert!(SegmentStart::decode(&flipped(&header, at)).is_err(), "byte {}", at);
        }
        for at in 0..192 {
            prop_assert!(SegmentEnd::decode(&flipped(&trailer, at)).is_err(), "byte {}", at);
        }
        for length in 0..160 {
            prop_assert!(SegmentStart::decode(&header[..length]).is_err());
        }
        for length in 0..192 {
            prop_assert!(SegmentEnd::decode(&trailer[..length]).is_err());
        }
        prop_assert!(SegmentStart::decode(&trailer).is_err());
        prop_assert!(SegmentEnd::decode(&header).is_err());
    }
}

#[test]
fn the_end_of_what_was_written_is_told_from_damage() {
    let segment = start().encode();
    assert_eq!(segment::frames(&segment).count(), 0, "nothing after the header");
    let zeros = [segment.clone(), vec![0; 8192]].concat();
    assert_eq!(segment::frames(&zeros).count(), 0, "space set aside");
    let rubbish = [segment, vec![1; 8192]].concat();
    let found: Vec<_> = segment::frames(&rubbish).map(|(at, view)| (at, view.is_err())).collect();
    assert_eq!(found, [(4096, true)]);
}

/// A frame of exactly so many bytes: flushes, and a mark whose name fills up the rest.
fn frame_of(bytes: usize) -> Content {
    let fixed = HEADER_BYTES + 32 + 40 + MARK_ID_BYTES + 1;
    let flushes = (bytes - fixed) / 32;
    let name = 1 + (bytes - fixed) % 32;
    let record = |kind, seq, sectors| Record {
        kind,
        flags: 0,
        volume: VolumeId(0),
        seq: Seq(seq),
        time_ns: 0,
        start: Sector(0),
        sectors,
    };
    let mark = (MARK_ID_BYTES + name) as u32;
    let mut items = vec![(record(Kind::Mark, 9, mark), vec![b'n'; mark as usize])];
    items.extend((0..flushes as u64).map(|n| (record(Kind::Flush, 10 + n, 0), Vec::new())));
    let before = Position { term: TERM, seq: Seq(8) };
    Content { items, before, wall_ns: 0, compression: Compression::Off }
}

#[test]
fn padding_of_every_length_is_passed_over() {
    for pad in (0..200).chain([4095, 4096 - HEADER_BYTES, 4097 - HEADER_BYTES]) {
        let first = frame_of(2 * 4096 - pad);
        let (bytes, frames) = segment_of(&[vec![first], vec![frame_of(500)]]);
        assert_eq!(frames[1].0, 3 * 4096, "the second batch, after {pad} zeros");
        assert_eq!(scan(&bytes), frames, "{pad} zeros between the batches");
    }
}

#[test]
fn the_chain_depends_on_every_hash_before() {
    let one = SegmentEnd::chain_hash(&[0; 32], &[1; 32]);
    let two = SegmentEnd::chain_hash(&one, &[2; 32]);
    assert_ne!(two, SegmentEnd::chain_hash(&SegmentEnd::chain_hash(&[0; 32], &[2; 32]), &[1; 32]));
    assert_ne!(two, SegmentEnd::chain_hash(&[0; 32], &[2; 32]));
}
