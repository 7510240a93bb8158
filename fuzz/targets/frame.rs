//! A frame: what a target receives, stores and reads back.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidemark_fuzz::{seal_frame, walk};
use tidemark_journal::FrameView;

fuzz_target!(|bytes: &[u8]| {
    let mut bytes = bytes.to_vec();
    for _ in 0..2 {
        if let Ok(frame) = FrameView::parse(&bytes) {
            walk(&frame);
        }
        if let Ok(meta) = FrameView::parse_meta(&bytes) {
            walk(&meta);
        }
        seal_frame(&mut bytes);
    }
});
