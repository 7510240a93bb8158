//! Two copies of one database, so that damage in one costs nothing.
//!
//! Every transaction is committed to the first copy, then to the second, and counted in both. The
//! checksums of all pages are verified when a copy is opened; what a copy says is used only if they
//! all hold. Of two good copies the one that counts more counts: the other has missed a transaction
//! (a crash in between), or has gone back by one because its newest was damaged. The copy that is
//! not good or lags behind is made anew from the other.
//!
//! | first | second | |
//! |---|---|---|
//! | good | as new | it is used |
//! | good | older, missing | the second is made anew |
//! | good | damaged | the second is kept as `*.damaged-N`, if there is room, and made anew; people are told |
//! | older, missing, damaged | good | the first is made anew, a damaged one is kept in the same way; people are told |
//! | damaged or missing | damaged | refused |
//! | missing | missing | a new, empty catalogue |

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context, bail};
use redb::{
    Database, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction,
};

use crate::{
    machine::{How, Machine, free_name},
    store::log::no_room,
};

const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
/// Where the transactions are counted.
const COMMITS: &str = "commits";

/// Two copies of a database.
pub struct Pair {
    machine: Machine,
    paths: [PathBuf; 2],
    /// Held from before the first commit of a transaction until after the second.
    writing: Mutex<()>,
    /// None only while it is opened again.
    copies: RwLock<Option<[Database; 2]>>,
    /// A transaction failed (a full disk, say): the databases want to be opened again.
    failed: AtomicBool,
}

/// What is found in place of a copy.
enum Copy {
    Good(Database, u64),
    Missing,
    Damaged(String),
}

impl Pair {
    /// Opens both copies, of which the first is at `path`. Also says what was damaged, a sentence
    /// each.
    ///
    /// # Errors
    /// When neither is good, or they cannot be read or written.
    pub fn open(machine: &Machine, path: &Path) -> anyhow::Result<(Pair, Vec<String>)> {
        let paths = [path.to_owned(), path.with_extension("copy.redb")];
        let (copies, damage) = open_both(machine, &paths)?;
        let (copies, failed) = (RwLock::new(Some(copies)), AtomicBool::new(false));
        let (machine, writing) = (machine.clone(), Mutex::default());
        let pair = Pair { machine, paths, writing, copies, failed };
        Ok((pair, damage))
    }

    /// Begins to read.
    ///
    /// # Errors
    /// When the database cannot be opened again, or read.
    pub fn begin_read(&self) -> anyhow::Result<ReadTransaction> {
        self.with(|[first, _]| Ok(first.begin_read()?))
    }

    /// Begins to read both copies, as of the same transaction, to compare them.
    ///
    /// # Errors
    /// As [`begin_read`](Self::begin_read).
    pub fn begin_read_both(&self) -> anyhow::Result<[ReadTransaction; 2]> {
        self.with(|[first, second]| {
            let _nobody_writes = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
            Ok([first.begin_read()?, second.begin_read()?])
        })
    }

    /// One transaction in both copies: durable when this returns.
    ///
    /// # Errors
    /// When one of them cannot be written; the first may have it then.
    pub fn write<T>(
        &self,
        change: &impl Fn(&WriteTransaction) -> Result<T, redb::Error>,
    ) -> anyhow::Result<T> {
        self.with(|[first, second]| {
            let _one_at_a_time = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
            let value = commit(first, change)?;
            commit(second, change)?;
            Ok(value)
        })
    }

    /// Runs `work` on the copies, which are opened again first if a transaction failed: what was
    /// committed before is all there.
    fn with<T>(
        &self,
        work: impl FnOnce(&[Database; 2]) -> Result<T, redb::Error>,
    ) -> anyhow::Result<T> {
        if self.failed.load(Ordering::Acquire) {
            let mut copies = self.copies.write().unwrap_or_else(PoisonError::into_inner);
            if self.failed.load(Ordering::Acquire) {
                *copies = None;
                let (opened, damage) =
                    open_both(&self.machine, &self.paths).context("open the catalogue again")?;
                damage.iter().for_each(|sentence| tracing::error!("{sentence}"));
                *copies = Some(opened);
                self.failed.store(false, Ordering::Release);
            }
        }
        let copies = self.copies.read().unwrap_or_else(PoisonError::into_inner);
        let done = work(copies.as_ref().context("the catalogue could not be opened again")?);
        self.failed.fetch_or(done.is_err(), Ordering::AcqRel);
        Ok(done?)
    }
}

fn commit<T>(
    database: &Database,
    change: &impl Fn(&WriteTransaction) -> Result<T, redb::Error>,
) -> Result<T, redb::Error> {
    let tx = database.begin_write()?;
    let value = change(&tx)?;
    {
        let mut meta = tx.open_table(META)?;
        let commits = meta.get(COMMITS)?.map_or(0, |commits| commits.value());
        meta.insert(COMMITS, commits + 1)?;
    }
    tx.commit()?;
    Ok(value)
}

fn open_both(
    machine: &Machine,
    paths: &[PathBuf; 2],
) -> anyhow::Result<([Database; 2], Vec<String>)> {
    let [first, second] = [look(machine, &paths[0])?, look(machine, &paths[1])?];
    let mut said = Vec::new();
    for (path, copy) in paths.iter().zip([&first, &second]) {
        if let Copy::Damaged(why) = copy {
            said.push(format!("the catalogue {} is damaged ({why})", path.display()));
        }
    }
    let better = match (&first, &second) {
        (Copy::Missing, Copy::Missing) => return Ok((create_both(machine, paths)?, said)),
        (Copy::Good(_, one), Copy::Good(_, other)) if one == other => None,
        (Copy::Good(_, one), Copy::Good(_, other)) if other > one => {
            said.push(format!("the catalogue {} is older than its copy", paths[0].display()));
            Some(1)
        }
        (Copy::Good(..), _) => Some(0),
        (_, Copy::Good(..)) => {
            if matches!(first, Copy::Missing) {
                said.push(format!("the catalogue {} is missing", paths[0].display()));
            }
            Some(1)
        }
        _ => bail!(
            "{}, and no good copy of it is at {}: put back one of the two files as it was last, \
             from a backup; without them nobody knows which points of which groups are here",
            said.join(" and "),
            paths[1].display()
        ),
    };
    if let Some(better) = better {
        let (from, to) = (&paths[better], &paths[1 - better]);
        let damaged = matches!([&first, &second][1 - better], Copy::Damaged(_));
        // The files are copied while nobody has them open.
        drop((first, second));
        make_anew(machine, from, to, damaged)
            .with_context(|| format!("cannot make {} anew from its copy", to.display()))?;
        said = said
            .into_iter()
            .map(|sentence| format!("{sentence}: made anew from the other"))
            .collect();
        let open = |path: &PathBuf| match look(machine, path)? {
            Copy::Good(database, _) => Ok(database),
            _ => bail!("the catalogue {} was good and is not any more", path.display()),
        };
        return Ok(([open(&paths[0])?, open(&paths[1])?], said));
    }
    match (first, second) {
        (Copy::Good(first, _), Copy::Good(second, _)) => Ok(([first, second], said)),
        _ => bail!("the catalogue {} cannot be opened", paths[0].display()),
    }
}

/// Opens a copy, verifying all of it.
fn look(machine: &Machine, path: &Path) -> anyhow::Result<Copy> {
    if !machine.exists(path) {
        return Ok(Copy::Missing);
    }
    match machine.open_database(path).and_then(|database| Ok((count(&database)?, database))) {
        // One that has no transaction was cut short when it was made.
        Ok((0, _)) => Ok(Copy::Missing),
        Ok((commits, database)) => Ok(Copy::Good(database, commits)),
        Err(error) if is_damage(&error) => Ok(Copy::Damaged(error.to_string())),
        Err(error) => {
            Err(error).with_context(|| format!("cannot open the catalogue {}", path.display()))
        }
    }
}

fn count(database: &Database) -> Result<u64, redb::Error> {
    let table = match database.begin_read()?.open_table(META) {
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(0),
        table => table?,
    };
    Ok(table.get(COMMITS)?.map_or(0, |commits| commits.value()))
}

fn create_both(machine: &Machine, paths: &[PathBuf; 2]) -> anyhow::Result<[Database; 2]> {
    // It has its name only when it is whole: half of one would be taken for a damaged one.
    let make = |path: &PathBuf| {
        let new = path.with_added_extension("new");
        if machine.exists(&new) {
            machine.remove_file(&new)?;
        }
        commit(&machine.open_database(&new)?, &|_| Ok(()))?;
        machine.rename(&new, path)?;
        machine.sync_parent(path)?;
        machine.open_database(path)
    };
    let made = make(&paths[0]).and_then(|first| Ok([first, make(&paths[1])?]));
    made.with_context(|| format!("cannot make the catalogue {}", paths[0].display()))
}

/// Whether an error speaks of the content, not of the file system or of who else has it open.
fn is_damage(error: &redb::Error) -> bool {
    match error {
        redb::Error::Corrupted(_) | redb::Error::UpgradeRequired(_) => true,
        redb::Error::Io(error) => {
            matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof)
        }
        _ => false,
    }
}

/// Makes a copy anew from the good one: beside what is there, or in its place on a full disk. Until the
/// new one has its name there is one copy more or less, and the other is good.
fn make_anew(machine: &Machine, from: &Path, to: &Path, keep: bool) -> anyhow::Result<()> {
    let mut old = to.to_owned();
    if keep {
        old = free_name(machine, to, "redb.damaged");
        machine.rename(to, &old)?;
    }
    let new = to.with_added_extension("new");
    let mut copied = copy(machine, from, &new);
    if copied.as_ref().is_err_and(no_room) {
        for path in [&new, &old].into_iter().filter(|path| machine.exists(path)) {
            machine.remove_file(path)?;
        }
        // Until then a file system may keep the room to itself.
        machine.sync_parent(to)?;
        copied = copy(machine, from, &new);
    }
    copied?;
    machine.rename(&new, to)?;
    Ok(machine.sync_parent(to)?)
}

fn copy(machine: &Machine, from: &Path, to: &Path) -> io::Result<()> {
    let (source, made) = (machine.open(from, How::Read)?, machine.open(to, How::Truncate)?);
    let bytes = source.length()?;
    let mut piece = vec![0; 1 << 20];
    let mut at = 0;
    while at < bytes {
        let step = (bytes - at).min(piece.len() as u64) as usize;
        source.read_exact_at(&mut piece[..step], at)?;
        made.write_all_at(&piece[..step], at)?;
        at += step as u64;
    }
    made.sync_all()
}
