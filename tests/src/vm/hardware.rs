//! A guest's hardware, as QEMU arguments.

use std::path::Path;

use super::network::NetworkEnd;

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
