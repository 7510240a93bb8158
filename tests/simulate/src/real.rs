//! The real target behind the simulator's seam: its log, base, catalogue and sessions on a simulated
//! disk of its own, with clocks of its own.

use std::{path::Path, time::Duration};

use tidemark_control::config::{Bytes, Seconds};
use tidemark_journal::{Position, Seq};
use tidemark_link::{
    NodeName,
    message::{Hello, Message},
};
use tidemark_simdisk::{Faults, Image, Rng, SimDisk};
use tidemark_target::{
    config::{GroupConfig, StoreConfig},
    points::Spec,
    simulation::{DATA_DIR, SimConfig, SimTarget},
};

use crate::{
    content::{Stamp, stamps},
    target::Target,
};

/// The group's name, as the agent greets with it.
const GROUP: &str = "group";
/// How long history is kept.
const WINDOW: Duration = Duration::from_secs(20);

/// A played target with its machine.
pub struct Real {
    config: SimConfig,
    disk: SimDisk,
    /// There is none only while it is started.
    target: Option<SimTarget>,
    node: NodeName,
    wall_ns: i64,
    image: Option<Image>,
    /// Something of what it has may be damaged.
    damaged: bool,
    rng: Rng,
}

impl Real {
    /// A new one.
    ///
    /// # Panics
    /// When it does not start.
    pub fn new(rng: &mut Rng) -> Real {
        let mut rng = rng.fork();
        let node: NodeName = "source".parse().expect("a name");
        let group = GroupConfig {
            name: GROUP.parse().expect("a name"),
            node: node.clone(),
            readers: Vec::new(),
            branch_writers: Vec::new(),
            window: Seconds(WINDOW.as_secs()),
            window_min: Seconds(1),
            // Its size is never what makes history leave.
            size_max: Bytes(1 << 30),
        };
        let store = StoreConfig {
            // Most of it is room for the index.
            segment: Bytes([160 << 10, 400 << 10][rng.below(2) as usize]),
            page_cache: Bytes(64 << 10),
            chunk_cache: Bytes(512 << 10),
        };
        let mut real = Real {
            config: SimConfig { groups: vec![group], store },
            disk: SimDisk::new(rng.next_u64()),
            target: None,
            node,
            wall_ns: 1_700_000_000_000_000_000,
            image: None,
            damaged: false,
            rng,
        };
        real.start();
        real
    }

    fn start(&mut self) {
        let seed = self.rng.next_u64();
        let started = SimTarget::start(&self.config, &self.disk, seed, self.wall_ns);
        let target = started.unwrap_or_else(|why| panic!("the target does not start: {why:#}"));
        if let Some(why) = target.failure(GROUP) {
            panic!("the replica cannot be opened: {why}");
        }
        let notices = target.notices(GROUP);
        assert!(
            self.damaged || notices.is_empty(),
            "nothing was damaged, and the target says {notices:?}"
        );
        self.target = Some(target);
    }

    fn target(&self) -> &SimTarget {
        self.target.as_ref().expect("it runs")
    }

    fn target_mut(&mut self) -> &mut SimTarget {
        self.target.as_mut().expect("it runs")
    }
}

impl Target for Real {
    fn connect(&mut self, hello: Hello) {
        let node = self.node.clone();
        self.target_mut().connect(&node, hello);
    }

    fn disconnect(&mut self) {
        self.target_mut().disconnect();
    }

    fn feed(&mut self, message: Message) {
        self.target().feed(message);
    }

    fn advance(&mut self, ns: u64) {
        if self.rng.below(100) == 0 {
            // An hour forward or back at most.
            let by_ns = self.rng.below(7200 << 30) as i64 - (3600 << 30);
            self.target().step_wall(by_ns);
            self.wall_ns += by_ns;
        }
        self.wall_ns += ns as i64;
        self.target().advance(Duration::from_nanos(ns));
    }

    fn replies(&mut self) -> Vec<Message> {
        self.target_mut().replies()
    }

    fn position(&self) -> Position {
        self.target().position(GROUP)
    }

    fn points(&self) -> Vec<(Seq, Seq)> {
        self.target().points(GROUP, None)
    }

    fn read(
        &self,
        volume: usize,
        seq: Seq,
        start: u64,
        sectors: u64,
    ) -> Result<Vec<Stamp>, String> {
        let name = format!("volume{}", volume + 1);
        let range = start..start + sectors;
        let content = self.target().sectors(GROUP, &name, &Spec::Seq(seq), range);
        content.map(|bytes| stamps(&bytes)).map_err(|why| why.to_string())
    }

    fn oldest(&self) -> Seq {
        self.target().oldest(GROUP)
    }

    fn window_ns(&self) -> u64 {
        WINDOW.as_nanos() as u64
    }

    fn cut_after(&mut self, effects: u64) {
        self.disk.cut_after(effects);
    }

    fn is_off(&self) -> bool {
        self.disk.is_off()
    }

    fn crash(&mut self, power: bool) {
        let target = self.target.take().expect("it runs");
        if power {
            target.crash()
        } else {
            target.kill()
        }
        self.start();
    }

    fn keep_image(&mut self) {
        if !self.disk.is_off() {
            self.image = Some(self.disk.image());
        }
    }

    fn roll_back(&mut self) -> bool {
        let Some(image) = self.image.take() else { return false };
        self.target.take().expect("it runs").crash();
        self.disk.restore(&image);
        self.start();
        true
    }

    fn rot(&mut self) -> bool {
        if self.disk.is_off() {
            return false;
        }
        self.damaged = true;
        if self.rng.below(4) == 0 {
            let (write_is_lost, write_lands_elsewhere) = (10_000, 10_000);
            let faults = Faults { write_is_lost, write_lands_elsewhere, ..Faults::default() };
            self.disk.set_faults_on(&format!("/{GROUP}/log/"), faults);
            return true;
        }
        self.disk.set_faults(Faults::default());
        let dir = ["log", "base"][self.rng.below(2) as usize];
        let dir = Path::new(DATA_DIR).join("groups").join(GROUP).join(dir);
        let files = self.disk.list(&dir).unwrap_or_default();
        let files: Vec<_> = files.into_iter().filter(|file| file.bytes > 0).collect();
        if let Some(file) = files.get(self.rng.below(files.len().max(1) as u64) as usize) {
            // Mostly near the beginning, where there is something.
            let within = [file.bytes, file.bytes.min(20_000)][self.rng.below(2) as usize];
            let bit = self.rng.below(within * 8);
            self.disk.rot(&dir.join(&file.name), bit).expect("it is there");
        }
        true
    }

    fn rot_no_more(&mut self) {
        self.disk.set_faults(Faults::default());
    }

    fn scrub(&mut self) -> bool {
        if !self.damaged {
            return true;
        }
        match self.target().scrub(GROUP) {
            // The power that was to go has gone only now.
            Err(_) if self.disk.is_off() => false,
            scrubbed => scrubbed.expect("a disk that can be read"),
        }
    }
}
