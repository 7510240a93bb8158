//! Puts a recorded load on block devices or files, here or in a guest: reads a [`Job`] as JSON from standard
//! input and prints the [`Log`](tidemark_tests::workload::Log) as JSON.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tidemark_tests::workload::disk::FileDisk;
use tidemark_tests::workload::{self, Disk, Job};

fn main() -> Result<()> {
    let job: Job =
        serde_json::from_reader(io::stdin().lock()).context("no job on standard input")?;
    ensure!(job.disks.len() == job.shape.sizes_bytes.len(), "the shape is of other disks: {job:?}");
    let open = |path: &PathBuf| {
        FileDisk::open(path).with_context(|| format!("cannot open {}", path.display()))
    };
    let disks: Vec<FileDisk> = job.disks.iter().map(open).collect::<Result<_>>()?;
    let disks: Vec<&dyn Disk> = disks.iter().map(|disk| disk as &dyn Disk).collect();
    let operations = job.shape.operations()?;
    let stop = Arc::new(AtomicBool::new(false));
    if let Some(seconds) = job.seconds_max {
        let stop = Arc::clone(&stop);
        thread::spawn(move || {
            thread::sleep(Duration::from_secs(seconds));
            stop.store(true, Ordering::Relaxed);
        });
    }
    let log = workload::run(&disks, &operations, job.depth, &stop);
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, &log)?;
    out.flush()?;
    Ok(())
}
