//! Loads that fio puts on the devices in turn.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tidemark_tests::pair::Pair;

use super::{
    devices::{Devices, Thing},
    drain, drbd,
    profile::Profile,
    stream,
};
use crate::figures::{Bar, Bound, Comparison, Report, in_turn};

/// A kind of load.
pub struct Kind {
    /// What it is, in a table.
    what: &'static str,
    /// What makes it so, as fio has it.
    options: &'static str,
}

/// All of the disk has four times as many regions as may be active; of the hot part, all are.
pub const DEEP_ALL: Kind = Kind {
    what: "4k random writes, depth 16, all regions",
    options: "--rw=randwrite --bs=4k --iodepth=16",
};
/// See [`DEEP_ALL`].
pub const DEEP_HOT: Kind = Kind {
    what: "4k random writes, depth 16, hot regions",
    options: "--rw=randwrite --bs=4k --iodepth=16 --size=256m",
};
/// See [`DEEP_ALL`].
pub const SHALLOW_ALL: Kind = Kind {
    what: "4k random writes, depth 1, all regions",
    options: "--rw=randwrite --bs=4k --iodepth=1",
};
/// See [`DEEP_ALL`].
pub const SHALLOW_HOT: Kind = Kind {
    what: "4k random writes, depth 1, hot regions",
    options: "--rw=randwrite --bs=4k --iodepth=1 --size=256m",
};
/// More than a link between guests takes.
pub const LARGE: Kind =
    Kind { what: "1M sequential writes, depth 4", options: "--rw=write --bs=1M --iodepth=4" };
/// Reads of single blocks.
pub const READS: Kind =
    Kind { what: "4k random reads, depth 16", options: "--rw=randread --bs=4k --iodepth=16" };
/// Reads of much at a time.
pub const LARGE_READS: Kind =
    Kind { what: "1M sequential reads, depth 4", options: "--rw=read --bs=1M --iodepth=4" };

/// A load of so many seconds: its kind, and the devices that it is put on, the protected one first, with how far it
/// is to come of each.
pub type Load = (Kind, &'static [(Thing, Option<f64>)]);

/// How long a load is put on a device.
#[derive(Clone, Copy)]
pub struct Spell {
    /// Seconds that do not count.
    pub warm_up_s: u64,
    /// Seconds that count.
    pub run_s: u64,
}

/// How loads are put on.
pub struct Course<'a> {
    /// What tables say it is about.
    pub about: &'a str,
    /// How long each is.
    pub spell: Spell,
    /// How often each is.
    pub rounds: usize,
    /// Makes the target stop or go on: it stands still while a protected device is measured, if this is given.
    pub hold: Option<&'a dyn Fn(bool) -> Result<()>>,
}

/// Reports the requests per second of each load.
///
/// # Errors
/// A guest that fails.
pub fn measure(
    pair: &Pair,
    devices: &Devices,
    loads: &[Load],
    course: &Course<'_>,
    report: &mut Report,
) -> Result<()> {
    for load in loads {
        report.add(compare(pair, devices, load, course)?)?;
    }
    Ok(())
}

fn compare(
    pair: &Pair,
    devices: &Devices,
    (kind, things): &Load,
    course: &Course<'_>,
) -> Result<Comparison> {
    let Course { about, spell, rounds, hold } = *course;
    let gaps_before = pair.status()?.gaps_total;
    let mut profile = Profile::default();
    let rounds = in_turn(things.len(), rounds, |which| {
        let (thing, _) = things[which];
        let protects = matches!(thing, Thing::Protected | Thing::ProtectedStreamed);
        let held = hold.filter(|_| protects);
        held.map(|hold| hold(true)).transpose()?;
        let run = || fio(pair, &devices.path(pair, thing), kind.options, spell);
        let rate = match thing {
            Thing::Protected => profile.of(pair, spell.warm_up_s + spell.run_s, run),
            Thing::Streamed | Thing::ProtectedStreamed => {
                stream::beside(pair, &devices.path(pair, thing), run)
            }
            _ => run(),
        };
        held.map(|hold| hold(false)).transpose()?;
        // What is still on its way must not cost the next one.
        match thing {
            _ if protects => drain(pair)?,
            Thing::Drbd => drbd::wait_in_sync(pair)?,
            _ => {}
        }
        rate
    })?;
    eprintln!("{}, of each request:\n{profile}", kind.what);
    let gaps = pair.status()?.gaps_total - gaps_before;
    let captured = if gaps == 0 { String::new() } else { format!(" ({gaps} GAPS)") };
    let bars = things.iter().enumerate().skip(1);
    let index = |wanted| things.iter().position(|(thing, _)| *thing == wanted);
    let streamed = [Thing::Streamed, Thing::ProtectedStreamed].into_iter().filter_map(index);
    let rublk = index(Thing::Rublk);
    let limits = streamed.filter_map(|streamed| Some(Bar::printed(streamed, rublk?)));
    Ok(Comparison {
        what: format!("{about}: {}{captured}", kind.what),
        unit: "1/s",
        names: things.iter().map(|(thing, _)| thing.name().to_owned()).collect(),
        rounds,
        bars: bars
            .map(|(to, (_, at_least))| Bar {
                of: 0,
                to: Some(to),
                bound: at_least.map(Bound::AtLeast),
            })
            .chain(limits)
            .collect(),
    })
}

/// fio's requests per second.
fn fio(pair: &Pair, device: &str, options: &str, spell: Spell) -> Result<f64> {
    let Spell { warm_up_s, run_s } = spell;
    let command = format!(
        "fio --name=load --filename={device} --direct=1 --ioengine=libaio {options} --norandommap \
         --randrepeat=0 --time_based --ramp_time={warm_up_s} --runtime={run_s} --output-format=json"
    );
    let timeout = Duration::from_secs(warm_up_s + run_s + 60);
    let output = pair.source.spawn_for(&command, timeout)?.wait()?;
    ensure!(output.success(), "fio on {device}: {output:?}");
    let text = output.text();
    let start = text.find('{').with_context(|| format!("fio on {device}: {text}"))?;
    let report: Value = serde_json::from_str(&text[start..])?;
    let rate = |kind: &str| report["jobs"][0][kind]["iops"].as_f64().unwrap_or(0.0);
    Ok(rate("write") + rate("read"))
}
