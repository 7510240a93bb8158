//! Plays seeds: `tidemark-simulate --seeds N --from S`.

use std::process::ExitCode;

use clap::Parser;
use tidemark_simulate::{Outcome, run};

/// The exit code of a violation.
const VIOLATED: u8 = 3;

/// Plays the agent and the target together, by seeds.
#[derive(Parser)]
struct Arguments {
    /// How many seeds.
    #[arg(long, default_value_t = 200)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Steps of each in which things go wrong.
    #[arg(long, default_value_t = 2500)]
    steps: u64,
    /// Say what happens.
    #[arg(long)]
    tell: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // The violation is told below; here is where it was seen.
    std::panic::set_hook(Box::new(|panic| {
        if let Some(place) = panic.location() {
            println!("seen at {place}");
        }
    }));
    let mut outcomes: Vec<Outcome> = Vec::new();
    for seed in arguments.from..arguments.from + arguments.seeds {
        let outcome = run(seed, arguments.steps, arguments.tell);
        if let Some(violation) = &outcome.violation {
            println!("seed {seed}: {violation}");
            println!("  after {:?}", outcome.counts);
            println!(
                "  again: cargo xtask simulate --seeds 1 --from {seed} --steps {}",
                arguments.steps
            );
            return ExitCode::from(VIOLATED);
        }
        outcomes.push(outcome);
    }
    let median = |of: fn(&Outcome) -> u64| {
        let mut all: Vec<u64> = outcomes.iter().map(of).collect();
        all.sort_unstable();
        all.get(all.len() / 2).copied().unwrap_or(0)
    };
    let (steps, crashes) = (median(|o| o.counts.steps), median(|o| o.counts.crashes));
    println!(
        "{} seeds from {}, no violation; medians of a seed: {steps} steps, {crashes} crashes, {} \
         requests, {} records, {} points checked, {} doubts, {} rings gone on with",
        outcomes.len(),
        arguments.from,
        median(|o| o.counts.requests),
        median(|o| o.counts.records),
        median(|o| o.counts.points),
        median(|o| o.counts.doubts),
        median(|o| o.counts.inherited),
    );
    let enough = steps >= 500 && crashes >= 2;
    if !enough {
        println!("that is too little: 500 steps and 2 crashes are wanted");
    }
    if enough { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
