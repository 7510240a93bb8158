//! The process behind an attached device.
//!
//! It is started with a [`Job`] in JSON on its standard input, says one line of JSON (the device, or
//! why there is none) on its standard output, and then has nothing to do with its terminal any more.

use std::io::{self, BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use tidemark_agent::kernel::nbd_netlink::{DeviceSettings, NbdControl};
use tidemark_link::NodeName;
use tidemark_nbd::ExportInfo;
use tidemark_nbd::client::{self, Address, Options, Stream};
use tidemark_nbd::tls;
use tokio::io::copy;
use tokio::net::UnixStream;

use super::record::{self, Record};

/// A request unanswered for so long is sent again; so long, too, wait those that were on their way
/// when the target went away.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);
/// How long the kernel keeps requests while the target is away.
const DEAD_TIMEOUT: Duration = Duration::from_secs(600);
/// How long the kernel may take to clear a device away after it has hung up.
const HANG_UP: Duration = Duration::from_millis(500);
/// Between two looks at it.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// How long the target may take to let a client in.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Between two attempts to reach the target again.
const RETRY: Duration = Duration::from_secs(1);
/// How long the kernel may take to let go of a dead connection.
const RECONNECT_PATIENCE: Duration = Duration::from_secs(30);

/// What a worker is to do.
#[derive(Debug, Serialize, Deserialize)]
pub struct Job {
    /// Where the export is.
    pub server: Server,
    /// What is attached.
    pub record: Record,
}

/// A target's NBD server.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Server {
    /// On this machine.
    Unix {
        /// Its socket.
        path: PathBuf,
    },
    /// On another, with TLS.
    Tcp {
        /// Its address.
        address: SocketAddr,
        /// The node name in its certificate.
        name: NodeName,
        /// The authority's certificate.
        ca: PathBuf,
        /// This node's certificate.
        certificate: PathBuf,
        /// This node's key.
        key: PathBuf,
    },
}

impl Server {
    /// How to connect to it.
    pub fn connection(&self) -> Result<(Address, Options)> {
        let mut options = Options { simple_replies_only: true, ..Options::default() };
        match self {
            Server::Unix { path } => Ok((Address::Unix(path.clone()), options)),
            Server::Tcp { address, name, ca, certificate, key } => {
                let config = tls::client_config(ca, Some((certificate, key)))?;
                let name = name.dns_name().try_into().context("the target's name")?;
                options.tls = Some((config, name));
                Ok((Address::Tcp(*address), options))
            }
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Report {
    Device(String),
    Failed(String),
}

/// Starts a worker and waits for its device.
pub fn start(job: &Job) -> Result<String> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut child = Command::new(program)
        .arg("attach-worker")
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start the worker")?;
    let (Some(mut input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
        bail!("the worker has no pipes");
    };
    input.write_all(&serde_json::to_vec(job)?).context("the worker does not listen")?;
    drop(input);
    let mut line = String::new();
    BufReader::new(output).read_line(&mut line).context("the worker says nothing")?;
    match serde_json::from_str(&line) {
        Ok(Report::Device(device)) => Ok(device),
        Ok(Report::Failed(sentence)) => Err(anyhow!(sentence)),
        Err(_) => Err(anyhow!("the worker ended without a word: {}", child.wait()?)),
    }
}

/// The worker's own run.
pub fn run() -> Result<ExitCode> {
    // It outlives the terminal of whoever attached. A leader of a session already does.
    let _ = nix::unistd::setsid();
    let job: Job =
        serde_json::from_reader(io::stdin().lock()).context("no job on standard input")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match runtime.block_on(Device::open(&job)) {
        Err(error) => {
            report(&Report::Failed(format!("{}: {error:#}", job.record.export)))?;
            Ok(ExitCode::FAILURE)
        }
        Ok(device) => {
            let index = device.index;
            report(&Report::Device(format!("/dev/nbd{index}")))?;
            let ended = runtime.block_on(device.serve());
            record::remove(index);
            ended.map(|()| ExitCode::SUCCESS)
        }
    }
}

/// Says how it went and closes standard output, so that nobody waits for more.
fn report(report: &Report) -> Result<()> {
    let mut line = serde_json::to_vec(report)?;
    line.push(b'\n');
    io::stdout().write_all(&line)?;
    io::stdout().flush()?;
    let null = std::fs::OpenOptions::new().write(true).open("/dev/null")?;
    nix::unistd::dup2_stdout(null)?;
    Ok(())
}

struct Device {
    control: NbdControl,
    index: u32,
    settings: DeviceSettings,
    export: String,
    address: Address,
    options: Options,
    kernel: UnixStream,
    target: Box<dyn Stream>,
}

impl Device {
    async fn open(job: &Job) -> Result<Device> {
        let mut control = NbdControl::open()?;
        let (address, options) = job.server.connection()?;
        let export = job.record.export.clone();
        let reached = client::hand_over(address.clone(), &export, &options);
        let (info, target) = tokio::time::timeout(ANSWER_TIMEOUT, reached)
            .await
            .map_err(|_| anyhow!("the target does not answer"))??;
        let settings = settings(&info, &export);
        let (index, kernel) = control.connect(None, &settings, 1)?;
        let taken = one(kernel).and_then(|kernel| {
            job.record.write(index)?;
            Ok(kernel)
        });
        match taken {
            Ok(kernel) => {
                Ok(Device { control, index, settings, export, address, options, kernel, target })
            }
            Err(error) => {
                control.disconnect(index)?;
                Err(error)
            }
        }
    }

    /// Carries bytes until the device is taken away.
    async fn serve(mut self) -> Result<()> {
        loop {
            carry(&mut self.kernel, &mut self.target).await;
            // The kernel's end is closed with ours; what was on its way is asked for again.
            drop(std::mem::replace(&mut self.kernel, UnixStream::pair()?.0));
            if self.is_gone(HANG_UP).await? {
                return Ok(());
            }
            let Some(target) = self.reach_again().await? else { return Ok(()) };
            self.target = target;
            match self.control.reconnect(self.index, &self.settings, 1, RECONNECT_PATIENCE) {
                Ok(fresh) => self.kernel = one(fresh)?,
                Err(_) if self.is_gone(HANG_UP).await? => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// A fresh connection to the target, however long it takes; none if the device goes away.
    async fn reach_again(&mut self) -> Result<Option<Box<dyn Stream>>> {
        while !self.is_gone(Duration::ZERO).await? {
            let reached = client::hand_over(self.address.clone(), &self.export, &self.options);
            match tokio::time::timeout(ANSWER_TIMEOUT, reached).await {
                Ok(Ok((info, target))) if info.size == self.settings.size_bytes => {
                    return Ok(Some(target));
                }
                Ok(Ok(_)) => bail!("{} has another size than before", self.export),
                _ => tokio::time::sleep(RETRY).await,
            }
        }
        Ok(None)
    }

    /// Whether the device has been taken away, or is within `patience`.
    async fn is_gone(&mut self, patience: Duration) -> Result<bool> {
        let deadline = Instant::now() + patience;
        loop {
            let found = self.control.status(Some(self.index))?;
            if !found.iter().any(|device| device.connected) {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
}

/// Carries bytes both ways until either end closes. Closes neither: to the kernel, half a hang-up is
/// a dead server.
async fn carry(kernel: &mut UnixStream, target: &mut Box<dyn Stream>) {
    let (mut from_kernel, mut to_kernel) = kernel.split();
    let (mut from_target, mut to_target) = tokio::io::split(target);
    // Why it ended shows by whether the device is still there.
    tokio::select! {
        _ = copy(&mut from_kernel, &mut to_target) => {}
        _ = copy(&mut from_target, &mut to_kernel) => {}
    }
}

fn one(streams: Vec<std::os::unix::net::UnixStream>) -> Result<UnixStream> {
    let stream = streams.into_iter().next().ok_or_else(|| anyhow!("no connection was taken"))?;
    stream.set_nonblocking(true)?;
    Ok(UnixStream::from_std(stream)?)
}

fn settings(info: &ExportInfo, export: &str) -> DeviceSettings {
    DeviceSettings {
        size_bytes: info.size,
        block_bytes: info.block_sizes.minimum.clamp(512, 4096).next_power_of_two(),
        transmission_flags: info.features.to_wire(false),
        request_timeout: REQUEST_TIMEOUT,
        dead_connection_timeout: DEAD_TIMEOUT,
        identifier: (export.len() < 256).then(|| export.to_owned()),
    }
}
