//! The project's tasks: `cargo xtask setup`, `cargo xtask test [STAGE...]`, `cargo xtask simulate`,
//! `cargo xtask fuzz [TARGET...]` and `cargo xtask bench [NAME...]`.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod bench;
mod deny;
mod fuzz;
mod process;
mod setup;
mod simulate;
mod spdx;
mod test;

/// The project's tasks.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what the tests need: Debian packages, a kernel and a Debian image for guests.
    Setup,
    /// Set up, then run the test stages in order; all of the usual ones if none is named.
    Test {
        /// The stages to run.
        #[arg(value_enum)]
        stages: Vec<test::Stage>,
    },
    /// Play the agent and the target together on simulated disks, network and clocks.
    Simulate(simulate::Options),
    /// Measure side by side with what people use today.
    Bench(bench::Options),
    /// Build the fuzz targets with a sanitizer and run them; all if none is named.
    Fuzz {
        /// How long each target runs.
        #[arg(long, default_value_t = 60)]
        seconds: u64,
        /// The targets: the names of the files in fuzz/targets.
        targets: Vec<String>,
    },
}

fn main() -> ExitCode {
    let result = match Arguments::parse().task {
        Task::Setup => setup::ensure_and_say().map(|()| ExitCode::SUCCESS),
        Task::Test { stages } => test::run(&stages),
        Task::Simulate(options) => {
            test::workspace_root().and_then(|root| simulate::run(&root, &options))
        }
        Task::Bench(options) => bench::run(&options),
        Task::Fuzz { seconds, targets } => test::fuzz(seconds, &targets),
    };
    result.unwrap_or_else(|error| {
        eprintln!("xtask: {error:#}");
        ExitCode::FAILURE
    })
}
