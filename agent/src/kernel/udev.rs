//! Names: the stable name of a protected volume's device, and hiding the raw disk below it.
//!
//! **Stable name.** Before a device appears, the agent writes `/run/tidemark/devices/KERNELNAME`
//! with one line, `TIDEMARK_NAME=GROUP/VOLUME`; the packaged rule `61-tidemark.rules` imports that
//! file and makes `/dev/tidemark/GROUP/VOLUME`. No program runs in udev for it, so nothing there can
//! wait for the device it is about. Where no udev runs, [`Names::publish`] makes the link itself.
//!
//! **Hiding.** The raw disk and the device in front of it carry the same filesystem, LVM and RAID
//! identities, and a mount or activation of the raw disk would bypass capture. [`hide_rule`] is a
//! rules file for one disk, written when it is protected: udev then does not look at the disk's
//! content, and systemd, udisks and LVM's activation leave it alone. Links that name the disk itself
//! (`by-id`, `by-path`) are kept, for the agent opens it by them.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

use super::blockdev::{Identity, Inspection};

/// The runtime directory, device directory and udev of this machine.
#[derive(Clone, Debug)]
pub struct Names {
    run: PathBuf,
    dev: PathBuf,
    sys: PathBuf,
    udev_control: PathBuf,
}

impl Default for Names {
    fn default() -> Self {
        Self {
            run: "/run/tidemark/devices".into(),
            dev: "/dev".into(),
            sys: "/sys/class/block".into(),
            udev_control: "/run/udev/control".into(),
        }
    }
}

impl Names {
    /// Gives the device `kernel_name` (such as `ublkb0`), which need not exist yet, its stable name.
    /// Returns the path of the name.
    ///
    /// # Errors
    /// Names that are not plain, or the runtime directory cannot be written.
    pub fn publish(&self, kernel_name: &str, group: &str, volume: &str) -> io::Result<PathBuf> {
        for name in [kernel_name, group, volume] {
            check_plain(name)?;
        }
        std::fs::create_dir_all(&self.run)?;
        let temporary = self.run.join(format!(".{kernel_name}"));
        std::fs::write(&temporary, imported(group, volume))?;
        std::fs::rename(&temporary, self.run.join(kernel_name))?;
        let link = self.dev.join("tidemark").join(group).join(volume);
        if !self.udev_runs() {
            self.link(&link, kernel_name)?;
        }
        Ok(link)
    }

    /// Has udev look at an existing device again, after its name or content changed.
    ///
    /// # Errors
    /// No such device, or not allowed.
    pub fn trigger(&self, kernel_name: &str) -> io::Result<()> {
        check_plain(kernel_name)?;
        std::fs::write(self.sys.join(kernel_name).join("uevent"), "change")
    }

    /// Takes the name away again, unless the device has been given another since.
    ///
    /// # Errors
    /// The runtime directory cannot be read or written.
    pub fn withdraw(&self, kernel_name: &str, group: &str, volume: &str) -> io::Result<()> {
        for name in [kernel_name, group, volume] {
            check_plain(name)?;
        }
        let named = self.run.join(kernel_name);
        match std::fs::read_to_string(&named) {
            Ok(text) if text == imported(group, volume) => std::fs::remove_file(&named)?,
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let link = self.dev.join("tidemark").join(group).join(volume);
        match std::fs::read_link(&link) {
            Ok(to) if !self.udev_runs() && to == link_to(kernel_name) => {
                std::fs::remove_file(&link)
            }
            _ => Ok(()),
        }
    }

    /// The links below `/dev` that name the device itself (`disk/by-id`, `disk/by-path`), relative
    /// to it and sorted: what [`hide_rule`] keeps.
    ///
    /// # Errors
    /// No such device.
    pub fn links(&self, kernel_name: &str) -> io::Result<Vec<String>> {
        check_plain(kernel_name)?;
        let device = self.dev.join(kernel_name).canonicalize()?;
        let mut links = Vec::new();
        for directory in ["disk/by-id", "disk/by-path"] {
            // Absent where no disk has such a name.
            let Ok(entries) = std::fs::read_dir(self.dev.join(directory)) else { continue };
            for entry in entries.flatten() {
                if entry.path().canonicalize().is_ok_and(|to| to == device) {
                    links.push(format!("{directory}/{}", entry.file_name().to_string_lossy()));
                }
            }
        }
        links.sort();
        Ok(links)
    }

    fn udev_runs(&self) -> bool {
        self.udev_control.exists()
    }

    fn link(&self, link: &Path, kernel_name: &str) -> io::Result<()> {
        if let Some(directory) = link.parent() {
            std::fs::create_dir_all(directory)?;
        }
        absent_is_fine(std::fs::remove_file(link))?;
        std::os::unix::fs::symlink(link_to(kernel_name), link)
    }
}

/// What the rule imports.
fn imported(group: &str, volume: &str) -> String {
    format!("TIDEMARK_NAME={group}/{volume}\n")
}

fn link_to(kernel_name: &str) -> PathBuf {
    Path::new("../..").join(kernel_name)
}

/// File name for [`hide_rule`]'s text in `/etc/udev/rules.d`. It sorts behind the rules that
/// identify device-mapper devices (10, 11) and before those that look at content (13, 60).
///
/// # Errors
/// Names that are not plain.
pub fn hide_rule_file(group: &str, volume: &str) -> io::Result<String> {
    check_plain(group)?;
    check_plain(volume)?;
    Ok(format!("12-tidemark-hide-{group}-{volume}.rules"))
}

/// The rules that hide one disk (and its partitions), recognised by what identifies it best:
/// device-mapper UUID, world-wide name, serial number, or place. `links` are its present links
/// below `/dev`, as [`Names::links`] finds them; those made from its content are not
/// kept. Load with `udevadm control --reload`, then trigger the disk.
///
/// # Errors
/// An image file (which nothing else looks at), or names that are not plain.
pub fn hide_rule(
    disk: &Inspection,
    links: &[String],
    group: &str,
    volume: &str,
) -> io::Result<String> {
    check_plain(group)?;
    check_plain(volume)?;
    let identity = &disk.identity;
    if disk.device.is_none() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "an image needs no hiding"));
    }
    let mut out = String::new();
    let _ = writeln!(
        out,
        "# Written by tidemark: this disk is protected as {group}/{volume} and used only through\n\
         # /dev/tidemark/{group}/{volume}. Removed again by `tidemark unprotect`.\n\
         SUBSYSTEM!=\"block\", GOTO=\"tidemark_hide_end\"\n\
         ACTION==\"remove\", GOTO=\"tidemark_hide_end\""
    );
    // Positive matches only: "not equal" never holds for a device without the attribute, and would
    // hide every such device.
    let is_it = match &identity.dm_uuid {
        Some(uuid) => format!("ENV{{DM_UUID}}==\"{}\"", pattern(uuid)),
        None => recognise(identity, links, &mut out),
    };
    let partition = match identity.partition {
        Some(number) => format!(", ATTR{{partition}}==\"{number}\""),
        None => String::new(),
    };
    let flags = match identity.dm_uuid {
        Some(_) => {
            "ENV{DM_UDEV_DISABLE_DISK_RULES_FLAG}=\"1\", \
             ENV{DM_UDEV_DISABLE_OTHER_RULES_FLAG}=\"1\""
        }
        None => "ENV{UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG}=\"1\"",
    };
    let _ = writeln!(
        out,
        "{is_it}{partition}, GOTO=\"tidemark_hide\"\n\
         GOTO=\"tidemark_hide_end\"\n\
         LABEL=\"tidemark_hide\"\n\
         {flags}\n\
         ENV{{SYSTEMD_READY}}=\"0\", ENV{{UDISKS_IGNORE}}=\"1\""
    );
    let kept: Vec<&str> =
        links.iter().map(String::as_str).filter(|link| names_the_disk(link)).collect();
    if !kept.is_empty() {
        let only = match identity.partition {
            Some(_) => "",
            None => "ENV{DEVTYPE}==\"disk\", ",
        };
        let _ = writeln!(out, "{only}SYMLINK+=\"{}\"", kept.join(" "));
    }
    let _ = writeln!(out, "LABEL=\"tidemark_hide_end\"");
    Ok(out)
}

/// The match of a plain disk or partition by the best name it has; `out` gets what must come first.
fn recognise(identity: &Identity, links: &[String], out: &mut String) -> String {
    let place = links.iter().find_map(|link| {
        let path = link.strip_prefix("disk/by-path/")?;
        Some(path.split("-part").next().unwrap_or(path))
    });
    match (&identity.wwn, &identity.serial, place) {
        (Some(wwn), ..) => format!("ATTRS{{wwid}}==\"{}\"", pattern(wwn)),
        (_, Some(serial), _) => format!("ATTRS{{serial}}==\"{}\"", pattern(serial)),
        (_, _, Some(path)) => {
            let _ = writeln!(out, "IMPORT{{builtin}}=\"path_id\"");
            format!("ENV{{ID_PATH}}==\"{}\"", pattern(path))
        }
        _ => {
            let _ = writeln!(
                out,
                "# This disk has no name of its own: the rule follows its kernel name, which may\n\
                 # change from boot to boot."
            );
            let name = pattern(&identity.kernel_name);
            match identity.partition {
                Some(_) => format!("KERNEL==\"{name}\""),
                None => format!("KERNEL==\"{name}|{name}[0-9]*|{name}p[0-9]*\""),
            }
        }
    }
}

/// Links of the device itself, made of characters that need no quoting.
fn names_the_disk(link: &str) -> bool {
    let own = ["disk/by-id/", "disk/by-path/"];
    let plain = |c: char| c.is_ascii_alphanumeric() || "#+-.:=@_/".contains(c);
    own.iter().any(|prefix| link.starts_with(prefix))
        && !link.contains("lvm-pv-uuid")
        && link.chars().all(plain)
}

/// A value as a udev match: characters with a meaning there match any character.
fn pattern(value: &str) -> String {
    value
        .chars()
        .map(|c| if c.is_control() || "*?[]|\"\\$%".contains(c) { '?' } else { c })
        .collect()
}

/// Group, volume and kernel names: letters, digits, `.`, `_`, `-`, not beginning with a dot.
fn check_plain(name: &str) -> io::Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if (1..=64).contains(&name.len()) && !name.starts_with('.') && name.chars().all(plain) {
        return Ok(());
    }
    let message = format!(
        "{name:?} cannot be a device name: use up to 64 letters, digits, '.', '_' and '-', not \
         beginning with '.'"
    );
    Err(io::Error::new(io::ErrorKind::InvalidInput, message))
}

fn absent_is_fine(outcome: io::Result<()>) -> io::Result<()> {
    match outcome {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests;
