//! Who uses a block device or an image, in words a person can act on.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::sysfs::{DeviceNumber, Seen, Sysfs, glance, text};

/// One user of a backing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Usage {
    /// A filesystem on it, or on one of its partitions, is mounted.
    Mounted {
        /// The device that is mounted, such as `/dev/sdb1`.
        device: PathBuf,
        /// Where.
        mount_point: PathBuf,
    },
    /// It is swap space.
    Swap {
        /// The device.
        device: PathBuf,
    },
    /// Another block device is built on it (LVM, RAID, encryption, multipath).
    Holder {
        /// The device below.
        device: PathBuf,
        /// Kernel name of the device above.
        holder: String,
        /// Its device-mapper name, where it has one.
        name: Option<String>,
    },
    /// A loop device serves the image.
    Loop {
        /// The loop device.
        device: PathBuf,
    },
    /// A process has it open.
    Process {
        /// Its id.
        pid: u32,
        /// Its command name.
        name: String,
    },
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mounted { device, mount_point } => {
                write!(f, "{} is mounted on {}", device.display(), mount_point.display())
            }
            Self::Swap { device } => write!(f, "{} is swap space", device.display()),
            Self::Holder { device, holder, name } => {
                write!(f, "{} belongs to {}", device.display(), name.as_ref().unwrap_or(holder))
            }
            Self::Loop { device } => write!(f, "{} serves it", device.display()),
            Self::Process { pid, name } => write!(f, "process {pid} ({name}) has it open"),
        }
    }
}

/// The part after "is in use: ".
pub(super) fn sentence(users: &[Usage]) -> String {
    if users.is_empty() {
        return "another process or kernel driver has claimed it; stop that first".to_owned();
    }
    let shown: Vec<String> = users.iter().take(SHOWN_MAX).map(Usage::to_string).collect();
    let more = match users.len().saturating_sub(SHOWN_MAX) {
        0 => String::new(),
        n => format!(" and {n} more"),
    };
    let advice = match users.first() {
        Some(Usage::Mounted { .. }) => "unmount it first",
        Some(Usage::Swap { .. }) => "take it out of use with swapoff first",
        Some(Usage::Loop { .. }) => "detach it with losetup -d first",
        Some(Usage::Process { .. }) => "stop it first",
        _ => "stop using it there first",
    };
    format!("{}{more}; {advice}", shown.join(", "))
}

const SHOWN_MAX: usize = 4;

/// Finds who uses `path`: mounts, swap, devices built on it or on its partitions, loop devices and
/// other processes. A device that is merely open for reading does not count. An empty answer is no
/// promise; claiming is what decides.
///
/// # Errors
/// The path or the kernel's tables cannot be read.
pub fn users(path: &Path) -> io::Result<Vec<Usage>> {
    let metadata = fs::metadata(path)?;
    let sysfs = Sysfs::system();
    let mut found = Vec::new();
    if metadata.file_type().is_block_device() {
        let parts = parts(&sysfs, DeviceNumber::from_rdev(metadata.rdev()))?;
        found.extend(mounts(&fs::read_to_string("/proc/self/mountinfo")?, &parts));
        found.extend(swaps(&fs::read_to_string("/proc/swaps").unwrap_or_default(), &parts));
        found.extend(holders(&parts));
        let one_of_them = |number: DeviceNumber| parts.iter().any(|part| part.number == number);
        found.extend(loops(sysfs.root(), |file| number_of(file).is_some_and(one_of_them)));
        if found.is_empty() {
            found.extend(processes(|seen| seen.device.is_some_and(one_of_them)));
        }
    } else {
        found.extend(loops_over(path)?);
        if found.is_empty() {
            let own = (DeviceNumber::from_rdev(metadata.dev()), metadata.ino());
            found.extend(processes(|seen| seen.file == own));
        }
    }
    Ok(found)
}

/// The loop devices over an image.
pub(super) fn loops_over(image: &Path) -> io::Result<Vec<Usage>> {
    let image = image.canonicalize()?;
    Ok(loops(Sysfs::system().root(), |file| file == image))
}

/// A device and its partitions, with their sysfs directories.
#[derive(Clone, Debug)]
pub(super) struct Part {
    number: DeviceNumber,
    directory: PathBuf,
    device: PathBuf,
}

pub(super) fn parts(sysfs: &Sysfs, number: DeviceNumber) -> io::Result<Vec<Part>> {
    let own = sysfs.directory(number)?;
    let mut parts = vec![part(number, own.clone())];
    for entry in fs::read_dir(&own)?.flatten() {
        let directory = entry.path();
        if !directory.join("partition").exists() {
            continue;
        }
        if let Some(number) = text(&directory.join("dev")).and_then(|t| DeviceNumber::parse(&t)) {
            parts.push(part(number, directory));
        }
    }
    Ok(parts)
}

fn part(number: DeviceNumber, directory: PathBuf) -> Part {
    let name = directory.file_name().map(|n| n.to_string_lossy().replace('!', "/"));
    Part { number, device: Path::new("/dev").join(name.unwrap_or_default()), directory }
}

/// Lines of mountinfo: `36 35 98:0 /root /mount/point options - type source superoptions`.
/// Filesystems with several devices show an anonymous number, so their source is compared too.
pub(super) fn mounts(mountinfo: &str, parts: &[Part]) -> Vec<Usage> {
    let mut found = Vec::new();
    for line in mountinfo.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let (Some(number), Some(mount_point)) = (fields.get(2), fields.get(4)) else { continue };
        let dash = fields.iter().position(|f| *f == "-");
        let source = dash.and_then(|at| fields.get(at + 2)).map(|s| unescape(s));
        let hit = parts.iter().find(|part| {
            DeviceNumber::parse(number) == Some(part.number)
                || source.as_ref().is_some_and(|s| number_of(s) == Some(part.number))
        });
        if let Some(part) = hit {
            found.push(Usage::Mounted {
                device: part.device.clone(),
                mount_point: unescape(mount_point),
            });
        }
    }
    found
}

/// The source of the mount with this number: a path, if it is a device.
pub(super) fn source_of_mount(mountinfo: &str, number: DeviceNumber) -> Option<PathBuf> {
    let of = |line: &&str| line.split(' ').nth(2).and_then(DeviceNumber::parse) == Some(number);
    let (_, after) = mountinfo.lines().find(of)?.split_once(" - ")?;
    after.split(' ').nth(1).map(unescape)
}

fn swaps(table: &str, parts: &[Part]) -> Vec<Usage> {
    let sources = table.lines().skip(1).filter_map(|line| line.split_ascii_whitespace().next());
    sources
        .filter_map(|source| number_of(&unescape(source)))
        .filter_map(|number| parts.iter().find(|part| part.number == number))
        .map(|part| Usage::Swap { device: part.device.clone() })
        .collect()
}

pub(super) fn holders(parts: &[Part]) -> Vec<Usage> {
    let mut found = Vec::new();
    for part in parts {
        let Ok(entries) = fs::read_dir(part.directory.join("holders")) else { continue };
        for entry in entries.flatten() {
            found.push(Usage::Holder {
                device: part.device.clone(),
                holder: entry.file_name().to_string_lossy().into_owned(),
                name: text(&entry.path().join("dm/name")),
            });
        }
    }
    found
}

/// Loop devices over a file, or over a device: they hold it open without a claim.
fn loops(sysfs_root: &Path, is_it: impl Fn(&Path) -> bool) -> Vec<Usage> {
    let Ok(entries) = fs::read_dir(sysfs_root.join("block")) else { return Vec::new() };
    entries
        .flatten()
        .filter(|e| text(&e.path().join("loop/backing_file")).is_some_and(|f| is_it(Path::new(&f))))
        .map(|e| Usage::Loop { device: Path::new("/dev").join(e.file_name()) })
        .collect()
}

/// Other processes that hold it open for writing.
fn processes(is_it: impl Fn(&Seen) -> bool) -> Vec<Usage> {
    let own = std::process::id();
    let holds = |pid: u32| -> bool {
        let Ok(fds) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
        fds.flatten().any(|fd| {
            // The link's own mode shows how the file was opened: 0o200 is for writing.
            let writable = fd.metadata().is_ok_and(|link| link.mode() & 0o200 != 0);
            writable && glance(&fd.path()).is_some_and(|seen| is_it(&seen))
        })
    };
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| *pid != own && holds(*pid))
        .map(|pid| Usage::Process {
            pid,
            name: text(Path::new(&format!("/proc/{pid}/comm"))).unwrap_or_default(),
        })
        .collect()
}

fn number_of(path: &Path) -> Option<DeviceNumber> {
    let metadata = path.is_absolute().then(|| fs::metadata(path).ok())??;
    metadata.file_type().is_block_device().then(|| DeviceNumber::from_rdev(metadata.rdev()))
}

/// The kernel writes space, tab, newline and backslash as `\ooo`.
fn unescape(field: &str) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let octal = (first == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(byte) => {
                out.push(byte);
                rest = tail.get(3..).unwrap_or_default();
            }
            None => {
                out.push(first);
                rest = tail;
            }
        }
    }
    PathBuf::from(<std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(out))
}
