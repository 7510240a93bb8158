//! In emulated machines with real kernels: the ratios are of the path's length, since an emulated processor makes
//! cryptography and compression tens of times dearer than they are.

pub mod capture;
mod devices;
mod drbd;
mod load;
mod profile;
pub mod sequential;
pub mod speed;
mod stream;

use anyhow::Result;
use tidemark_tests::{
    pair::{Pair, Plan},
    vm::Lab,
};

/// The size of each disk: four times what may be active at once.
const SIZE_BYTES: u64 = 4 << 30;

/// A source and a target, with a disk of the same kind for each thing that is measured; `change` says what else is
/// special.
fn run(
    name: &str,
    change: impl FnOnce(&mut Plan),
    measure: impl FnOnce(&Pair) -> Result<()>,
) -> Result<()> {
    Lab::run(name, 2, |lab| {
        let mut plan = Plan::new(&[("data", SIZE_BYTES)]);
        plan.spare_disks = ["plain", "loop", "bare"].map(|serial| (serial, SIZE_BYTES)).to_vec();
        plan.filled = true;
        plan.group_lines = "compression = \"off\"\nactive_regions = 1024".to_owned();
        plan.store_bytes = 64 << 30;
        change(&mut plan);
        Pair::run(lab, plan, |pair| {
            pair.wait_in_sync()?;
            measure(pair)
        })
    })
}

/// Waits for what has piled up, for as long as there is progress: emulated cryptography takes minutes for it.
fn drain(pair: &Pair) -> Result<()> {
    let mut status = pair.status()?;
    while !status.is_in_sync() {
        let before = status.durable_seq;
        status = pair.wait("progress towards being in sync", |status| {
            status.is_in_sync() || status.durable_seq > before
        })?;
    }
    Ok(())
}
