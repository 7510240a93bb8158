//! The messages of the link, cut into pieces of any length, in either direction.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidemark_fuzz::walk;
use tidemark_journal::FrameView;
use tidemark_link::Message;
use tidemark_link::message::Decoder;

fuzz_target!(|bytes: &[u8]| {
    let Some((step, bytes)) = bytes.split_first() else { return };
    let mut decoder = Decoder::new();
    for mut piece in bytes.chunks(usize::from(*step) + 1) {
        while !piece.is_empty() {
            let Ok((taken, message)) = decoder.feed(piece) else { return };
            assert!(taken > 0 && taken <= piece.len(), "the decoder goes on");
            piece = &piece[taken..];
            if let Some(message) = message {
                read(&message);
            }
        }
    }
});

fn read(message: &Message) {
    if let Message::Frame(frame) = message
        && let Ok(frame) = FrameView::parse(frame)
    {
        walk(&frame);
    }
    // What was accepted goes over the link again as it is.
    let mut bytes = Vec::new();
    if message.encode(&mut bytes).is_ok() {
        let again = Decoder::new().feed(&bytes).expect("what was encoded is decoded").1;
        assert_eq!(again.as_ref(), Some(message));
    }
}
