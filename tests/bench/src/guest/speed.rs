//! A protected ublk device with live replication to a second guest, against `rublk`'s plain loop, and against DRBD
//! between the same two guests.

use anyhow::Result;
use tidemark_tests::pair::Plan;

use super::{
    SIZE_BYTES,
    devices::{
        Devices, Thing,
        Thing::{Bare, Drbd, Plain, Protected, Rublk, Streamed},
    },
    load::{self, Course, Load, Spell},
};
use crate::figures::Report;

const DEEP: &[(Thing, Option<f64>)] = &[
    (Protected, None),
    (Rublk, Some(0.6)),
    (Drbd, Some(2.0)),
    (Streamed, None),
    (Plain, None),
    (Bare, None),
];
const SHALLOW: &[(Thing, Option<f64>)] = &[
    (Protected, None),
    (Rublk, Some(0.7)),
    (Drbd, Some(1.5)),
    (Streamed, None),
    (Plain, None),
    (Bare, None),
];

const LARGE: &[(Thing, Option<f64>)] =
    &[(Protected, None), (Rublk, None), (Drbd, Some(1.0)), (Plain, None), (Bare, None)];

const LOADS: [Load; 5] = [
    (load::DEEP_ALL, DEEP),
    (load::DEEP_HOT, DEEP),
    (load::SHALLOW_ALL, SHALLOW),
    (load::SHALLOW_HOT, SHALLOW),
    (load::LARGE, LARGE),
];

/// Reports the requests per second of each load.
///
/// # Errors
/// There is no rublk or DRBD; a guest that fails.
pub fn measure(rounds: usize, short: bool, report: &mut Report) -> Result<()> {
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
        let course = Course { about: "live replication", spell, rounds, hold: None };
        load::measure(pair, &devices, &LOADS, &course, report)
    })
}
