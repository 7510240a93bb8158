//! Is a journal's order one that the disks' user could have seen?

use std::collections::{BTreeMap, BTreeSet, HashMap};

use anyhow::{Context, Result, bail};

use super::{Action, Entry, Log};

/// A front may split zeroes and discards at multiples of this, as it may split writes anywhere.
pub const CLEAR_SPAN_BYTES: u64 = 64 << 20;

/// A record of a journal that stands for an operation of a user, or for a part of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// The index of the disk.
    pub disk: usize,
    /// What the record says was done.
    pub action: Action,
    /// For a write, the number that its content names ([`super::content::number`]).
    pub number: Option<usize>,
}

/// A part of an operation, all of it in most cases: what one record did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// The operation's number.
    pub number: usize,
    /// What was done.
    pub action: Action,
}

/// Finds the operation behind each record and proves that
///
/// - the records of every acknowledged operation cover its range exactly once, and those of a failed one no
///   byte twice;
/// - no record is of anything else;
/// - whenever one operation was acknowledged before another was submitted, all its records come first.
///
/// Gives the parts of operations in the journal's order.
pub fn of_journal(log: &Log, records: &[Record]) -> Result<Vec<Part>> {
    let mut order = identify(log, records)?;
    place_flushes(log, records, &mut order)?;
    let order: Vec<usize> = order.into_iter().flatten().collect();
    let parts: Vec<Part> = (order.iter().zip(records))
        .map(|(number, record)| Part { number: *number, action: record.action })
        .collect();
    check_complete(log, &parts)?;
    check(log, &order)?;
    Ok(parts)
}

/// Like [`of_journal`], for disks behind a kernel's block layer, which answers flushes that wait together with
/// one: each flush has a record where one of its own could be, and each flush record is in the place of a
/// flush, the number of which its part gets.
pub fn of_block_journal(log: &Log, records: &[Record]) -> Result<Vec<Part>> {
    let mut order = identify(log, records)?;
    check(log, &order.iter().copied().flatten().collect::<Vec<_>>())?;
    let flushed = share_flushes(log, records, &mut order)?;
    let mut parts: Vec<Part> = (order.into_iter().flatten().zip(records))
        .map(|(number, record)| Part { number, action: record.action })
        .collect();
    let count = parts.len();
    parts.extend(flushed.into_iter().map(|number| Part { number, action: Action::Flush }));
    check_complete(log, &parts)?;
    parts.truncate(count);
    Ok(parts)
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

/// The ranges, (offset, length) in bytes, that a front may make of the range of a zero or a discard.
pub fn clear_ranges(range: (u64, u64)) -> Vec<(u64, u64)> {
    let (mut offset, end) = (range.0, range.0 + range.1);
    let mut ranges = Vec::new();
    while offset < end {
        let next = ((offset / CLEAR_SPAN_BYTES + 1) * CLEAR_SPAN_BYTES).min(end);
        ranges.push((offset, next - offset));
        offset = next;
    }
    if ranges.len() > 1 {
        ranges.push(range);
    }
    ranges
}

/// The operation behind each record; none yet for flushes, which all look alike.
fn identify(log: &Log, records: &[Record]) -> Result<Vec<Option<usize>>> {
    let mut clears = HashMap::new();
    for (number, Entry { operation, .. }) in log.entries.iter().enumerate() {
        if let Action::Zero { .. } | Action::Discard { .. } = operation.action
            && let Some(range) = operation.action.range()
        {
            for range in clear_ranges(range) {
                clears.insert((operation.disk, range), number);
            }
        }
    }
    // By operation: where the parts seen begin and end.
    let mut seen: HashMap<usize, BTreeMap<u64, u64>> = HashMap::new();
    let mut order = Vec::with_capacity(records.len());
    for (position, record) in records.iter().enumerate() {
        let what = || format!("record {position}, {record:?}");
        let Some(range) = record.action.range() else {
            order.push(None);
            continue;
        };
        let number = match record.action {
            Action::Write { .. } => record.number,
            // A journal may know only zeroes; which of the two it was is the operation's.
            _ => clears.get(&(record.disk, range)).copied(),
        };
        let number = number.with_context(|| format!("{}, is of no operation", what()))?;
        let operation = entry(log, number).with_context(what)?.operation;
        let (start, end) = (range.0, range.0 + range.1);
        let inside = |(offset, length)| offset <= start && end <= offset + length;
        if operation.disk != record.disk || !operation.action.range().is_some_and(inside) {
            bail!("{}, is not of the range of its operation {number}, {operation:?}", what());
        }
        let seen = seen.entry(number).or_default();
        if seen.range(..end).next_back().is_some_and(|(_, other_end)| *other_end > start) {
            bail!("{}, is a second one of operation {number}", what());
        }
        seen.insert(start, end);
        order.push(Some(number));
    }
    Ok(order)
}

/// Gives every flush record an operation, if there is any way to do so that agrees with the log.
///
/// The other records bound the place of each flush: behind all that were acknowledged before it was submitted,
/// before all that were submitted after it was acknowledged. Records are taken in order, each given to that
/// flush of its disk which was acknowledged first, among those that may come here: behind their bound, and with
/// no flush of any disk still to come that was acknowledged before their submission. If there is any way, this
/// finds one: in a way that has another flush here and this one later, the two can change places, since whoever
/// must follow the other must follow this one as well.
fn place_flushes(log: &Log, records: &[Record], order: &mut [Option<usize>]) -> Result<()> {
    let bounds = Bounds::new(log, order)?;
    let flushes =
        log.entries.iter().enumerate().filter(|(_, entry)| entry.operation.action == Action::Flush);
    let mut coming: HashMap<usize, Vec<Flush>> = HashMap::new();
    let mut unplaced: BTreeSet<(u64, usize)> = BTreeSet::new();
    for (number, entry) in flushes {
        let submitted = entry.submitted.event;
        let acknowledged = entry.acknowledged.map_or(u64::MAX, |moment| moment.event);
        let (first, last) = (bounds.first(submitted), bounds.last(acknowledged));
        unplaced.insert((acknowledged, number));
        let flush = Flush { acknowledged, number, submitted, first, last };
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
        let earliest = unplaced.first().map_or(u64::MAX, |(acknowledged, _)| *acknowledged);
        let chosen = possible.iter().find(|flush| flush.submitted <= earliest).copied();
        let chosen = chosen.with_context(|| {
            format!("the flush record at position {position} is of no operation")
        })?;
        let Flush { acknowledged, number, last, .. } = chosen;
        if position > last {
            bail!(
                "the flush {number} has no record at or before position {last}, where operations follow that \
                 were submitted after its acknowledgement; the next flush record is at {position}"
            );
        }
        possible.remove(&chosen);
        unplaced.remove(&(acknowledged, number));
        order[position] = Some(number);
    }
    Ok(())
}

/// Gives every flush record one of the flushes in whose possible places it lies. The flushes that have one.
fn share_flushes(log: &Log, records: &[Record], order: &mut [Option<usize>]) -> Result<Vec<usize>> {
    let bounds = Bounds::new(log, order)?;
    let mut flushed = Vec::new();
    for (number, entry) in log.entries.iter().enumerate() {
        if entry.operation.action != Action::Flush {
            continue;
        }
        let first = bounds.first(entry.submitted.event).min(records.len());
        let last = entry.acknowledged.map_or(usize::MAX, |moment| bounds.last(moment.event));
        let end = last.saturating_add(1).clamp(first, records.len());
        for position in first..end {
            let record = records[position];
            if record.action == Action::Flush && record.disk == entry.operation.disk {
                order[position] = Some(number);
                flushed.push(number);
            }
        }
    }
    match order.iter().position(Option::is_none) {
        Some(position) => bail!("the flush record at position {position} is of no operation"),
        None => Ok(flushed),
    }
}

/// A flush and the places it can have, ordered by which of them has to be placed first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Flush {
    acknowledged: u64,
    number: usize,
    submitted: u64,
    first: usize,
    last: usize,
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

/// Parts of one operation do not overlap, so they cover its range if they are long enough together.
fn check_complete(log: &Log, parts: &[Part]) -> Result<()> {
    let length_of = |action: Action| action.range().map_or(1, |(_, length_bytes)| length_bytes);
    let mut covered = vec![0; log.entries.len()];
    for part in parts {
        covered[part.number] += length_of(part.action);
    }
    for (number, (entry, covered)) in log.entries.iter().zip(covered).enumerate() {
        if entry.acknowledged.is_some() && covered < length_of(entry.operation.action) {
            let what = if covered == 0 { "has no record" } else { "lacks a part in the journal" };
            bail!("operation {number} was acknowledged but {what}: {entry:?}");
        }
    }
    Ok(())
}
