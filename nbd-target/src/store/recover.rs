//! Finding a log again after a restart.
//!
//! Sealed segments that the catalogue knows are taken as they are. The others, mostly just the one
//! that was being written, are scanned. Where the frames of a segment end, the bytes decide:
//!
//! | after the last good frame | a whole frame further on, at a multiple of 4096 | what was acknowledged | it is |
//! |---|---|---|---|
//! | zeros to the end | no | is all here | the end |
//! | anything else | no | is all here | an unacknowledged tail, cut off |
//! | any | no | is not all here | damage |
//! | any | yes | any | damage |
//!
//! A batch is written only after the one before was synced, and only its first frame begins at a
//! multiple of 4096; so a whole frame further on shows that what is missing had been durable. What
//! is damaged is never cut off (invariant 8): the file is kept under another name, and the log ends
//! before the damage, so that the source sends again what it has or compares everything.
//!
//! Where not even the first frame is good, the table says whether the file is damaged or may be
//! removed: it had been made ahead of need, or its first batch never became durable. The header is
//! written with that batch, and its sector whole or not at all. So a frame right behind it is one
//! further on if the header is neither whole nor zeros.

use std::{collections::BTreeMap, io, path::Path, sync::Arc};

use anyhow::{Context, bail};
use tidemark_journal::{
    FrameView, GroupId, Position, Seq,
    frame::{FrameHeader, HEADER_BYTES},
    segment::{BLOCK_BYTES, Next, SegmentEnd, SegmentStart, next, padding},
};

use super::{
    index::MemoryIndex,
    journal::Follower,
    log::{LogOptions, Start, Tail, seal},
    segment::{Caches, Segment, Summary, file_name, number_of},
};
use crate::machine::{File, How, Machine, free_name};

/// What the catalogue knows of a sealed segment.
#[derive(Clone, Copy, Debug)]
pub struct KnownSegment {
    /// What is known of its content.
    pub summary: Summary,
    /// Byte at which its index begins.
    pub index_at: u64,
    /// The chain hash after it.
    pub chain: [u8; 32],
}

/// What there is to know before looking.
pub struct Expected<'a> {
    /// The group.
    pub group: GroupId,
    /// The lowest segment number that still counts; files below it are remains and are removed.
    pub first: u64,
    /// The sealed segments.
    pub known: &'a BTreeMap<u64, KnownSegment>,
    /// The position before the first segment that counts.
    pub before: Position,
    /// The last sequence known to have been acknowledged.
    pub acked: Seq,
    /// The age counter that is given to what is found.
    pub received_ns: u64,
}

/// What was found.
pub struct Recovered {
    /// The segments from the oldest to the newest.
    pub segments: Vec<Arc<Segment>>,
    /// Where to go on.
    pub start: Start,
    /// The last position.
    pub end: Position,
    /// What was damaged, a sentence each.
    pub damage: Vec<String>,
    /// Sealed segments that are not as the catalogue knows them, by number, a sentence each. The log
    /// does not end there: what is good of them can be read.
    pub suspect: Vec<(u64, String)>,
}

/// Finds the log in `dir`, which is created if it is not there. Frames that no known segment holds
/// are handed to the follower in order.
///
/// # Errors
/// When files cannot be read or written, or a known segment is missing.
pub fn recover(
    dir: &Path,
    caches: &Arc<Caches>,
    options: &LogOptions,
    expected: &Expected<'_>,
    follower: &dyn Follower,
) -> anyhow::Result<Recovered> {
    let machine = &caches.machine;
    machine.create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let numbers = list(machine, dir, expected.first)?;
    for known in expected.known.keys().filter(|number| **number >= expected.first) {
        if !numbers.contains(known) {
            bail!("segment {known} of {} is missing", dir.display());
        }
    }
    let mut found = Recovered {
        segments: Vec::new(),
        start: Start::Next { number: expected.first, chain_before: [0; 32] },
        end: expected.before,
        damage: Vec::new(),
        suspect: Vec::new(),
    };
    let mut chain = [0; 32];
    let mut next_number = expected.first;
    let mut unsealed: Option<(Scan, Arc<Segment>)> = None;
    for number in numbers {
        let path = dir.join(file_name(number));
        if let Some(known) = expected.known.get(&number) {
            if let Some(why) = differs(machine, &path, number, expected.group, known)? {
                found.suspect.push((number, format!("{} is damaged: {why}", path.display())));
            }
            found.end = known.summary.last;
            let (summary, index_at) = (known.summary, known.index_at);
            found.segments.push(Arc::new(Segment::sealed(path, number, summary, index_at, caches)));
            (chain, next_number) = (known.chain, number + 1);
            continue;
        }
        if !found.damage.is_empty() || number != next_number {
            set_aside(machine, &path, &mut found.damage, "it follows what is damaged")?;
            continue;
        }
        let scan = scan(machine, &path, number, expected, found.end, follower)
            .with_context(|| format!("cannot scan {}", path.display()))?;
        if scan.nothing {
            // A later one is begun only when this one has come to its end.
            let held = found.end.seq < expected.acked || begun(machine, dir, number + 1)?;
            if scan.foreign {
                let why = "it does not follow the segment before";
                set_aside(machine, &path, &mut found.damage, why)?;
            } else if (scan.frames_further_on && options.sync_batches) || (scan.bad && held) {
                let why = "it is damaged at its beginning, below what was acknowledged";
                set_aside(machine, &path, &mut found.damage, why)?;
            } else {
                // Room set aside ahead of need, or a first batch that was never acknowledged.
                machine.remove_file(&path)?;
            }
            continue;
        }
        // A segment was begun only after the one before had come to its end.
        if let Some((scan, segment)) = unsealed.take() {
            chain = seal_found(&scan, &segment, follower)?;
        }
        found.end = scan.summary.last;
        next_number = number + 1;
        let short = found.end.seq < expected.acked && !begun(machine, dir, next_number)?;
        if (scan.frames_further_on && options.sync_batches) || (scan.bad && short) {
            repair(machine, &path, &scan, &mut found.damage)?;
        } else if scan.bad {
            tracing::info!(segment = number, at = scan.end, "an unacknowledged tail is cut off");
        }
        write_anew(machine, &path, &scan, expected.acked)
            .with_context(|| format!("cannot write {}", path.display()))?;
        let mut scan = scan;
        let segment = match scan.sealed {
            Some(end) => {
                chain = end.chain;
                let segment = Segment::sealed(path, number, scan.summary, end.index_at, caches);
                let segment = Arc::new(segment);
                follower.sealed(&segment, &end)?;
                segment
            }
            None => {
                cut(machine, &path, scan.end, options.segment_bytes)?;
                let index = std::mem::take(&mut scan.index);
                Arc::new(Segment::open(path, number, scan.summary, index, caches))
            }
        };
        if scan.sealed.is_none() {
            unsealed = Some((scan, Arc::clone(&segment)));
        }
        found.segments.push(segment);
    }
    if found.end.seq < expected.acked && found.damage.is_empty() {
        found.damage.push(format!(
            "{} ends at {}, although {} had been acknowledged",
            dir.display(),
            found.end.seq,
            expected.acked
        ));
    }
    found.start = match unsealed {
        Some((scan, segment)) => Start::Tail(Box::new(Tail {
            end: scan.end + padding(scan.end),
            file_bytes: machine.open(segment.path(), How::Read)?.length()?,
            hasher: scan.hasher,
            chain_before: scan.chain_before,
            segment,
        })),
        None => Start::Next { number: next_number, chain_before: chain },
    };
    Ok(found)
}

const ZEROS: [u8; BLOCK_BYTES as usize] = [0; BLOCK_BYTES as usize];

/// What a scan of a segment found.
struct Scan {
    summary: Summary,
    /// Byte at which the last good frame ends.
    end: u64,
    chain_before: [u8; 32],
    /// The trailer, when the segment is sealed.
    sealed: Option<SegmentEnd>,
    /// The index of its frames.
    index: MemoryIndex,
    /// Over the bytes up to the end of the last good frame's block.
    hasher: blake3::Hasher,
    /// No frame is in it.
    nothing: bool,
    /// It says that it follows something else than what is here.
    foreign: bool,
    /// Something that is neither a frame nor zeros follows the last good frame.
    bad: bool,
    /// A whole frame stands at a multiple of 4096 after what is missing.
    frames_further_on: bool,
}

fn scan(
    machine: &Machine,
    path: &Path,
    number: u64,
    expected: &Expected<'_>,
    before: Position,
    follower: &dyn Follower,
) -> anyhow::Result<Scan> {
    let file = machine.open(path, How::Read)?;
    let bytes = file.length()?;
    let mut block = vec![0; BLOCK_BYTES as usize];
    let mut result = Scan {
        summary: Summary::empty(before),
        end: BLOCK_BYTES,
        chain_before: [0; 32],
        sealed: None,
        index: MemoryIndex::default(),
        hasher: blake3::Hasher::new(),
        nothing: true,
        foreign: false,
        bad: false,
        frames_further_on: false,
    };
    file.read_up_to(&mut block, 0)?;
    match SegmentStart::decode(&block) {
        Ok(start)
            if (start.number, start.group, start.before) == (number, expected.group, before) =>
        {
            result.chain_before = start.chain_before;
        }
        Ok(_) => {
            result.foreign = true;
            return Ok(result);
        }
        Err(_) => {
            let is_there = |block: &[u8]| block.iter().any(|byte| *byte != 0);
            // No crash leaves half of it.
            let rotten = is_there(&block);
            let from = if rotten { 0 } else { BLOCK_BYTES };
            result.frames_further_on = frames_further_on(&file, from, bytes, expected, before.seq)?;
            let have = file.read_up_to(&mut block, BLOCK_BYTES)?;
            result.bad = rotten || is_there(&block[..have]);
            return Ok(result);
        }
    }
    if bytes >= 2 * BLOCK_BYTES {
        file.read_up_to(&mut block, bytes - BLOCK_BYTES)?;
        let trailer = SegmentEnd::decode(&block).ok().filter(|end| end.number == number);
        let up_to = bytes - BLOCK_BYTES;
        result.sealed =
            trailer.filter(|end| end.index_at.checked_add(end.index_bytes) == Some(up_to));
    }
    file.read_up_to(&mut block, 0)?;
    result.hasher.update(&block);
    let limit = result.sealed.map_or(bytes, |end| end.index_at);
    let mut at = BLOCK_BYTES;
    let mut header = vec![0; HEADER_BYTES];
    let mut frame = Vec::new();
    let mut missing = false;
    while at < limit {
        let have = file.read_up_to(&mut header, at)?;
        match next(at, &header[..have]) {
            Next::Pad(further) => at = further,
            Next::Frame(frame_bytes) if at + frame_bytes as u64 <= limit => {
                frame.resize(frame_bytes, 0);
                file.read_up_to(&mut frame, at)?;
                let good = FrameView::parse(&frame).ok().filter(|view| {
                    view.verify_chunks().is_ok()
                        && view.header().group() == expected.group
                        && view.header().first_seq.get() > result.summary.last.seq.0
                });
                let Some(view) = good else {
                    result.bad = true;
                    break;
                };
                if !follows(view.header(), result.summary.last) {
                    // A frame that stood between them is missing, and zeros look like padding.
                    (result.bad, missing) = (true, true);
                    break;
                }
                // What is between the frames is zeros.
                result.hasher.update(&ZEROS[..(at - result.end) as usize]);
                result.hasher.update(&frame);
                result.index.insert(&view, at);
                at += frame_bytes as u64;
                result.end = at;
                result.nothing = false;
                result.summary.extend(&view, at + padding(at), expected.received_ns);
                follower.stored(&view);
            }
            Next::Frame(_) => {
                result.bad = true;
                break;
            }
            Next::End(_) => {
                let have = file.read_up_to(&mut block, at)?;
                result.bad = block[..have].iter().any(|byte| *byte != 0);
                break;
            }
        }
    }
    result.hasher.update(&ZEROS[..padding(result.end) as usize]);
    let last = result.summary.last.seq;
    if let Some(end) = result.sealed {
        result.frames_further_on = end.last.seq != last;
        if result.frames_further_on {
            result.sealed = None;
        }
    } else {
        result.frames_further_on = missing || frames_further_on(&file, at, bytes, expected, last)?;
    }
    Ok(result)
}

/// Whether a frame may stand after this position: inside a term exactly. A new term may begin above
/// what has been kept of the one before.
fn follows(header: &FrameHeader, last: Position) -> bool {
    let before = header.before();
    before == last || (header.last().term != last.term && before.seq >= last.seq)
}

/// Writes anew what was not known to be durable: from the first frame above `acked` to the end. An
/// earlier life may have ended with a failed sync, after which the kernel shows what the disk does
/// not have, and says of the next sync that all is well.
fn write_anew(machine: &Machine, path: &Path, scan: &Scan, acked: Seq) -> io::Result<()> {
    let file = machine.open(path, How::Write)?;
    let end = if scan.sealed.is_some() { file.length()? } else { scan.end };
    let rows = scan.index.frames();
    let kept = rows.partition_point(|row| row.last <= acked);
    // With the first frame came the header; what ends the segment came after the last.
    let mut at = match rows.get(kept) {
        Some(_) if kept == 0 => 0,
        Some(row) => u64::from(row.offset) / BLOCK_BYTES * BLOCK_BYTES,
        None => scan.end / BLOCK_BYTES * BLOCK_BYTES,
    };
    let mut part = vec![0; 1 << 20];
    while at < end {
        let bytes = (end - at).min(part.len() as u64) as usize;
        file.read_exact_at(&mut part[..bytes], at)?;
        file.write_all_at(&part[..bytes], at)?;
        at += bytes as u64;
    }
    file.sync_all()
}

/// Whether a whole frame above `seq` begins at a multiple of 4096 after `from`.
fn frames_further_on(
    file: &File,
    from: u64,
    to: u64,
    expected: &Expected<'_>,
    seq: Seq,
) -> io::Result<bool> {
    const STEP_BYTES: u64 = 1 << 20;
    let mut step = vec![0; STEP_BYTES as usize];
    let mut at = from.next_multiple_of(BLOCK_BYTES);
    if at == from {
        at += BLOCK_BYTES;
    }
    while at < to {
        let have = file.read_up_to(&mut step, at)?;
        for (place, block) in step[..have].chunks(BLOCK_BYTES as usize).enumerate() {
            let Ok(header) = tidemark_journal::frame::FrameHeader::peek(block) else { continue };
            let mut meta = vec![0; header.meta_bytes.get() as usize];
            file.read_up_to(&mut meta, at + place as u64 * BLOCK_BYTES)?;
            let whole = FrameView::parse_meta(&meta).is_ok_and(|view| {
                view.header().group() == expected.group && view.header().last_seq.get() > seq.0
            });
            if whole {
                return Ok(true);
            }
        }
        if have == 0 {
            break;
        }
        at += have as u64;
    }
    Ok(false)
}

/// Cuts off what follows the frames and sets the room aside anew, durably.
fn cut(machine: &Machine, path: &Path, end: u64, segment_bytes: u64) -> anyhow::Result<()> {
    let file = machine.open(path, How::Write)?;
    let whole = segment_bytes.max((end + padding(end)) * 2);
    if file.length()? != whole || !zeros_after(&file, end)? {
        file.set_len(end)?;
        file.set_len(end + padding(end))?;
    }
    if let Err(error) = file.preallocate(whole) {
        // Without room the segment is full as it is, and the next one waits for room.
        tracing::warn!(path = %path.display(), "no room to go on: {error}");
    }
    file.sync_all()?;
    Ok(())
}

fn zeros_after(file: &File, end: u64) -> io::Result<bool> {
    let mut block = vec![0; (padding(end) + BLOCK_BYTES) as usize];
    let have = file.read_up_to(&mut block, end)?;
    Ok(block[..have].iter().all(|byte| *byte == 0))
}

/// Seals a segment that a later one follows.
fn seal_found(scan: &Scan, segment: &Segment, follower: &dyn Follower) -> anyhow::Result<[u8; 32]> {
    let end = scan.end + padding(scan.end);
    let data_hash = *scan.hasher.finalize().as_bytes();
    let chain = SegmentEnd::chain_hash(&scan.chain_before, &data_hash);
    seal(segment, end, data_hash, chain, follower)?;
    Ok(chain)
}

/// Keeps a damaged segment under another name and puts its good part in its place.
fn repair(
    machine: &Machine,
    path: &Path,
    scan: &Scan,
    damage: &mut Vec<String>,
) -> anyhow::Result<()> {
    let copy = path.with_extension("part");
    let (from, to) = (machine.open(path, How::Read)?, machine.open(&copy, How::Truncate)?);
    let mut part = vec![0; 1 << 20];
    let mut done = 0;
    while done < scan.end {
        let bytes = (scan.end - done).min(part.len() as u64) as usize;
        from.read_exact_at(&mut part[..bytes], done)?;
        to.write_all_at(&part[..bytes], done)?;
        done += bytes as u64;
    }
    to.sync_all()?;
    let reason = format!(
        "{} is damaged at byte {}, below what was acknowledged; records after {} are lost here",
        path.display(),
        scan.end,
        scan.summary.last.seq
    );
    machine.rename(path, &free_name(machine, path, "damaged"))?;
    machine.rename(&copy, path)?;
    machine.sync_parent(path)?;
    damage.push(reason);
    Ok(())
}

fn set_aside(
    machine: &Machine,
    path: &Path,
    damage: &mut Vec<String>,
    why: &str,
) -> anyhow::Result<()> {
    machine.rename(path, &free_name(machine, path, "damaged"))?;
    machine.sync_parent(path)?;
    damage.push(format!("{} is set aside: {why}", path.display()));
    Ok(())
}

/// What of a sealed segment's size, header and trailer is not as the catalogue knows it, as a clause.
fn differs(
    machine: &Machine,
    path: &Path,
    number: u64,
    group: GroupId,
    known: &KnownSegment,
) -> io::Result<Option<String>> {
    let file = machine.open(path, How::Read)?;
    let bytes = file.length()?;
    let mut block = vec![0; BLOCK_BYTES as usize];
    file.read_up_to(&mut block, 0)?;
    let start = SegmentStart::decode(&block).ok();
    let begins = (number, group, known.summary.before);
    if start.is_none_or(|start| (start.number, start.group, start.before) != begins) {
        return Ok(Some("its header is not the one that belongs here".to_owned()));
    }
    file.read_up_to(&mut block, bytes.saturating_sub(BLOCK_BYTES))?;
    let end = SegmentEnd::decode(&block).ok();
    let ends = (number, known.index_at, known.summary.last, known.chain);
    let good = end.filter(|end| (end.number, end.index_at, end.last, end.chain) == ends);
    Ok(match good {
        Some(end) if end.index_at + end.index_bytes + BLOCK_BYTES == bytes => None,
        Some(_) => Some(format!("its size of {bytes} bytes is wrong")),
        None => Some("its end is not the one that belongs here".to_owned()),
    })
}

/// Whether the segment of this number has been begun: it has its header.
fn begun(machine: &Machine, dir: &Path, number: u64) -> anyhow::Result<bool> {
    let mut block = vec![0; BLOCK_BYTES as usize];
    match machine.open(&dir.join(file_name(number)), How::Read) {
        Ok(file) => file.read_up_to(&mut block, 0)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    Ok(SegmentStart::decode(&block).is_ok())
}

/// The numbers of the segments in a directory from `first` on; files below it are removed.
fn list(machine: &Machine, dir: &Path, first: u64) -> anyhow::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for entry in machine.list(dir)? {
        let Some(number) = number_of(&entry.name) else { continue };
        if number < first {
            machine.remove_file(&dir.join(entry.name))?;
        } else {
            numbers.push(number);
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

#[cfg(test)]
mod tests;
