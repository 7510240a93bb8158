//! What must be so.
//!
//! - A request is answered once; each record of a write is one that was asked for, with its own
//!   bytes, after all that had been answered when it was asked, and before its answer (invariant 1).
//! - Each sector of a disk holds what was written last, or after a power cut since the last flush.
//! - The disk equals the journal applied to its end, where no write is under way and nothing waits
//!   for catch-up.
//! - After a power cut whatever differs between the disk and the target waits for catch-up
//!   (invariant 2).
//! - The target never ends before what it acknowledged (invariant 4), and each of its points has the
//!   content that the records up to it say (invariant 3).
//! - What the target's disk has damaged is an error, and never other content (invariant 8).
//! - At rest, when what was damaged has been sent again, disks and replica are equal.

use std::ops::Range;

use tidemark_agent::capture::{Ask, LocalIo, RequestId};
use tidemark_journal::{Kind, Position, Seq};

use crate::{
    agent::Task,
    content::{Entry, Image, Stamp, stamps},
    requests,
    world::{World, stamp, touched},
};

impl World {
    /// Looks at what the last step has done.
    pub(crate) fn look(&mut self) {
        self.trace = self.trace.rotate_left(5) ^ self.site.disk.fingerprint();
        if self.site.is_off() {
            return;
        }
        let Some(agent) = &mut self.agent else { return };
        let term = agent.ancestry().current().id;
        let last = agent.core.last_seq();
        self.trace = (self.trace ^ last.0).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let answered = std::mem::take(&mut agent.answered);
        let committed = std::mem::take(&mut agent.committed);
        let lost = std::mem::take(&mut agent.lost);
        if term != self.term {
            self.term = term;
            self.own.clear();
            self.replayed = None;
        }
        let any = !committed.is_empty();
        for entry in committed {
            self.tell(|| format!("record: {:?} {:x?}", entry.record, entry.content.first()));
            self.check_record(&entry);
            if let Some(image) = &mut self.replayed {
                if entry.record.kind == Kind::Mark {
                    assert!(!image.in_gap.contains(&true), "a mark inside a gap: {entry:?}");
                }
                image.apply(&entry);
            }
            self.own.push(entry);
            self.counts.records += 1;
        }
        self.settle(answered);
        self.lose(&lost);
        if any || self.counts.steps.is_multiple_of(8) {
            self.check_disk(false);
            self.check_journal();
        }
    }

    pub(crate) fn settle(&mut self, answered: Vec<(RequestId, Result<(), i32>)>) {
        let last = self.agent.as_ref().map_or(Seq(u64::MAX), |agent| agent.core.last_seq());
        for (id, result) in answered {
            let asked = &mut self.asked[id.0 as usize];
            assert!(asked.answered.is_none() && !asked.lost, "{id:?} is answered twice");
            asked.answered = Some(last);
            if self.tell {
                println!("{:>6} answered: {id:?} {result:?}", self.counts.steps);
            }
            let (request, submitted) = (asked.request, asked.submitted);
            let now = self.counts.steps;
            match request.ask {
                Ask::Flush if result.is_ok() => {
                    for ((volume, ..), stretch) in self.hot.iter().zip(&mut self.sectors) {
                        if *volume == usize::from(request.volume.0) - 1 {
                            stretch.iter_mut().for_each(|sector| sector.flushed(submitted));
                        }
                    }
                }
                Ask::Flush => {}
                ask => {
                    let fua = matches!(ask, Ask::Write { fua: true } | Ask::Zero { fua: true, .. });
                    for (sector, _) in touched(&self.hot, &mut self.sectors, &request) {
                        sector.answered(submitted, result.is_ok(), fua, now);
                    }
                }
            }
        }
    }

    /// These volumes' disks may have lost what was not safe.
    pub(crate) fn lose(&mut self, volumes: &[usize]) {
        for ((volume, ..), stretch) in self.hot.iter().zip(&mut self.sectors) {
            if volumes.contains(volume) {
                stretch.iter_mut().for_each(requests::Sector::lost);
            }
        }
    }

    fn check_record(&self, entry: &Entry) {
        let record = &entry.record;
        if let Some(before) = self.own.last() {
            assert!(before.record.seq < record.seq, "the order goes back: {record:?}");
        }
        let number = match record.kind {
            Kind::Write => (entry.content[0] >> 16) - 1,
            Kind::Zero | Kind::Discard => {
                let covers = self.asked.iter().any(|asked| {
                    let request = &asked.request;
                    let kind = match request.ask {
                        Ask::Zero { .. } => Kind::Zero,
                        Ask::Discard => Kind::Discard,
                        _ => return false,
                    };
                    kind == record.kind
                        && request.volume == record.volume
                        && request.start <= record.start
                        && record.end().0 <= request.start.0 + request.sectors
                        && asked.after < record.seq
                        && asked.answered.is_none_or(|at| record.seq <= at)
                });
                assert!(covers, "nobody has asked for {record:?}");
                return;
            }
            _ => return,
        };
        for (at, content) in (record.start.0..).zip(&entry.content) {
            assert_eq!(*content, stamp(number, at), "not the bytes of the request: {record:?}");
        }
        let asked = &self.asked[number as usize];
        assert_eq!(asked.request.volume, record.volume, "another volume");
        assert!(
            record.seq > asked.after,
            "{record:?} is before what was answered before {asked:?}"
        );
        assert!(
            asked.answered.is_none_or(|at| record.seq <= at),
            "{record:?} is after its answer, {asked:?}"
        );
        // A request is recorded once.
        let twice = self.own.iter().any(|other| {
            other.record.kind == Kind::Write
                && other.content[0] >> 16 == number + 1
                && other.record.start < record.end()
                && record.start < other.record.end()
        });
        assert!(!twice, "{record:?} is there twice");
    }

    fn stretch(&self, stretch: usize) -> Vec<Stamp> {
        let (volume, start, length) = self.hot[stretch];
        let mut content = vec![0; (length * 512) as usize];
        // Not a read of the agent's, so no fault of its is met here.
        let image = self.site.disk.peek(&format!("/{}", volume + 1), &mut content, start * 512);
        image.expect("a volume's disk");
        stamps(&content)
    }

    /// The disk holds what was written.
    pub(crate) fn check_disk(&mut self, after_cut: bool) {
        for index in 0..self.hot.len() {
            let (volume, start, _) = self.hot[index];
            let content = self.stretch(index);
            let now = self.counts.steps;
            for ((at, found), sector) in (start..).zip(content).zip(&mut self.sectors[index]) {
                assert!(
                    sector.may_hold(found, after_cut),
                    "sector {at} of volume {volume} holds {found:x}, but may hold {}",
                    sector.describe()
                );
                if after_cut {
                    *sector = requests::Sector::new(found, now);
                }
            }
        }
    }

    /// The disk equals the journal.
    fn check_journal(&self) {
        let (Some(agent), Some(image)) = (&self.agent, &self.replayed) else { return };
        let last = agent.core.last_seq();
        // Something is drawn and not committed yet; or nothing was drawn in this term.
        // Writes that are carried out again wait for each other.
        let redoing = agent.core.redo_count() > 0;
        if redoing || self.own.last().is_none_or(|entry| entry.record.seq != last) {
            return;
        }
        for (index, (volume, start, _)) in self.hot.iter().enumerate() {
            // What it has lost is marked when it has said so.
            if agent.failing().any(|failing| failing == *volume) {
                continue;
            }
            for (at, found) in (*start..).zip(self.stretch(index)) {
                let busy = agent.tasks.iter().any(|task| match task {
                    Task::Local { volume: of, io, start, sectors, .. } => {
                        let writes = matches!(io, LocalIo::Write { .. } | LocalIo::Zero { .. });
                        writes && of == volume && (*start..start + sectors).contains(&at)
                    }
                    Task::Copy { .. } => false,
                });
                let recorded = image.volumes[*volume][at as usize];
                assert!(
                    busy || recorded == found
                        || image.unknown[*volume][at as usize]
                        || agent.is_uncaptured(*volume, at),
                    "sector {at} of volume {volume} is {found:x}, and {recorded:x} in the journal \
                     at {last}"
                );
            }
        }
    }

    /// The agent has started.
    pub(crate) fn started(&mut self) {
        if !self.target.is_off() {
            self.check_points();
        }
        let Some(agent) = &self.agent else { return };
        if agent.with_ring {
            return;
        }
        let end = self.target.position();
        let mut durable = self.image_at(end);
        // What the spool holds goes there (invariant 2), unless that cannot be read: a doubt follows.
        self.spooled = agent.spooled(end.seq).ok();
        if self.spooled.is_none() {
            self.tell(|| "what the spool holds cannot be read".into());
            self.suspect();
        }
        if self.suspect {
            return;
        }
        let Some(agent) = &self.agent else { return };
        let spooled = self.spooled.iter().flatten();
        spooled.filter(|entry| entry.record.seq > end.seq).for_each(|entry| {
            durable.apply(entry);
        });
        for (index, (volume, start, _)) in self.hot.iter().enumerate() {
            for (at, found) in (*start..).zip(self.stretch(index)) {
                let there = durable.volumes[*volume][at as usize];
                assert!(
                    found == there
                        || durable.unknown[*volume][at as usize]
                        || agent.is_uncaptured(*volume, at),
                    "sector {at} of volume {volume} is {found:x} here and {there:x} at the target, \
                     and is not marked"
                );
            }
        }
    }

    /// What the records up to a position of the target say.
    fn image_at(&self, position: Position) -> Image {
        let mut image = Image::new(&self.site.sizes);
        let entries = self.fed.iter().flat_map(|fed| &fed.entries);
        for entry in entries.take_while(|entry| entry.record.seq <= position.seq) {
            image.apply(entry);
        }
        image
    }

    /// Frames that the target turned out not to have are forgotten.
    fn cut_fed(&mut self, position: Position) {
        if position == Position::default() {
            return self.fed.clear();
        }
        let end = self.fed.iter().rposition(|fed| fed.last == position);
        let end =
            end.unwrap_or_else(|| panic!("the target ends at {position}, where nothing ends"));
        self.fed.truncate(end + 1);
    }

    /// The stream goes on after `from`.
    pub(crate) fn resumed(&mut self, from: Position, end: Option<Position>) {
        self.tell(|| format!("resumed after {from}, the target ends at {end:?}"));
        self.check_promise(end.unwrap_or_default());
        self.cut_fed(end.unwrap_or_default());
        if self.counts.doubts > self.doubts_then {
            // Everything was marked, durably, before it went on.
            self.suspect = false;
        }
        // Until the link comes to what cannot be read in the spool, the journal is not known.
        self.replayed = self.spooled.as_ref().map(|spooled| {
            let mut image = self.image_at(from);
            let kept = spooled.iter().chain(&self.own);
            for entry in kept.filter(|entry| entry.record.seq > from.seq) {
                image.apply(entry);
            }
            image
        });
    }

    fn check_promise(&self, end: Position) {
        assert!(
            end.seq >= self.promised.seq,
            "the target ends at {end} and has acknowledged {}",
            self.promised
        );
    }

    /// The target has recovered.
    pub(crate) fn check_target(&mut self) {
        let end = self.target.position();
        self.tell(|| format!("the target has recovered, and ends at {end}"));
        if self.damaged && end.seq < self.promised.seq {
            // It has noticed that the end of its log is damaged.
            self.promised = Position::default();
            self.suspect();
        }
        self.check_promise(end);
        self.cut_fed(end);
        self.check_points();
    }

    /// Every point that is offered.
    pub(crate) fn check_points(&mut self) {
        self.check_window();
        let points = self.target.points();
        let (oldest, end) = (self.target.oldest(), self.target.position().seq);
        let mut image = Image::new(&self.site.sizes);
        let mut checked = 0;
        for entry in self.fed.iter().flat_map(|fed| &fed.entries) {
            image.apply(entry);
            let seq = entry.record.seq;
            let good = !image.in_gap.contains(&true);
            if !points.iter().any(|(first, last)| *first <= seq && seq <= *last) {
                let may_lack = self.damaged || seq < oldest || seq > end;
                assert!(!good || may_lack, "the point {seq} is not offered");
                continue;
            }
            assert!(good, "a point inside a gap is offered: {seq}");
            checked += 1;
            for stretch in 0..self.hot.len() {
                self.check_content(&image, seq, stretch);
            }
        }
        self.counts.points += checked;
    }

    /// Nothing has left that was received less than a window ago, whatever the clocks show. Time in
    /// which nothing is received does not count, so what leaves may be older still.
    fn check_window(&self) {
        let oldest = self.target.oldest();
        let newest_gone = self.fed.iter().find(|fed| fed.last.seq >= oldest);
        let Some(newest_gone) = newest_gone.filter(|_| oldest > Seq::ZERO) else { return };
        let age_ns = self.target_ns - newest_gone.at_ns;
        assert!(
            age_ns >= self.target.window_ns(),
            "what was received up to {oldest} has left after {} ms",
            age_ns / 1_000_000
        );
    }

    fn check_content(&self, image: &Image, seq: Seq, stretch: usize) {
        let (volume, start, length) = self.hot[stretch];
        let range = start as usize..(start + length) as usize;
        let content = &image.volumes[volume][range.clone()];
        self.check_known(image, seq, volume, range, content, self.damaged);
    }

    /// The target has this content at a point, but for what the source could not read; or says that
    /// it has it no more.
    fn check_known(
        &self,
        image: &Image,
        seq: Seq,
        volume: usize,
        range: Range<usize>,
        content: &[Stamp],
        may_fail: bool,
    ) {
        let mut from = range.start;
        for stretch in image.unknown[volume][range.clone()].chunk_by(|one, next| one == next) {
            let to = from + stretch.len();
            if !stretch[0] {
                let found = self.target.read(volume, seq, from as u64, (to - from) as u64);
                let expected = &content[from - range.start..to - range.start];
                match found {
                    Ok(found) => assert_eq!(
                        found, expected,
                        "volume {volume} from sector {from} on, at {seq}"
                    ),
                    Err(why) => assert!(may_fail, "{seq} cannot be read: {why}"),
                }
            }
            from = to;
        }
    }

    /// One point, any.
    pub(crate) fn check_a_point(&mut self) {
        if self.target.is_off() {
            return;
        }
        self.check_window();
        let points = self.target.points();
        if points.is_empty() {
            return;
        }
        let (first, last) = points[self.rng.below(points.len() as u64) as usize];
        let seqs: Vec<Seq> = self
            .fed
            .iter()
            .flat_map(|fed| &fed.entries)
            .map(|entry| entry.record.seq)
            .filter(|seq| first <= *seq && *seq <= last)
            .collect();
        if seqs.is_empty() {
            return;
        }
        let seq = seqs[self.rng.below(seqs.len() as u64) as usize];
        let position = Position { term: self.term, seq };
        let image = self.image_at(position);
        let stretch = self.rng.below(self.hot.len() as u64) as usize;
        self.counts.points += 1;
        self.check_content(&image, seq, stretch);
    }

    /// Everything is at rest: all is equal.
    pub(crate) fn check_at_rest(&mut self) {
        self.check_promise(self.target.position());
        self.check_points();
        let latest = self.target.position();
        let image = self.image_at(latest);
        let offered = self.target.points();
        assert!(
            offered.last().is_some_and(|(_, last)| *last == latest.seq),
            "the newest position, {latest}, is not offered: {offered:?}"
        );
        for (volume, sectors) in self.site.sizes.clone().into_iter().enumerate() {
            let mut content = vec![0; (sectors * 512) as usize];
            let read = self.site.disk.peek(&format!("/{}", volume + 1), &mut content, 0);
            read.expect("a volume's disk");
            let found = stamps(&content);
            self.check_known(&image, latest.seq, volume, 0..sectors as usize, &found, false);
        }
    }

    /// After a power cut: what was captured and is not at the target is lost with the ring.
    pub(crate) fn forget_what_was_lost(&mut self) {
        self.own.clear();
    }
}
