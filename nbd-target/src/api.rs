//! The local interface: what the command line asks and has done.

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use axum::{
    Router,
    extract::{Path, State},
    routing::{delete, get, post},
};
use tidemark_control::{
    ApiError, Done,
    agent::{LinkState, LinkStatus},
    server::{self, Body, Ok as Answer, Socket},
    target::{
        BranchRequest, BranchStatus, Branches as BranchList, ExportName, MarkedPoint, PointRange,
        Points, ReplicaStatus, ReplicaVolume, ResolveRequest, Resolved, ScrubStatus, TargetStatus,
        VolumePoints,
    },
};
use tidemark_journal::{GroupId, Position, Seq};
use tidemark_link::NodeName;
use tokio::sync::watch;

use crate::{
    branch::{
        Branch,
        registry::{self, BranchError, Branches, Broken, NewBranch},
    },
    config::GroupConfig,
    groups::Groups,
    history::History,
    lease,
    machine::Machine,
    points::{
        Refusal, Spec,
        resolve::{Scope, resolve},
        time, whole,
    },
    receiver::driver::blocking,
    replica::Replica,
    scrub::Scrubs,
};

/// The most stretches that a listing names, the newest ones.
const RANGES_MAX: usize = 1000;

/// What the target says of itself.
#[derive(Clone, Debug)]
pub struct About {
    /// Its name.
    pub node: NodeName,
    /// Where remote NBD clients connect to.
    pub nbd_listen: Option<SocketAddr>,
    /// Where local NBD clients connect to.
    pub nbd_unix: Option<PathBuf>,
}

/// The interface.
pub struct Api {
    about: About,
    groups: Arc<Groups>,
    branches: Arc<Branches>,
    scrubs: Arc<Scrubs>,
}

type Reply<T> = Result<Answer<T>, ApiError>;
type Shared = State<Arc<Api>>;

impl Api {
    /// The interface to these groups and branches.
    pub fn new(
        about: About,
        groups: Arc<Groups>,
        branches: Arc<Branches>,
        scrubs: Arc<Scrubs>,
    ) -> Arc<Api> {
        Arc::new(Api { about, groups, branches, scrubs })
    }

    /// Serves it until the target ends.
    pub async fn serve(self: Arc<Self>, socket: Socket, mut ending: watch::Receiver<bool>) {
        let routes = Router::new()
            .route("/v1/status", get(status))
            .route("/v1/groups/{group}", delete(forget))
            .route("/v1/groups/{group}/points", get(points))
            .route("/v1/groups/{group}/scrub", post(scrub))
            .route("/v1/resolve", post(resolve_point))
            .route("/v1/branches", get(branches).post(create_branch))
            .route("/v1/groups/{group}/branches/{name}", delete(drop_branch))
            .with_state(self);
        let stop = async move {
            // An error means that the target is gone, which is an end too.
            let _ = ending.wait_for(|ending| *ending).await;
        };
        if let Err(error) = server::serve(socket, routes, stop).await {
            tracing::error!("the local interface has ended: {error}");
        }
    }

    fn replica(&self, name: &str) -> Result<Arc<Replica>, ApiError> {
        self.groups.replica(name).ok_or_else(|| ApiError::not_found(self.groups.absence(name)))
    }
}

/// Runs what blocks on a thread of its own.
async fn off<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Reply<T> {
    let done = blocking(&Machine::Real, move || Ok(work())).await;
    done.map_err(|error| ApiError::internal(format!("{error:#}")))?.map(Answer)
}

async fn status(State(api): Shared) -> Reply<TargetStatus> {
    off(move || {
        let mut groups: Vec<ReplicaStatus> =
            api.groups.replicas().iter().map(|r| replica_status(&api, r)).collect();
        let configs = api.groups.configs().iter();
        groups.extend(configs.filter_map(|config| {
            let why = api.groups.failure(config.name.as_str())?;
            Some(failed_status(&api.groups, config, &why))
        }));
        groups.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(TargetStatus {
            node: api.about.node.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            nbd_listen: api.about.nbd_listen.into_iter().collect(),
            nbd_socket: api.about.nbd_unix.clone(),
            groups,
        })
    })
    .await
}

fn replica_status(api: &Api, replica: &Replica) -> ReplicaStatus {
    let groups = &api.groups;
    let (session, received) = groups.session(replica.name());
    let progress = replica.journal().progress();
    let vitals = replica.ledger().vitals();
    let history = replica.ledger().history(History::clone);
    let scope = Scope::of(&history, replica.name(), None).ok();
    let end = progress.durable.seq;
    let first_received =
        replica.journal().segments().first().map(|segment| segment.summary().received_ns);
    let window_ns = vitals.received_ns.saturating_sub(first_received.unwrap_or(vitals.received_ns));
    let mut problems = replica.notices();
    problems.extend(api.groups.catalogue().damage().iter().cloned());
    problems.extend(whole::problems(replica));
    problems
        .extend(api.branches.list().iter().filter_map(|branch| branch_problem(branch, replica)));
    let stalled = progress.stalled.iter().map(|why| format!("not accepting: {why}"));
    let failed = progress.failed.iter().map(|why| format!("the log has failed: {why}"));
    problems.extend(stalled.chain(failed));
    let present = history.volumes.iter().filter(|volume| volume.removed.is_none());
    let pins = replica.pins().list();
    ReplicaStatus {
        name: replica.name().to_owned(),
        id: replica.group().id,
        source: replica.config().node.to_string(),
        link: LinkStatus {
            state: if session.is_some() { LinkState::Up } else { LinkState::Down },
            since_wall_ns: session.map_or(0, |session| session.since_wall_ns),
            sentence: session.is_none().then(|| "the source is not connected".to_owned()),
        },
        position: progress.durable,
        wall_ns: history.end_wall_ns,
        vouched_wall_ns: vitals.vouched_wall_ns.max(history.end_wall_ns),
        oldest_seq: scope
            .and_then(|scope| scope.next_good(&history, history.oldest.max(Seq(1)), end))
            .unwrap_or(history.oldest),
        oldest_wall_ns: history.oldest_wall_ns,
        window_s: window_ns / 1_000_000_000,
        log_bytes: replica.journal().bytes(),
        base_bytes: replica.base().allocated_bytes(),
        frames_total: received.frames,
        received_bytes_total: received.bytes,
        exports: pins.iter().filter(|pin| pin.what.starts_with("an open export")).count() as u32,
        problems,
        damage: whole::damaged(replica),
        zero_loss: lease::look(replica),
        scrub: scrub_status(&api.scrubs, replica),
        volumes: present
            .map(|volume| ReplicaVolume {
                name: volume.name.clone(),
                id: volume.id,
                sectors: volume.sectors(),
                gap: volume.open_gap().map(|gap| gap.describe().to_owned()),
            })
            .collect(),
    }
}

/// What is said of a replica that could not be opened.
fn failed_status(groups: &Groups, config: &GroupConfig, why: &str) -> ReplicaStatus {
    let id = groups.row(config.name.as_str()).ok().flatten().map(|row| row.id);
    ReplicaStatus {
        name: config.name.to_string(),
        id: id.unwrap_or(GroupId([0; 16])),
        source: config.node.to_string(),
        link: LinkStatus {
            state: LinkState::Down,
            since_wall_ns: 0,
            sentence: Some("the source is refused".to_owned()),
        },
        position: Position::default(),
        wall_ns: 0,
        vouched_wall_ns: 0,
        oldest_seq: Seq(0),
        oldest_wall_ns: 0,
        window_s: 0,
        log_bytes: 0,
        base_bytes: 0,
        frames_total: 0,
        received_bytes_total: 0,
        exports: 0,
        problems: vec![why.to_owned()],
        damage: Vec::new(),
        zero_loss: None,
        scrub: ScrubStatus::default(),
        volumes: Vec::new(),
    }
}

async fn scrub(State(api): Shared, Path(group): Path<String>) -> Reply<ScrubStatus> {
    off(move || {
        let replica = api.replica(&group)?;
        api.scrubs.start(&group);
        Ok(ScrubStatus { running: true, ..scrub_status(&api.scrubs, &replica) })
    })
    .await
}

fn scrub_status(scrubs: &Scrubs, replica: &Replica) -> ScrubStatus {
    let row = scrubs.row(replica);
    let pass = row.pass.as_ref();
    ScrubStatus {
        running: pass.is_some(),
        started_wall_ns: pass.map_or(0, |pass| pass.started_wall_ns),
        read_bytes: pass.map_or(0, |pass| pass.bytes),
        total_bytes: replica.journal().bytes() + replica.base().allocated_bytes(),
        found: pass.map_or(0, |pass| pass.found),
        finished_wall_ns: row.finished_wall_ns,
        finished_found: row.finished_found,
        mended_total: row.mended_total,
    }
}

async fn points(State(api): Shared, Path(group): Path<String>) -> Reply<Points> {
    off(move || {
        let replica = api.replica(&group)?;
        let end = replica.journal().progress().durable.seq;
        let history = replica.ledger().history(History::clone);
        let of = |volume: Option<&str>| -> Result<Vec<PointRange>, ApiError> {
            let scope = Scope::of(&history, &group, volume).map_err(bad)?;
            let ranges = scope.good_ranges(&history, end, RANGES_MAX);
            let wall = |seq| time::wall_at(&replica, seq).unwrap_or_default();
            let range = |(first, last)| PointRange {
                first_seq: first,
                last_seq: last,
                first_wall_ns: wall(first),
                last_wall_ns: wall(last),
            };
            Ok(ranges.into_iter().map(range).collect())
        };
        let whole = Scope::of(&history, &group, None).map_err(bad)?;
        let marks = history.marks.iter().map(|mark| MarkedPoint {
            name: mark.name.clone(),
            seq: mark.seq,
            wall_ns: mark.wall_ns,
            refused: whole.check(&history, mark.seq, end).err().map(|refusal| refusal.0),
        });
        let volumes = history.volumes.iter().filter(|volume| volume.removed.is_none());
        Ok(Points {
            group: group.clone(),
            ranges: of(None)?,
            marks: marks.collect(),
            volumes: volumes
                .map(|volume| {
                    Ok(VolumePoints { name: volume.name.clone(), ranges: of(Some(&volume.name))? })
                })
                .collect::<Result<_, ApiError>>()?,
            damage: whole::damaged(&replica),
            newest_whole: whole::newest(&replica, &whole, end),
        })
    })
    .await
}

async fn resolve_point(State(api): Shared, Body(request): Body<ResolveRequest>) -> Reply<Resolved> {
    off(move || {
        let replica = api.replica(&request.group)?;
        let spec = Spec::parse(&request.point).map_err(ApiError::bad_request)?;
        let volume = request.volume.as_deref();
        let seq = resolve(&replica, volume, &spec).map_err(bad)?.seq;
        let wall_ns = time::wall_at(&replica, seq).map_err(bad)?;
        let exports = replica.ledger().history(|history| {
            let present = history.volumes.iter().filter(|volume| volume.present_at(seq));
            let wanted = present.filter(|v| volume.is_none_or(|name| name == v.name));
            wanted
                .map(|volume| ExportName {
                    volume: volume.name.clone(),
                    export: format!("{}/{}@seq:{seq}", request.group, volume.name),
                    sectors: volume.sectors_at(seq),
                })
                .collect()
        });
        let position = replica.ledger().history(|history| history.position(seq));
        let damage = whole::missing_at(&replica, volume, seq);
        Ok(Resolved { position, wall_ns, exports, damage })
    })
    .await
}

async fn branches(State(api): Shared) -> Reply<BranchList> {
    off(move || {
        let mut branches: Vec<BranchStatus> =
            api.branches.list().iter().map(|branch| branch_status(branch)).collect();
        let broken = api.branches.broken();
        branches.extend(broken.iter().map(broken_status));
        branches.sort_by(|a, b| (&a.name, &a.group).cmp(&(&b.name, &b.group)));
        Ok(BranchList { branches, unread: api.branches.unread() })
    })
    .await
}

async fn create_branch(
    State(api): Shared,
    Body(request): Body<BranchRequest>,
) -> Reply<BranchStatus> {
    off(move || {
        let new = NewBranch {
            spec: Spec::parse(&request.point).map_err(ApiError::bad_request)?,
            name: request.name,
            group: request.group,
            volume: request.volume,
            temporary: request.temporary,
        };
        Ok(branch_status(&*api.branches.create(&new)?))
    })
    .await
}

async fn drop_branch(
    State(api): Shared,
    Path((group, name)): Path<(String, String)>,
) -> Reply<Done> {
    api.branches.drop_branch(&group, &name).await?;
    Ok(Answer(Done {}))
}

async fn forget(State(api): Shared, Path(group): Path<String>) -> Reply<Done> {
    off(move || {
        if api.groups.configs().iter().any(|config| config.name.as_str() == group) {
            let text = format!(
                "the group '{group}' is in this target's configuration: stop or unprotect it at \
                 the source, take its [[group]] out of the configuration and restart the target"
            );
            return Err(ApiError::conflict(text));
        }
        let failed = |error: anyhow::Error| ApiError::internal(format!("{error:#}"));
        if api.groups.forget(&group).map_err(failed)? {
            return Ok(Done {});
        }
        let left = api.groups.unconfigured().map_err(failed)?;
        let left = match left.as_slice() {
            [] => String::new(),
            left => format!("; outside its configuration it keeps {}", left.join(", ")),
        };
        Err(ApiError::not_found(format!("this target keeps nothing of a group '{group}'{left}")))
    })
    .await
}

fn branch_status(branch: &Branch) -> BranchStatus {
    let at = branch.at();
    let name =
        |volume: &str| format!("{}/{volume}@branch:{}", branch.parent().name(), branch.name());
    BranchStatus {
        name: branch.name().to_owned(),
        group: branch.parent().name().to_owned(),
        parent: at,
        wall_ns: time::wall_at(branch.parent(), at.seq).unwrap_or_default(),
        created_wall_ns: branch.row().created_ns,
        written_bytes: branch.log_bytes(),
        temporary: branch.row().temporary,
        clients: branch.clients(),
        problem: None,
        damage: whole::missing_of(branch),
        exports: registry::volumes(branch)
            .into_iter()
            .map(|(volume, _, sectors)| ExportName { export: name(&volume), volume, sectors })
            .collect(),
    }
}

/// What is damaged of a child of a replica, as a sentence.
fn branch_problem(branch: &Branch, replica: &Replica) -> Option<String> {
    let its = branch.parent().name() == replica.name() && !branch.missing().is_empty();
    let (name, missing) = (branch.name(), whole::missing_of(branch).filter(|_| its)?);
    Some(format!(
        "the branch '{name}' is damaged: {missing} cannot be read; write it anew or drop the branch"
    ))
}

fn broken_status(broken: &Broken) -> BranchStatus {
    let (term, parent) = (broken.row.term, &broken.parent);
    BranchStatus {
        name: broken.name.clone(),
        group: parent.name().to_owned(),
        parent: Position { term: term.parent, seq: term.fork_seq },
        wall_ns: time::wall_at(parent, term.fork_seq).unwrap_or_default(),
        created_wall_ns: broken.row.created_ns,
        written_bytes: 0,
        temporary: broken.row.temporary,
        clients: 0,
        problem: Some(broken.why.clone()),
        damage: None,
        exports: Vec::new(),
    }
}

fn bad(refusal: Refusal) -> ApiError {
    ApiError::bad_request(refusal.0)
}

impl From<BranchError> for ApiError {
    fn from(error: BranchError) -> ApiError {
        match error {
            BranchError::Refused(text) => ApiError::bad_request(text),
            BranchError::NotFound(text) => ApiError::not_found(text),
            BranchError::Conflict(text) => ApiError::conflict(text),
            BranchError::Failed(error) => ApiError::internal(format!("{error:#}")),
        }
    }
}
