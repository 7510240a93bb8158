//! The agent, made of its real parts, with its threads' turns taken one at a time.

mod link;

use std::{
    cell::RefCell,
    collections::{BTreeMap, VecDeque},
    os::fd::OwnedFd,
    path::Path,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tidemark_agent::{
    capture::{
        Effect, LocalIo, OpId, Payload, Request, RequestId,
        catchup::ReadBack,
        core::Core,
        ring::{Layout, RingMemory, RingReader, SlotRef},
    },
    clock::JournalClock,
    dirty::RegionId,
    encoder::{Encoder, Turn},
    engine::{
        Command,
        course::{Advance, Course},
        digest,
    },
    group::opening::{Opened, Opening, regions},
    link::session::Greeter,
    outbox::Outbox,
    spool::{self, ReadError, Reader, Told, Worker},
    state::{
        files::StateFiles,
        keeper::{Books, Done, Job},
        recovery::LeftSpool,
    },
};
use tidemark_journal::{Ancestry, Compression, GroupId, Position, Sector, Seq, TermId, VolumeId};
use tidemark_link::message::{GroupHello, VolumeHello};
use tidemark_simdisk::{How, Rng, SimDisk, SimFile};

use crate::{
    content::{Entry, Stamp, bytes},
    spool_disk::{self, SimSpool},
    state_disk::{Copy, DIR, SimState},
    target::entries,
};

pub use link::Session;

/// The group.
pub const GROUP: GroupId = GroupId([7; 16]);

/// What every life of an agent has in common.
#[derive(Clone)]
pub struct Site {
    /// The disks of the volumes, `/1`, `/2`, ...
    pub disk: SimDisk,
    /// The disk with the state.
    pub state: SimDisk,
    /// The disk with the spool, if there is one.
    pub spool: Option<SimDisk>,
    /// Which of the two copies of what the state holds may rot, and be missed by writes; none may if
    /// this is none.
    pub rotten: Option<Copy>,
    /// The volumes' sectors.
    pub sizes: Vec<u64>,
    /// How the ring is divided.
    pub layout: Layout,
    /// How many regions are active at once at most.
    pub active_max: usize,
}

impl Site {
    /// Whether the power of its machine is off.
    pub fn is_off(&self) -> bool {
        self.state.is_off() || self.spool.as_ref().is_some_and(SimDisk::is_off)
    }

    /// The volumes as the group names them.
    pub fn volumes(&self) -> Vec<(VolumeId, u64)> {
        (1u16..).map(VolumeId).zip(self.sizes.iter().copied()).collect()
    }

    /// A volume's file.
    ///
    /// # Panics
    /// When the power is off.
    pub fn backing(&self, volume: usize) -> SimFile {
        let path = format!("/{}", volume + 1);
        self.disk.open(Path::new(&path), How::Write).expect("a volume's disk")
    }
}

/// I/O under way.
#[derive(Debug)]
pub enum Task {
    /// The payload is on its way into the slot.
    Copy {
        /// Its name.
        op: OpId,
        /// Whose it is.
        request: RequestId,
        /// Byte of it.
        offset: u64,
        /// Where it goes.
        slot: SlotRef,
    },
    /// On the local disk.
    Local {
        /// Its name.
        op: OpId,
        /// The volume, from 0.
        volume: usize,
        /// What.
        io: LocalIo,
        /// First sector.
        start: u64,
        /// Sectors.
        sectors: u64,
        /// Of a flush: how it went. Of a read: its first half.
        begun: Option<Result<Vec<u8>, i32>>,
    },
}

impl Task {
    /// The volume, if it is a flush that has failed.
    fn failed_flush(&self) -> Option<usize> {
        match self {
            Task::Local { volume, io: LocalIo::Flush, begun: Some(Err(_)), .. } => Some(*volume),
            _ => None,
        }
    }
}

/// A request with its payload.
pub struct Asked {
    /// It.
    pub request: Request,
    /// What a write writes.
    pub content: Vec<Stamp>,
}

/// A running agent.
pub struct Agent {
    /// The capture core.
    pub core: Core,
    /// I/O under way.
    pub tasks: Vec<Task>,
    /// What was answered since it was looked at.
    pub answered: Vec<(RequestId, Result<(), i32>)>,
    /// Volumes whose disk has failed in a flush since it was looked at: what was not safe may be gone.
    pub lost: Vec<usize>,
    /// Every committed record, in order, since it was looked at.
    pub committed: Vec<Entry>,
    /// The link.
    pub session: Session,
    /// Whether it goes on with a ring.
    pub with_ring: bool,
    /// Whether what was left in the spool is sent.
    pub with_spool: bool,
    asked: BTreeMap<u64, Asked>,
    site: Site,
    files: Vec<SimFile>,
    course: Course,
    encoder: Encoder,
    outbox: Arc<Outbox>,
    clock: JournalClock,
    books: Books,
    generation: Arc<AtomicU64>,
    jobs: VecDeque<Job>,
    done: Rc<RefCell<VecDeque<Done>>>,
    commands: VecDeque<Command>,
    greeter: Greeter,
    /// The path that the link was last told, and the sequences reserved for it.
    told: (Ancestry, Seq),
    spool: Option<Worker>,
    reader: Option<Reader>,
    durable: Position,
    changed: bool,
    shadow: RingReader,
    memory: Arc<RingMemory>,
    /// Since a target has welcomed it, the state was written: it may be told of it.
    written: Arc<AtomicBool>,
    number: u64,
    rng: Rng,
}

impl Agent {
    /// Starts where the state and the rings say; `shadow` reads a ring that is gone on with.
    ///
    /// # Errors
    /// The state disk's.
    pub fn start(
        site: &Site,
        rings: Vec<OwnedFd>,
        shadow: Option<RingReader>,
        rng: &mut Rng,
    ) -> anyhow::Result<Agent> {
        let volumes = site.volumes();
        let dir = Path::new(DIR);
        let disk = Box::new(SimState::new(&site.state, site.rotten, rng.fork())?);
        let (files, found) = StateFiles::on(disk, dir, GROUP, &regions(&volumes))?;
        let mut fresh = [[0; 16]; 3];
        for id in &mut fresh {
            id[..8].copy_from_slice(&rng.next_u64().to_le_bytes());
        }
        let opening = Opening {
            group: GROUP,
            name: "group",
            volumes: &volumes,
            layout: site.layout,
            active_max: site.active_max,
            sync_timeout: None,
            rings,
            fresh,
        };
        let store = match &site.spool {
            Some(disk) => {
                let media = Arc::new(SimSpool::new(disk)?);
                Some(spool::recover(media, GROUP, spool_disk::LIMITS)?)
            }
            None => None,
        };
        let ends = store.as_ref().and_then(|store| store.index().ends());
        let left_spool = ends.map(|(before, end)| LeftSpool { before, end });
        let Opened {
            files,
            state,
            ancestry,
            clock,
            place,
            reader,
            outbox,
            core,
            with_ring,
            with_spool,
            ..
        } = opening.open(dir, files, &found, left_spool)?;
        if let Some(store) = &store {
            outbox.use_spool(store.index().clone(), with_spool);
        }
        let generation = Arc::new(AtomicU64::new(state.generation));
        let memory = core.ring_memory().clone();
        let hello = volumes.iter().map(|(id, sectors)| VolumeHello {
            id: *id,
            name: format!("volume{}", id.0),
            sectors: *sectors,
            logical_block_bytes: 512,
            physical_block_bytes: 512,
        });
        let greeter = Greeter {
            group: GroupHello { id: GROUP, name: "group".into() },
            volumes: hello.collect(),
            acked: state.acked,
            generation_found: state.generation,
            greeted: false,
            doubted: None,
            sync: false,
        };
        let fresh_shadow = RingReader::new(memory.clone());
        Ok(Agent {
            core,
            tasks: Vec::new(),
            answered: Vec::new(),
            lost: Vec::new(),
            committed: Vec::new(),
            session: Session::Down,
            with_ring,
            with_spool,
            asked: BTreeMap::new(),
            site: site.clone(),
            files: (0..site.sizes.len()).map(|volume| site.backing(volume)).collect(),
            course: Course::new(ancestry.clone(), outbox.clone()),
            encoder: Encoder::new(
                GROUP,
                place,
                reader,
                outbox.clone(),
                clock,
                Compression::Zstd(1),
            ),
            outbox: outbox.clone(),
            clock,
            books: Books::new(files, state, clock, generation.clone()),
            generation,
            jobs: VecDeque::new(),
            done: Rc::default(),
            commands: VecDeque::new(),
            greeter,
            told: (ancestry, Seq::ZERO),
            spool: store.map(|store| Worker::new(store, outbox.clone())),
            reader: None,
            durable: Position::default(),
            changed: false,
            shadow: if with_ring { shadow.unwrap_or(fresh_shadow) } else { fresh_shadow },
            memory,
            written: Arc::default(),
            number: 0,
            rng: rng.fork(),
        })
    }

    /// What an agent leaves behind that is killed: its ring, and who reads along in it.
    ///
    /// # Panics
    /// When the ring is no memfd.
    pub fn leave(self) -> (OwnedFd, RingReader) {
        let fd = self.memory.region().fd().expect("a memfd").try_clone_to_owned();
        (fd.expect("a descriptor"), self.shadow)
    }

    /// A turn of the engine: carries out what the core has decided.
    pub fn turn(&mut self) {
        self.core.set_now(self.clock.now_ns());
        self.core.allow_catch_up(u64::MAX);
        let rng = &mut self.rng;
        let fresh = || {
            let mut id = [1; 16];
            id[..8].copy_from_slice(&rng.next_u64().to_le_bytes());
            Some(TermId(id))
        };
        if let Advance::Write(job) = self.course.advance(&mut self.core, fresh) {
            self.jobs.push_back(job);
        }
        self.core.poll();
        while self.carry_out() {
            self.core.poll();
        }
    }

    fn carry_out(&mut self) -> bool {
        let mut any = false;
        while let Some(effect) = self.core.effect() {
            any = true;
            match effect {
                Effect::Copy { op, request, offset, slot } => {
                    self.tasks.push(Task::Copy { op, request, offset, slot });
                }
                Effect::Local { op, volume, io, start, sectors } => {
                    let volume = usize::from(volume.0) - 1;
                    // A flush covers what was complete when it began, and no more.
                    let begun = (io == LocalIo::Flush).then(|| self.sync(volume));
                    let start = start.0;
                    self.tasks.push(Task::Local { op, volume, io, start, sectors, begun });
                }
                Effect::Complete { request, result } => {
                    self.asked.remove(&request.0);
                    self.answered.push((request, result));
                }
                Effect::CommitMap(commit) => self.jobs.push_back(Job::Commit(commit)),
                Effect::Reserve(seq) => self.jobs.push_back(Job::Reserve(seq)),
                Effect::NoteLease(lease) => self.jobs.push_back(Job::NoteLease(lease)),
            }
        }
        self.read_along();
        any
    }

    fn read_along(&mut self) {
        let committed = &mut self.committed;
        while self.shadow.take(|record, payload| {
            committed.push(Entry::new(record, payload));
            true
        }) {}
    }

    fn sync(&mut self, volume: usize) -> Result<Vec<u8>, i32> {
        let result = self.files[volume].sync().map(|()| Vec::new()).map_err(errno);
        if result.is_err() {
            self.lost.push(volume);
        }
        result
    }

    /// The volumes with a flush under way that has failed.
    pub fn failing(&self) -> impl Iterator<Item = usize> {
        self.tasks.iter().filter_map(Task::failed_flush)
    }

    /// It hears of the flushes that have failed.
    pub fn hear_of_failures(&mut self) {
        let failed = |task: &Task| task.failed_flush().is_some();
        while let Some(task) = self.tasks.iter().position(failed) {
            self.work(task);
        }
    }

    /// Takes a request of a front.
    pub fn submit(&mut self, asked: Asked) {
        let request = asked.request;
        self.asked.insert(request.id.0, asked);
        self.core.submit(request);
        self.turn();
    }

    /// Goes on with one of [`Self::tasks`].
    pub fn work(&mut self, task: usize) {
        match self.tasks.swap_remove(task) {
            Task::Copy { op, request, offset, slot } => {
                let content = bytes(&self.asked[&request.0].content);
                let part = &content[offset as usize..(offset + slot.payload_bytes) as usize];
                self.memory.region().copy_in(slot.payload_at, part).expect("a slot in the ring");
                self.core.copied(op, Ok(()));
            }
            Task::Local { op, io: LocalIo::Flush, begun, .. } => {
                let result = begun.unwrap_or(Ok(Vec::new())).map(|_| ());
                self.core.local_ended(op, result);
            }
            Task::Local { op, volume, io: LocalIo::Read { hash }, start, sectors, begun } => {
                let half = sectors / 2;
                let io = LocalIo::Read { hash };
                if begun.is_none() && half > 0 && self.rng.chance(500_000) {
                    let begun = Some(self.read(volume, start, half));
                    self.tasks.push(Task::Local { op, volume, io, start, sectors, begun });
                    return;
                }
                let content = match begun {
                    None => self.read(volume, start, sectors),
                    Some(first) => first.and_then(|mut first| {
                        first.extend(self.read(volume, start + half, sectors - half)?);
                        Ok(first)
                    }),
                };
                match content {
                    Err(errno) => self.core.read_ended(op, Err(errno)),
                    Ok(data) => {
                        let (zeros, hashes) = digest(&data, hash);
                        self.core
                            .read_ended(op, Ok(ReadBack { data: &data, zeros, hashes: &hashes }));
                    }
                }
            }
            Task::Local { op, volume, io, start, sectors, .. } => {
                let mut result = self.write(volume, io, start, sectors);
                let (LocalIo::Write { fua, .. } | LocalIo::Zero { fua, .. }) = io else {
                    unreachable!("reads and flushes are above")
                };
                if fua && result.is_ok() {
                    result = self.sync(volume).map(|_| ());
                }
                self.core.local_ended(op, result);
            }
        }
        self.turn();
    }

    fn read(&self, volume: usize, start: u64, sectors: u64) -> Result<Vec<u8>, i32> {
        let mut content = vec![0; (sectors * 512) as usize];
        self.files[volume].read_at(&mut content, start * 512).map_err(errno)?;
        Ok(content)
    }

    fn local_content(&self, io: LocalIo, sectors: u64) -> Vec<u8> {
        match io {
            LocalIo::Write { payload: Payload::Ring(slot), .. } => {
                let mut content = vec![0; slot.payload_bytes as usize];
                let region = self.memory.region();
                region.copy_out(slot.payload_at, &mut content).expect("a slot in the ring");
                content
            }
            LocalIo::Write { payload: Payload::Request(request, offset), .. } => {
                let content = bytes(&self.asked[&request.0].content);
                content[offset as usize..(offset + sectors * 512) as usize].to_vec()
            }
            _ => vec![0; (sectors * 512) as usize],
        }
    }

    fn write(&self, volume: usize, io: LocalIo, start: u64, sectors: u64) -> Result<(), i32> {
        let content = self.local_content(io, sectors);
        self.files[volume].write_at(&content, start * 512).map_err(errno)
    }

    /// The agent or the machine dies: of writes under way any sectors may have been written.
    pub fn abandon_writes(&mut self) {
        let tasks = std::mem::take(&mut self.tasks);
        for task in &tasks {
            let Task::Local { volume, io, start, sectors, .. } = task else { continue };
            if !matches!(io, LocalIo::Write { .. } | LocalIo::Zero { .. }) {
                continue;
            }
            let content = self.local_content(*io, *sectors);
            let share = [0, 500_000, 1_000_000][self.rng.below(3) as usize];
            for (index, sector) in content.chunks(512).enumerate() {
                if self.rng.chance(share) {
                    // Who writes now is not there any more to hear of an error.
                    let _ = self.files[*volume].write_at(sector, (start + index as u64) * 512);
                }
            }
        }
    }

    /// Jobs and answers of the keeper that wait, and commands for the engine.
    pub fn waiting(&self) -> (usize, usize, usize) {
        (self.jobs.len(), self.done.borrow().len(), self.commands.len())
    }

    /// The keeper does its next job, or what is not urgent.
    pub fn keep(&mut self, lazily: bool) {
        let done = &self.done;
        let answer = |answer: Done| done.borrow_mut().push_back(answer);
        if lazily {
            self.books.work_lazily(&answer);
        } else if let Some(job) = self.jobs.pop_front() {
            self.books.work(job, &answer);
        }
    }

    /// The engine hears the keeper's next answer.
    pub fn hear_keeper(&mut self) {
        let done = self.done.borrow_mut().pop_front();
        if let Some(done) = done
            && let Some(term) = self.course.kept(&mut self.core, done)
        {
            self.encoder.set_place(term.place);
            self.told = (term.ancestry, term.ceiling);
            self.durable = Position::default();
            self.changed = true;
        }
        self.turn();
    }

    /// Takes the next step towards a stop in order; true when only the keeper's [`Self::end`] is left.
    pub fn settle(&mut self) -> bool {
        let settled = self.core.settle_for_stop() == Some(true);
        self.turn();
        settled
    }

    /// The keeper writes that the agent has stopped in order.
    pub fn end(&mut self) {
        self.books.work(Job::Stop(Some(self.core.last_seq())), &|_| {});
    }

    /// Epochs of dirty bits go on.
    pub fn maintain(&mut self) {
        self.core.maintain();
        self.turn();
    }

    /// The encoder takes a turn, if it would not have to wait for room. Whether it made a frame.
    pub fn encode(&mut self) -> bool {
        // What is encoded may be freed before the next look.
        self.read_along();
        self.encoder.has_room() && self.encoder.turn() == Turn::Framed
    }

    /// The spool's thread does its next chore.
    pub fn spool(&mut self) {
        let commands = RefCell::new(&mut self.commands);
        let tell = |told| {
            commands.borrow_mut().push_back(match told {
                Told::Spooled(position, epoch) => Command::Spooled(position, epoch),
                Told::Settle => Command::Settle,
            });
        };
        if let Some(worker) = &mut self.spool {
            worker.turn(Duration::ZERO, &tell);
        }
    }

    /// The records that lie in the spool, after a sequence.
    ///
    /// # Errors
    /// Why they cannot be read.
    pub fn spooled(&self, mut after: Seq) -> Result<Vec<Entry>, ReadError> {
        let mut found = Vec::new();
        let mut bytes = Vec::new();
        let Some((mut reader, end)) = self.outbox.next_in_spool().and_then(|(_, index)| {
            let (_, end) = index.ends()?;
            Some((Reader::new(index), end))
        }) else {
            return Ok(found);
        };
        while after < end.seq {
            after = reader.next(after, &mut bytes)?.last.seq;
            found.extend(entries(&bytes).1);
        }
        Ok(found)
    }

    /// Whether a region waits for catch-up.
    pub fn is_uncaptured(&self, volume: usize, sector: u64) -> bool {
        let id = VolumeId(volume as u16 + 1);
        self.core.map().uncaptured(id).get(RegionId::of(id, Sector(sector)).index)
    }

    /// Whether nothing is left to be done by anybody here.
    pub fn is_quiet(&self) -> bool {
        let volumes = self.site.volumes();
        let whole = |(id, _): &(VolumeId, u64)| {
            self.core.gap(*id).is_none() && self.core.map().uncaptured(*id).count() == 0
        };
        self.waiting() == (0, 0, 0)
            && self.tasks.is_empty()
            && self.core.is_idle()
            && !self.core.is_overflowing()
            && volumes.iter().all(whole)
            && self.core.durable() == self.core.last_seq()
    }

    /// The path of terms as the link knows it.
    pub fn ancestry(&self) -> &Ancestry {
        &self.told.0
    }

    /// Whether its state disk has failed.
    pub fn has_lost_track(&self) -> bool {
        self.course.tracking_lost().is_some()
    }

    /// The generation of the state that is durable.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }
}

fn errno(error: std::io::Error) -> i32 {
    error.raw_os_error().unwrap_or(tidemark_simdisk::errno::EIO)
}
