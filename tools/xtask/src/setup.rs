//! Installs what the tests need on a bare Debian 12 or 13; costs well under a second when all is there.
//!
//! Packages come from the machine's own apt sources. The guest kernel and the guest image go to the cache
//! directory (see [`xtask::cache`]); nothing is written into the source tree.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use xtask::cache::{
    Cache, GUEST_PACKAGES, GUEST_RECIPE, KERNEL_PREFIX, Kernel, ROOT_LABEL, host_suite,
};

use crate::process::{capture, run};

mod kernel;

/// Packages that the build, the tests, the measurements and this set-up use.
const PACKAGES: &[&str] = &[
    "busybox-static",
    "ca-certificates",
    "cpio",
    "e2fsprogs",
    "fio",
    "g++", // libFuzzer is C++
    "gcc",
    "iproute2",
    "kmod",
    "libc6-dev",
    "libnbd-bin",
    "mmdebstrap",
    "nbd-client",
    "nbdkit",
    "python3",
    "python3-libnbd",
    "sqlite3",
    "util-linux",
    "valgrind",
    "xfsprogs",
    "xz-utils",
    "zstd",
];

/// Packages that must be of one recent release: bookworm's own QEMU clashes with newer tools, so there they
/// come from backports.
const QEMU_PACKAGES: &[&str] = &["qemu-system-x86", "qemu-utils"];
const QEMU_VERSION_MIN: &str = "1:8.0";

/// The suite that has the 6.12 kernel and a recent QEMU for bookworm.
const BACKPORTS: &str = "bookworm-backports";

/// Brings the machine into the state that the tests need; does nothing that is done already.
pub fn ensure() -> Result<()> {
    let suite = host_suite()?;
    let cache = Cache::locate()?;
    let packages = missing_packages()?;
    let kernel = cache.kernel();
    let complete = packages.is_empty()
        && kernel
            .as_ref()
            .is_ok_and(|kernel| cache.debian_image_path(kernel).is_ok_and(|path| path.exists()));
    if complete {
        return Ok(());
    }
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "packages and guest images can be installed by root only: run `cargo xtask setup` once as root"
        );
    }
    fs::create_dir_all(cache.directory()).with_context(|| {
        format!("cannot make the cache directory {}", cache.directory().display())
    })?;
    let _lock = lock(cache.directory())?;
    install_packages(&suite, &packages)?;
    let kernel = match cache.kernel() {
        Ok(kernel) => kernel,
        Err(_) => install_kernel(&cache, &suite)?,
    };
    let image = cache.debian_image_path(&kernel)?;
    if !image.exists() {
        make_image(&suite, &kernel, &image)?;
    }
    Ok(())
}

/// The `setup` task: [`ensure`] and a line that says what is there.
pub fn ensure_and_say() -> Result<()> {
    ensure()?;
    let cache = Cache::locate()?;
    println!("set up: {}, {}", cache.kernel()?.package, cache.debian_image()?.display());
    Ok(())
}

/// Two set-ups at once would unpack into each other's directories.
fn lock(directory: &Path) -> Result<Flock<File>> {
    let path = directory.join("lock");
    let file = File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .with_context(|| format!("cannot lock {}", path.display()))
}

/// The packages that are not installed, or too old.
fn missing_packages() -> Result<Vec<&'static str>> {
    let wanted: Vec<&str> = PACKAGES.iter().chain(QEMU_PACKAGES).copied().collect();
    // It fails when a package was never known to dpkg, which is one of the answers wanted here.
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat=${Package} ${db:Status-Status} ${Version}\n"])
        .args(&wanted)
        .output()
        .context("cannot start dpkg-query: is this a Debian system?")?;
    let output = String::from_utf8_lossy(&output.stdout);
    let installed: HashMap<&str, &str> = output
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let (name, status, version) = (words.next()?, words.next()?, words.next()?);
            (status == "installed").then_some((name, version))
        })
        .collect();
    Ok(wanted
        .into_iter()
        .filter(|name| match installed.get(name) {
            None => true,
            Some(version) => {
                QEMU_PACKAGES.contains(name)
                    && compare_versions(version, QEMU_VERSION_MIN) == Ordering::Less
            }
        })
        .collect())
}

fn install_packages(suite: &str, missing: &[&str]) -> Result<()> {
    if missing.is_empty() {
        return Ok(());
    }
    println!("set-up: installing {}", missing.join(" "));
    update_lists(suite)?;
    let (qemu, plain): (Vec<&str>, Vec<&str>) =
        missing.iter().partition(|name| QEMU_PACKAGES.contains(name));
    // QEMU first: other packages' dependencies on its tools are then met by the same release.
    if !qemu.is_empty() {
        run(install_command().args(from_backports(suite)).args(QEMU_PACKAGES))?;
    }
    if !plain.is_empty() {
        run(install_command().args(plain))?;
    }
    let left = missing_packages()?;
    if !left.is_empty() {
        bail!("apt-get succeeded, yet these packages are missing or too old: {}", left.join(" "));
    }
    Ok(())
}

fn install_command() -> Command {
    let mut command = apt("apt-get");
    command.args(["-qy", "-o", "DPkg::Lock::Timeout=300", "install", "--no-install-recommends"]);
    command
}

fn apt(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C.UTF-8");
    command
}

fn from_backports(suite: &str) -> &'static [&'static str] {
    if suite == "bookworm" { &["-t", BACKPORTS] } else { &[] }
}

/// Fetches apt's package lists, with bookworm's backports from the mirror that the machine uses already. (apt
/// tells its mirrors only once it has lists.)
fn update_lists(suite: &str) -> Result<()> {
    let update = || run(apt("apt-get").args(["-q", "update"]));
    update()?;
    if suite != "bookworm" || apt_sources()?.iter().any(|source| source.suite == BACKPORTS) {
        return Ok(());
    }
    let mirror = mirror(suite)?;
    let text = format!(
        "Types: deb\nURIs: {mirror}\nSuites: {BACKPORTS}\nComponents: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
    );
    let path = "/etc/apt/sources.list.d/tidemark-backports.sources";
    fs::write(path, text).with_context(|| format!("cannot write {path}"))?;
    update()
}

/// One of the machine's apt sources.
struct Source {
    uri: String,
    suite: String,
    component: String,
}

fn apt_sources() -> Result<Vec<Source>> {
    let format = "$(REPO_URI) $(RELEASE) $(COMPONENT)";
    let text =
        capture(apt("apt-get").args(["indextargets", "--format", format, "Created-By: Packages"]))?;
    Ok(text
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ').map(str::to_owned);
            Some(Source { uri: words.next()?, suite: words.next()?, component: words.next()? })
        })
        .collect())
}

/// The mirror that serves this machine's release.
fn mirror(suite: &str) -> Result<String> {
    apt_sources()?
        .into_iter()
        .find(|source| source.suite == suite && source.component == "main")
        .map(|source| source.uri)
        .with_context(|| {
            format!("apt has no source for {suite} main: add one to /etc/apt/sources.list.d")
        })
}

/// Downloads and unpacks the newest cloud kernel of the series, without installing it on this machine.
fn install_kernel(cache: &Cache, suite: &str) -> Result<Kernel> {
    let mut names = kernel_packages()?;
    if names.is_empty() {
        update_lists(suite)?;
        names = kernel_packages()?;
    }
    let package =
        names.pop().with_context(|| format!("apt knows no {KERNEL_PREFIX}*-cloud-amd64"))?;
    println!("set-up: fetching {package}");
    let work = tempfile::tempdir_in(cache.directory())?;
    if run(apt("apt-get").args(["-q", "download", &package]).current_dir(work.path())).is_err() {
        // The package lists were older than the mirror.
        update_lists(suite)?;
        run(apt("apt-get").args(["-q", "download", &package]).current_dir(work.path()))?;
    }
    let file = only_file(work.path())?;
    let root = work.path().join("kernel");
    run(Command::new("dpkg").arg("-x").arg(&file).arg(&root))?;
    // Since trixie the package's modules are below /usr.
    if !root.join("lib").exists() {
        symlink("usr/lib", root.join("lib"))?;
    }
    let release = package.strip_prefix("linux-image-").unwrap_or(&package);
    run(Command::new("depmod").arg("-b").arg(&root).arg(release))?;
    let compressed = root.join("boot").join(format!("vmlinuz-{release}"));
    kernel::decompress(&compressed, &root.join("vmlinux"))
        .with_context(|| format!("cannot decompress {}", compressed.display()))?;
    fs::write(root.join("name"), format!("{package}\n"))?;
    let place = cache.directory().join("kernel");
    if place.exists() {
        fs::remove_dir_all(&place).with_context(|| format!("cannot remove {}", place.display()))?;
    }
    fs::rename(&root, &place)?;
    cache.kernel()
}

/// The signed cloud kernels of the series that apt knows, oldest first.
fn kernel_packages() -> Result<Vec<String>> {
    let pattern = format!("^{}.*-cloud-amd64$", KERNEL_PREFIX.replace('.', r"\."));
    let text = capture(apt("apt-cache").args(["search", "--names-only", &pattern]))?;
    let mut names: Vec<String> =
        text.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect();
    names.sort_by(|a, b| compare_versions(a, b));
    Ok(names)
}

fn only_file(directory: &Path) -> Result<PathBuf> {
    let entry = fs::read_dir(directory)?.next().context("apt-get downloaded nothing")?;
    Ok(entry?.path())
}

/// Compares two version texts by their runs of digits, which is enough for the versions met here.
fn compare_versions(a: &str, b: &str) -> Ordering {
    fn numbers(text: &str) -> impl Iterator<Item = u64> {
        text.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok())
    }
    numbers(a).cmp(numbers(b))
}

/// Builds the guests' Debian root file system: packages, the kernel's modules, the recipe, one ext4 image.
fn make_image(suite: &str, kernel: &Kernel, image: &Path) -> Result<()> {
    let start = Instant::now();
    let directory = image.parent().context("the image's path has no directory")?;
    remove_old_images(directory)?;
    println!("set-up: building {}, about a minute", image.display());
    let work = tempfile::tempdir_in(directory)?;
    let root = work.path().join("root");
    let kept_out = ["doc/*", "man/*", "locale/*", "info/*"];
    run(Command::new("mmdebstrap")
        .args(["--quiet", "--mode=root", "--variant=essential", "--format=directory"])
        .arg(format!("--include={}", GUEST_PACKAGES.join(",")))
        .arg("--aptopt=APT::Install-Recommends \"false\"")
        .args(kept_out.map(|path| format!("--dpkgopt=path-exclude=/usr/share/{path}")))
        .arg(suite)
        .arg(&root)
        .arg(mirror(suite)?))?;
    run(Command::new("sh").args(["-c", GUEST_RECIPE]).env("ROOT", &root))?;
    run(Command::new("cp")
        .arg("-a")
        .arg(kernel.root.join("lib/modules"))
        .arg(root.join("usr/lib/")))?;
    let raw = work.path().join("image");
    run(Command::new("mke2fs")
        .args([
            "-q",
            "-t",
            "ext4",
            "-m",
            "0",
            "-L",
            ROOT_LABEL,
            "-E",
            "lazy_itable_init=0,root_owner=0:0",
            "-d",
        ])
        .arg(&root)
        .arg(&raw)
        .arg("2G"))?;
    fs::rename(&raw, image)?;
    println!("set-up: built the image in {} s", start.elapsed().as_secs());
    Ok(())
}

/// Images of older recipes are of no use to this tree, and a gigabyte each.
fn remove_old_images(directory: &Path) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("debian-") && name.ends_with(".img") {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::cmp::Ordering;

    use super::compare_versions;

    #[test]
    fn versions_compare_by_number() {
        let kernel = |minor: u32| format!("linux-image-6.12.{minor}+deb12-cloud-amd64");
        assert_eq!(compare_versions(&kernel(9), &kernel(95)), Ordering::Less);
        assert_eq!(compare_versions(&kernel(117), &kernel(95)), Ordering::Greater);
        assert_eq!(compare_versions("1:7.2+dfsg-7+deb12u1", "1:8.0"), Ordering::Less);
        assert_eq!(compare_versions("1:10.0.2+ds-2+deb13u1~bpo12+1", "1:8.0"), Ordering::Greater);
    }
}
