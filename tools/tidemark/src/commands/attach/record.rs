//! Which device shows what: a file for each attached device.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// Where the records are; gone after a reboot, as the devices are.
const DIRECTORY: &str = "/run/tidemark/attached";

/// An attached device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The group.
    pub group: String,
    /// The volume.
    pub volume: String,
    /// The export's name.
    pub export: String,
    /// A branch that goes away with the last device of it.
    pub temporary_branch: Option<String>,
}

impl Record {
    /// Writes it for the device `/dev/nbdINDEX`.
    pub fn write(&self, index: u32) -> Result<()> {
        let path = path(index);
        let written = || -> io::Result<()> {
            fs::create_dir_all(DIRECTORY)?;
            let fresh = path.with_extension("new");
            fs::write(&fresh, serde_json::to_vec(self)?)?;
            fs::rename(&fresh, &path)
        };
        written().with_context(|| format!("cannot write {}", path.display()))
    }
}

/// Removes the record of a device.
pub fn remove(index: u32) {
    // It may be gone, and one that stays is passed over when its device is.
    let _ = fs::remove_file(path(index));
}

/// Whether a device still has its record.
pub fn exists(index: u32) -> bool {
    path(index).exists()
}

/// All records, with the numbers of their devices.
pub fn all() -> Result<Vec<(u32, Record)>> {
    let entries = match fs::read_dir(DIRECTORY) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("cannot read {DIRECTORY}"))?,
    };
    let mut found = Vec::new();
    for entry in entries.flatten() {
        let name = entry.file_name();
        let index = name
            .to_str()
            .and_then(|name| name.strip_prefix("nbd")?.strip_suffix(".json")?.parse::<u32>().ok());
        let record =
            fs::read(entry.path()).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        found.extend(index.zip(record));
    }
    found.sort_by_key(|(index, _)| *index);
    Ok(found)
}

fn path(index: u32) -> PathBuf {
    Path::new(DIRECTORY).join(format!("nbd{index}.json"))
}
