//! The base: the oldest retained state of each volume, with a checksum per 4 KiB beside it.
//!
//! A volume is a sparse file and a file of sums, eight bytes for each block of 4096:
//!
//! | sum | the block |
//! |---|---|
//! | 0 | reads as zeros; nothing was ever stored |
//! | 1 | unknown: it could not be read at the source, or was damaged in the log |
//! | else | its content has this CRC-64/NVME (a checksum of 0 or 1 has its top bit flipped) |
//!
//! Blocks and sums change only while segments are folded in, and until their log is deleted the
//! segments are read before the base; so a block torn by a crash in the middle of it is never seen.

pub mod apply;
pub mod fold;

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io,
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, RwLock},
};

use tidemark_journal::{SECTOR_BYTES, VolumeId, checksum::crc64};

use super::ReadError;

/// Bytes in a block of the base.
pub const BLOCK_BYTES: u64 = 4096;
const BLOCK_SECTORS: u64 = BLOCK_BYTES / SECTOR_BYTES;
const SUM_BYTES: u64 = 8;
/// The most blocks whose sums one look at the allocation reads.
const LOOK_BLOCKS_MAX: u64 = 64 << 10;

/// The sum of a block that reads as zeros.
pub const SUM_ZEROS: u64 = 0;
/// The sum of a block whose content is unknown.
pub const SUM_UNREADABLE: u64 = 1;

/// The sum that is kept for a block's content.
pub fn sum_of(block: &[u8]) -> u64 {
    if block.iter().all(|byte| *byte == 0) {
        return SUM_ZEROS;
    }
    match crc64(block) {
        sum @ (SUM_ZEROS | SUM_UNREADABLE) => sum ^ (1 << 63),
        sum => sum,
    }
}

/// The oldest retained state of a group's volumes.
pub struct Base {
    dir: PathBuf,
    volumes: Mutex<HashMap<VolumeId, Arc<BaseVolume>>>,
}

/// One volume's files.
pub struct BaseVolume {
    name: String,
    data: File,
    sums: File,
    /// Held for writing while blocks and their sums change together.
    changing: RwLock<()>,
}

/// A stretch of a volume by what the base has of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stretch {
    /// First sector.
    pub start: u64,
    /// The sector after the last.
    pub end: u64,
    /// Whether it reads as zeros.
    pub zeros: bool,
}

impl Base {
    /// The base in this directory, which is created.
    ///
    /// # Errors
    /// When the directory cannot be created.
    pub fn open(dir: &Path) -> io::Result<Base> {
        std::fs::create_dir_all(dir)?;
        Ok(Base { dir: dir.to_owned(), volumes: Mutex::default() })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A volume's files, when it has any.
    ///
    /// # Errors
    /// When they exist and cannot be opened.
    pub fn volume(&self, id: VolumeId) -> io::Result<Option<Arc<BaseVolume>>> {
        self.open_volume(id, false)
    }

    /// A volume's files, created when it has none.
    ///
    /// # Errors
    /// When they cannot be opened or created.
    pub fn volume_or_create(&self, id: VolumeId) -> io::Result<Arc<BaseVolume>> {
        self.open_volume(id, true)?.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn open_volume(&self, id: VolumeId, create: bool) -> io::Result<Option<Arc<BaseVolume>>> {
        let mut volumes = self.volumes.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(volume) = volumes.get(&id) {
            return Ok(Some(Arc::clone(volume)));
        }
        let open = |suffix: &str| {
            let path = self.dir.join(format!("{:05}.{suffix}", id.0));
            OpenOptions::new().read(true).write(true).create(create).truncate(false).open(path)
        };
        // The sums are created last, so that their presence says that both are there.
        let data = match open("data") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        let sums = match open("sums") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        if create {
            File::open(&self.dir)?.sync_all()?;
        }
        let name = self.dir.join(format!("{:05}.data", id.0)).display().to_string();
        let volume = Arc::new(BaseVolume { name, data, sums, changing: RwLock::new(()) });
        volumes.insert(id, Arc::clone(&volume));
        Ok(Some(volume))
    }

    /// Reads sectors `start..end` into `out`, which comes zeroed, checking every block it touches.
    ///
    /// # Errors
    /// When a block cannot be read, does not match its sum, or was unreadable at the source.
    pub fn read(
        &self,
        id: VolumeId,
        start: u64,
        end: u64,
        out: &mut [u8],
    ) -> Result<(), ReadError> {
        let volume = self.volume(id).map_err(|error| ReadError::io("the base", error))?;
        volume.map_or(Ok(()), |volume| volume.read(start, end, out))
    }

    /// The stretches of `start..end` by allocation; the list may end early, never empty.
    ///
    /// # Errors
    /// When the sums cannot be read.
    pub fn stretches(&self, id: VolumeId, start: u64, end: u64) -> Result<Vec<Stretch>, ReadError> {
        match self.volume(id).map_err(|error| ReadError::io("the base", error))? {
            Some(volume) => volume
                .stretches(start, end)
                .map_err(|error| ReadError::io(format!("{} (sums)", volume.name), error)),
            None => Ok(vec![Stretch { start, end, zeros: true }]),
        }
    }

    /// Bytes of disk that the base takes.
    pub fn allocated_bytes(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let entries = std::fs::read_dir(&self.dir).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.metadata().ok()).map(|meta| meta.blocks() * 512).sum()
    }
}

impl BaseVolume {
    fn read(&self, start: u64, end: u64, out: &mut [u8]) -> Result<(), ReadError> {
        let (first, last) = (start / BLOCK_SECTORS, end.div_ceil(BLOCK_SECTORS));
        let io = |error| ReadError::io(&self.name, error);
        let _still = self.changing.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        let sums = self.read_sums(first, last).map_err(io)?;
        let mut block = vec![0; BLOCK_BYTES as usize];
        for (number, sum) in (first..last).zip(sums) {
            if sum == SUM_ZEROS {
                continue;
            }
            let from = (number * BLOCK_SECTORS).max(start);
            let to = ((number + 1) * BLOCK_SECTORS).min(end);
            if sum == SUM_UNREADABLE {
                return Err(ReadError::Unreadable { start: from, end: to });
            }
            read_sparse(&self.data, &mut block, number * BLOCK_BYTES).map_err(io)?;
            if sum_of(&block) != sum {
                return Err(ReadError::Damaged(format!(
                    "{}, block {number} at byte {}: the content does not match its checksum",
                    self.name,
                    number * BLOCK_BYTES
                )));
            }
            let at = ((from - start) * SECTOR_BYTES) as usize;
            let skip = ((from - number * BLOCK_SECTORS) * SECTOR_BYTES) as usize;
            let bytes = ((to - from) * SECTOR_BYTES) as usize;
            out[at..at + bytes].copy_from_slice(&block[skip..skip + bytes]);
        }
        Ok(())
    }

    fn stretches(&self, start: u64, end: u64) -> io::Result<Vec<Stretch>> {
        let mut stretches: Vec<Stretch> = Vec::new();
        let mut push = |start, end, zeros| match stretches.last_mut() {
            Some(last) if last.zeros == zeros => last.end = end,
            _ => stretches.push(Stretch { start, end, zeros }),
        };
        let hole_end = seek_data(&self.sums, start / BLOCK_SECTORS * SUM_BYTES)?
            .map_or(end, |at| (at / SUM_BYTES * BLOCK_SECTORS).min(end));
        let mut at = start;
        if hole_end > start {
            push(start, hole_end, true);
            at = hole_end;
        }
        let last = end.div_ceil(BLOCK_SECTORS).min(at / BLOCK_SECTORS + LOOK_BLOCKS_MAX);
        let _still = self.changing.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        for sum in self.read_sums(at / BLOCK_SECTORS, last)? {
            let stop = ((at / BLOCK_SECTORS + 1) * BLOCK_SECTORS).min(end);
            if at < stop {
                push(at, stop, sum == SUM_ZEROS);
            }
            at = stop;
        }
        Ok(stretches)
    }

    fn read_sums(&self, first: u64, last: u64) -> io::Result<Vec<u64>> {
        let mut bytes = vec![0; (last.saturating_sub(first) * SUM_BYTES) as usize];
        read_sparse(&self.sums, &mut bytes, first * SUM_BYTES)?;
        let sum = |b: &[u8]| u64::from_le_bytes(b.try_into().unwrap_or_default());
        Ok(bytes.chunks_exact(SUM_BYTES as usize).map(sum).collect())
    }
}

/// Reads what the file has; what lies beyond its end is zeros.
fn read_sparse(file: &File, mut out: &mut [u8], mut at: u64) -> io::Result<()> {
    while !out.is_empty() {
        match file.read_at(out, at) {
            Ok(0) => {
                out.fill(0);
                return Ok(());
            }
            Ok(bytes) => {
                out = &mut out[bytes..];
                at += bytes as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Where the next allocated byte is, at or after `from`; none when there is none.
fn seek_data(file: &File, from: u64) -> io::Result<Option<u64>> {
    let from = i64::try_from(from).map_err(io::Error::other)?;
    // SAFETY: a plain system call on an open descriptor; it touches no memory of ours. The file
    // offset it moves is used by nobody: all reads and writes name theirs.
    let at = unsafe { libc::lseek(file.as_raw_fd(), from, libc::SEEK_DATA) };
    if at >= 0 {
        return Ok(Some(at.unsigned_abs()));
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        error => Err(error),
    }
}
