//! The kernel NBD front: a device of the kernel's own client, for kernels without ublk.
//!
//! The kernel speaks over socket pairs whose other ends are served here. When the agent dies, the
//! device stays and its requests wait; the next agent gives it a new socket.

use std::{os::unix::net::UnixStream, path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context;
use tidemark_nbd::{Export, Server};
use tokio::task::JoinHandle;

use super::nbd::{VolumeExport, server};
use crate::kernel::{
    nbd_netlink::{DeviceSettings, NbdControl},
    udev::Names,
};

/// After so long without an answer a request is given to another connection.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the kernel keeps requests while no agent serves the device.
const DEAD_CONNECTION_TIMEOUT: Duration = Duration::from_secs(600);
const GRACE: Duration = Duration::from_secs(10);

/// A served device.
pub struct KernelNbdFront {
    index: u32,
    group: String,
    volume: String,
    link: PathBuf,
    server: Server,
    serving: JoinHandle<()>,
}

impl KernelNbdFront {
    /// Makes a device for a volume, or takes back the one that an earlier agent made for it.
    ///
    /// # Errors
    /// No NBD client in the kernel, no free device, or the name cannot be published.
    pub async fn start(
        export: Arc<VolumeExport>,
        group: &str,
        volume: &str,
    ) -> anyhow::Result<KernelNbdFront> {
        let info = export.info();
        let identifier = format!("tidemark:{group}/{volume}");
        let settings = DeviceSettings {
            size_bytes: info.size,
            block_bytes: info.block_sizes.minimum.clamp(512, 4096),
            transmission_flags: info.features.to_wire(false),
            request_timeout: REQUEST_TIMEOUT,
            dead_connection_timeout: DEAD_CONNECTION_TIMEOUT,
            identifier: Some(identifier.clone()),
        };
        let (index, stream) = tokio::task::spawn_blocking(move || connect(&identifier, &settings))
            .await
            .context("the thread that configures the device")??;
        stream.set_nonblocking(true).context("the device's socket")?;
        let stream = tokio::net::UnixStream::from_std(stream).context("the device's socket")?;
        let server = server(export.clone());
        let serving = tokio::spawn({
            let (server, name) = (server.clone(), format!("{group}/{volume}"));
            async move {
                if let Err(reason) = server.serve_entered(stream, &name, export).await {
                    tracing::error!(reason, volume = name, "the kernel's NBD connection was cut");
                }
            }
        });
        let kernel_name = format!("nbd{index}");
        let names = Names::default();
        let link = names.publish(&kernel_name, group, volume).context("the device's name")?;
        // Without udev there is nobody to be told, and the name has been made already.
        let _ = names.trigger(&kernel_name);
        let (group, volume) = (group.to_owned(), volume.to_owned());
        Ok(KernelNbdFront { index, group, volume, link, server, serving })
    }

    /// Its stable name.
    pub fn device(&self) -> PathBuf {
        self.link.clone()
    }

    /// Lets the connection go when its requests are answered; the device stays.
    pub async fn leave(self) {
        self.server.shutdown(GRACE).await;
        // It ends with the server; its reason has been told.
        let _ = self.serving.await;
    }

    /// Takes the device away.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn stop(self) -> anyhow::Result<()> {
        let index = self.index;
        let gone = tokio::task::spawn_blocking(move || NbdControl::open()?.disconnect(index));
        gone.await.context("the thread that disconnects the device")??;
        Names::default().withdraw(&format!("nbd{index}"), &self.group, &self.volume)?;
        self.server.shutdown(GRACE).await;
        self.serving.await.context("the device's connection")
    }
}

fn connect(identifier: &str, settings: &DeviceSettings) -> anyhow::Result<(u32, UnixStream)> {
    let mut control = NbdControl::open()?;
    let (index, streams) = match control.find(identifier)? {
        Some(index) => (index, control.reconnect(index, settings, 1, GRACE)?),
        None => control.connect(None, settings, 1)?,
    };
    let stream = streams.into_iter().next().context("the kernel gave no connection")?;
    Ok((index, stream))
}
