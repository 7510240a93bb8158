//! What the target needs of the machine it runs on: files, the wall clock, chance, and threads for
//! what blocks.
//!
//! All that the target keeps goes through here, so that the same code runs on a simulated disk
//! (the feature `simulation`) where every crash can be tried. Without that feature [`Machine`] and
//! [`File`] have one variant and are what the standard library gives. The log's own writes go past
//! the page cache through the seam of `tidemark-link`; [`log`] chooses between the two.
//!
//! Time that passes is tokio's, which a simulation can stop and turn, or, where it must go on while the
//! machine sleeps, the boot clock's.

mod file;
pub mod log;
#[cfg(feature = "simulation")]
pub mod simulated;

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use tidemark_journal::TermId;

pub use file::{File, How};

/// The machine that a target runs on. Clones are the same machine.
#[derive(Clone, Default)]
pub enum Machine {
    /// This one.
    #[default]
    Real,
    /// One that is played.
    #[cfg(feature = "simulation")]
    Simulated(std::sync::Arc<simulated::Simulated>),
}

/// A name in a directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DirEntry {
    /// The name.
    pub name: String,
    /// Whether it is a directory.
    pub is_dir: bool,
}

impl Machine {
    /// Opens a file.
    ///
    /// # Errors
    /// Those of open(2).
    pub fn open(&self, path: &Path, how: How) -> io::Result<File> {
        match self {
            Machine::Real => file::open(path, how).map(File::Real),
            #[cfg(feature = "simulation")]
            Machine::Simulated(simulated) => simulated.open(path, how).map(File::Simulated),
        }
    }

    /// Makes a directory and those above it that are not there, and their names durable: what is
    /// kept in a directory lasts no longer than its name.
    ///
    /// # Errors
    /// Those of mkdir(2) and fsync(2).
    pub fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut missing: Vec<&Path> =
            path.ancestors().take_while(|path| !self.exists(path)).collect();
        missing.retain(|path| !path.as_os_str().is_empty());
        match self {
            Machine::Real => fs::create_dir_all(path)?,
            #[cfg(feature = "simulation")]
            Machine::Simulated(simulated) => simulated.disk.create_dir_all(path)?,
        }
        for made in missing.iter().rev() {
            let parent = made.parent().filter(|parent| !parent.as_os_str().is_empty());
            self.sync_dir(parent.unwrap_or(Path::new(".")))?;
        }
        Ok(())
    }

    /// Whether there is something of this path.
    pub fn exists(&self, path: &Path) -> bool {
        match self {
            Machine::Real => path.exists(),
            #[cfg(feature = "simulation")]
            Machine::Simulated(simulated) => simulated.disk.exists(path),
        }
    }

    /// The names in a directory, in any order; those that are not text are left out.
    ///
    /// # Errors
    /// Those of opendir(3).
    pub fn list(&self, dir: &Path) -> io::Result<Vec<DirEntry>> {
        match self {
            Machine::Real => {
                let mut names = Vec::new();
                for entry in fs::read_dir(dir)? {
                    let entry = entry?;
                    let is_dir = entry.file_type()?.is_dir();
                    if let Ok(name) = entry.file_name().into_string() {
                        names.push(DirEntry { name, is_dir });
                    }
                }
                Ok(names)
            }
            #[cfg(feature = "simulation")]
            Machine::Simulated(simulated) => simulated.list(dir),
        }
    }

    /// Renames a file inside its directory.
    ///
    /// # Errors
    /// Those of rename(2).
    pub fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        match self {
            Machine::Real => fs::rename(from, to),
            #[cfg(feature = "simulation")]
            Machine::Simulated(simulated) => simulated.disk.rename(from, to),
        }
    }

    /// Removes a file.
    ///
    /// # Errors
    /// Those of unlink(2).
    pub fn remove_file(&self, path: &Path) -> io::Result<()> {
        match self {
            Machine::Real => fs::remove_file(path),
            #[cfg(feature = "simulation")]
            Machine::Simulated(simulated) => simulated.disk.remove_file(path),
        }
    }

    /// Removes a directory with all that is in it, if it is there.
    ///
    /// # Errors
    /// Those of unlink(2) and rmdir(2).
    pub fn remove_dir_all(&self, dir: &Path) -> io::Result<()> {
        let removed = match self {
            Machine::Real => fs::remove_dir_all(dir),
            #[cfg(feature = "simulation")]
            Machine::Simulated(simulated) => simulated.disk.remove_dir_all(dir),
        };
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Makes the names in a directory durable.
    ///
    /// # Errors
    /// Those of open(2) and fsync(2).
    pub fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        match self {
            Machine::Real => fs::File::open(dir)?.sync_all(),
            #[cfg(feature = "simulation")]
            Machine::Simulated(simulated) => simulated.disk.sync_dir(dir),
        }
    }

    /// Makes the name of this path durable.
    ///
    /// # Errors
    /// Those of [`sync_dir`](Self::sync_dir).
    pub fn sync_parent(&self, path: &Path) -> io::Result<()> {
        path.parent().map_or(Ok(()), |dir| self.sync_dir(dir))
    }

    /// Bytes of disk that the files of a directory take.
    pub fn allocated_bytes(&self, dir: &Path) -> u64 {
        match self {
            Machine::Real => {
                use std::os::unix::fs::MetadataExt;
                let entries = fs::read_dir(dir).into_iter().flatten().flatten();
                let blocks = |meta: fs::Metadata| meta.blocks() * 512;
                entries.filter_map(|entry| entry.metadata().ok()).map(blocks).sum()
            }
            #[cfg(feature = "simulation")]
            Machine::Simulated(simulated) => simulated.disk.used_bytes_in(dir),
        }
    }

    /// Bytes of the file system that a directory is on.
    pub fn disk_bytes(&self, dir: &Path) -> u64 {
        match self {
            Machine::Real => nix::sys::statvfs::statvfs(dir)
                .map_or(u64::MAX, |fs| fs.blocks().saturating_mul(fs.fragment_size())),
            #[cfg(feature = "simulation")]
            Machine::Simulated(_) => u64::MAX,
        }
    }

    /// The wall clock, nanoseconds since 1970.
    pub fn wall_ns(&self) -> i64 {
        match self {
            Machine::Real => {
                let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
            }
            #[cfg(feature = "simulation")]
            Machine::Simulated(simulated) => simulated.wall_ns(),
        }
    }

    /// The boot clock, nanoseconds: it goes on while the machine sleeps, and is never set.
    pub fn boot_ns(&self) -> u64 {
        match self {
            Machine::Real => {
                let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
                let time = time.expect("Linux has a boot clock");
                u64::try_from(std::time::Duration::from(time).as_nanos()).unwrap_or(u64::MAX)
            }
            #[cfg(feature = "simulation")]
            Machine::Simulated(simulated) => simulated.boot_ns(),
        }
    }

    /// An id that nobody has had before.
    ///
    /// # Errors
    /// When the kernel has no randomness to give.
    pub fn new_term(&self) -> io::Result<TermId> {
        match self {
            Machine::Real => TermId::random(),
            #[cfg(feature = "simulation")]
            Machine::Simulated(simulated) => Ok(simulated.new_term()),
        }
    }

    /// Begins what blocks on a thread of its own; in a simulation, some time later on the only one.
    pub fn spawn_blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> tokio::task::JoinHandle<T> {
        match self {
            Machine::Real => tokio::task::spawn_blocking(work),
            #[cfg(feature = "simulation")]
            Machine::Simulated(simulated) => {
                let simulated = std::sync::Arc::clone(simulated);
                tokio::spawn(async move {
                    simulated.dawdle().await;
                    work()
                })
            }
        }
    }

    /// Opens a database of the catalogue and verifies all of it, or makes it, durably.
    ///
    /// # Errors
    /// When it cannot be opened or made.
    pub fn open_database(&self, path: &Path) -> Result<redb::Database, redb::Error> {
        let new = !self.exists(path);
        let mut builder = redb::Database::builder();
        builder.set_check_integrity_on_open(true);
        let database = match self {
            Machine::Real => builder.create(path)?,
            #[cfg(feature = "simulation")]
            Machine::Simulated(simulated) => simulated.open_database(path, &builder)?,
        };
        if new {
            let io = |error| redb::Error::Io(error);
            self.sync_parent(path).map_err(io)?;
        }
        Ok(database)
    }
}

/// A name that is not taken yet: the path with another ending.
pub fn free_name(machine: &Machine, path: &Path, ending: &str) -> PathBuf {
    let names = (0..).map(|n| path.with_extension(format!("{ending}-{n}")));
    let mut free = names.filter(|name| !machine.exists(name));
    free.next().unwrap_or_else(|| path.with_extension(ending))
}
