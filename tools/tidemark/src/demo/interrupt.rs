//! The wish that the demo ends, by whatever signal it comes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

/// Whether Ctrl-C was pressed, the terminal closed or the process told to end.
pub struct Interrupt(Arc<State>);

#[derive(Default)]
struct State {
    set: AtomicBool,
    notify: Notify,
}

impl Interrupt {
    /// Takes these signals from now on; they do not end the process any more.
    pub fn watch(runtime: &Runtime) -> Result<Interrupt> {
        let _inside = runtime.enter();
        let take = |kind| signal(kind).context("take signals");
        let mut interrupt = take(SignalKind::interrupt())?;
        let mut terminate = take(SignalKind::terminate())?;
        let mut hangup = take(SignalKind::hangup())?;
        let state = Arc::<State>::default();
        let watched = Arc::clone(&state);
        runtime.spawn(async move {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
            watched.set.store(true, Ordering::Relaxed);
            // Kept for one who waits later; there is never more than one.
            watched.notify.notify_one();
        });
        Ok(Interrupt(state))
    }

    /// Completes once it is wished.
    pub async fn wait(&self) {
        self.0.notify.notified().await;
    }

    /// Whether it is wished.
    pub fn is_set(&self) -> bool {
        self.0.set.load(Ordering::Relaxed)
    }

    /// The same for those who look now and then.
    pub fn flag(&self) -> &AtomicBool {
        &self.0.set
    }
}
