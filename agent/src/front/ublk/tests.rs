//! Which device is taken over, with a driver that is played.

use std::collections::BTreeMap;

use anyhow::bail;

use super::*;
use crate::kernel::blockdev::{Abilities, Geometry};

const GROUP: GroupId = GroupId([1; 16]);
const SECTORS: u64 = 2048;
const NEW: u32 = 9;

/// The devices that there are, with the sectors that each shows, and what was done.
#[derive(Default)]
struct Played {
    devices: BTreeMap<u32, (DeviceInfo, u64)>,
    done: Vec<&'static str>,
    /// Why no recovery can be begun.
    refusal: Option<i32>,
}

impl Played {
    fn with(dev_id: u32, identity: u64, state: DeviceState, sectors: u64) -> Played {
        let mut played = Played::default();
        played.devices.insert(dev_id, (device(dev_id, identity, state), sectors));
        played
    }

    fn device(&self, dev_id: u32) -> Result<&(DeviceInfo, u64), ControlError> {
        self.devices.get(&dev_id).ok_or(ControlError::NoDevice { dev_id })
    }

    /// Prepares a device; its number, or the reason why there is none.
    fn prepare(&mut self, known: Option<u32>) -> Result<(u32, bool), String> {
        let prepared = prepare(self, known, ours(), &params(), |dev_id| Ok(link(dev_id)));
        let prepared = prepared.map_err(|error| error.to_string())?;
        assert_eq!(prepared.link, link(prepared.info.dev_id));
        Ok((prepared.info.dev_id, prepared.recovering))
    }
}

impl Driver for Played {
    fn find(&mut self, dev_id: u32) -> Result<Option<DeviceInfo>, ControlError> {
        Ok(self.device(dev_id).ok().map(|(info, _)| *info))
    }

    fn sectors(&mut self, dev_id: u32) -> Result<u64, ControlError> {
        self.device(dev_id).map(|(_, sectors)| *sectors)
    }

    fn start_recovery(&mut self, dev_id: u32) -> Result<DeviceInfo, ControlError> {
        self.done.push("recover");
        if let Some(errno) = self.refusal {
            let (command, source) = ("START_USER_RECOVERY", io::Error::from_raw_os_error(errno));
            return Err(ControlError::Refused { command, dev_id, source });
        }
        self.device(dev_id).map(|(info, _)| *info)
    }

    fn delete(&mut self, dev_id: u32) -> Result<(), ControlError> {
        self.done.push("delete");
        self.devices.remove(&dev_id).map(drop).ok_or(ControlError::NoDevice { dev_id })
    }

    fn add(&mut self, identity: u64, params: &DeviceParams) -> Result<DeviceInfo, ControlError> {
        self.done.push("add");
        let info = device(NEW, identity, DeviceState::Dead);
        self.devices.insert(NEW, (info, params.geometry.size_bytes / 512));
        Ok(info)
    }
}

fn ours() -> u64 {
    identity(GROUP, VolumeId(1))
}

fn link(dev_id: u32) -> PathBuf {
    format!("/dev/tidemark/db/data-{dev_id}").into()
}

fn device(dev_id: u32, identity: u64, state: DeviceState) -> DeviceInfo {
    DeviceInfo {
        dev_id,
        queues: 1,
        queue_depth: QUEUE_DEPTH,
        max_io_bytes: IO_BYTES_MAX,
        features: Features::required(),
        identity,
        state,
        server_pid: 0,
    }
}

fn params() -> DeviceParams {
    let geometry = Geometry {
        size_bytes: SECTORS * 512,
        logical_block_bytes: 512,
        physical_block_bytes: 4096,
        io_min_bytes: 4096,
        io_opt_bytes: 0,
    };
    let abilities = Abilities {
        read_only: false,
        rotational: false,
        volatile_cache: false,
        fua: true,
        unmap: None,
        fast_zeroes: false,
    };
    DeviceParams::new(geometry, abilities, IO_BYTES_MAX, ZERO_BYTES_MAX)
}

#[test]
fn each_volume_of_each_group_has_an_identity_of_its_own_for_ever() {
    assert_ne!(ours(), identity(GROUP, VolumeId(2)));
    assert_ne!(ours(), identity(GroupId([2; 16]), VolumeId(1)));
    assert_eq!(ours(), 0x3695_92b8_85fb_b0c1, "the next agent has to know it");
}

#[test]
fn the_volumes_own_device_is_taken_over_or_made_anew() {
    for state in [DeviceState::Quiesced, DeviceState::Live] {
        let mut driver = Played::with(3, ours(), state, SECTORS);
        assert_eq!(driver.prepare(Some(3)), Ok((3, true)));
        assert_eq!(driver.done, ["recover"]);
    }
    let mut driver = Played::with(3, ours(), DeviceState::Dead, SECTORS);
    assert_eq!(driver.prepare(Some(3)), Ok((NEW, false)));
    assert_eq!(driver.done, ["delete", "add"]);
    for known in [None, Some(3)] {
        let mut driver = Played::default();
        assert_eq!(driver.prepare(known), Ok((NEW, false)));
        assert_eq!(driver.devices[&NEW].0.identity, ours());
    }
}

/// By an agent that was killed, or an attempt that failed, before it had fetched the queue.
#[test]
fn a_recovery_that_was_begun_is_gone_on_with() {
    for (state, errno, gone_on) in [
        (DeviceState::Quiesced, libc::EINVAL, true),
        (DeviceState::Quiesced, libc::EPERM, false),
        (DeviceState::Live, libc::EINVAL, false),
    ] {
        let mut driver = Played::with(3, ours(), state, SECTORS);
        driver.refusal = Some(errno);
        let prepared = driver.prepare(Some(3));
        assert_eq!(prepared.is_ok(), gone_on, "{state:?}, {errno}");
        assert!(prepared.is_err() || prepared == Ok((3, true)));
    }
}

#[test]
fn a_device_that_is_not_the_volumes_is_left_alone() {
    for other in [0, identity(GROUP, VolumeId(2)), identity(GroupId([2; 16]), VolumeId(1))] {
        for state in [DeviceState::Quiesced, DeviceState::Live, DeviceState::Dead] {
            let mut driver = Played::with(3, other, state, SECTORS);
            assert_eq!(driver.prepare(Some(3)), Ok((NEW, false)), "{other:#x}, {state:?}");
            assert_eq!(driver.done, ["add"], "{other:#x}, {state:?}");
        }
    }
}

#[test]
fn a_device_of_another_size_is_refused_and_left_alone() {
    let mut driver = Played::with(3, ours(), DeviceState::Quiesced, SECTORS - 8);
    let refused = driver.prepare(Some(3)).unwrap_err();
    assert!(refused.contains("has 2040 sectors, and the disk below it has 2048"), "{refused}");
    assert!(driver.done.is_empty() && driver.devices.len() == 1);
}

#[test]
fn a_device_that_cannot_be_named_is_not_left_behind_and_an_earlier_agents_waits_on() {
    let refuse = |_| bail!("as asked for");
    let mut driver = Played::default();
    assert!(prepare(&mut driver, None, ours(), &params(), refuse).is_err());
    assert_eq!(driver.done, ["add", "delete"]);
    let mut driver = Played::with(3, ours(), DeviceState::Quiesced, SECTORS);
    assert!(prepare(&mut driver, Some(3), ours(), &params(), refuse).is_err());
    assert!(driver.done.is_empty(), "its recovery has not begun");
}
