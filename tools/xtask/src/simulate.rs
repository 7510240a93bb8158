//! `cargo xtask simulate`: the joint simulator, and bugs planted to see that it finds them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Instant,
};

use anyhow::{Context, Result, bail};

use crate::process;

/// The most seeds that a planted bug may take to be found.
const SEEDS_FOR_A_MUTANT: u64 = 999;
/// How the simulator ends without a violation, and with one.
const NOTHING: u8 = 0;
const FOUND: u8 = 3;

/// What is to be played.
#[derive(clap::Args)]
pub struct Options {
    /// How many seeds.
    #[arg(long, default_value_t = 200)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Steps of each seed in which things go wrong.
    #[arg(long, default_value_t = 2500)]
    steps: u64,
    /// Say what happens.
    #[arg(long)]
    tell: bool,
    /// Plant the bug `tests/mutants/NAME.patch` in a copy of the tree first; `all` takes each in
    /// turn. It has to be found by fewer than 1000 seeds.
    #[arg(long, value_name = "NAME")]
    mutant: Option<String>,
}

impl Options {
    /// So many seeds from 0 on.
    pub fn seeds(seeds: u64) -> Options {
        Options { seeds, from: 0, steps: 2500, tell: false, mutant: None }
    }
}

/// Plays the seeds, or looks for planted bugs.
pub fn run(root: &Path, options: &Options) -> Result<ExitCode> {
    let Some(mutant) = &options.mutant else {
        return play(root, None, options).map(ExitCode::from);
    };
    let dir = root.join("tests/mutants");
    let mut patches: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        let name = path.file_stem().and_then(|name| name.to_str());
        let wanted = mutant == "all" || name == Some(mutant);
        if wanted && path.extension().is_some_and(|ext| ext == "patch") {
            patches.push(path);
        }
    }
    patches.sort();
    if patches.is_empty() {
        bail!("there is no tests/mutants/{mutant}.patch");
    }
    let mut missed = Vec::new();
    for patch in patches {
        let name = patch.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        println!("=== mutant {name}");
        let start = Instant::now();
        let found = plant(root, &patch, options)?;
        let verdict = if found { "found" } else { "NOT FOUND" };
        println!("{name}: {verdict} after {:.1} s", start.elapsed().as_secs_f64());
        if !found {
            missed.push(name);
        }
    }
    if !missed.is_empty() {
        bail!("planted bugs that no seed has found: {}", missed.join(", "));
    }
    Ok(ExitCode::SUCCESS)
}

/// Plays the seeds on a copy of the tree with the patch applied. Whether a violation was found.
fn plant(root: &Path, patch: &Path, options: &Options) -> Result<bool> {
    let work = tempfile::tempdir()?;
    let tree = work.path().join("tree");
    fs::create_dir(&tree)?;
    let copy =
        "tar --create --exclude=./target --exclude=./.git . | tar --extract --directory \"$0\"";
    process::run(Command::new("sh").args(["-c", copy]).arg(&tree).current_dir(root))?;
    process::run(Command::new("git").arg("apply").arg(patch).current_dir(&tree))
        .with_context(|| format!("{} does not apply any more", patch.display()))?;
    // What does not change between mutants is built once.
    let target = root.join("target/mutants");
    let Options { from, steps, tell, .. } = *options;
    let options = Options { seeds: SEEDS_FOR_A_MUTANT, from, steps, tell, mutant: None };
    match play(&tree, Some(&target), &options)? {
        FOUND => Ok(true),
        NOTHING => Ok(false),
        code => bail!("the simulator with {} ended with {code}: does it build?", patch.display()),
    }
}

/// Builds the simulator of a tree and plays the seeds; Its exit code.
fn play(tree: &Path, target: Option<&Path>, options: &Options) -> Result<u8> {
    let mut command = Command::new("cargo");
    command.args(["run", "--quiet", "--release", "--package", "tidemark-simulate", "--"]);
    command.args(["--seeds", &options.seeds.to_string(), "--from", &options.from.to_string()]);
    command.args(["--steps", &options.steps.to_string()]);
    if options.tell {
        command.arg("--tell");
    }
    if let Some(target) = target {
        command.env("CARGO_TARGET_DIR", target);
    }
    let status = command.current_dir(tree).status().context("cannot run cargo")?;
    match status.code() {
        Some(code) => Ok(u8::try_from(code).unwrap_or(u8::MAX)),
        None => bail!("the simulator did not end by itself: {status}"),
    }
}
