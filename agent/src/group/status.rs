//! How a group stands, for people.

use tidemark_control::agent::{
    FrontKind, GroupStatus, LinkState, LinkStatus, Progress, Rung, SyncStatus, VolumeStatus,
};
use tidemark_journal::GapReason;

use super::{Group, Served};
use crate::{engine, front::Front, link};

/// The reason of a comparison that an earlier process had begun.
const DOUBTED_BEFORE: &str = "a doubt arose before the last start";

impl Group {
    /// How it stands.
    pub async fn status(&self) -> GroupStatus {
        let snapshot = self.engine.report().await.unwrap_or_else(|| self.engine.snapshot());
        let link = self.link.status();
        let backlog = self.outbox.backlog();
        let encoded = self.encoder.counters();
        let in_doubt = snapshot.volumes.iter().any(|volume| volume.gap == Some(GapReason::Doubt));
        let now_ns = self.clock.now_ns();
        let mut problems = Vec::new();
        if let Some(lost) = &snapshot.tracking_lost {
            problems.push(format!(
                "the state disk failed, so changes are no longer tracked and everything will be \
                 compared after the next start: {lost}"
            ));
        }
        problems.extend(self.volumes.iter().filter_map(|volume| self.out_of_reach(volume)));
        problems.extend(self.volumes.iter().filter_map(|volume| unreadable(volume, &snapshot)));
        problems.extend(self.no_spool.clone());
        problems.extend(self.outbox.spool().problem);
        problems.extend(link.is_full().then(|| link::FULL.to_owned()));
        problems.extend(link.notice.as_ref().map(|notice| notice.sentence.clone()));
        let (rung, ladder) = self.ladder.status(snapshot.overflow, &self.outbox);
        let spooled = if rung == Rung::Ring { 0 } else { ladder.spool_bytes };
        GroupStatus {
            name: self.config.name.as_str().to_owned(),
            id: self.config.id,
            target: self.config.target.address.to_string(),
            target_name: self.config.target.name.to_string(),
            position: self.position(snapshot.last_seq),
            durable_seq: snapshot.durable,
            rpo_target_s: self.config.rpo_target_s.map(|target| target.0),
            lag_ns: backlog.oldest_ns.map_or(0, |oldest| now_ns.saturating_sub(oldest)),
            lag_bytes: backlog.bytes + spooled,
            ring_fill_permille: snapshot.ring_fill_permille.max(backlog.fill_permille) as u32,
            rung,
            ladder,
            sent_bytes_total: link.sent_bytes,
            raw_bytes_total: encoded.raw_bytes,
            frames_total: encoded.frames,
            gaps_total: snapshot.counters.overflows,
            compared_bytes_total: snapshot.counters.catch_up_read_bytes,
            sync: self.config.sync_timeout.map(|_| SyncStatus {
                stage: snapshot.sync.stage,
                reason: snapshot.sync.why.map(|why| why.describe().to_owned()),
                answers_waiting: snapshot.answers_waiting,
                left_total: snapshot.sync.left_total,
            }),
            problems,
            verified: self.verifies.report(),
            doubt: in_doubt.then(|| {
                let why = snapshot.doubted.as_ref().or(self.doubt.as_ref());
                why.map_or(DOUBTED_BEFORE, String::as_str).to_owned()
            }),
            volumes: self
                .volumes
                .iter()
                .map(|volume| self.volume_status(volume, &snapshot))
                .collect(),
            link: link_status(link),
        }
    }

    /// What is to be said of a volume that nobody can use.
    fn out_of_reach(&self, served: &Served) -> Option<String> {
        let (group, volume) = (&self.config.name, &served.config.name);
        match &served.front {
            Some(front) => Some(format!("volume {volume}: {}", front.problem()?)),
            None => Some(format!(
                "volume {volume} has no device: run 'tidemark unprotect {group}' again, or restart the agent to \
                 have it back"
            )),
        }
    }

    fn volume_status(&self, served: &Served, snapshot: &engine::Snapshot) -> VolumeStatus {
        let id = served.config.id;
        let now = snapshot.volumes.iter().find(|volume| volume.id == id);
        let uncaptured = now.map_or(0, |volume| u64::from(volume.uncaptured_regions));
        let rate = self.pace.bytes_per_s(snapshot.counters.catch_up_read_bytes);
        let progress = |done: u64, total: u64| Progress {
            done_regions: done,
            total_regions: total,
            bytes_per_s: rate,
            eta_s: ((total - done) * crate::dirty::REGION_BYTES).checked_div(rate),
        };
        VolumeStatus {
            name: served.config.name.as_str().to_owned(),
            id,
            backing: served.config.backing.clone(),
            device: served.front.as_ref().map(Front::device).unwrap_or_default(),
            front: served.front.as_ref().map_or(FrontKind::NbdSocket, Front::kind),
            sectors: served.sectors,
            gap: now.and_then(|volume| volume.gap).map(|gap| gap.describe().to_owned()),
            catch_up: now.filter(|volume| volume.uncaptured_regions > 0).map(|volume| {
                let total = self.pace.total(id, uncaptured);
                progress(
                    total.saturating_sub(uncaptured),
                    total.max(u64::from(volume.uncaptured_regions)),
                )
            }),
            verify: now
                .and_then(|volume| volume.verify)
                .map(|(done, total)| progress(u64::from(done), u64::from(total))),
            active_regions: snapshot.active_regions as u32,
            dirty_regions: snapshot.dirty_regions,
            uncaptured_regions: uncaptured,
        }
    }
}

/// What is to be said of sectors that a volume's disk does not give.
fn unreadable(served: &Served, snapshot: &engine::Snapshot) -> Option<String> {
    let volume = snapshot.volumes.iter().find(|volume| volume.id == served.config.id)?;
    let (sectors, first) = volume.unreadable?;
    Some(format!(
        "the disk of volume {} has failed to give {sectors} sectors that were to be compared or sent, the first \
         of them sector {}: points taken since then answer reads of them with an error, until they are \
         written anew or can be read again",
        served.config.name, first.0
    ))
}

fn link_status(link: link::LinkStatus) -> LinkStatus {
    let state = match link.state {
        link::LinkState::Up => LinkState::Up,
        link::LinkState::Down => LinkState::Connecting,
        link::LinkState::Refused(_) => LinkState::Refused,
    };
    LinkStatus { state, since_wall_ns: link.since_ns, sentence: link.sentence }
}
