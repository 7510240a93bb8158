//! What capture alone costs: the link is held, and the ring takes everything; frames are built and checksummed.

use anyhow::Result;
use tidemark_tests::pair::Plan;

use super::{
    devices::{
        Devices,
        Thing::{Bare, Plain, Protected, Rublk},
    },
    load::{self, Load, Spell},
};
use crate::figures::Comparison;

/// To rublk's loop there is a bar; the others are printed beside it.
const WRITES: &[(super::devices::Thing, Option<f64>)] =
    &[(Protected, None), (Rublk, Some(0.85)), (Plain, None), (Bare, None)];
const READS: &[(super::devices::Thing, Option<f64>)] =
    &[(Protected, None), (Rublk, Some(0.95)), (Plain, None), (Bare, None)];

/// All of the disk has four times as many regions as may be active; of the hot part, all are.
const LOADS: [Load; 6] = [
    Load {
        what: "capture alone: 4k random writes, depth 16, all regions",
        options: "--rw=randwrite --bs=4k --iodepth=16",
        things: WRITES,
    },
    Load {
        what: "capture alone: 4k random writes, depth 16, hot regions",
        options: "--rw=randwrite --bs=4k --iodepth=16 --size=256m",
        things: WRITES,
    },
    Load {
        what: "capture alone: 4k random writes, depth 1, all regions",
        options: "--rw=randwrite --bs=4k --iodepth=1",
        things: WRITES,
    },
    Load {
        what: "capture alone: 4k random writes, depth 1, hot regions",
        options: "--rw=randwrite --bs=4k --iodepth=1 --size=256m",
        things: WRITES,
    },
    Load {
        what: "4k random reads, depth 16",
        options: "--rw=randread --bs=4k --iodepth=16",
        things: READS,
    },
    Load {
        what: "1M sequential reads, depth 4",
        options: "--rw=read --bs=1M --iodepth=4",
        things: READS,
    },
];

/// Requests per second of each load.
///
/// # Errors
/// There is no rublk; a guest that fails.
pub fn measure(rounds: usize, short: bool) -> Result<Vec<Comparison>> {
    let mut comparisons = Vec::new();
    let room = |plan: &mut Plan| {
        plan.ring = "1 GiB";
        plan.memory_mib = 2560;
    };
    super::run("bench-capture", room, |pair| {
        let devices = Devices::start(pair, false)?;
        let hold = |hold: bool| -> Result<()> {
            let signal = if hold { "STOP" } else { "CONT" };
            pair.target.sh(&format!("systemctl kill --signal={signal} tidemark-target"))?;
            Ok(())
        };
        let spell = Spell { warm_up_s: 1, run_s: if short { 1 } else { 4 } };
        for load in &LOADS {
            comparisons.push(load::measure(pair, &devices, load, spell, rounds, Some(&hold))?);
        }
        Ok(())
    })?;
    Ok(comparisons)
}
