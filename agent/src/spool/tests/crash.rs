//! Power cuts at any moment: what was durable is there, in order, and nothing that is not sound.

use super::*;
use crate::dirty::tests::random::Random;

#[test]
fn a_power_cut_at_any_moment_keeps_what_was_durable() {
    let (mut torn, mut longer) = (0, 0);
    for seed in 0..300 {
        let mut random = Random::new(seed);
        let disk = Disk::default();
        let (mut store, mut journal) = (open(&disk), Journal::new());
        let (mut durable, mut forgotten) = (Seq(0), Seq(0));
        for _ in 0..4 {
            for _ in 0..1 + random.below(20) {
                let count = 1 + random.below(4) as usize;
                (0..count).for_each(|_| journal.add(1 + random.below(50) as u32));
                let (batch, buffer) = journal.batch(count);
                if store.append(&batch, &buffer).is_ok() {
                    durable = journal.end.seq;
                } else {
                    journal.frames.truncate(journal.frames.len() - count);
                    journal.end = batch.before;
                }
                if random.below(6) == 0 {
                    forgotten = Seq(forgotten.0 + random.below(durable.0 - forgotten.0 + 1));
                    store.forget(forgotten).unwrap();
                }
            }
            // A batch is under way.
            journal.add(1 + random.below(60) as u32);
            let (batch, buffer) = journal.batch(1);
            disk.fail_next_sync();
            let _ = store.append(&batch, &buffer);
            disk.cut_power(&mut random);
            store = open(&disk);
            let (first, end) = store.index().ends().unwrap_or((journal.end, journal.end));
            assert!(first.seq <= forgotten || durable <= forgotten, "seed {seed}");
            assert!(end.seq >= durable || durable <= forgotten, "seed {seed}: {end} of {durable}");
            journal.check(store.index(), forgotten.max(first.seq));
            if store.index().ends().is_some() && end.seq > durable {
                longer += 1;
                durable = end.seq;
            } else {
                torn += 1;
                journal.frames.pop();
                journal.end = Position { seq: durable, ..journal.end };
            }
            if durable <= forgotten {
                store.clear().unwrap();
            }
        }
    }
    assert!(torn > 100 && longer > 10, "{torn} tails were torn and {longer} were whole");
}

/// The test above notices if batches were acknowledged without a sync.
#[test]
fn what_was_not_synced_may_be_lost() {
    let lost = (0..50).any(|seed| {
        let disk = Disk::default();
        let (mut store, mut journal) = (open(&disk), Journal::new());
        journal.add(50);
        let (batch, buffer) = journal.batch(1);
        disk.fail_next_sync();
        assert!(store.append(&batch, &buffer).is_err());
        disk.cut_power(&mut Random::new(seed));
        open(&disk).index().ends().is_none()
    });
    assert!(lost);
}
