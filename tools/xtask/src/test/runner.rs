//! Runs tests: by cargo-nextest where it is installed, else by starting each test program.
//!
//! Which test belongs to which stage follows from its program's name: in the package `tidemark-tests`, those
//! named `conformance*` and `guest*` belong to the stages of those names; all others are host tests.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::Count;
use crate::process::{capture, watch};

/// A set of test programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Selection {
    /// All that the others leave.
    Host,
    /// Real clients.
    Conformance,
    /// Emulated machines.
    Guests,
}

/// No stage takes longer unless it hangs; cargo-nextest ends single tests long before (`.config/nextest.toml`).
const STAGE_LIMIT: Duration = Duration::from_secs(50 * 60);

/// Runs the tests of a selection and counts them; a selection without any test is an error.
pub fn run(root: &Path, selection: Selection) -> Result<Count> {
    let nextest = Command::new("cargo")
        .args(["nextest", "--version"])
        .current_dir(root)
        .stdin(Stdio::null())
        .output()
        .is_ok_and(|output| output.status.success());
    let mut count = if nextest { by_nextest(root, selection)? } else { by_hand(root, selection)? };
    if selection == Selection::Host {
        let documentation = documentation_tests(root)?;
        count.add(documentation);
    }
    if count == Count::default() {
        bail!("the stage has no tests");
    }
    Ok(count)
}

impl Selection {
    /// The selection as a cargo-nextest filter.
    fn filter(self) -> &'static str {
        match self {
            Selection::Host => "not (package(tidemark-tests) and binary(/^(conformance|guest)/))",
            Selection::Conformance => "package(tidemark-tests) and binary(/^conformance/)",
            Selection::Guests => "package(tidemark-tests) and binary(/^guest/)",
        }
    }

    /// The same as [`Selection::filter`], for one test program.
    fn takes(self, package: &str, program: &str) -> bool {
        let of_tests = |prefix| package == "tidemark-tests" && program.starts_with(prefix);
        match self {
            Selection::Host => !of_tests("conformance") && !of_tests("guest"),
            Selection::Conformance => of_tests("conformance"),
            Selection::Guests => of_tests("guest"),
        }
    }
}

fn by_nextest(root: &Path, selection: Selection) -> Result<Count> {
    let mut command = Command::new("cargo");
    command
        .args([
            "nextest",
            "run",
            "--release",
            "--workspace",
            "--no-fail-fast",
            "--no-tests=pass",
            "--color=never",
        ])
        .args(["--status-level=pass", "--final-status-level=fail", "-E", selection.filter()])
        .current_dir(root);
    run_and_count(&mut command, nextest_summary)
}

fn by_hand(root: &Path, selection: Selection) -> Result<Count> {
    let mut total = Count::default();
    for program in test_programs(root)? {
        if selection.takes(&program.package, &program.name) {
            println!("--- {} {}", program.package, program.name);
            let mut command = Command::new(&program.path);
            command.current_dir(&program.directory).env("CARGO_MANIFEST_DIR", &program.directory);
            total.add(run_and_count(&mut command, libtest_summary)?);
        }
    }
    Ok(total)
}

fn documentation_tests(root: &Path) -> Result<Count> {
    let mut command = Command::new("cargo");
    command.args(["test", "--release", "--workspace", "--doc", "--quiet"]).current_dir(root);
    run_and_count(&mut command, libtest_summary)
}

/// Runs a test program and adds up the summaries it prints. A program that fails without naming a failed test
/// counts as one failure.
fn run_and_count(command: &mut Command, summary: fn(&str) -> Option<Count>) -> Result<Count> {
    let count = Mutex::new(Count::default());
    let status = watch(command, STAGE_LIMIT, |line| {
        if let (Some(found), Ok(mut count)) = (summary(line), count.lock()) {
            count.add(found);
        }
    })?;
    let mut count = count.into_inner().unwrap_or_default();
    if !status.success() && count.failed == 0 {
        eprintln!("a test program ended with {status}");
        count.add(Count::FAILED);
    }
    Ok(count)
}

/// Reads `Summary [ 1.2s] 12 tests run: 11 passed (1 slow), 1 failed, 0 skipped`.
fn nextest_summary(line: &str) -> Option<Count> {
    let rest = line.trim_start().strip_prefix("Summary [")?;
    let (_, rest) = rest.split_once(']')?;
    let (run, results) = rest.split_once(" run:")?;
    // "12 tests", or "5/12 tests" when the run was cut short
    let run: usize = run.split_whitespace().next()?.rsplit('/').next()?.parse().ok()?;
    let passed = number_before(results, "passed").unwrap_or(0);
    Some(Count { passed, failed: run.saturating_sub(passed) })
}

/// Reads `test result: FAILED. 3 passed; 1 failed; 0 ignored; ...`.
fn libtest_summary(line: &str) -> Option<Count> {
    let rest = line.strip_prefix("test result: ")?;
    Some(Count {
        passed: number_before(rest, "passed")?,
        // An ignored test is one that nobody runs.
        failed: number_before(rest, "failed")? + number_before(rest, "ignored")?,
    })
}

fn number_before(text: &str, word: &str) -> Option<usize> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let at = words.iter().position(|candidate| candidate.trim_end_matches([',', ';']) == word)?;
    words.get(at.checked_sub(1)?)?.parse().ok()
}

/// A compiled program of tests.
struct TestProgram {
    package: String,
    name: String,
    path: PathBuf,
    directory: PathBuf,
}

fn test_programs(root: &Path) -> Result<Vec<TestProgram>> {
    let messages = capture(
        Command::new("cargo")
            .args([
                "test",
                "--release",
                "--workspace",
                "--all-targets",
                "--no-run",
                "--message-format=json",
            ])
            .current_dir(root),
    )?;
    let mut programs = Vec::new();
    for line in messages.lines() {
        let message: Value =
            serde_json::from_str(line).context("cargo printed a message that is no JSON")?;
        let (Some(path), Some(true)) =
            (message["executable"].as_str(), message["profile"]["test"].as_bool())
        else {
            continue;
        };
        let manifest =
            message["manifest_path"].as_str().context("a cargo message names no manifest")?;
        let directory =
            Path::new(manifest).parent().context("a manifest has no directory")?.to_owned();
        let package = capture(Command::new("cargo").args(["pkgid", "--manifest-path", manifest]))?;
        programs.push(TestProgram {
            package: package_name(&package, &directory),
            name: message["target"]["name"].as_str().unwrap_or_default().to_owned(),
            path: PathBuf::from(path),
            directory,
        });
    }
    Ok(programs)
}

/// The name in a package id: `path+file:///x/tests#tidemark-tests@0.1.0`, or `...#0.1.0` where the directory
/// bears the name.
fn package_name(id: &str, directory: &Path) -> String {
    let fragment = id.trim().rsplit('#').next().unwrap_or_default();
    match fragment.split_once('@') {
        Some((name, _)) => name.to_owned(),
        None => directory
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{Count, Selection, libtest_summary, nextest_summary, package_name};

    #[test]
    fn nextest_summaries_are_read() {
        let count = |line| nextest_summary(line).map(|count| (count.passed, count.failed));
        assert_eq!(count("     Summary [   0.005s] 1 test run: 1 passed, 0 skipped"), Some((1, 0)));
        assert_eq!(
            count(
                "     Summary [  61.2s] 12 tests run: 9 passed (1 slow), 2 failed, 1 timed out, 4 skipped"
            ),
            Some((9, 3))
        );
        assert_eq!(
            count("     Summary [   2.0s] 5/12 tests run: 5 passed, 0 skipped"),
            Some((5, 7))
        );
        assert_eq!(
            count("     Summary [   2.0s] 2 tests run: 0 passed, 2 failed, 0 skipped"),
            Some((0, 2))
        );
        assert_eq!(count("   PASS [ 0.1s] xtask Summary [oddly named"), None);
    }

    #[test]
    fn libtest_summaries_are_read() {
        let line = "test result: FAILED. 3 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.00s";
        assert_eq!(libtest_summary(line), Some(Count { passed: 3, failed: 3 }));
        assert_eq!(libtest_summary("test a::b ... ok"), None);
    }

    #[test]
    fn each_program_belongs_to_one_stage() {
        let stages = [Selection::Host, Selection::Conformance, Selection::Guests];
        for (package, program, stage) in [
            ("tidemark-nbd", "conformance", Selection::Host),
            ("tidemark-tests", "host_exactness", Selection::Host),
            ("tidemark-tests", "conformance_libnbd", Selection::Conformance),
            ("tidemark-tests", "guest_harness", Selection::Guests),
        ] {
            let taking: Vec<_> =
                stages.into_iter().filter(|stage| stage.takes(package, program)).collect();
            assert_eq!(taking, [stage], "{package} {program}");
        }
    }

    #[test]
    fn package_ids_give_names() {
        let directory = Path::new("/tree/xtask");
        assert_eq!(
            package_name("path+file:///tree/tests#tidemark-tests@0.1.0\n", directory),
            "tidemark-tests"
        );
        assert_eq!(package_name("path+file:///tree/xtask#0.1.0", directory), "xtask");
    }
}
