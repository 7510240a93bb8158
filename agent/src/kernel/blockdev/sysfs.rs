//! Reading a block device's properties from sysfs (`Documentation/ABI/stable/sysfs-block`).

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::{Abilities, Geometry, Identity, Inspection, IoCounters, UnmapLimits};

/// A block device's major and minor number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceNumber {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

impl DeviceNumber {
    /// From `st_rdev` (or `st_dev`).
    pub fn from_rdev(rdev: u64) -> Self {
        Self { major: libc::major(rdev), minor: libc::minor(rdev) }
    }

    /// From sysfs and mountinfo, `MAJOR:MINOR`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.trim().split_once(':')?;
        Some(Self { major: major.parse().ok()?, minor: minor.parse().ok()? })
    }
}

impl std::fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// sysfs, or a tree that looks like it.
pub(super) struct Sysfs {
    root: PathBuf,
}

impl Sysfs {
    /// The real one.
    pub(super) fn system() -> Self {
        Self::at(Path::new("/sys"))
    }

    pub(super) fn at(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// The device's own directory, such as `/sys/devices/.../block/sda/sda1`.
    pub(super) fn directory(&self, number: DeviceNumber) -> io::Result<PathBuf> {
        self.root.join("dev/block").join(number.to_string()).canonicalize()
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn inspect(&self, number: DeviceNumber) -> io::Result<Inspection> {
        let own = self.directory(number)?;
        let partition = text(&own.join("partition")).and_then(|t| t.parse().ok());
        let disk = match partition {
            Some(_) => own.parent().map_or_else(|| own.clone(), Path::to_owned),
            None => own.clone(),
        };
        let queue = |name: &str| number_in(&disk.join("queue").join(name));
        let logical = queue("logical_block_size")?;
        let geometry = Geometry {
            size_bytes: number_in(&own.join("size"))?.saturating_mul(512),
            logical_block_bytes: small(logical)?,
            physical_block_bytes: small(queue("physical_block_size")?)?,
            io_min_bytes: small(queue("minimum_io_size")?)?,
            io_opt_bytes: small(queue("optimal_io_size")?)?,
        };
        let yes = |path: &Path| text(path).is_some_and(|t| t != "0");
        let zero_max = queue("write_zeroes_max_bytes").unwrap_or(0);
        let unmap_max = zero_max.min(queue("discard_max_bytes").unwrap_or(0));
        let unmap = (unmap_max > 0).then(|| UnmapLimits {
            granularity_bytes: queue("discard_granularity")
                .ok()
                .and_then(|bytes| small(bytes).ok())
                .unwrap_or(0)
                .max(geometry.logical_block_bytes),
            alignment_bytes: number_in(&own.join("discard_alignment"))
                .ok()
                .and_then(|bytes| small(bytes).ok())
                .unwrap_or(0),
            max_bytes: unmap_max,
        });
        let abilities = Abilities {
            read_only: yes(&own.join("ro")),
            rotational: yes(&disk.join("queue/rotational")),
            volatile_cache: text(&disk.join("queue/write_cache"))
                .is_none_or(|cache| cache == "write back"),
            fua: yes(&disk.join("queue/fua")),
            unmap,
            fast_zeroes: zero_max > 0,
        };
        Ok(Inspection {
            device: Some(number),
            geometry,
            abilities,
            identity: identity(&own, &disk, partition),
        })
    }

    pub(super) fn counters(&self, number: DeviceNumber) -> io::Result<IoCounters> {
        let own = self.directory(number)?;
        let stat = std::fs::read_to_string(own.join("stat"))?;
        let sequence = number_in(&own.join("diskseq"))
            .or_else(|_| number_in(&own.join("../diskseq")))
            .unwrap_or(0);
        IoCounters::parse(&stat, sequence)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "cannot parse stat"))
    }
}

/// The alignment `O_DIRECT` asks of offsets in this file (statx, Linux 6.1); none if unknown.
pub(super) fn direct_io_alignment(file: &File) -> Option<u32> {
    use std::os::fd::AsRawFd;
    let mut answer = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: an empty path with AT_EMPTY_PATH names the descriptor itself; the buffer is a whole
    // `statx` that the kernel fills.
    let answer = unsafe {
        let rc = libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            answer.as_mut_ptr(),
        );
        if rc != 0 {
            return None;
        }
        answer.assume_init()
    };
    let known = answer.stx_mask & libc::STATX_DIOALIGN != 0 && answer.stx_dio_offset_align > 0;
    known.then_some(answer.stx_dio_offset_align)
}

/// Which file it is.
pub(super) struct Seen {
    /// The number of a block device.
    pub(super) device: Option<DeviceNumber>,
    /// The file system's number, and the file's in it.
    pub(super) file: (DeviceNumber, u64),
}

/// Which file a path means, by what the kernel knows already: a server that does not answer is not waited for.
pub(super) fn glance(path: &Path) -> Option<Seen> {
    let path = CString::new(path.as_os_str().as_bytes()).ok()?;
    let mut answer = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path ends with a zero; the buffer is a whole `statx` that the kernel fills.
    let answer = unsafe {
        let mask = libc::STATX_TYPE | libc::STATX_INO;
        let flags = libc::AT_STATX_DONT_SYNC;
        if libc::statx(libc::AT_FDCWD, path.as_ptr(), flags, mask, answer.as_mut_ptr()) != 0 {
            return None;
        }
        answer.assume_init()
    };
    let is_device = u32::from(answer.stx_mode) & libc::S_IFMT == libc::S_IFBLK;
    let number = |major, minor| DeviceNumber { major, minor };
    Some(Seen {
        device: is_device.then(|| number(answer.stx_rdev_major, answer.stx_rdev_minor)),
        file: (number(answer.stx_dev_major, answer.stx_dev_minor), answer.stx_ino),
    })
}

fn identity(own: &Path, disk: &Path, partition: Option<u32>) -> Identity {
    let first =
        |names: &[&str]| names.iter().find_map(|n| text(&disk.join(n)).filter(|t| !t.is_empty()));
    Identity {
        kernel_name: own.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default(),
        model: first(&["device/model"]),
        serial: first(&["device/serial", "serial", "device/vpd_pg80_serial"]),
        wwn: first(&["wwid", "device/wwid"]),
        dm_uuid: first(&["dm/uuid"]),
        partition,
        partition_start: partition.and_then(|_| number_in(&own.join("start")).ok()),
        partition_uuid: partition.and_then(|_| {
            let told = text(&own.join("uevent"))?;
            told.lines().find_map(|line| line.strip_prefix("PARTUUID=")).map(str::to_owned)
        }),
    }
}

/// A trimmed attribute; none if it is absent or unreadable.
pub(super) fn text(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|t| t.trim().to_owned())
}

fn number_in(path: &Path) -> io::Result<u64> {
    std::fs::read_to_string(path)?.trim().parse().map_err(|_| {
        io::Error::new(io::ErrorKind::InvalidData, format!("no number in {}", path.display()))
    })
}

fn small(value: u64) -> io::Result<u32> {
    u32::try_from(value).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "value too large"))
}
