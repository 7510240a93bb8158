//! The target as a daemon: configuration, signals, service manager.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

use crate::{Config, Target, receiver::SOFTWARE};

/// Runs the target with the configuration in `config` until it is told to end. Call it before any
/// thread is started.
///
/// # Errors
/// A sentence that says what is in the way.
pub fn run(config: &Path) -> anyhow::Result<()> {
    let config = Config::load(config)?;
    // Before any thread: signals are then taken by nobody else.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut stop, mut interrupt) = {
        let _inside = runtime.enter();
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)
    };
    raise_open_files();
    let target = Target::start(&config)?;
    tracing::info!(link = %target.link_addr(), "{}", SOFTWARE);
    let status = format!("receiving on {}", target.link_addr());
    let states = [sd_notify::NotifyState::Ready, sd_notify::NotifyState::Status(&status)];
    sd_notify::notify(&states).context("cannot tell the service manager")?;
    runtime.block_on(async {
        tokio::select! {
            _ = stop.recv() => {}
            _ = interrupt.recv() => {}
            () = feed_watchdog(&target) => {}
        }
    });
    tracing::info!("ending");
    // Without a service manager there is nobody to tell.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    target.shutdown();
    Ok(())
}

/// Tells the service manager that the threads which take history in have their turns, for as long as they do; never ends.
async fn feed_watchdog(target: &Target) {
    let Some(limit) = sd_notify::watchdog_enabled() else { return std::future::pending().await };
    let period = limit.div_f64(3.0).max(Duration::from_millis(100));
    loop {
        if target.alive(period) {
            // A failure to tell shows as the watchdog's own.
            let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
        }
        tokio::time::sleep(period).await;
    }
}

/// Each sealed segment that is read keeps a descriptor.
fn raise_open_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!("cannot raise the number of open files: {error}");
    }
}
