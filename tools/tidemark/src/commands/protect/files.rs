//! Writing configuration, and having udev take notice.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

/// Readable for everybody: there is no secret in it.
const MODE: u32 = 0o644;

/// Replaces or makes a file, as a whole and durably. Its directory is made if it is missing.
pub fn write(path: &Path, text: &str) -> Result<()> {
    let written = || -> io::Result<()> {
        let directory = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(directory)?;
        // Not "*.toml" or "*.rules", so that nobody reads it before it is whole.
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let fresh = directory.join(format!(".{name}.new"));
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(MODE).open(&fresh)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&fresh, path)?;
        File::open(directory)?.sync_all()
    };
    written().with_context(|| format!("cannot write {}", path.display()))
}

/// Whether udev runs on this machine.
pub fn udev_runs() -> bool {
    Path::new("/run/udev/control").exists()
}

/// Lets udev read its rules and look at these devices again. Where it fails, a restart does it.
pub fn udev_look_again(kernel_names: &[Option<&str>]) {
    let names: Vec<&str> = kernel_names.iter().copied().flatten().collect();
    if names.is_empty() || !udev_runs() {
        return;
    }
    let udevadm = |arguments: &[&str]| {
        let ended = Command::new("udevadm")
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status();
        if !ended.as_ref().is_ok_and(|status| status.success()) {
            let _ = writeln!(
                io::stderr(),
                "tidemark: 'udevadm {}' failed; run it by hand",
                arguments.join(" ")
            );
        }
    };
    udevadm(&["control", "--reload"]);
    for name in names {
        udevadm(&["trigger", "--settle", "--action=change", &format!("/sys/class/block/{name}")]);
    }
}
