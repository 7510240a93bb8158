//! A file system in memory of a fixed size.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A mounted one, until it is dropped.
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts one of so many bytes; the directory is made if it is not there.
    pub fn mount(path: &Path, bytes: u64) -> Result<SmallDisk> {
        fs::create_dir_all(path)?;
        let options = format!("size={bytes}");
        mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))
            .context("mount a small file system (this test runs as root)")?;
        Ok(SmallDisk(path.to_owned()))
    }

    /// Makes it larger or smaller.
    pub fn resize(&self, bytes: u64) -> Result<()> {
        let options = format!("size={bytes}");
        let how = MsFlags::MS_REMOUNT;
        Ok(mount(Some("tmpfs"), &self.0, Some("tmpfs"), how, Some(options.as_str()))?)
    }

    /// Takes all the room there is.
    pub fn fill(&self) -> Result<()> {
        let file = File::create(self.filler())?;
        let mut at = 0;
        while file.write_all_at(&[1; 4096], at).is_ok() {
            at += 4096;
        }
        Ok(())
    }

    /// Gives back what [`fill`](Self::fill) has taken.
    pub fn clear(&self) -> Result<()> {
        Ok(fs::remove_file(self.filler())?)
    }

    fn filler(&self) -> PathBuf {
        self.0.join("filler")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Detached where a failed test still has files open.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}
