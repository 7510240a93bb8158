//! A process under valgrind's callgrind, and what callgrind writes.

use std::{
    collections::{BTreeMap, HashMap},
    fmt, fs,
    os::unix::fs::PermissionsExt,
    process::Command,
};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

/// What valgrind needs to run a program that waits for an io_uring.
const WAIT: &str = include_str!("wait.c");

/// The side that is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profiled {
    /// The source's.
    Agent,
    /// The other.
    Target,
}

impl fmt::Display for Profiled {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Profiled::Agent => "agent",
            Profiled::Target => "target",
        })
    }
}

/// Starts a program under callgrind, and has it count.
pub struct Profiler {
    dir: TempDir,
    program: String,
}

impl Profiler {
    /// For this program. Nothing is counted yet.
    ///
    /// # Errors
    /// The script that starts it cannot be made.
    pub fn new(program: &str) -> Result<Profiler> {
        let dir = tempfile::Builder::new().prefix("tidemark-callgrind-").tempdir()?;
        let script = dir.path().join("node");
        let (source, library) = (dir.path().join("wait.c"), dir.path().join("wait.so"));
        fs::write(&source, WAIT)?;
        let mut compile = Command::new("gcc");
        compile.args(["-O2", "-Wall", "-shared", "-fPIC", "-o"]).arg(&library).arg(&source);
        let status = compile.status().context("cannot start gcc")?;
        ensure!(status.success(), "gcc failed: {status}");
        let text = format!(
            "#!/bin/sh\nLD_PRELOAD='{}' exec valgrind --quiet --tool=callgrind --instr-atstart=no \
             --callgrind-out-file='{}/out' '{program}' \"$@\"\n",
            library.display(),
            dir.path().display()
        );
        fs::write(&script, text)?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o700))?;
        let program = script.to_str().context("a path that is no text")?.to_owned();
        Ok(Profiler { dir, program })
    }

    /// What is to be started in the program's place.
    pub fn program(&self) -> &str {
        &self.program
    }

    /// Counts from now on.
    ///
    /// # Errors
    /// It cannot be told so.
    pub fn begin(&self, process: u32) -> Result<()> {
        control(&["-i", "on"], process)?;
        control(&["-z"], process)
    }

    /// The instructions of each function since then.
    ///
    /// # Errors
    /// It does not say.
    pub fn end(&self, process: u32) -> Result<BTreeMap<String, u64>> {
        control(&["-d"], process)?;
        control(&["-i", "off"], process)?;
        let mut dumps = Vec::new();
        for entry in fs::read_dir(self.dir.path())? {
            let path = entry?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("out.")) {
                dumps.push(path);
            }
        }
        ensure!(dumps.len() == 1, "callgrind wrote {} dumps instead of one", dumps.len());
        let text = fs::read(&dumps[0])?;
        fs::remove_file(&dumps[0])?;
        by_function(&String::from_utf8_lossy(&text))
    }
}

fn control(arguments: &[&str], process: u32) -> Result<()> {
    let mut command = Command::new("callgrind_control");
    let output = command.args(arguments).arg(process.to_string()).output();
    let output = output.context("cannot start callgrind_control: is valgrind installed?")?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success() && text.contains("OK"), "{command:?} failed: {text}");
    Ok(())
}

/// Instructions by function out of a file as "Callgrind Format Specification" has it, of one kind of event: those of the
/// function itself, without what it calls.
fn by_function(text: &str) -> Result<BTreeMap<String, u64>> {
    let mut names: HashMap<&str, &str> = HashMap::new();
    let mut all: BTreeMap<String, u64> = BTreeMap::new();
    let (mut function, mut called) = ("", false);
    for line in text.lines() {
        // A name is told once, with a number, and then called by it: `fn=(7) main`, `fn=(7)`.
        let this = line.strip_prefix("fn=");
        if let Some(name) = this.or_else(|| line.strip_prefix("cfn=")) {
            let (number, told) = name.split_once(' ').unwrap_or((name, ""));
            if !told.is_empty() {
                names.insert(number, told);
            }
            if this.is_some() {
                function = names.get(number).copied().unwrap_or(number);
            }
        } else if line.starts_with("calls=") {
            called = true;
        } else if line.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '+' | '-' | '*')) {
            // The line after a call has what the callee took.
            if !std::mem::take(&mut called) {
                let cost = line.split(' ').nth(1).context("a line of callgrind without a cost")?;
                *all.entry(function.to_owned()).or_default() += cost.parse::<u64>()?;
            }
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_callee_takes_is_its_own() {
        let text = "events: Ir\nsummary: 30\n\nob=(1) /bin/x\nfl=(1) a.c\nfn=(1) main\n16 4\n\
                    cfn=(2) work\ncalls=2 50\n+1 21\n* 3\n\nfn=(2)\n50 20\nfi=(2) b.h\n7 1\n\
                    fn=(1)\n-2 2\ntotals: 30\n";
        let all = by_function(text).expect("as it is specified");
        assert_eq!(all.into_iter().collect::<Vec<_>>(), [("main".into(), 9), ("work".into(), 21)]);
    }
}
