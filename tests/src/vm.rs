//! Guests: emulated machines with a real Debian kernel, for what this machine's own kernel cannot show (ublk,
//! kernel NBD, units, udev rules, mounts, power cuts).
//!
//! A test calls [`Lab::run`]; the lab starts [`Guest`]s, which run commands and take and give files. A *fast*
//! guest is busybox and the named programs on a RAM disk; a *Debian* guest is a whole system with systemd and
//! udev on a throw-away overlay of the image that `cargo xtask setup` made. All is emulated (TCG): figures
//! from inside are good for ratios only.
//!
//! Everything has a time limit, guests die with the test, and what they said on their consoles stays in
//! `target/vm/TEST/GUEST.log`.

mod channel;
mod cpio;
mod emulator;
mod guest;
mod hardware;
mod initramfs;
mod network;
pub mod protocol;
mod slots;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::{env, thread};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;
use xtask::cache::{Cache, Kernel};

pub use guest::{Guest, GuestBuilder, Job};
pub use hardware::{Disk, Hardware};
pub use network::{Network, NetworkEnd};
pub use protocol::Output;
use slots::Slots;

/// What a kernel says on its console when it is broken, whatever a test asserts.
const KERNEL_FAILURES: &[&str] = &["Kernel panic", "BUG: ", "Oops: ", "general protection fault"];

/// How many of a console's last lines a failed test shows.
const TAIL_LINES: usize = 40;

/// The place of one test's guests: their files, their networks, and the right to run them.
pub struct Lab {
    directory: PathBuf,
    shared_directory: PathBuf,
    /// For sockets, whose paths must be short.
    sockets: TempDir,
    cache: Cache,
    kernel: Kernel,
    networks: AtomicU8,
    passed: AtomicBool,
    _slots: Slots,
}

impl Lab {
    /// Runs a test that has at most `guests` (1 or 2) guests running at a time. Its name is also that of its
    /// directory, so no two tests may share one. Fails with the test, or if a guest's kernel reported a fault,
    /// after showing the consoles' ends.
    pub fn run(name: &str, guests: usize, test: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
        let shared_directory = target_directory()?.join("vm");
        let slots = Slots::take(&shared_directory.join("slots"), guests)?;
        let directory = shared_directory.join(name);
        if directory.exists() {
            fs::remove_dir_all(&directory)?;
        }
        fs::create_dir_all(&directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
        let cache = Cache::locate()?;
        let lab = Lab {
            directory,
            shared_directory,
            sockets: tempfile::Builder::new().prefix("tidemark-vm-").tempdir()?,
            kernel: cache.kernel()?,
            cache,
            networks: AtomicU8::new(0),
            passed: AtomicBool::new(false),
            _slots: slots,
        };
        test(&lab)?;
        lab.check_consoles()?;
        lab.passed.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// A guest to be configured and booted. `name` is unique in this lab.
    pub fn guest(&self, name: &str) -> GuestBuilder<'_> {
        GuestBuilder::new(self, name)
    }

    /// A network of two ends.
    pub fn network(&self) -> Result<Network> {
        Network::new(self.networks.fetch_add(1, Ordering::Relaxed))
    }

    /// Makes a sparse file for a disk.
    pub fn disk_file(&self, name: &str, size_bytes: u64) -> Result<PathBuf> {
        let path = self.directory.join(name);
        File::create_new(&path)
            .and_then(|file| file.set_len(size_bytes))
            .with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    }

    fn check_consoles(&self) -> Result<()> {
        for path in self.consoles()? {
            let text = String::from_utf8_lossy(&fs::read(&path)?).into_owned();
            let broken = |line: &&str| KERNEL_FAILURES.iter().any(|failure| line.contains(failure));
            if let Some(line) = text.lines().find(broken) {
                bail!("the kernel in {} reported {line:?}", path.display());
            }
        }
        Ok(())
    }

    fn consoles(&self) -> Result<Vec<PathBuf>> {
        let entries: std::io::Result<Vec<_>> = fs::read_dir(&self.directory)?.collect();
        let paths = entries?.into_iter().map(|entry| entry.path());
        Ok(paths.filter(|path| path.extension().is_some_and(|name| name == "log")).collect())
    }

    /// The lab's own directory. Only `*.log` stays in it after the test.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// A directory with a short path, for Unix sockets.
    pub fn socket_directory(&self) -> &Path {
        self.sockets.path()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let failed = !self.passed.load(Ordering::Relaxed) || thread::panicking();
        let Ok(entries) = fs::read_dir(&self.directory) else { return };
        for path in entries.flatten().map(|entry| entry.path()) {
            if path.extension().is_some_and(|extension| extension == "log") {
                if failed {
                    eprintln!("--- the end of {}", path.display());
                    eprintln!("{}", tail(&path));
                }
            } else if path.is_file() {
                // Disks and RAM disks; a leftover is removed by the next run.
                let _ = fs::remove_file(path);
            }
        }
    }
}

/// Boots two guests at the same time.
pub fn boot_both(one: GuestBuilder, other: GuestBuilder) -> Result<(Guest, Guest)> {
    thread::scope(|scope| {
        let other = scope.spawn(|| other.boot());
        let one = one.boot();
        let Ok(other) = other.join() else { bail!("the thread that boots a guest panicked") };
        Ok((one?, other?))
    })
}

/// A program built with this one: `target/PROFILE/NAME`.
pub fn program(name: &str) -> Result<PathBuf> {
    let path = profile_directory()?.join(name);
    if !path.exists() {
        bail!(
            "{} is not built: run `cargo build --workspace --bins` in the tests' profile",
            path.display()
        );
    }
    Ok(path)
}

/// `target/PROFILE`, which holds the programs; the tests themselves are in `deps` below it.
fn profile_directory() -> Result<PathBuf> {
    let own = env::current_exe()?;
    let deps = own.parent().context("this program has no directory")?;
    let directory = if deps.ends_with("deps") { deps.parent() } else { Some(deps) };
    Ok(directory.context("this program is not in a target directory")?.to_owned())
}

fn target_directory() -> Result<PathBuf> {
    Ok(profile_directory()?.parent().context("there is no target directory")?.to_owned())
}

fn tail(path: &Path) -> String {
    let text = fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let text = text.unwrap_or_else(|error| error.to_string());
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}
