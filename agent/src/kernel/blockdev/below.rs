//! What a file lies on: the file system's device, and all that this is made of.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::sysfs::{DeviceNumber, Sysfs, text};
use super::usage::source_of_mount;

/// A disk, as the kernel tells it from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Disk {
    /// A block device.
    Device(DeviceNumber),
    /// An image: the device of its file system, and its inode.
    Image(u64, u64),
}

impl Disk {
    /// The block device or image at a path. None if it cannot be looked at.
    pub fn of(path: &Path) -> Option<Disk> {
        let metadata = fs::metadata(path).ok()?;
        let device = metadata.file_type().is_block_device();
        Some(if device {
            Disk::Device(DeviceNumber::from_rdev(metadata.rdev()))
        } else {
            Disk::Image(metadata.dev(), metadata.ino())
        })
    }
}

/// Everything that a file or directory lies on: the device of its file system, the disk that this is
/// a partition of, the devices below device mapper and RAID, the image behind a loop device, and what
/// that lies on. What cannot be looked at is left out.
pub fn disks_below(path: &Path) -> BTreeSet<Disk> {
    let mut found = BTreeSet::new();
    file_system(&Sysfs::system(), path, &mut found);
    found
}

fn file_system(sysfs: &Sysfs, path: &Path, found: &mut BTreeSet<Disk>) {
    let Ok(metadata) = fs::metadata(path) else { return };
    let number = DeviceNumber::from_rdev(metadata.dev());
    if sysfs.directory(number).is_ok() {
        return device(sysfs, number, found);
    }
    // File systems of several devices show a number of their own: the table of mounts names one.
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let source = source_of_mount(&table, number).and_then(|source| Disk::of(&source));
    if let Some(Disk::Device(number)) = source {
        device(sysfs, number, found);
    }
}

/// A device and what is below it, each once.
pub(super) fn device(sysfs: &Sysfs, number: DeviceNumber, found: &mut BTreeSet<Disk>) {
    if !found.insert(Disk::Device(number)) {
        return;
    }
    let Ok(own) = sysfs.directory(number) else { return };
    let number_in =
        |directory: &Path| text(&directory.join("dev")).and_then(|text| DeviceNumber::parse(&text));
    if own.join("partition").exists()
        && let Some(disk) = own.parent().and_then(number_in)
    {
        device(sysfs, disk, found);
    }
    for slave in fs::read_dir(own.join("slaves")).into_iter().flatten().flatten() {
        if let Some(number) = number_in(&slave.path()) {
            device(sysfs, number, found);
        }
    }
    if let Some(image) = text(&own.join("loop/backing_file")).map(PathBuf::from)
        && let Some(disk) = Disk::of(&image)
        && found.insert(disk)
    {
        file_system(sysfs, &image, found);
    }
}
