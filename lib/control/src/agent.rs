//! What the agent can be asked.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/status` | [`AgentStatus`] |
//! | `POST /v1/reload` | [`Reloaded`] |
//! | `POST /v1/groups/GROUP/mark` with [`MarkRequest`] | [`Marked`] |
//! | `POST /v1/groups/GROUP/verify` with [`VerifyRequest`] | [`VerifyStarted`] |
//! | `POST /v1/groups/GROUP/stop` | [`Done`] |

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tidemark_journal::{GroupId, Position, Seq, VolumeId};

use crate::client::{Client, ClientError, segment};
use crate::{ApiError, Done};

/// Where the agent listens unless its configuration says otherwise.
pub const SOCKET: &str = "/run/tidemark/agent.sock";

/// Everything the agent does at the moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentStatus {
    /// This node's name.
    pub node: String,
    /// Version of the software.
    pub version: String,
    /// The groups that run, by name.
    pub groups: Vec<GroupStatus>,
    /// The groups that are configured and do not run, with the reason: writes to their disks are
    /// not captured. By name.
    #[serde(default)]
    pub unprotected: Vec<GroupFailure>,
}

/// A protected group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupStatus {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: GroupId,
    /// Where it is sent, `HOST:PORT`.
    pub target: String,
    /// The name in the target's certificate.
    pub target_name: String,
    /// The link to the target.
    pub link: LinkStatus,
    /// The newest position drawn.
    pub position: Position,
    /// The newest sequence that is durable at the final target.
    pub durable_seq: Seq,
    /// How much the target may lag before somebody should know; none if nothing was asked for.
    pub rpo_target_s: Option<u64>,
    /// Age of the oldest record that is not final-durable, by the boot clock; zero if all is.
    pub lag_ns: u64,
    /// Raw bytes captured that are not final-durable.
    pub lag_bytes: u64,
    /// How full the ring is, in thousandths.
    pub ring_fill_permille: u32,
    /// What captured writes wait in at the moment.
    pub rung: Rung,
    /// The ladder of which that is a rung.
    #[serde(default)]
    pub ladder: Ladder,
    /// Bytes of frames sent since the start.
    pub sent_bytes_total: u64,
    /// The same before compression.
    pub raw_bytes_total: u64,
    /// Frames sent since the start.
    pub frames_total: u64,
    /// Gaps that began since the start.
    pub gaps_total: u64,
    /// Bytes read off the disks by first sync, catch-up and verify since the start.
    #[serde(default)]
    pub compared_bytes_total: u64,
    /// How sync mode stands; none if the group is not to be in sync.
    #[serde(default)]
    pub sync: Option<SyncStatus>,
    /// What went wrong and still matters: a sentence each. Empty if nothing did.
    pub problems: Vec<String>,
    /// Why everything is compared, while it is.
    #[serde(default)]
    pub doubt: Option<String>,
    /// The last verify, and the next.
    #[serde(default)]
    pub verified: VerifyReport,
    /// The volumes.
    pub volumes: Vec<VolumeStatus>,
}

/// A protected volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Its name.
    pub name: String,
    /// Its number in the group.
    pub id: VolumeId,
    /// The disk or image below.
    pub backing: PathBuf,
    /// What the application uses instead: a device, or the socket of a plain NBD front.
    pub device: PathBuf,
    /// How it is presented.
    pub front: FrontKind,
    /// Its size.
    pub sectors: u64,
    /// Why its write order is not being captured; none outside gaps.
    pub gap: Option<String>,
    /// First sync or catch-up under way.
    pub catch_up: Option<Progress>,
    /// A verify under way.
    pub verify: Option<Progress>,
    /// Regions in the set of active ones.
    pub active_regions: u32,
    /// Regions that may differ from what the target has made durable.
    pub dirty_regions: u64,
    /// Regions with a write that was not captured.
    pub uncaptured_regions: u64,
}

/// What the last verify of a group has found, and when the schedule wants the next. Times are of the wall clock,
/// nanoseconds since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyReport {
    /// When it began; none if there was none.
    pub begun_wall_ns: Option<i64>,
    /// When it ended.
    pub ended_wall_ns: Option<i64>,
    /// What differed at the target, in blocks of 4 KiB, and has been sent again.
    pub differing_bytes: u64,
    /// When the next is due; none without a schedule.
    pub due_wall_ns: Option<i64>,
}

/// How far a walk over a volume's regions has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Regions done.
    pub done_regions: u64,
    /// Regions in all.
    pub total_regions: u64,
    /// The present rate.
    pub bytes_per_s: u64,
    /// Seconds left at that rate; none while it is unknown.
    pub eta_s: Option<u64>,
}

/// A connection between two nodes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkStatus {
    /// What it does.
    pub state: LinkState,
    /// Since when, by the wall clock, nanoseconds since 1970.
    pub since_wall_ns: i64,
    /// Why it is not up, or what the other end said last.
    pub sentence: Option<String>,
}

/// The states of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinkState {
    /// Frames can pass.
    Up,
    /// It is being made, or waits for its next attempt.
    Connecting,
    /// The other end refused; it is asked again now and then.
    Refused,
    /// Nobody tries: the group is stopped, or (at the target) the source is away.
    Down,
}

/// The ladder when the link is slower than the writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rung {
    /// In memory.
    Ring,
    /// On a disk of the source that is not protected.
    Spool,
    /// In the dirty map alone: a gap.
    Gap,
}

/// Where a group is between the two modes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SyncStage {
    /// What is locally done is answered.
    #[default]
    Async,
    /// Answers are held back, and what was answered before is not final-durable yet.
    Entering,
    /// Everything that was answered is final-durable.
    Sync,
    /// Answers are held back until no zero-loss lease is left.
    Leaving,
}

/// Sync mode of a group that is to be in sync.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncStatus {
    /// The stage.
    pub stage: SyncStage,
    /// Why it is not in sync, as a clause; none if it is.
    pub reason: Option<String>,
    /// Answers that wait for the target at the moment.
    pub answers_waiting: u64,
    /// How often it has fallen back to async since the start.
    pub left_total: u64,
}

/// How a group stands on the ladder.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ladder {
    /// Seconds on the ring since the start.
    pub ring_s_total: u64,
    /// Seconds in the spool since the start.
    pub spool_s_total: u64,
    /// Seconds in which writes were not captured since the start.
    pub gap_s_total: u64,
    /// Bytes that the spool takes on its disk.
    pub spool_bytes: u64,
    /// The most that it may take; 0 if there is none.
    pub spool_bytes_max: u64,
    /// How fast what waits has grown, over the window; negative while it shrinks.
    pub growth_bytes_per_s: i64,
    /// The window.
    pub window_s: u64,
    /// The rung that will be reached at that rate; none if what waits does not grow.
    pub next: Option<Rung>,
    /// Seconds until then.
    pub next_in_s: Option<u64>,
}

/// How a volume is presented to its user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FrontKind {
    /// A ublk block device.
    Ublk,
    /// A block device of the kernel's NBD client.
    NbdKernel,
    /// A plain NBD Unix socket.
    NbdSocket,
}

impl GroupStatus {
    /// Whether everything is final-durable, and no volume is in a gap or has anything to be caught up.
    pub fn is_in_sync(&self) -> bool {
        self.durable_seq == self.position.seq
            && self.volumes.iter().all(|at| at.gap.is_none() && at.uncaptured_regions == 0)
    }
}

impl FrontKind {
    /// As it is written in configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            FrontKind::Ublk => "ublk",
            FrontKind::NbdKernel => "nbd-kernel",
            FrontKind::NbdSocket => "nbd-socket",
        }
    }
}

/// Asks for a mark.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MarkRequest {
    /// The mark's name.
    pub name: String,
}

/// The longest name of a mark, in bytes.
pub const MARK_NAME_BYTES_MAX: usize = tidemark_journal::record::MARK_NAME_BYTES_MAX;

/// Whether a text can be a mark's name: it becomes part of export names, of URIs, where `%` begins
/// what stands for something else, and of lines for people, where blanks at the ends are lost.
///
/// # Errors
/// The sentence that says what a name is.
pub fn check_mark_name(name: &str) -> Result<(), ApiError> {
    let bounded = (1..=MARK_NAME_BYTES_MAX).contains(&name.len());
    let plain = !name.chars().any(|c| c.is_control() || matches!(c, '/' | '@' | '%'));
    if bounded && plain && name.trim() == name {
        return Ok(());
    }
    Err(ApiError::bad_request(format!(
        "a mark's name has 1 to {MARK_NAME_BYTES_MAX} bytes, with no '/', '@', '%' or control \
         characters and no blank at either end"
    )))
}

/// A mark is in the order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marked {
    /// Where. The point is the state at this position.
    pub position: Position,
    /// The newest sequence that is durable at the final target: from the mark's own on, the mark is
    /// there and can be recovered.
    #[serde(default)]
    pub durable_seq: Seq,
    /// When, by the wall clock, nanoseconds since 1970.
    pub wall_ns: i64,
}

/// Asks for a comparison of everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VerifyRequest {
    /// One volume only; none means all of the group.
    pub volume: Option<String>,
}

/// A verify is under way; its progress is in the status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyStarted {
    /// The volumes concerned.
    pub volumes: Vec<String>,
}

/// What a fresh look at the configuration changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reloaded {
    /// Groups that were started.
    pub started: Vec<String>,
    /// Groups that were stopped: their files are gone.
    pub stopped: Vec<String>,
    /// What could not be done, and why.
    pub failed: Vec<GroupFailure>,
}

/// A group that could not be started or changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupFailure {
    /// The group.
    pub group: String,
    /// Why.
    pub error: String,
}

/// The agent's local API, from outside.
#[derive(Clone, Debug)]
pub struct AgentClient(Client);

/// Making and taking away devices waits for the kernel, and for what is on its way to the target.
const DEVICES_PATIENCE: Duration = Duration::from_secs(120);

impl AgentClient {
    /// The agent that listens there.
    pub fn new(socket: &Path) -> AgentClient {
        AgentClient(Client::new("agent", socket))
    }

    /// The client below.
    pub fn client(&self) -> &Client {
        &self.0
    }

    /// What it does at the moment.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn status(&self) -> Result<AgentStatus, ClientError> {
        self.0.get("/v1/status").await
    }

    /// Makes it look at its configuration again.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn reload(&self) -> Result<Reloaded, ClientError> {
        self.0.clone().with_patience(DEVICES_PATIENCE).post("/v1/reload", &Done {}).await
    }

    /// Names the present position of a group.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn mark(&self, group: &str, name: &str) -> Result<Marked, ClientError> {
        check_mark_name(name)?;
        let path = format!("/v1/groups/{}/mark", segment(group));
        self.0.post(&path, &MarkRequest { name: name.to_owned() }).await
    }

    /// Compares everything with the target, and mends what differs.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn verify(
        &self,
        group: &str,
        volume: Option<&str>,
    ) -> Result<VerifyStarted, ClientError> {
        let path = format!("/v1/groups/{}/verify", segment(group));
        self.0.post(&path, &VerifyRequest { volume: volume.map(str::to_owned) }).await
    }

    /// Stops a group until the next reload or start: its devices go away.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn stop_group(&self, group: &str) -> Result<Done, ClientError> {
        let path = format!("/v1/groups/{}/stop", segment(group));
        self.0.clone().with_patience(DEVICES_PATIENCE).post(&path, &Done {}).await
    }
}
