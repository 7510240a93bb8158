use std::{fs, io::IoSlice, net::Shutdown, time::Duration};

use tokio::time::timeout;

use super::*;

fn filled(bytes: usize, seed: u8) -> AlignedBuf {
    let mut buffer = AlignedBuf::new(1 << 20);
    buffer.extend(&(0..bytes).map(|n| (n >> 3) as u8 ^ seed).collect::<Vec<_>>()).unwrap();
    buffer
}

#[test]
fn a_buffer_is_aligned_padded_and_bounded() {
    let mut buffer = AlignedBuf::new(10_000);
    assert_eq!(buffer.bytes_max(), 12_288);
    buffer.extend(&[7; 5000]).unwrap();
    assert!(buffer.as_slice().as_ptr().addr().is_multiple_of(BLOCK_BYTES));
    buffer.pad_to_block();
    assert_eq!(buffer.len(), 8192);
    assert_eq!(buffer.as_slice()[..5000], [7; 5000]);
    assert_eq!(buffer.as_slice()[5000..], [0; 3192]);
    let full = buffer.extend(&[1; 4097]).unwrap_err();
    assert_eq!(full, BufferFull { have: 8192, add: 4097, max: 12_288 });
    assert_eq!(buffer.len(), 8192, "a refusal changes nothing");
    buffer.extend(&[1; 4096]).unwrap();
    buffer.clear();
    // Old content does not show through the padding.
    buffer.extend(b"x").unwrap();
    buffer.pad_to_block();
    assert_eq!(buffer.as_slice()[1..], [0; 4095]);
}

#[test]
fn a_file_is_written_synced_and_read_back() {
    let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let path = directory.path().join("segment");
    run(async {
        let file = File::open(&path, How::NEW_DIRECT).await.unwrap();
        file.preallocate(0, 1 << 20).await.unwrap();
        let buffer = filled(8192, 3);
        let (written, mut buffer) = file.write_all_at(buffer, 4096).await;
        written.unwrap();
        file.sync_data().await.unwrap();
        sync_dir(directory.path()).await.unwrap();
        file.set_len(12_288).unwrap();

        buffer.as_mut_slice().fill(0xee);
        buffer.resize(16_384).unwrap();
        let (read, buffer) = file.read_at(buffer, 0).await;
        assert_eq!(read.unwrap(), 12_288, "the file ends there");
        assert_eq!(buffer.as_slice()[..4096], [0; 4096]);
        assert_eq!(&buffer.as_slice()[4096..12_288], filled(8192, 3).as_slice());

        let again = File::open(&path, How::NEW_DIRECT).await.err().unwrap();
        assert_eq!(again.kind(), std::io::ErrorKind::AlreadyExists);
        assert!(again.to_string().contains("segment"), "{again}");
        let read_only = File::open(&path, How::READ).await.unwrap();
        let (refused, _) = read_only.write_all_at(filled(4096, 0), 0).await;
        assert!(refused.is_err());
    })
    .unwrap();
    let content = fs::read(&path).unwrap();
    assert_eq!(&content[4096..], filled(8192, 3).as_slice());
}

#[test]
fn the_tail_of_a_file_that_is_no_whole_block_is_read() {
    let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let path = directory.path().join("odd");
    fs::write(&path, [5; 5000]).unwrap();
    run(async {
        for how in [How::READ, How { direct: true, ..How::READ }] {
            let file = File::open(&path, how).await.unwrap();
            let (read, buffer) = file.read_at(filled(16_384, 0), 0).await;
            assert_eq!(read.unwrap(), 5000);
            assert_eq!(buffer.as_slice()[..5000], [5; 5000]);
            let (read, _) = file.read_at(buffer, 8192).await;
            assert_eq!(read.unwrap(), 0, "after the end");
        }
    })
    .unwrap();
}

#[test]
fn direct_io_falls_back_where_the_filesystem_has_none() {
    // procfs has no direct I/O at all.
    run(async {
        let how = How { direct: true, ..How::READ };
        let file = File::open(std::path::Path::new("/proc/self/status"), how).await.unwrap();
        assert!(!file.is_direct());
        let (read, buffer) = file.read_at(filled(4096, 0), 0).await;
        assert!(read.unwrap() > 0 && buffer.as_slice().starts_with(b"Name:"));
    })
    .unwrap();
}

#[test]
fn a_failed_sync_fences_the_file() {
    // A pipe cannot be synced: fdatasync fails, as it does on a disk that lost a write.
    let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let path = directory.path().join("pipe");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    // Opened both ways at once, so that opening does not wait for the other end.
    run(async {
        let how = How { write: true, ..How::READ };
        let file = File::open(&path, how).await.unwrap();
        let (written, buffer) = file.write_all_at(filled(100, 0), 0).await;
        written.unwrap();
        assert!(file.sync_data().await.is_err());
        let (refused, _) = file.write_all_at(buffer, 0).await;
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains("earlier sync failed"), "{refused}");
        let refused = file.sync_data().await.unwrap_err().to_string();
        assert!(refused.contains("earlier sync failed"), "{refused}");
    })
    .unwrap();
}

#[test]
fn dropping_a_stream_ends_its_read() {
    run(async {
        let (one, other) = Stream::pair().unwrap();
        let reading = spawn(one.read(Vec::with_capacity(10)));
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert!(!reading.is_finished());
        drop(one);
        let (read, _) = timeout(Duration::from_secs(5), reading).await.unwrap().unwrap();
        assert_eq!(read.unwrap(), 0);
        let (read, _) = other.read(Vec::with_capacity(10)).await;
        assert_eq!(read.unwrap(), 0, "the other end sees the end too");
    })
    .unwrap();
}

#[test]
fn a_full_socket_is_waited_for() {
    run(async {
        let (one, other) = Stream::pair().unwrap();
        let (mut sent, mut got) = (0_u32, 0_u32);
        for _ in 0..3 {
            let full = loop {
                match one.write_now(&[IoSlice::new(&[sent as u8; 1000])]) {
                    Ok(bytes) => assert_eq!(bytes, 1000),
                    Err(error) => break error,
                }
                sent += 1;
            };
            assert_eq!(full.kind(), std::io::ErrorKind::WouldBlock);
            // Room there was before does not count.
            while timeout(Duration::from_millis(20), one.writable()).await.is_ok() {
                let again = one.write_now(&[IoSlice::new(&[0])]);
                assert_eq!(again.unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
            }
            let mut waiting = std::pin::pin!(one.writable());
            while got != sent {
                let (read, bytes) = other.read(Vec::with_capacity(1000)).await;
                assert_eq!(read.unwrap(), 1000);
                assert_eq!(bytes, [got as u8; 1000]);
                got += 1;
                if let Ok(room) = timeout(Duration::from_millis(1), &mut waiting).await {
                    room.unwrap();
                    break;
                }
            }
            assert_ne!(got, sent, "all was read, and nobody was told of room");
        }
        one.shutdown(Shutdown::Both);
        let ended = one.write_now(&[IoSlice::new(&[0])]).unwrap_err();
        assert_eq!(ended.kind(), std::io::ErrorKind::BrokenPipe);
    })
    .unwrap();
}

#[test]
fn a_dropped_accept_loses_no_connection() {
    run(async {
        let mut listener = Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        // The dropped future's accept is pending in the kernel when the connection comes.
        assert!(timeout(Duration::from_millis(10), listener.accept()).await.is_err());
        let text = address.to_string();
        let client = Stream::connect(&text, Duration::from_secs(5)).await.unwrap();
        let accepted = timeout(Duration::from_secs(5), listener.accept()).await.unwrap();
        let (server, _) = accepted.unwrap();
        client.tune(Duration::from_secs(1)).unwrap();
        let parts = [b"el".as_slice(), b"lo"].map(IoSlice::new);
        assert_eq!(server.write_now(&parts).unwrap(), 4);
        let (read, bytes) = client.read(Vec::with_capacity(10)).await;
        assert_eq!((read.unwrap(), bytes.as_slice()), (4, &b"ello"[..]));
    })
    .unwrap();
}

#[test]
fn a_dropped_listener_frees_its_port() {
    run(async {
        let mut listener = Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        assert!(timeout(Duration::from_millis(10), listener.accept()).await.is_err());
        drop(listener);
        // The pending accept held the socket until it ended.
        let again = timeout(Duration::from_secs(5), async {
            loop {
                if let Ok(listener) = Listener::bind(address) {
                    return listener;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        assert_eq!(again.await.unwrap().local_addr().unwrap(), address);
    })
    .unwrap();
}

#[test]
fn a_host_without_an_answer_is_an_error() {
    run(async {
        let error = Stream::connect("no-port-here", Duration::from_secs(1)).await.err().unwrap();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
    })
    .unwrap();
}
