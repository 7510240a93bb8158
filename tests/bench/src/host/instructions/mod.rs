//! Instructions per replicated write of 4 KiB, by component, of the agent and of the target: a figure that a busy machine
//! does not change, where no counters of the processor can be had.
//!
//! One side after the other runs under valgrind's callgrind, the other one plainly. Two things follow from that. The
//! processor that valgrind plays has AVX2 and no AVX-512, so checksums and ciphers cost more than they do natively. And all
//! threads of the side share one processor and are far slower than natively, so frames and batches have other sizes.
//! An instruction counts for the function into which it was compiled: what was inlined counts for its caller, and what
//! is generic, of the standard library or of tokio, for where it was written.
//!
//! Valgrind does not know that a thread waits for an io_uring, which `wait.c` puts right.

mod callgrind;

use std::{cmp::Reverse, collections::BTreeMap, path::PathBuf, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use tidemark_tests::site::{Plan, Site};

use self::callgrind::{Profiled, Profiler};
use super::{
    load::{self, Area, Load},
    node, wait_in_sync,
};
use crate::figures::Comparison;

/// Counts hardly differ from round to round.
const ROUNDS_MAX: usize = 3;
const DEPTH: usize = 16;
const SIZE_BYTES: u64 = 64 << 20;
/// After the last answer, for what is still on its way: who asks for the status all the time is counted too.
const REST: Duration = Duration::from_secs(2);

/// Components, and what the names of their functions begin with. The first that fits counts.
const COMPONENTS: [(&str, &[&str]); 20] = [
    ("ring", &["tidemark_agent::capture::ring"]),
    ("capture and dirty map", &["tidemark_agent::capture", "tidemark_agent::dirty"]),
    ("engine", &["tidemark_agent::engine"]),
    ("kernel interfaces", &["tidemark_agent::kernel", "io_uring", "nix", "rustix"]),
    ("state", &["tidemark_agent::state", "tidemark_agent::progress", "tidemark_agent::lease"]),
    ("checksums", &["crc_fast", "tidemark_journal::checksum"]),
    ("encoder and frames", &["tidemark_agent::encoder", "tidemark_journal"]),
    ("zstd", &["zstd", "ZSTD_", "HUF_", "FSE_", "HIST_", "_HUF"]),
    ("outbox and spool", &["tidemark_agent::outbox", "tidemark_agent::spool"]),
    ("link", &["tidemark_link", "tidemark_agent::link", "tidemark_target::receiver"]),
    ("TLS", &["rustls", "aws_lc", "aes", "_aes", "gcm_", "tokio_rustls"]),
    // BLAKE3's assembler has names that valgrind does not take for such.
    ("hashes, and what has no name", &["blake3", "_blake3", "0x"]),
    ("catalogue", &["redb"]),
    ("index", &["tidemark_target::store::index"]),
    ("log and history", &["tidemark_target"]),
    ("NBD", &["tidemark_nbd", "tidemark_agent::front"]),
    ("tokio", &["tokio", "mio", "parking_lot"]),
    ("copies", &["__mem", "mem"]),
    (
        "allocator",
        &["malloc", "free", "calloc", "realloc", "_int_", "aligned_alloc", "posix_memalign"],
    ),
    ("standard library", &["core", "alloc", "std", "hashbrown", "bytes", "__rust", "_RNv"]),
];
/// What fits none of them.
const OTHERS: &str = "others, and the C library";
/// How many functions among those are named.
const OTHERS_SAID: usize = 8;

/// Of each side a table.
///
/// # Errors
/// There is no valgrind; a side that does not run under it.
pub fn measure(rounds: usize, short: bool) -> Result<Vec<Comparison>> {
    [Profiled::Agent, Profiled::Target]
        .into_iter()
        .map(|side| of(side, rounds.min(ROUNDS_MAX), if short { 1000 } else { 20_000 }))
        .collect()
}

fn of(side: Profiled, rounds: usize, blocks: u64) -> Result<Comparison> {
    let mut plan = Plan::new(&[SIZE_BYTES]);
    plan.through_network = false;
    let mut site = Site::new(plan)?;
    let area = Area::whole(SIZE_BYTES);
    area.fill(&site.image(0))?;
    let plain = node()?;
    let profiler = Profiler::new(&plain)?;
    let program = |of: Profiled| if of == side { profiler.program() } else { plain.as_str() };
    site.spawn_target(program(Profiled::Target))?;
    site.spawn_agent(program(Profiled::Agent))?;
    wait_in_sync(&site)?;
    let process = match (side, site.process_ids()) {
        (Profiled::Agent, (agent, _)) => agent,
        (Profiled::Target, (_, target)) => target,
    };
    let process = process.context("the side runs in no process of its own")?;

    let to = [(site.front(0), area)];
    let mut counted = Vec::new();
    for round in 0..rounds as u64 {
        // Once unseen, so that what is done once only is not counted.
        write(&site, &to, blocks / 10, 2 * round)?;
        profiler.begin(process)?;
        write(&site, &to, blocks, 2 * round + 1)?;
        let by_function = profiler.end(process)?;
        say_others(&by_function, blocks);
        counted.push(by_component(&by_function, blocks));
        eprintln!("{side}, round {} of {rounds}", round + 1);
    }
    ensure!(site.stop_agent()?, "the agent did not end cleanly");
    site.stop_target()?;

    let mut names: Vec<&str> = COMPONENTS.iter().map(|(name, _)| *name).collect();
    names.push(OTHERS);
    let figure =
        |round: &BTreeMap<&str, f64>, name: &str| round.get(name).copied().unwrap_or_default();
    // What this side has nothing of is no line.
    names.retain(|name| counted.iter().any(|round| figure(round, name) > 0.0));
    let rounds = counted.iter().map(|round| {
        let parts = names.iter().map(|name| figure(round, name));
        parts.chain([round.values().sum()]).collect()
    });
    Ok(Comparison {
        what: format!("the {side}'s instructions per replicated write of 4 KiB"),
        unit: "instructions",
        rounds: rounds.collect(),
        names: names.iter().copied().chain(["in all"]).map(str::to_owned).collect(),
        bars: Vec::new(),
    })
}

/// Writes so many blocks, until the target has them.
fn write(site: &Site, to: &[(PathBuf, Area)], blocks: u64, seed: u64) -> Result<()> {
    load::write(site.runtime(), to, Load::blocks(blocks, DEPTH), seed)?;
    thread::sleep(REST);
    wait_in_sync(site)
}

/// Names the functions that take most of what is no component's.
fn say_others(by_function: &BTreeMap<String, u64>, blocks: u64) {
    let mut others: Vec<(&String, &u64)> =
        by_function.iter().filter(|(function, _)| component(function) == OTHERS).collect();
    others.sort_by_key(|(_, instructions)| Reverse(**instructions));
    for (function, instructions) in others.into_iter().take(OTHERS_SAID) {
        eprintln!("  others: {:>8} {function}", instructions / blocks);
    }
}

fn by_component(by_function: &BTreeMap<String, u64>, blocks: u64) -> BTreeMap<&'static str, f64> {
    let mut all = BTreeMap::new();
    for (function, instructions) in by_function {
        *all.entry(component(function)).or_default() += *instructions as f64 / blocks as f64;
    }
    all
}

/// The component of a function: by the type that a method is of, or that is dropped.
fn component(function: &str) -> &'static str {
    let mut name = function.trim_start_matches("core::ptr::drop_in_place");
    name = name.trim_start_matches(['<', '&', '*', '[', '(']);
    name = name.trim_start_matches("mut ").trim_start_matches("dyn ");
    let fits =
        |(_, prefixes): &&(&str, &[&str])| prefixes.iter().any(|prefix| name.starts_with(prefix));
    COMPONENTS.iter().find(fits).map_or(OTHERS, |(component, _)| component)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_belongs_to_what_it_was_written_for() {
        for (function, expected) in [
            ("tidemark_agent::capture::ring::RingWriter::reserve", "ring"),
            (
                "<tidemark_agent::capture::core::Core as core::fmt::Debug>::fmt",
                "capture and dirty map",
            ),
            ("core::ptr::drop_in_place<tidemark_nbd::Buffer>", "NBD"),
            ("core::slice::sort::unstable", "standard library"),
            ("ZSTD_compressBlock_fast", "zstd"),
            ("_aesni_ctr32_ghash_6x", "TLS"),
            ("__memcpy_avx_unaligned_erms", "copies"),
            ("tidemark_target::store::log::Owner::work", "log and history"),
            ("epoll_wait", OTHERS),
        ] {
            assert_eq!(component(function), expected, "{function}");
        }
    }
}
