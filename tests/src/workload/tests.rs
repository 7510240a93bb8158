//! The load, the model and the judge, each against something simpler that is right by itself.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use super::content::SECTOR_BYTES;
use super::disk::{Buffer, Disk, FileDisk};
use super::history::History;
use super::order::{self, CLEAR_SPAN_BYTES, Part, Record};
use super::rng::Rng;
use super::{Action, Entry, Log, Moment, Operation, Shape, content, run};

const SIZE_BYTES: u64 = 1 << 20;

fn shape() -> Shape {
    Shape {
        seed: 7,
        operations: 3000,
        sizes_bytes: vec![SIZE_BYTES, SIZE_BYTES],
        block_bytes: 512,
        blocks_max: 64,
        zeroes_percent: 5,
        discards_percent: 5,
        flushes_percent: 5,
        hot_bytes: 64 << 10,
    }
}

/// Two disks in memory behind one lock, with a journal that is right because the lock makes it so.
struct Machine {
    state: Mutex<(Vec<Vec<u8>>, Vec<Record>)>,
}

struct MemoryDisk<'a> {
    machine: &'a Machine,
    index: usize,
}

impl MemoryDisk<'_> {
    fn change(&self, action: Action, number: Option<usize>, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.machine.state.lock().unwrap();
        state.1.push(Record { disk: self.index, action, number });
        if let Some((offset, length)) = action.range() {
            state.0[self.index][offset as usize..(offset + length) as usize].copy_from_slice(bytes);
        }
        Ok(())
    }
}

impl Disk for MemoryDisk<'_> {
    fn write(&self, offset_bytes: u64, bytes: &[u8]) -> io::Result<()> {
        let action = Action::Write { offset_bytes, length_bytes: bytes.len() as u64 };
        self.change(action, content::number(bytes), bytes)
    }

    fn zero(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        let zeroes = vec![0; length_bytes as usize];
        self.change(Action::Zero { offset_bytes, length_bytes }, None, &zeroes)
    }

    fn discard(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        self.zero(offset_bytes, length_bytes)
    }

    fn flush(&self) -> io::Result<()> {
        self.change(Action::Flush, None, &[])
    }

    fn read(&self, offset_bytes: u64, buffer: &mut [u8]) -> io::Result<()> {
        let start = offset_bytes as usize;
        buffer.copy_from_slice(
            &self.machine.state.lock().unwrap().0[self.index][start..][..buffer.len()],
        );
        Ok(())
    }
}

/// A recorded run, its true journal and the disks' final content.
fn recorded() -> (Vec<Operation>, Log, Vec<Record>, Vec<Vec<u8>>) {
    let shape = shape();
    let operations = shape.operations().unwrap();
    let blank = shape.sizes_bytes.iter().map(|size| vec![0; *size as usize]).collect();
    let machine = Machine { state: Mutex::new((blank, Vec::new())) };
    let disks = [0, 1].map(|index| MemoryDisk { machine: &machine, index });
    let log = run(&[&disks[0], &disks[1]], &operations, 16, &AtomicBool::new(false));
    let (content, records) = machine.state.into_inner().unwrap();
    (operations, log, records, content)
}

#[test]
fn a_shape_gives_what_it_says() {
    let shape = shape();
    let operations = shape.operations().unwrap();
    assert_eq!(operations, shape.operations().unwrap(), "the same seed, the same operations");
    assert_ne!(operations, Shape { seed: 8, ..shape.clone() }.operations().unwrap());
    assert_eq!(operations.len(), shape.operations);
    let count = |kind: fn(&Action) -> bool| operations.iter().filter(|o| kind(&o.action)).count();
    let five_percent = shape.operations * 3 / 100..shape.operations * 7 / 100;
    assert!(five_percent.contains(&count(|action| matches!(action, Action::Zero { .. }))));
    assert!(five_percent.contains(&count(|action| matches!(action, Action::Discard { .. }))));
    assert!(five_percent.contains(&count(|action| *action == Action::Flush)));
    for (offset, length) in operations.iter().filter_map(|operation| operation.action.range()) {
        assert!(length > 0 && offset + length <= SIZE_BYTES, "{offset}+{length}");
        assert!(offset.is_multiple_of(512) && length.is_multiple_of(512));
    }
    assert!(Shape { block_bytes: 1000, ..shape.clone() }.operations().is_err());
    assert!(Shape { sizes_bytes: vec![1000], ..shape }.operations().is_err());
}

#[test]
fn a_true_journal_is_believed_and_its_history_is_the_disks() {
    let (operations, log, records, content) = recorded();
    assert_eq!((log.entries.len(), log.error()), (operations.len(), None));
    let order = order::of_journal(&log, &records).unwrap();
    let history = History::of_parts(&shape().sizes_bytes, &operations, &order);

    // The model once more, as plain bytes, compared after every hundredth step and at the end.
    let mut plain = vec![vec![0; SIZE_BYTES as usize]; 2];
    let mut read = vec![0; SIZE_BYTES as usize];
    for (step, Part { number, action }) in order.iter().enumerate() {
        if step % 100 == 0 {
            for disk in [0, 1] {
                history.read(disk, step, 0, &mut read);
                assert!(read == plain[disk], "disk {disk} step {step}");
            }
        }
        let Some((offset, length)) = action.range() else { continue };
        let bytes =
            &mut plain[operations[*number].disk][offset as usize..(offset + length) as usize];
        match action {
            Action::Write { .. } => content::fill(*number, offset, bytes),
            _ => bytes.fill(0),
        }
    }
    assert!(plain == content);
    for disk in [0, 1] {
        assert_eq!(history.difference(disk, history.steps(), 0, &content[disk]), None);
    }
}

#[test]
fn a_difference_is_found_whatever_it_is() {
    let (operations, log, records, content) = recorded();
    let order = order::of_journal(&log, &records).unwrap();
    let history = History::of_parts(&shape().sizes_bytes, &operations, &order);
    let steps = history.steps();
    let mut rng = Rng::new(1);
    for _ in 0..100 {
        let mut changed = content[0].clone();
        changed[rng.below(SIZE_BYTES) as usize] ^= 1;
        assert!(history.difference(0, steps, 0, &changed).is_some());
    }
    // A stale sector: the content before the last write.
    let last = order.iter().rev().find(|part| operations[part.number].disk == 0).unwrap();
    if let Some((offset, length)) = last.action.range() {
        let mut stale = vec![0; length as usize];
        history.read(0, steps - 100, offset, &mut stale);
        let fresh = &content[0][offset as usize..][..length as usize];
        assert_eq!(history.difference(0, steps, offset, &stale).is_some(), stale != fresh);
    }
    // A misplaced one: the right write's neighbour.
    let sector = (0..SIZE_BYTES / 512)
        .find(|sector| {
            let version = history.version(0, steps, *sector);
            version.is_some() && version == history.version(0, steps, sector + 1)
        })
        .unwrap();
    let neighbour = &content[0][(sector as usize + 1) * 512..][..512];
    assert!(history.difference(0, steps, sector * SECTOR_BYTES, neighbour).is_some());
}

#[test]
fn a_wrong_journal_is_not_believed() {
    let (_, log, records, _) = recorded();
    let refused = |records: &[Record], why: &str| {
        let error = format!("{:#}", order::of_journal(&log, records).unwrap_err());
        assert!(error.contains(why), "{error}");
    };
    let write = records.iter().position(|record| record.number.is_some()).unwrap();
    let zero =
        records.iter().position(|record| matches!(record.action, Action::Zero { .. })).unwrap();
    let flush = records.iter().position(|record| record.action == Action::Flush).unwrap();
    for lost in [write, zero] {
        let mut records = records.clone();
        let record = records.remove(lost);
        refused(&records, "has no record");
        records.extend([record, record]);
        refused(&records, "a second one");
    }
    let changed = |at: usize, change: fn(&mut Record)| {
        let mut records = records.clone();
        change(&mut records[at]);
        records
    };
    refused(&changed(write, |record| record.disk ^= 1), "not of the range");
    refused(&changed(write, |record| record.number = Some(1 << 20)), "never submitted");
    let whole_disk = Action::Zero { offset_bytes: 0, length_bytes: SIZE_BYTES };
    let mut another_zero = records.clone();
    another_zero[zero].action = whole_disk;
    refused(&another_zero, "of no operation");
    let mut without_flush = records.clone();
    without_flush.remove(flush);
    assert!(order::of_journal(&log, &without_flush).is_err());
    let mut extra_flush = records.clone();
    extra_flush.push(records[flush]);
    assert!(order::of_journal(&log, &extra_flush).is_err());
    // A write moved behind an operation that was submitted after its acknowledgement.
    let order = order::of_journal(&log, &records).unwrap();
    let submitted = |position: &usize| log.entries[order[*position].number].submitted.event;
    let newest = (0..order.len()).max_by_key(submitted).unwrap();
    let acknowledged = log.entries[order[write].number].acknowledged.unwrap().event;
    assert!(write < newest && acknowledged < submitted(&newest));
    let mut late = records.clone();
    late[write..=newest].rotate_left(1);
    assert!(order::of_journal(&log, &late).is_err());
}

/// A log of operations given as (action, submitted, acknowledged) on one disk.
fn log(entries: &[(Action, u64, u64)]) -> Log {
    let moment = |event| Moment { event, time_ns: event };
    let entry = |&(action, submitted, acknowledged)| Entry {
        operation: Operation { disk: 0, action },
        submitted: moment(submitted),
        acknowledged: (acknowledged != 0).then(|| moment(acknowledged)),
        error: None,
    };
    Log { entries: entries.iter().map(entry).collect() }
}

fn write(offset_bytes: u64) -> Action {
    Action::Write { offset_bytes, length_bytes: 512 }
}

/// The journal of operations given by number in the log.
fn journal(log: &Log, numbers: &[usize]) -> Vec<Record> {
    let record = |&number: &usize| {
        let action = log.entries[number].operation.action;
        let number = matches!(action, Action::Write { .. }).then_some(number);
        Record { disk: 0, action, number }
    };
    numbers.iter().map(record).collect()
}

fn numbers_of(parts: Vec<Part>) -> Vec<usize> {
    parts.into_iter().map(|part| part.number).collect()
}

#[test]
fn an_operation_in_parts_is_believed_when_they_make_it_up() {
    let wide = Action::Zero { offset_bytes: CLEAR_SPAN_BYTES - 512, length_bytes: 1024 };
    let long = Action::Write { offset_bytes: 0, length_bytes: 1024 };
    let log = log(&[(wide, 1, 2), (long, 3, 4)]);
    let zero = |offset_bytes| Record {
        disk: 0,
        action: Action::Zero { offset_bytes, length_bytes: 512 },
        number: None,
    };
    let part = |offset_bytes| Record { disk: 0, action: write(offset_bytes), number: Some(1) };
    let (low, high) = (zero(CLEAR_SPAN_BYTES - 512), zero(CLEAR_SPAN_BYTES));
    let judge = |records: &[Record]| order::of_journal(&log, records);
    let parts = judge(&[high, low, part(512), part(0)]).unwrap();
    assert_eq!(parts[1], Part { number: 0, action: low.action });
    assert_eq!(numbers_of(parts), [0, 0, 1, 1]);
    assert_eq!(numbers_of(judge(&journal(&log, &[0, 1])).unwrap()), [0, 1], "or whole");
    for (records, why) in [
        (&[low, part(0), part(512)][..], "operation 0 was acknowledged but lacks a part"),
        (&[low, high, part(0)], "operation 1 was acknowledged but lacks a part"),
        (&[low, high, low, part(0), part(512)], "a second one"),
        (&[low, high, part(0), part(0)], "a second one"),
        (&[low, part(0), high, part(512)], "acknowledged before"),
        (&[low, high, part(0), part(1024)], "not of the range"),
    ] {
        let error = format!("{:#}", judge(records).unwrap_err());
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn only_pairs_that_do_not_overlap_in_time_have_an_order() {
    let one_after_the_other = log(&[(write(0), 1, 2), (write(512), 3, 4)]);
    let overlapping = log(&[(write(0), 1, 3), (write(512), 2, 4)]);
    let judge =
        |log: &Log, numbers: &[usize]| order::of_journal(log, &journal(log, numbers)).is_ok();
    assert!(judge(&one_after_the_other, &[0, 1]));
    assert!(!judge(&one_after_the_other, &[1, 0]));
    assert!(judge(&overlapping, &[0, 1]));
    assert!(judge(&overlapping, &[1, 0]));
}

#[test]
fn an_operation_that_failed_may_be_in_the_journal_or_not() {
    let failed = log(&[(write(0), 1, 0), (write(512), 3, 4)]);
    for numbers in [&[0, 1][..], &[1, 0], &[1]] {
        let order = order::of_journal(&failed, &journal(&failed, numbers)).unwrap();
        assert_eq!(numbers_of(order), numbers);
    }
    assert!(order::of_journal(&failed, &journal(&failed, &[0])).is_err());
}

#[test]
fn flushes_are_told_apart_by_where_they_can_be() {
    let flush = Action::Flush;
    // A long flush around a short one, before a write: the first record must be the short one's.
    let by_acknowledgement = log(&[(flush, 1, 100), (flush, 2, 3), (write(0), 50, 60)]);
    let order = order::of_journal(&by_acknowledgement, &journal(&by_acknowledgement, &[0, 2, 0]));
    assert_eq!(numbers_of(order.unwrap()), [1, 2, 0]);
    // A write before a late flush, in an early one: the first record must be the early one's.
    let by_submission = log(&[(flush, 60, 100), (flush, 1, 101), (write(0), 2, 50)]);
    let order = order::of_journal(&by_submission, &journal(&by_submission, &[0, 2, 0]));
    assert_eq!(numbers_of(order.unwrap()), [1, 2, 0]);
    // Both flushes before the write that was acknowledged before one of them: no way.
    assert!(order::of_journal(&by_submission, &journal(&by_submission, &[0, 0, 2])).is_err());
    // Both after the write that was submitted after the acknowledgement of one: no way.
    let records = journal(&by_acknowledgement, &[2, 0, 0]);
    assert!(order::of_journal(&by_acknowledgement, &records).is_err());
    // One after the other without a write between them: their order is that of their times.
    let in_turn = log(&[(flush, 3, 4), (flush, 1, 2)]);
    let order = order::of_journal(&in_turn, &journal(&in_turn, &[0, 0]));
    assert_eq!(numbers_of(order.unwrap()), [1, 0]);
}

#[test]
fn flushes_of_several_disks_bound_one_another() {
    let flush = Action::Flush;
    let on = |disks: [usize; 3], mut log: Log| {
        for (entry, disk) in log.entries.iter_mut().zip(disks) {
            entry.operation.disk = disk;
        }
        log
    };
    let records =
        |disks: [usize; 3]| disks.map(|disk| Record { disk, action: flush, number: None });
    // On disk 0 a long flush around a short one, and after the short one another on disk 1.
    let late = on([0, 0, 1], log(&[(flush, 1, 100), (flush, 2, 3), (flush, 4, 5)]));
    assert_eq!(numbers_of(order::of_journal(&late, &records([0, 1, 0])).unwrap()), [1, 2, 0]);
    assert_eq!(numbers_of(order::of_journal(&late, &records([0, 0, 1])).unwrap()), [1, 0, 2]);
    assert!(order::of_journal(&late, &records([1, 0, 0])).is_err());
    // On disk 0 a long flush around a short one, and before the short one another on disk 1.
    let early = on([0, 0, 1], log(&[(flush, 1, 100), (flush, 6, 7), (flush, 4, 5)]));
    assert_eq!(numbers_of(order::of_journal(&early, &records([0, 1, 0])).unwrap()), [0, 2, 1]);
    assert_eq!(numbers_of(order::of_journal(&early, &records([1, 0, 0])).unwrap()), [2, 1, 0]);
    assert!(order::of_journal(&early, &records([0, 0, 1])).is_err());
}

#[test]
fn a_block_layer_may_answer_several_flushes_with_one() {
    let flush = Action::Flush;
    let together = log(&[(write(0), 1, 2), (flush, 3, 9), (flush, 4, 10), (write(4096), 11, 12)]);
    assert!(order::of_journal(&together, &journal(&together, &[0, 1, 3])).is_err());
    let parts = order::of_block_journal(&together, &journal(&together, &[0, 1, 3])).unwrap();
    assert_eq!(parts.len(), 3);
    // None at all, or one where it cannot have been.
    assert!(order::of_block_journal(&together, &journal(&together, &[0, 3])).is_err());
    assert!(order::of_block_journal(&together, &journal(&together, &[1, 0, 3])).is_err());
    assert!(order::of_block_journal(&together, &journal(&together, &[0, 3, 1])).is_err());
    // One after the other: a write between them tells that each had its own.
    let apart = log(&[(flush, 1, 2), (write(0), 3, 4), (flush, 5, 6)]);
    assert!(order::of_block_journal(&apart, &journal(&apart, &[0, 1])).is_err());
    assert!(order::of_block_journal(&apart, &journal(&apart, &[0, 1, 2])).is_ok());
}

#[test]
fn a_file_takes_the_load_as_the_model_says() {
    let path = tempfile::NamedTempFile::new().unwrap();
    path.as_file().set_len(SIZE_BYTES).unwrap();
    let disk = FileDisk::open(path.path()).unwrap();
    let shape = Shape { sizes_bytes: vec![SIZE_BYTES], operations: 500, ..shape() };
    let operations = shape.operations().unwrap();
    // One at a time, so that the list is the order.
    let log = run(&[&disk], &operations, 1, &AtomicBool::new(false));
    assert_eq!(log.error(), None);
    let order: Vec<usize> = (0..operations.len()).collect();
    order::check(&log, &order).unwrap();
    let history = History::new(&shape.sizes_bytes, &operations, &order);
    let mut buffer = Buffer::default();
    disk.read(0, buffer.bytes(SIZE_BYTES)).unwrap();
    assert_eq!(history.difference(0, history.steps(), 0, buffer.bytes(SIZE_BYTES)), None);
}

#[test]
fn a_stop_leaves_a_whole_log() {
    let path = tempfile::NamedTempFile::new().unwrap();
    let disk = FileDisk::open(path.path()).unwrap();
    let stop = AtomicBool::new(true);
    let operations = shape().operations().unwrap();
    assert!(run(&[&disk, &disk], &operations, 4, &stop).entries.is_empty());
}
