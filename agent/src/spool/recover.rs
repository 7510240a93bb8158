//! Finding a spool again after a restart.
//!
//! Segments were begun one after the other, each when the one before was durable; they are removed
//! from the front. So what counts is the longest run of numbers at the end. Of its last segment the
//! frames are read and checked:
//!
//! | after the last sound frame | it is |
//! |---|---|
//! | nothing, zeros, or anything else | the end: the rest never was durable, or is damaged |
//!
//! Which of the two it is decides the state block: it names the position up to which the dirty map
//! relies on the spool. If that is not there, everything is compared ([`crate::state::recovery`]).
//! The segments before are read when they are sent.

use std::{collections::VecDeque, io, sync::Arc};

use tidemark_journal::{
    FrameView, GroupId, Position,
    frame::{FrameHeader, HEADER_BYTES},
    segment::{BLOCK_BYTES, SegmentStart},
};
use tidemark_link::seam::AlignedBuf;

use super::{
    media::{Media, MediaFile},
    store::{Index, Limits, Segment, Store, name, number},
    walk::{Step, Walk},
};

/// Opens the spool of a group with what is in it.
///
/// # Errors
/// Those of the disk.
pub fn recover(media: Arc<dyn Media>, group: GroupId, limits: Limits) -> io::Result<Store> {
    let mut numbers: Vec<u64> = media.names()?.iter().filter_map(|name| number(name)).collect();
    numbers.sort_unstable();
    let mut run: VecDeque<Segment> = VecDeque::new();
    for number in numbers.iter().rev() {
        let file = media.open(&name(*number))?;
        let next = run.front().copied();
        if next.is_some_and(|next| next.number != number + 1) {
            break;
        }
        let Some(found) = read_start(&*file, *number, group)? else {
            // One that was being begun holds nothing. Any other is damaged, and ends the run.
            if next.is_none() { continue } else { break }
        };
        let segment = match next {
            Some(next) => Segment { last: next.before, ..found },
            None => match scan(file, found)? {
                Some(segment) => segment,
                None => continue,
            },
        };
        run.push_front(segment);
    }
    for number in numbers.iter().filter(|number| !run.iter().any(|one| one.number == **number)) {
        media.remove(&name(*number))?;
    }
    let run_last = run.back().map(|segment| segment.number);
    let index = Index::new(media, run, limits.bytes_max);
    // Without a break, and after what a power cut might bring back.
    let last = run_last.or(numbers.last().copied());
    let next = last.map_or(0, |last| last + 1);
    Ok(Store::new(group, limits, index, next))
}

/// What the beginning of a segment says; its frames are taken to reach to the file's end. None if
/// it is none of ours.
fn read_start(file: &dyn MediaFile, number: u64, group: GroupId) -> io::Result<Option<Segment>> {
    let mut blocks = AlignedBuf::new(2 * BLOCK_BYTES as usize);
    blocks.resize(2 * BLOCK_BYTES as usize).map_err(io::Error::other)?;
    let read = file.read(0, blocks.as_mut_slice())?;
    if read < blocks.len() {
        return Ok(None);
    }
    let (header, first) = blocks.as_slice().split_at(BLOCK_BYTES as usize);
    let Ok(start) = SegmentStart::decode(header) else { return Ok(None) };
    if start.number != number || start.group != group {
        return Ok(None);
    }
    let frame = FrameHeader::peek(&first[..HEADER_BYTES]);
    let Ok(frame) = frame else { return Ok(None) };
    let end = file.bytes()? / BLOCK_BYTES * BLOCK_BYTES;
    Ok(Some(Segment {
        number,
        before: start.before,
        last: start.before,
        time_ns: frame.time_ns.get(),
        end,
        file_bytes: end,
    }))
}

/// The last segment: its frames are read up to the first thing that is none, and the rest is cut
/// off. What is found is made durable, since it may only just have been written.
fn scan(file: Box<dyn MediaFile>, found: Segment) -> io::Result<Option<Segment>> {
    let mut walk = Walk::new(file);
    let mut last: Option<Position> = None;
    let mut end = BLOCK_BYTES;
    while let Step::Frame(view) = walk.step(found.end)? {
        let header = view.header();
        let before = last.unwrap_or(found.before);
        if !follows(before, &view) {
            break;
        }
        last = Some(header.last());
        end = walk.offset().next_multiple_of(BLOCK_BYTES);
    }
    let Some(last) = last else { return Ok(None) };
    walk.file().cut(end)?;
    walk.file().sync()?;
    Ok(Some(Segment { last, end, file_bytes: end, ..found }))
}

/// Whether a frame may stand after the position `before` in a spool: it continues it, or opens a
/// later term.
pub(super) fn follows(before: Position, frame: &FrameView<'_>) -> bool {
    let header = frame.header();
    let opens = header.before().term != header.last().term;
    header.before() == before || (opens && header.before().seq >= before.seq)
}
