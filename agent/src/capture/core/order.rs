//! The group's order: sequences and the records that take them, marks, gaps and terms.

use tidemark_journal::{GapReason, Kind, Record, Sector, Seq, TermId, VolumeId};

use super::{
    super::{Effect, gap::Gap, ring::SlotRef},
    Core,
};

/// Sequences reserved ahead of use in one go, and the remainder at which the next are asked for.
const RESERVE_AHEAD: u64 = 1 << 24;
const RESERVE_LOW: u64 = 1 << 23;

impl Core {
    /// Draws a mark's sequence. `payload` is its id and name, as records want it.
    ///
    /// # Errors
    /// The sentence that says why no mark can be set now.
    pub fn mark(&mut self, payload: &[u8]) -> Result<Seq, String> {
        if let Some(volume) = self.volumes.iter().find(|volume| volume.gap.is_some()) {
            let reason = volume.gap.map_or("", |gap| gap.reason.describe());
            return Err(format!(
                "volume {} is inside a gap ({reason}); a mark can be set when it has caught up",
                volume.id
            ));
        }
        let seq = self
            .draw(payload.len() as u64, true)
            .ok_or("the ring has no room for a mark; try again in a moment")?;
        let sectors = payload.len() as u32;
        let slot = self.reserve(Kind::Mark, 0, VolumeId(0), seq, Sector(0), sectors);
        self.ring
            .memory()
            .region()
            .copy_in(slot.payload_at, payload)
            .map_err(|error| error.to_string())?;
        self.ring.commit(slot);
        self.ring.local_done(slot);
        Ok(seq)
    }

    /// Begins a term that no gap opens with a record of its own, so that the target learns of it
    /// and can be vouched to though nothing is written.
    pub fn open_term(&mut self) {
        if !self.owes_gaps()
            && let Some(seq) = self.draw(0, true)
        {
            self.record(Kind::Void, 0, VolumeId(0), seq, Sector(0), 0);
        }
    }

    /// The two sides' memories disagree: nothing is captured until [`Self::end_doubt`], every
    /// region is marked, and the gap with which the next term begins is owed.
    pub fn begin_doubt(&mut self) {
        self.link(None);
        self.ring.memory().end_term();
        self.overflow = true;
        self.doubt = true;
        self.forget_what_is_on_its_way();
        self.covered = Seq::ZERO;
        for index in 0..self.volumes.len() {
            let id = self.volumes[index].id;
            self.map.doubt(id);
            self.set_gap(index, Some(Gap::owed(GapReason::Doubt)));
        }
    }

    /// Whether a new term may begin: nothing captured is under way or waits for the encoder, and
    /// every mark is durable.
    pub fn is_ready_for_term(&self) -> bool {
        self.doubt
            && self.ring.is_drained()
            && self.map.is_settled()
            && self.failed.is_empty()
            && !self.ops.iter().any(|op| op.captured().is_some())
    }

    /// The new term `term` has begun after `last_seq`; sequences up to `ceiling` are its own.
    pub fn end_doubt(&mut self, term: TermId, last_seq: Seq, ceiling: Seq) {
        self.ring.memory().begin_term(term, last_seq);
        self.last_seq = last_seq;
        (self.ceiling, self.asked_ceiling) = (ceiling, ceiling);
        self.doubt = false;
    }

    pub(in crate::capture) fn can_draw(&mut self, payload_bytes: u64, about_ring: bool) -> bool {
        !self.doubt && self.last_seq < self.ceiling && self.ring.has_room(payload_bytes, about_ring)
    }

    /// Draws the next sequence, if one is reserved and the ring has room for the record.
    pub(in crate::capture) fn draw(&mut self, payload_bytes: u64, about_ring: bool) -> Option<Seq> {
        if self.owes_gaps() {
            self.record_owed_gaps();
            if self.owes_gaps() {
                return None;
            }
        }
        self.can_draw(payload_bytes, about_ring).then(|| self.advance_seq())
    }

    /// Reserves the slot for a sequence that [`Self::draw`] gave.
    pub(in crate::capture) fn reserve(
        &mut self,
        kind: Kind,
        flags: u8,
        volume: VolumeId,
        seq: Seq,
        start: Sector,
        sectors: u32,
    ) -> SlotRef {
        let record = Record { kind, flags, volume, seq, time_ns: self.now_ns, start, sectors };
        self.ring.reserve(&record, record.payload_bytes() == 0 || kind == Kind::Mark)
    }

    /// A record without payload that needs no local write.
    pub(in crate::capture) fn record(
        &mut self,
        kind: Kind,
        flags: u8,
        volume: VolumeId,
        seq: Seq,
        start: Sector,
        sectors: u32,
    ) {
        let slot = self.reserve(kind, flags, volume, seq, start, sectors);
        self.ring.commit(slot);
        self.ring.local_done(slot);
    }

    /// Draws the gap-end of a volume that has caught up.
    pub(in crate::capture) fn end_gap(&mut self, volume: usize) -> bool {
        let Some(seq) = self.draw(0, true) else { return false };
        let id = self.volumes[volume].id;
        self.record(Kind::GapEnd, 0, id, seq, Sector(0), 0);
        self.set_gap(volume, None);
        true
    }

    pub(super) fn owes_gaps(&self) -> bool {
        self.volumes.iter().any(|volume| volume.gap.is_some_and(|gap| !gap.begun))
    }

    /// Draws the gap-begins that are owed, as far as the ring has room.
    pub(super) fn record_owed_gaps(&mut self) {
        for index in 0..self.volumes.len() {
            let Some(Gap { reason, begun: false }) = self.volumes[index].gap else { continue };
            if !self.can_draw(0, true) {
                return;
            }
            let seq = self.advance_seq();
            let id = self.volumes[index].id;
            self.record(Kind::GapBegin, reason as u8, id, seq, Sector(0), 0);
            self.set_gap(index, Some(Gap { reason, begun: true }));
        }
    }

    fn advance_seq(&mut self) -> Seq {
        self.last_seq = self.last_seq.next();
        self.reserve_ahead();
        self.last_seq
    }

    pub(super) fn reserve_ahead(&mut self) {
        if self.asked_ceiling.0 - self.last_seq.0 < RESERVE_LOW {
            self.asked_ceiling = Seq(self.asked_ceiling.0 + RESERVE_AHEAD);
            self.effects.push_back(Effect::Reserve(self.asked_ceiling));
        }
    }
}
