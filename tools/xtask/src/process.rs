//! Running other programs: to the end, with their output shown, captured or both, and within a time limit.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use std::{io, thread};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// Runs a program with its output shown; an error if it cannot start or fails.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("cannot start {}", name(command)))?;
    if !status.success() {
        bail!("{} ended with {status}", name(command));
    }
    Ok(())
}

/// Runs a program and gives its standard output; an error, with what it said, if it fails.
pub fn capture(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {}", name(command)))?;
    if !output.status.success() {
        bail!(
            "{} ended with {}: {}",
            name(command),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    String::from_utf8(output.stdout)
        .with_context(|| format!("{} printed no valid UTF-8", name(command)))
}

/// Runs a program with its output shown line by line and each line also given to `each`. After `limit` the
/// program is killed with all it started, and that is an error.
pub fn watch(
    command: &mut Command,
    limit: Duration,
    each: impl Fn(&str) + Sync,
) -> Result<ExitStatus> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot start {}", name(command)))?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let status = thread::scope(|scope| {
        if let Some(out) = out {
            scope.spawn(|| copy_lines(out, io::stdout(), &each));
        }
        if let Some(err) = err {
            scope.spawn(|| copy_lines(err, io::stderr(), &each));
        }
        wait(&mut child, limit)
    })?;
    status.with_context(|| {
        format!("{} had not ended after {} s and was killed", name(command), limit.as_secs())
    })
}

/// Waits for the child's end; at the limit kills its process group and gives `None`.
fn wait(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if start.elapsed() > limit {
            // The group, so that nothing keeps the pipes open; ESRCH only means that it is gone already.
            let _ = killpg(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL);
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(20));
    }
}

fn copy_lines(from: impl Read, mut to: impl Write, each: &impl Fn(&str)) {
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    while matches!(from.read_until(b'\n', &mut line), Ok(count) if count > 0) {
        each(String::from_utf8_lossy(&line).trim_end());
        // Nobody reads us any more: keep draining, so that the program can end.
        let _ = to.write_all(&line).and_then(|()| to.flush());
        line.clear();
    }
}

fn name(command: &Command) -> String {
    let words = [command.get_program()].into_iter().chain(command.get_args().take(3));
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    format!("`{}`", words.join(" "))
}
