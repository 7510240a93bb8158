//! Where set-up keeps the guest kernel and the Debian image, and how the tests find them.
//!
//! The directory is `$TIDEMARK_CACHE`, else `$XDG_CACHE_HOME/tidemark`, else `~/.cache/tidemark`. It holds
//!
//! - `kernel/`: an unpacked Debian kernel package: `name` (the package), `vmlinux` (the kernel, decompressed, which
//!   saves each emulated start a second), `lib/modules/RELEASE/`;
//! - `debian-SUITE-KEY.img`: a raw ext4 root file system for guests, never written by them. `KEY` covers its
//!   recipe and the kernel, so a change of either makes a new image.

use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::{Context, Result, bail};

/// The label of the Debian image's file system, by which a guest's first program finds its root.
pub const ROOT_LABEL: &str = "tidemark-root";

/// The kernel series the guests run. Older ones have no ublk; a newer one would be another test.
pub const KERNEL_PREFIX: &str = "linux-image-6.12.";

/// Debian packages in the guest image, beyond the essential ones.
pub const GUEST_PACKAGES: &[&str] = &[
    "dbus",
    "dmsetup",
    "e2fsprogs",
    "fio",
    "iproute2",
    "iputils-ping",
    "kmod",
    "libnbd-bin",
    "nbd-client",
    "procps",
    "python3-libnbd",
    "python3-minimal",
    "qemu-utils",
    "sqlite3",
    "systemd-sysv",
    "udev",
    "util-linux",
    "xfsprogs",
];

/// What is written into the guest image after its packages; a shell script run with `$ROOT` set.
///
/// Everything here is either needed to be reached (root without a password, no getty to wait for) or saves
/// seconds of emulated start-up; nothing of it touches storage, so that units, udev rules and fstab are real.
pub const GUEST_RECIPE: &str = r#"
set -eu
echo guest >"$ROOT/etc/hostname"
printf '127.0.0.1 localhost guest\n' >"$ROOT/etc/hosts"
echo 0123456789abcdef0123456789abcdef >"$ROOT/etc/machine-id"
printf 'LABEL=tidemark-root / ext4 noatime 0 0\n' >"$ROOT/etc/fstab"
chroot "$ROOT" passwd -d root >/dev/null
mkdir -p "$ROOT/etc/systemd/journald.conf.d" "$ROOT/etc/systemd/system.conf.d"
printf '[Journal]\nStorage=volatile\nForwardToConsole=no\n' >"$ROOT/etc/systemd/journald.conf.d/guest.conf"
printf '[Manager]\nShowStatus=no\nDefaultTimeoutStartSec=300s\nDefaultTimeoutStopSec=120s\nDefaultDeviceTimeoutSec=300s\n' \
  >"$ROOT/etc/systemd/system.conf.d/guest.conf"
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service \
  fstrim.timer getty.target getty@tty1.service serial-getty@ttyS0.service systemd-timesyncd.service \
  systemd-random-seed.service systemd-update-utmp.service systemd-update-utmp-runlevel.service \
  systemd-user-sessions.service systemd-logind.service systemd-pcrphase.service systemd-pcrphase-sysinit.service \
  modprobe@efi_pstore.service modprobe@drm.service modprobe@fuse.service modprobe@configfs.service \
  sys-kernel-debug.mount sys-kernel-tracing.mount dev-hugepages.mount dev-mqueue.mount \
  kmod-static-nodes.service systemd-binfmt.service proc-sys-fs-binfmt_misc.automount \
  systemd-sysusers.service systemd-journal-flush.service systemd-tmpfiles-clean.timer \
  ldconfig.service systemd-journal-catalog-update.service systemd-hwdb-update.service \
  systemd-update-done.service systemd-udev-load-credentials.service \
  systemd-ask-password-console.path systemd-ask-password-wall.path sys-fs-fuse-connections.mount \
  modprobe@dm_mod.service modprobe@loop.service nbd-client.service; do
  ln -sf /dev/null "$ROOT/etc/systemd/system/$unit"
done
# hardware that QEMU's PC has and no test uses, and processor features that the kernel's own code replaces
for module in ata_generic ata_piix button evdev kvm kvm_amd kvm_intel libata qemu_fw_cfg serio_raw \
  aesni_intel crc32_pclmul crct10dif_pclmul ghash_clmulni_intel polyval_clmulni \
  sha1_ssse3 sha256_ssse3 sha512_ssse3; do
  echo "blacklist $module"
done >"$ROOT/etc/modprobe.d/guest.conf"
ln -sf /lib/systemd/system/multi-user.target "$ROOT/etc/systemd/system/default.target"
"#;

/// The cache directory of this machine.
#[derive(Clone, Debug)]
pub struct Cache {
    directory: PathBuf,
}

/// An unpacked Debian kernel package.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The package's name, such as `linux-image-6.12.95+deb12-cloud-amd64`.
    pub package: String,
    /// The kernel's release, the name of its directory of modules.
    pub release: String,
    /// The decompressed kernel that QEMU starts.
    pub image: PathBuf,
    /// The directory that holds `lib/modules/RELEASE`, with its dependency index made.
    pub root: PathBuf,
}

impl Cache {
    /// The cache directory named by the environment; it need not exist.
    pub fn locate() -> Result<Cache> {
        let named =
            |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let directory = named("TIDEMARK_CACHE")
            .or_else(|| named("XDG_CACHE_HOME").map(|base| base.join("tidemark")))
            .or_else(|| named("HOME").map(|home| home.join(".cache/tidemark")))
            .context("neither TIDEMARK_CACHE nor HOME is set: set TIDEMARK_CACHE to a directory of your choice")?;
        Ok(Cache { directory })
    }

    /// The directory itself.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The guest kernel that set-up unpacked.
    pub fn kernel(&self) -> Result<Kernel> {
        let root = self.directory.join("kernel");
        let package = fs::read_to_string(root.join("name")).with_context(|| {
            format!("no guest kernel in {}: run `cargo xtask setup`", root.display())
        })?;
        let package = package.trim().to_owned();
        let release = package.strip_prefix("linux-image-").unwrap_or(&package).to_owned();
        let image = root.join("vmlinux");
        for needed in [&image, &root.join("lib/modules").join(&release).join("modules.dep")] {
            if !needed.exists() {
                bail!(
                    "{} is missing: remove {} and run `cargo xtask setup`",
                    needed.display(),
                    root.display()
                );
            }
        }
        Ok(Kernel { package, release, image, root })
    }

    /// Where the Debian image for this machine's release and kernel is, or is to be.
    pub fn debian_image_path(&self, kernel: &Kernel) -> Result<PathBuf> {
        let recipe = format!("{} {:?} {GUEST_RECIPE}", kernel.package, GUEST_PACKAGES);
        Ok(self.directory.join(format!(
            "debian-{}-{:016x}.img",
            host_suite()?,
            fnv1a(recipe.as_bytes())
        )))
    }

    /// The Debian image that set-up made.
    pub fn debian_image(&self) -> Result<PathBuf> {
        let path = self.debian_image_path(&self.kernel()?)?;
        if !path.exists() {
            bail!("no Debian image at {}: run `cargo xtask setup`", path.display());
        }
        Ok(path)
    }
}

/// The code name of this machine's Debian release. Guests run the same one, so that programs built here find
/// the C library they were linked with.
pub fn host_suite() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    let value = |key: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
            .map(|value| value.trim_matches('"').to_owned())
    };
    match (value("ID").as_deref(), value("VERSION_CODENAME")) {
        (Some("debian"), Some(suite)) if ["bookworm", "trixie"].contains(&suite.as_str()) => {
            Ok(suite)
        }
        (id, suite) => bail!(
            "this is {} {}: the tests set themselves up on Debian 12 (bookworm) and 13 (trixie) only",
            id.unwrap_or("an unknown system"),
            suite.unwrap_or_default()
        ),
    }
}

/// A short stable name for a recipe; collisions only matter between recipes kept on one machine.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
