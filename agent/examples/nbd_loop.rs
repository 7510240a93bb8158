//! A plain loop device over the kernel's NBD client: shows the netlink module at work.
//!
//! ```text
//! nbd_loop BACKING STATE [CONNECTIONS]
//! nbd_loop --disconnect INDEX
//! ```
//!
//! The device's index is kept in the file STATE, and the next run takes the device over: kill it
//! with SIGKILL under load and start it again.

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tidemark_agent::kernel::blockdev::{Backing, ZeroMode};
use tidemark_agent::kernel::memfd::Region;
use tidemark_agent::kernel::nbd_netlink::{DeviceSettings, NbdControl};
use tidemark_agent::kernel::uring::{Buf, Ring, Token};

use common::{PATIENCE, claim};

const REQUEST_MAX_BYTES: u32 = 32 << 20;

// The transmission phase of the NBD protocol.
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const HAS_FLAGS: u16 = 1 << 0;
const SEND_FLUSH: u16 = 1 << 2;
const SEND_FUA: u16 = 1 << 3;
const SEND_TRIM: u16 = 1 << 5;
const CAN_MULTI_CONN: u16 = 1 << 8;
const COMMAND_FUA: u16 = 1 << 0;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut control = NbdControl::open()?;
    let (path, state, connections) = match arguments.as_slice() {
        [verb, index] if verb == "--disconnect" => return Ok(control.disconnect(index.parse()?)?),
        [path, state] => (path, Path::new(state), 1),
        [path, state, count] => (path, Path::new(state), count.parse()?),
        _ => bail!("nbd_loop BACKING STATE [CONNECTIONS]"),
    };
    let backing = claim(Path::new(path))?;
    let mut transmission_flags = HAS_FLAGS | SEND_FLUSH | SEND_FUA | CAN_MULTI_CONN;
    if backing.abilities().unmap.is_some() {
        transmission_flags |= SEND_TRIM;
    }
    let settings = DeviceSettings {
        size_bytes: backing.geometry().size_bytes,
        block_bytes: backing.geometry().logical_block_bytes,
        transmission_flags,
        request_timeout: Duration::from_secs(10),
        dead_connection_timeout: Duration::from_secs(60),
        identifier: Some("nbd-loop-example".to_owned()),
    };
    let remembered = std::fs::read_to_string(state).ok().and_then(|text| text.trim().parse().ok());
    let streams = match remembered {
        Some(index) => {
            println!("identifier found at {:?}", control.find("nbd-loop-example")?);
            let streams = control.reconnect(index, &settings, connections, PATIENCE)?;
            println!("recovered /dev/nbd{index}, {} connections", streams.len());
            streams
        }
        None => {
            let (index, streams) = control.connect(None, &settings, connections)?;
            std::fs::write(state, index.to_string()).context("state file")?;
            println!("started /dev/nbd{index} {:?}", control.status(Some(index))?);
            streams
        }
    };
    let backing = Arc::new(backing);
    let servers: Vec<_> = streams
        .into_iter()
        .map(|stream| {
            let backing = backing.clone();
            std::thread::spawn(move || Connection::new(stream, &backing)?.serve())
        })
        .collect();
    for server in servers {
        server.join().map_err(|_| anyhow::anyhow!("a connection panicked"))??;
    }
    Ok(())
}

struct Connection {
    stream: UnixStream,
    ring: Ring,
    file: tidemark_agent::kernel::uring::FileId,
    region: Arc<Region>,
    region_id: tidemark_agent::kernel::uring::RegionId,
    unmap: bool,
    payload: Vec<u8>,
}

impl Connection {
    fn new(stream: UnixStream, backing: &Backing) -> Result<Self> {
        let mut ring = Ring::new(4)?;
        let region = Arc::new(Region::anonymous(u64::from(REQUEST_MAX_BYTES))?);
        Ok(Self {
            stream,
            file: ring.add_file(backing.file().clone())?,
            region_id: ring.add_region(region.clone())?,
            ring,
            region,
            unmap: backing.abilities().unmap.is_some(),
            payload: vec![0; REQUEST_MAX_BYTES as usize],
        })
    }

    /// One request after the other, until the kernel says goodbye.
    fn serve(mut self) -> Result<()> {
        loop {
            let mut header = [0u8; 28];
            self.stream.read_exact(&mut header)?;
            let magic = u32::from_be_bytes(header[..4].try_into()?);
            ensure!(magic == REQUEST_MAGIC, "bad request magic {magic:#x}");
            let flags = u16::from_be_bytes(header[4..6].try_into()?);
            let command = u16::from_be_bytes(header[6..8].try_into()?);
            let from = u64::from_be_bytes(header[16..24].try_into()?);
            let len = u32::from_be_bytes(header[24..].try_into()?);
            let token = Token::new(0, 0, 0);
            let buf = Buf { region: self.region_id, offset: 0, len };
            match command {
                0 => self.ring.read(self.file, from, buf, token)?,
                1 => {
                    let payload = self.payload.get_mut(..len as usize).context("length")?;
                    self.stream.read_exact(payload)?;
                    self.region.copy_in(0, payload)?;
                    self.ring.write(self.file, from, buf, flags & COMMAND_FUA != 0, token)?;
                }
                2 => return Ok(()),
                3 => self.ring.flush(self.file, token)?,
                4 => {
                    let mode = if self.unmap { ZeroMode::Unmap } else { ZeroMode::Keep };
                    self.ring.zero(self.file, from, u64::from(len), mode, token)?;
                }
                other => bail!("command {other} was not offered"),
            }
            let result = loop {
                self.ring.wait(None)?;
                if let Some(done) = self.ring.completion() {
                    break done.result;
                }
            };
            let error = if result < 0 { result.unsigned_abs() } else { 0 };
            let mut reply = Vec::with_capacity(16);
            reply.extend_from_slice(&REPLY_MAGIC.to_be_bytes());
            reply.extend_from_slice(&error.to_be_bytes());
            reply.extend_from_slice(&header[8..16]);
            self.stream.write_all(&reply)?;
            if command == 0 && error == 0 {
                let payload = self.payload.get_mut(..len as usize).context("length")?;
                self.region.copy_out(0, payload)?;
                self.stream.write_all(payload)?;
            }
        }
    }
}
