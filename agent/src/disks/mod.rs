//! Which disks a group was protected with, and whether anybody wrote to them while no agent was there.
//!
//! `STATE-DIR/GROUP/disks.json` has a row for each volume: the [`Facts`] by which its disk is told from
//! others, and, after a stop in order, what the disk looked like then ([`Rest`]). A start compares before
//! anything is read from an inherited ring, let alone written to the disk:
//!
//! | what is found | follows |
//! |---|---|
//! | no row, or one without facts | the disk is recorded as it is |
//! | another size, or facts that differ | the group is not started: [`DiskError`] says why and what to do |
//! | stopped in order, and the disk no longer looks as it did | doubt: everything is compared |
//! | the file names a doubt | doubt: everything is compared |
//!
//! What cannot be noticed: writes past the agent between a crash or a power cut and the next start,
//! since the agent's own last writes then explain a difference as well.

mod facts;
#[cfg(test)]
mod tests;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use tidemark_journal::{GroupId, VolumeId};

pub use facts::{Facts, Rest};

use crate::{kernel::blockdev::Backing, state::replace::replace_file};

const FILE: &str = "disks.json";
const VERSION: u32 = 1;
const SECTOR_BYTES: u64 = 512;

/// The content of `disks.json`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disks {
    version: u32,
    group: GroupId,
    /// Why everything has to be compared with the target, if so. Durable before whatever makes it so.
    doubt: Option<String>,
    disks: Vec<Disk>,
}

/// A volume's disk.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Disk {
    volume: VolumeId,
    sectors: u64,
    /// None: whatever disk is found next is to be taken.
    facts: Option<Facts>,
    /// How it looked when the agent stopped in order.
    rest: Option<Rest>,
}

/// Why a group does not start with the disks that are there.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It is not the disk that was protected.
    #[error(
        "{} is another disk than the one that was protected: {difference}. Put the right disk \
         back; or, to protect this one in its place, run 'tidemark accept-disk {group}': all of it \
         is then compared with the target, whose older points stay as they are",
        path.display()
    )]
    Other {
        /// The backing.
        path: PathBuf,
        /// What differs.
        difference: String,
        /// The group's name.
        group: String,
    },
    /// Its size has changed.
    #[error(
        "{} has {found_bytes} bytes, and had {bytes} when it was protected. Give it its size back; \
         or, to protect it at this size, run 'tidemark unprotect {group}' and protect it under \
         another group name: a replica keeps the size it began with",
        path.display()
    )]
    Resized {
        /// The backing.
        path: PathBuf,
        /// Its size when it was protected.
        bytes: u64,
        /// Its size now.
        found_bytes: u64,
        /// The group's name.
        group: String,
    },
    /// The file cannot be understood.
    #[error(
        "{} is damaged: it no longer says which disks were protected. If they are the right ones, \
         run 'tidemark accept-disk {group}': everything is then compared with the target",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The group's name.
        group: String,
    },
    /// The state disk said no.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// The step, as a verb.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
}

/// Where a group's file is, and whose it is.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The group's state directory.
    pub dir: &'a Path,
    /// Its id.
    pub group: GroupId,
    /// Its name.
    pub name: &'a str,
}

/// What a start has found out about its disks.
#[derive(Debug)]
pub struct Checked {
    disks: Disks,
    /// The doubt that the file names.
    named: Option<String>,
    /// The sentence for a disk that no longer looks as it did at a stop in order.
    changed: Option<String>,
}

impl Checked {
    /// Why everything has to be compared, if so. `clean`: the group was stopped in order, and nothing
    /// has been written for it since.
    pub fn doubt(&self, clean: bool) -> Option<&str> {
        self.named.as_deref().or_else(|| self.changed.as_deref().filter(|_| clean))
    }

    /// Records the disks as they are. To be called when what follows from a doubt is durable.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn record(&self, place: Place<'_>) -> Result<(), DiskError> {
        write(place, &self.disks)
    }
}

/// Compares the disks of a group, claimed and not yet written, with what is recorded of them.
///
/// # Errors
/// [`DiskError`]: the group must not be started with them.
pub fn check(place: Place<'_>, volumes: &[(VolumeId, &Backing)]) -> Result<Checked, DiskError> {
    let known = read(place)?;
    let mut disks = Disks::new(place.group);
    let mut changed = None;
    for (volume, backing) in volumes {
        let sectors = backing.geometry().size_bytes / SECTOR_BYTES;
        let facts = Facts::of(backing);
        let row = known.as_ref().and_then(|known| known.row(*volume));
        if let Some(row) = row {
            row.compare(place, backing.path(), sectors, &facts)?;
            let difference = row.rest.as_ref().and_then(|rest| rest.difference(backing));
            changed = changed.or_else(|| {
                let path = backing.path().display();
                Some(format!("{path} was written while no agent ran: {}", difference?))
            });
        }
        disks.disks.push(Disk { volume: *volume, sectors, facts: Some(facts), rest: None });
    }
    Ok(Checked { disks, named: known.and_then(|known| known.doubt), changed })
}

/// After a stop in order, with everything flushed: records how the disks look, so that the next start
/// notices what was written in between.
///
/// # Errors
/// [`DiskError`]: then nothing will be noticed, which harms nobody.
pub fn record_rest(place: Place<'_>, volumes: &[(VolumeId, &Backing)]) -> Result<(), DiskError> {
    let Some(mut disks) = read(place)? else { return Ok(()) };
    for (volume, backing) in volumes {
        if let Some(row) = disks.disks.iter_mut().find(|row| row.volume == *volume) {
            row.rest = Rest::of(backing).map_err(|e| fail("read", backing.path(), e)).map(Some)?;
        }
    }
    write(place, &disks)
}

/// Has the next start take whatever disks it finds (of one volume, or all) and compare everything.
///
/// # Errors
/// [`DiskError::Io`].
pub fn accept(place: Place<'_>, volume: Option<VolumeId>) -> Result<(), DiskError> {
    let known = match read(place) {
        // What it said is lost: all disks are taken as they are.
        Err(DiskError::Damaged { .. }) => None,
        known => known?,
    };
    let mut disks = known.unwrap_or_else(|| Disks::new(place.group));
    for row in &mut disks.disks {
        if volume.is_none_or(|volume| volume == row.volume) {
            row.facts = None;
        }
    }
    disks.doubt = Some("another disk was accepted in the place of one".to_owned());
    write(place, &disks)
}

/// Has the next start compare everything, since from now on the disks are written without capture.
///
/// # Errors
/// [`DiskError`]: nothing would remember it.
pub fn distrust(place: Place<'_>, why: &str) -> Result<(), DiskError> {
    let mut disks = read(place)?.unwrap_or_else(|| Disks::new(place.group));
    disks.doubt = Some(why.to_owned());
    write(place, &disks)
}

impl Disks {
    fn new(group: GroupId) -> Disks {
        Disks { version: VERSION, group, doubt: None, disks: Vec::new() }
    }

    fn row(&self, volume: VolumeId) -> Option<&Disk> {
        self.disks.iter().find(|row| row.volume == volume)
    }
}

impl Disk {
    fn compare(
        &self,
        place: Place<'_>,
        path: &Path,
        sectors: u64,
        now: &Facts,
    ) -> Result<(), DiskError> {
        let (path, group) = (path.to_owned(), place.name.to_owned());
        if let Some(difference) = self.facts.as_ref().and_then(|facts| facts.difference(now)) {
            return Err(DiskError::Other { path, difference, group });
        }
        if self.sectors != sectors {
            let bytes = self.sectors.saturating_mul(SECTOR_BYTES);
            let found_bytes = sectors * SECTOR_BYTES;
            return Err(DiskError::Resized { path, bytes, found_bytes, group });
        }
        Ok(())
    }
}

/// What is recorded. None if nothing is; another group's record is that group's affair.
fn read(place: Place<'_>) -> Result<Option<Disks>, DiskError> {
    let path = place.dir.join(FILE);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(fail("read", &path, e)),
    };
    match serde_json::from_slice::<Disks>(&bytes) {
        Ok(disks) if disks.version == VERSION => {
            Ok(Some(disks).filter(|disks| disks.group == place.group))
        }
        _ => Err(DiskError::Damaged { path, group: place.name.to_owned() }),
    }
}

fn write(place: Place<'_>, disks: &Disks) -> Result<(), DiskError> {
    let path = place.dir.join(FILE);
    let json =
        serde_json::to_vec_pretty(disks).map_err(|e| fail("encode", &path, io::Error::other(e)))?;
    replace_file(place.dir, FILE, &json).map_err(|e| fail("write", &path, e))
}

fn fail(what: &'static str, path: &Path, source: io::Error) -> DiskError {
    DiskError::Io { what, path: path.to_owned(), source }
}
