//! The ublk front: a block device whose queue the engine serves itself.
//!
//! The device outlives its agent: requests wait in the kernel, and the next agent takes it back.
//! Its number is remembered in the runtime directory, which a reboot empties as it does the device.
//! That file may be of another time; so the device itself says which volume it is for (`identity`),
//! and none that does not is touched.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, anyhow, ensure};
use tidemark_journal::{GroupId, VolumeId};
use tokio::sync::oneshot;

use super::{Reserved, blocking};
use crate::{
    engine::{Command, Engine, UblkQueue},
    kernel::{
        blockdev::Backing,
        ublk::{Control, ControlError, DeviceInfo, DeviceParams, DeviceState, Features, NewDevice},
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
    /// None when the engine has let go of it.
    ended: Option<oneshot::Receiver<()>>,
    /// The driver has forgotten the device: its number may be another's by now.
    gone: bool,
}

/// Which volume a device is for.
pub struct UblkVolume<'a> {
    /// The volume's number.
    pub id: VolumeId,
    /// Its group.
    pub group_id: GroupId,
    /// The group's name.
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
    /// No ublk in the kernel, not allowed, the backing cannot be shown through it, or an earlier agent's
    /// device has another size.
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
        let identity = identity(volume.group_id, volume.id);
        let names = Names::default();
        let publish = {
            let (names, remembered) = (names.clone(), remembered.clone());
            let (group, name) = (volume.group.to_owned(), volume.name.to_owned());
            move |dev_id: u32| {
                fs::write(&remembered, dev_id.to_string())
                    .with_context(|| format!("write {}", remembered.display()))?;
                names
                    .publish(&format!("ublkb{dev_id}"), &group, &name)
                    .context("publish the device's name")
            }
        };
        let Prepared { info, recovering, link } = blocking(move || {
            prepare(&mut Control::open(CONTROL_TIMEOUT)?, known, identity, &params, publish)
        })
        .await
        .context("the ublk device")?;
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
        let _ = names.trigger(&format!("ublkb{dev_id}"));
        let (group, volume) = (volume.group.to_owned(), volume.name.to_owned());
        let ended = Some(has_ended);
        Ok(UblkFront { dev_id, group, volume, link, remembered, ended, gone: false })
    }

    /// Its stable name.
    pub fn device(&self) -> PathBuf {
        self.link.clone()
    }

    /// The device itself, while there is one.
    pub fn node(&self) -> Option<PathBuf> {
        (!self.gone).then(|| format!("/dev/ublkb{}", self.dev_id).into())
    }

    /// Takes the device away.
    ///
    /// # Errors
    /// The kernel refuses. What is left can be taken away later.
    pub async fn stop(&mut self, reserved: Reserved) -> anyhow::Result<()> {
        let dev_id = self.dev_id;
        if !self.gone {
            blocking(move || absent_is_fine(Control::open(CONTROL_TIMEOUT)?.stop(dev_id))).await?;
            // The driver waits for those who have the device open before it forgets it.
            drop(reserved);
            self.wait_for_the_engine().await;
            let delete = move || absent_is_fine(Control::open(CONTROL_TIMEOUT)?.delete(dev_id));
            blocking(delete).await?;
            self.gone = true;
        }
        Names::default().withdraw(&format!("ublkb{dev_id}"), &self.group, &self.volume)?;
        match fs::remove_file(&self.remembered) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("remove {}", self.remembered.display()))
            }
            _ => Ok(()),
        }
    }

    /// The driver takes every tag back; only then has the engine let go of the device.
    async fn wait_for_the_engine(&mut self) {
        let Some(ended) = &mut self.ended else { return };
        if tokio::time::timeout(PATIENCE, ended).await.is_ok() {
            self.ended = None;
        } else {
            let dev_id = self.dev_id;
            tracing::warn!(dev_id, "the ublk driver does not give the device's requests back");
        }
    }
}

/// An earlier attempt may have come further than it could tell.
fn absent_is_fine(outcome: Result<(), ControlError>) -> anyhow::Result<()> {
    match outcome {
        Err(ControlError::NoDevice { .. }) => Ok(()),
        outcome => Ok(outcome?),
    }
}

/// What a device carries that is for this volume.
fn identity(group: GroupId, volume: VolumeId) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"tidemark ublk device");
    hasher.update(&group.0);
    hasher.update(&volume.0.to_le_bytes());
    let mut identity = [0; 8];
    hasher.finalize_xof().fill(&mut identity);
    u64::from_le_bytes(identity)
}

/// What is asked of the driver to have a device.
trait Driver {
    fn find(&mut self, dev_id: u32) -> Result<Option<DeviceInfo>, ControlError>;

    /// How large the device is that it shows.
    fn sectors(&mut self, dev_id: u32) -> Result<u64, ControlError>;

    fn start_recovery(&mut self, dev_id: u32) -> Result<DeviceInfo, ControlError>;

    fn delete(&mut self, dev_id: u32) -> Result<(), ControlError>;

    /// Makes a device that looks like this and carries an identity.
    fn add(&mut self, identity: u64, params: &DeviceParams) -> Result<DeviceInfo, ControlError>;
}

impl Driver for Control {
    fn find(&mut self, dev_id: u32) -> Result<Option<DeviceInfo>, ControlError> {
        Control::find(self, dev_id)
    }

    fn sectors(&mut self, dev_id: u32) -> Result<u64, ControlError> {
        Ok(self.params(dev_id)?.basic.dev_sectors)
    }

    fn start_recovery(&mut self, dev_id: u32) -> Result<DeviceInfo, ControlError> {
        Control::start_recovery(self, dev_id, PATIENCE)
    }

    fn delete(&mut self, dev_id: u32) -> Result<(), ControlError> {
        Control::delete(self, dev_id)
    }

    fn add(&mut self, identity: u64, params: &DeviceParams) -> Result<DeviceInfo, ControlError> {
        let wanted = Features::USER_RECOVERY | Features::USER_RECOVERY_REISSUE;
        let features = wanted.common(self.features()?);
        let info = Control::add(
            self,
            &NewDevice {
                dev_id: None,
                queues: 1,
                queue_depth: QUEUE_DEPTH,
                max_io_bytes: IO_BYTES_MAX,
                features,
                identity,
            },
        )?;
        if let Err(error) = self.set_params(info.dev_id, params) {
            Control::delete(self, info.dev_id)?;
            return Err(error);
        }
        Ok(info)
    }
}

/// Whether a recovery is refused because it has been begun: the driver (6.12) does not begin one again of which no
/// queue was fetched, and the queues can be fetched all the same.
fn is_begun(device: &DeviceInfo, error: &ControlError) -> bool {
    let refused = match error {
        ControlError::Refused { source, .. } => source.raw_os_error() == Some(libc::EINVAL),
        _ => false,
    };
    refused && device.state == DeviceState::Quiesced
}

/// A device whose queue may be fetched.
struct Prepared {
    info: DeviceInfo,
    /// It is an earlier agent's.
    recovering: bool,
    /// Its stable name.
    link: PathBuf,
}

/// Begins the recovery of the volume's device if the `known` one is it, or adds one. `publish` makes its number
/// and name known. Where it fails, the device of an earlier agent still waits for the next attempt.
fn prepare(
    driver: &mut impl Driver,
    known: Option<u32>,
    identity: u64,
    params: &DeviceParams,
    publish: impl FnOnce(u32) -> anyhow::Result<PathBuf>,
) -> anyhow::Result<Prepared> {
    let found = match known {
        Some(dev_id) => driver.find(dev_id)?,
        None => None,
    };
    match found {
        Some(DeviceInfo { dev_id, identity: other, .. }) if other != identity => {
            tracing::warn!(
                dev_id,
                "the ublk device whose number was remembered is not this volume's: it is left alone"
            );
        }
        Some(found @ DeviceInfo { state: DeviceState::Quiesced | DeviceState::Live, .. }) => {
            let dev_id = found.dev_id;
            let (shown, wanted) = (driver.sectors(dev_id)?, params.geometry.size_bytes / 512);
            ensure!(
                shown == wanted,
                "/dev/ublkb{dev_id}, which an earlier agent made for this volume, has {shown} sectors, and the \
                 disk below it has {wanted}: give the disk its former size again, or restart the machine, with \
                 which the device goes"
            );
            let link = publish(dev_id)?;
            let info = match driver.start_recovery(dev_id) {
                Err(error) if is_begun(&found, &error) => found,
                begun => begun?,
            };
            return Ok(Prepared { info, recovering: true, link });
        }
        Some(DeviceInfo { dev_id, .. }) => driver.delete(dev_id)?,
        None => {}
    }
    let info = driver.add(identity, params)?;
    match publish(info.dev_id) {
        Ok(link) => Ok(Prepared { info, recovering: false, link }),
        Err(error) => {
            driver.delete(info.dev_id)?;
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests;
