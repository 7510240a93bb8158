//! The engine's loop.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use tidemark_journal::{
    Ancestry, Seq, TermId,
    record::{MARK_ID_BYTES, MARK_NAME_BYTES_MAX},
};
use tokio::sync::oneshot;

use super::{
    Command, Engine, Parts, Snapshot, VolumeSnapshot,
    course::{Advance, Course},
    effects::Disk,
    hasher::Seen,
    requests::FrontRequest,
    ublk::Devices,
};
use crate::{
    capture::core::Core,
    carriers::Carriers,
    clock::{JournalClock, wall_ns},
    dirty::regions_in,
    encoder,
    kernel::uring::Closer,
    state::keeper::{Done, Job, Keeper},
};

/// The longest the loop sleeps: how old a snapshot of an idle group gets.
const TICK: Duration = Duration::from_millis(200);
/// How often epochs of dirty bits are closed.
const MAINTAIN: Duration = Duration::from_secs(5);
/// How long the keeper is not told of what it writes when there is time.
const NOTES: Duration = Duration::from_millis(500);

pub(super) struct Loop {
    pub core: Core,
    pub disk: Disk,
    pub devices: Devices,
    clock: JournalClock,
    encoder: encoder::Waker,
    carriers: Arc<Carriers>,
    keeper: Keeper,
    /// What it writes when there is time, the newest of each kind. To wake it for every acknowledgement would cost
    /// more than the acknowledgement.
    notes: [Option<Job>; 2],
    notes_at: Instant,
    course: Course,
    on_term: Box<dyn Fn(Ancestry, Seq) + Send>,
    inbox: mpsc::Receiver<Command>,
    pending: Arc<AtomicBool>,
    snapshot: Arc<Mutex<Snapshot>>,
    snapshot_at: Instant,
    maintain_at: Instant,
    catch_up_bytes_per_s: Option<u64>,
    catch_up_at: Instant,
    stop: Option<(bool, oneshot::Sender<bool>)>,
    /// The keeper has been asked to write at once what was acknowledged, for the stop.
    stop_noted: bool,
    /// What is on its way to the target hurries, since answers wait for it.
    hurry: bool,
}

impl Loop {
    pub fn new(
        parts: Parts,
        commands: mpsc::Sender<Command>,
        inbox: mpsc::Receiver<Command>,
        make_keeper: impl FnOnce(Box<dyn Fn(Done) + Send>) -> std::io::Result<Keeper>,
    ) -> anyhow::Result<(Engine, Loop)> {
        let mut disk = Disk::new(parts.core.ring_region(), &parts.volumes)?;
        let engine = Engine {
            commands,
            waker: disk.ring.waker(),
            closer: Closer::default(),
            pending: Arc::new(AtomicBool::new(false)),
            state: Arc::default(),
        };
        disk.ring.close_with(engine.closer.clone());
        let teller = engine.clone();
        let keeper = make_keeper(Box::new(move |done| {
            teller.tell(Command::Kept(done));
        }))?;
        let teller = engine.clone();
        disk.start_hasher(move |seen| {
            teller.tell(Command::Seen(seen));
        })?;
        let now = Instant::now();
        let mut work = Loop {
            core: parts.core,
            disk,
            devices: Devices::default(),
            clock: parts.clock,
            encoder: parts.encoder,
            carriers: parts.carriers,
            keeper,
            notes: [const { None }; 2],
            notes_at: now,
            course: Course::new(parts.ancestry, parts.outbox),
            on_term: parts.on_term,
            inbox,
            pending: engine.pending.clone(),
            snapshot: engine.state.clone(),
            snapshot_at: now,
            maintain_at: now + MAINTAIN,
            catch_up_bytes_per_s: parts.catch_up_bytes_per_s,
            catch_up_at: now,
            stop: None,
            stop_noted: false,
            hurry: false,
        };
        work.publish(now);
        Ok((engine, work))
    }

    pub fn run(&mut self) {
        loop {
            if let Err(error) = self.disk.ring.wait(Some(TICK)) {
                // Nothing can be answered without the ring: the devices' requests stay with the
                // kernel, for the next agent.
                tracing::error!(%error, "the io_uring of the capture thread failed");
                return;
            }
            self.core.set_now(self.clock.now_ns());
            while let Some(completion) = self.disk.ring.completion() {
                self.completed(completion);
            }
            // A swap, not a store: it must not be reordered with the look into the inbox, or a command
            // that comes in between would wait for the next tick.
            self.pending.swap(false, Ordering::AcqRel);
            while let Ok(command) = self.inbox.try_recv() {
                self.command(command);
            }
            self.tick(Instant::now());
            // What is carried out may give the core more to think about.
            self.core.poll();
            while self.carry_out() {
                // Reads, and writes without a record, are nothing to the encoder.
                if !self.core.is_drained() {
                    self.encoder.committed(self.core.ring_fill_permille());
                }
                self.core.poll();
            }
            self.hurry();
            if self.advance_stop() {
                return;
            }
        }
    }

    fn tick(&mut self, now: Instant) {
        if now >= self.maintain_at {
            self.maintain_at = now + MAINTAIN;
            self.core.maintain();
        }
        if now >= self.notes_at {
            self.notes_at = now + NOTES;
            self.tell_notes();
        }
        self.core.hold_catch_up(self.course.is_backlogged());
        let since = now.duration_since(self.catch_up_at);
        match self.catch_up_bytes_per_s {
            None => self.core.allow_catch_up(u64::MAX),
            Some(rate) if since >= Duration::from_millis(20) => {
                self.catch_up_at = now;
                self.core.allow_catch_up((rate as f64 * since.as_secs_f64()) as u64 + 1);
            }
            Some(_) => {}
        }
        if now.duration_since(self.snapshot_at) >= Duration::from_millis(50) {
            self.publish(now);
        }
        self.advance_doubt();
    }

    /// Has the keeper write something, after all that it was to be told of before.
    pub(super) fn keep(&mut self, job: Job) {
        self.tell_notes();
        self.keeper.ask(job);
    }

    fn tell_notes(&mut self) {
        self.notes.iter_mut().filter_map(Option::take).for_each(|note| self.keeper.ask(note));
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Request(request) => self.front_request(request),
            Command::Kept(done) => self.kept(done),
            Command::Seen(Seen::Data(op)) => self.disk.submit_catch_up_read(op),
            Command::Seen(Seen::Content(hashed)) => {
                self.core.read_ended(hashed.op, Ok(self.disk.hashed(&hashed)));
                self.disk.catch_up_read_ended(hashed.op);
            }
            Command::Durable(seq) => {
                self.notes[0] = self.course.durable(&mut self.core, seq).or(self.notes[0].take());
            }
            Command::Spooled(position, epoch) => {
                self.notes[1] = self.course.spooled(position, epoch).or(self.notes[1].take());
            }
            Command::Settle => self.keep(Job::Settle),
            Command::Peer(peer) => self.core.peer(peer),
            Command::LeaseAsk(grant) => {
                // The time at the turn's beginning may be before the question.
                self.core.set_now(self.clock.now_ns());
                if let Some(lease) = self.core.lease_asked() {
                    grant(lease);
                }
            }
            Command::Link(mode) => self.core.link(mode.filter(|_| self.stop.is_none())),
            Command::Needed(seq, bits) => self.core.needed(seq, |block| {
                bits.get(block as usize / 8).is_some_and(|byte| byte & (1 << (block % 8)) != 0)
            }),
            Command::Mark(name, answer) => {
                let _ = answer.send(self.mark(&name));
            }
            Command::Verify(volume) => {
                for id in self.disk.volume_ids() {
                    if volume.is_none_or(|wanted| wanted == id) {
                        self.core.verify(id);
                    }
                }
            }
            Command::VerifyFrom(id, region) => {
                if self.disk.volume_sectors(id).is_some() {
                    self.core.verify_from(id, region);
                }
            }
            Command::Repair(runs) => {
                for run in runs {
                    self.core.compare(run.volume, run.first, run.regions);
                }
            }
            Command::Doubt(after) => {
                self.course.doubt(&mut self.core, after);
                self.encoder.wake();
            }
            Command::Report(answer) => {
                // Who asked may have given up.
                let _ = answer.send(self.look());
            }
            Command::Serve(queue) => self.devices.serve(queue, &mut self.disk.ring),
            Command::Stop { at_once, done } => {
                self.core.link(None);
                self.core.stop_leases();
                self.devices.pause();
                self.stop = Some((at_once, done));
            }
        }
    }

    fn front_request(&mut self, request: FrontRequest) {
        let Some(sectors) = self.disk.volume_sectors(request.volume) else {
            let _ = request.answer.send(Err(libc::ENXIO));
            return;
        };
        let end = request.range.start.0.checked_add(request.range.sectors);
        if end.is_none_or(|end| end > sectors) {
            let _ = request.answer.send(Err(libc::EINVAL));
            return;
        }
        if let Some(request) = self.disk.front_request(request) {
            self.core.submit(request);
        }
    }

    fn kept(&mut self, done: Done) {
        if let Some(term) = self.course.kept(&mut self.core, done) {
            self.encoder.set_place(term.place);
            (self.on_term)(term.ancestry, term.ceiling);
        }
    }

    fn mark(&mut self, name: &str) -> Result<Seq, String> {
        if name.is_empty() || name.len() > MARK_NAME_BYTES_MAX {
            return Err(format!("a mark's name has 1 to {MARK_NAME_BYTES_MAX} bytes"));
        }
        let mut payload = vec![0; MARK_ID_BYTES];
        payload.extend_from_slice(name.as_bytes());
        self.core.mark(&payload)
    }

    fn advance_doubt(&mut self) {
        match self.course.advance(&mut self.core, || TermId::random().ok()) {
            Advance::Nothing => {}
            Advance::Waits => self.encoder.wake(),
            Advance::Write(job) => self.keep(job),
        }
    }

    /// True when the engine is to end.
    fn advance_stop(&mut self) -> bool {
        let Some((at_once, _)) = self.stop else { return false };
        let sent = self.disk.is_idle() && self.core.last_seq() == self.core.durable();
        // Catch-up goes on after the next start; there is nothing to wait for but what has been caught up.
        let settled = if sent { self.core.settle_for_stop() } else { None };
        if sent && self.core.awaits_note() && !std::mem::replace(&mut self.stop_noted, true) {
            self.keep(Job::Settle);
        }
        let in_gap = self.disk.volume_ids().iter().any(|id| self.core.gap(*id).is_some());
        let clean = settled == Some(true) && !in_gap && self.course.tracking_lost().is_none();
        // Who stops it may write to the disks next.
        let through = settled.is_some() && !self.core.has_granted() || at_once;
        if !through {
            return false;
        }
        if self.carry_out() {
            self.encoder.wake();
        }
        self.keep(Job::Stop(clean.then_some(self.core.last_seq())));
        if let Some((_, done)) = self.stop.take() {
            let _ = done.send(clean);
        }
        true
    }

    fn hurry(&mut self) {
        let hurry = self.core.holds_answers();
        if std::mem::replace(&mut self.hurry, hurry) != hurry {
            self.encoder.hurry(hurry);
            self.carriers.hurry(hurry);
        }
    }

    fn publish(&mut self, now: Instant) {
        self.snapshot_at = now;
        let frames_permille = self.course.frames_permille();
        self.carriers.ring_filled(self.core.ring_fill_permille().max(frames_permille));
        let snapshot = self.look();
        *self.snapshot.lock().unwrap_or_else(PoisonError::into_inner) = snapshot;
    }

    fn look(&self) -> Snapshot {
        let (active, dirty) = self.core.map().counts();
        let volumes = self.disk.volume_ids().into_iter().map(|id| VolumeSnapshot {
            id,
            gap: self.core.gap(id),
            uncaptured_regions: self.core.map().uncaptured(id).count(),
            regions: regions_in(self.disk.volume_sectors(id).unwrap_or(0)),
            unreadable: self.core.unreadable(id),
            verify: self.core.verify_progress(id),
            verify_reached: self.core.verify_reached(id),
        });
        let (sync, answers_waiting) = self.core.sync_view();
        Snapshot {
            sync,
            answers_waiting: answers_waiting as u64,
            counters: self.core.counters(),
            last_seq: self.core.last_seq(),
            vouched: self.core.vouched(),
            journal_ns: self.clock.now_ns(),
            wall_ns: wall_ns(),
            durable: self.core.durable(),
            ceiling: self.core.ceiling(),
            ring_fill_permille: self.core.ring_fill_permille(),
            overflow: self.core.is_overflowing(),
            active_regions: active as u64,
            dirty_regions: dirty,
            doubted: self.course.doubted().map(str::to_owned),
            tracking_lost: self.course.tracking_lost().map(str::to_owned),
            requests: self.disk.requests_under_way() as u64,
            redone_writes_left: self.core.redo_count() as u64,
            volumes: volumes.collect(),
        }
    }
}
