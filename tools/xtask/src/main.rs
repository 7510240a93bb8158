//! The project's tasks: `cargo xtask setup` and `cargo xtask test [STAGE...]`.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod deny;
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
}

fn main() -> ExitCode {
    let result = match Arguments::parse().task {
        Task::Setup => setup::ensure_and_say().map(|()| ExitCode::SUCCESS),
        Task::Test { stages } => test::run(&stages),
        Task::Simulate(options) => {
            test::workspace_root().and_then(|root| simulate::run(&root, &options))
        }
    };
    result.unwrap_or_else(|error| {
        eprintln!("xtask: {error:#}");
        ExitCode::FAILURE
    })
}
