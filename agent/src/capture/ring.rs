//! The ring: captured records on their way to the encoder, in a memfd that can outlive the process.
//!
//! ```text
//! header (20480) | slots (64 bytes each) | data | frames
//! ```
//!
//! The capture thread reserves a slot for every record, in the order of sequences, copies the
//! payload into the data area and commits the slot; it marks it once more when the local disk has
//! the write. The encoder reads committed slots in order. A slot is free again when both are
//! through with it, oldest first. The frames area belongs to the [outbox](crate::outbox).
//!
//! Counters only grow; a place is a counter modulo the area's size. A payload never wraps: what is
//! left at the end of the data area is skipped when it is too short.

mod inherit;
mod memory;

use std::sync::{Arc, atomic::Ordering};

use tidemark_journal::{Kind, Record, Sector, Seq, VolumeId};
use zerocopy::IntoBytes;

use self::memory::{ENCODED_AT, FREED_AT, RESERVED_AT, SlotFields, state};
pub(crate) use self::memory::{FRAMED_SEQ_AT, FRAMES_END_AT, FRAMES_START_AT, SPOOLED_SEQ_AT};
pub use self::{
    inherit::{Inherited, NotOurs, inherit},
    memory::{About, HEADER_BYTES, Layout, RingMemory, SLOTS_RESERVED, VOLUMES_MAX},
};

/// Payloads are placed at multiples of this, so that direct I/O can write from them.
pub const DATA_ALIGN: u64 = 512;

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
        let layout = *self.memory.layout();
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
        memory.region().copy_in(memory.slot_at(slot), fields.as_bytes()).expect("inside the ring");
        self.data_end = data_end;
        self.reserved += 1;
        memory.word(RESERVED_AT).store(self.reserved, Ordering::Release);
        memory.reference(slot, &fields)
    }

    /// The payload is in place: the encoder may take the record.
    pub fn commit(&mut self, slot: SlotRef) {
        self.set(slot.slot, state::COMMITTED);
    }

    /// The payload could not be copied and nothing was written: the sequence becomes void.
    pub fn make_void(&mut self, slot: SlotRef) {
        self.memory.make_void(slot.slot);
    }

    /// The local disk has the write, or refused it and that is durably marked.
    pub fn local_done(&mut self, slot: SlotRef) {
        self.set(slot.slot, state::LOCAL_DONE);
    }

    /// The local disk has refused the write.
    pub fn local_failed(&mut self, slot: SlotRef) {
        self.set(slot.slot, state::FAILED);
    }

    fn set(&self, slot: u64, bits: u64) {
        self.memory.state(slot).fetch_or(bits, Ordering::Release);
    }

    /// Frees the oldest slots that both sides are through with.
    pub fn collect(&mut self) {
        let encoded = self.memory.word(ENCODED_AT).load(Ordering::Acquire);
        while self.freed < encoded {
            let state = self.memory.state(self.freed);
            if state.load(Ordering::Acquire) & state::LOCAL_DONE == 0 {
                break;
            }
            self.data_freed = self.memory.read_slot(self.freed).data_end.get();
            state.store(0, Ordering::Release);
            self.freed += 1;
        }
        self.memory.word(FREED_AT).store(self.freed, Ordering::Release);
    }

    /// How full the ring is, slots or data, whichever is fuller: 0 to 1000.
    pub fn fill_permille(&self) -> u64 {
        let layout = *self.memory.layout();
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
    encoded: u64,
    taken: u64,
}

impl RingReader {
    /// The only reader of an empty ring.
    pub fn new(memory: Arc<RingMemory>) -> RingReader {
        RingReader::after(memory, 0)
    }

    /// The only reader of a ring of which so many slots are encoded.
    fn after(memory: Arc<RingMemory>, encoded: u64) -> RingReader {
        RingReader { memory, encoded, taken: encoded }
    }

    /// Hands the next committed record and its payload to `take`, which says whether it took it.
    /// False if there is none, or it was not taken. The payload's place stays in use until
    /// [`Self::encoded`].
    pub fn take(&mut self, take: impl FnOnce(&Record, &[u8]) -> bool) -> bool {
        let memory = &self.memory;
        if self.taken >= memory.word(RESERVED_AT).load(Ordering::Acquire) {
            return false;
        }
        if memory.state(self.taken).load(Ordering::Acquire) & state::COMMITTED == 0 {
            return false;
        }
        let fields = memory.read_slot(self.taken);
        let record = fields.record().expect("a kind that this process wrote or has checked");
        let took = take(&record, self.payload(self.taken, &fields));
        self.taken += u64::from(took);
        took
    }

    /// The payloads of the records taken since [`Self::encoded`] was called last, in their order.
    pub fn payloads(&self) -> impl Iterator<Item = &[u8]> {
        (self.encoded..self.taken).map(|slot| self.payload(slot, &self.memory.read_slot(slot)))
    }

    /// The payload of a slot that is committed and not encoded.
    fn payload(&self, slot: u64, fields: &SlotFields) -> &[u8] {
        let payload_at = self.memory.reference(slot, fields).payload_at;
        let bytes = fields.data_bytes.get();
        // SAFETY: the slot is committed, so its payload is complete, and nobody writes there again before the slot is
        // freed, which happens only after `encoded` was called for it; that needs `self` alone, which is borrowed. The
        // kernel may read the range at the same time, never write it.
        unsafe { self.memory.region().slice(payload_at, bytes) }.expect("inside the ring")
    }

    /// All records taken so far are encoded: their slots may be freed.
    pub fn encoded(&mut self) {
        self.encoded = self.taken;
        self.memory.word(ENCODED_AT).store(self.taken, Ordering::Release);
    }

    /// Whether a committed record waits.
    pub fn has_more(&self) -> bool {
        let memory = &self.memory;
        self.taken < memory.word(RESERVED_AT).load(Ordering::Acquire)
            && memory.state(self.taken).load(Ordering::Acquire) & state::COMMITTED != 0
    }
}

impl SlotFields {
    fn record(&self) -> Option<Record> {
        Some(Record {
            kind: Kind::from_u8(self.kind)?,
            flags: self.flags,
            volume: VolumeId(self.volume.get()),
            seq: Seq(self.seq.get()),
            time_ns: self.time_ns.get(),
            start: Sector(self.start.get()),
            sectors: self.sectors.get(),
        })
    }
}
