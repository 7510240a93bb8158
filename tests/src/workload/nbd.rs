//! A disk behind an NBD socket.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use tidemark_nbd::Zeroing;
use tidemark_nbd::client::Client;
use tokio::runtime::Handle;

use super::disk::Disk;

/// A disk over one connection or several, which take turns.
pub struct NbdDisk {
    runtime: Handle,
    clients: Vec<Client>,
    turn: AtomicUsize,
}

impl NbdDisk {
    /// A disk over these connections, at least one, which live on this runtime.
    pub fn new(runtime: &Handle, clients: Vec<Client>) -> NbdDisk {
        assert!(!clients.is_empty(), "a disk needs a connection");
        NbdDisk { runtime: runtime.clone(), clients, turn: AtomicUsize::new(0) }
    }

    fn client(&self) -> &Client {
        &self.clients[self.turn.fetch_add(1, Ordering::Relaxed) % self.clients.len()]
    }

    fn ask<T>(&self, ask: impl Future<Output = Result<T, tidemark_nbd::Error>>) -> io::Result<T> {
        self.runtime.block_on(ask).map_err(io::Error::other)
    }
}

fn length(length_bytes: u64) -> io::Result<u32> {
    u32::try_from(length_bytes).map_err(io::Error::other)
}

impl Disk for NbdDisk {
    fn write(&self, offset_bytes: u64, bytes: &[u8]) -> io::Result<()> {
        self.ask(self.client().write(offset_bytes, Bytes::copy_from_slice(bytes), false))
    }

    fn zero(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        let length = length(length_bytes)?;
        let how = Zeroing { fua: false, no_hole: false, fast_only: false };
        self.ask(self.client().write_zeroes(offset_bytes, length, how))
    }

    fn discard(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        self.ask(self.client().trim(offset_bytes, length(length_bytes)?))
    }

    fn flush(&self) -> io::Result<()> {
        self.ask(self.client().flush())
    }

    fn read(&self, offset_bytes: u64, buffer: &mut [u8]) -> io::Result<()> {
        let bytes = self.ask(self.client().read(offset_bytes, length(buffer.len() as u64)?))?;
        buffer.copy_from_slice(&bytes);
        Ok(())
    }
}
