//! What tells a disk from others, and what tells whether it was written.

use std::{fs::File, io, os::unix::fs::FileExt, os::unix::fs::MetadataExt};

use serde::{Deserialize, Serialize};

use crate::kernel::blockdev::{Backing, IoCounters};

/// `O_DIRECT` asks for no more on any disk.
const ALIGN_BYTES: usize = 4096;
/// What an imprint is made of: the disk's first and last bytes, where partition tables, volume groups and
/// file systems keep what each mount changes, and some blocks in between.
const FIRST_BYTES: u64 = 512 << 10;
const LAST_BYTES: u64 = 64 << 10;
const SAMPLES: u64 = 32;
const SAMPLE_BYTES: u64 = 4096;

/// What tells a disk from others. Its name (`sda`) does not: names change from boot to boot.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Facts {
    /// An image file. A copy of it, even in its place, is another one.
    Image {
        /// Its inode. The file system's device number is not kept: it may change from boot to boot.
        inode: u64,
        /// When it was made, nanoseconds since 1970, where the file system knows.
        born_ns: Option<i64>,
    },
    /// A block device; each as far as the kernel tells.
    Device {
        /// World-wide name.
        wwn: Option<String>,
        /// Serial number.
        serial: Option<String>,
        /// UUID of a device-mapper device.
        dm_uuid: Option<String>,
        /// Number of the partition on its disk, and its first sector there.
        partition: Option<(u32, u64)>,
        /// The partition's UUID.
        partition_uuid: Option<String>,
    },
}

impl Facts {
    /// Those of a backing.
    pub fn of(backing: &Backing) -> Facts {
        let identity = backing.identity().clone();
        match backing.device() {
            Some(_) => Facts::Device {
                wwn: identity.wwn,
                serial: identity.serial,
                dm_uuid: identity.dm_uuid,
                partition: identity
                    .partition
                    .map(|number| (number, identity.partition_start.unwrap_or(0))),
                partition_uuid: identity.partition_uuid,
            },
            None => {
                let metadata = backing.found();
                let born = metadata.created().ok().and_then(|born| {
                    born.duration_since(std::time::UNIX_EPOCH).ok()?.as_nanos().try_into().ok()
                });
                Facts::Image { inode: metadata.ino(), born_ns: born }
            }
        }
    }

    /// What makes `now` another disk than this, in words. None if nothing does: a disk that tells nothing
    /// about itself cannot be told from others.
    pub fn difference(&self, now: &Facts) -> Option<String> {
        match (self, now) {
            (Facts::Image { inode, born_ns }, Facts::Image { inode: other, born_ns: born_now }) => {
                (inode != other || born_ns.is_some() && born_now.is_some() && born_ns != born_now)
                    .then(|| "it is a new file, such as a copy or an older one put back".to_owned())
            }
            (Facts::Image { .. }, Facts::Device { .. }) => {
                Some("that was an image file, this is a block device".to_owned())
            }
            (Facts::Device { .. }, Facts::Image { .. }) => {
                Some("that was a block device, this is an image file".to_owned())
            }
            (Facts::Device { .. }, Facts::Device { .. }) => {
                let (then, now) = (self.told(), now.told());
                let differs = then.iter().zip(&now).find_map(|((what, then), (_, now))| {
                    let (then, now) = (then.as_ref()?, now.as_ref()?);
                    (then != now).then(|| format!("its {what} is {now}, it was {then}"))
                });
                let any = |told: &[(&str, Option<String>); 5]| {
                    told.iter().any(|(what, value)| *what != PARTITION && value.is_some())
                };
                let shared = then.iter().zip(&now).any(|((what, then), (_, now))| {
                    *what != PARTITION && then.is_some() && now.is_some()
                });
                differs.or_else(|| {
                    let silent = any(&then) && !shared;
                    silent.then(|| "it tells nothing of what that one told".to_owned())
                })
            }
        }
    }

    fn told(&self) -> [(&'static str, Option<String>); 5] {
        let Facts::Device { wwn, serial, dm_uuid, partition, partition_uuid } = self else {
            return [("", None), ("", None), ("", None), ("", None), ("", None)];
        };
        let quoted = |text: &Option<String>| text.as_ref().map(|text| format!("'{text}'"));
        let place = match partition {
            Some((number, start)) => format!("number {number} from sector {start} on"),
            None => "none".to_owned(),
        };
        [
            ("world-wide name", quoted(wwn)),
            ("serial number", quoted(serial)),
            ("device-mapper UUID", quoted(dm_uuid)),
            (PARTITION, Some(place)),
            ("partition UUID", quoted(partition_uuid)),
        ]
    }
}

const PARTITION: &str = "partition";

/// How a disk looked when the agent stopped in order.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rest {
    /// The kernel's id of that boot.
    boot: String,
    /// A device's counters of I/O, which begin anew with each boot and each appearance of the disk.
    counters: Option<IoCounters>,
    /// An image's time of modification, nanoseconds since 1970.
    modified_ns: Option<i64>,
    /// BLAKE3 of samples of the content, hexadecimal.
    imprint: String,
}

impl Rest {
    /// That of a backing on which nothing is under way.
    pub(super) fn of(backing: &Backing) -> io::Result<Rest> {
        let modified_ns = match backing.device() {
            Some(_) => None,
            None => {
                // A crash of the machine must not put an older time back.
                backing.file().sync_all()?;
                Some(modified_ns(&backing.file().metadata()?))
            }
        };
        Ok(Rest {
            boot: boot_id()?,
            counters: backing.counters()?,
            modified_ns,
            imprint: imprint(backing.file(), backing.geometry().size_bytes)?,
        })
    }

    /// What shows that the backing, as it was claimed, was written since, in words. What cannot be read
    /// shows nothing.
    pub(super) fn difference(&self, backing: &Backing) -> Option<String> {
        let now = backing.found();
        if backing.device().is_none() && self.modified_ns != Some(modified_ns(now)) {
            return Some("its time of modification has changed".to_owned());
        }
        let same_boot = boot_id().is_ok_and(|boot| boot == self.boot);
        if same_boot
            && let (Some(then), Ok(Some(now))) = (self.counters, backing.counters())
            && then.disk_sequence == now.disk_sequence
            && now.changed_since(&then)
        {
            let sectors = now.sectors_written.saturating_sub(then.sectors_written);
            return Some(format!("the kernel has counted {sectors} sectors since"));
        }
        let imprint = imprint(backing.file(), backing.geometry().size_bytes).ok()?;
        (imprint != self.imprint).then(|| "its content is not what it was".to_owned())
    }
}

#[cfg(test)]
impl Rest {
    pub(super) fn sample(counters: IoCounters) -> Rest {
        let (boot, imprint) = ("b".to_owned(), "00".to_owned());
        Rest { boot, counters: Some(counters), modified_ns: Some(5), imprint }
    }
}

fn modified_ns(metadata: &std::fs::Metadata) -> i64 {
    metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec())
}

fn boot_id() -> io::Result<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(id.trim().to_owned())
}

/// The stretches of a disk of this size that an imprint is made of: byte and length.
fn stretches(size_bytes: u64) -> Vec<(u64, u64)> {
    let align = ALIGN_BYTES as u64;
    let last = size_bytes.saturating_sub(LAST_BYTES) / align * align;
    let mut stretches = vec![(0, FIRST_BYTES.min(size_bytes)), (last, size_bytes - last)];
    for sample in 1..=SAMPLES {
        let at = size_bytes / (SAMPLES + 1) * sample / align * align;
        stretches.push((at, SAMPLE_BYTES.min(size_bytes - at)));
    }
    stretches
}

/// BLAKE3 of samples of a disk's content, read past the page cache if the file is open so.
fn imprint(file: &File, size_bytes: u64) -> io::Result<String> {
    let mut memory = vec![0; FIRST_BYTES as usize + ALIGN_BYTES];
    let from = memory.as_ptr().align_offset(ALIGN_BYTES);
    let mut hasher = blake3::Hasher::new();
    for (at, bytes) in stretches(size_bytes) {
        let buffer = memory.get_mut(from..from + bytes as usize);
        let buffer = buffer.ok_or(io::ErrorKind::OutOfMemory)?;
        file.read_exact_at(buffer, at)?;
        hasher.update(buffer);
    }
    Ok(hasher.finalize().to_hex().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_lie_on_the_disk_and_are_aligned() {
        for size_bytes in [512, 4096, 70_144, 1 << 20, (10 << 30) + 512] {
            for (at, bytes) in stretches(size_bytes) {
                assert!(at + bytes <= size_bytes, "{size_bytes}: {at} {bytes}");
                assert!(at % 4096 == 0 && bytes % 512 == 0, "{size_bytes}: {at} {bytes}");
                assert!(bytes <= FIRST_BYTES, "{size_bytes}: {at} {bytes}");
            }
        }
    }
}
