//! What the target remembers besides the log: groups, histories, sealed segments, branches.
//!
//! Values are a checksum and JSON ([`row`]), so that a catalogue can be read by people; it is small.
//! It is kept twice ([`pair`]). Everything but the groups' names and the branches could be found
//! again by scanning the log.

mod marks;
mod pair;
mod row;

use std::{collections::BTreeMap, path::Path, sync::Arc};

use anyhow::Context;
use redb::{ReadTransaction, ReadableTable, TableDefinition, TableHandle, WriteTransaction};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tidemark_journal::{Ancestry, GroupId, Position, Term, VolumeId};

use marks::MARKS;
use pair::Pair;
use row::RowPlace;

use crate::{
    bounds::{COUNT_MAX, FILE_BYTES_MAX, at_most},
    damage::DamageRow,
    history::History,
    machine::Machine,
    reserve::Reserve,
    scrub::ScrubRow,
    store::{
        base::BaseRow,
        recover::KnownSegment,
        segment::{Segment, Summary},
    },
};

const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
const GROUPS: TableDefinition<&str, &[u8]> = TableDefinition::new("groups");
const HISTORIES: TableDefinition<&str, &[u8]> = TableDefinition::new("histories");
const VITALS: TableDefinition<&str, &[u8]> = TableDefinition::new("vitals");
const SEGMENTS: TableDefinition<(&str, u64), &[u8]> = TableDefinition::new("segments");
const BRANCHES: TableDefinition<(&str, &str), &[u8]> = TableDefinition::new("branches");

const DAMAGES: TableDefinition<&str, &[u8]> = TableDefinition::new("damages");
const SCRUBS: TableDefinition<&str, &[u8]> = TableDefinition::new("scrubs");

/// The version of the tables.
const SCHEMA: u64 = 4;

/// The target's catalogue.
pub struct Catalogue {
    machine: Machine,
    pair: Pair,
    reserve: Arc<Reserve>,
    /// What was damaged when it was opened, a sentence each.
    damage: Vec<String>,
}

/// A group that has been received at least once.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GroupRow {
    /// The source's id for it.
    pub id: GroupId,
    /// The node that writes it.
    pub node: String,
    /// The path of terms, as the source last named it; the replica's end lies on it.
    pub ancestry: Ancestry,
    /// When it was first seen, nanoseconds since 1970.
    pub created_ns: i64,
}

/// A history as of the end of a sealed segment, and how far the base has come.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct HistoryRow {
    /// The history.
    pub history: History,
    /// The lowest segment that is not in the base.
    #[serde(deserialize_with = "at_most::<COUNT_MAX, _>")]
    pub first_segment: u64,
    /// The position that the base holds.
    pub base: Position,
    /// What the base has of each volume.
    pub bases: BTreeMap<VolumeId, BaseRow>,
    /// The lowest segment that the history does not know.
    #[serde(deserialize_with = "at_most::<COUNT_MAX, _>")]
    pub next_segment: u64,
}

/// What changes all the time and is kept with a second's slack.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Vitals {
    /// The last position acknowledged.
    pub acked: Position,
    /// The age counter of received history, nanoseconds.
    #[serde(deserialize_with = "at_most::<COUNT_MAX, _>")]
    pub received_ns: u64,
    /// Up to where the source has vouched.
    pub vouched: Position,
    /// The source's wall clock then, nanoseconds since 1970.
    pub vouched_wall_ns: i64,
    /// The newest generation of the source's dirty map.
    pub map_generation: u64,
}

/// A sealed segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct SegmentRow {
    before: Position,
    last: Position,
    #[serde(deserialize_with = "at_most::<FILE_BYTES_MAX, _>")]
    data_bytes: u64,
    wall_min_ns: i64,
    wall_max_ns: i64,
    #[serde(deserialize_with = "at_most::<COUNT_MAX, _>")]
    received_ns: u64,
    #[serde(deserialize_with = "at_most::<FILE_BYTES_MAX, _>")]
    index_at: u64,
    chain: [u8; 32],
}

/// A branch.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BranchRow {
    /// Its term: the parent is the point's, `fork_seq` the point.
    pub term: Term,
    /// The only volume it is of; none means all of the group.
    pub volume: Option<String>,
    /// The name of the point it was made from, for people.
    pub point: String,
    /// Whether it is dropped when nobody has had it open for a while.
    pub temporary: bool,
    /// What is damaged of it: it is not served any more.
    #[serde(default)]
    pub damage: Option<String>,
    /// When it was made, nanoseconds since 1970.
    pub created_ns: i64,
}

impl Catalogue {
    /// Opens or makes the catalogue. When its disk is full, it takes from the reserve.
    ///
    /// # Errors
    /// When it cannot be opened, or is of a later version.
    pub fn open(
        machine: &Machine,
        path: &Path,
        reserve: &Arc<Reserve>,
    ) -> anyhow::Result<Catalogue> {
        let what = || format!("cannot open the catalogue {}", path.display());
        let (pair, damage) = reserve.with_room(|| Pair::open(machine, path))?;
        damage.iter().for_each(|sentence| tracing::error!("{sentence}"));
        let (machine, reserve) = (machine.clone(), Arc::clone(reserve));
        let catalogue = Catalogue { machine, pair, reserve, damage };
        let version = catalogue.write(|tx| {
            tx.open_table(GROUPS)?;
            tx.open_table(HISTORIES)?;
            tx.open_table(MARKS)?;
            tx.open_table(VITALS)?;
            tx.open_table(SEGMENTS)?;
            tx.open_table(BRANCHES)?;
            tx.open_table(DAMAGES)?;
            tx.open_table(SCRUBS)?;
            let mut meta = tx.open_table(META)?;
            let version = meta.get("schema")?.map(|version| version.value());
            if version.is_none() {
                meta.insert("schema", SCHEMA)?;
            }
            Ok(version.unwrap_or(SCHEMA))
        });
        let version = version.with_context(what)?;
        anyhow::ensure!(
            version == SCHEMA,
            "the catalogue {} has version {version}; this program reads version {SCHEMA}",
            path.display()
        );
        Ok(catalogue)
    }

    /// What was damaged of it when it was opened, and is whole again: a sentence each.
    pub fn damage(&self) -> &[String] {
        &self.damage
    }

    /// The machine that it is kept on.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The reserve of the disk that it is kept on.
    pub fn reserve(&self) -> &Arc<Reserve> {
        &self.reserve
    }

    /// A group's row.
    ///
    /// # Errors
    /// When the catalogue cannot be read.
    pub fn group(&self, name: &str) -> anyhow::Result<Option<GroupRow>> {
        self.get(GROUPS, name)
    }

    /// The names of all groups.
    ///
    /// # Errors
    /// When the catalogue cannot be read.
    pub fn groups(&self) -> anyhow::Result<Vec<String>> {
        let table = self.begin_read()?.open_table(GROUPS)?;
        table.iter()?.map(|row| Ok(row?.0.value().to_owned())).collect()
    }

    /// Keeps a group's row and history, at once.
    ///
    /// # Errors
    /// When the catalogue cannot be written.
    pub fn put_group(
        &self,
        name: &str,
        row: &GroupRow,
        history: &HistoryRow,
    ) -> anyhow::Result<()> {
        let (row, bytes) = (at(&GROUPS, name).seal(row)?, at(&HISTORIES, name).seal(history)?);
        self.write(|tx| {
            tx.open_table(GROUPS)?.insert(name, row.as_slice())?;
            keep_history(tx, name, history, &bytes)
        })
    }

    /// A log's history, by the group's name.
    ///
    /// # Errors
    /// When the catalogue cannot be read.
    pub fn history(&self, name: &str) -> anyhow::Result<HistoryRow> {
        let tx = self.begin_read()?;
        let row = tx.open_table(HISTORIES)?.get(name)?;
        let row = row.map(|row| at(&HISTORIES, name).open(row.value())).transpose()?;
        let mut row: HistoryRow = row.unwrap_or_default();
        row.history.marks = Arc::new(marks::read(&tx, name)?);
        Ok(row)
    }

    /// Keeps a history.
    ///
    /// # Errors
    /// When the catalogue cannot be written.
    pub fn put_history(&self, name: &str, row: &HistoryRow) -> anyhow::Result<()> {
        let bytes = at(&HISTORIES, name).seal(row)?;
        self.write(|tx| keep_history(tx, name, row, &bytes))
    }

    /// Keeps a history and forgets the segments below its first, at once.
    ///
    /// # Errors
    /// When the catalogue cannot be written.
    pub fn fold_history(&self, name: &str, row: &HistoryRow) -> anyhow::Result<()> {
        let bytes = at(&HISTORIES, name).seal(row)?;
        self.write(|tx| {
            keep_history(tx, name, row, &bytes)?;
            let mut segments = tx.open_table(SEGMENTS)?;
            segments.retain_in((name, 0)..(name, row.first_segment), |_, _| false)?;
            Ok(())
        })
    }

    /// A group's vitals.
    ///
    /// # Errors
    /// When the catalogue cannot be read.
    pub fn vitals(&self, name: &str) -> anyhow::Result<Vitals> {
        Ok(self.get(VITALS, name)?.unwrap_or_default())
    }

    /// Keeps a group's vitals.
    ///
    /// # Errors
    /// When the catalogue cannot be written.
    pub fn put_vitals(&self, name: &str, vitals: &Vitals) -> anyhow::Result<()> {
        self.put(VITALS, name, vitals)
    }

    /// The sealed segments of a log (`GROUP` or `GROUP/BRANCH`).
    ///
    /// # Errors
    /// When the catalogue cannot be read.
    pub fn segments(&self, log: &str) -> anyhow::Result<BTreeMap<u64, KnownSegment>> {
        let table = self.begin_read()?.open_table(SEGMENTS)?;
        let rows = table.range((log, 0)..=(log, u64::MAX))?;
        rows.map(|row| {
            let (key, value) = row?;
            let number = key.value().1;
            let row: SegmentRow = segment_at(log, &number.to_le_bytes()).open(value.value())?;
            let summary = Summary {
                before: row.before,
                last: row.last,
                data_bytes: row.data_bytes,
                wall_min_ns: row.wall_min_ns,
                wall_max_ns: row.wall_max_ns,
                received_ns: row.received_ns,
            };
            let known = KnownSegment { summary, index_at: row.index_at, chain: row.chain };
            Ok((number, known))
        })
        .collect()
    }

    /// Takes a sealed segment in, with the history as of its end when the log has one.
    ///
    /// # Errors
    /// When the catalogue cannot be written.
    pub fn put_segment(
        &self,
        log: &str,
        segment: &Segment,
        index_at: u64,
        chain: [u8; 32],
        history: Option<&HistoryRow>,
    ) -> anyhow::Result<()> {
        let summary = segment.summary();
        let row = SegmentRow {
            before: summary.before,
            last: summary.last,
            data_bytes: summary.data_bytes,
            wall_min_ns: summary.wall_min_ns,
            wall_max_ns: summary.wall_max_ns,
            received_ns: summary.received_ns,
            index_at,
            chain,
        };
        let row = segment_at(log, &segment.number().to_le_bytes()).seal(&row)?;
        let sealed = |history| anyhow::Ok((history, at(&HISTORIES, log).seal(history)?));
        let history = history.map(sealed).transpose()?;
        self.write(|tx| {
            tx.open_table(SEGMENTS)?.insert((log, segment.number()), row.as_slice())?;
            history.as_ref().map_or(Ok(()), |(row, bytes)| keep_history(tx, log, row, bytes))
        })
    }

    /// The branches of a group.
    ///
    /// # Errors
    /// When the catalogue cannot be read.
    pub fn branches(&self, group: &str) -> anyhow::Result<BTreeMap<String, BranchRow>> {
        let table = self.begin_read()?.open_table(BRANCHES)?;
        let rows = branches_of(&table, group)?.into_iter();
        let opened = rows.map(|(name, row)| {
            let row = branch_at(group, &name).open(&row)?;
            Ok((name, row))
        });
        opened.collect()
    }

    /// Keeps what has changed of a branch.
    ///
    /// # Errors
    /// When the catalogue cannot be written.
    pub fn put_branch(&self, group: &str, name: &str, row: &BranchRow) -> anyhow::Result<()> {
        let row = branch_at(group, name).seal(row)?;
        self.write(|tx| {
            tx.open_table(BRANCHES)?.insert((group, name), row.as_slice())?;
            Ok(())
        })
    }

    /// Takes a new branch in. What an earlier one of its name has left is forgotten, at once.
    ///
    /// # Errors
    /// When the catalogue cannot be written.
    pub fn begin_branch(&self, group: &str, name: &str, row: &BranchRow) -> anyhow::Result<()> {
        let (row, log) = (branch_at(group, name).seal(row)?, format!("{group}/{name}"));
        self.write(|tx| {
            forget_log(tx, &log)?;
            tx.open_table(BRANCHES)?.insert((group, name), row.as_slice())?;
            Ok(())
        })
    }

    /// Forgets a branch and its segments.
    ///
    /// # Errors
    /// When the catalogue cannot be written.
    pub fn drop_branch(&self, group: &str, name: &str) -> anyhow::Result<()> {
        self.write(|tx| forget_branch(tx, group, name))
    }

    /// Forgets a group, its segments and its branches.
    ///
    /// # Errors
    /// When the catalogue cannot be written.
    pub fn forget(&self, group: &str) -> anyhow::Result<()> {
        self.write(|tx| {
            // By their names alone: a row that cannot be read is forgotten like the others.
            let branches = branches_of(&tx.open_table(BRANCHES)?, group)?;
            for (name, _) in &branches {
                forget_branch(tx, group, name)?;
            }
            tx.open_table(GROUPS)?.remove(group)?;
            tx.open_table(HISTORIES)?.remove(group)?;
            marks::forget(tx, group)?;
            tx.open_table(SCRUBS)?.remove(group)?;
            forget_log(tx, group)
        })
    }

    /// What is damaged of a group (`GROUP`) or a branch (`GROUP/BRANCH`).
    ///
    /// # Errors
    /// When the catalogue cannot be read.
    pub fn damages(&self, of: &str) -> anyhow::Result<DamageRow> {
        Ok(self.get(DAMAGES, of)?.unwrap_or_default())
    }

    /// Keeps what is damaged of a group or a branch.
    ///
    /// # Errors
    /// When the catalogue cannot be written.
    pub fn put_damages(&self, of: &str, row: &DamageRow) -> anyhow::Result<()> {
        self.put(DAMAGES, of, row)
    }

    /// How far the scrub of a group is.
    ///
    /// # Errors
    /// When the catalogue cannot be read.
    pub fn scrub(&self, group: &str) -> anyhow::Result<ScrubRow> {
        Ok(self.get(SCRUBS, group)?.unwrap_or_default())
    }

    /// Keeps how far the scrub of a group is.
    ///
    /// # Errors
    /// When the catalogue cannot be written.
    pub fn put_scrub(&self, group: &str, row: &ScrubRow) -> anyhow::Result<()> {
        self.put(SCRUBS, group, row)
    }

    /// Reads every row of both copies and checks it; how many there are. A row that only one of them
    /// has is damage too.
    ///
    /// # Errors
    /// The first row that is not as it was written, or missing.
    pub fn verify(&self) -> anyhow::Result<u64> {
        let count = |tx: &ReadTransaction| {
            let mut rows = 0_u64;
            for table in [GROUPS, HISTORIES, VITALS, DAMAGES, SCRUBS] {
                for row in tx.open_table(table)?.iter()? {
                    let (key, value) = row?;
                    at(&table, key.value()).check(value.value())?;
                    rows += 1;
                }
            }
            for row in tx.open_table(SEGMENTS)?.iter()? {
                let (key, value) = row?;
                let (log, number) = key.value();
                segment_at(log, &number.to_le_bytes()).check(value.value())?;
                rows += 1;
            }
            for row in tx.open_table(MARKS)?.iter()? {
                let (key, value) = row?;
                let (group, seq) = key.value();
                marks::place(group, &seq.to_be_bytes()).check(value.value())?;
                rows += 1;
            }
            for row in tx.open_table(BRANCHES)?.iter()? {
                let (key, value) = row?;
                let (group, name) = key.value();
                branch_at(group, name).check(value.value())?;
                rows += 1;
            }
            anyhow::Ok(rows)
        };
        let [first, second] = self.reserve.with_room(|| self.pair.begin_read_both())?;
        let (first, second) = (count(&first)?, count(&second).context("in the second copy")?);
        anyhow::ensure!(first == second, "the catalogue has {first} rows and its copy {second}");
        Ok(first)
    }

    fn get<T: DeserializeOwned>(
        &self,
        table: TableDefinition<&str, &[u8]>,
        key: &str,
    ) -> anyhow::Result<Option<T>> {
        let rows = self.begin_read()?.open_table(table)?;
        let value = rows.get(key)?;
        value.map(|value| at(&table, key).open(value.value())).transpose()
    }

    fn put<T: Serialize>(
        &self,
        table: TableDefinition<&str, &[u8]>,
        key: &str,
        value: &T,
    ) -> anyhow::Result<()> {
        let value = at(&table, key).seal(value)?;
        self.write(|tx| {
            tx.open_table(table)?.insert(key, value.as_slice())?;
            Ok(())
        })
    }

    /// One transaction: durable when this returns.
    fn write<T>(
        &self,
        change: impl Fn(&WriteTransaction) -> Result<T, redb::Error>,
    ) -> anyhow::Result<T> {
        self.reserve.with_room(|| self.pair.write(&change))
    }

    fn begin_read(&self) -> anyhow::Result<ReadTransaction> {
        // After a failure it is opened again, which may make one copy anew.
        self.reserve.with_room(|| self.pair.begin_read())
    }
}

/// Keeps a history, whose row has been sealed.
fn keep_history(
    tx: &WriteTransaction,
    name: &str,
    row: &HistoryRow,
    sealed: &[u8],
) -> Result<(), redb::Error> {
    tx.open_table(HISTORIES)?.insert(name, sealed)?;
    marks::keep(tx, name, &row.history)
}

/// The names of a group's branches, with their rows as they are kept.
fn branches_of(
    table: &impl ReadableTable<(&'static str, &'static str), &'static [u8]>,
    group: &str,
) -> Result<Vec<(String, Vec<u8>)>, redb::Error> {
    let mut branches = Vec::new();
    for row in table.range((group, "")..)? {
        let (key, value) = row?;
        let (of, name) = key.value();
        if of != group {
            break;
        }
        branches.push((name.to_owned(), value.value().to_vec()));
    }
    Ok(branches)
}

fn forget_branch(tx: &WriteTransaction, group: &str, name: &str) -> Result<(), redb::Error> {
    tx.open_table(BRANCHES)?.remove((group, name))?;
    forget_log(tx, &format!("{group}/{name}"))
}

/// Forgets what is known of a log (`GROUP` or `GROUP/BRANCH`).
fn forget_log(tx: &WriteTransaction, log: &str) -> Result<(), redb::Error> {
    tx.open_table(VITALS)?.remove(log)?;
    tx.open_table(DAMAGES)?.remove(log)?;
    tx.open_table(SEGMENTS)?.retain_in((log, 0)..=(log, u64::MAX), |_, _| false)?;
    Ok(())
}

/// The place of a row whose key is a name.
fn at<'a>(table: &'a TableDefinition<'_, &str, &[u8]>, of: &'a str) -> RowPlace<'a> {
    RowPlace { table: table.name(), of, rest: &[] }
}

fn segment_at<'a>(of: &'a str, number: &'a [u8; 8]) -> RowPlace<'a> {
    RowPlace { table: "segments", of, rest: number }
}

fn branch_at<'a>(of: &'a str, name: &'a str) -> RowPlace<'a> {
    RowPlace { table: "branches", of, rest: name.as_bytes() }
}

#[cfg(test)]
mod tests;
