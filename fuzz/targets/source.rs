//! A source's session with a target that sends anything: its welcome, and what it says while the source
//! catches up. The messages follow each other without regard to who would have to speak.
#![no_main]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use tidemark_agent::capture::catchup::ReadBack;
use tidemark_agent::capture::ring::{Layout, RingReader};
use tidemark_agent::capture::{Effect, LocalIo, core::Core};
use tidemark_agent::dirty::{REGION_SECTORS, active::SLOTS};
use tidemark_agent::engine::course::{Advance, Course};
use tidemark_agent::group::opening::{Opening, regions};
use tidemark_agent::link::session::{Greeter, Start, acknowledged, peer};
use tidemark_agent::state::files::StateFiles;
use tidemark_agent::state::keeper::{Done, Job};
use tidemark_fuzz::{files::Files, messages};
use tidemark_journal::record::{OFFER_BLOCK_BYTES, OFFER_HASH_BYTES};
use tidemark_journal::{GroupId, Position, SECTOR_BYTES, Seq, TermId, VolumeId};
use tidemark_link::Message;
use tidemark_link::message::{GroupHello, VolumeHello};

const GROUP: GroupId = GroupId([1; 16]);
const VOLUME: (VolumeId, u64) = (VolumeId(1), 4 * REGION_SECTORS);

fuzz_target!(|bytes: &[u8]| {
    let mut source = Source::new();
    source.turn();
    for message in messages(bytes) {
        if !source.hear(message) {
            return;
        }
        source.turn();
    }
});

struct Source {
    core: Core,
    course: Course,
    greeter: Greeter,
    outbox: Arc<tidemark_agent::outbox::Outbox>,
    reader: RingReader,
    durable: Position,
    generation: u64,
    terms: u8,
}

impl Source {
    /// A new group.
    fn new() -> Source {
        let dir = Path::new("/state");
        let regions = regions(&[VOLUME]);
        let files = StateFiles::on(Box::new(Files::default()), dir, GROUP, &regions);
        let (files, found) = files.expect("an empty directory");
        let opening = Opening {
            group: GROUP,
            name: "shop",
            volumes: &[VOLUME],
            layout: Layout { slots: 256, data_bytes: 1 << 20, frame_bytes: 64 << 10 },
            active_max: SLOTS,
            rings: Vec::new(),
            sync_timeout: Some(Duration::from_secs(3)),
            fresh: [[7; 16], [8; 16], [9; 16]],
        };
        let opened = opening.open(dir, files, &found, None).expect("a new group");
        let volume = VolumeHello {
            id: VOLUME.0,
            name: "data".into(),
            sectors: VOLUME.1,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
        };
        let greeter = Greeter {
            group: GroupHello { id: GROUP, name: "shop".into() },
            volumes: vec![volume],
            acked: Position::default(),
            generation_found: opened.state.generation,
            greeted: false,
            doubted: None,
            sync: true,
        };
        Source {
            course: Course::new(opened.ancestry, Arc::clone(&opened.outbox)),
            core: opened.core,
            greeter,
            outbox: opened.outbox,
            reader: opened.reader,
            durable: Position::default(),
            generation: opened.state.generation,
            terms: 10,
        }
    }

    /// What the link makes of a message. False when it ends.
    fn hear(&mut self, message: Message) -> bool {
        match message {
            Message::Welcome(welcome) => {
                let (path, ceiling) = (self.course.ancestry().clone(), self.core.ceiling());
                let hello = self.greeter.hello(path, self.durable, ceiling, self.generation);
                let mut sent = Vec::new();
                Message::Hello(hello.clone()).encode(&mut sent).expect("of bounded length");
                assert_eq!(messages(&sent), [Message::Hello(hello.clone())], "a target reads it");
                match self.greeter.welcomed(&hello, &welcome, &self.outbox) {
                    Start::Stream { mode, .. } => {
                        self.generation += 1;
                        self.core.peer(peer(&welcome));
                        self.core.link(Some(mode));
                    }
                    Start::Doubt { after } => {
                        self.core.link(None);
                        self.durable = Position::default();
                        self.course.doubt(&mut self.core, after);
                    }
                    Start::Refused(_) => return false,
                }
            }
            Message::Ack(ack) => {
                let path = self.course.ancestry();
                if let Some(at) = acknowledged(&ack, path, self.durable, &self.outbox) {
                    self.durable = at;
                    self.outbox.release(at.seq);
                    if let Some(Job::Acked(at)) = self.course.durable(&mut self.core, at.seq) {
                        self.course.kept(
                            &mut self.core,
                            Done::Noted { acked: at.seq, spooled: Seq::ZERO },
                        );
                    }
                }
            }
            Message::Need(need) => self.core.needed(need.seq, |block| need.wants(block as usize)),
            Message::Repair(repair) => {
                for run in repair.runs {
                    self.core.compare(run.volume, run.first, run.regions);
                }
            }
            Message::LeaseAsk(_) => {
                let _ = self.core.lease_asked();
            }
            _ => return false,
        }
        true
    }

    /// The engine's turns, with a disk of zeros and a keeper that is done at once.
    fn turn(&mut self) {
        for _ in 0..4 {
            self.core.allow_catch_up(u64::MAX);
            let mut fresh = || {
                self.terms = self.terms.checked_add(1)?;
                Some(TermId([self.terms; 16]))
            };
            if let Advance::Write(Job::Term(path, ceiling, generation)) =
                self.course.advance(&mut self.core, &mut fresh)
            {
                self.generation = self.generation.max(generation) + 1;
                self.course.kept(&mut self.core, Done::Term(path, ceiling));
            }
            self.core.poll();
            while let Some(effect) = self.core.effect() {
                self.carry_out(effect);
            }
            while self.reader.take(|_, _| true) {}
            self.reader.encoded();
        }
        assert!(self.core.last_seq() <= self.core.ceiling());
        let end = self.course.ancestry().at(self.core.last_seq());
        assert_eq!(end.term, self.course.ancestry().current().id, "it writes its newest term");
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Local { op, io: LocalIo::Read { .. }, sectors, .. } => {
                let bytes = sectors * SECTOR_BYTES;
                let hashes = bytes.div_ceil(OFFER_BLOCK_BYTES) as usize * OFFER_HASH_BYTES;
                let (data, hashes) = (vec![0; bytes as usize], vec![3; hashes]);
                let read = ReadBack { data: &data, zeros: false, hashes: &hashes };
                self.core.read_ended(op, Ok(read));
            }
            Effect::Local { op, .. } => self.core.local_ended(op, Ok(())),
            Effect::CommitMap(_) => self.core.map_committed(),
            Effect::Reserve(seq) => self.core.ceiling_reserved(seq),
            Effect::NoteLease(_) => self.core.lease_noted(),
            Effect::Copy { .. } | Effect::Complete { .. } => {}
        }
    }
}
