//! Random requests against an array of bytes, and random bytes against the server.

#[path = "../examples/memory/disk.rs"]
mod disk;
mod support;

use bytes::Bytes;
use disk::MemoryExports;
use proptest::prelude::*;
use support::{OnUnix, PATIENCE, pattern};
use tidemark_nbd::client::{Client, Options};
use tidemark_nbd::{Extent, Limits, Zeroing};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

const SIZE: u32 = 1 << 20;

#[derive(Clone, Debug)]
enum Step {
    Write { seed: u64, fua: bool },
    Zero { no_hole: bool, fua: bool },
    Trim,
    Read { whole: bool },
    Status,
    Flush,
}

fn steps() -> impl Strategy<Value = Vec<(Step, u32, u32)>> {
    let step = prop_oneof![
        4 => (any::<u64>(), any::<bool>()).prop_map(|(seed, fua)| Step::Write { seed, fua }),
        2 => (any::<bool>(), any::<bool>()).prop_map(|(no_hole, fua)| Step::Zero { no_hole, fua }),
        1 => Just(Step::Trim),
        4 => any::<bool>().prop_map(|whole| Step::Read { whole }),
        2 => Just(Step::Status),
        1 => Just(Step::Flush),
    ];
    let range = (0..SIZE, prop_oneof![1..8192u32, 1..300_000u32])
        .prop_map(|(offset, length)| (offset, length.min(SIZE - offset)));
    let step = (step, range).prop_map(|(step, (offset, length))| (step, offset, length));
    prop::collection::vec(step, 1..40)
}

fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

async fn play(steps: Vec<(Step, u32, u32)>, options: &Options) -> Result<(), TestCaseError> {
    let server = OnUnix::start(MemoryExports::new(u64::from(SIZE)), Limits::default()).await;
    let client = Client::connect(server.address(), "disk", options).await.unwrap();
    let mut model = vec![0u8; SIZE as usize];
    for (step, start, length) in steps {
        let (offset, range) = (u64::from(start), start as usize..(start + length) as usize);
        match step {
            Step::Write { seed, fua } => {
                let data = pattern(seed, length as usize);
                model[range].copy_from_slice(&data);
                client.write(offset, data, fua).await.unwrap();
            }
            Step::Zero { no_hole, fua } => {
                model[range].fill(0);
                let how = Zeroing { fua, no_hole, fast_only: false };
                client.write_zeroes(offset, length, how).await.unwrap();
            }
            Step::Trim => {
                model[range].fill(0); // this disk trims to zeros
                client.trim(offset, length).await.unwrap();
            }
            Step::Read { whole: true } if !options.simple_replies_only => {
                let read = client.read_unfragmented(offset, length).await.unwrap();
                prop_assert!(read == model[range], "a read in one piece differs");
            }
            Step::Read { .. } => {
                let read = client.read(offset, length).await.unwrap();
                prop_assert!(read == model[range], "a read differs");
            }
            Step::Status if !options.simple_replies_only => {
                let all = client.block_status(offset, length, false).await.unwrap();
                let mut at = range.start;
                for Extent { length, zero, .. } in &all {
                    let end = at + *length as usize;
                    prop_assert!(end <= range.end && end > at, "extents within the request");
                    prop_assert!(!zero || model[at..end].iter().all(|byte| *byte == 0));
                    at = end;
                }
                prop_assert_eq!(at, range.end);
                let one = client.block_status(offset, length, true).await.unwrap();
                prop_assert_eq!(&one[..], &all[..1]);
            }
            Step::Status | Step::Flush => client.flush().await.unwrap(),
        }
    }
    let whole = client.read(0, SIZE).await.unwrap();
    prop_assert!(whole == model, "the disk differs at the end");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn a_disk_is_an_array_of_bytes(steps in steps(), simple_replies_only: bool) {
        let options = Options { simple_replies_only, ..Options::default() };
        run(play(steps, &options))?;
    }

    /// Whatever a client sends, it is answered or cut, and the next client is served.
    #[test]
    fn random_bytes_do_no_harm(
        enter: bool,
        bytes in prop::collection::vec(prop_oneof![any::<u8>(), Just(0)], 0..2000),
    ) {
        run(async {
            let disk = MemoryExports::new(u64::from(SIZE));
            let server = OnUnix::start(disk, Limits::default()).await;
            let mut stream = UnixStream::connect(&server.path).await.unwrap();
            stream.write_u32(3).await.unwrap();
            if enter {
                stream.write_all(b"IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0").await.unwrap();
                // A right magic first, so that the fields behind it are looked at.
                stream.write_all(&[0x25, 0x60, 0x95, 0x13, 0, 0, 0]).await.unwrap();
            } else {
                stream.write_all(b"IHAVEOPT\0\0\0").await.unwrap();
            }
            stream.write_all(&bytes).await.ok();
            stream.shutdown().await.ok();
            let ended = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut Vec::new())).await;
            ended.expect("the connection ends").ok();
            let client = Client::connect(server.address(), "", &Options::default()).await.unwrap();
            client.write(0, Bytes::from_static(b"well"), false).await.unwrap();
        });
    }
}
