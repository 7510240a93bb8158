//! What a start that fails leaves behind: nothing.

use std::{
    io,
    sync::{Arc, Weak},
};

use tidemark_journal::{Ancestry, Compression, GroupId, Seq, TermId};

use super::Threads;
use crate::{
    capture::{
        core::Core,
        ring::{Layout, RingMemory, RingReader, RingWriter},
    },
    carriers::Carriers,
    clock::JournalClock,
    dirty::map::DirtyMap,
    encoder,
    engine::Parts,
    outbox::Outbox,
    state::{keeper, recovery::opening},
};

/// The threads of a group without volumes, of which the encoder runs, and its ring.
fn begun() -> (Threads, Parts, Weak<RingMemory>) {
    let ring = RingMemory::plain(Layout::of(16 << 20), &[]);
    let left = Arc::downgrade(&ring);
    let (outbox, carriers) = (Outbox::new(ring.clone()), Arc::new(Carriers::new(Arc::default())));
    let (ancestry, clock) = (Ancestry::root(TermId([1; 16])), JournalClock::after(0));
    let (encoder, thread) = encoder::start(
        GroupId([1; 16]),
        opening(&ancestry),
        RingReader::new(ring.clone()),
        outbox.clone(),
        clock,
        Compression::Off,
        carriers.clone(),
    )
    .unwrap();
    let map = DirtyMap::new([0; 16], 0, 0, Vec::new());
    let parts = Parts {
        core: Core::new(&[], map, RingWriter::new(ring), Seq::ZERO, Seq::ZERO),
        volumes: Vec::new(),
        clock,
        encoder: encoder.clone(),
        carriers,
        outbox: outbox.clone(),
        ancestry,
        catch_up_bytes_per_s: None,
        on_term: Box::new(|_, _| {}),
    };
    (Threads::new(encoder, thread, outbox), parts, left)
}

#[test]
fn a_start_whose_keeper_fails_ends_the_threads_before_it() {
    let (mut threads, parts, ring) = begun();
    let failed = threads.start_engine(parts, |_| Err(io::Error::other("no thread")));
    assert!(failed.map(|_| ()).unwrap_err().to_string().contains("no thread"));
    threads.give_up();
    assert!(ring.upgrade().is_none(), "somebody still has the ring");
}

#[test]
fn a_start_that_fails_after_its_engine_ends_that_too() {
    let (mut threads, parts, ring) = begun();
    let (engine, keeper) = threads.start_engine(parts, keeper::without_disk).unwrap();
    threads.give_up();
    assert!(ring.upgrade().is_none(), "somebody still has the ring");
    drop((engine, keeper));
}
