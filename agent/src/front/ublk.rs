//! The ublk front: a block device whose queue the engine serves itself.
//!
//! The device outlives its agent: requests wait in the kernel, and the next agent takes it back.
//! Its number is remembered in the runtime directory, which a reboot empties as it does the device.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, anyhow};
use tidemark_journal::VolumeId;
use tokio::sync::oneshot;

use crate::{
    engine::{Command, Engine, UblkQueue},
    kernel::{
        blockdev::Backing,
        ublk::{Control, DeviceInfo, DeviceParams, DeviceState, Features, NewDevice},
        udev::Names,
    },
};

/// Requests that the device has under way at once.
const QUEUE_DEPTH: u16 = 64;
/// The longest read or write.
const IO_BYTES_MAX: u32 = 512 << 10;
/// The longest zeroing or discard.
const ZERO_BYTES_MAX: u32 = 1 << 30;
/// Some kernels never answer some commands.
const CONTROL_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a device may take to be given back by a dead agent, or to end.
const PATIENCE: Duration = Duration::from_secs(20);

/// A served device.
pub struct UblkFront {
    dev_id: u32,
    group: String,
    volume: String,
    link: PathBuf,
    remembered: PathBuf,
    ended: oneshot::Receiver<()>,
}

/// Which volume a device is for.
pub struct UblkVolume<'a> {
    /// The volume's number.
    pub id: VolumeId,
    /// Its group.
    pub group: &'a str,
    /// Its name.
    pub name: &'a str,
    /// The disk below.
    pub backing: &'a Backing,
    /// Where the device's number is remembered.
    pub runtime_dir: &'a Path,
}

impl UblkFront {
    /// Makes a device for a volume, or takes back the one that an earlier agent made for it.
    ///
    /// # Errors
    /// No ublk in the kernel, not allowed, or the backing cannot be shown through it.
    pub async fn start(engine: &Engine, volume: &UblkVolume<'_>) -> anyhow::Result<UblkFront> {
        let dir = volume.runtime_dir.join("ublk").join(volume.group);
        fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        let remembered = dir.join(volume.name);
        let known = fs::read_to_string(&remembered).ok().and_then(|text| text.trim().parse().ok());
        let params = DeviceParams::new(
            *volume.backing.geometry(),
            *volume.backing.abilities(),
            IO_BYTES_MAX,
            ZERO_BYTES_MAX,
        );
        let (info, recovering) =
            blocking(move || prepare(known, &params)).await.context("the ublk device")?;
        let number = info.dev_id.to_string();
        fs::write(&remembered, number)
            .with_context(|| format!("write {}", remembered.display()))?;
        let names = Names::default();
        let kernel_name = format!("ublkb{}", info.dev_id);
        let link = names
            .publish(&kernel_name, volume.group, volume.name)
            .context("publish the device's name")?;
        let (ready, is_ready) = oneshot::channel();
        let (ended, has_ended) = oneshot::channel();
        engine.tell(Command::Serve(UblkQueue { info, volume: volume.id, ready, ended }));
        is_ready.await.context("the engine has ended")?.map_err(|error| anyhow!(error))?;
        let dev_id = info.dev_id;
        blocking(move || {
            let mut control = Control::open(CONTROL_TIMEOUT)?;
            if recovering { control.end_recovery(dev_id) } else { control.start(dev_id) }?;
            Ok(())
        })
        .await
        .context("start the ublk device")?;
        // Without udev there is nobody to be told, and the name has been made already.
        let _ = names.trigger(&kernel_name);
        let (group, volume) = (volume.group.to_owned(), volume.name.to_owned());
        Ok(UblkFront { dev_id, group, volume, link, remembered, ended: has_ended })
    }

    /// Its stable name.
    pub fn device(&self) -> PathBuf {
        self.link.clone()
    }

    /// Takes the device away.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn stop(self) -> anyhow::Result<()> {
        let dev_id = self.dev_id;
        blocking(move || Ok(Control::open(CONTROL_TIMEOUT)?.stop(dev_id)?)).await?;
        // The driver takes every tag back; only then has the engine let go of the device.
        if tokio::time::timeout(PATIENCE, self.ended).await.is_err() {
            tracing::warn!(dev_id, "the ublk driver does not give the device's requests back");
        }
        blocking(move || Ok(Control::open(CONTROL_TIMEOUT)?.delete(dev_id)?)).await?;
        Names::default().withdraw(&format!("ublkb{dev_id}"), &self.group, &self.volume)?;
        fs::remove_file(&self.remembered)
            .with_context(|| format!("remove {}", self.remembered.display()))
    }
}

/// Adds a device, or begins the recovery of a known one.
fn prepare(known: Option<u32>, params: &DeviceParams) -> anyhow::Result<(DeviceInfo, bool)> {
    let mut control = Control::open(CONTROL_TIMEOUT)?;
    if let Some(dev_id) = known
        && let Some(info) = control.find(dev_id)?
    {
        if info.state == DeviceState::Quiesced || info.state == DeviceState::Live {
            return Ok((control.start_recovery(dev_id, PATIENCE)?, true));
        }
        control.delete(dev_id)?;
    }
    let wanted = Features::USER_RECOVERY | Features::USER_RECOVERY_REISSUE | Features::USER_COPY;
    let features = control.features()?;
    let info = control.add(&NewDevice {
        dev_id: None,
        queues: 1,
        queue_depth: QUEUE_DEPTH,
        max_io_bytes: IO_BYTES_MAX,
        features: wanted.common(features),
    })?;
    if let Err(error) = control.set_params(info.dev_id, params) {
        control.delete(info.dev_id)?;
        return Err(error.into());
    }
    Ok((info, false))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work).await.context("a thread for the kernel's answer")?
}
