//! What goes wrong.

use tidemark_simdisk::{Op, SimDisk, errno};

use crate::{agent::Session, world::World};

impl World {
    pub(crate) fn maybe_go_wrong(&mut self) {
        self.net.cut = self.net.cut.saturating_sub(1);
        let untold = |agent: &crate::agent::Agent| {
            agent.has_lost_track() && agent.generation() > self.welcomed
        };
        if self.agent.as_ref().is_some_and(untold) {
            // Should it die before a target knows of that, nobody would.
            self.site.spool.iter().for_each(SimDisk::stay_on);
            if self.rng.below(40) == 0 {
                self.reset();
            }
            return;
        }
        // What a mark is worth shows when the power goes before it is durable.
        if self.agent.as_ref().is_some_and(|agent| agent.core.map().rests_on_log())
            && self.rng.below(20) == 0
        {
            return self.power_cut(true);
        }
        let number = self.rng.below(6000);
        let at_target = matches!(number, 14..20 | 74..80 | 86..92);
        if !at_target && self.rng.below(self.rarity) > 0 {
            return;
        }
        match number {
            0..5 => self.kill(true),
            5..7 => self.kill(false),
            7..11 => self.power_cut(true),
            11..14 => {
                // In the middle of what the keeper writes next.
                let effects = self.rng.below(6);
                self.site.state.cut_after(effects);
            }
            14..17 => self.target_crash(true),
            17..20 => self.target_crash(false),
            20 => {
                self.power_cut(true);
                self.target_crash(true);
            }
            21..45 => self.reset(),
            45..50 => self.net.cut = self.rng.below(300),
            // The agent has lost the connection, and the target does not know.
            50..56 => {
                if let Some(agent) = &mut self.agent
                    && matches!(agent.session, Session::Up { .. })
                {
                    agent.hang_up();
                    self.net = Default::default();
                }
            }
            56..66 => {
                let volume = self.rng.below(self.site.sizes.len() as u64) + 1;
                let op = [Op::Read, Op::Write, Op::Write, Op::Sync][self.rng.below(4) as usize];
                self.tell(|| format!("volume {volume} is to fail: {op:?}"));
                self.site.disk.fail(op, &format!("/{volume}"), 0, errno::EIO);
            }
            66 if self.rng.below(3) == 0 => {
                let op = if self.rng.below(2) == 0 { Op::Sync } else { Op::Write };
                let passes = self.rng.below(3) as u32;
                self.tell(|| format!("the state disk is to fail: {op:?}"));
                self.site.state.fail(op, "/state", passes, errno::EIO);
            }
            67..71 => self.keep_images(),
            71..74 => self.roll_back(),
            74..80 => {
                // In the middle of what the target writes next.
                let effects = self.rng.below(12);
                self.tell(|| format!("the target's power is to go after {effects} effects"));
                self.target.cut_after(effects);
            }
            92..98 => {
                if let Some(spool) = &self.site.spool {
                    let effects = self.rng.below(6);
                    match self.rng.below(6) {
                        0..3 => spool.cut_after(effects),
                        3 => spool.fail(Op::Sync, "/spool", 0, errno::EIO),
                        4 => spool.fail(Op::Write, "/spool", 0, errno::EIO),
                        _ if spool.is_off() => {}
                        _ => {
                            self.tell(|| "the spool rots".into());
                            crate::spool_disk::rot(spool, &mut self.rng);
                        }
                    }
                }
            }
            80..86 => {
                if let Some(copy) = self.site.rotten.filter(|_| !self.site.state.is_off()) {
                    self.tell(|| format!("of the source's state something rots: {copy:?}"));
                    crate::state_disk::rot(&self.site.state, copy, &mut self.rng);
                }
            }
            86..92 if self.target_rots => {
                self.tell(|| "the target's disk rots".into());
                self.damaged |= self.target.rot();
            }
            _ => {}
        }
    }

    fn keep_images(&mut self) {
        match self.rolls {
            1 => {
                if let Some(agent) = &self.agent {
                    self.state_image = Some((self.site.state.image(), agent.generation()));
                }
            }
            2 if !self.target.is_off() => {
                self.target.keep_image();
                self.fed_then.clone_from(&self.fed);
            }
            _ => {}
        }
    }

    fn roll_back(&mut self) {
        match self.rolls {
            1 => {
                let Some((image, generation)) = &self.state_image else { return };
                // Else nobody can know.
                if self.welcomed <= *generation {
                    return;
                }
                let image = image.clone();
                self.power_cut(false);
                self.site.state.restore(&image);
                self.state_image = None;
                self.suspect();
            }
            2 => {
                self.reset();
                if self.target.roll_back() {
                    self.tell(|| "the target is rolled back".into());
                    self.fed = std::mem::take(&mut self.fed_then);
                    self.suspect();
                    self.counts.crashes += 1;
                    self.promised = Default::default();
                    self.check_target();
                }
            }
            _ => {}
        }
    }

    /// The agent is killed; its ring outlives it or not.
    pub(crate) fn kill(&mut self, with_ring: bool) {
        let Some(mut agent) = self.agent.take() else { return };
        // What a flush has failed to keep while nobody listened, nobody can know.
        agent.hear_of_failures();
        self.counts.crashes += 1;
        self.tell(|| format!("killed, ring kept: {with_ring}, under way: {:?}", agent.tasks));
        if agent.has_lost_track() {
            self.suspect();
        }
        agent.abandon_writes();
        self.settle(agent.answered.drain(..).collect());
        self.lose(&agent.lost);
        self.reset();
        self.site.disk.kill();
        self.site.state.kill();
        self.site.spool.iter().for_each(SimDisk::kill);
        let reissued = self.rng.below(3) > 0;
        self.lose_requests(reissued);
        if with_ring {
            self.left = Some(agent.leave());
        } else {
            self.replayed = None;
            self.left = None;
        }
    }

    /// The source's power is cut.
    pub(crate) fn power_cut(&mut self, lossy: bool) {
        self.counts.crashes += 1;
        self.tell(|| "the source's power is cut".into());
        if let Some(mut agent) = self.agent.take() {
            if agent.has_lost_track() {
                self.suspect();
            }
            agent.abandon_writes();
        }
        self.reset();
        self.left = None;
        self.replayed = None;
        self.site.disk.crash();
        self.site.state.fail_no_more();
        if let Some(spool) = &self.site.spool {
            spool.fail_no_more();
            spool.crash();
        }
        if lossy {
            self.site.state.crash();
        }
        self.lose_requests(false);
        self.check_disk(true);
        self.forget_what_was_lost();
    }

    pub(crate) fn target_crash(&mut self, power: bool) {
        self.counts.crashes += 1;
        self.tell(|| format!("the target crashes, power cut: {power}"));
        self.net = Default::default();
        self.target.crash(power);
        self.check_target();
    }

    /// The two sides' memories disagree by our doing: a doubt has to follow.
    pub(crate) fn suspect(&mut self) {
        (self.suspect, self.doubts_then) = (true, self.counts.doubts);
    }

    fn lose_requests(&mut self, reissued: bool) {
        let now = self.counts.steps;
        let mut lost = Vec::new();
        for asked in &mut self.asked {
            if asked.answered.is_none() && !asked.lost {
                asked.lost = true;
                lost.push(asked.request);
            }
        }
        for sector in self.sectors.iter_mut().flatten() {
            sector.left(now);
        }
        self.unanswered = if reissued { lost } else { Vec::new() };
    }
}
