//! The frames that another agent has left in a ring.

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering},
};

use tidemark_journal::{FrameView, GroupId, Position, Seq, TermId, frame::HEADER_BYTES};

use super::{FrameInfo, Outbox, State};
use crate::{
    capture::ring::{
        FRAMED_SEQ_AT, FRAMES_END_AT, FRAMES_START_AT, NotOurs, RingMemory, SPOOLED_SEQ_AT,
    },
    state::COUNT_MAX,
};

/// Frames found in a ring.
pub struct Kept {
    frames: VecDeque<FrameInfo>,
    start: u64,
    end: u64,
}

impl Kept {
    /// The last sequence in them.
    pub fn last(&self) -> Option<Seq> {
        self.frames.back().map(|frame| frame.last)
    }

    /// Puts them together with the spool, which ends at `spool`, when everything up to `acked` was
    /// final-durable and the term forked at `fork_seq`: frames that lie there already are dropped
    /// here. True if everything before the first frame here is final-durable, so that nothing in
    /// the spool is needed.
    ///
    /// # Errors
    /// [`NotOurs::Content`]: what has left the memory for the spool is not there.
    pub fn join(
        &mut self,
        memory: &RingMemory,
        spool: Option<Position>,
        acked: Seq,
        fork_seq: Seq,
    ) -> Result<bool, NotOurs> {
        let load = |at| Seq(memory.word(at).load(Ordering::Acquire));
        let end = spool.map_or(Seq::ZERO, |end| end.seq);
        if load(SPOOLED_SEQ_AT) > end.max(acked) {
            return Err(NotOurs::Content("what it has given to the spool is not there"));
        }
        while let Some(frame) = self.frames.front().copied()
            && frame.last <= end
        {
            self.frames.pop_front();
            self.start = frame.at + frame.bytes;
        }
        // What lies between it and the first frame here was final-durable, else it would be here.
        // The first frame of a term only names its parent's end.
        let beyond = match self.frames.front() {
            Some(first) => first.before.seq > end.max(fork_seq),
            None => load(FRAMED_SEQ_AT) > end.max(fork_seq),
        };
        Ok(beyond)
    }

    /// Goes on with them. All count as not sent.
    pub fn outbox(self, memory: Arc<RingMemory>) -> Arc<Outbox> {
        let Kept { frames, start, end } = self;
        // The last one may have been put there without being noted.
        if let Some(last) = frames.back() {
            memory.word(FRAMED_SEQ_AT).fetch_max(last.last.0, Ordering::AcqRel);
        }
        Outbox::with(memory, State { frames, start, end, ..State::default() })
    }
}

/// Finds the frames in a ring that nobody else uses any more. All have to be whole, of `group` and
/// `term`, and each continue the one before; their chunks are for the target to check.
///
/// # Errors
/// [`NotOurs::Content`].
pub fn kept(memory: &RingMemory, group: GroupId, term: TermId) -> Result<Kept, NotOurs> {
    let no = |what| Err(NotOurs::Content(what));
    let area = memory.layout().frame_bytes;
    let start = memory.word(FRAMES_START_AT).load(Ordering::Acquire);
    let end = memory.word(FRAMES_END_AT).load(Ordering::Acquire);
    // They grow by what goes through the area: no agent lives to see them there.
    if start.max(end) > COUNT_MAX {
        return no("the counters of its frames");
    }
    // The first frame after a while without any was being put there.
    if start > end {
        return Ok(Kept { frames: VecDeque::new(), start, end: start });
    }
    if end - start > area {
        return no("the counters of its frames");
    }
    let (mut frames, mut at) = (VecDeque::new(), start);
    let mut before: Option<Position> = None;
    while at < end {
        let left = (area - at % area).min(end - at);
        let offset = memory.layout().frames_at() + at % area;
        // SAFETY: the other agent is gone (this one holds the group's state and disks), and in this
        // one nobody writes frames before the outbox is made of them.
        let bytes = unsafe { memory.region().slice(offset, left) }?;
        if left < HEADER_BYTES as u64 || bytes[..HEADER_BYTES].iter().all(|byte| *byte == 0) {
            at += area - at % area;
            continue;
        }
        let Ok(frame) = FrameView::parse(bytes) else { return no("a frame") };
        let header = frame.header();
        let continues = before.is_none_or(|before| before == header.before());
        if header.group() != group || header.last().term != term || !continues {
            return no("the order of its frames");
        }
        before = Some(header.last());
        let bytes = header.frame_bytes() as u64;
        frames.push_back(FrameInfo {
            before: header.before(),
            last: header.last().seq,
            last_position: header.last(),
            time_ns: header.time_ns.get(),
            raw_bytes: header.raw_bytes.get(),
            bytes,
            at,
        });
        at += bytes;
    }
    if at == end { Ok(Kept { frames, start, end }) } else { no("the end of its frames") }
}
