//! The thread that writes a group's state while the group runs, so that no other thread waits for
//! the state disk.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tidemark_journal::{Ancestry, Position, Seq};

use super::{StateError, block::GroupState, files::StateFiles, recovery::TIME_RESERVE_NS};
use crate::{clock::JournalClock, dirty::map::Commit};

/// How often what is not urgent is written.
const LAZY: Duration = Duration::from_secs(2);

/// What the keeper is asked to write. Each answer is given when it is durable.
pub enum Job {
    /// A commit of the dirty map: pages, then the log.
    Commit(Commit),
    /// Sequences up to this one.
    Reserve(Seq),
    /// A final-durable position; written when there is time.
    Acked(Position),
    /// Everything up to here is final-durable or in the spool; written when there is time.
    Spooled(Position),
    /// Write now what is to be written when there is time.
    Settle,
    /// A new term, with the sequences it may use and the generation that it must not be below.
    Term(Ancestry, Seq, u64),
    /// A target has welcomed this source, and is to be told of the state from now on: first it is written with
    /// a generation of which no target knows; then this is called, even when the disk has failed.
    Welcomed(Box<dyn FnOnce() + Send>),
    /// That leases of up to so long are granted, or with zero none.
    NoteLease(Duration),
    /// The end: cleanly, with the last sequence used, or not.
    Stop(Option<Seq>),
}

/// What the keeper answers.
#[derive(Debug)]
pub enum Done {
    /// A commit is durable.
    Committed,
    /// Sequences are reserved.
    Reserved(Seq),
    /// The term is durable.
    Term(Ancestry, Seq),
    /// It says how long leases may be.
    LeaseNoted,
    /// The positions last given as final-durable, and as in the spool, are durable.
    Noted {
        /// Final-durable up to here.
        acked: Seq,
        /// Final-durable or in the spool up to here.
        spooled: Seq,
    },
    /// The state disk has failed: nothing is durable any more, and nobody waits for it any more.
    Failed(String),
}

/// Added to the generation that the target is told when the state disk has failed, so that the
/// next greeting finds the source's own state to be older, and everything is compared.
const TRACKING_LOST: u64 = 1 << 40;

/// A handle to the keeper's thread.
#[derive(Clone)]
pub struct Keeper {
    jobs: Sender<Job>,
    generation: Arc<AtomicU64>,
}

impl Keeper {
    /// Asks for something to be written.
    pub fn ask(&self, job: Job) {
        // The thread ends only after a stop, after which nothing has to be kept.
        let _ = self.jobs.send(job);
    }

    /// The generation of the state that is durable: it counts its writings since a target was first told of
    /// it in this life. A target that has seen a higher one than a later greeting names knows that the
    /// source's state was rolled back.
    ///
    /// What no target hears of is not counted, or a source that was rolled back could come to the
    /// generation that the target knows while the link is down.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }
}

/// Starts the keeper. `answer` is called on its thread.
///
/// # Errors
/// The thread cannot be started.
pub fn start(
    files: StateFiles,
    state: GroupState,
    clock: JournalClock,
    answer: impl Fn(Done) + Send + 'static,
) -> std::io::Result<(Keeper, JoinHandle<()>)> {
    let (sender, jobs) = channel();
    let generation = Arc::new(AtomicU64::new(state.generation));
    let keeper = Keeper { jobs: sender, generation: generation.clone() };
    let mut books = Books::new(files, state, clock, generation);
    let handle = std::thread::Builder::new()
        .name("tm-keeper".into())
        .spawn(move || run(&mut books, &jobs, &answer))?;
    Ok((keeper, handle))
}

/// Starts a keeper that keeps nothing, for an agent that captures nothing: what it would mark is marked
/// already, and it is to have no sequences.
///
/// # Errors
/// The thread cannot be started.
pub fn without_disk(
    answer: impl Fn(Done) + Send + 'static,
) -> std::io::Result<(Keeper, JoinHandle<()>)> {
    let (sender, jobs) = channel();
    let keeper = Keeper { jobs: sender, generation: Arc::default() };
    let handle = std::thread::Builder::new().name("tm-keeper".into()).spawn(move || {
        for job in jobs {
            match job {
                Job::Commit(_) => answer(Done::Committed),
                Job::Stop(_) => return,
                Job::Reserve(_)
                | Job::Acked(_)
                | Job::Spooled(_)
                | Job::Settle
                | Job::Term(..)
                | Job::Welcomed(_)
                | Job::NoteLease(_) => {}
            }
        }
    })?;
    Ok((keeper, handle))
}

fn run(books: &mut Books, jobs: &Receiver<Job>, answer: &dyn Fn(Done)) {
    let mut lazily = Instant::now() + LAZY;
    loop {
        let wait = lazily.saturating_duration_since(Instant::now());
        match jobs.recv_timeout(wait) {
            Ok(job) => {
                let stop = matches!(job, Job::Stop(_));
                books.work(job, answer);
                if stop {
                    return;
                }
            }
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => return,
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {}
        }
        if Instant::now() >= lazily {
            lazily = Instant::now() + LAZY;
            books.work_lazily(answer);
        }
    }
}

/// What the keeper writes, and when; it waits for nothing but the state disk.
pub struct Books {
    files: StateFiles,
    state: GroupState,
    clock: JournalClock,
    generation: Arc<AtomicU64>,
    /// A target may have been told of what was last written.
    told: bool,
    failed: bool,
    stale: bool,
}

impl Books {
    /// Goes on with what has just been written. `generation` is told of each further writing.
    pub fn new(
        files: StateFiles,
        state: GroupState,
        clock: JournalClock,
        generation: Arc<AtomicU64>,
    ) -> Books {
        Books { files, state, clock, generation, told: false, failed: false, stale: false }
    }

    /// Writes what is not urgent. To be called every few seconds.
    pub fn work_lazily(&mut self, answer: &dyn Fn(Done)) {
        if self.clock.now_ns() + TIME_RESERVE_NS / 2 > self.state.time_ceiling_ns {
            self.state.time_ceiling_ns = self.clock.now_ns() + TIME_RESERVE_NS;
            self.stale = true;
        }
        self.settle(answer);
    }

    fn settle(&mut self, answer: &dyn Fn(Done)) {
        if !std::mem::take(&mut self.stale) {
            return;
        }
        let written = self.write_state();
        self.check(written, answer);
        let (acked, spooled) = (self.state.acked.seq, self.state.spooled.seq);
        answer(Done::Noted { acked, spooled });
    }

    /// Does a job, and gives its answer.
    pub fn work(&mut self, job: Job, answer: &dyn Fn(Done)) {
        let (written, done) = match job {
            Job::Commit(commit) => (self.commit(&commit), Some(Done::Committed)),
            Job::Reserve(seq) => {
                self.state.ceiling = self.state.ceiling.max(seq);
                (self.write_state(), Some(Done::Reserved(seq)))
            }
            Job::Acked(position) => {
                self.stale |= self.state.acked != position;
                self.state.acked = position;
                (Ok(()), None)
            }
            Job::Spooled(position) => {
                self.stale |= self.state.spooled != position;
                self.state.spooled = position;
                (Ok(()), None)
            }
            Job::Settle => return self.settle(answer),
            Job::Term(ancestry, ceiling, generation) => {
                self.state.generation = self.state.generation.max(generation);
                self.state.term = ancestry.current().id;
                // It begins because what was acknowledged before is in doubt.
                self.state.acked = Position::default();
                self.state.spooled = Position::default();
                self.state.ceiling = self.state.ceiling.max(ceiling);
                let written =
                    self.unfailed(|files, _| files.write_terms(&ancestry)).and(self.write_state());
                (written, Some(Done::Term(ancestry, ceiling)))
            }
            Job::Welcomed(then) => {
                let first = !std::mem::replace(&mut self.told, true);
                let written = if first { self.write_state() } else { Ok(()) };
                self.check(written, answer);
                return then();
            }
            Job::NoteLease(lease) => {
                let written = self.unfailed(|files, state| files.write_lease(state.group, lease));
                // Leases that are not durably known of are not granted.
                (written, (!self.failed).then_some(Done::LeaseNoted))
            }
            Job::Stop(clean) => {
                self.state.clean = clean.filter(|_| !self.failed);
                if self.state.clean.is_some() {
                    self.state.time_ceiling_ns = self.clock.now_ns();
                }
                (self.write_state(), None)
            }
        };
        let done = done.filter(|done| written.is_ok() || !matches!(done, Done::LeaseNoted));
        self.check(written, answer);
        if let Some(done) = done {
            answer(done);
        }
    }

    fn commit(&mut self, commit: &Commit) -> Result<(), StateError> {
        self.unfailed(|files, _| files.write_commit(commit))
    }

    fn write_state(&mut self) -> Result<(), StateError> {
        self.state.generation += u64::from(self.told);
        self.unfailed(|files, state| files.write_state(state))?;
        if !self.failed {
            self.generation.store(self.state.generation, Ordering::Release);
        }
        Ok(())
    }

    /// A file that has failed once is not written again (invariant 7).
    fn unfailed(
        &mut self,
        write: impl FnOnce(&mut StateFiles, &GroupState) -> Result<(), StateError>,
    ) -> Result<(), StateError> {
        if self.failed { Ok(()) } else { write(&mut self.files, &self.state) }
    }

    fn check(&mut self, written: Result<(), StateError>, answer: &dyn Fn(Done)) {
        if let Err(error) = written {
            self.failed = true;
            self.generation.fetch_add(TRACKING_LOST, Ordering::AcqRel);
            tracing::error!(%error, "the state disk failed: changes are no longer tracked");
            answer(Done::Failed(error.to_string()));
        }
    }
}

#[cfg(test)]
mod tests;
