//! A ring that another agent has left behind, in any state: the input is a list of patches on an
//! empty ring.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidemark_agent::capture::ring::{About, Layout, RingMemory, inherit};
use tidemark_agent::clock::JournalClock;
use tidemark_agent::outbox::kept;
use tidemark_fuzz::patches;
use tidemark_journal::{GroupId, Seq, TermId, VolumeId};

const TERM: TermId = TermId([7; 16]);
const GROUP: GroupId = GroupId([1; 16]);
const LAYOUT: Layout = Layout { slots: 256, data_bytes: 32 << 10, frame_bytes: 32 << 10 };

fuzz_target!(|bytes: &[u8]| {
    let volumes = vec![(VolumeId(1), 2048), (VolumeId(2), 1 << 20)];
    let about = About { group: GROUP, id: 7, clock: JournalClock::after(0), volumes };
    let memory = RingMemory::create(&about, LAYOUT).expect("a ring");
    memory.begin_term(TERM, Seq(100));
    for (at, content) in patches(bytes) {
        let _ = memory.region().copy_in(at, content);
    }
    let kept = kept(&memory, GROUP, TERM);
    let in_frames = kept.as_ref().ok().and_then(|kept| kept.last());
    let Ok(inherited) = inherit(memory.clone(), &about.volumes, in_frames, Seq(100)..=Seq(1 << 40))
    else {
        return;
    };
    assert!(inherited.redo.len() + inherited.failed.len() <= LAYOUT.slots as usize);
    for (slot, record) in inherited.redo.iter().chain(&inherited.failed) {
        assert!(slot.payload_at + slot.payload_bytes <= LAYOUT.total_bytes());
        let (_, sectors) = about.volumes[usize::from(record.volume.0 - 1)];
        assert!(record.end().0 <= sectors, "nothing is written beyond a volume's end");
    }
    let (mut writer, mut reader) = (inherited.writer(), inherited.reader());
    let mut last = Seq::ZERO;
    while reader.take(|record, _| {
        assert!(record.seq > last && record.seq <= inherited.last_seq);
        last = record.seq;
        true
    }) {}
    reader.encoded();
    writer.collect();
    let _ = (writer.fill_permille(), writer.has_room(4096, false));
});
