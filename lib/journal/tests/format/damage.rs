//! Damage is noticed, and bytes that somebody made up do no harm.

use proptest::{collection::vec, prelude::*};
use tidemark_journal::{
    FrameError, FrameView,
    checksum::crc64_of,
    cut,
    frame::{FrameHeader, HEADER_BYTES},
};

use crate::random::content;

/// Uses all of a view's ways to read.
fn read_everything(view: &FrameView<'_>) {
    let _ = view.verify_chunks();
    let stored: usize = view.table().iter().map(|entry| entry.stored_bytes.get() as usize).sum();
    let header = view.header();
    assert_eq!(view.bytes().len(), header.meta_bytes.get() as usize + stored);
    for (index, record) in view.records().enumerate() {
        let _ = view.wall_ns(&record);
        assert_eq!(record.check(), Ok(()));
        assert_eq!(
            view.pieces(index).map(|piece| piece.bytes as u64).sum::<u64>(),
            record.payload_bytes()
        );
        if let Ok(payload) = view.payload(index) {
            assert_eq!(payload.len() as u64, record.payload_bytes());
        }
        if let Some(tail) = cut::tail(view, record.seq) {
            FrameView::parse(&tail).expect("the tail of a good frame is a good frame");
        }
    }
    let mut text = String::new();
    tidemark_journal::dump::frame(&mut text, view).unwrap();
}

/// Puts the checksum right, as somebody who forges a frame would.
fn reseal(bytes: &mut [u8]) {
    let Ok(header) = FrameHeader::peek(bytes) else { return };
    let meta = header.meta_bytes.get() as usize;
    if let Some(meta) = bytes.get(..meta) {
        let crc = crc64_of([&meta[..HEADER_BYTES - 8], &meta[HEADER_BYTES..]]);
        bytes[HEADER_BYTES - 8..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_flipped_bit_is_noticed(content in content(6, 4), bit in 0u32..8) {
        let good = content.encode();
        let meta = FrameHeader::peek(&good).unwrap().meta_bytes.get() as usize;
        let mut bytes = good.clone();
        for at in 0..good.len() {
            bytes[at] ^= 1 << bit;
            match FrameView::parse(&bytes) {
                Err(_) => prop_assert!(at < meta, "byte {} is of a chunk", at),
                Ok(view) => {
                    prop_assert!(at >= meta, "byte {} of the meta was changed unnoticed", at);
                    let noticed = view.verify_chunks();
                    let chunk = matches!(noticed, Err(FrameError::Chunk { .. }));
                    prop_assert!(chunk, "byte {} of a chunk was changed unnoticed", at);
                    let mut readable = (0..content.items.len()).map(|index| view.payload(index));
                    prop_assert!(readable.any(|payload| payload.is_err()));
                }
            }
            bytes[at] = good[at];
        }
    }

    #[test]
    fn a_cut_frame_is_refused_at_every_length(content in content(6, 4)) {
        let bytes = content.encode();
        for length in 0..bytes.len() {
            let short = FrameView::parse(&bytes[..length]);
            let refused = matches!(short, Err(FrameError::Short { have, .. }) if have == length);
            prop_assert!(refused, "{} of {}", length, bytes.len());
        }
    }

    #[test]
    fn two_bytes_exchanged_are_noticed(content in content(6, 4), at in any::<(usize, usize)>()) {
        let mut bytes = content.encode();
        let (one, other) = (at.0 % bytes.len(), at.1 % bytes.len());
        prop_assume!(bytes[one] != bytes[other]);
        bytes.swap(one, other);
        let noticed = FrameView::parse(&bytes).and_then(|view| view.verify_chunks());
        prop_assert!(noticed.is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn random_bytes_are_no_frame(bytes in vec(any::<u8>(), 0..1000)) {
        prop_assert!(FrameView::parse(&bytes).is_err());
    }

    /// Changes fields and puts the checksum right: what is accepted can be read without a panic.
    #[test]
    fn a_forged_frame_does_no_harm(
        content in content(6, 4),
        changes in vec((any::<usize>(), any::<u8>()), 1..4),
    ) {
        let mut bytes = content.encode();
        let meta = FrameHeader::peek(&bytes).unwrap().meta_bytes.get() as usize;
        for (at, value) in changes {
            bytes[at % meta] = value;
        }
        reseal(&mut bytes);
        if let Ok(view) = FrameView::parse(&bytes) {
            read_everything(&view);
        }
    }

    /// The same with whole integers, at extreme values.
    #[test]
    fn a_forged_number_does_no_harm(
        content in content(6, 4),
        at in any::<usize>(),
        width in 1usize..9,
        value in prop_oneof![Just(0u64), Just(1), Just(u64::MAX), Just(1 << 63), Just(1 << 31), any::<u64>()],
    ) {
        let mut bytes = content.encode();
        let meta = FrameHeader::peek(&bytes).unwrap().meta_bytes.get() as usize;
        let at = (at % (meta - width)) & !3;
        bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
        reseal(&mut bytes);
        if let Ok(view) = FrameView::parse(&bytes) {
            read_everything(&view);
        }
    }
}

/// The numbers of the header that something else in the frame must agree with.
#[test]
fn a_header_that_contradicts_its_frame_is_refused() {
    use proptest::{strategy::ValueTree, test_runner::TestRunner};
    let mut runner = TestRunner::deterministic();
    let frames = content(6, 4).prop_filter("two records and a payload", |content| {
        content.items.len() > 1 && content.items.iter().any(|(_, payload)| payload.len() > 1)
    });
    let good = frames.new_tree(&mut runner).unwrap().current().encode();
    let numbers = [
        ("meta bytes", 8, 4),
        ("records", 12, 4),
        ("chunks", 16, 4),
        ("hash bytes", 20, 4),
        ("payload bytes", 24, 8),
        ("raw bytes", 32, 8),
        ("first sequence", 96, 8),
        ("last sequence", 104, 8),
    ];
    for (what, at, width) in numbers {
        for change in [1, u64::MAX] {
            let mut bytes = good.clone();
            let mut number = [0; 8];
            number[..width].copy_from_slice(&bytes[at..at + width]);
            let number = u64::from_le_bytes(number).wrapping_add(change).to_le_bytes();
            bytes[at..at + width].copy_from_slice(&number[..width]);
            reseal(&mut bytes);
            // Bytes enough, so that it is not refused for being short.
            bytes.resize(bytes.len() + 100, 0);
            assert!(FrameView::parse(&bytes).is_err(), "{what} changed by {}", change as i64);
        }
    }
}

#[test]
fn resealing_makes_a_frame_good_again() {
    // What the forging tests rest on: a change that is allowed is accepted after resealing.
    use tidemark_journal::{Compression, FrameBuilder, FrameMeta, Kind, Position, Record, Seq};
    let mut builder = FrameBuilder::new(Compression::Off);
    let record = Record {
        kind: Kind::Flush,
        flags: 0,
        volume: tidemark_journal::VolumeId(1),
        seq: Seq(5),
        time_ns: 0,
        start: tidemark_journal::Sector(0),
        sectors: 0,
    };
    builder.push(&record, []);
    let about = FrameMeta {
        group: crate::random::GROUP,
        term: crate::random::TERM,
        before: Position { term: crate::random::TERM, seq: Seq(4) },
        wall_ns: 0,
    };
    let mut bytes = builder.finish(&about).to_vec();
    bytes[HEADER_BYTES + 2] = 9;
    assert_eq!(FrameView::parse(&bytes).err(), Some(FrameError::Checksum));
    reseal(&mut bytes);
    let view = FrameView::parse(&bytes).unwrap();
    assert_eq!(view.records().next().unwrap().volume.0, 9);
}
