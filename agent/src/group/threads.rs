//! The threads of a group, and how they end: all of them, however far a start has come.

use std::{io, sync::Arc, thread::JoinHandle};

use anyhow::Context;
use tokio::sync::oneshot;

use crate::{
    encoder,
    engine::{self, Command, Engine, Parts},
    outbox::Outbox,
    state::keeper::{Done, Keeper},
};

/// The threads that run for a group.
pub(crate) struct Threads {
    encoder: encoder::Waker,
    outbox: Arc<Outbox>,
    engine: Option<Engine>,
    handles: Vec<JoinHandle<()>>,
}

impl Threads {
    /// The encoder runs; the others follow.
    pub fn new(encoder: encoder::Waker, thread: JoinHandle<()>, outbox: Arc<Outbox>) -> Threads {
        Threads { encoder, outbox, engine: None, handles: vec![thread] }
    }

    /// Another one, which ends with the outbox or when it is told to.
    pub fn add(&mut self, thread: JoinHandle<()>) {
        self.handles.push(thread);
    }

    /// Starts the engine and its keeper.
    ///
    /// # Errors
    /// One of them cannot be started.
    pub fn start_engine(
        &mut self,
        parts: Parts,
        make_keeper: impl FnOnce(Box<dyn Fn(Done) + Send>) -> io::Result<(Keeper, JoinHandle<()>)>
        + Send
        + 'static,
    ) -> anyhow::Result<(Engine, Keeper)> {
        let (sender, kept) = std::sync::mpsc::channel();
        let started = engine::start(parts, move |answer| {
            let (keeper, thread) = make_keeper(answer)?;
            // It is waited for just below.
            let _ = sender.send((keeper.clone(), thread));
            Ok(keeper)
        });
        let keeper = kept.recv().ok().map(|(keeper, thread)| {
            // Without an engine it ends when nobody can ask it any more.
            self.handles.push(thread);
            keeper
        });
        let (engine, thread) = started?;
        self.handles.push(thread);
        self.engine = Some(engine.clone());
        Ok((engine, keeper.context("the state keeper")?))
    }

    /// Waits until all of them have ended, of which the engine's has been told to. It blocks.
    pub fn end(mut self) {
        self.outbox.close();
        self.encoder.stop();
        for thread in self.handles.drain(..) {
            // A panic there has been reported already; there is nothing left to save.
            let _ = thread.join();
        }
        if let Some(engine) = self.engine {
            engine.release();
        }
    }

    /// The end of a start that has failed: as if the process had been killed. It blocks.
    pub fn give_up(self) {
        if let Some(engine) = &self.engine {
            let (done, _) = oneshot::channel();
            engine.tell(Command::Stop { at_once: true, done });
        }
        self.end();
    }
}

#[cfg(test)]
mod tests;
