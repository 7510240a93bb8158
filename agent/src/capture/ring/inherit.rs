//! Taking over the ring of an agent that has died, or that has made room for this one.
//!
//! Its memory is as that agent's threads left it between any two of their stores. What each slot
//! says, and what follows:
//!
//! | reserved | committed | local-done | failed | record | follows |
//! |---|---|---|---|---|---|
//! | no | - | - | - | any | it was being freed; or the memory is not trusted |
//! | yes | no | - | - | any | nothing was written and nobody was answered: the record becomes *void* |
//! | yes | yes | no | no | write, zero, discard | the disk may have it or not: it is carried out again, its range locked meanwhile |
//! | yes | yes | no | no | any other | nothing is left to do |
//! | yes | yes | no | yes | write, zero, discard | the disk refused it: its regions are marked uncaptured and read back |
//! | yes | yes | yes | - | any | nothing is left to do |
//!
//! Carrying a write out again is exact, where reading back would send the same content twice: nothing
//! that overlaps it was let through after it, its sender has no answer, and nothing is served before
//! it is through. A request that the kernel issues again is a new one, after it.
//!
//! A record is in a frame already if its sequence is not above the last one that was put into the
//! outbox; the encoder goes on with the next one.

use std::{
    ops::RangeInclusive,
    sync::{Arc, atomic::Ordering},
};

use tidemark_journal::{GapReason, Kind, Record, Seq, VolumeId};
use zerocopy::IntoBytes;

use super::{
    super::gap::Gap,
    RingReader, RingWriter, SlotRef,
    memory::{ENCODED_AT, FRAMED_SEQ_AT, FREED_AT, RESERVED_AT, RingMemory, SlotFields, state},
};
use crate::{kernel::memfd::RegionError, state::COUNT_MAX};

/// Why a ring that was left behind is not gone on with.
#[derive(Debug, thiserror::Error)]
pub enum NotOurs {
    /// The memory is of another size, or cannot be mapped.
    #[error("{0}")]
    Region(#[from] RegionError),
    /// It is another ring than the one that the state speaks of.
    #[error("the ring that was left behind {0}")]
    Header(&'static str),
    /// Its content contradicts itself.
    #[error("the ring that was left behind contradicts itself: {0}")]
    Content(&'static str),
}

/// A ring that was left behind, checked and ready to go on.
pub struct Inherited {
    memory: Arc<RingMemory>,
    /// The last sequence that was drawn.
    pub last_seq: Seq,
    /// The last sequence that lies in a frame; the encoder goes on after it.
    pub framed: Seq,
    /// The gap of each volume, in the order of the table.
    pub gaps: Vec<Option<Gap>>,
    /// Volumes of which a flush has failed: what was not flushed may be lost, and is not marked yet.
    pub unflushed: Vec<VolumeId>,
    /// Writes, zeroes and discards to be carried out again.
    pub redo: Vec<(SlotRef, Record)>,
    /// Those that the disk refused: what it holds there is unknown.
    pub failed: Vec<(SlotRef, Record)>,
    freed: u64,
    encoded: u64,
    reserved: u64,
    data: (u64, u64),
}

/// Checks the slots of a ring with these volumes (and their sectors), and settles what they were in
/// the middle of. `in_frames` is the last
/// sequence in the frames that are kept; `term` goes from the sequence that the term continues to
/// the last one that may have been drawn.
///
/// # Errors
/// [`NotOurs::Content`]. Nothing has been changed.
pub fn inherit(
    memory: Arc<RingMemory>,
    volumes: &[(VolumeId, u64)],
    in_frames: Option<Seq>,
    term: RangeInclusive<Seq>,
) -> Result<Inherited, NotOurs> {
    let no = |what| Err(NotOurs::Content(what));
    let load = |at| memory.word(at).load(Ordering::Acquire);
    let (reserved, encoded, mut freed) = (load(RESERVED_AT), load(ENCODED_AT), load(FREED_AT));
    let in_order = freed <= encoded && encoded <= reserved && reserved <= COUNT_MAX;
    if !in_order || reserved - freed > memory.layout().slots {
        return no("its counters");
    }
    // The last one may have been put there without being noted.
    let framed = in_frames.unwrap_or_default().max(Seq(load(FRAMED_SEQ_AT)));
    while freed < encoded && memory.state(freed).load(Ordering::Acquire) == 0 {
        freed += 1;
    }
    let mut slots = Vec::with_capacity((reserved - freed) as usize);
    let (mut last, mut data) = (None::<Record>, None);
    for slot in freed..reserved {
        let fields = memory.read_slot(slot);
        let Some(record) = record(&fields) else { return no("a record") };
        let in_order =
            last.is_none_or(|last| last.seq < record.seq && last.time_ns <= record.time_ns);
        if !in_order || record.seq > *term.end() {
            return no("the order of its records");
        }
        let Some((begin, _)) = place(&memory, &fields, data) else {
            return no("a payload's place");
        };
        data = Some((begin, fields.data_end.get()));
        last = Some(record);
        slots.push((slot, record, fields));
    }
    if !term.contains(&framed) {
        return no("the end of its frames");
    }
    let fits = |(_, record, _): &(u64, Record, SlotFields)| {
        !record.kind.has_range()
            || volumes.iter().any(|(id, size)| *id == record.volume && record.end().0 <= *size)
    };
    if !slots.iter().all(fits) {
        return no("a record's range");
    }
    let mut gaps = Vec::with_capacity(volumes.len());
    for index in 0..volumes.len() {
        let Some(gap) = memory.gap(index) else { return no("a volume's gap") };
        gaps.push(gap);
    }
    let ids = volumes.iter().map(|(id, _)| *id).enumerate();
    let unflushed =
        ids.filter(|(index, _)| memory.flush_failed(*index)).map(|(_, id)| id).collect();
    let unframed = slots.partition_point(|(_, record, _)| record.seq <= framed) as u64;
    if freed + unframed < encoded {
        return no("what was encoded");
    }

    let mut inherited = Inherited {
        last_seq: last.map_or(framed, |last| last.seq.max(framed)),
        framed,
        gaps,
        unflushed,
        redo: Vec::new(),
        failed: Vec::new(),
        freed,
        encoded: freed + unframed,
        reserved,
        data: data.unwrap_or_default(),
        memory,
    };
    for (slot, record, fields) in &slots {
        inherited.settle(*slot, record, fields);
    }
    if let Some((_, record, _)) = slots.last()
        && record.seq > *term.start()
    {
        inherited.note_gap(record);
    }
    inherited.memory.word(ENCODED_AT).store(inherited.encoded, Ordering::Release);
    Ok(inherited)
}

impl Inherited {
    /// The capture thread's end.
    pub fn writer(&self) -> RingWriter {
        RingWriter {
            memory: self.memory.clone(),
            reserved: self.reserved,
            freed: self.freed,
            data_end: self.data.1,
            data_freed: self.data.0,
        }
    }

    /// The encoder's end.
    pub fn reader(&self) -> RingReader {
        RingReader::after(self.memory.clone(), self.encoded)
    }

    /// The memory.
    pub fn memory(&self) -> &Arc<RingMemory> {
        &self.memory
    }

    fn settle(&mut self, slot: u64, record: &Record, fields: &SlotFields) {
        let bits = fields.state.get();
        let reference = self.memory.reference(slot, fields);
        if bits & state::COMMITTED == 0 {
            self.memory.make_void(slot);
        } else if bits & state::LOCAL_DONE == 0 {
            match record.kind {
                Kind::Write | Kind::Zero | Kind::Discard if bits & state::FAILED != 0 => {
                    self.failed.push((reference, *record));
                }
                Kind::Write | Kind::Zero | Kind::Discard => self.redo.push((reference, *record)),
                _ => {
                    self.memory.state(slot).fetch_or(state::LOCAL_DONE, Ordering::Release);
                }
            }
        }
    }

    /// A gap's begin or end is recorded first and noted then; between the two, it is the last
    /// record of all.
    fn note_gap(&mut self, last: &Record) {
        for index in 0..self.gaps.len() {
            if self.memory.volume(index) != last.volume {
                continue;
            }
            let gap = match (last.kind, self.gaps[index]) {
                (Kind::GapBegin, Some(Gap { reason, begun: false }))
                    if GapReason::from_u8(last.flags) == Some(reason) =>
                {
                    Some(Gap { reason, begun: true })
                }
                (Kind::GapEnd, Some(Gap { begun: true, .. })) => None,
                (_, gap) => gap,
            };
            self.gaps[index] = gap;
            self.memory.set_gap(index, gap);
        }
    }
}

impl RingMemory {
    /// A record whose payload never came becomes void; its place stays taken until it is freed.
    pub(super) fn make_void(&self, slot: u64) {
        let mut fields = self.read_slot(slot);
        (fields.kind, fields.flags, fields.sectors) = (Kind::Void as u8, 0, 0.into());
        fields.data_bytes = 0.into();
        self.region().copy_in(self.slot_at(slot), fields.as_bytes()).expect("inside the ring");
        self.state(slot).fetch_or(state::COMMITTED | state::LOCAL_DONE, Ordering::Release);
    }

    pub(super) fn reference(&self, slot: u64, fields: &SlotFields) -> SlotRef {
        let layout = self.layout();
        SlotRef {
            slot,
            payload_at: layout.data_at() + fields.data_at.get() % layout.data_bytes,
            payload_bytes: fields.data_bytes.get(),
        }
    }
}

/// The record of a slot, if it is one.
fn record(fields: &SlotFields) -> Option<Record> {
    let bits = fields.state.get();
    let known = state::RESERVED | state::COMMITTED | state::LOCAL_DONE | state::FAILED;
    if bits & state::RESERVED == 0 || bits & !known != 0 {
        return None;
    }
    let record = fields.record()?;
    let whole = record.payload_bytes() == fields.data_bytes.get() && record.check().is_ok();
    // What is not committed may be half of it, and becomes void.
    if bits & state::COMMITTED == 0 {
        return Some(Record { kind: Kind::Void, ..record });
    }
    whole.then_some(record)
}

/// Where the data in use begins and ends with this slot, if its payload's place is possible after
/// those before.
fn place(
    memory: &RingMemory,
    fields: &SlotFields,
    before: Option<(u64, u64)>,
) -> Option<(u64, u64)> {
    let area = memory.layout().data_bytes;
    let (at, bytes, end) = (fields.data_at.get(), fields.data_bytes.get(), fields.data_end.get());
    let (begin, from) = before.unwrap_or((at, at));
    let in_order = from <= at && at.checked_add(bytes)? <= end && end <= COUNT_MAX;
    let fits = in_order && end - begin <= area && at % area + bytes <= area;
    fits.then_some((begin, end))
}
