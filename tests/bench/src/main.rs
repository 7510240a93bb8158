//! What Tidemark costs, measured side by side with what people use today: `cargo xtask bench` calls this, after it has
//! set up what is measured against.
//!
//! Each measurement prints a table and, if asked, writes the same as JSON. Nothing here fails for being slow; a bar that
//! does not hold is said so in the table.

mod figures;
mod guest;
mod host;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};

use figures::Report;

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Name {
    /// Writes through the agent's NBD socket with live replication, against nbdkit and qemu-nbd.
    HostWrites,
    /// What a target takes in durably, against the same stream thrown away.
    HostIngest,
    /// The first sync of a half-empty disk, against nbdcopy from nbdkit.
    HostInitialSync,
    /// How far a target lags behind half of what can be sustained.
    HostLag,
    /// Instructions per replicated write, by component.
    HostInstructions,
    /// Writes to a vast volume, against a small one.
    HostVolumes,
    /// Writes to many groups, against one.
    HostGroups,
    /// Writes to a target with many points, against none.
    HostPoints,
    /// Writes at several depths and of several sizes, with and without capture.
    HostLoads,
    /// A protected ublk device in a guest whose link is held, against rublk's loop.
    GuestCapture,
    /// The same with live replication to a second guest, against rublk's loop and DRBD.
    GuestSpeed,
    /// Sequential writes in a guest with two processors, on each rung of the ladder, against rublk's loop.
    GuestSequential,
}

/// Measures side by side.
#[derive(Parser)]
struct Arguments {
    /// What to measure; everything if nothing is named.
    names: Vec<Name>,
    /// Rounds of each.
    #[arg(long, default_value_t = 11)]
    rounds: usize,
    /// Smaller loads, to see that it works.
    #[arg(long)]
    short: bool,
    /// A directory for NAME.json.
    #[arg(long)]
    json: Option<PathBuf>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let names = match &arguments.names[..] {
        [] => Name::value_variants(),
        names => names,
    };
    for name in names {
        let text = name.to_possible_value().context("every name has one")?.get_name().to_owned();
        println!("=== {text}");
        let Arguments { rounds, short, .. } = arguments;
        let path = arguments.json.as_ref().map(|directory| directory.join(format!("{text}.json")));
        let mut report = Report::new(path)?;
        let comparisons = match name {
            Name::HostWrites => vec![host::writes::measure(rounds, short)?],
            Name::HostIngest => vec![host::ingest::measure(rounds, short)?],
            Name::HostInitialSync => host::initial_sync::measure(rounds, short)?,
            Name::HostLag => host::lag::measure(rounds, short)?,
            Name::HostInstructions => host::instructions::measure(rounds, short)?,
            Name::HostVolumes => vec![host::growth::volumes(rounds, short)?],
            Name::HostGroups => vec![host::growth::groups(rounds, short)?],
            Name::HostPoints => vec![host::growth::points(rounds, short)?],
            Name::HostLoads => vec![host::growth::loads(rounds, short)?],
            Name::GuestCapture => {
                guest::capture::measure(rounds, short, &mut report)?;
                Vec::new()
            }
            Name::GuestSpeed => {
                guest::speed::measure(rounds, short, &mut report)?;
                Vec::new()
            }
            Name::GuestSequential => vec![guest::sequential::measure(rounds, short)?],
        };
        for comparison in comparisons {
            report.add(comparison)?;
        }
    }
    Ok(())
}
