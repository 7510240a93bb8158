//! Requests over a real socket with the library's own client: order, rules, replies.

mod support;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use support::{OnUnix, One, Scripted, everything, pattern};
use tidemark_nbd::client::{Client, Options};
use tidemark_nbd::proto::transmission::Command;
use tidemark_nbd::{BlockSizes, Chunk, Errno, ExportInfo, Features, Limits, Zeroing};

async fn connect(export: &Arc<Scripted>, limits: Limits, options: &Options) -> (OnUnix, Client) {
    let server = OnUnix::start(One(Arc::clone(export)), limits).await;
    let client = Client::connect(server.address(), "disk", options).await.unwrap();
    (server, client)
}

async fn simple(export: &Arc<Scripted>) -> (OnUnix, Client) {
    connect(export, Limits::default(), &Options::default()).await
}

const ZEROING: Zeroing = Zeroing { fua: false, no_hole: false, fast_only: false };

#[tokio::test]
async fn writes_and_flushes_reach_the_export_in_order_while_replies_overtake() {
    let export = Scripted::holding(everything());
    let (_server, client) = simple(&export).await;
    let mut expected = Vec::new();
    let mut answers = Vec::new();
    for turn in 0..200u64 {
        let client = client.clone();
        // Of every size class: within the read-ahead, and read straight into the buffer.
        let length = [512, 4096, 40_000, 300_000][turn as usize % 4];
        if turn % 10 == 9 {
            expected.push("flush".to_owned());
            answers.push(tokio::spawn(async move { client.flush().await }));
        } else {
            let data = pattern(turn, length);
            let sum: u64 = data.iter().map(|byte| u64::from(*byte)).sum();
            expected.push(format!(
                "write {}+{length} sum {sum} fua {}",
                turn * 4096,
                turn % 3 == 0
            ));
            answers.push(tokio::spawn(async move {
                client.write(turn * 4096, data, turn % 3 == 0).await
            }));
        }
        tokio::task::yield_now().await; // each is queued before the next
    }
    export.until("all calls", |export| export.calls().len() == 200).await;
    assert_eq!(export.calls(), expected);
    assert_eq!(export.release(), 200, "newest first");
    for answer in answers {
        answer.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn an_export_may_receive_into_its_own_memory() {
    let export = Arc::new(Scripted { info: everything(), own_memory: true, ..Scripted::default() });
    let (_server, client) = simple(&export).await;
    for length in [1, 4096, 1 << 20] {
        client.write(0, Bytes::from(vec![1; length]), false).await.unwrap();
        let call = format!("write 0+{length} sum {length} fua false");
        assert_eq!(export.calls().last(), Some(&call));
    }
}

#[tokio::test]
async fn what_was_not_offered_is_refused_and_does_not_reach_the_export() {
    let bare = ExportInfo {
        size: 1 << 20,
        block_sizes: BlockSizes { minimum: 512, preferred: 4096, maximum: 65536 },
        ..ExportInfo::default()
    };
    let export = Scripted::new(bare);
    let (_server, client) = simple(&export).await;
    let whole = 1 << 20;
    for (command, flags, offset, length, errno, what) in [
        (Command::Flush, 0, 0, 0, Errno::Inval, "flush"),
        (Command::Trim, 0, 0, 512, Errno::Inval, "trim"),
        (Command::Cache, 0, 0, 512, Errno::Inval, "cache"),
        (Command::WriteZeroes, 0, 0, 512, Errno::Inval, "write zeroes"),
        (Command::Unknown(99), 0, 0, 512, Errno::Inval, "an unknown command"),
        (Command::Read, 1, 0, 512, Errno::Inval, "FUA"),
        (Command::Read, 1 << 9, 0, 512, Errno::Inval, "an unknown flag"),
        (Command::Read, 0, 0, 0, Errno::Inval, "no length"),
        (Command::Read, 0, 1, 512, Errno::Inval, "an unaligned offset"),
        (Command::Read, 0, 0, 513, Errno::Inval, "an unaligned length"),
        (Command::Read, 0, whole, 512, Errno::Inval, "a read past the end"),
        (Command::Read, 0, u64::MAX - 511, 512, Errno::Inval, "a range that wraps"),
        (Command::Read, 0, 0, 65536 + 512, Errno::Inval, "an oversize read"),
        (Command::Read, 4, 0, 65536 + 512, Errno::Overflow, "an oversize read in one piece"),
        (Command::Write, 0, 0, 65536 + 512, Errno::Inval, "an oversize write"),
        (Command::Write, 0, whole, 512, Errno::NoSpc, "a write past the end"),
    ] {
        let payload = if command == Command::Write { length as usize } else { 0 };
        let payload = Bytes::from(vec![0; payload]);
        let answer = client.raw(command, flags, offset, length, payload).await;
        assert_eq!(answer.map_err(|error| error.errno), Err(errno), "{what}");
    }
    assert_eq!(export.calls(), [""; 0]);
    // The connection is none the worse for it.
    client.read(0, 65536).await.unwrap();
    let error = client.read(1, 512).await.unwrap_err();
    assert_eq!(error.message, "offset and length must be multiples of 512 bytes");
}

#[tokio::test]
async fn a_read_only_export_refuses_every_change() {
    let features = Features { read_only: true, ..everything().features };
    let export = Scripted::new(ExportInfo { features, ..everything() });
    let (_server, client) = simple(&export).await;
    assert!(client.info().features.read_only && !client.info().features.trim);
    let write = client.write(0, Bytes::from_static(&[0; 512]), false).await;
    let zero = client.write_zeroes(0, 512, ZEROING).await;
    let trim = client.trim(0, 512).await;
    for answer in [write, zero, trim] {
        assert_eq!(answer.unwrap_err().errno, Errno::Perm);
    }
    client.read(0, 512).await.unwrap();
}

#[tokio::test]
async fn wide_zeroes_and_trims_pass_whole() {
    let export = Scripted::new(everything());
    let (_server, client) = simple(&export).await;
    client.write_zeroes(4096, 3 << 30, Zeroing { no_hole: true, ..ZEROING }).await.unwrap();
    client.trim(0, u32::MAX - 4095).await.unwrap();
    assert_eq!(export.calls(), ["zero 4096+3221225472 no_hole true", "trim 0+4294963200"]);
    let fast = Zeroing { fast_only: true, ..ZEROING };
    assert_eq!(client.write_zeroes(0, 512, fast).await.unwrap_err().errno, Errno::NotSup);
    let past = client.write_zeroes((4 << 30) - 512, 1024, ZEROING).await;
    assert_eq!(past.unwrap_err().errno, Errno::NoSpc);
}

#[tokio::test]
async fn holes_are_holes_or_zeros_as_the_client_wants() {
    let data = pattern(1, 3000);
    let chunks = vec![Chunk::Hole(200_000), Chunk::Data(data.clone()), Chunk::Hole(1000)];
    let export =
        Arc::new(Scripted { info: everything(), read: Some(chunks), ..Scripted::default() });
    let expected = [&[0; 200_000][..], &data, &[0; 1000]].concat();
    for options in [Options::default(), Options { simple_replies_only: true, ..<_>::default() }] {
        let (_server, client) = connect(&export, Limits::default(), &options).await;
        assert_eq!(client.read(0, 204_000).await.unwrap(), expected);
        if !options.simple_replies_only {
            assert_eq!(client.read_unfragmented(0, 204_000).await.unwrap(), expected);
        }
        // Pieces that do not add up are the export's fault; the stream stays in step.
        for length in [203_999, 204_001] {
            assert_eq!(client.read(0, length).await.unwrap_err().errno, Errno::Io);
        }
        assert_eq!(client.read(0, 204_000).await.unwrap(), expected);
    }
}

#[tokio::test]
async fn errors_arrive_with_their_sentence_where_the_protocol_allows_them() {
    for errno in [Errno::Io, Errno::NoSpc, Errno::Overflow, Errno::NotSup] {
        let error = Some(errno);
        let export = Arc::new(Scripted { info: everything(), error, ..Scripted::default() });
        let (_server, client) = simple(&export).await;
        let write = client.write(0, Bytes::from_static(&[0; 512]), false).await.unwrap_err();
        let trim = client.trim(0, 512).await.unwrap_err();
        let expected = match errno {
            Errno::Overflow => (Errno::Inval, Errno::Overflow), // not for a payload
            Errno::NotSup => (Errno::Inval, Errno::Inval),      // only for a fast zero
            other => (other, other),
        };
        assert_eq!((write.errno, trim.errno), expected);
        assert_eq!(write.message, "as told");
    }
}

#[tokio::test]
async fn block_status_needs_its_context() {
    let export = Scripted::new(everything());
    let (_server, client) = simple(&export).await;
    let all = client.block_status(0, 1 << 20, false).await.unwrap();
    assert_eq!(all.iter().map(|extent| extent.length).sum::<u64>(), 1 << 20);
    let options = Options { simple_replies_only: true, ..Options::default() };
    let (_server, client) = connect(&export, Limits::default(), &options).await;
    assert_eq!(client.block_status(0, 512, true).await.unwrap_err().errno, Errno::Inval);
}

#[tokio::test]
async fn requests_under_way_are_bounded_in_number() {
    let export = Scripted::holding(everything());
    let limits = Limits { in_flight_requests: 8, ..Limits::default() };
    let (_server, client) = connect(&export, limits, &Options::default()).await;
    let mut answers = Vec::new();
    for turn in 0..100 {
        let client = client.clone();
        answers.push(tokio::spawn(async move { client.read(turn * 4096, 4096).await }));
    }
    export.until("eight calls", |export| export.calls().len() == 8).await;
    let mut seen = 0;
    while seen < 100 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let held = export.waiting.lock().unwrap().len();
        assert!(held <= 8, "{held} requests at once");
        seen += export.release();
    }
    for answer in answers {
        answer.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn requests_under_way_are_bounded_in_bytes_but_one_always_fits() {
    let export = Scripted::holding(everything());
    let limits = Limits { in_flight_bytes: 3 << 20, ..Limits::default() };
    let (_server, client) = connect(&export, limits, &Options::default()).await;
    let mut answers = Vec::new();
    for turn in 0..12u64 {
        let client = client.clone();
        let length = if turn == 11 { 8 << 20 } else { 1 << 20 };
        answers
            .push(tokio::spawn(async move { client.write(0, pattern(turn, length), false).await }));
    }
    let mut seen = 0;
    while seen < 12 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let held = export.waiting.lock().unwrap().len();
        assert!(held <= 3, "{held} requests at once");
        seen += export.release();
    }
    for answer in answers {
        answer.await.unwrap().unwrap();
    }
}
