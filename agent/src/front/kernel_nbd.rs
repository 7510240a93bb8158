//! The kernel NBD front: a device of the kernel's own client, for kernels without ublk.
//!
//! The kernel speaks over socket pairs whose other ends are served here. When the agent dies, the
//! device stays and its requests wait; the next agent gives it a new socket. So does this one when
//! the kernel gives a connection up, as it does when a request takes longer than it waits.

use std::{
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, ensure};
use tidemark_journal::{GroupId, VolumeId};
use tidemark_nbd::{Export, Server};
use tokio::{sync::watch, task::JoinHandle, time::Instant};

use super::{Reserved, blocking, nbd::server};
use crate::kernel::{
    nbd_netlink::{DeviceSettings, NbdControl, NbdError},
    udev::Names,
};

/// After so long without an answer the kernel gives the connection up.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the kernel keeps requests while no agent serves the device.
const DEAD_CONNECTION_TIMEOUT: Duration = Duration::from_secs(600);
const GRACE: Duration = Duration::from_secs(10);
/// Connections of a device begin at least so long after one another, and so do attempts.
const PAUSE: Duration = Duration::from_secs(1);
/// How long one attempt waits for the kernel to let go of the connection before.
const ATTEMPT: Duration = Duration::from_secs(1);

/// What a front asks of the kernel for its device. Each call may block.
trait Kernel: Send + Sync + 'static {
    /// Takes the device back that an earlier agent made, or makes one: its index, and the end to serve.
    fn connect(&self) -> anyhow::Result<(u32, UnixStream)>;

    /// Gives the device a connection in place of its dead one: the end to serve. None if there is no
    /// such device any more.
    fn reconnect(&self) -> anyhow::Result<Option<UnixStream>>;

    /// Takes the device away, unless the one of this index is another's.
    fn disconnect(&self, index: u32) -> anyhow::Result<()>;
}

/// A served device.
pub struct KernelNbdFront {
    index: u32,
    group: String,
    volume: String,
    link: PathBuf,
    kernel: Arc<dyn Kernel>,
    server: Server,
    /// True once lost connections are not to be replaced any more.
    over: watch::Sender<bool>,
    /// None when it has ended.
    serving: Option<JoinHandle<()>>,
    /// Somebody has disconnected the device.
    lost: Arc<AtomicBool>,
    /// The kernel has let go of the device: its number may be another's by now.
    gone: bool,
}

impl KernelNbdFront {
    /// Makes a device for a volume, or takes back the one that an earlier agent made for it.
    ///
    /// # Errors
    /// No NBD client in the kernel, no free device, an earlier agent's device has another size, or the
    /// name cannot be published.
    pub async fn start(
        export: Arc<dyn Export>,
        (group_id, group): (GroupId, &str),
        (volume_id, volume): (VolumeId, &str),
    ) -> anyhow::Result<KernelNbdFront> {
        let info = export.info();
        // Names are used again; what bears one may be another's.
        let identifier = format!("tidemark:{group_id}/{volume_id}");
        let settings = DeviceSettings {
            size_bytes: info.size,
            block_bytes: info.block_sizes.minimum.clamp(512, 4096),
            transmission_flags: info.features.to_wire(false),
            request_timeout: REQUEST_TIMEOUT,
            dead_connection_timeout: DEAD_CONNECTION_TIMEOUT,
            identifier: Some(identifier.clone()),
        };
        let kernel = Arc::new(Client { identifier, settings });
        KernelNbdFront::start_with(kernel, export, group, volume).await
    }

    async fn start_with(
        kernel: Arc<dyn Kernel>,
        export: Arc<dyn Export>,
        group: &str,
        volume: &str,
    ) -> anyhow::Result<KernelNbdFront> {
        let asked = kernel.clone();
        let (index, stream) = blocking(move || asked.connect()).await?;
        let kernel_name = format!("nbd{index}");
        let names = Names::default();
        // Before anything is served: on an error the connection closes, and whoever tries next gets the device.
        let link = names.publish(&kernel_name, group, volume).context("the device's name")?;
        let front = KernelNbdFront::serve((kernel, index, stream), export, (group, volume), link)?;
        // Without udev there is nobody to be told, and the name has been made already.
        let _ = names.trigger(&kernel_name);
        Ok(front)
    }

    fn serve(
        (kernel, index, stream): (Arc<dyn Kernel>, u32, UnixStream),
        export: Arc<dyn Export>,
        (group, volume): (&str, &str),
        link: PathBuf,
    ) -> anyhow::Result<KernelNbdFront> {
        let stream = asynchronous(stream)?;
        let server = server(volume, export.clone());
        let (over, is_over) = watch::channel(false);
        let lost = Arc::<AtomicBool>::default();
        let connections = Connections {
            kernel: kernel.clone(),
            server: server.clone(),
            export,
            volume: format!("{group}/{volume}"),
            over: is_over,
            lost: lost.clone(),
        };
        let serving = tokio::spawn(connections.serve(stream));
        let (group, volume) = (group.to_owned(), volume.to_owned());
        let (serving, gone) = (Some(serving), false);
        Ok(KernelNbdFront { index, group, volume, link, kernel, server, over, serving, lost, gone })
    }

    /// Its stable name.
    pub fn device(&self) -> PathBuf {
        self.link.clone()
    }

    /// The device itself, while there is one.
    pub fn node(&self) -> Option<PathBuf> {
        let there = !self.gone && !self.is_lost();
        there.then(|| format!("/dev/nbd{}", self.index).into())
    }

    /// Whether somebody has disconnected the device.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// Lets the connection go when its requests are answered; the device stays.
    pub async fn leave(mut self) {
        self.end_connection().await;
    }

    /// Takes the device away.
    ///
    /// # Errors
    /// The kernel refuses, and the device is served on; or the name cannot be withdrawn, which can be tried again.
    pub async fn stop(&mut self, reserved: Reserved) -> anyhow::Result<()> {
        let index = self.index;
        if !self.gone {
            // The connection's end is meant.
            self.over.send_replace(true);
            let kernel = self.kernel.clone();
            if !self.is_lost()
                && let Err(error) = blocking(move || kernel.disconnect(index)).await
            {
                self.over.send_replace(false);
                return Err(error);
            }
            self.gone = true;
        }
        // The kernel keeps the index, and shows the device to udev, until nobody has it open.
        let withdrawn =
            Names::default().withdraw(&format!("nbd{index}"), &self.group, &self.volume);
        drop(reserved);
        self.end_connection().await;
        withdrawn.context("the device's name")
    }

    async fn end_connection(&mut self) {
        self.over.send_replace(true);
        self.server.shutdown(GRACE).await;
        if let Some(serving) = self.serving.take() {
            // It ends with the server; its reason has been told.
            let _ = serving.await;
        }
    }
}

/// The connections of a device, one after the other.
struct Connections {
    kernel: Arc<dyn Kernel>,
    server: Server,
    export: Arc<dyn Export>,
    /// Its group and name, for people.
    volume: String,
    over: watch::Receiver<bool>,
    lost: Arc<AtomicBool>,
}

impl Connections {
    /// Serves a connection, and another whenever one ends, until the front is over.
    ///
    /// A connection has ended only when all its requests have: the kernel sends them again over the
    /// next one, and the disk must not see the first attempt of a write after the second.
    async fn serve(mut self, mut stream: tokio::net::UnixStream) {
        loop {
            let next = Instant::now() + PAUSE;
            let served = self.server.serve_entered(stream, &self.volume, self.export.clone()).await;
            if self.is_over_by(next).await {
                if let Err(reason) = served {
                    let volume = self.volume;
                    tracing::error!(reason, volume, "the kernel's NBD connection was cut");
                }
                return;
            }
            let reason = served.err().unwrap_or_else(|| "the kernel has closed it".to_owned());
            tracing::warn!(
                reason,
                volume = self.volume,
                "the kernel's NBD connection is lost, as after a request that took longer than {} s: the device \
                 gets another",
                REQUEST_TIMEOUT.as_secs()
            );
            let Some(fresh) = self.replace().await else { return };
            stream = fresh;
        }
    }

    /// A fresh connection, however many attempts it takes; none if the front is over or the device gone.
    async fn replace(&mut self) -> Option<tokio::net::UnixStream> {
        let mut told = false;
        loop {
            let (next, kernel) = (Instant::now() + PAUSE, self.kernel.clone());
            let attempt = blocking(move || kernel.reconnect()).await;
            match attempt.and_then(|fresh| fresh.map(asynchronous).transpose()) {
                Ok(Some(fresh)) => return Some(fresh),
                Ok(None) => {
                    self.lost.store(true, Ordering::Relaxed);
                    let volume = &self.volume;
                    tracing::error!(
                        volume,
                        "somebody has disconnected the volume's NBD device: restart the agent to have it again"
                    );
                    return None;
                }
                Err(error) if !told => {
                    told = true;
                    let (error, volume) = (format!("{error:#}"), &self.volume);
                    tracing::warn!(
                        error,
                        volume,
                        "the NBD device does not get another connection yet: it is tried again"
                    );
                }
                Err(_) => {}
            }
            if self.is_over_by(next).await {
                return None;
            }
        }
    }

    /// Waits until a time, or until the front is over; whether it is.
    async fn is_over_by(&mut self, time: Instant) -> bool {
        tokio::select! {
            biased;
            // Also when nobody has the front any more.
            _ = self.over.wait_for(|over| *over) => true,
            () = tokio::time::sleep_until(time) => false,
        }
    }
}

fn asynchronous(stream: UnixStream) -> anyhow::Result<tokio::net::UnixStream> {
    let set = stream.set_nonblocking(true);
    set.and_then(|()| tokio::net::UnixStream::from_std(stream)).context("the device's socket")
}

/// The kernel's NBD client, with a device of this identifier.
struct Client {
    identifier: String,
    settings: DeviceSettings,
}

impl Client {
    /// Gives the device a connection in place of a dead one, if there is such a device.
    fn take_back(
        &self,
        control: &mut NbdControl,
        patience: Duration,
    ) -> anyhow::Result<Option<(u32, UnixStream)>> {
        let Some(index) = control.find(&self.identifier)? else { return Ok(None) };
        has_size(index, control.sectors(index)?, self.settings.size_bytes / 512)?;
        let taken = control.reconnect(index, &self.settings, 1, patience)?;
        Ok(Some((index, one(taken)?)))
    }
}

impl Kernel for Client {
    fn connect(&self) -> anyhow::Result<(u32, UnixStream)> {
        let mut control = NbdControl::open()?;
        if let Some(taken) = self.take_back(&mut control, GRACE)? {
            return Ok(taken);
        }
        let (index, made) = control.connect(None, &self.settings, 1)?;
        Ok((index, one(made)?))
    }

    fn reconnect(&self) -> anyhow::Result<Option<UnixStream>> {
        let taken = self.take_back(&mut NbdControl::open()?, ATTEMPT)?;
        Ok(taken.map(|(_, stream)| stream))
    }

    fn disconnect(&self, index: u32) -> anyhow::Result<()> {
        let mut control = match NbdControl::open() {
            Err(NbdError::NoDriver) => return Ok(()),
            control => control?,
        };
        // A kernel that keeps no identifiers cannot be asked.
        if control.identifier(index).is_none_or(|found| found == self.identifier) {
            control.disconnect(index)?;
        }
        Ok(())
    }
}

/// A mounted file system would not survive another size.
fn has_size(index: u32, shown: u64, wanted: u64) -> anyhow::Result<()> {
    ensure!(
        shown == wanted,
        "/dev/nbd{index}, which an earlier agent made for this volume, has {shown} sectors, and the disk below it \
         has {wanted}: give the disk its former size again, or stop what uses the device and disconnect it \
         (nbd-client -d)"
    );
    Ok(())
}

fn one(streams: Vec<UnixStream>) -> anyhow::Result<UnixStream> {
    streams.into_iter().next().context("the kernel gave no connection")
}

#[cfg(test)]
mod tests;
