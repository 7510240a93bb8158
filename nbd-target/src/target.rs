//! The whole target in one process.

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use anyhow::Context;
use tidemark_nbd::{Limits, Listener, Server, Tls};
use tokio::{
    runtime::Runtime,
    sync::{mpsc, watch},
};

use crate::{
    Config, api,
    branch::registry::Branches,
    catalogue::Catalogue,
    export::{Served, TargetExports, access::Access},
    groups::Groups,
    machine::Machine,
    points::latest::LatestTable,
    replica::Replica,
    reserve::Reserve,
    retention,
    scrub::Scrubs,
    threads::{Threads, Work},
};

/// How long clients get to have their requests answered when the target ends.
const GRACE: Duration = Duration::from_secs(5);
/// How often vitals are kept and the windows looked at.
const TICK: Duration = Duration::from_secs(1);

/// A running target. Dropping it without [`shutdown`](Self::shutdown) is like a crash: it leaves
/// what was not durable.
pub struct Target {
    runtime: Option<Runtime>,
    groups: Arc<Groups>,
    branches: Arc<Branches>,
    server: Server,
    link_addr: SocketAddr,
    nbd_addr: Option<SocketAddr>,
    nbd_unix: Option<PathBuf>,
    end: watch::Sender<bool>,
    threads: Option<Threads>,
    scrubs: Arc<Scrubs>,
    scrubbing: Option<JoinHandle<()>>,
}

impl Target {
    /// Recovers what is there, opens the ports and serves. Blocks while logs are recovered; must
    /// not be called on a thread of an async runtime.
    ///
    /// # Errors
    /// A sentence that says what cannot be opened, read or listened on.
    pub fn start(config: &Config) -> anyhow::Result<Target> {
        let dir = config.data_dir.clone();
        let machine = Machine::Real;
        let groups_dir = dir.join("groups");
        let made = machine.create_dir_all(&groups_dir);
        made.with_context(|| format!("cannot create {}", groups_dir.display()))?;
        let reserve = Arc::new(Reserve::new(&machine, &groups_dir, config.store.segment.0));
        let catalogue = Arc::new(Catalogue::open(&machine, &dir.join("catalogue.redb"), &reserve)?);
        reserve.refill();
        let (owners, new_owners) = mpsc::unbounded_channel();
        let groups = Groups::open(&config.groups, config.store, &groups_dir, &catalogue, owners);
        let groups = Arc::new(groups);

        let (node, link_tls) = config.link.tls()?;
        let listener = std::net::TcpListener::bind(config.link.listen)
            .with_context(|| format!("cannot listen on {}", config.link.listen))?;
        let link_addr = listener.local_addr()?;

        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("tidemark-target")
            .enable_all()
            .build()?;
        let linger = config.nbd.latest_linger.duration();
        let latest = LatestTable::new(linger);
        let branches = Branches::open(&groups, runtime.handle().clone());
        let access =
            Access { node: node.clone(), strangers: !config.nbd.require_client_certificate };
        let (own_branches, own_latest) = (Arc::clone(&branches), Arc::clone(&latest));
        let exports = TargetExports::new(Arc::clone(&groups), own_branches, own_latest, access);
        let server = Server::new(Arc::new(Served(exports)), Limits::default());
        let listeners = runtime.block_on(nbd_listeners(config))?;
        let nbd_addr = listeners.iter().find_map(Listener::tcp_address);
        for listener in listeners {
            let server = server.clone();
            runtime.spawn(async move {
                if let Err(error) = server.serve(listener).await {
                    tracing::error!("the NBD server has ended: {error}");
                }
            });
        }
        let (end, ending) = watch::channel(false);
        let about = api::About { node, nbd_listen: nbd_addr, nbd_unix: config.nbd.unix.clone() };
        let scrubs = Scrubs::new(config.scrub, Arc::clone(&groups), Arc::clone(&branches));
        let own_scrubs = Arc::clone(&scrubs);
        let api = api::Api::new(about, Arc::clone(&groups), Arc::clone(&branches), own_scrubs);
        let inside = runtime.enter();
        let socket = tidemark_control::server::Socket::bind(&config.api.socket)?;
        drop(inside);
        runtime.spawn(api.serve(socket, ending.clone()));
        let own_branches = Arc::clone(&branches);
        let temporary_linger = config.nbd.temporary_linger.duration();
        let every_tick = move || {
            latest.forget_gone();
            own_branches.look_after(temporary_linger);
        };
        runtime.spawn(housekeeping(Arc::clone(&groups), every_tick, ending.clone()));

        let work = Work {
            groups: Arc::clone(&groups),
            branches: Arc::clone(&branches),
            listener,
            tls: link_tls,
            new_owners,
            ending,
        };
        let threads = Threads::start(work)?;
        let own_scrubs = Arc::clone(&scrubs);
        let scrubbing = std::thread::Builder::new()
            .name("tidemark-scrub".to_owned())
            .spawn(move || own_scrubs.run())?;
        Ok(Target {
            runtime: Some(runtime),
            groups,
            branches,
            server,
            link_addr,
            nbd_addr,
            nbd_unix: config.nbd.unix.clone(),
            end,
            threads: Some(threads),
            scrubs,
            scrubbing: Some(scrubbing),
        })
    }

    /// Where sources connect to.
    pub fn link_addr(&self) -> SocketAddr {
        self.link_addr
    }

    /// Where remote NBD clients connect to.
    pub fn nbd_addr(&self) -> Option<SocketAddr> {
        self.nbd_addr
    }

    /// Where local NBD clients connect to.
    pub fn nbd_unix(&self) -> Option<&Path> {
        self.nbd_unix.as_deref()
    }

    /// Whether the threads that receive and write have had their turns lately: what a watchdog asks.
    pub fn alive(&self, within: Duration) -> bool {
        self.threads.as_ref().is_some_and(|threads| threads.age() <= within)
    }

    /// The groups.
    pub fn groups(&self) -> &Arc<Groups> {
        &self.groups
    }

    /// The scrubs.
    pub fn scrubs(&self) -> &Arc<Scrubs> {
        &self.scrubs
    }

    /// The branches.
    pub fn branches(&self) -> &Arc<Branches> {
        &self.branches
    }

    /// Ends everything in order: clients, sessions, logs. Blocks; must not be called on a thread of
    /// an async runtime.
    pub fn shutdown(mut self) {
        self.stop();
    }

    fn stop(&mut self) {
        let Some(runtime) = self.runtime.take() else { return };
        self.scrubs.end();
        runtime.block_on(self.server.shutdown(GRACE));
        if let Some(scrubbing) = self.scrubbing.take() {
            let _ = scrubbing.join();
        }
        self.end.send_replace(true);
        if let Some(threads) = self.threads.take() {
            threads.join();
        }
        for replica in self.groups.replicas() {
            let kept =
                replica.ledger().keep_vitals().and_then(|()| replica.ledger().keep_history());
            if let Err(error) = kept {
                tracing::error!(group = replica.name(), "{error:#}");
            }
        }
        for branch in self.branches.list() {
            if let Err(error) = branch.keep_vitals(self.groups.catalogue()) {
                tracing::error!(branch = branch.name(), "{error:#}");
            }
        }
        // What its tasks hold is let go, the catalogue's lock too: another target can start here.
        runtime.shutdown_timeout(GRACE);
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            self.scrubs.end();
            self.end.send_replace(true);
            runtime.shutdown_background();
        }
    }
}

/// Once a second `every_tick` is done and vitals are kept; then, and whenever a log has grown by a segment or waits, the
/// windows are looked at. Folding goes on beside it, since time must go on meanwhile.
pub(crate) async fn housekeeping(
    groups: Arc<Groups>,
    every_tick: impl Fn() + Clone + Send + 'static,
    mut ending: watch::Receiver<bool>,
) {
    let (segment, machine) = (groups.store().segment, groups.machine().clone());
    let reserve = Arc::clone(groups.catalogue().reserve());
    let mut folding: HashMap<String, tokio::task::JoinHandle<()>> = HashMap::new();
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let in_time = tokio::select! {
            biased;
            _ = ending.wait_for(|ending| *ending) => return,
            _ = ticks.tick() => true,
            () = groups.attention() => false,
        };
        let (groups, every_tick) = (Arc::clone(&groups), every_tick.clone());
        let tick = move || {
            if in_time {
                every_tick();
            }
            let look = |replica: &Arc<Replica>| {
                let stalled = replica.journal().progress().stalled.is_some();
                if stalled && groups.session(replica.name()).0.is_some() {
                    replica.ledger().waited();
                }
                if in_time && let Err(error) = replica.ledger().keep_vitals() {
                    tracing::warn!(group = replica.name(), "{error:#}");
                }
                retention::look(replica, groups.store().segment)
            };
            groups.replicas().into_iter().filter(look).collect::<Vec<_>>()
        };
        let to_fold = match machine.spawn_blocking(tick).await {
            Ok(to_fold) => to_fold,
            Err(error) => {
                tracing::error!("housekeeping failed: {error}");
                continue;
            }
        };
        folding.retain(|_, fold| !fold.is_finished());
        if folding.is_empty() && to_fold.is_empty() && !reserve.is_whole() {
            let reserve = Arc::clone(&reserve);
            let _ = machine.spawn_blocking(move || reserve.refill()).await;
        }
        for replica in to_fold {
            let reserve = Arc::clone(&reserve);
            folding.entry(replica.name().to_owned()).or_insert_with(|| {
                machine.spawn_blocking(move || {
                    // As many as leave the window now, so that folding keeps up. Each is looked at just
                    // before: the one that was decided about may have been folded meanwhile.
                    while retention::look(&replica, segment) {
                        match reserve.with_room(|| retention::fold_oldest(&replica)) {
                            Ok(true) => reserve.refill(),
                            Ok(false) => return,
                            Err(error) => {
                                tracing::warn!(group = replica.name(), "{error:#}");
                                return;
                            }
                        }
                    }
                })
            });
        }
    }
}

async fn nbd_listeners(config: &Config) -> anyhow::Result<Vec<Listener>> {
    let mut listeners = Vec::new();
    if let Some(path) = &config.nbd.unix {
        let listener = Listener::unix(path, 0o660).await;
        listeners.push(listener.with_context(|| format!("cannot listen on {}", path.display()))?);
    }
    if let Some(address) = config.nbd.listen {
        let client_ca = config.nbd.require_client_certificate.then_some(config.link.ca.as_path());
        let (certificate, key) = (&config.link.certificate, &config.link.key);
        let tls = tidemark_nbd::tls::server_config(certificate, key, client_ca)?;
        let listener = Listener::tcp(address).await;
        let listener = listener.with_context(|| format!("cannot listen on {address}"))?;
        listeners.push(listener.with_tls(Tls::Required(tls)));
    }
    Ok(listeners)
}
