//! Golden bytes of each message, and parsers against anything.

use bytes::BytesMut;
use proptest::prelude::*;

use super::options::*;
use super::transmission::*;
use super::*;

/// Bytes from hex; spaces are for the reader.
fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u32> = text.chars().filter_map(|digit| digit.to_digit(16)).collect();
    digits.chunks(2).map(|pair| u8::try_from(pair[0] * 16 + pair[1]).expect("a byte")).collect()
}

fn golden(name: &str, expected: &str, encode: impl FnOnce(&mut BytesMut)) {
    let mut out = BytesMut::new();
    encode(&mut out);
    assert_eq!(out[..], hex(expected)[..], "{name}: {out:02x?}");
}

const REPLY: &str = "0003e889045565a9";

#[test]
fn handshake_messages_are_byte_exact() {
    assert_eq!(greeting()[..], hex("4e42444d41474943 49484156454f5054 0003")[..]);
    let go = hex("49484156454f5054 00000007 0000000c");
    golden("option", "49484156454f5054 00000007 0000000c", |out| {
        OptionHeader { option: option::GO, length: 12 }.encode(out);
    });
    let header = OptionHeader::parse(go.first_chunk().expect("16 bytes"));
    assert_eq!(header, Some(OptionHeader { option: 7, length: 12 }));

    golden("info request", "00000004 6469736b 0002 0001 0003", |out| {
        InfoRequest { name: "disk".into(), wanted: vec![1, 3] }.encode(out);
    });
    golden("meta request", "00000001 64 00000001 0000000f 626173653a616c6c6f636174696f6e", |out| {
        let queries = vec![BASE_ALLOCATION.into()];
        MetaContextRequest { name: "d".into(), queries }.encode(out);
    });
    golden("ack", &format!("{REPLY} 00000008 00000001 00000000"), |out| {
        put_reply(out, option::STRUCTURED_REPLY, ReplyType::Ack, &[]);
    });
    golden("error", &format!("{REPLY} 00000007 80000006 00000002 6e6f"), |out| {
        put_error(out, option::GO, ReplyType::ErrUnknown, "no");
    });
    golden(
        "server",
        &format!("{REPLY} 00000003 00000002 0000000b 00000004 6469736b 616263"),
        |o| {
            put_server(o, "disk", "abc");
        },
    );
    golden(
        "export",
        &format!("{REPLY} 00000007 00000003 0000000c 0000 0000000001000000 0025"),
        |o| {
            put_info_export(o, option::GO, 1 << 24, 0x25);
        },
    );
    golden("name", &format!("{REPLY} 00000006 00000003 00000003 0001 61"), |out| {
        put_info_text(out, option::INFO, info::NAME, "a");
    });
    let sizes = "0003 00000200 00001000 02000000";
    golden("block sizes", &format!("{REPLY} 00000007 00000003 0000000e {sizes}"), |out| {
        put_info_block_size(out, option::GO, [512, 4096, 32 << 20]);
    });
    let context = "00000001 626173653a616c6c6f636174696f6e";
    golden("context", &format!("{REPLY} 0000000a 00000004 00000013 {context}"), |out| {
        put_meta_context(out, option::SET_META_CONTEXT, BASE_ALLOCATION_ID);
    });
    golden("export name reply", "0000000000100000 0003", |out| {
        put_export_name_reply(out, 1 << 20, 3, true);
    });
    let mut padded = BytesMut::new();
    put_export_name_reply(&mut padded, 1 << 20, 3, false);
    assert_eq!((padded.len(), &padded[10..]), (134, &[0; 124][..]));
}

#[test]
fn transmission_messages_are_byte_exact() {
    let write = Request {
        flags: command_flags::FUA,
        command: Command::Write,
        cookie: 0x0102_0304_0506_0708,
        offset: 0x1_0000_0200,
        length: 512,
    };
    let bytes = "25609513 0001 0001 0102030405060708 0000000100000200 00000200";
    golden("request", bytes, |out| write.encode(out));
    assert_eq!(Request::parse(hex(bytes).first_chunk().expect("28 bytes")), Some(write));

    golden("simple", "67446698 00000000 00000000000000ff", |o| put_simple_reply(o, 255, None));
    golden("simple error", "67446698 0000001c 00000000000000ff", |out| {
        put_simple_reply(out, 255, Some(Errno::NoSpc));
    });
    golden("data", "668e33ef 0001 0001 0000000000000009 0000020a 0000000000001000", |out| {
        put_data_chunk(out, true, 9, 4096, 514);
    });
    golden(
        "hole",
        "668e33ef 0000 0002 0000000000000009 0000000c 0000000000001000 00000200",
        |out| {
            put_hole_chunk(out, false, 9, 4096, 512);
        },
    );
    golden(
        "error chunk",
        "668e33ef 0001 8001 0000000000000009 00000008 00000005 0002 6e6f",
        |out| {
            put_error_chunk(out, 9, Errno::Io, "no");
        },
    );
    let extents = "00000001 00010000 00000003 00000200 00000000";
    golden("status", &format!("668e33ef 0001 0005 0000000000000009 00000014 {extents}"), |out| {
        put_block_status(out, 9, 1, [(65536, 3), (512, 0)].into_iter());
    });
    let none = hex("668e33ef 0001 0000 0000000000000009 00000000");
    let header = ReplyHeader::Chunk { cookie: 9, done: true, kind: chunk::NONE, length: 0 };
    assert_eq!(ReplyHeader::parse(&none), Ok(Some((header, 20))));
    assert_eq!(ReplyHeader::parse(&none[..19]), Ok(None));
    assert_eq!(ReplyHeader::parse(&hex("25609513 0000")), Err(WrongMagic(REQUEST_MAGIC)));
}

#[test]
fn wrong_magics_and_unknown_flags_are_refused() {
    assert_eq!(OptionHeader::parse(&[0; 16]), None);
    assert_eq!(Request::parse(&[0x25; 28]), None);
    assert_eq!(ClientFlags::parse([0, 0, 0, 4]), None);
    let flags = ClientFlags { fixed_newstyle: true, no_zeroes: false };
    assert_eq!(ClientFlags::parse([0, 0, 0, 1]), Some(flags));
}

#[test]
fn lengths_that_lie_are_refused() {
    for (option, data, what) in [
        (option::LIST, "00", "data with LIST"),
        (option::GO, "000000", "half a name length"),
        (option::GO, "ffffffff 61 0000", "a name longer than the option"),
        (option::GO, "00000001 61 0002 0001", "fewer requests than counted"),
        (option::GO, "00000001 61 0000 00", "bytes after the requests"),
        (option::SET_META_CONTEXT, "00000001 61 ffffffff", "queries that are not there"),
        (option::SET_META_CONTEXT, "00000001 61 00000001 00000009 62", "a truncated query"),
        (option::SET_META_CONTEXT, "00000001 61 00000000 00", "bytes after the queries"),
        (option::EXPORT_NAME, "ff", "a name that is no UTF-8"),
        (option::EXPORT_NAME, "6100", "a name with NUL"),
    ] {
        assert!(ClientOption::parse(option, &hex(data)).is_err(), "{what}");
    }
    let long = vec![b'a'; STRING_BYTES_MAX + 1];
    assert!(ClientOption::parse(option::EXPORT_NAME, &long).is_err());
    assert!(ClientOption::parse(option::EXPORT_NAME, &long[1..]).is_ok());
}

#[test]
fn strings_are_cut_at_a_character() {
    let text = "é".repeat(STRING_BYTES_MAX);
    assert_eq!(wire_str(&text).len(), STRING_BYTES_MAX);
    assert_eq!(wire_str(&format!("a{text}")).len(), STRING_BYTES_MAX - 1);
}

#[test]
fn system_errors_become_those_of_the_protocol() {
    let all = [Errno::Perm, Errno::Io, Errno::NoMem, Errno::Inval, Errno::NoSpc];
    for errno in all.into_iter().chain([Errno::Overflow, Errno::NotSup, Errno::Shutdown]) {
        assert_eq!(Errno::from_wire(errno as u32), errno);
        assert_eq!(Errno::from_system(i32::try_from(errno as u32).expect("small")), errno);
    }
    use nix::errno::Errno as System;
    assert_eq!(Errno::from_system(System::EDQUOT as i32), Errno::NoSpc);
    assert_eq!(Errno::from_system(System::EFBIG as i32), Errno::NoSpc);
    assert_eq!(Errno::from_system(System::EROFS as i32), Errno::Perm);
    assert_eq!(Errno::from_system(System::ENOENT as i32), Errno::Io);
    assert_eq!(Errno::from_wire(2), Errno::Inval);
}

proptest! {
    #[test]
    fn parsers_never_panic(option in 0u32..16, data in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = ClientOption::parse(option, &data);
        let _ = ReplyHeader::parse(&data);
    }

    #[test]
    fn info_requests_survive_the_wire(name in "[^\0]{0,100}", wanted in prop::collection::vec(any::<u16>(), 0..50)) {
        let request = InfoRequest { name, wanted };
        let mut out = BytesMut::new();
        request.encode(&mut out);
        prop_assert_eq!(ClientOption::parse(option::GO, &out), Ok(ClientOption::Go(request)));
    }

    #[test]
    fn meta_requests_survive_the_wire(name in "[^\0]{0,100}", queries in prop::collection::vec("[^\0]{0,40}", 0..9)) {
        let request = MetaContextRequest { name, queries };
        let mut out = BytesMut::new();
        request.encode(&mut out);
        let parsed = ClientOption::parse(option::SET_META_CONTEXT, &out);
        prop_assert_eq!(parsed, Ok(ClientOption::SetMetaContext(request)));
    }

    #[test]
    fn requests_survive_the_wire(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) {
        let request =
            Request { flags, command: Command::from_wire(command), cookie, offset, length };
        let mut out = BytesMut::new();
        request.encode(&mut out);
        let raw = out.first_chunk().expect("28 bytes");
        prop_assert_eq!(Request::parse(raw), Some(request));
    }
}
