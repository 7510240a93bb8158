use std::fs;

use clap::Parser;

use super::*;
use crate::cli::{Cli, Command};

/// A configuration, and two images.
fn site() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join(NODE_FILE), "node = \"db1\"\n").unwrap();
    for name in ["a.img", "b.img"] {
        fs::write(directory.path().join(name), vec![0; 8192]).unwrap();
    }
    directory
}

fn protect(site: &Path, more: &[&str]) -> Result<ExitCode> {
    let config_dir = site.to_str().unwrap();
    let socket = site.join("none.sock");
    let mut words = vec![
        "tidemark",
        "--config-dir",
        config_dir,
        "--agent-socket",
        socket.to_str().unwrap(),
        "protect",
        "--target",
        "192.0.2.7",
        "--target-name",
        "recovery",
    ];
    words.extend(more);
    let cli = Cli::try_parse_from(words).unwrap();
    let Command::Protect(args) = &cli.command else { unreachable!() };
    run(args, &cli.global, Output::new(true))
}

fn volume(site: &Path, name: &str, image: &str) -> String {
    format!("--volume={name}={}", site.join(image).display())
}

#[test]
fn a_group_is_written_so_that_the_agent_can_read_it() {
    let site = site();
    let (a, b) = (volume(site.path(), "data", "a.img"), volume(site.path(), "log", "b.img"));
    let sizes = ["--ring-bytes=32 MiB", "--rpo-target=1 min"];
    let more = ["shop", &a, &b, "--front=nbd-socket", sizes[0], sizes[1], "--sync"];
    protect(site.path(), &more).unwrap();
    let loaded = AgentConfig::load(site.path()).unwrap();
    assert!(loaded.faults.is_empty(), "{:?}", loaded.faults);
    let group = loaded.config.group("shop").unwrap();
    assert_eq!(group.target.address.to_string(), "192.0.2.7:7410");
    assert_eq!(group.ring_bytes.get(), 32 << 20);
    assert_eq!(group.rpo_target_s.unwrap().0, 60);
    assert!(group.sync_timeout.is_some());
    let volumes: Vec<_> = group.volumes.iter().map(|v| (v.id.0, v.name.as_str())).collect();
    assert_eq!(volumes, [(1, "data"), (2, "log")]);
    assert!(!group.id.is_nil());

    let again = protect(site.path(), &["shop", &a]).unwrap_err().to_string();
    assert!(again.contains("is protected already"), "{again}");
    let other = protect(site.path(), &["other", &a]).unwrap_err();
    assert!(other.is::<Usage>() && other.to_string().contains("by the group 'shop' already"));
    assert!(!site.path().join("agent.d/other.toml").exists());
}

#[test]
fn a_dry_run_writes_nothing() {
    let site = site();
    let a = volume(site.path(), "data", "a.img");
    protect(site.path(), &["shop", &a, "--dry-run"]).unwrap();
    assert!(!site.path().join(GROUP_DIRECTORY).exists());
}

#[test]
fn what_cannot_be_is_refused_before_anything_is_written() {
    let site = site();
    let a = volume(site.path(), "data", "a.img");
    let twice = volume(site.path(), "data", "b.img");
    let name = protect(site.path(), &["shop", &a, &twice]).unwrap_err().to_string();
    assert!(name.contains("another volume of the group has this name"), "{name}");
    let small = protect(site.path(), &["shop", &a, "--ring-bytes=1 MiB"]).unwrap_err().to_string();
    assert!(small.contains("a ring of 1 MiB is not possible"), "{small}");
    fs::write(site.path().join(NODE_FILE), "nod = \"db1\"\n").unwrap();
    let node = protect(site.path(), &["shop", &a]).unwrap_err().to_string();
    assert!(node.contains("unknown key 'nod'; did you mean 'node'?"), "{node}");
    assert!(!site.path().join(GROUP_DIRECTORY).exists());
}
