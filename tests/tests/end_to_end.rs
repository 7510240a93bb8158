//! From an application's write to the disk as of a position: the whole way on one host.

use anyhow::Result;
use bytes::Bytes;
use tidemark_tests::site::{Plan, Site};

#[test]
fn a_write_can_be_read_back_as_of_its_moment() -> Result<()> {
    let site = Site::started(Plan::new(&[16 << 20]))?;
    let disk = site.open_front(0)?;
    let write = |at: u64, byte: u8| {
        site.runtime().block_on(disk.write(at, Bytes::from(vec![byte; 8192]), false))
    };
    site.wait_in_sync()?;
    write(4096, 1)?;
    let first = site.mark("first")?;
    site.wait_in_sync()?;
    write(8192, 2)?;
    site.runtime().block_on(disk.flush())?;
    site.wait_in_sync()?;

    let mut expected = vec![0; 16 << 20];
    expected[4096..12288].fill(1);
    assert!(site.read_export(&format!("/v0@seq:{first}"))? == expected);
    assert!(site.read_export("/v0@mark:first")? == expected);
    expected[8192..16384].fill(2);
    assert!(site.read_export("/v0@latest")? == expected);
    assert!(std::fs::read(site.image(0))? == expected, "the local disk has the same");
    Ok(())
}
