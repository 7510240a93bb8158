//! Is a journal's order one that the disks' user could have seen?

use std::collections::{BTreeSet, HashMap};

use anyhow::{Context, Result, bail};

use super::{Action, Entry, Log};

/// A record of a journal that stands for an operation of a user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// The index of the disk.
    pub disk: usize,
    /// What the record says was done.
    pub action: Action,
    /// For a write, the number that its content names ([`super::content::number`]).
    pub number: Option<usize>,
}

/// Finds the operation behind each record and proves that
///
/// - every acknowledged operation has exactly one record, and a failed one at most one;
/// - no record is of anything else;
/// - whenever one operation was acknowledged before another was submitted, its record comes first.
///
/// Gives the operations' numbers in the journal's order.
pub fn of_journal(log: &Log, records: &[Record]) -> Result<Vec<usize>> {
    let mut order = identify(log, records)?;
    place_flushes(log, records, &mut order)?;
    let order: Vec<usize> = order.into_iter().flatten().collect();
    check_complete(log, &order)?;
    check(log, &order)?;
    Ok(order)
}

/// Proves that the order agrees with every pair of which one was acknowledged before the other was submitted.
pub fn check(log: &Log, order: &[usize]) -> Result<()> {
    // Of the records passed so far, the operation that was submitted last.
    let mut last: Option<(usize, u64)> = None;
    for &number in order {
        let entry = entry(log, number)?;
        if let (Some((other, submitted)), Some(acknowledged)) = (last, entry.acknowledged)
            && acknowledged.event < submitted
        {
            bail!(
                "operation {number} was acknowledged before operation {other} was submitted, but comes after \
                 it in the journal: {entry:?}, {:?}",
                self::entry(log, other)?
            );
        }
        if last.is_none_or(|(_, submitted)| submitted < entry.submitted.event) {
            last = Some((number, entry.submitted.event));
        }
    }
    Ok(())
}

fn entry(log: &Log, number: usize) -> Result<&Entry> {
    log.entries.get(number).with_context(|| format!("operation {number} was never submitted"))
}

/// The operation behind each record; none yet for flushes, which all look alike.
fn identify(log: &Log, records: &[Record]) -> Result<Vec<Option<usize>>> {
    let mut clears = HashMap::new();
    for (number, Entry { operation, .. }) in log.entries.iter().enumerate() {
        if matches!(operation.action, Action::Zero { .. } | Action::Discard { .. }) {
            clears.insert((operation.disk, operation.action.range()), number);
        }
    }
    let mut seen = BTreeSet::new();
    let mut order = Vec::with_capacity(records.len());
    for (position, record) in records.iter().enumerate() {
        let what = || format!("record {position}, {record:?}");
        let number = match record.action {
            Action::Flush => {
                order.push(None);
                continue;
            }
            Action::Write { .. } => record.number,
            // A journal may know only zeroes; which of the two it was is the operation's.
            Action::Zero { .. } | Action::Discard { .. } => {
                clears.get(&(record.disk, record.action.range())).copied()
            }
        };
        let number = number.with_context(|| format!("{}, is of no operation", what()))?;
        let operation = entry(log, number).with_context(what)?.operation;
        if (operation.disk, operation.action.range()) != (record.disk, record.action.range()) {
            bail!("{}, is not of the range of its operation {number}, {operation:?}", what());
        }
        if !seen.insert(number) {
            bail!("{}, is a second one of operation {number}", what());
        }
        order.push(Some(number));
    }
    Ok(order)
}

/// Gives every flush record an operation, if there is any way to do so that agrees with the log.
///
/// The other records bound the place of each flush: behind all that were acknowledged before it was submitted,
/// before all that were submitted after it was acknowledged. Records are taken in order, each given to the
/// possible flush whose last possible place is the nearest; if there is any way, this finds one. (Of two
/// flushes one after the other both bounds of the first are at or before those of the second, so their order
/// comes out right as well, with ties broken by submission.)
fn place_flushes(log: &Log, records: &[Record], order: &mut [Option<usize>]) -> Result<()> {
    let bounds = Bounds::new(log, order)?;
    let flushes =
        log.entries.iter().enumerate().filter(|(_, entry)| entry.operation.action == Action::Flush);
    let mut coming: HashMap<usize, Vec<Flush>> = HashMap::new();
    for (number, entry) in flushes {
        let first = bounds.first(entry.submitted.event);
        let last = entry.acknowledged.map_or(usize::MAX, |moment| bounds.last(moment.event));
        let flush = Flush { last, submitted: entry.submitted.event, first, number };
        coming.entry(entry.operation.disk).or_default().push(flush);
    }
    for flushes in coming.values_mut() {
        flushes.sort_unstable_by_key(|flush| std::cmp::Reverse(flush.first));
    }
    let mut possible: HashMap<usize, BTreeSet<Flush>> = HashMap::new();
    for (position, record) in records.iter().enumerate() {
        if record.action != Action::Flush {
            continue;
        }
        let possible = possible.entry(record.disk).or_default();
        let coming = coming.entry(record.disk).or_default();
        while let Some(flush) = coming.pop_if(|flush| flush.first <= position) {
            possible.insert(flush);
        }
        match possible.pop_first() {
            Some(flush) if position <= flush.last => order[position] = Some(flush.number),
            Some(Flush { last, number, .. }) => bail!(
                "the flush {number} has no record at or before position {last}, where operations follow that \
                 were submitted after its acknowledgement; the next flush record is at {position}"
            ),
            None => bail!("the flush record at position {position} is of no operation"),
        }
    }
    Ok(())
}

/// A flush and the places it can have, ordered by which of them has to be placed first.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Flush {
    last: usize,
    submitted: u64,
    first: usize,
    number: usize,
}

/// Where in the journal an operation can be, by the records whose operations are known.
struct Bounds {
    /// By acknowledgement: the highest position so far.
    acknowledged: Vec<(u64, usize)>,
    /// By submission: the lowest position from there on.
    submitted: Vec<(u64, usize)>,
}

impl Bounds {
    fn new(log: &Log, order: &[Option<usize>]) -> Result<Bounds> {
        let (mut acknowledged, mut submitted) = (Vec::new(), Vec::new());
        for (position, number) in order.iter().enumerate() {
            if let Some(number) = number {
                let entry = entry(log, *number)?;
                submitted.push((entry.submitted.event, position));
                acknowledged.extend(entry.acknowledged.map(|moment| (moment.event, position)));
            }
        }
        acknowledged.sort_unstable();
        submitted.sort_unstable();
        let mut highest = 0;
        for (_, position) in &mut acknowledged {
            highest = highest.max(*position);
            *position = highest;
        }
        let mut lowest = usize::MAX;
        for (_, position) in submitted.iter_mut().rev() {
            lowest = lowest.min(*position);
            *position = lowest;
        }
        Ok(Bounds { acknowledged, submitted })
    }

    /// The first position behind all records acknowledged before `event`.
    fn first(&self, event: u64) -> usize {
        let count = self.acknowledged.partition_point(|(acknowledged, _)| *acknowledged < event);
        count.checked_sub(1).map_or(0, |last| self.acknowledged[last].1 + 1)
    }

    /// The last position before all records submitted after `event`.
    fn last(&self, event: u64) -> usize {
        let count = self.submitted.partition_point(|(submitted, _)| *submitted < event);
        self.submitted.get(count).map_or(usize::MAX, |(_, lowest)| lowest.saturating_sub(1))
    }
}

fn check_complete(log: &Log, order: &[usize]) -> Result<()> {
    let present: BTreeSet<usize> = order.iter().copied().collect();
    let missing = (log.entries.iter().enumerate())
        .find(|(number, entry)| entry.acknowledged.is_some() && !present.contains(number));
    match missing {
        None => Ok(()),
        Some((number, entry)) => {
            bail!("operation {number} was acknowledged but has no record: {entry:?}")
        }
    }
}
