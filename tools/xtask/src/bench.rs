//! `cargo xtask bench`: sets up what is measured against, builds, and measures.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, ensure};

use crate::{
    process, setup,
    test::{build_programs, target_directory, workspace_root},
};

/// What is measured, and how long.
#[derive(clap::Args)]
pub struct Options {
    /// Rounds of each measurement.
    #[arg(long, default_value_t = 11)]
    rounds: usize,
    /// Smaller loads, to see that it works.
    #[arg(long)]
    short: bool,
    /// What to measure; everything if nothing is named, and the list if it is no name.
    names: Vec<String>,
}

/// Measures; the tables go to standard output, and to `target/bench/NAME.json`.
pub fn run(options: &Options) -> Result<ExitCode> {
    let root = workspace_root()?;
    setup::ensure().context("set-up failed")?;
    if options.names.is_empty() || options.names.iter().any(|name| name.starts_with("guest")) {
        install_peers()?;
    }
    ensure!(build_programs(&root)?.failed == 0, "it does not build");
    let target = target_directory(&root)?;
    let mut bench = Command::new(program(&target));
    bench.args(["--rounds", &options.rounds.to_string()]).arg("--json").arg(target.join("bench"));
    if options.short {
        bench.arg("--short");
    }
    process::run(bench.args(&options.names).current_dir(&root))?;
    Ok(ExitCode::SUCCESS)
}

fn program(target: &Path) -> PathBuf {
    target.join("release/tidemark-bench")
}

/// What guests are measured against: DRBD's programs, and `rublk`, which is in no package.
fn install_peers() -> Result<()> {
    let home = env::var_os("HOME").map(PathBuf::from).context("HOME is not set")?;
    let rublk = fs::exists(home.join(".cargo/bin/rublk"))?;
    // rublk makes its bindings to the kernel's headers while it is built.
    let packages: &[&str] = if rublk { &["drbd-utils"] } else { &["drbd-utils", "libclang-dev"] };
    let mut apt = Command::new("apt-get");
    apt.args(["install", "--yes", "--no-install-recommends"]).args(packages);
    process::run(apt.env("DEBIAN_FRONTEND", "noninteractive"))?;
    if rublk {
        return Ok(());
    }
    process::run(Command::new("cargo").args(["install", "rublk", "--locked"]).current_dir(&home))
}
