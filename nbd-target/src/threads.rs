//! The threads that take history in, each an io_uring of its own: one for all links, which decrypts and checks what
//! comes, and one for all logs, which writes it. So the next frames are received while the last are hashed and synced.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc as std_mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::Context;
use tidemark_link::{conn::Timeouts, seam};
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    branch::registry::Branches, groups::Groups, receiver::driver::Sessions, store::log::Owner,
};

/// How often a thread shows that it has its turns.
const BEAT: Duration = Duration::from_secs(1);

/// What the threads work on.
pub(crate) struct Work {
    pub groups: Arc<Groups>,
    pub branches: Arc<Branches>,
    pub listener: std::net::TcpListener,
    pub tls: Arc<rustls::ServerConfig>,
    pub new_owners: mpsc::UnboundedReceiver<Owner>,
    pub ending: watch::Receiver<bool>,
}

/// The running threads.
pub(crate) struct Threads {
    links: JoinHandle<()>,
    logs: JoinHandle<()>,
    pulses: [Arc<Pulse>; 2],
}

impl Threads {
    /// Starts both; they have their io_urings then.
    pub fn start(work: Work) -> anyhow::Result<Threads> {
        let Work { groups, branches, listener, tls, new_owners, ending } = work;
        let (links_ended, no_more) = oneshot::channel();
        let pulses = [Arc::new(Pulse::new()), Arc::new(Pulse::new())];
        let own_groups = Arc::clone(&groups);
        let logs = spawn("tidemark-log", &pulses[1], async move || {
            // Also when the other thread is gone without a word.
            let end = async move {
                let _: Result<(), _> = no_more.await;
                own_groups.end_logs();
                branches.end();
            };
            run_logs(new_owners, end).await;
        })?;
        let links = spawn("tidemark-link", &pulses[0], async move || {
            run_links(Sessions::new(groups, Timeouts::default()), listener, tls, ending).await;
            let _ = links_ended.send(());
        })?;
        Ok(Threads { links, logs, pulses })
    }

    /// How long ago the one that was held up the longest had its turn.
    pub fn age(&self) -> Duration {
        self.pulses.iter().map(|pulse| pulse.age()).max().unwrap_or_default()
    }

    /// Waits for their end, which was asked for.
    pub fn join(self) {
        // One that has panicked has said so.
        let _ = self.links.join();
        let _ = self.logs.join();
    }
}

/// A thread that beats a pulse beside its work.
fn spawn(
    name: &str,
    pulse: &Arc<Pulse>,
    work: impl AsyncFnOnce() + Send + 'static,
) -> anyhow::Result<JoinHandle<()>> {
    let (ready, started) = std_mpsc::channel();
    let pulse = Arc::clone(pulse);
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        let told = ready.clone();
        let work = async move {
            let _ = told.send(Ok(()));
            seam::spawn(async move {
                loop {
                    pulse.beat();
                    tokio::time::sleep(BEAT).await;
                }
            });
            work().await;
        };
        if let Err(error) = seam::run(work) {
            let _ = ready.send(Err(error));
        }
    })?;
    let started: io::Result<()> =
        started.recv().with_context(|| format!("the thread {name} has ended"))?;
    started.with_context(|| format!("the thread {name} has no io_uring"))?;
    Ok(thread)
}

/// Sessions, until the end.
async fn run_links(
    sessions: std::rc::Rc<Sessions>,
    listener: std::net::TcpListener,
    tls: Arc<rustls::ServerConfig>,
    mut ending: watch::Receiver<bool>,
) {
    let listener = seam::Listener::from_std(listener);
    let accepting = seam::spawn(std::rc::Rc::clone(&sessions).accept(listener, tls));
    // An error means that the target is gone.
    let _ = ending.wait_for(|ending| *ending).await;
    accepting.abort();
    sessions.end().await;
}

/// The owners of all logs. After `end` no further one is taken on, and those that are there write what they have.
async fn run_logs(mut new_owners: mpsc::UnboundedReceiver<Owner>, end: impl Future<Output = ()>) {
    let mut owners: Vec<tokio::task::JoinHandle<()>> = Vec::new();
    let mut end = std::pin::pin!(end);
    loop {
        tokio::select! {
            biased;
            () = &mut end => break,
            owner = new_owners.recv() => match owner {
                Some(owner) => {
                    owners.retain(|handle| !handle.is_finished());
                    owners.push(seam::spawn(owner.run()));
                }
                None => break,
            },
        }
    }
    for owner in owners {
        let _ = owner.await;
    }
}

/// When a thread last had its turn.
struct Pulse {
    start: Instant,
    beat_ms: AtomicU64,
}

impl Pulse {
    fn new() -> Pulse {
        Pulse { start: Instant::now(), beat_ms: AtomicU64::new(0) }
    }

    fn beat(&self) {
        let now = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.beat_ms.store(now, Ordering::Relaxed);
    }

    fn age(&self) -> Duration {
        let beat = Duration::from_millis(self.beat_ms.load(Ordering::Relaxed));
        self.start.elapsed().saturating_sub(beat)
    }
}
