//! What capture alone costs: the link is held, and the ring takes everything; frames are built and checksummed.

use anyhow::Result;
use tidemark_tests::pair::Plan;

use super::{
    devices::{
        Devices,
        Thing::{self, Bare, Plain, Protected, ProtectedStreamed, Rublk, Streamed},
    },
    load::{self, Course, Load, Spell},
};
use crate::figures::Report;

/// To rublk's loop there is a bar; the others are printed beside it.
const WRITES: &[(Thing, Option<f64>)] =
    &[(Protected, None), (Rublk, Some(0.85)), (Plain, None), (Bare, None)];
/// What capture leaves when as many bytes as are written go over TLS beside it, which whoever replicates live has to send:
/// no link to the target can do with less.
const HOT_WRITES: &[(Thing, Option<f64>)] = &[
    (Protected, None),
    (Rublk, Some(0.85)),
    (ProtectedStreamed, None),
    (Streamed, None),
    (Plain, None),
    (Bare, None),
];
const READS: &[(Thing, Option<f64>)] =
    &[(Protected, None), (Rublk, Some(0.95)), (Plain, None), (Bare, None)];

const LOADS: [Load; 6] = [
    (load::DEEP_ALL, WRITES),
    (load::DEEP_HOT, HOT_WRITES),
    (load::SHALLOW_ALL, WRITES),
    (load::SHALLOW_HOT, HOT_WRITES),
    (load::READS, READS),
    (load::LARGE_READS, READS),
];

/// More than the sockets between the guests take in while nobody reads at their end. What is written first of all
/// after the target was stopped is on its way into them, and no longer held.
const SOCKETS: &str = "--rw=write --bs=256k --iodepth=4 --size=16m";

/// Reports the requests per second of each load.
///
/// # Errors
/// There is no rublk; a guest that fails.
pub fn measure(rounds: usize, short: bool, report: &mut Report) -> Result<()> {
    let room = |plan: &mut Plan| {
        plan.ring = "1 GiB";
        plan.memory_mib = 2560;
    };
    super::run("bench-capture", room, |pair| {
        let devices = Devices::start(pair, false)?;
        let hold = |hold: bool| -> Result<()> {
            let signal = if hold { "STOP" } else { "CONT" };
            pair.target.sh(&format!("systemctl kill --signal={signal} tidemark-target"))?;
            if hold {
                let device = devices.path(pair, Protected);
                pair.source.sh(&format!(
                    "fio --name=sockets --filename={device} --direct=1 --ioengine=libaio {SOCKETS} && sleep 1"
                ))?;
            }
            Ok(())
        };
        let spell = Spell { warm_up_s: 1, run_s: if short { 1 } else { 4 } };
        let course = Course { about: "capture alone", spell, rounds, hold: Some(&hold) };
        load::measure(pair, &devices, &LOADS, &course, report)
    })
}
