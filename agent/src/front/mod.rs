//! Fronts: what an application uses instead of the raw disk.
//!
//! All of them feed the [engine](crate::engine); none knows of capture. [`nbd`] is the disk as an
//! NBD export, on a Unix socket for QEMU and for machines without modules, and over socket pairs
//! for the [kernel's client](kernel_nbd). [`ublk`] hands the driver's queue to the engine.

pub mod kernel_nbd;
pub mod nbd;
pub mod ublk;

use std::{fs::File, path::PathBuf, sync::Arc};

use anyhow::{Context, ensure};
use tidemark_control::agent::FrontKind;

use crate::{
    config::{FrontChoice, GroupConfig, NodeConfig, VolumeConfig},
    engine::Engine,
    kernel::{
        self,
        blockdev::{self, Backing},
    },
};
use nbd::Unanswered;

/// A front that serves a volume.
pub enum Front {
    /// A ublk device.
    Ublk(ublk::UblkFront),
    /// A device of the kernel's NBD client.
    KernelNbd(kernel_nbd::KernelNbdFront),
    /// A Unix socket.
    Socket(nbd::SocketFront),
}

/// Nobody uses a front's device, and while this is kept nobody can mount or claim it.
#[derive(Default)]
pub struct Reserved {
    _claim: Option<File>,
}

/// Finds out whether that is so, or else who uses the device. It blocks.
pub type Reserving = Box<dyn FnOnce() -> anyhow::Result<Reserved> + Send>;

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
        let (group_name, name) = (group.name.as_str(), volume.name.as_str());
        let export = |unanswered| {
            nbd::VolumeExport::new(engine.clone(), (volume.id, name), backing, unanswered)
        };
        Ok(match choose(volume.front) {
            FrontKind::NbdSocket => {
                let path = node.socket_of(&group.name, volume);
                let front = nbd::SocketFront::start(export(Unanswered::Refused), &path).await;
                Front::Socket(front.with_context(|| format!("listen on {}", path.display()))?)
            }
            FrontKind::NbdKernel => {
                let export = export(Unanswered::Waits);
                let (group, volume) = ((group.id, group_name), (volume.id, name));
                Front::KernelNbd(kernel_nbd::KernelNbdFront::start(export, group, volume).await?)
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

    /// Why its users cannot reach it, if so.
    pub fn problem(&self) -> Option<&'static str> {
        match self {
            Front::KernelNbd(front) if front.is_lost() => Some(
                "its NBD device was disconnected by somebody, and its users get errors; restart the agent to \
                 have it again",
            ),
            _ => None,
        }
    }

    /// What has to be asked before the device is taken away.
    pub fn reserve(&self) -> Reserving {
        let device = |node: Option<PathBuf>| -> Reserving {
            Box::new(move || {
                let claim = node.map(|node| blockdev::reserve(&node)).transpose()?;
                Ok(Reserved { _claim: claim.flatten() })
            })
        };
        match self {
            Front::Ublk(front) => device(front.node()),
            Front::KernelNbd(front) => device(front.node()),
            Front::Socket(front) => {
                let (clients, path) = (front.clients(), front.path().to_owned());
                Box::new(move || {
                    let path = path.display();
                    ensure!(
                        clients == 0,
                        "{path} is in use: clients are connected; end them first"
                    );
                    Ok(Reserved::default())
                })
            }
        }
    }

    /// Takes the device away, when its requests have been answered. After an error, what is left of it
    /// is there, and can be taken away with another call.
    ///
    /// # Errors
    /// The kernel does not let go of it.
    pub async fn stop(&mut self, reserved: Reserved) -> anyhow::Result<()> {
        match self {
            Front::Ublk(front) => front.stop(reserved).await,
            Front::KernelNbd(front) => front.stop(reserved).await,
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
            Front::Socket(mut front) => front.stop().await,
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
