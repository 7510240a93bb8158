//! A protected ublk device with live replication to a second guest, against `rublk`'s plain loop, and against DRBD
//! between the same two guests.

use anyhow::Result;
use tidemark_tests::pair::Plan;

use super::{
    SIZE_BYTES,
    devices::{
        Devices, Thing,
        Thing::{Bare, Drbd, Plain, Protected, Rublk},
    },
    load::{self, Load, Spell},
};
use crate::figures::Comparison;

const DEEP: &[(Thing, Option<f64>)] =
    &[(Protected, None), (Rublk, Some(0.6)), (Drbd, Some(2.0)), (Plain, None), (Bare, None)];
const SHALLOW: &[(Thing, Option<f64>)] =
    &[(Protected, None), (Rublk, Some(0.7)), (Drbd, Some(1.5)), (Plain, None), (Bare, None)];

/// All of the disk has four times as many regions as may be active; of the hot part, all are.
const LOADS: [Load; 4] = [
    Load {
        what: "live replication: 4k random writes, depth 16, all regions",
        options: "--rw=randwrite --bs=4k --iodepth=16",
        things: DEEP,
    },
    Load {
        what: "live replication: 4k random writes, depth 16, hot regions",
        options: "--rw=randwrite --bs=4k --iodepth=16 --size=256m",
        things: DEEP,
    },
    Load {
        what: "live replication: 4k random writes, depth 1, all regions",
        options: "--rw=randwrite --bs=4k --iodepth=1",
        things: SHALLOW,
    },
    Load {
        what: "live replication: 4k random writes, depth 1, hot regions",
        options: "--rw=randwrite --bs=4k --iodepth=1 --size=256m",
        things: SHALLOW,
    },
];

/// Requests per second of each load.
///
/// # Errors
/// There is no rublk or DRBD; a guest that fails.
pub fn measure(rounds: usize, short: bool) -> Result<Vec<Comparison>> {
    let mut comparisons = Vec::new();
    // The ring is the usual one: with a larger one, more of what is measured would only wait in it.
    let disks = |plan: &mut Plan| {
        plan.memory_mib = 2048;
        plan.spare_disks.push(("drbd", SIZE_BYTES));
        plan.target_spare_disks.push(("drbd", SIZE_BYTES));
    };
    super::run("bench-speed", disks, |pair| {
        let devices = Devices::start(pair, true)?;
        let spell =
            if short { Spell { warm_up_s: 1, run_s: 1 } } else { Spell { warm_up_s: 5, run_s: 5 } };
        for load in &LOADS {
            comparisons.push(load::measure(pair, &devices, load, spell, rounds, None)?);
        }
        Ok(())
    })?;
    Ok(comparisons)
}
