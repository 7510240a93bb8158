//! A guest's hardware, as QEMU arguments.

use std::path::{Path, PathBuf};

/// The kind of a guest's disks and network cards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hardware {
    /// virtio-blk and virtio-net, as under KVM.
    Virtio,
    /// pvscsi and vmxnet3 with VMware's name in the firmware tables.
    Vmware,
}

/// A disk of a guest, besides a Debian guest's root.
#[derive(Clone, Debug)]
pub struct Disk {
    source: String,
    serial: String,
}

impl Disk {
    /// A raw image file. `serial` is what the guest sees: under virtio the disk is
    /// `/dev/disk/by-id/virtio-SERIAL` (at most 20 characters).
    pub fn file(path: &Path, serial: &str) -> Disk {
        // Nothing here survives this machine's own power cut, so host flushes would only cost time.
        let source = format!("file={},format=raw,cache=unsafe,discard=unmap", path.display());
        Disk { source, serial: serial.to_owned() }
    }

    /// An export of an NBD server on a Unix socket of this machine. Flushes reach the server.
    pub fn nbd(socket: &Path, export: &str, serial: &str) -> Disk {
        let source = format!(
            "file.driver=nbd,file.path={},file.export={export},format=raw",
            socket.display()
        );
        Disk { source, serial: serial.to_owned() }
    }

    pub(super) fn overlay(path: &Path) -> Disk {
        let source = format!("file={},format=qcow2,cache=unsafe,discard=unmap", path.display());
        Disk { source, serial: "root".to_owned() }
    }
}

/// A cable between two guests. Each end's address is fixed; nothing else is reachable.
#[derive(Clone, Debug)]
pub struct Network {
    number: u8,
    directory: PathBuf,
}

/// One end of a [`Network`], to be given to one guest.
#[derive(Clone, Debug)]
pub struct NetworkEnd {
    network: Network,
    end: u8,
}

impl Network {
    pub(super) fn new(directory: &Path, number: u8) -> Network {
        Network { number, directory: directory.to_owned() }
    }

    /// The two ends.
    pub fn ends(&self) -> [NetworkEnd; 2] {
        [1, 2].map(|end| NetworkEnd { network: self.clone(), end })
    }
}

impl NetworkEnd {
    /// The IPv4 address of the guest at this end.
    pub fn address(&self) -> String {
        format!("10.88.{}.{}", self.network.number, self.end)
    }

    fn mac(&self) -> String {
        format!("52:54:00:88:{:02x}:{:02x}", self.network.number, self.end)
    }

    /// The kernel argument by which the guest's first program sets the address.
    pub(super) fn kernel_argument(&self) -> String {
        format!("tidemark.net={},{}/24", self.mac(), self.address())
    }

    fn socket(&self, end: u8) -> PathBuf {
        self.network.directory.join(format!("net{}-{end}", self.network.number))
    }

    /// Datagram sockets: either guest may come and go, in any order.
    fn backend(&self, id: &str) -> String {
        let (local, remote) = (self.socket(self.end), self.socket(3 - self.end));
        format!(
            "dgram,id={id},local.type=unix,local.path={},remote.type=unix,remote.path={}",
            local.display(),
            remote.display()
        )
    }
}

impl Hardware {
    /// The arguments for these disks and network ends, in the order in which the guest is to see them.
    pub(super) fn arguments(self, disks: &[Disk], ends: &[NetworkEnd]) -> Vec<String> {
        let mut arguments = Vec::new();
        let mut add = |option: &str, value: String| arguments.extend([option.to_owned(), value]);
        if self == Hardware::Vmware {
            add(
                "-smbios",
                "type=1,manufacturer=VMware,, Inc.,product=VMware Virtual Platform".to_owned(),
            );
            add("-device", "pvscsi,id=scsi".to_owned());
        }
        for (number, Disk { source, serial }) in disks.iter().enumerate() {
            add("-drive", format!("{source},if=none,id=disk{number}"));
            add(
                "-device",
                match self {
                    Hardware::Virtio => {
                        format!("virtio-blk-pci,drive=disk{number},serial={serial}")
                    }
                    Hardware::Vmware => {
                        format!(
                            "scsi-hd,bus=scsi.0,scsi-id={number},drive=disk{number},serial={serial}"
                        )
                    }
                },
            );
        }
        for (number, end) in ends.iter().enumerate() {
            let id = format!("net{number}");
            add("-netdev", end.backend(&id));
            let device = match self {
                Hardware::Virtio => "virtio-net-pci",
                Hardware::Vmware => "vmxnet3",
            };
            // No boot from the network: its program costs start-up time.
            add("-device", format!("{device},netdev={id},mac={},romfile=", end.mac()));
        }
        arguments
    }
}
