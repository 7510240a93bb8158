//! `cargo xtask test`: the stages, their order, their times and the final count.
//!
//! Everything is built once, in the release profile. A stage whose needs are missing fails; none is skipped.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::{deny, fuzz, process, setup, simulate};

mod runner;

/// A stage of the test run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Stage {
    /// rustfmt has nothing to change.
    Fmt,
    /// clippy has nothing to say, over all targets.
    Lint,
    /// Every linked crate meets deny.toml.
    Deny,
    /// Everything builds.
    Build,
    /// Unit tests, documentation tests and end-to-end tests on this machine.
    Host,
    /// Real NBD clients against the servers.
    Conformance,
    /// 200 seeds of the joint simulator.
    Simulate,
    /// Every planted bug is found by the joint simulator.
    Mutants,
    /// Tests in emulated machines with real kernels.
    Guests,
    /// Every fuzz target for 20 seconds.
    Fuzz,
    /// `tidemark demo` as an unprivileged user with nothing in its environment.
    Demo,
}

/// The stages of a run that names none, in order.
const USUAL: &[Stage] = &[
    Stage::Fmt,
    Stage::Lint,
    Stage::Deny,
    Stage::Build,
    Stage::Demo,
    Stage::Host,
    Stage::Conformance,
    Stage::Simulate,
    Stage::Mutants,
    Stage::Fuzz,
    Stage::Guests,
];

/// The user and group `nobody`, as whom the demo runs when this program is root's.
const NOBODY: u32 = 65534;

/// How long each fuzz target runs.
const FUZZ_SECONDS: u64 = 20;

/// The demo has to end within this time.
const DEMO_LIMIT: Duration = Duration::from_secs(60);

/// How many checks and tests passed and failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub passed: usize,
    pub failed: usize,
}

impl Count {
    const PASSED: Count = Count { passed: 1, failed: 0 };
    const FAILED: Count = Count { passed: 0, failed: 1 };

    fn add(&mut self, other: Count) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

/// Sets the machine up, runs the stages (the usual ones if none is named) and prints the times and the count.
pub fn run(stages: &[Stage]) -> Result<ExitCode> {
    let root = workspace_root()?;
    let stages = if stages.is_empty() { USUAL } else { stages };
    let mut total = Count::default();
    let mut times = Vec::new();
    let start = Instant::now();
    setup::ensure().context("set-up failed")?;
    times.push(("setup".to_owned(), start.elapsed(), Count::default()));
    for stage in stages {
        let name =
            stage.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
        println!("=== {name}");
        let start = Instant::now();
        let count = stage.run(&root).unwrap_or_else(|error| {
            eprintln!("{name}: {error:#}");
            Count::FAILED
        });
        times.push((name, start.elapsed(), count));
        total.add(count);
    }
    println!("=== times");
    for (name, time, count) in &times {
        println!(
            "{name:<12} {:>7.1} s  {:>5} passed {:>3} failed",
            time.as_secs_f64(),
            count.passed,
            count.failed
        );
    }
    println!("{} passed, {} failed", total.passed, total.failed);
    Ok(if total.failed == 0 && total.passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Stage {
    fn run(self, root: &Path) -> Result<Count> {
        match self {
            Stage::Fmt => cargo(root, &["fmt", "--all", "--check"]),
            Stage::Lint => cargo(
                root,
                &["clippy", "--release", "--workspace", "--all-targets", "--", "-D", "warnings"],
            ),
            Stage::Deny => deny::check(root).map(|()| Count::PASSED),
            Stage::Build => {
                build_programs(root)?;
                // The tests as well, so that a compiler's error is this stage's.
                cargo(
                    root,
                    &["test", "--release", "--workspace", "--all-targets", "--no-run", "--quiet"],
                )
            }
            Stage::Host => tests(root, runner::Selection::Host),
            Stage::Conformance => tests(root, runner::Selection::Conformance),
            Stage::Simulate => {
                let code = simulate::run(root, &simulate::Options::seeds(200))?;
                Ok(if code == ExitCode::SUCCESS { Count::PASSED } else { Count::FAILED })
            }
            Stage::Mutants => {
                let code = simulate::run(root, &simulate::Options::mutants())?;
                Ok(if code == ExitCode::SUCCESS { Count::PASSED } else { Count::FAILED })
            }
            Stage::Guests => tests(root, runner::Selection::Guests),
            Stage::Fuzz => fuzz_targets(root, FUZZ_SECONDS, &[]),
            Stage::Demo => demo(root),
        }
    }
}

/// The `fuzz` task: sets the machine up and runs the targets with these names, or all.
pub fn fuzz(seconds: u64, named: &[String]) -> Result<ExitCode> {
    setup::ensure()?;
    let count = fuzz_targets(&workspace_root()?, seconds, named)?;
    Ok(if count.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn fuzz_targets(root: &Path, seconds: u64, named: &[String]) -> Result<Count> {
    let work = target_directory(root)?.join("fuzz");
    let (passed, failed) = fuzz::run(root, &work, seconds, named)?;
    Ok(Count { passed, failed })
}

fn cargo(root: &Path, arguments: &[&str]) -> Result<Count> {
    process::run(Command::new("cargo").args(arguments).current_dir(root))?;
    Ok(Count::PASSED)
}

/// Tests start programs of other packages by path, which building the tests alone would not make.
pub fn build_programs(root: &Path) -> Result<Count> {
    cargo(root, &["build", "--release", "--workspace", "--bins", "--examples"])
}

fn tests(root: &Path, selection: runner::Selection) -> Result<Count> {
    build_programs(root)?;
    runner::run(root, selection)
}

/// Runs the demo as a newcomer would: no rights, an empty home, the system's own programs.
fn demo(root: &Path) -> Result<Count> {
    build_programs(root)?;
    let program = target_directory(root)?.join("release/tidemark");
    // A place that any user can read, whatever directory the tree is in.
    let work = tempfile::tempdir()?;
    fs::set_permissions(work.path(), fs::Permissions::from_mode(0o755))?;
    let copy = work.path().join("tidemark");
    fs::copy(&program, &copy).with_context(|| format!("cannot copy {}", program.display()))?;
    let home = work.path().join("home");
    fs::create_dir(&home)?;
    let mut command = Command::new(&copy);
    command
        .arg("demo")
        .env_clear()
        .env("HOME", &home)
        .env("PATH", "/usr/bin:/bin")
        .current_dir("/");
    if nix::unistd::geteuid().is_root() {
        std::os::unix::fs::chown(&home, Some(NOBODY), Some(NOBODY))?;
        command.uid(NOBODY).gid(NOBODY);
    }
    let start = Instant::now();
    let status = process::watch(&mut command, DEMO_LIMIT, |_| {})?;
    if !status.success() {
        bail!("tidemark demo ended with {status}");
    }
    println!("demo: ended well after {:.1} s", start.elapsed().as_secs_f64());
    Ok(Count::PASSED)
}

pub fn workspace_root() -> Result<PathBuf> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = manifest.ancestors().nth(2).context("xtask is not in tools/xtask of a workspace")?;
    Ok(root.to_owned())
}

/// Where cargo puts what it builds.
pub fn target_directory(root: &Path) -> Result<PathBuf> {
    let metadata = process::capture(
        Command::new("cargo")
            .args(["metadata", "--format-version=1", "--no-deps"])
            .current_dir(root),
    )?;
    let metadata: serde_json::Value = serde_json::from_str(&metadata)?;
    let directory = metadata["target_directory"]
        .as_str()
        .context("cargo metadata names no target directory")?;
    Ok(PathBuf::from(directory))
}
