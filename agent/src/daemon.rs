//! The agent as a daemon: configuration, local API, service manager.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use sd_notify::NotifyState;
use tidemark_control::server::{Socket, serve};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::{
    Agent,
    agent::RETRY,
    api,
    config::{AgentConfig, Loaded},
    kernel::process,
    passthrough::Passthrough,
};

/// Runs the agent with the configuration in `directory` until it is told to end. Call it before any
/// thread is started.
///
/// # Errors
/// A sentence that says what is in the way.
pub fn run(directory: &Path) -> Result<()> {
    let loaded = AgentConfig::load(directory)?;
    for warning in process::settle_below_filesystems() {
        tracing::warn!("{warning}");
    }
    runtime()?.block_on(work(directory, loaded))
}

/// Serves the devices of a group, or of all, without capturing anything, until it is told to end. Call it
/// before any thread is started. `tracking_lost`: even if nothing can remember that.
///
/// # Errors
/// A sentence that says what is in the way.
pub fn run_passthrough(directory: &Path, group: Option<&str>, tracking_lost: bool) -> Result<()> {
    let Loaded { config, faults, .. } = AgentConfig::load(directory)?.whole()?;
    let wanted = |name: &str| group.is_none_or(|group| group == name);
    for fault in faults.iter().filter(|fault| wanted(&fault.group)) {
        tracing::error!(group = fault.group, error = %fault.error, "the group's file cannot be used");
    }
    for warning in process::settle_below_filesystems() {
        tracing::warn!("{warning}");
    }
    runtime()?.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut serving = Vec::new();
        for group in config.groups.iter().filter(|group| wanted(group.name.as_str())) {
            match Passthrough::start(&config.node, group, tracking_lost).await {
                Ok(started) => serving.push(started),
                Err(error) => {
                    let error = format!("{error:#}");
                    tracing::error!(group = %group.name, error, "its devices are not served");
                }
            }
        }
        if serving.is_empty() {
            bail!("there is no group whose devices could be served");
        }
        // Without a service manager there is nobody to tell.
        let _ = sd_notify::notify(&[NotifyState::Ready]);
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = feed_watchdog_of(&serving) => {}
        }
        let _ = sd_notify::notify(&[NotifyState::Stopping]);
        for passthrough in serving {
            passthrough.stop().await;
        }
        Ok(())
    })
}

/// Never ends.
async fn feed_watchdog_of(serving: &[Passthrough]) {
    let Some(limit) = sd_notify::watchdog_enabled() else { return std::future::pending().await };
    loop {
        tokio::time::sleep(watchdog_period(limit)).await;
        let mut alive = true;
        for passthrough in serving {
            alive &= passthrough.is_alive().await;
        }
        if alive {
            // A failure to tell shows as the watchdog's own.
            let _ = sd_notify::notify(&[NotifyState::Watchdog]);
        }
    }
}

fn watchdog_period(limit: Duration) -> Duration {
    limit.div_f64(3.0).max(Duration::from_millis(100))
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("tm-front")
        .enable_all()
        .build()
        .context("start the async runtime")
}

async fn work(directory: &Path, loaded: Loaded) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let socket = Socket::bind(&loaded.config.node.api_socket)?;
    let agent = Agent::new(&loaded, Some(directory))?;
    let (end, ended) = oneshot::channel::<()>();
    let api = tokio::spawn(serve(socket, api::routes(agent.clone()), async move {
        // Dropped or sent: both mean the end.
        let _ = ended.await;
    }));
    let watchdog = tokio::spawn(feed_watchdog(agent.clone()));
    // A stop is seen even while a group waits for its disks.
    let groups = tokio::spawn(start_groups(agent.clone(), loaded));
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    watchdog.abort();
    groups.abort();
    let clean = agent.stop().await;
    // The API's task ends with the process at the latest.
    let _ = end.send(());
    api.await.context("the local API")??;
    if !clean {
        bail!("not everything reached the target in time; it is compared after the next start");
    }
    Ok(())
}

/// Starts the groups, says that the agent runs when each has been tried, and then starts those whose
/// disks appear after the agent, such as at the machine's start. Those who mount such a disk wait for its
/// device, not for the agent. It never ends.
async fn start_groups(agent: Arc<Agent>, loaded: Loaded) {
    agent.start_groups(loaded.config.names()).await;
    agent.forget_stale_rings().await;
    // Without a service manager there is nobody to tell.
    let _ = sd_notify::notify(&[NotifyState::Ready]);
    let node = &loaded.config.node.node;
    tracing::info!(%node, version = env!("CARGO_PKG_VERSION"), "the agent is running");
    loop {
        tokio::time::sleep(RETRY).await;
        let agent = agent.clone();
        // One that waits for its disk must not keep the others waiting.
        tokio::spawn(async move { agent.start_late_groups().await });
    }
}

/// Tells the service manager that the capture threads work, for as long as they do.
async fn feed_watchdog(agent: Arc<Agent>) {
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    let period = watchdog_period(limit);
    loop {
        tokio::time::sleep(period).await;
        if agent.is_alive().await {
            // A failure to tell shows as the watchdog's own.
            let _ = sd_notify::notify(&[NotifyState::Watchdog]);
        }
    }
}
