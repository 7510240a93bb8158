//! A cable between two guests: two tap devices on a bridge, in a network namespace of their own.
//!
//! The guests' cards leave checksums and the cutting into packets to this side, as real cards do;
//! an emulated processor would spend most of its time on them.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::Arc;
use std::{io, thread};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, unshare};

/// A network of two ends, which exists as long as one of them does. Each end's address is fixed;
/// nothing else is reachable.
#[derive(Clone, Debug)]
pub struct Network {
    number: u8,
    taps: [Arc<OwnedFd>; 2],
}

/// One end of a [`Network`], to be given to one guest, which may come and go.
#[derive(Clone, Debug)]
pub struct NetworkEnd {
    number: u8,
    end: u8,
    tap: Arc<OwnedFd>,
}

impl Network {
    pub(super) fn new(number: u8) -> Result<Network> {
        // A thread of its own, since the namespace is a thread's. The devices' descriptors keep it
        // when the thread has ended.
        let devices = thread::spawn(devices).join();
        let Ok(taps) = devices else { bail!("the thread that makes a network panicked") };
        let taps = taps.context("cannot make a network for guests: this needs root")?;
        Ok(Network { number, taps: taps.map(Arc::new) })
    }

    /// The two ends.
    pub fn ends(&self) -> [NetworkEnd; 2] {
        [1, 2].map(|end| NetworkEnd {
            number: self.number,
            end,
            tap: Arc::clone(&self.taps[usize::from(end) - 1]),
        })
    }
}

impl NetworkEnd {
    /// The IPv4 address of the guest at this end.
    pub fn address(&self) -> String {
        format!("10.88.{}.{}", self.number, self.end)
    }

    pub(super) fn mac(&self) -> String {
        format!("52:54:00:88:{:02x}:{:02x}", self.number, self.end)
    }

    /// The kernel argument by which the guest's first program sets the address.
    pub(super) fn kernel_argument(&self) -> String {
        format!("tidemark.net={},{}/24", self.mac(), self.address())
    }

    /// The descriptor that a QEMU process has to inherit.
    pub(super) fn tap(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.tap)
    }

    pub(super) fn backend(&self, id: &str) -> String {
        format!("tap,id={id},fd={}", self.tap.as_raw_fd())
    }
}

fn devices() -> Result<[OwnedFd; 2]> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    ip("link add bridge type bridge")?;
    ip("link set bridge up")?;
    let [one, other] = ["tap1", "tap2"].map(|name| -> Result<OwnedFd> {
        let device = tap(name).with_context(|| format!("cannot make the tap device {name}"))?;
        ip(&format!("link set {name} master bridge up"))?;
        Ok(device)
    });
    Ok([one?, other?])
}

fn ip(arguments: &str) -> Result<()> {
    let output = Command::new("ip").args(arguments.split(' ')).output()?;
    if !output.status.success() {
        bail!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// Makes a tap device whose frames have virtio's header, by which checksums and cutting are left to others.
fn tap(name: &str) -> io::Result<OwnedFd> {
    let device = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: all of it is numbers and bytes, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the kernel reads and writes one `ifreq`, which lives until the call has returned.
    if unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(device.into())
}
