//! `cargo xtask fuzz`: builds the fuzz targets with coverage and the address sanitizer, and runs them.
//!
//! What they find new is kept in `target/fuzz/corpus`, to be gone on with; an input that fails is kept in
//! `target/fuzz/failures`, can be given to its program alone, and is tried first in each later run.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result, bail};

use crate::process;

/// The platform; it is named so that programs which run during the build are built without the sanitizer.
const PLATFORM: &str = "x86_64-unknown-linux-gnu";

/// Coverage as libFuzzer reads it, and the address sanitizer. The stable compiler has all of it, but asks for
/// `RUSTC_BOOTSTRAP=1`.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Zsanitizer=address --cfg fuzzing";

/// Limits of one input: time in seconds, memory in MiB, length in bytes.
const LIMITS: [&str; 3] = ["-timeout=10", "-rss_limit_mb=1024", "-max_len=65536"];

/// Runs these targets (all if none is named) for so many seconds each, as many at a time as there are
/// processors. Gives how many found nothing, and how many failed.
pub fn run(root: &Path, work: &Path, seconds: u64, named: &[String]) -> Result<(usize, usize)> {
    let known = targets(root)?;
    if let Some(unknown) = named.iter().find(|name| !known.contains(name)) {
        bail!("there is no fuzz target {unknown}; there are {}", known.join(", "));
    }
    build(root, work, named)?;
    let chosen = if named.is_empty() { known } else { named.to_vec() };
    let waiting = Mutex::new(VecDeque::from(chosen));
    let results = Mutex::new(Vec::new());
    let workers = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let next = waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                    let Some(name) = next else { return };
                    let result = run_one(root, work, seconds, &name);
                    let mut results = results.lock().unwrap_or_else(PoisonError::into_inner);
                    results.push((name, result));
                }
            });
        }
    });
    let (mut passed, mut failed) = (0, 0);
    for (name, result) in results.into_inner().unwrap_or_else(PoisonError::into_inner) {
        match result {
            Ok(said) => {
                println!("fuzz {name}: nothing found; {said}");
                passed += 1;
            }
            Err(error) => {
                eprintln!("fuzz {name}: {error:#}");
                failed += 1;
            }
        }
    }
    Ok((passed, failed))
}

/// The names of the targets: those of the files in `fuzz/targets`.
fn targets(root: &Path) -> Result<Vec<String>> {
    let directory = root.join("fuzz/targets");
    let mut names = Vec::new();
    for entry in
        fs::read_dir(&directory).with_context(|| format!("cannot read {}", directory.display()))?
    {
        let path = entry?.path();
        if let Some(stem) = path.file_stem().filter(|_| path.extension() == Some("rs".as_ref())) {
            names.push(stem.to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// Builds these targets; if none is named, all, and what writes the seeds.
fn build(root: &Path, work: &Path, named: &[String]) -> Result<()> {
    let mut cargo = Command::new("cargo");
    let which = if named.is_empty() { &["--bins"][..] } else { &[] };
    cargo
        .args(["build", "--release", "--locked", "--target", PLATFORM, "--target-dir"])
        .arg(work)
        .args(which)
        .args(named.iter().flat_map(|name| ["--bin", name]))
        .current_dir(root.join("fuzz"))
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", FLAGS)
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    process::run(&mut cargo)
}

/// Runs one target; what its statistics say, or an error with the end of what it printed.
fn run_one(root: &Path, work: &Path, seconds: u64, name: &str) -> Result<String> {
    let corpus = work.join("corpus").join(name);
    let failures = work.join("failures").join(name);
    for directory in [&corpus, &failures] {
        fs::create_dir_all(directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
    }
    let log: PathBuf = work.join(format!("{name}.log"));
    let output = File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
    let status = Command::new(work.join(PLATFORM).join("release").join(name))
        .args(LIMITS)
        .args([format!("-max_total_time={seconds}"), "-print_final_stats=1".to_owned()])
        .arg(format!("-artifact_prefix={}/", failures.display()))
        .arg(&corpus)
        .arg(root.join("fuzz/corpus").join(name))
        .arg(&failures)
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .status()
        .with_context(|| format!("cannot start the fuzz target {name}"))?;
    let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    if !status.success() {
        let lines: Vec<&str> = text.lines().collect();
        let end = lines[lines.len().saturating_sub(40)..].join("\n");
        bail!("{status}; the input is in {}\n{end}", failures.display());
    }
    let runs = text.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
    let runs = runs.context("it printed no statistics")?.trim();
    let coverage = text.lines().rev().find_map(|line| line.split_once(" cov: "));
    let coverage = coverage.and_then(|(_, rest)| rest.split(' ').next()).unwrap_or("?");
    Ok(format!("{runs} inputs in {seconds} s, {coverage} places of the code reached"))
}
