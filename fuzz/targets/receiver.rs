//! A target's session with a source that sends anything: it greets, and then sends frames and the rest. The
//! first byte says what the replica holds by then.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidemark_fuzz::messages;
use tidemark_journal::{FrameView, Position, Seq, TermId};
use tidemark_link::Message;
use tidemark_link::hello::TargetMemory;
use tidemark_link::message::{Decoder, Hello, VolumeSize};
use tidemark_target::history::History;
use tidemark_target::receiver::{Session, Step};
use tidemark_target::store::index::MemoryIndex;
use tidemark_target::store::journal::Progress;

fuzz_target!(|bytes: &[u8]| {
    let Some((which, bytes)) = bytes.split_first() else { return };
    let mut messages = messages(bytes).into_iter();
    let Some(Message::Hello(hello)) = messages.next() else { return };
    let memory = memory(*which, &hello);
    let mut history = History { end: memory.position.unwrap_or_default(), ..History::default() };
    let Ok((mut session, welcome)) = Session::greet(&hello, 1, memory) else { return };
    let mut sent = Vec::new();
    Message::Welcome(welcome).encode(&mut sent).expect("a welcome of bounded length");
    Decoder::new().feed(&sent).expect("a source can read it");
    history.announce(&hello.volumes);
    let mut index = MemoryIndex::default();
    for message in messages {
        match session.receive(message) {
            Ok(Step::Append { frame, .. }) => {
                let frame = FrameView::parse(&frame).expect("it was checked");
                let end = frame.header().last();
                assert!(end.seq > history.end.seq && hello.ancestry.contains(end));
                history.extend(&frame);
                index.insert(&frame, 4096);
            }
            Ok(Step::End) | Err(_) => break,
            Ok(_) => {}
        }
        let durable = history.end;
        let ack = session.acknowledge(&Progress { durable, ..Progress::default() });
        assert!(ack.is_none_or(|ack| ack.hop_received == durable.seq));
    }
    history.announce(&hello.volumes[..hello.volumes.len() / 2]);
    for volume in &history.volumes {
        assert!(volume.added <= history.end.seq.next());
        let _ = (volume.sectors(), volume.open_gap(), volume.present_at(history.end.seq));
    }
});

fn memory(which: u8, hello: &Hello) -> TargetMemory {
    let sizes = hello.volumes.iter();
    let sizes = sizes.map(|volume| VolumeSize { id: volume.id, sectors: volume.sectors });
    let of = |position| TargetMemory {
        position: Some(position),
        path: hello.ancestry.until(position),
        map_generation: hello.map_generation,
        volumes: sizes.collect(),
    };
    match which % 3 {
        0 => TargetMemory::default(),
        // The source's own word, as far as a replica can be.
        1 if hello.acked.seq <= Seq(1 << 40)
            && hello.ancestry.current().fork_seq <= Seq(1 << 40) =>
        {
            of(hello.acked)
        }
        _ => of(Position { term: TermId([7; 16]), seq: Seq(100) }),
    }
}
