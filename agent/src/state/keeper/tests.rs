use std::{
    cell::RefCell,
    io,
    path::Path,
    sync::atomic::{AtomicBool, AtomicUsize},
};

use tidemark_journal::{GroupId, TermId, VolumeId};

use super::*;
use crate::state::{
    disk::{StateDir, StateDisk},
    recovery::decide,
};

const GROUP: GroupId = GroupId([3; 16]);
const VOLUMES: [(VolumeId, u32); 1] = [(VolumeId(1), 40)];

/// What befalls a disk, and what is done to it meanwhile.
#[derive(Clone, Default)]
struct Fate {
    failing: Arc<AtomicBool>,
    writes: Arc<AtomicUsize>,
}

/// A directory on a disk that may fail.
struct Failing(StateDir, Fate);

impl Failing {
    fn refuse(&self) -> io::Result<()> {
        self.1.writes.fetch_add(1, Ordering::Relaxed);
        match self.1.failing.load(Ordering::Relaxed) {
            true => Err(io::Error::from_raw_os_error(libc::EIO)),
            false => Ok(()),
        }
    }
}

impl StateDisk for Failing {
    fn open(&mut self, name: &str, bytes: u64) -> io::Result<()> {
        self.0.open(name, bytes)
    }

    fn read(&mut self, name: &str) -> io::Result<Option<Vec<u8>>> {
        self.0.read(name)
    }

    fn write_at(&mut self, name: &str, bytes: &[u8], at: u64) -> io::Result<()> {
        self.refuse()?;
        self.0.write_at(name, bytes, at)
    }

    fn sync(&mut self, name: &str) -> io::Result<()> {
        self.refuse()?;
        self.0.sync(name)
    }

    fn create(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.refuse()?;
        self.0.create(name, bytes)
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        self.refuse()?;
        self.0.rename(from, to)
    }

    fn sync_names(&mut self) -> io::Result<()> {
        self.0.sync_names()
    }
}

/// A new group's state, written as a start writes it.
fn begin(dir: &Path, fate: &Fate) -> (Books, Arc<AtomicU64>) {
    let disk = Box::new(Failing(StateDir::new(dir), fate.clone()));
    let (mut files, found) = StateFiles::on(disk, dir, GROUP, &VOLUMES).expect("opened");
    let fresh = [[1; 16], [2; 16]];
    let start = decide(dir, GROUP, &VOLUMES, &found, None, None, fresh).expect("a way to go on");
    files.write_terms(&start.ancestry).expect("written");
    files.write_state(&start.state).expect("written");
    let generation = Arc::new(AtomicU64::new(start.state.generation));
    let clock = JournalClock::after(start.time_base_ns);
    (Books::new(files, start.state, clock, generation.clone()), generation)
}

/// The application goes on and nothing waits for the disk; the target is told, by a generation that
/// no state on the disk will ever have, so that the next greeting compares everything; and the disk
/// is not written again, though it may say that all is well.
#[test]
fn a_state_disk_that_fails_is_told_of_and_not_written_again() {
    let dir = tempfile::TempDir::new().expect("a directory");
    let fate = Fate::default();
    let (mut books, generation) = begin(dir.path(), &fate);
    let answers = RefCell::new(Vec::new());
    let answer = |done: Done| answers.borrow_mut().push(done);
    books.work(Job::Reserve(Seq(1 << 25)), &answer);
    assert!(matches!(answers.take()[..], [Done::Reserved(Seq(0x200_0000))]));
    let told = generation.load(Ordering::Relaxed);
    assert!(told < TRACKING_LOST);

    fate.failing.store(true, Ordering::Relaxed);
    books.work(Job::Reserve(Seq(1 << 26)), &answer);
    // Who waits for it goes on, as if it were durable.
    let [Done::Failed(why), Done::Reserved(Seq(0x400_0000))] = &answers.take()[..] else {
        panic!("the failure, then the answer");
    };
    assert!(why.contains("state"), "{why}");
    assert!(generation.load(Ordering::Relaxed) >= told + TRACKING_LOST);

    fate.failing.store(false, Ordering::Relaxed);
    let writes = fate.writes.load(Ordering::Relaxed);
    books.work(Job::Reserve(Seq(1 << 27)), &answer);
    books.work(Job::Acked(Position { term: TermId([1; 16]), seq: Seq(9) }), &answer);
    books.work(Job::Settle, &answer);
    books.work(Job::NoteLease(Duration::from_secs(2)), &answer);
    books.work(Job::Stop(Some(Seq(10))), &answer);
    assert_eq!(fate.writes.load(Ordering::Relaxed), writes, "it is not written again");
    let noted = |done: &Done| matches!(done, Done::LeaseNoted);
    assert!(!answers.take().iter().any(noted), "no lease rests on what was not written");
    drop(books);

    let disk = Box::new(StateDir::new(dir.path()));
    let (_, found) = StateFiles::on(disk, dir.path(), GROUP, &VOLUMES).expect("opened");
    let state = found.state.expect("what was durable before");
    assert_eq!((state.ceiling, state.clean), (Seq(1 << 25), None));
    assert!(state.generation <= told, "the target has seen a newer one");
}

/// The source's state is rolled back to before its last session, and the agent starts again and again, and
/// writes, without a link. The target was told of more: what the source greets with stays below that.
#[test]
fn what_no_target_is_told_of_is_not_counted() {
    let dir = tempfile::TempDir::new().expect("a directory");
    let (mut books, generation) = begin(dir.path(), &Fate::default());
    let seen = || generation.load(Ordering::Relaxed);
    let count = |books: &mut Books| {
        let before = seen();
        books.work(Job::Reserve(Seq(1)), &|_| {});
        seen() - before
    };
    assert_eq!(count(&mut books), 0);
    let before = seen();
    let counted = Arc::new(AtomicU64::new(u64::MAX));
    for _ in 0..2 {
        let (counted, generation) = (counted.clone(), generation.clone());
        let then = move || counted.store(generation.load(Ordering::Relaxed), Ordering::Relaxed);
        books.work(Job::Welcomed(Box::new(then)), &|_| {});
    }
    assert_eq!(counted.load(Ordering::Relaxed), before + 1, "what it is told no state had before");
    assert_eq!(count(&mut books), 1);
    assert_eq!(count(&mut books), 1);
    drop(books);
    let disk = Box::new(StateDir::new(dir.path()));
    let (_, found) = StateFiles::on(disk, dir.path(), GROUP, &VOLUMES).expect("opened");
    assert_eq!(found.state.expect("what was written").generation, seen());
}
