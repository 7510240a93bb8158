//! Points and branches as NBD exports.

pub mod access;
mod branch;
mod status;
mod workers;

use std::sync::Arc;

use bytes::Bytes;
use tidemark_journal::{SECTOR_BYTES, Seq, VolumeId};
use tidemark_nbd::{
    BlockSizes, BoxFuture, Chunk, ClientInfo, Errno, Error, Export, ExportEntry, ExportInfo,
    Exports, Extent, Features, OpenError, Purpose, Reply,
};

use access::{Access, Caller, Right};
use branch::BranchExport;
use workers::{Share, Workers};

use crate::{
    branch::registry::{self, Branches},
    groups::Groups,
    pins::PinGuard,
    points::{
        PointName, Spec,
        latest::{Client, LatestGuard, LatestTable},
        resolve::{Scope, resolve},
        whole,
    },
    replica::Replica,
    store::{ReadError, base::Stretch, index::Query, read::Plan},
};

/// Reads under way at once, each on a thread of its own.
const READS_MAX: usize = 16;
/// Those of them that are of one client.
const CLIENT_READS_MAX: usize = 8;
/// The longest read that is answered in one piece.
const READ_BYTES_MAX: u32 = 32 << 20;
/// Marks that a listing names.
const MARKS_LISTED_MAX: usize = 20;

/// All exports of a target.
pub struct TargetExports {
    groups: Arc<Groups>,
    branches: Arc<Branches>,
    latest: Arc<LatestTable>,
    access: Access,
    workers: Workers,
}

/// Who opens something, and its share of the threads.
struct Asking {
    caller: Caller,
    client: Client,
    share: Share,
}

impl TargetExports {
    /// The exports of these groups.
    pub fn new(
        groups: Arc<Groups>,
        branches: Arc<Branches>,
        latest: Arc<LatestTable>,
        access: Access,
    ) -> Arc<TargetExports> {
        let workers = Workers::new(READS_MAX, CLIENT_READS_MAX);
        Arc::new(TargetExports { groups, branches, latest, access, workers })
    }

    fn asking(&self, info: &ClientInfo) -> Asking {
        let client = Client::of(info);
        let share = self.workers.share(&client);
        Asking { caller: Caller::of(info), client, share }
    }
}

/// The exports as the server holds them.
pub struct Served(pub Arc<TargetExports>);

impl Exports for Served {
    fn list<'a>(&'a self, client: &'a ClientInfo) -> BoxFuture<'a, Vec<ExportEntry>> {
        let exports = Arc::clone(&self.0);
        Box::pin(async move {
            let asking = exports.asking(client);
            let share = asking.share.clone();
            share.run(move || exports.list(&asking.caller)).await.unwrap_or_default()
        })
    }

    fn open<'a>(
        &'a self,
        name: &'a str,
        purpose: Purpose,
        client: &'a ClientInfo,
    ) -> BoxFuture<'a, Result<Arc<dyn Export>, OpenError>> {
        let (exports, name) = (Arc::clone(&self.0), name.to_owned());
        Box::pin(async move {
            let asking = exports.asking(client);
            let share = asking.share.clone();
            let opened = share.run(move || exports.open(&name, purpose, &asking)).await;
            opened.map_err(|error| OpenError::unavailable(error.message))?
        })
    }
}

impl TargetExports {
    fn list(&self, caller: &Caller) -> Vec<ExportEntry> {
        let right = |replica: &Replica| self.access.right(caller, Some(replica.config()));
        let replicas = self.groups.replicas();
        let readable = replicas.iter().filter(|replica| right(replica) >= Right::Read);
        let mut entries: Vec<ExportEntry> = readable.flat_map(list).collect();
        for branch in self.branches.list() {
            let writable = match right(branch.parent()) {
                Right::None => continue,
                Right::Read => "",
                Right::WriteBranches => ", writable",
            };
            for (volume, ..) in registry::volumes(&branch) {
                entries.push(ExportEntry {
                    name: format!("{}/{volume}@branch:{}", branch.parent().name(), branch.name()),
                    description: format!("a branch of @{}{writable}", branch.row().point),
                });
            }
        }
        entries
    }

    fn open(
        &self,
        name: &str,
        purpose: Purpose,
        asking: &Asking,
    ) -> Result<Arc<dyn Export>, OpenError> {
        let name = PointName::parse(name).map_err(OpenError::unavailable)?;
        let config =
            |group: &str| self.groups.configs().iter().find(|config| config.name.as_str() == group);
        let right = self.access.right(&asking.caller, config(&name.group));
        if right == Right::None {
            return Err(OpenError::denied(self.access.refusal(&asking.caller, &name.group)));
        }
        let replica = self.groups.replica(&name.group).ok_or_else(|| {
            if let Some(why) = self.groups.failure(&name.group) {
                return OpenError::unavailable(why.to_string());
            }
            let replicas = self.groups.replicas();
            let readable = replicas.iter().filter(|replica| {
                self.access.right(&asking.caller, Some(replica.config())) >= Right::Read
            });
            let known: Vec<&str> = readable.map(|replica| replica.name()).collect();
            OpenError::unavailable(format!(
                "this target has no replica of a group '{}'; it has: {}",
                name.group,
                known.join(", ")
            ))
        })?;
        let Some(volume) = &name.volume else {
            let text = format!("name a volume: {}/VOLUME@{}", name.group, name.spec);
            return Err(OpenError::unavailable(text));
        };
        match &name.spec {
            Spec::Branch(branch) => {
                let writable = right == Right::WriteBranches;
                self.open_branch(&name, volume, branch, purpose, writable, &asking.share)
            }
            _ => self.open_point(replica, &name, volume, purpose, asking),
        }
    }

    fn open_branch(
        &self,
        name: &PointName,
        volume: &str,
        branch: &str,
        purpose: Purpose,
        writable: bool,
        share: &Share,
    ) -> Result<Arc<dyn Export>, OpenError> {
        let absence = || {
            let none = || format!("there is no branch of that name: {name}");
            let why = self.branches.why_not(&name.group, branch);
            OpenError::unavailable(why.unwrap_or_else(none))
        };
        let (branch, client) = match purpose {
            Purpose::Transmission => {
                let entered = self.branches.enter(&name.group, branch);
                entered.map(|(branch, client)| (branch, Some(client)))
            }
            _ => self.branches.get(&name.group, branch).map(|branch| (branch, None)),
        }
        .ok_or_else(absence)?;
        let volumes = registry::volumes(&branch);
        let Some((_, id, sectors)) = volumes.iter().find(|(known, ..)| known == volume) else {
            let names: Vec<&str> = volumes.iter().map(|(name, ..)| name.as_str()).collect();
            let text = format!("the branch has no volume '{volume}'; it has: {}", names.join(", "));
            return Err(OpenError::unavailable(text));
        };
        let physical = branch.parent().ledger().history(|history| {
            history.volume(volume).map_or(4096, |volume| volume.physical_block_bytes)
        });
        Ok(Arc::new(BranchExport {
            name: name.to_string(),
            volume: *id,
            bytes: sectors * SECTOR_BYTES,
            physical_block_bytes: physical,
            writable,
            share: share.clone(),
            branch,
            _client: client,
        }))
    }

    fn open_point(
        &self,
        replica: Arc<Replica>,
        name: &PointName,
        volume: &str,
        purpose: Purpose,
        asking: &Asking,
    ) -> Result<Arc<dyn Export>, OpenError> {
        let client = &asking.client;
        let refused = |refusal: crate::points::Refusal| OpenError::unavailable(refusal.0);
        let mut hold = Hold { _pin: None, _latest: None };
        let (seq, fixed) = match &name.spec {
            Spec::Latest if purpose == Purpose::Transmission => {
                let (seq, guard) = self.latest.open(&replica, volume, client).map_err(refused)?;
                hold._latest = Some(guard);
                (seq, false)
            }
            Spec::Latest => (self.latest.look(&replica, volume, client).map_err(refused)?, false),
            spec => (resolve(&replica, Some(volume), spec).map_err(refused)?.seq, true),
        };
        if purpose == Purpose::Transmission {
            let pin = replica.pin(seq, format!("an open export, {name}"));
            hold._pin = Some(pin.map_err(|oldest| {
                OpenError::unavailable(format!(
                    "{name} has just left the window; the oldest point is @seq:{oldest}"
                ))
            })?);
        }
        let found = replica.ledger().history(|history| {
            let volume = history.volume(volume)?;
            Some((volume.id, volume.sectors_at(seq), volume.physical_block_bytes))
        });
        let (id, sectors, physical) =
            found.ok_or_else(|| OpenError::unavailable("the volume is no longer there"))?;
        Ok(Arc::new(PointExport {
            // A mark is known by its name; anything else that moves is told by its place.
            canonical: match name.spec {
                Spec::Mark(_) => name.to_string(),
                _ => PointName { spec: Spec::Seq(seq), ..name.clone() }.to_string(),
            },
            damage: whole::missing_at(&replica, Some(volume), seq),
            name: name.to_string(),
            view: Arc::new(View { replica, volume: id, at: seq }),
            share: asking.share.clone(),
            bytes: sectors * SECTOR_BYTES,
            physical_block_bytes: physical,
            fixed,
            _hold: hold,
        }))
    }
}

fn list(replica: &Arc<Replica>) -> Vec<ExportEntry> {
    let end = replica.journal().progress().durable.seq;
    let stretches = replica.damages().stretches();
    replica.ledger().history(|history| {
        let mut entries = Vec::new();
        for volume in history.volumes.iter().filter(|volume| volume.removed.is_none()) {
            let of = format!("{}/{}", replica.name(), volume.name);
            let Ok(scope) = Scope::of(history, replica.name(), Some(&volume.name)) else {
                continue;
            };
            if scope.newest_good(history, end).is_some() {
                entries.push(ExportEntry {
                    name: format!("{of}@latest"),
                    description: "the newest point".to_owned(),
                });
            }
            let damaged = stretches.iter().any(|s| scope.concerns(s.volume) && s.contains(end));
            if let Some(seq) = damaged.then(|| whole::newest_of(history, &scope, &stretches, end))
                && let Some(seq) = seq
            {
                entries.push(ExportEntry {
                    name: format!("{of}@seq:{seq}"),
                    description: "the newest point without damage".to_owned(),
                });
            }
            let good = |seq| scope.check(history, seq, end).is_ok();
            let marks = history.marks.iter().rev().filter(|mark| good(mark.seq));
            for mark in marks.take(MARKS_LISTED_MAX) {
                entries.push(ExportEntry {
                    name: format!("{of}@mark:{}", mark.name),
                    description: format!("mark at {}", crate::clock::format_wall(mark.wall_ns)),
                });
            }
            if let Some((first, _)) = scope.good_ranges(history, end, usize::MAX).first() {
                entries.push(ExportEntry {
                    name: format!("{of}@seq:{first}"),
                    description: "the oldest point".to_owned(),
                });
            }
        }
        entries
    })
}

/// A volume as of a position.
pub struct View {
    replica: Arc<Replica>,
    volume: VolumeId,
    at: Seq,
}

impl View {
    /// Reads bytes: their content, and which stretches of it are known to be zeros.
    ///
    /// # Errors
    /// Any [`ReadError`].
    pub fn read(&self, offset: u64, length: u32) -> Result<Vec<u8>, ReadError> {
        let (start, end) = sectors(offset, u64::from(length));
        let mut out = vec![0; ((end - start) * SECTOR_BYTES) as usize];
        self.replica.read(self.volume, self.at, start, end, &mut out)?;
        let skip = (offset - start * SECTOR_BYTES) as usize;
        out.truncate(skip + length as usize);
        out.drain(..skip);
        Ok(out)
    }

    /// The stretches from `offset` on, by whether they are known to be zeros. May end early; with
    /// `one`, only the first is wanted.
    ///
    /// # Errors
    /// Any [`ReadError`].
    pub fn stretches(
        &self,
        offset: u64,
        length: u64,
        one: bool,
    ) -> Result<Vec<Stretch>, ReadError> {
        let (start, end) = sectors(offset, length);
        status::stretches(start, end, one, |from, to| {
            let query = Query { volume: self.volume, start: from, end: to, at: self.at };
            let mut plan = Plan::of_beginning(query);
            self.replica.ask(&mut plan, self.at)?;
            self.replica.stretches(plan, self.volume)
        })
    }
}

/// The sectors that a range of bytes touches.
fn sectors(offset: u64, length: u64) -> (u64, u64) {
    (offset / SECTOR_BYTES, (offset + length).div_ceil(SECTOR_BYTES))
}

struct Hold {
    _pin: Option<PinGuard>,
    _latest: Option<LatestGuard>,
}

/// A read-only export of a point.
struct PointExport {
    name: String,
    canonical: String,
    view: Arc<View>,
    share: Share,
    bytes: u64,
    physical_block_bytes: u32,
    fixed: bool,
    /// What of it cannot be read, as a clause.
    damage: Option<String>,
    _hold: Hold,
}

impl Export for PointExport {
    fn info(&self) -> ExportInfo {
        ExportInfo {
            size: self.bytes,
            block_sizes: BlockSizes {
                minimum: 1,
                preferred: self.physical_block_bytes.clamp(4096, 64 << 10),
                maximum: READ_BYTES_MAX,
            },
            features: Features {
                read_only: true,
                // Nothing is ever unwritten, so a flush holds for every connection.
                flush: true,
                cache: false,
                multi_conn: self.fixed,
                ..Features::default()
            },
            canonical_name: (self.name != self.canonical).then(|| self.canonical.clone()),
            description: self.damage.as_ref().map(|what| format!("damaged: {what} cannot be read")),
        }
    }

    fn read(self: Arc<Self>, offset: u64, length: u32) -> Reply<Vec<Chunk>> {
        Reply::future(async move {
            let view = Arc::clone(&self.view);
            let read = self.share.run(move || view.read(offset, length)).await?;
            let bytes = read.map_err(|error| failed(&self.name, &self.view.replica, &error))?;
            Ok(pieces(Bytes::from(bytes)))
        })
    }

    fn block_status(self: Arc<Self>, offset: u64, length: u64, one: bool) -> Reply<Vec<Extent>> {
        Reply::future(async move {
            let view = Arc::clone(&self.view);
            let found = self.share.run(move || view.stretches(offset, length, one)).await?;
            let stretches = found.unwrap_or_else(|error| {
                as_data(&self.name, &self.view.replica, &error, sectors(offset, length))
            });
            Ok(extents(&stretches, offset, length))
        })
    }
}

/// What a client is told of an error here, which is logged with its place; damage is also kept for
/// the status.
pub fn failed(name: &str, replica: &Replica, error: &ReadError) -> Error {
    replica.met(error);
    tracing::error!(export = name, "a read fails: {error}");
    Error::new(Errno::Io, error.to_string())
}

/// What a client is told of a range whose stretches cannot be found out: that its beginning is data. The client then
/// reads that, and gets what can be read or is told what cannot.
pub fn as_data(
    name: &str,
    replica: &Replica,
    error: &ReadError,
    (start, end): (u64, u64),
) -> Vec<Stretch> {
    replica.met(error);
    tracing::warn!(export = name, "which parts are zeros is unknown: {error}");
    vec![Stretch { start, end: end.min(start + status::STEP_MIN), zeros: false }]
}

/// The stretches in bytes, from `offset` on.
pub fn extents(stretches: &[Stretch], offset: u64, length: u64) -> Vec<Extent> {
    let end = offset + length;
    let mut extents: Vec<Extent> = Vec::new();
    for stretch in stretches {
        let start = (stretch.start * SECTOR_BYTES).max(offset);
        let stop = (stretch.end * SECTOR_BYTES).min(end);
        if start < stop {
            let zeros = stretch.zeros;
            extents.push(Extent { length: stop - start, hole: zeros, zero: zeros });
        }
    }
    extents
}

/// Long zeros are handed over as holes.
fn pieces(bytes: Bytes) -> Vec<Chunk> {
    const GRAIN: usize = 64 << 10;
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let zeros = |part: &[u8]| part.iter().all(|byte| *byte == 0);
        let step = |at: usize| bytes.slice(at..(at + GRAIN).min(bytes.len()));
        let is_hole = zeros(&step(at));
        let mut end = at;
        while end < bytes.len() && zeros(&step(end)) == is_hole {
            end += step(end).len();
        }
        pieces.push(if is_hole {
            Chunk::Hole((end - at) as u32)
        } else {
            Chunk::Data(bytes.slice(at..end))
        });
        at = end;
    }
    pieces
}
