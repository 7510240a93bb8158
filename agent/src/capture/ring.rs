//! The ring: captured records on their way to the encoder, in a memfd that can outlive the process.
//!
//! ```text
//! header (4096) | slots (64 bytes each) | data | frames
//! ```
//!
//! The capture thread reserves a slot for every record, in the order of sequences, copies the
//! payload into the data area and commits the slot; it marks it once more when the local disk has
//! the write. The encoder reads committed slots in order. A slot is free again when both are
//! through with it, oldest first. The frames area belongs to the [outbox](crate::outbox).
//!
//! Counters only grow; a place is a counter modulo the area's size. A payload never wraps: what is
//! left at the end of the data area is skipped when it is too short.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use tidemark_journal::{GroupId, Kind, Record, Sector, Seq, VolumeId};
use zerocopy::{
    FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

use crate::kernel::memfd::{Region, RegionError};

/// Bytes before the slots.
pub const HEADER_BYTES: u64 = 4096;
/// Payloads are placed at multiples of this, so that direct I/O can write from them.
pub const DATA_ALIGN: u64 = 512;
/// Slots kept back for records that say something about the ring itself (gaps, marks, flushes).
pub const SLOTS_RESERVED: u64 = 64;

const MAGIC: [u8; 8] = *b"TMRING\0\x01";
const SLOT_BYTES: u64 = size_of::<SlotFields>() as u64;

/// Bits of a slot's state.
mod state {
    pub const RESERVED: u64 = 1;
    pub const COMMITTED: u64 = 2;
    pub const LOCAL_DONE: u64 = 4;
}

/// A slot, 64 bytes. The state stands first because it is an atomic word by itself.
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 8 | state: bits reserved 1, committed 2, local-done 4 |
/// | 8 | 8 | sequence |
/// | 16 | 8 | journal time, nanoseconds |
/// | 24 | 8 | first sector |
/// | 32 | 4 | sectors |
/// | 36 | 2 | volume |
/// | 38 | 1 | kind |
/// | 39 | 1 | flags |
/// | 40 | 8 | counter of the payload's first byte in the data area |
/// | 48 | 8 | bytes of payload |
/// | 56 | 8 | counter after the payload, skipped bytes included |
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct SlotFields {
    state: U64,
    seq: U64,
    time_ns: U64,
    start: U64,
    sectors: U32,
    volume: U16,
    kind: u8,
    flags: u8,
    data_at: U64,
    data_bytes: U64,
    data_end: U64,
}

/// The header's head. The counters behind it are atomic words, kept here so that whoever inherits
/// the memfd finds them.
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 8 | magic `TMRING` 0, version 1 |
/// | 8 | 16 | group |
/// | 24 | 8 | number of slots |
/// | 32 | 8 | bytes of the data area |
/// | 40 | 8 | bytes of the frames area |
/// | 64 | 8 | counter: slots reserved |
/// | 72 | 8 | counter: slots encoded |
/// | 80 | 8 | counter: slots freed |
/// | 88 | 8 | counter: end of the frames |
/// | 96 | 8 | counter: start of the frames |
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    group: [u8; 16],
    slots: U64,
    data_bytes: U64,
    frame_bytes: U64,
}

const RESERVED_AT: u64 = 64;
const ENCODED_AT: u64 = 72;
const FREED_AT: u64 = 80;
/// Where the outbox keeps the counter of its end.
pub(crate) const FRAMES_END_AT: u64 = 88;
/// Where the outbox keeps the counter of its start.
pub(crate) const FRAMES_START_AT: u64 = 96;

const _: () = assert!(SLOT_BYTES == 64);

/// How a ring's memory is divided.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    /// Number of slots.
    pub slots: u64,
    /// Bytes for payloads.
    pub data_bytes: u64,
    /// Bytes for encoded frames.
    pub frame_bytes: u64,
}

impl Layout {
    /// Divides `ring_bytes`: a quarter for payloads, the rest for frames, and one slot for every
    /// 4 KiB of payload.
    pub fn of(ring_bytes: u64) -> Layout {
        let data_bytes = (ring_bytes / 4).next_multiple_of(4096);
        let slots = (data_bytes / 4096).max(4 * SLOTS_RESERVED).next_multiple_of(64);
        let rest = ring_bytes.saturating_sub(HEADER_BYTES + slots * SLOT_BYTES + data_bytes);
        Layout { slots, data_bytes, frame_bytes: (rest / 4096).max(1) * 4096 }
    }

    /// Bytes of the whole memfd.
    pub fn total_bytes(&self) -> u64 {
        self.frames_at() + self.frame_bytes
    }

    fn data_at(&self) -> u64 {
        HEADER_BYTES + self.slots * SLOT_BYTES
    }

    /// Where the frames area begins.
    pub fn frames_at(&self) -> u64 {
        self.data_at() + self.data_bytes
    }
}

/// The shared memory of one group's ring.
pub struct RingMemory {
    region: Arc<Region>,
    layout: Layout,
}

impl RingMemory {
    /// Makes an empty ring.
    ///
    /// # Errors
    /// The kernel refuses the memory.
    pub fn create(group: GroupId, layout: Layout) -> Result<Arc<RingMemory>, RegionError> {
        let region = Region::create("tidemark-ring", layout.total_bytes())?;
        let header = Header {
            magic: MAGIC,
            group: group.0,
            slots: layout.slots.into(),
            data_bytes: layout.data_bytes.into(),
            frame_bytes: layout.frame_bytes.into(),
        };
        region.copy_in(0, header.as_bytes())?;
        Ok(Arc::new(RingMemory { region: Arc::new(region), layout }))
    }

    /// The memory itself.
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// How it is divided.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// One of the header's counters, or a slot's state.
    pub(crate) fn word(&self, at: u64) -> &AtomicU64 {
        self.region.atomic_u64(at).expect("a word inside the ring, aligned to 8 bytes")
    }

    fn slot_at(&self, slot: u64) -> u64 {
        HEADER_BYTES + slot % self.layout.slots * SLOT_BYTES
    }

    fn read_slot(&self, slot: u64) -> SlotFields {
        let mut fields = SlotFields::new_zeroed();
        self.region.copy_out(self.slot_at(slot), fields.as_mut_bytes()).expect("inside the ring");
        fields
    }
}

/// A reserved slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SlotRef {
    /// The slot's counter.
    pub slot: u64,
    /// Where its payload goes, in bytes from the start of the ring's memory.
    pub payload_at: u64,
    /// Bytes of payload.
    pub payload_bytes: u64,
}

/// The capture thread's end of the ring.
pub struct RingWriter {
    memory: Arc<RingMemory>,
    reserved: u64,
    freed: u64,
    data_end: u64,
    data_freed: u64,
}

impl RingWriter {
    /// The only writer of an empty ring.
    pub fn new(memory: Arc<RingMemory>) -> RingWriter {
        RingWriter { memory, reserved: 0, freed: 0, data_end: 0, data_freed: 0 }
    }

    /// The memory behind it.
    pub fn memory(&self) -> &Arc<RingMemory> {
        &self.memory
    }

    /// Whether a record with so much payload finds room. One that speaks of the ring itself
    /// (without payload, or a mark) may use the slots kept back.
    pub fn has_room(&mut self, payload_bytes: u64, about_ring: bool) -> bool {
        self.place(payload_bytes, about_ring).is_some() || {
            self.collect();
            self.place(payload_bytes, about_ring).is_some()
        }
    }

    fn place(&self, payload_bytes: u64, about_ring: bool) -> Option<(u64, u64)> {
        let layout = self.memory.layout;
        let slots = if about_ring { layout.slots } else { layout.slots - SLOTS_RESERVED };
        if self.reserved - self.freed >= slots {
            return None;
        }
        let bytes = payload_bytes.next_multiple_of(DATA_ALIGN);
        let left = layout.data_bytes - self.data_end % layout.data_bytes;
        let at = if bytes > left { self.data_end + left } else { self.data_end };
        let fits = at + bytes - self.data_freed <= layout.data_bytes;
        (payload_bytes == 0 || fits)
            .then_some((at, if bytes == 0 { self.data_end } else { at + bytes }))
    }

    /// Reserves the next slot for a record whose sequence has just been drawn.
    ///
    /// # Panics
    /// When [`has_room`](Self::has_room) was not asked first.
    pub fn reserve(&mut self, record: &Record, about_ring: bool) -> SlotRef {
        let payload_bytes = record.payload_bytes();
        let (data_at, data_end) =
            self.place(payload_bytes, about_ring).expect("room was asked for");
        let slot = self.reserved;
        let fields = SlotFields {
            state: state::RESERVED.into(),
            seq: record.seq.0.into(),
            time_ns: record.time_ns.into(),
            start: record.start.0.into(),
            sectors: record.sectors.into(),
            volume: record.volume.0.into(),
            kind: record.kind as u8,
            flags: record.flags,
            data_at: data_at.into(),
            data_bytes: payload_bytes.into(),
            data_end: data_end.into(),
        };
        let memory = &self.memory;
        memory.region.copy_in(memory.slot_at(slot), fields.as_bytes()).expect("inside the ring");
        self.data_end = data_end;
        self.reserved += 1;
        memory.word(RESERVED_AT).store(self.reserved, Ordering::Release);
        let payload_at = memory.layout.data_at() + data_at % memory.layout.data_bytes;
        SlotRef { slot, payload_at, payload_bytes }
    }

    /// The payload is in place: the encoder may take the record.
    pub fn commit(&mut self, slot: SlotRef) {
        self.set(slot.slot, state::COMMITTED);
    }

    /// The payload could not be copied and nothing was written: the sequence becomes void.
    pub fn make_void(&mut self, slot: SlotRef) {
        let at = self.memory.slot_at(slot.slot);
        let mut fields = self.memory.read_slot(slot.slot);
        (fields.kind, fields.flags, fields.sectors) = (Kind::Void as u8, 0, 0.into());
        fields.data_bytes = 0.into();
        self.memory.region.copy_in(at, fields.as_bytes()).expect("inside the ring");
        self.set(slot.slot, state::COMMITTED | state::LOCAL_DONE);
    }

    /// The local disk has the write, or refused it.
    pub fn local_done(&mut self, slot: SlotRef) {
        self.set(slot.slot, state::LOCAL_DONE);
    }

    fn set(&self, slot: u64, bits: u64) {
        self.memory.word(self.memory.slot_at(slot)).fetch_or(bits, Ordering::Release);
    }

    /// Frees the oldest slots that both sides are through with.
    pub fn collect(&mut self) {
        let encoded = self.memory.word(ENCODED_AT).load(Ordering::Acquire);
        while self.freed < encoded {
            let at = self.memory.slot_at(self.freed);
            if self.memory.word(at).load(Ordering::Acquire) & state::LOCAL_DONE == 0 {
                break;
            }
            self.data_freed = self.memory.read_slot(self.freed).data_end.get();
            self.memory.word(at).store(0, Ordering::Release);
            self.freed += 1;
        }
        self.memory.word(FREED_AT).store(self.freed, Ordering::Release);
    }

    /// How full the ring is, slots or data, whichever is fuller: 0 to 1000.
    pub fn fill_permille(&self) -> u64 {
        let layout = self.memory.layout;
        let slots = (self.reserved - self.freed) * 1000 / layout.slots;
        let data = (self.data_end - self.data_freed) * 1000 / layout.data_bytes;
        slots.max(data)
    }

    /// Whether the encoder has taken every record.
    pub fn is_drained(&self) -> bool {
        self.memory.word(ENCODED_AT).load(Ordering::Acquire) == self.reserved
    }
}

/// The encoder's end of the ring.
pub struct RingReader {
    memory: Arc<RingMemory>,
    taken: u64,
}

impl RingReader {
    /// The only reader of an empty ring.
    pub fn new(memory: Arc<RingMemory>) -> RingReader {
        RingReader { memory, taken: 0 }
    }

    /// Hands the next committed record and its payload to `take`, which says whether it took it.
    /// False if there is none, or it was not taken. The payload's place stays in use until
    /// [`Self::encoded`].
    pub fn take(&mut self, take: impl FnOnce(&Record, &[u8]) -> bool) -> bool {
        let memory = &self.memory;
        if self.taken >= memory.word(RESERVED_AT).load(Ordering::Acquire) {
            return false;
        }
        let at = memory.slot_at(self.taken);
        if memory.word(at).load(Ordering::Acquire) & state::COMMITTED == 0 {
            return false;
        }
        let fields = memory.read_slot(self.taken);
        let record = Record {
            kind: Kind::from_u8(fields.kind).expect("a kind that this process wrote"),
            flags: fields.flags,
            volume: VolumeId(fields.volume.get()),
            seq: Seq(fields.seq.get()),
            time_ns: fields.time_ns.get(),
            start: Sector(fields.start.get()),
            sectors: fields.sectors.get(),
        };
        let payload_at = memory.layout.data_at() + fields.data_at.get() % memory.layout.data_bytes;
        let bytes = fields.data_bytes.get();
        // SAFETY: the slot is committed, so its payload is complete, and nobody writes there again
        // before the slot is freed, which happens only after `encoded` was called for it; `take`
        // returns before that. The kernel may read the range at the same time, never write it.
        let payload = unsafe { memory.region.slice(payload_at, bytes) }.expect("inside the ring");
        let took = take(&record, payload);
        self.taken += u64::from(took);
        took
    }

    /// All records taken so far are encoded: their slots may be freed.
    pub fn encoded(&mut self) {
        self.memory.word(ENCODED_AT).store(self.taken, Ordering::Release);
    }

    /// Whether a committed record waits.
    pub fn has_more(&self) -> bool {
        let memory = &self.memory;
        self.taken < memory.word(RESERVED_AT).load(Ordering::Acquire)
            && memory.word(memory.slot_at(self.taken)).load(Ordering::Acquire) & state::COMMITTED
                != 0
    }
}
