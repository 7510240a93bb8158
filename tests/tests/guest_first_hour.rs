//! "The first hour" of `docs/operations.md`, command by command out of the document, on two fresh servers.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tidemark_tests::pair::package;
use tidemark_tests::vm::{Disk, Guest, Lab, boot_both};

const MIB: u64 = 1 << 20;
/// The longest block waits for a first sync and a restart of a service.
const BLOCK_LIMIT: Duration = Duration::from_secs(300);
/// The places a block can name, as the document's head tells.
const PLACES: [&str; 5] = ["build", "packages", "copy", "target", "source"];

/// Commands that are to be run together at one place.
struct Block {
    place: String,
    line: usize,
    commands: String,
}

#[test]
fn the_commands_of_the_first_hour_do_what_they_say() -> Result<()> {
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/operations.md");
    let text = fs::read_to_string(&document)?;
    let blocks = blocks(&text)?;
    for place in PLACES {
        ensure!(blocks.iter().any(|block| block.place == place), "no block for {place}");
    }
    Lab::run("first-hour", 2, |lab| {
        let [source_end, target_end] = lab.network()?.ends();
        let programs = ["tidemark", "tidemark-agent", "tidemark-target"];
        let archives = [archive(lab, "source", &programs)?, archive(lab, "target", &programs)?];
        let data = lab.disk_file("data.img", 96 * MIB)?;
        let source = lab
            .guest("source")
            .debian()
            .network(&source_end)
            .disk(Disk::file(&data, "data"))
            .disk(Disk::file(&archives[0].0, "archive"));
        let target = lab
            .guest("target")
            .debian()
            .network(&target_end)
            .disk(Disk::file(&archives[1].0, "archive"));
        let (source, target) = boot_both(source, target)?;
        for (guest, (_, bytes)) in [(&source, &archives[0]), (&target, &archives[1])] {
            guest.sh(&format!(
                "head -c {bytes} /dev/disk/by-id/virtio-archive >/root/tidemark.tar.gz && \
                 echo '{} db1\n{} recovery' >>/etc/hosts",
                source_end.address(),
                target_end.address()
            ))?;
        }
        for block in &blocks {
            run(block, &source, &target).with_context(|| {
                let name = document.file_name().unwrap_or_default().display();
                format!("{name}, line {}, at {}:\n{}", block.line, block.place, block.commands)
            })?;
        }
        let status = source.sh("tidemark status")?;
        ensure!(!status.contains("shop"), "still protected: {status}");
        Ok(())
    })
}

/// The blocks with a place, in order.
fn blocks(text: &str) -> Result<Vec<Block>> {
    let mut blocks = Vec::new();
    let mut open: Option<Block> = None;
    for (index, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            if let Some(block) = open.take() {
                blocks.push(block);
            } else {
                let words: Vec<&str> =
                    line.trim_start().trim_start_matches('`').split(' ').collect();
                let place = words.get(1).copied().unwrap_or_default();
                ensure!(
                    place.is_empty() || PLACES.contains(&place),
                    "line {}: where is {place}?",
                    index + 1
                );
                open = Some(Block {
                    place: place.to_owned(),
                    line: index + 1,
                    commands: String::new(),
                });
            }
        } else if let Some(block) = &mut open {
            block.commands += line;
            block.commands.push('\n');
        }
    }
    ensure!(open.is_none(), "the last block does not end");
    blocks.retain(|block| !block.place.is_empty());
    Ok(blocks)
}

fn run(block: &Block, source: &Guest, target: &Guest) -> Result<()> {
    let guest = match block.place.as_str() {
        // The archive of the programs that were built with this test.
        "build" => return Ok(()),
        "packages" => {
            for guest in [source, target] {
                installed(guest, &block.commands)?;
            }
            return Ok(());
        }
        "copy" => {
            return block.commands.lines().try_for_each(|line| copy(line, source, target));
        }
        "source" => source,
        _ => target,
    };
    let output = guest.spawn_for(&format!("set -e\n{}", block.commands), BLOCK_LIMIT)?.wait()?;
    ensure!(output.success(), "{}{}", output.text(), output.error_text());
    Ok(())
}

/// The guests have what the document has its reader install, and no way to fetch it.
fn installed(guest: &Guest, commands: &str) -> Result<()> {
    let install = "apt-get install -y ";
    let packages = commands.lines().find_map(|line| line.strip_prefix(install));
    let packages = packages.context("nothing is installed")?;
    guest.sh(&format!("dpkg --status {packages} >/dev/null"))?;
    Ok(())
}

/// `scp -p root@HOST:PATH root@HOST:PATH`
fn copy(line: &str, source: &Guest, target: &Guest) -> Result<()> {
    let words: Vec<&str> = line.split(' ').collect();
    let ["scp", "-p", from, to] = words[..] else { bail!("cannot carry out {line:?}") };
    let place = |text: &str| -> Result<(String, bool)> {
        let (host, path) = text.split_once(':').with_context(|| format!("no host: {text}"))?;
        match host {
            "root@db1" => Ok((path.to_owned(), true)),
            "root@recovery" => Ok((path.to_owned(), false)),
            _ => bail!("an unknown host: {host}"),
        }
    };
    let ((from, from_source), (to, to_source)) = (place(from)?, place(to)?);
    let guest = |is_source| if is_source { source } else { target };
    let mode = guest(from_source).sh(&format!("stat -c %a {from}"))?;
    let mode = u32::from_str_radix(mode.trim(), 8)?;
    guest(to_source).write(&to, mode, &guest(from_source).read(&from)?)
}

/// A disk of this machine with what the document's `build` leaves, and how long that is in bytes.
fn archive(lab: &Lab, name: &str, programs: &[&str]) -> Result<(PathBuf, u64)> {
    let tar = package(lab, name, programs)?;
    let done = Command::new("gzip").arg("--fast").arg(&tar).status()?;
    ensure!(done.success(), "gzip failed");
    let path = tar.with_extension("tar.gz");
    let bytes = fs::metadata(&path)?.len();
    fs::File::options().write(true).open(&path)?.set_len(bytes.next_multiple_of(MIB))?;
    Ok((path, bytes))
}
