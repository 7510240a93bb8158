use super::*;

fn ring_with_file(len: u64) -> (Ring, FileId, RegionId, Arc<Region>, tempfile::NamedTempFile) {
    let temp = tempfile::NamedTempFile::new().unwrap();
    temp.as_file().set_len(len).unwrap();
    let mut ring = Ring::new(8).unwrap();
    let file = ring.add_file(Arc::new(temp.reopen().unwrap())).unwrap();
    let region = Arc::new(Region::anonymous(1 << 20).unwrap());
    let id = ring.add_region(region.clone()).unwrap();
    (ring, file, id, region, temp)
}

fn next(ring: &mut Ring) -> Completion {
    for _ in 0..1000 {
        if let Some(done) = ring.completion() {
            return done;
        }
        ring.wait(Some(Duration::from_secs(10))).unwrap();
    }
    panic!("no completion");
}

#[test]
fn tokens_survive_packing_and_leave_the_top_bit() {
    let token = Token::new(Token::KIND_MAX, u16::MAX, u32::MAX);
    assert_eq!(Token::unpack(token.pack()), token);
    assert_eq!(token.pack() & WAKE, 0);
    assert_eq!(Token::new(1, 2, 3).pack(), 0x0100_0002_0000_0003);
}

#[test]
fn what_is_written_is_read_back_and_zeroed() {
    let (mut ring, file, region_id, region, temp) = ring_with_file(1 << 20);
    region.copy_in(4096, &[0xa5; 4096]).unwrap();
    let from = Buf { region: region_id, offset: 4096, len: 4096 };
    ring.write(file, 8192, from, true, Token::new(1, 0, 0)).unwrap();
    assert_eq!(next(&mut ring), Completion { token: Token::new(1, 0, 0), result: 4096 });
    ring.flush(file, Token::new(2, 0, 0)).unwrap();
    assert_eq!(next(&mut ring).result, 0);

    let to = Buf { region: region_id, offset: 65536, len: 4096 };
    ring.read(file, 8192, to, Token::new(3, 0, 0)).unwrap();
    assert_eq!(next(&mut ring).outcome().unwrap(), 4096);
    let mut out = [0u8; 4096];
    region.copy_out(65536, &mut out).unwrap();
    assert_eq!(out, [0xa5; 4096]);

    ring.zero(file, 8192, 4096, ZeroMode::Unmap, Token::new(4, 0, 0)).unwrap();
    assert_eq!(next(&mut ring).result, 0);
    assert_eq!(&std::fs::read(temp.path()).unwrap()[8192..12288], &[0u8; 4096][..]);
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn more_operations_than_the_queue_is_deep_all_complete() {
    let (mut ring, file, region, _keep, _temp) = ring_with_file(1 << 20);
    for index in 0..200u32 {
        let buf = Buf { region, offset: u64::from(index) * 4096, len: 4096 };
        ring.write(file, u64::from(index) * 4096, buf, false, Token::new(1, 0, index)).unwrap();
    }
    let mut seen = [false; 200];
    for _ in 0..200 {
        let done = next(&mut ring);
        assert_eq!(done.result, 4096);
        assert!(!std::mem::replace(&mut seen[done.token.index as usize], true));
    }
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn a_buffer_outside_its_region_is_refused() {
    let (mut ring, file, region, _keep, _temp) = ring_with_file(1 << 20);
    let buf = Buf { region, offset: (1 << 20) - 512, len: 1024 };
    assert!(ring.read(file, 0, buf, Token::new(1, 0, 0)).is_err());
    assert!(ring.write(file, 0, buf, false, Token::new(1, 0, 0)).is_err());
    let elsewhere = Buf { region: RegionId(9), offset: 0, len: 512 };
    assert!(matches!(
        ring.read(file, 0, elsewhere, Token::new(1, 0, 0)),
        Err(RingError::NoRegion(_))
    ));
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn a_removed_file_is_refused_but_what_was_queued_completes() {
    let (mut ring, file, region, _keep, temp) = ring_with_file(4096);
    let buf = Buf { region, offset: 0, len: 512 };
    ring.write(file, 0, buf, false, Token::new(1, 0, 7)).unwrap();
    ring.remove_file(file).unwrap();
    assert_eq!(next(&mut ring).result, 512);
    assert!(matches!(ring.flush(file, Token::new(1, 0, 8)), Err(RingError::NoFile(_))));
    let again = ring.add_file(Arc::new(temp.reopen().unwrap())).unwrap();
    assert_eq!(again, file, "the free place is used again");
}

#[test]
fn a_wake_from_another_thread_ends_the_wait_every_time() {
    let mut ring = Ring::new(8).unwrap();
    let waker = ring.waker();
    let (to_thread, ticks) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        while ticks.recv().is_ok() {
            waker.wake();
        }
    });
    for _ in 0..50 {
        to_thread.send(()).unwrap();
        // Without a wake this would never return.
        ring.wait(None).unwrap();
        assert_eq!(ring.completion(), None);
    }
    drop(to_thread);
    thread.join().unwrap();
}

#[test]
fn a_wake_before_the_wait_is_not_lost() {
    let mut ring = Ring::new(8).unwrap();
    ring.waker().wake();
    ring.wait(None).unwrap();
    assert_eq!(ring.completion(), None);
    ring.wait(Some(Duration::from_millis(1))).unwrap();
}

#[test]
fn errors_come_back_as_errors() {
    let mut ring = Ring::new(8).unwrap();
    let read_only = Arc::new(File::open("/proc/self/stat").unwrap());
    let file = ring.add_file(read_only).unwrap();
    let region = ring.add_region(Arc::new(Region::anonymous(4096).unwrap())).unwrap();
    let buf = Buf { region, offset: 0, len: 512 };
    ring.write(file, 0, buf, false, Token::new(1, 0, 0)).unwrap();
    let error = next(&mut ring).outcome().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EBADF));
}
