//! What the target can be asked.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/status` | [`TargetStatus`] |
//! | `GET /v1/groups/GROUP/points` | [`Points`] |
//! | `POST /v1/resolve` with [`ResolveRequest`] | [`Resolved`] |
//! | `POST /v1/groups/GROUP/scrub` | [`ScrubStatus`] |
//! | `GET /v1/branches` | [`Branches`] |
//! | `POST /v1/branches` with [`BranchRequest`] | [`BranchStatus`] |
//! | `DELETE /v1/groups/GROUP/branches/NAME` | [`Done`] |

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tidemark_journal::{GroupId, Position, Seq, VolumeId};

use crate::Done;
use crate::agent::LinkStatus;
use crate::client::{Client, ClientError, segment};

pub use crate::damage::{DamagedPoints, ScrubStatus};

/// Where the target listens unless its configuration says otherwise.
pub const SOCKET: &str = "/run/tidemark/target.sock";

/// Everything the target does at the moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetStatus {
    /// This node's name.
    pub node: String,
    /// Version of the software.
    pub version: String,
    /// Where it serves points over TCP, with TLS.
    pub nbd_listen: Vec<SocketAddr>,
    /// Where it serves points on a Unix socket.
    pub nbd_socket: Option<PathBuf>,
    /// The groups, by name.
    pub groups: Vec<ReplicaStatus>,
}

/// A group's replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaStatus {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: GroupId,
    /// The node that may write it.
    pub source: String,
    /// The link from the source.
    pub link: LinkStatus,
    /// The durable end.
    pub position: Position,
    /// The source's wall clock at the durable end, nanoseconds since 1970.
    pub wall_ns: i64,
    /// The newest wall time that the source has vouched for, nanoseconds since 1970.
    pub vouched_wall_ns: i64,
    /// The oldest position offered.
    pub oldest_seq: Seq,
    /// The source's wall clock there, nanoseconds since 1970.
    pub oldest_wall_ns: i64,
    /// Received history in the window, in seconds.
    pub window_s: u64,
    /// Bytes of the log.
    pub log_bytes: u64,
    /// Bytes of the base that are allocated.
    pub base_bytes: u64,
    /// Frames received since the start.
    pub frames_total: u64,
    /// Bytes of frames received since the start.
    pub received_bytes_total: u64,
    /// Open exports of points.
    pub exports: u32,
    /// What went wrong and still matters (no room, a fenced file): a sentence each.
    pub problems: Vec<String>,
    /// Points at which something cannot be read.
    #[serde(default)]
    pub damage: Vec<DamagedPoints>,
    /// What may be said of the writes that the source has answered; none if it is not to be in sync.
    #[serde(default)]
    pub zero_loss: Option<ZeroLoss>,
    /// How far the scrub is.
    #[serde(default)]
    pub scrub: ScrubStatus,
    /// The volumes.
    pub volumes: Vec<ReplicaVolume>,
}

/// Whether a failover would lose a write that the source has answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum ZeroLoss {
    /// It would lose none: the target holds a lease.
    Held,
    /// None that was answered up to this time; of later ones nothing is known.
    Until {
        /// The target's wall clock, nanoseconds since 1970.
        wall_ns: i64,
    },
    /// Nothing is known.
    None,
}

/// A volume's replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaVolume {
    /// Its name.
    pub name: String,
    /// Its number in the group.
    pub id: VolumeId,
    /// Its size.
    pub sectors: u64,
    /// Why there is no point at the end; none outside gaps.
    pub gap: Option<String>,
}

/// The names worth offering, and what cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Points {
    /// The group.
    pub group: String,
    /// The stretches of the order in which the whole group can be recovered, oldest first.
    pub ranges: Vec<PointRange>,
    /// The marks, oldest first.
    pub marks: Vec<MarkedPoint>,
    /// The same for each volume by itself.
    pub volumes: Vec<VolumePoints>,
    /// Points among these at which something cannot be read.
    #[serde(default)]
    pub damage: Vec<DamagedPoints>,
    /// The newest point of the group at which everything can be read.
    #[serde(default)]
    pub newest_whole: Option<Seq>,
}

/// A volume's stretches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumePoints {
    /// The volume.
    pub name: String,
    /// Where it can be recovered, oldest first.
    pub ranges: Vec<PointRange>,
}

/// Every position from `first` to `last`, both included, is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointRange {
    /// The oldest sequence.
    pub first_seq: Seq,
    /// The newest.
    pub last_seq: Seq,
    /// The source's wall clock at the oldest, nanoseconds since 1970.
    pub first_wall_ns: i64,
    /// The source's wall clock at the newest.
    pub last_wall_ns: i64,
}

/// A named point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MarkedPoint {
    /// Its name.
    pub name: String,
    /// Where it lies.
    pub seq: Seq,
    /// The source's wall clock there, nanoseconds since 1970.
    pub wall_ns: i64,
    /// Why it cannot be recovered (for the whole group); none if it can.
    pub refused: Option<String>,
}

/// Asks which position a point means.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResolveRequest {
    /// The group.
    pub group: String,
    /// One volume only; none means all of the group at one position.
    pub volume: Option<String>,
    /// What follows the `@`: a time, `mark:NAME`, `latest`, `seq:N`.
    pub point: String,
}

/// One position for all volumes asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolved {
    /// The position.
    pub position: Position,
    /// The source's wall clock there, nanoseconds since 1970.
    pub wall_ns: i64,
    /// The volumes, with the name of the NBD export that shows each at the position.
    pub exports: Vec<ExportName>,
    /// What cannot be read at the position, as a clause; none if all can.
    #[serde(default)]
    pub damage: Option<String>,
}

/// An NBD export.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportName {
    /// The volume.
    pub volume: String,
    /// The export's name.
    pub export: String,
    /// Its size.
    pub sectors: u64,
}

/// All branches.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Branches {
    /// By name.
    pub branches: Vec<BranchStatus>,
    /// Why those of some groups are not among them, a sentence each.
    #[serde(default)]
    pub unread: Vec<String>,
}

/// Asks for a branch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BranchRequest {
    /// Its name; none means that one is made up.
    pub name: Option<String>,
    /// The group.
    pub group: String,
    /// One volume only; none means all of the group.
    pub volume: Option<String>,
    /// What follows the `@`.
    pub point: String,
    /// It is dropped by `detach`, or when nobody has had it open for a while.
    pub temporary: bool,
}

/// A writable child of a point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BranchStatus {
    /// Its name.
    pub name: String,
    /// The group.
    pub group: String,
    /// The position it was made at.
    pub parent: Position,
    /// The source's wall clock there, nanoseconds since 1970.
    pub wall_ns: i64,
    /// When it was made, nanoseconds since 1970.
    pub created_wall_ns: i64,
    /// Bytes written into it.
    pub written_bytes: u64,
    /// It is dropped by `detach`, or when nobody has had it open for a while.
    pub temporary: bool,
    /// Clients that have it open.
    pub clients: u32,
    /// Why it cannot be opened, as a sentence; none when it can.
    #[serde(default)]
    pub problem: Option<String>,
    /// What cannot be read of it, as a clause; none if all can.
    #[serde(default)]
    pub damage: Option<String>,
    /// Its volumes, with the name of the NBD export of each.
    pub exports: Vec<ExportName>,
}

/// The target's local API, from outside.
#[derive(Clone, Debug)]
pub struct TargetClient(Client);

impl TargetClient {
    /// The target that listens there.
    pub fn new(socket: &Path) -> TargetClient {
        TargetClient(Client::new("target", socket))
    }

    /// The client below.
    pub fn client(&self) -> &Client {
        &self.0
    }

    /// What it does at the moment.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn status(&self) -> Result<TargetStatus, ClientError> {
        self.0.get("/v1/status").await
    }

    /// The points of a group.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn points(&self, group: &str) -> Result<Points, ClientError> {
        self.0.get(&format!("/v1/groups/{}/points", segment(group))).await
    }

    /// Has everything that is kept of a group read and compared with its checksums, from now on.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn scrub(&self, group: &str) -> Result<ScrubStatus, ClientError> {
        self.0.post(&format!("/v1/groups/{}/scrub", segment(group)), &()).await
    }

    /// Removes all that is kept of a group that is not in the configuration any more.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn forget(&self, group: &str) -> Result<Done, ClientError> {
        self.0.delete(&format!("/v1/groups/{}", segment(group))).await
    }

    /// Which position a point means.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn resolve(&self, request: &ResolveRequest) -> Result<Resolved, ClientError> {
        self.0.post("/v1/resolve", request).await
    }

    /// All branches.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn branches(&self) -> Result<Branches, ClientError> {
        self.0.get("/v1/branches").await
    }

    /// Makes a branch.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn create_branch(
        &self,
        request: &BranchRequest,
    ) -> Result<BranchStatus, ClientError> {
        self.0.post("/v1/branches", request).await
    }

    /// Drops a branch of a group and all that was written into it.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn drop_branch(&self, group: &str, name: &str) -> Result<Done, ClientError> {
        let (group, name) = (segment(group), segment(name));
        self.0.delete(&format!("/v1/groups/{group}/branches/{name}")).await
    }
}
