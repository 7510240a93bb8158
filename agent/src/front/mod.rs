//! Fronts: what an application uses instead of the raw disk.
//!
//! All of them feed the [engine](crate::engine); none knows of capture. [`nbd`] is the disk as an
//! NBD export, on a Unix socket for QEMU and for machines without modules, and over socket pairs
//! for the [kernel's client](kernel_nbd). [`ublk`] hands the driver's queue to the engine.

pub mod kernel_nbd;
pub mod nbd;
pub mod ublk;

use std::{path::PathBuf, sync::Arc};

use anyhow::Context;
use tidemark_control::agent::FrontKind;

use crate::{
    config::{FrontChoice, GroupConfig, NodeConfig, VolumeConfig},
    engine::Engine,
    kernel::{self, blockdev::Backing},
};

/// A front that serves a volume.
pub enum Front {
    /// A ublk device.
    Ublk(ublk::UblkFront),
    /// A device of the kernel's NBD client.
    KernelNbd(kernel_nbd::KernelNbdFront),
    /// A Unix socket.
    Socket(nbd::SocketFront),
}

impl Front {
    /// Presents a volume of an engine as its configuration says, or takes back the device that an earlier
    /// agent made for it.
    ///
    /// # Errors
    /// A sentence that says what is in the way.
    pub async fn start(
        engine: &Engine,
        node: &NodeConfig,
        group: &GroupConfig,
        volume: &VolumeConfig,
        backing: &Arc<Backing>,
    ) -> anyhow::Result<Front> {
        let sectors = backing.geometry().size_bytes / 512;
        let export = nbd::VolumeExport::new(
            engine.clone(),
            volume.id,
            volume.name.as_str(),
            sectors,
            backing,
        );
        let (group_name, name) = (group.name.as_str(), volume.name.as_str());
        Ok(match choose(volume.front) {
            FrontKind::NbdSocket => {
                let path = node.socket_of(&group.name, volume);
                let front = nbd::SocketFront::start(export, &path).await;
                Front::Socket(front.with_context(|| format!("listen on {}", path.display()))?)
            }
            FrontKind::NbdKernel => {
                Front::KernelNbd(kernel_nbd::KernelNbdFront::start(export, group_name, name).await?)
            }
            FrontKind::Ublk => {
                let runtime_dir = &node.runtime_dir;
                let wanted = ublk::UblkVolume {
                    id: volume.id,
                    group_id: group.id,
                    group: group_name,
                    name,
                    backing,
                    runtime_dir,
                };
                Front::Ublk(ublk::UblkFront::start(engine, &wanted).await?)
            }
        })
    }

    /// What the application opens.
    pub fn device(&self) -> PathBuf {
        match self {
            Front::Ublk(front) => front.device(),
            Front::KernelNbd(front) => front.device(),
            Front::Socket(front) => front.path().to_owned(),
        }
    }

    /// Which kind it is.
    pub fn kind(&self) -> FrontKind {
        match self {
            Front::Ublk(_) => FrontKind::Ublk,
            Front::KernelNbd(_) => FrontKind::NbdKernel,
            Front::Socket(_) => FrontKind::NbdSocket,
        }
    }

    /// Takes the device away, when its requests have been answered.
    ///
    /// # Errors
    /// The kernel does not let go of it, for example because it is still in use.
    pub async fn stop(self) -> anyhow::Result<()> {
        match self {
            Front::Ublk(front) => front.stop().await,
            Front::KernelNbd(front) => front.stop().await,
            Front::Socket(front) => {
                front.stop().await;
                Ok(())
            }
        }
    }

    /// Leaves the device to the next agent, which takes it back: what its users ask for meanwhile
    /// waits. A socket ends.
    pub async fn leave(self) {
        match self {
            // The engine takes up no more of its requests.
            Front::Ublk(_) => {}
            Front::KernelNbd(front) => front.leave().await,
            Front::Socket(front) => front.stop().await,
        }
    }
}

/// Waits for what the kernel does, on a thread that may wait.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work).await.context("a thread for the kernel's answer")?
}

/// What a choice means on this machine: ublk where the kernel has it, else its NBD client, else a
/// socket.
pub fn choose(choice: FrontChoice) -> FrontKind {
    choice.kind().unwrap_or_else(|| {
        if std::path::Path::new("/dev/ublk-control").exists() {
            FrontKind::Ublk
        } else if kernel::nbd_netlink::NbdControl::open().is_ok() {
            FrontKind::NbdKernel
        } else {
            FrontKind::NbdSocket
        }
    })
}
