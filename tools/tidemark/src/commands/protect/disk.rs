//! A disk that is to be protected.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use tidemark_agent::kernel::blockdev::{self, BackingError, Inspection, Usage};
use tidemark_agent::kernel::udev::{self, Names};
use tidemark_control::config::Name;

use super::{files, hide_rule_path};
use crate::cli::VolumeArgument;

/// A disk nobody uses.
pub struct Disk {
    /// The volume's name.
    pub name: Name,
    /// The most lasting path of it.
    pub backing: PathBuf,
    /// What it is.
    pub inspection: Inspection,
}

impl Disk {
    /// Looks whether it can be protected, without touching it.
    ///
    /// # Errors
    /// It cannot; for one in use the exact steps to change that.
    pub fn look(group: &str, volume: &VolumeArgument) -> Result<Disk> {
        let path = &volume.path;
        let real = fs::canonicalize(path)
            .with_context(|| format!("there is no disk {}", path.display()))?;
        let inspection = blockdev::inspect(&real)?;
        if inspection.abilities.read_only {
            return Err(BackingError::ReadOnly { path: path.clone() }.into());
        }
        if is_protected_device(&inspection.identity.kernel_name) {
            bail!("{} is itself a protected device", path.display());
        }
        let users = blockdev::users(&real)
            .with_context(|| format!("cannot tell who uses {}", path.display()))?;
        if !users.is_empty() {
            return Err(anyhow!(steps(group, volume, &users)));
        }
        let backing = match inspection.device {
            None => real,
            Some(_) => lasting_path(path, &real),
        };
        Ok(Disk { name: volume.name.clone(), backing, inspection })
    }

    /// Its name in the kernel; none for an image.
    pub fn kernel_name(&self) -> Option<&str> {
        self.inspection.device.map(|_| self.inspection.identity.kernel_name.as_str())
    }

    /// The udev rules that keep others off it, and where they go; none where nobody would look.
    pub fn hide_rule(&self, group: &str) -> Result<Option<(PathBuf, String)>> {
        let Some(kernel_name) = self.kernel_name().filter(|_| files::udev_runs()) else {
            return Ok(None);
        };
        let links = Names::default().links(kernel_name).unwrap_or_default();
        let name = self.name.as_str();
        let rule = udev::hide_rule(&self.inspection, &links, group, name)?;
        Ok(Some((hide_rule_path(group, name)?, rule)))
    }
}

/// The agent notes the kernel names of its devices.
fn is_protected_device(kernel_name: &str) -> bool {
    !kernel_name.is_empty() && Path::new("/run/tidemark/devices").join(kernel_name).exists()
}

/// The path that still means this disk after a reboot.
fn lasting_path(given: &Path, real: &Path) -> PathBuf {
    let linked = fs::symlink_metadata(given).is_ok_and(|metadata| metadata.is_symlink());
    if linked && given.is_absolute() {
        // The caller has chosen a name: by-id, a logical volume, a mapping.
        return given.to_owned();
    }
    let rank = |name: &str| match name {
        _ if name.starts_with("wwn-") || name.starts_with("nvme-eui.") => Some(0),
        _ if name.starts_with("lvm-pv-") || name.starts_with("md-") => None,
        _ => Some(1),
    };
    let entries = fs::read_dir("/dev/disk/by-id").into_iter().flatten().flatten();
    entries
        .filter(|entry| fs::canonicalize(entry.path()).is_ok_and(|found| found == real))
        .filter_map(|entry| {
            let rank = rank(entry.file_name().to_str()?)?;
            Some((rank, entry.path()))
        })
        .min()
        .map_or_else(|| real.to_owned(), |(_, path)| path)
}

/// What to do about a disk in use.
fn steps(group: &str, volume: &VolumeArgument, users: &[Usage]) -> String {
    let path = volume.path.display();
    let mut out = format!("{path} is in use, and its protected device must take its place first:");
    let mut step = 0;
    let mut add = |text: String| {
        step += 1;
        let _ = write!(out, "\n  {step}. {text}");
    };
    let mut mounts = Vec::new();
    for user in users {
        match user {
            Usage::Mounted { device, mount_point } => {
                add(format!(
                    "stop what uses {at}, then run: umount {at}",
                    at = mount_point.display()
                ));
                mounts.push((device, mount_point));
            }
            Usage::Swap { device } => add(format!("run: swapoff {}", device.display())),
            Usage::Loop { device } => add(format!("run: losetup -d {}", device.display())),
            Usage::Holder { device, holder, name } => add(format!(
                "{} belongs to {}: protect that instead, or take it apart",
                device.display(),
                name.as_ref().unwrap_or(holder)
            )),
            Usage::Process { pid, name } => add(format!("stop process {pid} ({name})")),
        }
    }
    add("run this command again".to_owned());
    for (device, mount_point) in mounts {
        let protected = format!("/dev/tidemark/{group}/{}{}", volume.name, part_suffix(device));
        add(format!(
            "in /etc/fstab, mount {protected} on {at} in place of {device} (or of its UUID), with \
             the option _netdev, then run: mount {at}",
            device = device.display(),
            at = mount_point.display(),
        ));
    }
    out
}

/// `-part1` for the first partition of the disk.
fn part_suffix(device: &Path) -> String {
    let name = device.file_name().unwrap_or_default();
    let file = Path::new("/sys/class/block").join(name).join("partition");
    fs::read_to_string(file).map_or_else(|_| String::new(), |n| format!("-part{}", n.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mounted_disk_gets_exact_steps() {
        let volume: VolumeArgument = "data=/dev/sdz".parse().unwrap();
        let users = [
            Usage::Mounted { device: "/dev/sdz".into(), mount_point: "/srv/data".into() },
            Usage::Process { pid: 7, name: "db".into() },
        ];
        assert_eq!(
            steps("shop", &volume, &users),
            "/dev/sdz is in use, and its protected device must take its place first:\n\
             \x20 1. stop what uses /srv/data, then run: umount /srv/data\n\
             \x20 2. stop process 7 (db)\n\
             \x20 3. run this command again\n\
             \x20 4. in /etc/fstab, mount /dev/tidemark/shop/data on /srv/data in place of /dev/sdz \
             (or of its UUID), with the option _netdev, then run: mount /srv/data"
        );
    }

    #[test]
    fn an_image_is_known_by_its_whole_path() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("disk.img");
        fs::write(&image, [0; 1024]).unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&image, &link).unwrap();
        let look = |path: &Path| {
            Disk::look("g", &VolumeArgument { name: "d".parse().unwrap(), path: path.to_owned() })
        };
        let disk = look(&link).unwrap();
        assert_eq!(disk.backing, fs::canonicalize(&image).unwrap());
        assert!(disk.hide_rule("g").unwrap().is_none());
        let missing = look(&directory.path().join("none")).err().unwrap();
        assert!(format!("{missing:#}").starts_with("there is no disk"), "{missing:#}");
        fs::write(&image, [0; 700]).unwrap();
        assert!(look(&image).err().unwrap().to_string().contains("is 700 bytes"));
    }
}
