//! The host's end of the conversation with the server in a guest: see [`super::protocol`].

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::protocol::{FromGuest, ToGuest};

/// A guest that takes no byte for so long is stuck.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);

/// The conversation with one QEMU process, which may reset its guest any number of times.
pub struct Channel {
    to_guest: Mutex<UnixStream>,
    shared: Arc<Shared>,
    next_id: AtomicU64,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// How often the guest's server has started.
    starts: u64,
    /// Whether the process has closed its end.
    closed: bool,
    /// Who waits for which answer.
    waiting: HashMap<u64, Sender<FromGuest>>,
}

/// An answer that is to come.
pub struct Pending {
    /// The request's number.
    pub id: u64,
    answer: Receiver<FromGuest>,
}

impl Channel {
    /// Starts to read what the process says on `stream`.
    pub fn new(stream: UnixStream) -> Result<Channel> {
        stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        let shared = Arc::new(Shared::default());
        let reader = BufReader::with_capacity(256 << 10, stream.try_clone()?);
        let reading = Arc::clone(&shared);
        thread::spawn(move || reading.read_all(reader));
        Ok(Channel { to_guest: Mutex::new(stream), shared, next_id: AtomicU64::new(0) })
    }

    /// How often the guest's server has started so far.
    pub fn starts(&self) -> u64 {
        self.shared.state().starts
    }

    /// Waits until the server has started more than `starts` times.
    pub fn wait_start(&self, starts: u64, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        let mut state = self.shared.state();
        while state.starts <= starts {
            if state.closed {
                bail!("the emulator has ended");
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                bail!("the guest has not started after {} s", timeout.as_secs());
            };
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Sends the request that `make` builds from its number.
    pub fn request(&self, make: impl FnOnce(u64) -> ToGuest) -> Result<Pending> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = channel();
        {
            let mut state = self.shared.state();
            if state.closed {
                bail!("the emulator has ended");
            }
            state.waiting.insert(id, sender);
        }
        self.send(&make(id))?;
        Ok(Pending { id, answer })
    }

    /// Sends a message that has no answer.
    pub fn send(&self, message: &ToGuest) -> Result<()> {
        let mut line = vec![b'\n'];
        serde_json::to_writer(&mut line, message)?;
        line.push(b'\n');
        let mut to_guest = self.to_guest.lock().unwrap_or_else(PoisonError::into_inner);
        to_guest.write_all(&line).context("the guest takes no requests")
    }
}

impl Pending {
    /// Waits for the answer. A guest that restarts, or whose process ends, loses it, which is an error.
    pub fn wait(self, timeout: Duration) -> Result<FromGuest> {
        match self.answer.recv_timeout(timeout) {
            Ok(FromGuest::Failed { reason, .. }) => bail!("in the guest: {reason}"),
            Ok(answer) => Ok(answer),
            Err(RecvTimeoutError::Timeout) => {
                bail!("the guest has not answered for {} s", timeout.as_secs())
            }
            Err(RecvTimeoutError::Disconnected) => {
                bail!("the guest went down before it answered")
            }
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_all(&self, mut reader: BufReader<UnixStream>) {
        let mut line = Vec::new();
        // An error means that the process is gone, as the end of the stream does.
        while matches!(reader.read_until(b'\n', &mut line), Ok(count) if count > 0) {
            if let Ok(message) = serde_json::from_slice::<FromGuest>(&line) {
                self.take(message);
            }
            line.clear();
        }
        let mut state = self.state();
        state.closed = true;
        state.waiting.clear();
        self.changed.notify_all();
    }

    fn take(&self, message: FromGuest) {
        let mut state = self.state();
        match message.id() {
            None => {
                state.starts += 1;
                state.waiting.clear();
                self.changed.notify_all();
            }
            Some(id) => {
                if let Some(waiting) = state.waiting.remove(&id) {
                    // Nobody waits any more: the answer came too late.
                    let _ = waiting.send(message);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use super::Channel;
    use crate::vm::protocol::ToGuest;

    const SECOND: Duration = Duration::from_secs(1);

    fn read(id: u64) -> ToGuest {
        ToGuest::Read { id, path: "/x".to_owned(), offset_bytes: 0 }
    }

    #[test]
    fn answers_find_their_requests_in_any_order() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let channel = Channel::new(ours).unwrap();
        let (first, second) = (channel.request(read).unwrap(), channel.request(read).unwrap());
        let mut lines = BufReader::new(guest.try_clone().unwrap()).lines();
        for id in [0, 1] {
            assert_eq!(lines.next().unwrap().unwrap(), "");
            assert!(lines.next().unwrap().unwrap().contains(&format!("\"id\":{id}")));
        }
        guest.write_all(b"{\"Written\":{\"id\":1}}\n{\"Written\":{\"id\":0}}\n").unwrap();
        assert_eq!(second.wait(SECOND).unwrap().id(), Some(1));
        assert_eq!(first.wait(SECOND).unwrap().id(), Some(0));
    }

    #[test]
    fn a_restart_ends_what_was_asked_before_it() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let channel = Channel::new(ours).unwrap();
        guest.write_all(b"\n\"Hello\"\n").unwrap();
        channel.wait_start(0, SECOND).unwrap();
        let lost = channel.request(read).unwrap();
        guest.write_all(b"{\"Written\":{\"i\n\"Hello\"\n").unwrap();
        channel.wait_start(1, SECOND).unwrap();
        assert!(lost.wait(SECOND).is_err());
        assert_eq!(channel.starts(), 2);
    }

    #[test]
    fn the_end_of_the_process_is_noticed() {
        let (ours, guest) = UnixStream::pair().unwrap();
        let channel = Channel::new(ours).unwrap();
        let lost = channel.request(read).unwrap();
        drop(guest);
        assert!(lost.wait(SECOND).is_err());
        assert!(channel.wait_start(0, SECOND).is_err());
    }
}
