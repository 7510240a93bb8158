//! The spool: frames come back as they went in, whatever fails and whenever the power goes.

mod crash;
mod disk;
mod outbox;

use std::sync::Arc;

use tidemark_journal::{
    Compression, FrameBuilder, FrameMeta, GroupId, Kind, Position, Record, Sector, Seq, TermId,
    VolumeId,
};
use tidemark_link::seam::AlignedBuf;

use self::disk::Disk;
use super::{media::Media, *};

const GROUP: GroupId = GroupId([1; 16]);
const LIMITS: Limits = Limits { bytes_max: 4 << 20, segment_bytes: 64 << 10 };

fn term(number: u8) -> TermId {
    TermId([number; 16])
}

/// A frame of one write after `before` in a term, with a payload that its sequence tells.
fn frame(of: u8, before: Position, seq: u64, sectors: u32) -> Vec<u8> {
    let mut builder = FrameBuilder::new(Compression::Off);
    let record = Record {
        kind: Kind::Write,
        flags: 0,
        volume: VolumeId(1),
        seq: Seq(seq),
        time_ns: seq * 10,
        start: Sector(seq),
        sectors,
    };
    let payload = vec![seq as u8; sectors as usize * 512];
    builder.push(&record, [payload.as_slice()]);
    let meta = FrameMeta { group: GROUP, term: term(of), before, wall_ns: 0 };
    builder.finish(&meta).to_vec()
}

/// A journal of frames with one write each, that is put into a spool and read back.
struct Journal {
    frames: Vec<(Position, Vec<u8>)>,
    end: Position,
}

impl Journal {
    fn new() -> Journal {
        Journal { frames: Vec::new(), end: Position { term: term(1), seq: Seq(0) } }
    }

    fn add(&mut self, sectors: u32) {
        let of = self.end.term.0[0];
        let seq = self.end.seq.0 + 1;
        let bytes = frame(of, self.end, seq, sectors);
        self.end.seq = Seq(seq);
        self.frames.push((self.end, bytes));
    }

    /// A new term begins at `ceiling`, as after a power cut; its first frame names that.
    fn add_term(&mut self, ceiling: u64) {
        let of = self.end.term.0[0] + 1;
        let before = Position { seq: Seq(ceiling), ..self.end };
        self.end = Position { term: term(of), seq: Seq(ceiling + 1) };
        self.frames.push((self.end, frame(of, before, ceiling + 1, 1)));
    }

    /// The batch of the last `count` frames.
    fn batch(&self, count: usize) -> (Batch, AlignedBuf) {
        let frames = &self.frames[self.frames.len() - count..];
        let mut buffer = AlignedBuf::new(1 << 20);
        for (_, bytes) in frames {
            buffer.extend(bytes).unwrap();
        }
        buffer.pad_to_block();
        let first = tidemark_journal::FrameView::parse(&frames[0].1).unwrap();
        let (before, time_ns) = (first.header().before(), first.header().time_ns.get());
        (Batch { before, last: self.end, time_ns }, buffer)
    }

    fn check(&self, index: &Arc<Index>, from: Seq) {
        let Some((_, end)) = index.ends() else { return };
        let (mut reader, mut bytes) = (Reader::new(index.clone()), Vec::new());
        let mut after = from;
        for (position, frame) in self.frames.iter().filter(|(p, _)| p.seq > from) {
            if position.seq > end.seq {
                break;
            }
            let found = reader.next(after, &mut bytes).unwrap();
            assert_eq!((found.last, &bytes), (*position, frame));
            assert_eq!(found.time_ns, position.seq.0 * 10);
            after = position.seq;
        }
        assert_eq!(after, end.seq.max(from), "all of it was read");
    }
}

fn open(disk: &Disk) -> Store {
    recover(Arc::new(disk.clone()), GROUP, LIMITS).unwrap()
}

#[test]
fn frames_come_back_from_any_position_over_many_segments_and_terms() {
    let disk = Disk::default();
    let (mut store, mut journal) = (open(&disk), Journal::new());
    for round in 0..40u32 {
        let count = 1 + round % 3;
        for part in 0..count {
            journal.add(1 + (round * 7 + part * 13) % 60);
        }
        let (batch, buffer) = journal.batch(count as usize);
        store.append(&batch, &buffer).unwrap();
        if round == 20 {
            // As after a power cut: what was spooled is kept, and a new term follows.
            store = open(&disk);
            journal.add_term(1000);
            let (batch, buffer) = journal.batch(1);
            store.append(&batch, &buffer).unwrap();
        }
    }
    let index = store.index().clone();
    assert!(disk.names().unwrap().len() > 5, "{:?}", disk.names());
    let positions: Vec<Seq> = journal.frames.iter().map(|(position, _)| position.seq).collect();
    for from in positions.iter().chain([&Seq(0), &Seq(500), &Seq(1000)]) {
        journal.check(&index, *from);
        journal.check(open(&disk).index(), *from);
    }
    // From the front whole segments go.
    let mut store = open(&disk);
    let before = store.index().bytes();
    store.forget(positions[30]).unwrap();
    let (first, last) = store.index().ends().unwrap();
    assert!(first.seq > Seq(5) && first.seq <= positions[30] && last == journal.end);
    assert!(store.index().bytes() < before);
    journal.check(store.index(), positions[30]);
    journal.check(open(&disk).index(), positions[30]);
    store.forget(journal.end.seq).unwrap();
    assert_eq!((store.index().ends(), disk.names().unwrap().len()), (None, 0));
}

#[test]
fn a_full_spool_takes_nothing_until_something_is_removed() {
    let disk = Disk::default();
    let (mut store, mut journal) = (open(&disk), Journal::new());
    let refused = loop {
        journal.add(60);
        let (batch, buffer) = journal.batch(1);
        match store.append(&batch, &buffer) {
            Ok(()) => assert!(journal.frames.len() < 200, "it has no end"),
            Err(error) => break (batch, buffer, error),
        }
    };
    assert!(matches!(refused.2, SpoolError::Full));
    assert!(disk.bytes() <= LIMITS.bytes_max, "{} bytes", disk.bytes());
    let end = store.index().ends().unwrap().1;
    assert_eq!(end.seq.0, journal.end.seq.0 - 1, "what was refused is not there");
    store.forget(Seq(end.seq.0 / 2)).unwrap();
    store.append(&refused.0, &refused.1).unwrap();
    journal.check(store.index(), Seq(end.seq.0 / 2));
}

#[test]
fn a_failed_sync_ends_that_file_and_what_was_durable_stays() {
    let disk = Disk::default();
    let (mut store, mut journal) = (open(&disk), Journal::new());
    for round in 0..30 {
        journal.add(5);
        let (batch, buffer) = journal.batch(1);
        if round % 4 == 3 {
            let files = disk.names().unwrap();
            if round % 8 == 3 {
                disk.fail_next_sync();
            } else {
                disk.fail_next_write();
            }
            assert!(matches!(store.append(&batch, &buffer), Err(SpoolError::Io(_))));
            assert_eq!(store.index().ends().map(|ends| ends.1.seq), Some(Seq(round)));
            // It is tried again, elsewhere.
            store.append(&batch, &buffer).unwrap();
            assert!(disk.names().unwrap().len() > files.len(), "another file was begun");
        } else {
            store.append(&batch, &buffer).unwrap();
        }
        journal.check(store.index(), Seq(0));
    }
    disk.fail_next_create();
    store.clear().unwrap();
    journal.add(1);
    let (batch, buffer) = journal.batch(1);
    assert!(matches!(store.append(&batch, &buffer), Err(SpoolError::Io(_))));
    store.append(&batch, &buffer).unwrap();
}

#[test]
fn damage_is_told_and_never_sent() {
    let disk = Disk::default();
    let (mut store, mut journal) = (open(&disk), Journal::new());
    for _ in 0..30 {
        journal.add(40);
        let (batch, buffer) = journal.batch(1);
        store.append(&batch, &buffer).unwrap();
    }
    let index = store.index().clone();
    let name = disk.names().unwrap().into_iter().min().unwrap();
    for at in [4096, 4096 + 100, 4096 + 250, 4096 + 700] {
        disk.flip(&name, at);
        let (mut reader, mut bytes) = (Reader::new(index.clone()), Vec::new());
        let found = reader.next(Seq(0), &mut bytes);
        assert!(matches!(found, Err(ReadError::Damage(_))), "byte {at}: {found:?}");
        disk.flip(&name, at);
    }
    journal.check(&index, Seq(0));
    disk.remove(&name).unwrap();
    let (mut reader, mut bytes) = (Reader::new(index.clone()), Vec::new());
    assert!(matches!(reader.next(Seq(0), &mut bytes), Err(ReadError::Io(_))));
    // A file that is gone from the middle hides what is before it.
    let names = disk.names().unwrap();
    disk.remove(names.iter().min().unwrap()).unwrap();
    let (before, last) = open(&disk).index().ends().unwrap();
    assert!(before.seq > Seq(1) && last == journal.end);
}

#[test]
fn what_is_not_this_groups_is_not_taken() {
    let disk = Disk::default();
    let (mut store, mut journal) = (open(&disk), Journal::new());
    journal.add(1);
    let (batch, buffer) = journal.batch(1);
    store.append(&batch, &buffer).unwrap();
    let other = recover(Arc::new(disk.clone()), GroupId([2; 16]), LIMITS).unwrap();
    assert_eq!(other.index().ends(), None);
}
