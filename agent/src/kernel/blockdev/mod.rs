//! The backing of a volume: a block device or an image file.
//!
//! [`inspect`] says what it is and can do without touching it, [`users`] says who else uses it,
//! [`reserve`] keeps new users away, and [`Backing::claim`] takes it for us alone: `O_EXCL` on a device (the kernel then refuses mounts
//! and other claims), an OFD write lock on an image. Both end only when the last reference to the
//! open file is gone, which is after the last write of a dead process has finished; so a claim that
//! succeeds can rely on nothing being under way.

mod below;
mod counters;
mod sysfs;
mod usage;

use std::fs::{File, FileTimes, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use below::{Disk, disks_below};
pub use counters::IoCounters;
pub use sysfs::DeviceNumber;
pub use usage::{Usage, users};

use sysfs::Sysfs;

/// Sizes that a device in front of the backing must repeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Usable size: a multiple of `logical_block_bytes`.
    pub size_bytes: u64,
    /// Smallest unit the backing reads and writes.
    pub logical_block_bytes: u32,
    /// Smallest unit it writes without reading first.
    pub physical_block_bytes: u32,
    /// Preferred smallest request.
    pub io_min_bytes: u32,
    /// Preferred large request, 0 if it has no preference.
    pub io_opt_bytes: u32,
}

/// What the backing is able to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abilities {
    /// It refuses writes.
    pub read_only: bool,
    /// Seeks cost time.
    pub rotational: bool,
    /// Completed writes may sit in a cache that a power cut empties, until a flush.
    pub volatile_cache: bool,
    /// A single write can be made durable more cheaply than by a flush.
    pub fua: bool,
    /// Zeroing that gives the space back ([`ZeroMode::Unmap`]); none: do not advertise discard.
    pub unmap: Option<UnmapLimits>,
    /// [`ZeroMode::Keep`] costs the backing less than writing zeroes.
    pub fast_zeroes: bool,
}

/// Limits of unmapping, from the backing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnmapLimits {
    /// Unit in which space is given back.
    pub granularity_bytes: u32,
    /// Offset of the first whole unit.
    pub alignment_bytes: u32,
    /// Most that one request may cover.
    pub max_bytes: u64,
}

/// Two ways of making zeroes. Both guarantee that the range reads as zeroes afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroMode {
    /// Zeroes, and the space may be given back. On a device: write-zeroes with unmap, which fails
    /// with `EOPNOTSUPP` where the device cannot guarantee zeroes; on a file: a hole.
    Unmap,
    /// Zeroes, and the space stays allocated. A device without the ability gets zeroes written.
    Keep,
}

impl ZeroMode {
    /// The `mode` of fallocate(2). `FALLOC_FL_NO_HIDE_STALE` (discard without zeroes) is never used.
    pub const fn fallocate_mode(self) -> i32 {
        match self {
            Self::Unmap => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            Self::Keep => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
        }
    }
}

/// Which disk it is, as far as it tells: for noticing that another one took its place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Kernel name such as `sda1`; empty for an image.
    pub kernel_name: String,
    /// Model, trimmed.
    pub model: Option<String>,
    /// Serial number, trimmed.
    pub serial: Option<String>,
    /// World-wide name (`wwid` in sysfs).
    pub wwn: Option<String>,
    /// UUID of a device-mapper device (`dm/uuid`).
    pub dm_uuid: Option<String>,
    /// Number of the partition on its disk.
    pub partition: Option<u32>,
    /// First sector of the partition on its disk.
    pub partition_start: Option<u64>,
    /// UUID of the partition, where the kernel tells it.
    pub partition_uuid: Option<String>,
}

/// What a path turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspection {
    /// The device's number; none for an image file.
    pub device: Option<DeviceNumber>,
    /// Sizes.
    pub geometry: Geometry,
    /// Abilities.
    pub abilities: Abilities,
    /// Which disk it is.
    pub identity: Identity,
}

/// Why a backing cannot be used. Each is a sentence for the person who named the path.
#[derive(Debug, thiserror::Error)]
pub enum BackingError {
    /// Cannot be opened or looked at.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb.
        what: &'static str,
        /// The backing.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Neither a block device nor a regular file.
    #[error("{} is neither a block device nor an image file", path.display())]
    WrongKind {
        /// The backing.
        path: PathBuf,
    },
    /// Nothing on it, or an odd size.
    #[error("{} is {size_bytes} bytes: a disk must have a non-zero multiple of 512 bytes", path.display())]
    BadSize {
        /// The backing.
        path: PathBuf,
        /// Its size.
        size_bytes: u64,
    },
    /// The device refuses writes.
    #[error("{} is read-only", path.display())]
    ReadOnly {
        /// The backing.
        path: PathBuf,
    },
    /// Somebody else has it.
    #[error("{} is in use: {}", path.display(), usage::sentence(users))]
    InUse {
        /// The backing.
        path: PathBuf,
        /// Who, as far as it can be found out.
        users: Vec<Usage>,
    },
}

impl BackingError {
    /// The same; of a backing in use, with who uses it. That looks at every process.
    #[must_use]
    pub fn with_users(self) -> Self {
        match self {
            Self::InUse { path, .. } => {
                Self::InUse { users: users(&path).unwrap_or_default(), path }
            }
            other => other,
        }
    }
}

/// Looks at a backing without claiming or changing it.
///
/// # Errors
/// It does not exist, is of the wrong kind, or has an impossible size.
pub fn inspect(path: &Path) -> Result<Inspection, BackingError> {
    let io = |what| move |source| BackingError::Io { what, path: path.to_owned(), source };
    let metadata = std::fs::metadata(path).map_err(io("look at"))?;
    let inspection = if metadata.file_type().is_block_device() {
        Sysfs::system()
            .inspect(DeviceNumber::from_rdev(metadata.rdev()))
            .map_err(io("read the properties of"))?
    } else if metadata.is_file() {
        inspect_image(metadata.len())
    } else {
        return Err(BackingError::WrongKind { path: path.to_owned() });
    };
    let size_bytes = inspection.geometry.size_bytes;
    if size_bytes == 0
        || !size_bytes.is_multiple_of(u64::from(inspection.geometry.logical_block_bytes))
    {
        return Err(BackingError::BadSize { path: path.to_owned(), size_bytes });
    }
    Ok(inspection)
}

/// An image: 512-byte blocks that are best written in pages, and a cache above it (the page cache
/// or its disk's). Whether it can have holes is found out when it is opened.
fn inspect_image(size_bytes: u64) -> Inspection {
    Inspection {
        device: None,
        geometry: Geometry {
            size_bytes,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
            io_min_bytes: 4096,
            io_opt_bytes: 0,
        },
        abilities: Abilities {
            read_only: false,
            rotational: false,
            volatile_cache: true,
            fua: true,
            unmap: None,
            fast_zeroes: false,
        },
        identity: Identity::default(),
    }
}

/// A claimed backing.
#[derive(Debug)]
pub struct Backing {
    path: PathBuf,
    file: Arc<File>,
    inspection: Inspection,
    found: Metadata,
    direct: bool,
}

impl Backing {
    /// Opens `path` for reading and writing, for us alone, with `O_DIRECT` where possible.
    ///
    /// # Errors
    /// As [`inspect`], and when it is read-only or in use; [`BackingError::with_users`] then finds out by whom.
    pub fn claim(path: &Path) -> Result<Self, BackingError> {
        let mut inspection = inspect(path)?;
        if inspection.abilities.read_only {
            return Err(BackingError::ReadOnly { path: path.to_owned() });
        }
        let (file, direct) = match inspection.device {
            Some(_) => (open_device(path)?, true),
            None => open_image(path)?,
        };
        let io = |what| move |source| BackingError::Io { what, path: path.to_owned(), source };
        // The path may have come to mean something else since the inspection.
        let opened = file.metadata().map_err(io("look at"))?;
        let device =
            opened.file_type().is_block_device().then(|| DeviceNumber::from_rdev(opened.rdev()));
        if device != inspection.device {
            let source = io::Error::other("it was replaced meanwhile; try again");
            return Err(io("claim")(source));
        }
        if device.is_none() {
            inspection.abilities.unmap = image_unmap(&file, inspection.geometry.size_bytes);
            // To have tried that changed nothing, and must not look as if it had. The times of a file that belongs to
            // somebody else cannot be set: then a start that failed may cost a comparison.
            if let Ok(modified) = opened.modified() {
                let _ = file.set_times(FileTimes::new().set_modified(modified));
            }
        }
        let file = Arc::new(file);
        Ok(Self { path: path.to_owned(), file, inspection, found: opened, direct })
    }

    /// The path it was claimed by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file. The claim ends when its last clone is dropped and its last I/O is done.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Its sizes.
    pub fn geometry(&self) -> &Geometry {
        &self.inspection.geometry
    }

    /// Its abilities.
    pub fn abilities(&self) -> &Abilities {
        &self.inspection.abilities
    }

    /// Which disk it is.
    pub fn identity(&self) -> &Identity {
        &self.inspection.identity
    }

    /// What the file system said of it when it was claimed.
    pub fn found(&self) -> &Metadata {
        &self.found
    }

    /// The device's number; none for an image.
    pub fn device(&self) -> Option<DeviceNumber> {
        self.inspection.device
    }

    /// Reads and writes bypass the page cache. Never so for an image on a filesystem that cannot,
    /// or only in blocks larger than the image's.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// The device's I/O counters; none for an image. See [`IoCounters`].
    ///
    /// # Errors
    /// sysfs cannot be read.
    pub fn counters(&self) -> io::Result<Option<IoCounters>> {
        self.inspection.device.map(|number| Sysfs::system().counters(number)).transpose()
    }
}

fn open_device(path: &Path) -> Result<File, BackingError> {
    let flags = libc::O_DIRECT | libc::O_EXCL | libc::O_CLOEXEC;
    match OpenOptions::new().read(true).write(true).custom_flags(flags).open(path) {
        Ok(file) => Ok(file),
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => Err(in_use(path, Vec::new())),
        Err(source) => Err(BackingError::Io { what: "open", path: path.to_owned(), source }),
    }
}

fn open_image(path: &Path) -> Result<(File, bool), BackingError> {
    let io = |what| move |source| BackingError::Io { what, path: path.to_owned(), source };
    let open = |flags| {
        OpenOptions::new().read(true).write(true).custom_flags(flags | libc::O_CLOEXEC).open(path)
    };
    let file = open(0).map_err(io("open"))?;
    let direct = sysfs::direct_io_alignment(&file).is_none_or(|bytes| bytes <= 512);
    // The descriptor that holds the lock is the one that does the I/O.
    let (file, direct) = match direct.then(|| open(libc::O_DIRECT)) {
        Some(Ok(direct)) => (direct, true),
        Some(Err(e)) if e.raw_os_error() != Some(libc::EINVAL) => return Err(io("open")(e)),
        _ => (file, false),
    };
    let whole = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_SETLK(&whole)) {
        Ok(_) => {}
        Err(nix::Error::EAGAIN | nix::Error::EACCES) => return Err(in_use(path, Vec::new())),
        Err(e) => return Err(io("lock")(e.into())),
    }
    // A loop device does not take the lock, but writes all the same.
    let loops = usage::loops_over(path).map_err(io("find the loop devices over"))?;
    match loops.is_empty() {
        true => Ok((file, direct)),
        false => Err(in_use(path, loops)),
    }
}

/// Makes sure that nobody uses a device that is to be taken away, and that nobody mounts or claims it
/// for as long as the file is kept. None if there is no such device.
///
/// # Errors
/// [`BackingError::InUse`], or it cannot be found out.
pub fn reserve(path: &Path) -> Result<Option<File>, BackingError> {
    let io = |what| move |source| BackingError::Io { what, path: path.to_owned(), source };
    // A claim tells of users in other mount namespaces as well. For reading: a device that was open
    // for writing is looked at by udev when it is closed.
    let flags = libc::O_EXCL | libc::O_CLOEXEC;
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
            return Err(in_use(path, Vec::new()).with_users());
        }
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENXIO | libc::ENODEV)) => {
            return Ok(None);
        }
        Err(source) => return Err(io("open")(source)),
    };
    let users = users(path).map_err(io("find the users of"))?;
    match users.is_empty() {
        true => Ok(Some(file)),
        false => Err(in_use(path, users)),
    }
}

fn in_use(path: &Path, users: Vec<Usage>) -> BackingError {
    BackingError::InUse { path: path.to_owned(), users }
}

/// Whether the image's filesystem has holes, tried beyond its end where nothing is.
fn image_unmap(file: &File, size_bytes: u64) -> Option<UnmapLimits> {
    const GRANULARITY_BYTES: u32 = 4096;
    let beyond = size_bytes.checked_next_multiple_of(u64::from(GRANULARITY_BYTES))?;
    let flags = nix::fcntl::FallocateFlags::from_bits_truncate(ZeroMode::Unmap.fallocate_mode());
    let beyond = i64::try_from(beyond).ok()?;
    nix::fcntl::fallocate(file, flags, beyond, i64::from(GRANULARITY_BYTES)).ok()?;
    Some(UnmapLimits {
        granularity_bytes: GRANULARITY_BYTES,
        alignment_bytes: 0,
        max_bytes: 1 << 30,
    })
}

#[cfg(test)]
mod tests;
