//! Seeds that were once of interest, and that a seed decides everything.

use tidemark_simulate::run;

const STEPS: u64 = 2500;

#[test]
fn a_seed_plays_the_same_each_time() {
    let traces: Vec<_> = (0..4)
        .map(|seed| {
            let (first, second) = (run(seed, STEPS, false), run(seed, STEPS, false));
            assert_eq!(first.violation, None, "seed {seed}");
            assert_eq!((first.trace, first.counts), (second.trace, second.counts), "seed {seed}");
            first.trace
        })
        .collect();
    assert_ne!(traces[0], traces[1], "and another one differently");
}
