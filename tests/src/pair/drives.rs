//! The drives of a pair whose data is on disks with a volatile cache: one for each kind of file, so that a test can
//! take out the flushes of that kind alone.

use anyhow::{Context, Result};

use super::{GROUP, Pair, Plan, disk_path};
use crate::vm::{Guest, Hardware, Lab};
use crate::volatile::VolatileDisks;

/// A drive that is not protected: its serial number, where its file system is mounted, and its size.
pub(super) struct Drive {
    pub serial: &'static str,
    at: &'static str,
    bytes: u64,
}

/// What the source keeps besides its volumes; each is mounted below the ones before.
pub(super) const SOURCE: [Drive; 3] = [
    Drive { serial: "state", at: "/var/lib/tidemark", bytes: 64 << 20 },
    Drive { serial: "map", at: "/var/lib/tidemark/map", bytes: 64 << 20 },
    Drive { serial: "spool", at: "/var/spool/tidemark", bytes: 256 << 20 },
];

/// What the target keeps.
pub(super) const TARGET: [Drive; 2] = [
    Drive { serial: "catalogue", at: "/var/lib/tidemark/target", bytes: 64 << 20 },
    Drive { serial: "log", at: "/var/lib/tidemark/target/groups", bytes: 2 << 30 },
];

/// Lines for the source's `agent.toml` that make use of the drive for the spool.
pub(super) const SPOOL_TABLE: &str =
    "\n[spool]\ndirectory = \"/var/spool/tidemark\"\nbytes_max = \"128 MiB\"\n";

/// Makes an ext4 that outlives a torn write of its superblock: that has two sectors, is written in place, and a
/// checksum of it would be asked for before the journal is replayed.
pub const MKFS: &str = "mkfs.ext4 -q -O ^metadata_csum";

/// Makes the drives of a pair and serves them.
pub(super) fn start(lab: &Lab, plan: &Plan, seed: u64) -> Result<VolatileDisks> {
    let mut sizes = plan.volumes.clone();
    sizes.extend(SOURCE.iter().chain(&TARGET).map(|drive| (drive.serial, drive.bytes)));
    VolatileDisks::start(lab.directory(), &lab.socket_directory().join("disks"), &sizes, seed)
}

/// Makes a file system on each drive and mounts it for good.
pub(super) fn mount(guest: &Guest, drives: &[Drive]) -> Result<()> {
    drives.iter().try_for_each(|drive| mount_at(guest, drive.serial, drive.at))
}

/// Makes a file system on the disk with this serial number and mounts it for good.
pub(super) fn mount_at(guest: &Guest, serial: &str, at: &str) -> Result<()> {
    let disk = disk_path(Hardware::Virtio, serial);
    guest.sh(&format!(
        "{MKFS} {disk} && mkdir -p {at} && \
         echo '{disk} {at} ext4 noatime 0 2' >>/etc/fstab && systemctl daemon-reload && mount {at}"
    ))?;
    Ok(())
}

/// Puts the group's files of the dirty map on their drive.
pub(super) fn divert_map(source: &Guest) -> Result<()> {
    source.sh(&format!(
        "mkdir -p /var/lib/tidemark/agent/{GROUP} && cd /var/lib/tidemark/agent/{GROUP} && \
         for file in active.log 1.map; do ln -s /var/lib/tidemark/map/$file $file; done"
    ))?;
    Ok(())
}

impl Pair {
    /// The disks, if they are volatile ones.
    ///
    /// # Errors
    /// They are not.
    pub fn disks(&self) -> Result<&VolatileDisks> {
        self.disks.as_ref().context("the pair's disks are no volatile ones")
    }

    /// Cuts the source's power; what its drives have kept.
    pub fn cut_source(&mut self) -> Result<String> {
        self.source.power_cut()?;
        let volumes = self.plan.volumes.iter().map(|(name, _)| *name);
        let names: Vec<&str> = volumes.chain(SOURCE.iter().map(|drive| drive.serial)).collect();
        self.disks()?.cut(&names)
    }

    /// Cuts the target's power; what its drives have kept.
    pub fn cut_target(&mut self) -> Result<String> {
        self.target.power_cut()?;
        self.disks()?.cut(&TARGET.map(|drive| drive.serial))
    }
}
