//! What every subcommand promises: help, exit codes, JSON, sentences, and no panic whatever becomes
//! of its output.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use tidemark_journal::{
    Compression, FrameBuilder, FrameMeta, GroupId, Kind, Position, Record, Sector, Seq, TermId,
    VolumeId,
};

/// A machine with an agent's configuration, an image, a file of frames, and no daemon.
struct Machine {
    directory: tempfile::TempDir,
}

/// A subcommand, something to ask of it here, and the exit code of that.
struct Case {
    command: &'static [&'static str],
    arguments: &'static [&'static str],
    code: i32,
    /// Part of what is said about it, if it fails.
    sentence: &'static str,
}

const fn case(
    command: &'static [&'static str],
    arguments: &'static [&'static str],
    code: i32,
    sentence: &'static str,
) -> Case {
    Case { command, arguments, code, sentence }
}

/// `@/` stands for the machine's directory.
const CASES: &[Case] = &[
    case(&["init"], &["--dir=@/pki", "--node=db1", "--node=recovery"], 0, ""),
    case(
        &["protect"],
        &["shop", "--volume=data=@/disk.img", "--target=192.0.2.7", "--target-name=recovery"],
        0,
        "",
    ),
    case(&["unprotect"], &["none"], 1, "no group 'none' is protected"),
    case(&["accept-disk"], &["none"], 1, "no group 'none' is protected"),
    case(&["status"], &[], 1, "the agent is not running"),
    case(&["check"], &[], 2, "the agent is not running"),
    case(&["points"], &["shop"], 1, "the target is not running"),
    case(&["mark"], &["shop", "before"], 1, "the agent is not running"),
    case(&["branch", "create"], &["test", "shop@latest"], 1, "the target is not running"),
    case(&["branch", "list"], &[], 1, "the target is not running"),
    case(&["branch", "drop"], &["test"], 1, "the target is not running"),
    case(&["forget"], &["shop", "--yes"], 1, "the target is not running"),
    case(&["attach"], &["shop@latest"], 1, "the target is not running"),
    case(&["detach"], &["no-such-group"], 1, "nothing called 'no-such-group' is attached"),
    case(&["scrub"], &["shop"], 1, "the target is not running"),
    case(&["verify"], &["shop"], 1, "the agent is not running"),
    case(&["journal", "dump"], &["@/frames"], 0, ""),
    case(&["config", "check"], &[], 1, "'tidemark init' makes certificates"),
    case(&["agent", "run"], &[], 1, "tidemark init"),
    case(&["target", "run"], &[], 1, "target.toml"),
    case(&["demo"], &["--disk=@/none.img"], 1, "none.img"),
    case(&["completions"], &["bash"], 0, ""),
    case(&["man"], &["@/man"], 0, ""),
];

impl Machine {
    fn new() -> Machine {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::write(
            at("agent.toml"),
            format!(
                "node = \"db1\"\nstate_dir = \"{0}/state\"\n\
                 [tls]\nca = \"{0}/no-ca\"\ncertificate = \"{0}/no-pem\"\nkey = \"{0}/no-key\"\n",
                directory.path().display()
            ),
        )
        .unwrap();
        fs::write(at("disk.img"), vec![0; 1 << 20]).unwrap();
        fs::write(at("frames"), frames()).unwrap();
        Machine { directory }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn command(&self, words: &[&str]) -> Command {
        let directory = self.path().to_str().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_tidemark"));
        command
            .args(words.iter().map(|word| word.replace("@/", &format!("{directory}/"))))
            .args(["--config-dir", directory])
            .args(["--agent-socket", &format!("{directory}/agent.sock")])
            .args(["--target-socket", &format!("{directory}/target.sock")])
            .stdin(Stdio::null());
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }
}

/// One frame with a write.
fn frames() -> Vec<u8> {
    let record = Record {
        kind: Kind::Write,
        flags: 0,
        volume: VolumeId(1),
        seq: Seq(1),
        time_ns: 1_000,
        start: Sector(64),
        sectors: 8,
    };
    let mut builder = FrameBuilder::new(Compression::Zstd(1));
    builder.push(&record, [&[7; 4096][..]]);
    let meta = FrameMeta {
        group: GroupId([1; 16]),
        term: TermId([2; 16]),
        before: Position::default(),
        wall_ns: 1_795_427_970_000_000_000,
    };
    builder.finish(&meta).to_vec()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

fn no_panic(case: &Case, output: &Output) {
    let said = text(&output.stderr);
    assert!(!said.contains("panicked"), "{:?}: {said}", case.command);
    assert!(output.status.code().is_some_and(|code| code <= 3), "{:?}: {output:?}", case.command);
}

/// The names below `Commands:` in a help text.
fn listed(help: &str) -> BTreeSet<String> {
    let lines = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    lines
        .take_while(|line| line.starts_with("  "))
        .filter(|line| !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_subcommand_is_under_contract() {
    let machine = Machine::new();
    let below = |words: &[&str]| listed(text(&machine.run(&[words, &["--help"]].concat()).stdout));
    let mut all = BTreeSet::new();
    for name in below(&[]) {
        let inner = below(&[&name]);
        if inner.is_empty() {
            all.insert(name.clone());
        }
        all.extend(inner.iter().map(|inner| format!("{name} {inner}")));
    }
    let tested: BTreeSet<String> = CASES.iter().map(|case| case.command.join(" ")).collect();
    assert_eq!(all, tested);
}

#[test]
fn help_works_everywhere() {
    let machine = Machine::new();
    for case in CASES {
        let output = machine.run(&[case.command, &["--help"]].concat());
        assert_eq!(output.status.code(), Some(0), "{:?}", case.command);
        assert!(text(&output.stdout).contains("Usage: tidemark"), "{:?}", case.command);
    }
    assert!(text(&machine.run(&["--version"]).stdout).starts_with("tidemark "));
}

#[test]
fn what_makes_no_sense_is_a_usage_error() {
    let machine = Machine::new();
    for case in CASES {
        let output = machine.run(&[case.command, &["--no-such-flag"]].concat());
        // To a monitoring system 2 would mean that the replication is broken.
        let expected = if case.command == ["check"] { 3 } else { 2 };
        assert_eq!(output.status.code(), Some(expected), "{:?}", case.command);
        assert!(text(&output.stderr).contains("--no-such-flag"), "{:?}", case.command);
    }
    for words in [
        &["init", "--dir=@/pki", "--node=recovery=not an address"][..],
        &["branch", "create", "x", "shop"],
        &["forget", "shop"],
        &["attach", "shop"],
        &["attach", "shop@yesterday"],
        &["attach", "shop@latest", "--target=192.0.2.7", "--target-name=r"],
        &["protect", "Shop", "--volume=a=/x", "--target=r", "--target-name=r"],
        &["protect", "shop", "--volume=a", "--target=r", "--target-name=r"],
        &["journal", "dump", "@/agent.toml"],
        &["no-such-command"],
    ] {
        let output = machine.run(words);
        assert_eq!(output.status.code(), Some(2), "{words:?}: {output:?}");
    }
}

#[test]
fn a_monitoring_system_that_asks_wrongly_gets_one_line_and_no_alarm() {
    let machine = Machine::new();
    for words in [
        &["check", "--no-such-flag"][..],
        &["--config-dir", "@/", "check", "-w", "soon"],
        &["check", "-w", "10", "-c", "5"],
        &["check", "--group", "No Name"],
    ] {
        let output = machine.run(words);
        assert_eq!(output.status.code(), Some(3), "{words:?}: {output:?}");
        let said = text(&output.stdout);
        assert!(said.starts_with("TIDEMARK UNKNOWN - ") && said.lines().count() == 1, "{said}");
        let output = machine.run(&[words, &["--json"]].concat());
        assert_eq!(output.status.code(), Some(3), "{words:?}: {output:?}");
        let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&answer["schema"], &answer["level"]), (&1.into(), &"UNKNOWN".into()));
    }
    // What only holds the word is something else.
    assert_eq!(machine.run(&["config", "check", "--no-such-flag"]).status.code(), Some(2));
}

#[test]
fn words_and_exit_codes_are_as_promised() {
    for case in CASES {
        let machine = Machine::new();
        let output = machine.run(&[case.command, case.arguments].concat());
        let said = format!("{}{}", text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(case.code), "{:?}: {said}", case.command);
        assert!(said.contains(case.sentence), "{:?}: {said}", case.command);
        assert!(!said.is_empty(), "{:?}", case.command);
    }
}

#[test]
fn json_has_the_schema_on_every_line() {
    for case in CASES {
        let machine = Machine::new();
        let output = machine.run(&[case.command, case.arguments, &["--json"]].concat());
        assert_eq!(output.status.code(), Some(case.code), "{:?}", case.command);
        let lines: Vec<_> = text(&output.stdout).lines().collect();
        assert!(!lines.is_empty(), "{:?}", case.command);
        for line in lines {
            let value: serde_json::Value = serde_json::from_str(line)
                .unwrap_or_else(|error| panic!("{:?}: {error}: {line}", case.command));
            assert_eq!(value["schema"], 1, "{:?}", case.command);
        }
    }
}

#[test]
fn nobody_listening_is_no_reason_to_panic() {
    for case in CASES {
        for more in [&[][..], &["--json"]] {
            let machine = Machine::new();
            let (reader, writer) = std::io::pipe().unwrap();
            drop(reader);
            let words = [case.command, case.arguments, more].concat();
            let child = machine.command(&words).stdout(writer).stderr(Stdio::piped()).spawn();
            let output = child.unwrap().wait_with_output().unwrap();
            no_panic(case, &output);
            let closed = OwnedFd::from(File::open("/dev/null").unwrap());
            let child = machine.command(&words).stdout(closed).stderr(Stdio::piped()).spawn();
            no_panic(case, &child.unwrap().wait_with_output().unwrap());
        }
    }
}

#[test]
fn a_full_disk_is_a_failure() {
    for case in CASES.iter().filter(|case| case.code == 0) {
        let machine = Machine::new();
        let full = File::options().write(true).open("/dev/full").unwrap();
        let words = [case.command, case.arguments].concat();
        let child = machine.command(&words).stdout(full).stderr(Stdio::piped()).spawn();
        let output = child.unwrap().wait_with_output().unwrap();
        no_panic(case, &output);
        assert_eq!(output.status.code(), Some(1), "{:?}", case.command);
        assert!(text(&output.stderr).contains("No space left"), "{:?}", case.command);
    }
}

/// What `config check` says is wrong once `change` was made to a machine that is in order.
fn found(change: impl Fn(&Machine)) -> (Option<i32>, String) {
    let machine = Machine::new();
    assert!(machine.run(&["init", "--dir=@/pki", "--node=db1", "--node=other"]).status.success());
    let at = machine.path().display();
    let pki = format!(
        "ca = \"{at}/pki/nodes/db1/ca.pem\"\ncertificate = \"{at}/pki/nodes/db1/node.pem\"\n\
         key = \"{at}/pki/nodes/db1/node.key\"\n"
    );
    fs::write(machine.path().join("agent.toml"), format!("node = \"db1\"\n[tls]\n{pki}")).unwrap();
    let target = format!(
        "data_dir = \"{at}/data\"\n[link]\nlisten = \"127.0.0.1:7410\"\n{pki}\
         [[group]]\nname = \"shop\"\nnode = \"db1\"\n"
    );
    fs::write(machine.path().join("target.toml"), target).unwrap();
    change(&machine);
    let output = machine.run(&["config", "check"]);
    (output.status.code(), text(&output.stdout).to_owned())
}

#[test]
fn what_would_keep_a_daemon_from_starting_is_found_before() {
    let (code, said) = found(|_| ());
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("warning: no group is configured"), "{said}");
    let (code, said) = found(|machine| {
        let key = |node: &str| machine.path().join(format!("pki/nodes/{node}/node.key"));
        fs::copy(key("other"), key("db1")).unwrap();
    });
    assert_eq!(code, Some(1), "{said}");
    assert_eq!(said.matches("fault: ").count(), 2, "both daemons would fail: {said}");
    assert!(said.contains("node.pem with ") && said.contains("node.key: "), "{said}");
    let (code, said) = found(|machine| {
        let file = machine.path().join("target.toml");
        let socket = "[api]\nsocket = \"/run/tidemark/agent.sock\"\n";
        fs::write(&file, fs::read_to_string(&file).unwrap() + socket).unwrap();
    });
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("fault: agent and target both want to listen on"), "{said}");
}

#[test]
fn an_interrupted_demo_leaves_nothing_behind() {
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let machine = Machine::new();
        let place = machine.path().join("tmp");
        fs::create_dir(&place).unwrap();
        let mut demo = machine.command(&["demo"]);
        let demo = demo.env("TMPDIR", &place).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut demo = demo.spawn().unwrap();
        // The line that is told when both sides run.
        let lines = BufReader::new(demo.stdout.take().unwrap()).lines();
        let mut lines = lines.map(Result::unwrap).skip_while(|line| !line.starts_with("2. "));
        assert!(lines.next().is_some(), "it ended by itself");
        assert_eq!(fs::read_dir(&place).unwrap().count(), 1);
        kill(Pid::from_raw(demo.id().cast_signed()), signal).unwrap();
        lines.for_each(drop);
        let output = demo.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(text(&output.stderr).contains("interrupted"), "{output:?}");
        assert_eq!(fs::read_dir(&place).unwrap().count(), 0, "{signal}");
    }
}

#[test]
fn watching_ends_when_nobody_looks() {
    let machine = Machine::new();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let status = machine.command(&["status", "--watch"]).stdout(writer).status().unwrap();
    assert_eq!(status.code(), Some(0));
}
