//! The ladder: what captured writes wait in, for how long they have, and when the next rung is reached.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tidemark_control::agent::{Ladder as LadderStatus, Rung};

use crate::{
    engine::Engine,
    outbox::{Outbox, SPILL_ABOVE_PERMILLE},
};

/// Over how long the rate is measured at which the backlog grows.
pub const WINDOW: Duration = Duration::from_secs(60);
/// The least of it that says something about a rate.
const WINDOW_MIN: Duration = Duration::from_secs(5);
/// How often somebody looks.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// One look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// Whether writes are being let through without a record.
    pub gap: bool,
    /// Bytes of frames in memory, and how many there is room for.
    pub memory: (u64, u64),
    /// Whether there is a spool, and it takes frames.
    pub spool_works: bool,
    /// Whether it holds frames that are not final-durable.
    pub in_spool: bool,
    /// Bytes that the spool takes, and the most it may.
    pub spool: (u64, u64),
}

/// Counts the time on each rung, and foresees the next.
#[derive(Debug, Default)]
pub struct Ladder {
    seen: Option<(Instant, Look)>,
    /// On the ring, in the spool, in a gap.
    time: [Duration; 3],
    backlog: VecDeque<(Instant, u64)>,
}

impl Look {
    /// The rung.
    pub fn rung(&self) -> Rung {
        match (self.gap, self.in_spool) {
            (true, _) => Rung::Gap,
            (false, true) => Rung::Spool,
            (false, false) => Rung::Ring,
        }
    }

    /// The next rung, and the bytes that fit before it is reached.
    fn next(&self) -> Option<(Rung, u64)> {
        let (memory, area) = self.memory;
        let (spool, spool_max) = if self.spool_works { self.spool } else { (0, 0) };
        match self.rung() {
            Rung::Ring if self.spool_works => {
                let threshold = area / 1000 * SPILL_ABOVE_PERMILLE;
                Some((Rung::Spool, threshold.saturating_sub(memory)))
            }
            Rung::Ring | Rung::Spool => {
                let left = area.saturating_sub(memory) + spool_max.saturating_sub(spool);
                Some((Rung::Gap, left))
            }
            Rung::Gap => None,
        }
    }

    fn backlog(&self) -> u64 {
        self.memory.0 + self.spool.0
    }
}

impl Ladder {
    /// Takes a look into account.
    pub fn look(&mut self, now: Instant, look: Look) {
        if let Some((then, before)) = self.seen {
            let time = &mut self.time[before.rung() as usize];
            *time += now.saturating_duration_since(then);
        }
        self.seen = Some((now, look));
        self.backlog.push_back((now, look.backlog()));
        while let Some((oldest, _)) = self.backlog.front()
            && now.saturating_duration_since(*oldest) > WINDOW
        {
            self.backlog.pop_front();
        }
    }

    /// How fast the backlog has grown over the window, bytes a second; negative if it shrinks.
    fn growth(&self) -> Option<f64> {
        let ((from, before), (to, after)) = (self.backlog.front()?, self.backlog.back()?);
        let time = to.saturating_duration_since(*from);
        (time >= WINDOW_MIN).then(|| (*after as f64 - *before as f64) / time.as_secs_f64())
    }

    /// For people.
    pub fn status(&self) -> LadderStatus {
        let look = self.seen.map_or(Look::default(), |(_, look)| look);
        let growth = self.growth();
        let next = look.next().and_then(|(rung, left)| {
            let rate = growth.filter(|rate| *rate >= 1.0)?;
            Some((rung, (left as f64 / rate) as u64))
        });
        let seconds = |rung: Rung| self.time[rung as usize].as_secs();
        LadderStatus {
            ring_s_total: seconds(Rung::Ring),
            spool_s_total: seconds(Rung::Spool),
            gap_s_total: seconds(Rung::Gap),
            spool_bytes: look.spool.0,
            spool_bytes_max: look.spool.1,
            growth_bytes_per_s: growth.map_or(0, |rate| rate as i64),
            window_s: WINDOW.as_secs(),
            next: next.map(|(rung, _)| rung),
            next_in_s: next.map(|(_, seconds)| seconds),
        }
    }
}

/// A ladder that is looked after until this is dropped.
pub struct Watched {
    ladder: Arc<Mutex<Ladder>>,
    task: tokio::task::JoinHandle<()>,
}

impl Watched {
    /// Looks every half second from now on. It is called on a tokio runtime.
    pub fn start(engine: Engine, outbox: Arc<Outbox>) -> Watched {
        let ladder = Arc::new(Mutex::new(Ladder::default()));
        let watched = ladder.clone();
        let task = tokio::spawn(async move {
            loop {
                let gap = engine.snapshot().overflow;
                look_at(&watched, gap, &outbox);
                tokio::time::sleep(LOOK_EVERY).await;
            }
        });
        Watched { ladder, task }
    }

    /// Looks once more; how it stands.
    pub fn status(&self, gap: bool, outbox: &Outbox) -> (Rung, LadderStatus) {
        let look = look_at(&self.ladder, gap, outbox);
        (look.rung(), self.ladder.lock().unwrap_or_else(PoisonError::into_inner).status())
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn look_at(ladder: &Mutex<Ladder>, gap: bool, outbox: &Outbox) -> Look {
    let (backlog, spool) = (outbox.backlog(), outbox.spool());
    let look = Look {
        gap,
        memory: (backlog.bytes, backlog.area_bytes),
        spool_works: spool.configured && spool.problem.is_none(),
        in_spool: spool.in_use,
        spool: (spool.bytes, spool.bytes_max),
    };
    ladder.lock().unwrap_or_else(PoisonError::into_inner).look(Instant::now(), look);
    look
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn look(memory: u64, spool: u64) -> Look {
        Look {
            memory: (memory * MIB, 100 * MIB),
            spool_works: true,
            in_spool: spool > 0,
            spool: (spool * MIB, 1000 * MIB),
            ..Look::default()
        }
    }

    #[test]
    fn the_next_rung_is_foreseen_from_the_growth_over_the_window() {
        let (mut ladder, start) = (Ladder::default(), Instant::now());
        let at = |second| start + Duration::from_secs(second);
        for second in 0..=10 {
            ladder.look(at(second), look(2 * second, 0));
            if second < 5 {
                assert_eq!(ladder.status().next, None, "too short a time to say");
            }
        }
        // 20 of 50 MiB are there, at 2 MiB a second.
        let status = ladder.status();
        assert_eq!((status.next, status.next_in_s), (Some(Rung::Spool), Some(14)));
        assert_eq!(status.growth_bytes_per_s, 2 * MIB as i64);
        for second in 11..=100 {
            ladder.look(at(second), look(50, 10 * (second - 10)));
        }
        // 900 of 1000 MiB in the spool and 50 of 100 in memory; 10 MiB a second in the last minute.
        let status = ladder.status();
        assert_eq!((status.next, status.next_in_s), (Some(Rung::Gap), Some(15)));
        let broken = Look { spool_works: false, ..look(50, 900) };
        ladder.look(at(101), broken);
        assert!(ladder.status().next_in_s < Some(10), "a spool that fails has no room");
        for second in 102..=200 {
            ladder.look(at(second), look(50, 900));
        }
        assert_eq!(ladder.status().next, None, "it does not grow");
    }

    #[test]
    fn time_is_counted_for_each_rung() {
        let (mut ladder, start) = (Ladder::default(), Instant::now());
        let at = |second| start + Duration::from_secs(second);
        ladder.look(at(0), look(1, 0));
        ladder.look(at(10), look(60, 5));
        ladder.look(at(30), Look { gap: true, ..look(100, 1000) });
        ladder.look(at(35), look(1, 0));
        ladder.look(at(36), look(1, 0));
        let status = ladder.status();
        let times = (status.ring_s_total, status.spool_s_total, status.gap_s_total);
        assert_eq!(times, (11, 20, 5));
        assert_eq!((status.spool_bytes, status.spool_bytes_max), (0, 1000 * MIB));
    }
}
