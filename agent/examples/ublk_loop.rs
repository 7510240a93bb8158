//! A plain loop device over ublk, without capture: shows the kernel modules at work, and what a copy of each
//! write costs.
//!
//! ```text
//! ublk_loop BACKING [--slots] [--state FILE] [--name GROUP/VOLUME]
//! ublk_loop --delete N
//! ublk_loop --hide-rule BACKING
//! ```
//!
//! With `--slots` every write's payload passes through a ring of slots in a memfd, as capture has
//! it. With `--state` the device's
//! number is kept in FILE, and the next run takes the device over: kill it with SIGKILL under load
//! and start it again.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;

use anyhow::{Context, Result, bail};
use tidemark_agent::kernel::blockdev::{Backing, ZeroMode, inspect};
use tidemark_agent::kernel::memfd::Region;
use tidemark_agent::kernel::ublk::abi::RES_ABORT;
use tidemark_agent::kernel::ublk::{
    Control, DeviceInfo, DeviceParams, Features, IoDesc, IoOp, NewDevice, Queue,
};
use tidemark_agent::kernel::udev::{Names, hide_rule};
use tidemark_agent::kernel::uring::{Buf, Completion, FileId, RegionId, Ring, Token};

use common::{PATIENCE, claim};

const DEPTH: u16 = 128;
const MAX_IO_BYTES: u32 = 1 << 20;
const SLOTS_BYTES: u64 = 64 << 20;

struct Options {
    backing: PathBuf,
    slots: bool,
    state: Option<PathBuf>,
    name: Option<(String, String)>,
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [verb, path] = arguments.as_slice()
        && verb == "--hide-rule"
    {
        let disk = inspect(Path::new(path))?;
        let links = Names::default().links(&disk.identity.kernel_name)?;
        print!("{}", hide_rule(&disk, &links, "example", "disk")?);
        return Ok(());
    }
    let mut control = Control::open(PATIENCE)?;
    if let [verb, number] = arguments.as_slice()
        && verb == "--delete"
    {
        let dev_id = number.parse()?;
        control.stop(dev_id)?;
        return Ok(control.delete(dev_id)?);
    }
    let options = parse(&arguments)?;
    println!("driver: {}", control.features()?);
    let backing = claim(&options.backing)?;
    println!(
        "backing: {:?} {:?} direct={}",
        backing.geometry(),
        backing.abilities(),
        backing.is_direct()
    );

    let remembered = match &options.state {
        Some(file) => std::fs::read_to_string(file).ok().and_then(|t| t.trim().parse().ok()),
        None => None,
    };
    let recovered = match remembered {
        Some(dev_id) if control.find(dev_id)?.is_some() => {
            Some(control.start_recovery(dev_id, PATIENCE)?)
        }
        _ => None,
    };
    let info = match recovered {
        Some(info) => info,
        None => add(&mut control, &options, &backing)?,
    };

    if let Some((group, volume)) = &options.name {
        let kernel_name = format!("ublkb{}", info.dev_id);
        println!("name: {}", Names::default().publish(&kernel_name, group, volume)?.display());
    }
    let (ready, is_ready) = mpsc::channel();
    let slots = options.slots;
    let server = std::thread::spawn(move || serve(&info, &backing, slots, ready));
    if is_ready.recv().is_ok() {
        match recovered {
            Some(_) => control.end_recovery(info.dev_id)?,
            None => control.start(info.dev_id)?,
        }
        println!(
            "{} {}",
            if recovered.is_some() { "recovered" } else { "started" },
            info.block_path().display()
        );
    }
    server.join().map_err(|_| anyhow::anyhow!("the server panicked"))?
}

fn parse(arguments: &[String]) -> Result<Options> {
    let mut options = Options { backing: PathBuf::new(), slots: false, state: None, name: None };
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match argument.as_str() {
            "--slots" => options.slots = true,
            "--state" => options.state = Some(rest.next().context("--state FILE")?.into()),
            "--name" => {
                let name = rest.next().and_then(|name| name.split_once('/'));
                let (group, volume) = name.context("--name GROUP/VOLUME")?;
                options.name = Some((group.to_owned(), volume.to_owned()));
            }
            path => options.backing = path.into(),
        }
    }
    Ok(options)
}

fn add(control: &mut Control, options: &Options, backing: &Backing) -> Result<DeviceInfo> {
    let info = control.add(&NewDevice {
        dev_id: None,
        queues: 1,
        queue_depth: DEPTH,
        max_io_bytes: MAX_IO_BYTES,
        features: Features::required(),
        identity: 0,
    })?;
    let params =
        DeviceParams::new(*backing.geometry(), *backing.abilities(), MAX_IO_BYTES, 32 << 20);
    control.set_params(info.dev_id, &params)?;
    if let Some(file) = &options.state {
        remember(file, info.dev_id)?;
    }
    Ok(info)
}

fn remember(file: &Path, dev_id: u32) -> Result<()> {
    std::fs::write(file, dev_id.to_string()).context("state file")
}

const REQUEST: u8 = 1;
const BACKING_IO: u8 = 2;

/// One device's server: the queue, the backing and, with `--slots`, the ring of slots.
struct Server {
    ring: Ring,
    queue: Queue,
    backing: FileId,
    unmap: bool,
    buffers: RegionId,
    slots: Option<Slots>,
    live_tags: u16,
}

struct Slots {
    region: Arc<Region>,
    id: RegionId,
    next: u64,
}

fn serve(info: &DeviceInfo, backing: &Backing, slots: bool, ready: mpsc::Sender<()>) -> Result<()> {
    let mut ring = Ring::new(512)?;
    let queue = Queue::open(info, 0, PATIENCE, &mut ring)?;
    let buffers = queue.buffers_id();
    let slots = match slots {
        true => {
            let region = Arc::new(Region::create("slots", SLOTS_BYTES)?);
            // Present before the load comes, as a capture ring is.
            region.zero(0, SLOTS_BYTES)?;
            let id = ring.add_region(region.clone())?;
            Some(Slots { region, id, next: 0 })
        }
        false => None,
    };
    queue.fetch_all(&mut ring, |tag| Token::new(REQUEST, 0, u32::from(tag)))?;
    ring.submit()?;
    let _ = ready.send(());
    let mut server = Server {
        backing: ring.add_file(backing.file().clone())?,
        unmap: backing.abilities().unmap.is_some(),
        live_tags: info.queue_depth,
        ring,
        queue,
        buffers,
        slots,
    };
    while server.live_tags > 0 {
        server.ring.wait(None)?;
        while let Some(done) = server.ring.completion() {
            server.handle(done)?;
        }
    }
    Ok(server.queue.close(&mut server.ring)?)
}

impl Server {
    fn handle(&mut self, done: Completion) -> Result<()> {
        let tag = done.token.index as u16;
        match (done.token.kind, done.result) {
            (REQUEST, RES_ABORT) => self.live_tags -= 1,
            (REQUEST, 0) => self.begin(tag)?,
            (REQUEST, other) => bail!("tag {tag}: fetch failed: {other}"),
            _ => self.commit(tag, done.result)?,
        }
        Ok(())
    }

    fn begin(&mut self, tag: u16) -> Result<()> {
        let desc = self.queue.desc(tag)?;
        let token = Token::new(BACKING_IO, 0, u32::from(tag));
        match desc.op {
            IoOp::Write => {
                let place = self.payload(tag, &desc)?;
                self.ring.write(self.backing, desc.position(), place, desc.fua, token)?;
            }
            IoOp::Read => {
                let len = desc.len_bytes() as u32;
                let offset = self.queue.buffer_offset(tag);
                let place = Buf { region: self.buffers, offset, len };
                self.ring.read(self.backing, desc.position(), place, token)?;
            }
            IoOp::Flush => self.ring.flush(self.backing, token)?,
            IoOp::Discard | IoOp::WriteZeroes => {
                let unmap = self.unmap && !desc.no_unmap;
                let mode = if unmap { ZeroMode::Unmap } else { ZeroMode::Keep };
                self.ring.zero(self.backing, desc.position(), desc.len_bytes(), mode, token)?;
            }
            IoOp::Unknown(_) => self.commit(tag, -libc::EOPNOTSUPP)?,
        }
        Ok(())
    }

    fn commit(&mut self, tag: u16, result: i32) -> Result<()> {
        let token = Token::new(REQUEST, 0, u32::from(tag));
        Ok(self.queue.commit(&mut self.ring, tag, result, token)?)
    }

    /// Brings a write's payload to its place.
    fn payload(&mut self, tag: u16, desc: &IoDesc) -> Result<Buf> {
        let len = desc.len_bytes();
        let place = self.place(tag, len as u32);
        if let Some(slots) = &self.slots {
            let offset = self.queue.buffer_offset(tag);
            slots.region.copy_from(place.offset, self.queue.buffers(), offset, len)?;
        }
        Ok(place)
    }

    fn place(&mut self, tag: u16, len: u32) -> Buf {
        let Some(slots) = &mut self.slots else {
            return Buf { region: self.buffers, offset: self.queue.buffer_offset(tag), len };
        };
        let room = u64::from(len).next_multiple_of(4096);
        if slots.next + room > SLOTS_BYTES {
            slots.next = 0;
        }
        let offset = slots.next;
        slots.next += room;
        Buf { region: slots.id, offset, len }
    }
}
