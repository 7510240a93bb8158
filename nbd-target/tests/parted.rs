//! Two sources that both believe to be the group's: one history is kept, and the other is refused until
//! people decide.

mod common;

use common::{Lab, equals, run, source::Source};
use tidemark_journal::{Ancestry, GapReason, Position, Seq, TermId};
use tidemark_link::message::{Message, RefuseCode};

const MIB: usize = 1 << 20;

async fn write(source: &mut Source, records: usize) -> Seq {
    for _ in 0..records {
        source.random();
    }
    source.send().await;
    source.acknowledged().await;
    source.before.seq
}

#[test]
fn a_history_that_has_parted_is_refused_and_both_stay_as_they_are() {
    run(async || {
        let lab = Lab::new("", "");
        let mut source = Source::new(&[4 * MIB]);
        source.connect(&lab).await;
        source.gap_begin(0, GapReason::FirstSync);
        source.gap_end(0);
        let forked = write(&mut source, 50).await;
        let term = source.before.term;
        let last = write(&mut source, 50).await;
        source.disconnect();

        // A copy of the source that was switched on before the second half, and the same disk
        // protected anew under the same id: neither has what the target has.
        let mut copy = Source::new(&[4 * MIB]);
        let fork = TermId([8; 16]);
        copy.ancestry = Ancestry::root(term).fork(fork, forked).expect("a path");
        copy.before = Position { term: fork, seq: forked };
        copy.ceiling = Seq(1 << 31);
        let mut anew = Source::new(&[4 * MIB]);
        anew.ancestry = Ancestry::root(TermId([9; 16]));
        for other in [&mut copy, &mut anew] {
            other.map_generation = 5;
            for _ in 0..2 {
                let answer = other.greet(&lab).await.expect("an answer");
                let Message::Refuse(refuse) = answer else { panic!("{answer:?}") };
                assert_eq!(refuse.code, RefuseCode::Diverged, "{}", refuse.sentence);
            }
        }

        // What there was is there, and its own source goes on.
        for seq in [forked, last] {
            equals(&lab, &source, seq).await;
        }
        assert_eq!(lab.replica().journal().progress().durable.seq, last);
        source.connect(&lab).await;
        let end = write(&mut source, 20).await;
        equals(&lab, &source, end).await;
        source.disconnect();
    });
}
