//! The initial RAM file system of guests: busybox, kernel modules and a fixed first program in a base archive
//! that is made once, followed by an archive with what one guest needs.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use xtask::cache::Kernel;

use super::cpio::Archive;
use super::program;

/// Modules for a guest's disks and network.
pub const VIRTIO: &[&str] = &["virtio_blk", "virtio_net"];
/// The same for VMware's hardware.
pub const VMWARE: &[&str] = &["vmw_pvscsi", "sd_mod", "vmxnet3"];
/// What a Debian guest loads by itself and a fast guest has at once.
pub const COMMON: &[&str] = &[
    "tls",
    "nbd",
    "ublk_drv",
    "loop",
    "dm-mod",
    "dm-flakey",
    "dm-delay",
    "dm-log-writes",
    "dm-snapshot",
    "xfs",
];

const INIT: &str = include_str!("init.sh");
const SERVICE: &str = include_str!("guest-server.service");

/// What one guest has beyond the base.
#[derive(Default)]
pub struct Contents<'a> {
    /// Modules to load at the start, by name.
    pub modules: Vec<&'a str>,
    /// Programs of this machine, copied to `/bin` with the libraries they need.
    pub programs: Vec<PathBuf>,
}

/// Writes the initial RAM file system for a guest to `path`; `cache` keeps the base.
pub fn write(path: &Path, cache: &Path, kernel: &Kernel, contents: &Contents) -> Result<()> {
    let mut bytes = fs::read(base(cache, kernel)?)?;
    let mut archive = Archive::default();
    let order: Vec<String> = load_order(kernel, &contents.modules)?
        .iter()
        .filter_map(|module| Some(format!("{}\n", unpacked_name(module)?)))
        .collect();
    archive.file("modules/order", 0o644, order.concat().as_bytes());
    let mut libraries = Vec::new();
    let server = program("guest-server")?;
    for source in contents.programs.iter().chain([&server]) {
        let name = source.file_name().context("a program's path has no name")?.to_string_lossy();
        let content =
            fs::read(source).with_context(|| format!("cannot read {}", source.display()))?;
        archive.file(&format!("bin/{name}"), 0o755, &content);
        libraries.extend(needed_libraries(source)?);
    }
    libraries.sort();
    libraries.dedup();
    for library in libraries {
        archive.file(&library, 0o755, &fs::read(&library)?);
    }
    bytes.extend(archive.finish());
    fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

/// The base archive's file, made if this kernel's does not exist.
fn base(cache: &Path, kernel: &Kernel) -> Result<PathBuf> {
    let all = [VIRTIO, VMWARE, COMMON].concat();
    let mut hasher = DefaultHasher::new();
    (INIT, SERVICE, &all).hash(&mut hasher);
    let path = cache.join(format!("base-{}-{:016x}.cpio", kernel.release, hasher.finish()));
    if path.exists() {
        return Ok(path);
    }
    let mut archive = Archive::default();
    for directory in ["dev", "proc", "sys", "tmp", "run", "root", "mnt", "var/lib", "etc", "sbin"] {
        archive.directory(directory);
    }
    archive.file("init", 0o755, INIT.as_bytes());
    archive.file("guest-server.service", 0o644, SERVICE.as_bytes());
    archive.symlink("etc/mtab", "/proc/mounts");
    archive.file("bin/busybox", 0o755, &fs::read("/bin/busybox").context("no busybox")?);
    let applets = output(Command::new("/bin/busybox").arg("--list"))?;
    for applet in String::from_utf8_lossy(&applets).lines().filter(|name| *name != "busybox") {
        archive.symlink(&format!("bin/{applet}"), "busybox");
    }
    for module in load_order(kernel, &all)? {
        let name = unpacked_name(&module).context("a module's path has no name")?;
        archive.file(
            &format!("modules/{name}"),
            0o644,
            &output(Command::new("xz").arg("-dc").arg(&module))?,
        );
    }
    // Another test may be making the same file: whoever comes last replaces it by its like.
    let work = tempfile::NamedTempFile::new_in(cache)?;
    fs::write(work.path(), archive.finish())?;
    fs::set_permissions(work.path(), fs::Permissions::from_mode(0o644))?;
    work.persist(&path)?;
    Ok(path)
}

/// The files of modules and of all they depend on, in an order in which they can be loaded.
fn load_order(kernel: &Kernel, modules: &[&str]) -> Result<Vec<PathBuf>> {
    if modules.is_empty() {
        return Ok(Vec::new());
    }
    let listed = output(
        Command::new("modprobe")
            .arg("--dirname")
            .arg(&kernel.root)
            .args(["--set-version", &kernel.release, "--show-depends", "--all"])
            .args(modules),
    )?;
    let mut order = Vec::new();
    for line in String::from_utf8_lossy(&listed).lines() {
        // "insmod PATH [OPTION...]" or "builtin NAME"
        if let Some(path) = line.strip_prefix("insmod ").and_then(|rest| rest.split(' ').next()) {
            let path = PathBuf::from(path);
            if !order.contains(&path) {
                order.push(path);
            }
        }
    }
    Ok(order)
}

/// `x.ko` for `/some/where/x.ko.xz`.
fn unpacked_name(module: &Path) -> Option<String> {
    let name = module.file_name()?.to_str()?;
    Some(name.strip_suffix(".xz").unwrap_or(name).to_owned())
}

/// The paths of the shared libraries, and the loader, that a program needs.
fn needed_libraries(program: &Path) -> Result<Vec<String>> {
    let listing = Command::new("ldd").arg(program).stdin(Stdio::null()).output()?;
    let listing = String::from_utf8_lossy(&listing.stdout).into_owned();
    if let Some(line) = listing.lines().find(|line| line.ends_with("not found")) {
        bail!("{} needs {}", program.display(), line.trim());
    }
    // "libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x...)", "/lib64/ld-linux-x86-64.so.2 (0x...)"
    Ok(listing
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(str::to_owned)
        .collect())
}

fn output(command: &mut Command) -> Result<Vec<u8>> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(output.stdout)
}
