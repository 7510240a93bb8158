//! A network that misbehaves on request: a TCP proxy on loopback that can stall, cut, reset, corrupt, slow down and
//! forget its connections.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};

/// Bytes that are passed on at a time: a fault falls into the middle of a message.
const STEP_BYTES: usize = 4096;

/// A running proxy. Dropping it ends its connections and frees its port.
pub struct Proxy {
    shared: Arc<Shared>,
    address: SocketAddr,
    accepting: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    connections: Vec<[TcpStream; 2]>,
    stalled: bool,
    /// New connections are cut at once.
    dead: bool,
    /// After so many more bytes from the source, all connections are reset.
    reset_after: Option<u64>,
    /// After so many more bytes from the source, one is changed.
    corrupt_after: Option<u64>,
    /// The most that each direction of a connection passes on in a second.
    bytes_per_s: Option<u64>,
    /// Counts the connections; those with a lower number than the other are forgotten.
    accepted: u64,
    remembered_from: u64,
    forwarded_bytes: u64,
    returned_bytes: u64,
    ended: bool,
}

impl Proxy {
    /// Listens on a free port of loopback and passes on to `to`.
    pub fn start(to: SocketAddr) -> io::Result<Proxy> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new() });
        let accepting = thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                for client in listener.incoming() {
                    if shared.lock().ended {
                        return;
                    }
                    // A failed connection is the client's to notice.
                    let _ = client.and_then(|client| pass_on(client, to, &shared));
                }
            }
        });
        Ok(Proxy { shared, address, accepting: Some(accepting) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops passing anything on, or goes on. Connections stay.
    pub fn stall(&self, stalled: bool) {
        self.shared.lock().stalled = stalled;
        self.shared.changed.notify_all();
    }

    /// Takes the network away, cutting all connections, or gives it back.
    pub fn dead(&self, dead: bool) {
        let mut state = self.shared.lock();
        state.dead = dead;
        if dead {
            state.end_all(false);
        }
    }

    /// Ends all connections in order, as far as TCP is concerned.
    pub fn cut(&self) {
        self.shared.lock().end_all(false);
    }

    /// Resets all connections when the source has sent so many more bytes.
    pub fn reset_after(&self, bytes: u64) {
        self.shared.lock().reset_after = Some(bytes);
    }

    /// Whether a reset that was asked for has come about.
    pub fn was_reset(&self) -> bool {
        self.shared.lock().reset_after.is_none()
    }

    /// Changes one byte when the source has sent so many more.
    pub fn corrupt_after(&self, bytes: u64) {
        self.shared.lock().corrupt_after = Some(bytes);
    }

    /// Whether a change that was asked for has come about.
    pub fn was_corrupted(&self) -> bool {
        self.shared.lock().corrupt_after.is_none()
    }

    /// Bounds what each direction of a connection passes on in a second, or no longer does so.
    pub fn slow(&self, bytes_per_s: Option<u64>) {
        self.shared.lock().bytes_per_s = bytes_per_s;
    }

    /// Passes nothing on any more between the present ends, and tells neither: only new connections work.
    pub fn forget(&self) {
        let mut state = self.shared.lock();
        state.remembered_from = state.accepted;
    }

    /// Bytes that the source has sent through it.
    pub fn forwarded_bytes(&self) -> u64 {
        self.shared.lock().forwarded_bytes
    }

    /// Bytes that went through it in both directions.
    pub fn passed_bytes(&self) -> u64 {
        let state = self.shared.lock();
        state.forwarded_bytes + state.returned_bytes
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        {
            let mut state = self.shared.lock();
            state.ended = true;
            state.end_all(false);
        }
        self.shared.changed.notify_all();
        // Wakes the thread that accepts; if even that fails, it is left behind.
        if TcpStream::connect(self.address).is_ok()
            && let Some(accepting) = self.accepting.take()
        {
            let _ = accepting.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn end_all(&mut self, reset: bool) {
        for stream in self.connections.drain(..).flatten() {
            if reset {
                let now = libc::linger { l_onoff: 1, l_linger: 0 };
                let _ = setsockopt(&stream, sockopt::Linger, &now);
            }
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn pass_on(client: TcpStream, to: SocketAddr, shared: &Arc<Shared>) -> io::Result<()> {
    let server = TcpStream::connect(to)?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let ends = [client.try_clone()?, server.try_clone()?];
    let number = {
        let mut state = shared.lock();
        state.connections.push(ends);
        if state.dead {
            state.end_all(false);
        }
        state.accepted += 1;
        state.accepted - 1
    };
    let (up, down) = ((client.try_clone()?, server.try_clone()?), (server, client));
    for ((from, to), from_source) in [(up, true), (down, false)] {
        let shared = Arc::clone(shared);
        thread::spawn(move || {
            // Either end going away ends both.
            let _ = copy(&from, &to, (number, from_source), &shared);
            let _ = from.shutdown(Shutdown::Both);
            let _ = to.shutdown(Shutdown::Both);
        });
    }
    Ok(())
}

fn copy(
    mut from: &TcpStream,
    mut to: &TcpStream,
    (number, from_source): (u64, bool),
    shared: &Shared,
) -> io::Result<()> {
    let mut buffer = [0; STEP_BYTES];
    loop {
        let bytes = from.read(&mut buffer)?;
        if bytes == 0 {
            return Ok(());
        }
        let mut state = shared.lock();
        while (state.stalled || number < state.remembered_from) && !state.ended {
            state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.ended {
            return Ok(());
        }
        let mut pass = bytes;
        if from_source {
            if let Some(left) = state.reset_after {
                pass = bytes.min(usize::try_from(left).unwrap_or(usize::MAX));
                state.reset_after = Some(left - pass as u64);
            }
            state.forwarded_bytes += pass as u64;
            if let Some(left) = state.corrupt_after {
                let at = usize::try_from(left).ok().filter(|at| *at < pass);
                if let Some(byte) = at.and_then(|at| buffer.get_mut(at)) {
                    *byte ^= 0x10;
                }
                state.corrupt_after = left.checked_sub(pass as u64).filter(|_| at.is_none());
            }
        } else {
            state.returned_bytes += pass as u64;
        }
        let rate = state.bytes_per_s;
        drop(state);
        if let Some(rate) = rate {
            thread::sleep(Duration::from_secs_f64(pass as f64 / rate as f64));
        }
        to.write_all(&buffer[..pass])?;
        let mut state = shared.lock();
        if from_source && state.reset_after == Some(0) {
            state.reset_after = None;
            state.end_all(true);
        }
    }
}
