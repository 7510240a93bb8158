//! The ring's memory: what lies where in it, byte by byte.

use std::{
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use tidemark_journal::{GapReason, GroupId, Seq, TermId, VolumeId, checksum::crc64};
use zerocopy::{
    FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

use super::{super::gap::Gap, inherit::NotOurs};
use crate::{
    clock::JournalClock,
    kernel::memfd::{Region, RegionError},
};

/// Bytes before the slots: the header's page and the table of volumes.
pub const HEADER_BYTES: u64 = VOLUMES_AT + VOLUMES_MAX as u64 * VOLUME_BYTES;
/// The most volumes in a group.
pub const VOLUMES_MAX: usize = 1024;
/// Slots kept back for records that say something about the ring itself (gaps, marks, flushes).
pub const SLOTS_RESERVED: u64 = 64;

const MAGIC: [u8; 8] = *b"TMRING\0\x01";
const SLOT_BYTES: u64 = size_of::<SlotFields>() as u64;

/// Bits of a slot's state.
pub(super) mod state {
    pub const RESERVED: u64 = 1;
    pub const COMMITTED: u64 = 2;
    pub const LOCAL_DONE: u64 = 4;
    pub const FAILED: u64 = 8;
}

/// A slot, 64 bytes. The state stands first because it is an atomic word by itself.
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 8 | state: bits reserved 1, committed 2, local-done 4, failed on the local disk 8 |
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
pub(super) struct SlotFields {
    pub state: U64,
    pub seq: U64,
    pub time_ns: U64,
    pub start: U64,
    pub sectors: U32,
    pub volume: U16,
    pub kind: u8,
    pub flags: u8,
    pub data_at: U64,
    pub data_bytes: U64,
    pub data_end: U64,
}

/// The header's fixed part: what a ring is, never changed, closed by a checksum. What changes stands
/// behind it in words of its own, each stored at once, so that a process may die between any two.
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 8 | magic `TMRING` 0, version 1 |
/// | 8 | 16 | group |
/// | 24 | 8 | id of this ring, which the state block names |
/// | 32 | 8 | number of slots |
/// | 40 | 8 | bytes of the data area |
/// | 48 | 8 | bytes of the frames area |
/// | 56 | 8 | journal time when its clock was started, nanoseconds |
/// | 64 | 8 | the boot clock at that time, nanoseconds |
/// | 72 | 8 | number of volumes |
/// | 80 | 8 | CRC-64/NVME of the first 80 bytes |
/// | 88 | 16 | term |
/// | 104 | 8 | 1: the term may be continued from this ring |
/// | 112 | 8 | counter: slots reserved |
/// | 120 | 8 | counter: slots encoded |
/// | 128 | 8 | counter: slots freed |
/// | 136 | 8 | counter: end of the frames |
/// | 144 | 8 | counter: start of the frames |
/// | 152 | 8 | last sequence in a frame, or before the term's first |
/// | 160 | 8 | last sequence of the frames that have left this memory for the spool, or 0 |
///
/// From 4096 on 1024 rows of 16 bytes, of which the volumes take the first: the volume (2), the
/// reason of its gap or 0 (1), 1 if the gap's begin is recorded (1), 1 if a flush has failed and what it
/// was to keep is not durably marked yet (1), zero (3); sectors (8).
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    group: [u8; 16],
    id: U64,
    slots: U64,
    data_bytes: U64,
    frame_bytes: U64,
    clock_base_ns: U64,
    clock_started_ns: U64,
    volumes: U64,
    crc: U64,
}

const CHECKED_BYTES: usize = 80;
const TERM_AT: u64 = 88;
const CONTINUABLE_AT: u64 = 104;
pub(super) const RESERVED_AT: u64 = 112;
pub(super) const ENCODED_AT: u64 = 120;
pub(super) const FREED_AT: u64 = 128;
/// Where the outbox keeps the counter of its end.
pub(crate) const FRAMES_END_AT: u64 = 136;
/// Where the outbox keeps the counter of its start.
pub(crate) const FRAMES_START_AT: u64 = 144;
/// Where the outbox keeps the last sequence that was put into it.
pub(crate) const FRAMED_SEQ_AT: u64 = 152;
/// Where the outbox keeps the last sequence of the frames that have left it for the spool.
pub(crate) const SPOOLED_SEQ_AT: u64 = 160;
const VOLUMES_AT: u64 = 4096;
const VOLUME_BYTES: u64 = 16;
/// The bit of a volume's row that says that a flush has failed.
const FLUSH_FAILED: u64 = 1 << 32;

const _: () = assert!(SLOT_BYTES == 64 && size_of::<Header>() == CHECKED_BYTES + 8);

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

    pub(super) fn data_at(&self) -> u64 {
        HEADER_BYTES + self.slots * SLOT_BYTES
    }

    /// Where the frames area begins.
    pub fn frames_at(&self) -> u64 {
        self.data_at() + self.data_bytes
    }
}

/// What a ring is for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct About {
    /// The group.
    pub group: GroupId,
    /// Tells this ring from others of the group.
    pub id: u64,
    /// The clock of its records' times.
    pub clock: JournalClock,
    /// Its volumes and their sectors; at most [`VOLUMES_MAX`].
    pub volumes: Vec<(VolumeId, u64)>,
}

/// The shared memory of one group's ring.
pub struct RingMemory {
    region: Arc<Region>,
    layout: Layout,
}

impl RingMemory {
    /// Makes an empty ring. Nobody may inherit it before [`Self::begin_term`].
    ///
    /// # Errors
    /// The kernel refuses the memory.
    ///
    /// # Panics
    /// When there are too many volumes.
    pub fn create(about: &About, layout: Layout) -> Result<Arc<RingMemory>, RegionError> {
        assert!(about.volumes.len() <= VOLUMES_MAX, "the configuration has a lower bound");
        let region = Region::create("tidemark-ring", layout.total_bytes())?;
        region.copy_in(0, header(about, &layout).as_bytes())?;
        let memory = RingMemory { region: Arc::new(region), layout };
        for (index, (volume, sectors)) in about.volumes.iter().enumerate() {
            memory.volume_word(index, 0).store(volume_word(*volume, None), Ordering::Relaxed);
            memory.volume_word(index, 8).store(*sectors, Ordering::Relaxed);
        }
        Ok(Arc::new(memory))
    }

    /// Takes over the memory of a ring that another process has made, if it is the one that is
    /// meant: of this group and id and these volumes, divided like that, and with a term to be
    /// continued. `about.clock` is of no meaning. What is in it is for [`super::inherit`] to check.
    ///
    /// # Errors
    /// [`NotOurs`].
    pub fn adopt(
        fd: OwnedFd,
        about: &About,
        layout: Layout,
        term: TermId,
    ) -> Result<(Arc<RingMemory>, JournalClock), NotOurs> {
        let region = Region::adopt(fd, Some(layout.total_bytes()))?;
        let mut found = Header::new_zeroed();
        region.copy_out(0, found.as_mut_bytes())?;
        let (base_ns, started_ns) = (found.clock_base_ns.get(), found.clock_started_ns.get());
        let clock = JournalClock::going_on(base_ns, started_ns)
            .ok_or(NotOurs::Header("was made before the machine was started"))?;
        let wanted = header(&About { clock, ..about.clone() }, &layout);
        if found.as_bytes() != wanted.as_bytes() {
            return Err(NotOurs::Header("is of another group, size, version or time"));
        }
        let memory = RingMemory { region: Arc::new(region), layout };
        let same = about.volumes.iter().enumerate().all(|(index, (volume, sectors))| {
            memory.volume_word(index, 0).load(Ordering::Acquire) as u16 == volume.0
                && memory.volume_word(index, 8).load(Ordering::Acquire) == *sectors
        });
        if !same {
            return Err(NotOurs::Header("is of other volumes"));
        }
        let mut of = TermId::default();
        memory.region.copy_out(TERM_AT, &mut of.0)?;
        if memory.word(CONTINUABLE_AT).load(Ordering::Acquire) != 1 || of != term {
            return Err(NotOurs::Header("does not hold the newest term"));
        }
        Ok((Arc::new(memory), clock))
    }

    /// What the ring holds from now on continues `term` after `seq`; so it may be inherited.
    pub fn begin_term(&self, term: TermId, seq: Seq) {
        self.word(CONTINUABLE_AT).store(0, Ordering::SeqCst);
        self.region.copy_in(TERM_AT, &term.0).expect("inside the ring");
        self.word(FRAMED_SEQ_AT).store(seq.0, Ordering::Release);
        self.word(SPOOLED_SEQ_AT).store(0, Ordering::Release);
        self.word(CONTINUABLE_AT).store(1, Ordering::SeqCst);
    }

    /// What the ring holds is not all there is to know: nobody may inherit it.
    pub fn end_term(&self) {
        self.word(CONTINUABLE_AT).store(0, Ordering::SeqCst);
    }

    /// Notes the gap of the volume with this place in the table.
    pub fn set_gap(&self, index: usize, gap: Option<Gap>) {
        let word = self.volume_word(index, 0);
        let before = word.load(Ordering::Relaxed);
        let row = volume_word(VolumeId(before as u16), gap) | before & FLUSH_FAILED;
        word.store(row, Ordering::Release);
    }

    /// Notes that a flush of the volume with this place in the table has failed, or that what it may
    /// have lost is durably marked.
    pub fn set_flush_failed(&self, index: usize, failed: bool) {
        let word = self.volume_word(index, 0);
        match failed {
            true => word.fetch_or(FLUSH_FAILED, Ordering::Release),
            false => word.fetch_and(!FLUSH_FAILED, Ordering::Release),
        };
    }

    /// Whether what a failed flush of the volume with this place in the table may have lost is not
    /// durably marked.
    pub fn flush_failed(&self, index: usize) -> bool {
        self.volume_word(index, 0).load(Ordering::Acquire) & FLUSH_FAILED != 0
    }

    /// The gap of the volume with this place in the table. None if the row makes no sense.
    pub(super) fn gap(&self, index: usize) -> Option<Option<Gap>> {
        let bytes = self.volume_word(index, 0).load(Ordering::Acquire).to_le_bytes();
        match (bytes[2], bytes[3]) {
            (0, 0) => Some(None),
            (reason, begun @ 0..=1) => {
                let reason = GapReason::from_u8(reason)?;
                Some(Some(Gap { reason, begun: begun == 1 }))
            }
            _ => None,
        }
    }

    /// The volume with this place in the table.
    pub(super) fn volume(&self, index: usize) -> VolumeId {
        VolumeId(self.volume_word(index, 0).load(Ordering::Acquire) as u16)
    }

    fn volume_word(&self, index: usize, offset: u64) -> &AtomicU64 {
        self.word(VOLUMES_AT + index as u64 * VOLUME_BYTES + offset)
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

    pub(super) fn slot_at(&self, slot: u64) -> u64 {
        HEADER_BYTES + slot % self.layout.slots * SLOT_BYTES
    }

    /// The word with a slot's state.
    pub(in crate::capture) fn state(&self, slot: u64) -> &AtomicU64 {
        self.word(self.slot_at(slot))
    }

    pub(super) fn read_slot(&self, slot: u64) -> SlotFields {
        let mut fields = SlotFields::new_zeroed();
        self.region.copy_out(self.slot_at(slot), fields.as_mut_bytes()).expect("inside the ring");
        fields
    }
}

fn header(about: &About, layout: &Layout) -> Header {
    let (clock_base_ns, clock_started_ns) = about.clock.parts();
    let mut header = Header {
        magic: MAGIC,
        group: about.group.0,
        id: about.id.into(),
        slots: layout.slots.into(),
        data_bytes: layout.data_bytes.into(),
        frame_bytes: layout.frame_bytes.into(),
        clock_base_ns: clock_base_ns.into(),
        clock_started_ns: clock_started_ns.into(),
        volumes: (about.volumes.len() as u64).into(),
        crc: 0.into(),
    };
    header.crc = crc64(&header.as_bytes()[..CHECKED_BYTES]).into();
    header
}

fn volume_word(volume: VolumeId, gap: Option<Gap>) -> u64 {
    let reason = gap.map_or(0, |gap| gap.reason as u64);
    let begun = u64::from(gap.is_some_and(|gap| gap.begun));
    u64::from(volume.0) | reason << 16 | begun << 24
}

#[cfg(test)]
impl RingMemory {
    /// An empty ring of group 1.
    pub fn plain(layout: Layout, volumes: &[(VolumeId, u64)]) -> Arc<RingMemory> {
        let (group, clock) = (GroupId([1; 16]), JournalClock::after(0));
        let about = About { group, id: 7, clock, volumes: volumes.to_vec() };
        RingMemory::create(&about, layout).expect("a ring")
    }
}
