//! The ublk queues of a group's devices, on the engine's ring.

use std::time::Duration;

use tidemark_journal::{Sector, VolumeId};
use tokio::sync::oneshot;

use super::{effects::kind, run::Loop};
use crate::{
    capture::{Ask, Request},
    kernel::{
        memfd::Region,
        ublk::{DeviceInfo, IoOp, Queue},
        uring::{Buf, RegionId, Ring, Token},
    },
};

/// How long a device's node may take to appear.
const NODE_PATIENCE: Duration = Duration::from_secs(5);

/// A ublk device whose queue the engine is to serve.
pub struct UblkQueue {
    /// The device, added or being recovered.
    pub info: DeviceInfo,
    /// The volume behind it.
    pub volume: VolumeId,
    /// Told when every tag has been offered to the driver, so that the device may be started.
    pub ready: oneshot::Sender<Result<(), String>>,
    /// Told when the driver has taken every tag back, after the device was stopped.
    pub ended: oneshot::Sender<()>,
}

struct Device {
    queue: Queue,
    volume: VolumeId,
    buffers: RegionId,
    /// Tags that the driver or the engine has; none left: the queue has ended.
    tags_left: u16,
    ended: Option<oneshot::Sender<()>>,
}

/// The devices that an engine serves; a queue's number is its place here.
#[derive(Default)]
pub(super) struct Devices {
    devices: Vec<Option<Device>>,
    paused: bool,
}

impl Devices {
    /// Opens a device's queue and offers all tags to the driver.
    pub fn serve(&mut self, wanted: UblkQueue, ring: &mut Ring) {
        let UblkQueue { info, volume, ready, ended } = wanted;
        let unit = self.devices.len() as u16;
        let opened = Queue::open(&info, 0, NODE_PATIENCE, ring)
            .map_err(|error| error.to_string())
            .and_then(|queue| {
                queue
                    .fetch_all(ring, |tag| token(unit, tag))
                    .and_then(|()| Ok(ring.submit()?))
                    .map_err(|error| error.to_string())?;
                let buffers = queue.buffers_id();
                let tags_left = info.queue_depth;
                Ok(Device { queue, volume, buffers, tags_left, ended: Some(ended) })
            });
        let result = opened.map(|device| self.devices.push(Some(device)));
        // Whoever asked may have given up; the device is then never started.
        let _ = ready.send(result);
    }

    /// Takes up no further request: the driver hands them to the next agent.
    pub fn pause(&mut self) {
        self.paused = true;
    }

    fn device(&self, unit: u16) -> Option<&Device> {
        self.devices.get(usize::from(unit))?.as_ref()
    }

    /// Copies part of a write's payload to a place in the engine's ring memory.
    pub fn fetch(
        &self,
        unit: u16,
        tag: u16,
        from: u64,
        to: &Region,
        at: u64,
        bytes: u64,
    ) -> Result<(), i32> {
        let device = self.device(unit).ok_or(libc::ENODEV)?;
        let (buffers, offset) = (device.queue.buffers(), device.queue.buffer_offset(tag) + from);
        to.copy_from(at, buffers, offset, bytes).map_err(|_| libc::EIO)
    }

    /// The tag's own buffer, holding part of a write's payload.
    pub fn own_buffer(&self, unit: u16, tag: u16, from: u64, bytes: u64) -> Result<Buf, i32> {
        let device = self.device(unit).ok_or(libc::ENODEV)?;
        let offset = device.queue.buffer_offset(tag) + from;
        Ok(Buf { region: device.buffers, offset, len: bytes as u32 })
    }

    /// Answers a request without content.
    pub fn answer(&mut self, unit: u16, tag: u16, result: Result<(), i32>, ring: &mut Ring) {
        let Some(device) = self.device(unit) else { return };
        let result = match result {
            Err(errno) => -errno,
            Ok(()) => device.queue.desc(tag).map_or(-libc::EIO, |desc| match desc.op {
                IoOp::Write => desc.len_bytes() as i32,
                _ => 0,
            }),
        };
        commit(device, unit, tag, result, ring);
    }

    /// Answers a read, whose content lies in the tag's buffer.
    pub fn answer_read(&mut self, unit: u16, tag: u16, result: i32, ring: &mut Ring) {
        if let Some(device) = self.device(unit) {
            commit(device, unit, tag, result, ring);
        }
    }
}

fn token(unit: u16, tag: u16) -> Token {
    Token::new(kind::UBLK, unit, u32::from(tag))
}

fn commit(device: &Device, unit: u16, tag: u16, result: i32, ring: &mut Ring) {
    if let Err(error) = device.queue.commit(ring, tag, result, token(unit, tag)) {
        tracing::error!(%error, tag, "cannot answer a request of the device");
    }
}

impl Loop {
    /// The driver hands out a request, or takes the tag back.
    pub(super) fn ublk_completed(&mut self, unit: u16, tag: u16, result: i32) {
        let Some(Some(device)) = self.devices.devices.get_mut(usize::from(unit)) else { return };
        if result < 0 {
            device.tags_left -= 1;
            if device.tags_left == 0 {
                let ended = self.devices.devices[usize::from(unit)].take();
                if let Some(device) = ended {
                    if let Err(error) = device.queue.close(&mut self.disk.ring) {
                        tracing::warn!(%error, "cannot let go of a device");
                    }
                    let _ = device.ended.map(|ended| ended.send(()));
                }
            }
            return;
        }
        if self.devices.paused {
            return;
        }
        let (volume, buffers) = (device.volume, device.buffers);
        let Ok(desc) = device.queue.desc(tag) else { return };
        let offset = device.queue.buffer_offset(tag);
        let ask = match desc.op {
            IoOp::Read => {
                let id = self.disk.ublk_request(unit, tag);
                let buf = Buf { region: buffers, offset, len: desc.len_bytes() as u32 };
                let queued = self.disk.ublk_read(id, volume, desc.position(), buf);
                debug_assert!(queued.is_ok(), "files and buffers of this ring: {queued:?}");
                return;
            }
            IoOp::Write => Ask::Write { fua: desc.fua },
            IoOp::Flush => Ask::Flush,
            IoOp::Discard => Ask::Discard,
            IoOp::WriteZeroes => Ask::Zero { unmap: !desc.no_unmap, fua: desc.fua },
            IoOp::Unknown(_) => {
                return commit(device, unit, tag, -libc::EOPNOTSUPP, &mut self.disk.ring);
            }
        };
        let (start, sectors) = (Sector(desc.start_sector), u64::from(desc.sectors));
        let limit = self.disk.volume_sectors(volume).unwrap_or(0);
        let fits = start.0.checked_add(sectors).is_some_and(|end| end <= limit);
        if ask != Ask::Flush && (sectors == 0 || !fits) {
            return self.devices.answer(unit, tag, Err(libc::EINVAL), &mut self.disk.ring);
        }
        let id = self.disk.ublk_request(unit, tag);
        self.core.submit(Request { id, volume, ask, start, sectors });
    }
}
