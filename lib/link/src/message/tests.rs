//! Golden bytes of every message, round trips, and what hostile bytes do.

use std::time::Duration;

use proptest::{collection::vec, option, prelude::*};
use tidemark_journal::{Ancestry, GroupId, Position, Seq, TermId, VolumeId};

use super::*;

mod bounds;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn encoded(message: &Message) -> Vec<u8> {
    let mut bytes = b"before".to_vec();
    message.encode(&mut bytes).unwrap();
    assert!(bytes.starts_with(b"before"), "encoding appends");
    bytes.split_off(6)
}

/// All messages in `bytes`, fed in pieces of `step`.
fn decoded(bytes: &[u8], step: usize) -> Result<Vec<Message>, DecodeError> {
    let (mut decoder, mut messages) = (Decoder::new(), Vec::new());
    let (mut fed, mut complete) = (0, 0);
    for mut piece in bytes.chunks(step) {
        while !piece.is_empty() {
            let (taken, message) = decoder.feed(piece)?;
            assert!(taken > 0 && taken <= piece.len());
            (piece, fed) = (&piece[taken..], fed + taken);
            if let Some(message) = message {
                messages.push(message);
                complete = fed;
            }
        }
    }
    assert_eq!(decoder.in_message(), complete < fed);
    Ok(messages)
}

fn hello() -> Hello {
    let ancestry = Ancestry::root(TermId([1; 16])).fork(TermId([2; 16]), Seq(100)).unwrap();
    Hello {
        protocol: ProtocolRange { min: 1, max: 1 },
        features: vec!["relay".into()],
        software: "0.1.0".into(),
        group: GroupHello { id: GroupId([0xab; 16]), name: "db".into() },
        ancestry,
        volumes: vec![VolumeHello {
            id: VolumeId(1),
            name: "data".into(),
            sectors: 2048,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
        }],
        acked: Position { term: TermId([2; 16]), seq: Seq(150) },
        ceiling: Seq(1 << 20),
        map_generation: 7,
    }
}

fn welcome() -> Welcome {
    Welcome {
        protocol: 1,
        features: Vec::new(),
        software: "0.1.0".into(),
        position: Some(Position { term: TermId([2; 16]), seq: Seq(160) }),
        path: Some(Ancestry::root(TermId([2; 16]))),
        map_generation: 6,
        volumes: vec![VolumeSize { id: VolumeId(1), sectors: 2048 }],
    }
}

/// One message of each kind with its bytes: the envelope in hex, then the body in hex or as JSON.
fn golden() -> Vec<(Message, &'static str, &'static str)> {
    let mut need = Need::nothing(Seq(0x0102));
    [0, 9, 255].into_iter().for_each(|block| need.want(block));
    vec![
        (
            Message::Hello(hello()),
            "0100010024020000",
            r#"{"protocol":{"min":1,"max":1},"features":["relay"],"software":"0.1.0","group":{"id":"abababababababababababababababab","name":"db"},"ancestry":[{"id":"01010101010101010101010101010101","parent":"00000000000000000000000000000000","fork_seq":0},{"id":"02020202020202020202020202020202","parent":"01010101010101010101010101010101","fork_seq":100}],"volumes":[{"id":1,"name":"data","sectors":2048,"logical_block_bytes":512,"physical_block_bytes":4096}],"acked":{"term":"02020202020202020202020202020202","seq":150},"ceiling":1048576,"map_generation":7}"#,
        ),
        (
            Message::Welcome(welcome()),
            "0200010013010000",
            r#"{"protocol":1,"features":[],"software":"0.1.0","position":{"term":"02020202020202020202020202020202","seq":160},"path":[{"id":"02020202020202020202020202020202","parent":"00000000000000000000000000000000","fork_seq":0}],"map_generation":6,"volumes":[{"id":1,"sectors":2048}]}"#,
        ),
        (
            Message::Refuse(Refuse::new(RefuseCode::SizeMismatch, "no")),
            "0300010028000000",
            r#"{"code":"size_mismatch","sentence":"no"}"#,
        ),
        (Message::Frame(vec![0xca, 0xfe, 0x01]), "0400010003000000", "cafe01"),
        (
            Message::Ack(Ack {
                term: TermId([0x11; 16]),
                hop_received: Seq(0x0504_0302_0103),
                hop_durable: Seq(2),
                final_durable: Seq(1),
                flags: AckFlags { full: true },
            }),
            "0500010030000000",
            "11111111111111111111111111111111030102030405000002000000000000000100000000000000\
             0100000000000000",
        ),
        (
            Message::Heartbeat(Heartbeat {
                number: 1,
                journal_ns: 2,
                wall_ns: -3,
                vouched: Position { term: TermId([0x22; 16]), seq: Seq(4) },
                map_generation: 5,
            }),
            "0600010038000000",
            "01000000000000000200000000000000fdffffffffffffff22222222222222222222222222222222\
             04000000000000000500000000000000",
        ),
        (
            Message::Echo(Echo { number: 1, received_wall_ns: -2 }),
            "0700010010000000",
            "0100000000000000feffffffffffffff",
        ),
        (
            Message::Need(need),
            "0800010028000000",
            "02010000000000000102000000000000000000000000000000000000000000000000000000000080",
        ),
        (
            Message::Notice(Notice::new(Severity::Warning, "disk \"a\" is slow")),
            "0900010036000000",
            r#"{"severity":"warning","sentence":"disk \"a\" is slow"}"#,
        ),
        (Message::Bye, "0a00010000000000", ""),
        (
            Message::Repair(Repair {
                runs: vec![RegionRun { volume: VolumeId(1), first: 2, regions: 3 }],
            }),
            "0b0001000c000000",
            "010000000200000003000000",
        ),
        (Message::LeaseAsk(LeaseAsk { number: 0x0102 }), "0c00010008000000", "0201000000000000"),
        (
            Message::LeaseGrant(LeaseGrant { number: 0x0304, lease: Duration::from_secs(2) }),
            "0d00010010000000",
            "04030000000000000094357700000000",
        ),
    ]
}

#[test]
fn the_bytes_of_every_kind_are_pinned() {
    for ((message, envelope, body), kind) in golden().into_iter().zip(MessageKind::ALL) {
        assert_eq!(message.kind(), kind);
        let bytes = encoded(&message);
        assert_eq!(hex(&bytes[..8]), envelope, "the envelope of {kind:?}");
        let text = String::from_utf8_lossy(&bytes[8..]);
        if body.starts_with('{') {
            assert_eq!(text, body, "the body of {kind:?}");
        } else {
            assert_eq!(hex(&bytes[8..]), body, "the body of {kind:?}");
        }
        for step in [1, 7, 8, 9, bytes.len()] {
            assert_eq!(
                decoded(&bytes, step).unwrap(),
                std::slice::from_ref(&message),
                "{kind:?} by {step}"
            );
        }
    }
}

#[test]
fn several_messages_in_a_row_come_apart_however_they_are_cut() {
    let messages: Vec<_> = golden().into_iter().map(|(message, ..)| message).collect();
    let bytes: Vec<u8> = messages.iter().flat_map(encoded).collect();
    for step in 1..bytes.len() {
        assert_eq!(decoded(&bytes, step).unwrap(), messages);
    }
}

#[test]
fn a_cut_message_is_never_a_message() {
    for (message, ..) in golden() {
        let bytes = encoded(&message);
        for length in 0..bytes.len() {
            assert_eq!(decoded(&bytes[..length], 5).unwrap(), [], "{length} of {message:?}");
        }
    }
}

#[test]
fn what_an_envelope_may_say_is_bounded() {
    let check = |kind: u8, flags: u8, version: u16, body_bytes: u32| {
        let (version, body_bytes) = (version.into(), body_bytes.into());
        Envelope { kind, flags, version, body_bytes }.check()
    };
    assert_eq!(check(0, 0, 1, 0), Err(DecodeError::Kind(0)));
    assert_eq!(check(14, 0, 1, 0), Err(DecodeError::Kind(14)));
    assert!(matches!(check(10, 1, 1, 0), Err(DecodeError::Layout { .. })));
    assert!(matches!(check(10, 0, 2, 0), Err(DecodeError::Layout { version: 2, .. })));
    for kind in MessageKind::ALL {
        assert_eq!(MessageKind::from_u8(kind as u8), Some(kind));
        let (min, max) = kind.body_bytes();
        let (few, many) = (min as u32, max as u32);
        assert_eq!(check(kind as u8, 0, 1, many), Ok((kind, max)));
        assert_eq!(check(kind as u8, 0, 1, few), Ok((kind, min)));
        let too_many = DecodeError::Length { kind, bytes: max + 1 };
        assert_eq!(check(kind as u8, 0, 1, many + 1), Err(too_many));
        assert!(few == 0 || check(kind as u8, 0, 1, few - 1).is_err());
        assert!(check(kind as u8, 0, 1, u32::MAX).is_err());
    }
}

#[test]
fn what_is_too_long_is_not_sent() {
    let mut out = vec![1, 2];
    let long = Message::Notice(Notice::new(Severity::Info, "x".repeat(20_000)));
    let error = long.encode(&mut out).unwrap_err();
    assert_eq!((error.kind, error.max), (MessageKind::Notice, 16 << 10));
    assert_eq!(out, [1, 2]);
}

#[test]
fn a_claimed_length_takes_no_memory_before_its_bytes_come() {
    let mut decoder = Decoder::new();
    let envelope = Envelope::new(MessageKind::Frame, 24 << 20).unwrap();
    decoder.feed(envelope.as_bytes()).unwrap();
    decoder.feed(&[1, 2, 3]).unwrap();
    assert!(decoder.body.capacity() <= BODY_STEP_BYTES);
}

fn refused(kind: MessageKind, body: &str) -> String {
    match Message::decode(kind, body.as_bytes().to_vec()) {
        Err(DecodeError::Body { why, .. }) => why,
        other => panic!("{other:?}"),
    }
}

/// Who has not greeted yet may not have the other side set room aside for a frame.
#[test]
fn a_decoder_takes_no_longer_body_than_it_was_told() {
    let longest = MessageKind::Hello.body_bytes().1;
    let mut decoder = Decoder::new();
    decoder.set_body_bytes_max(longest);
    let envelope = Envelope::new(MessageKind::Frame, longest + 1).expect("a frame may be as long");
    let refused = decoder.feed(envelope.as_bytes()).expect_err("before any of the body has come");
    assert_eq!(refused, DecodeError::Length { kind: MessageKind::Frame, bytes: longest + 1 });
    let mut decoder = Decoder::new();
    decoder.set_body_bytes_max(longest);
    let envelope = Envelope::new(MessageKind::Frame, longest).expect("a frame may be as long");
    assert_eq!(decoder.feed(envelope.as_bytes()), Ok((ENVELOPE_BYTES, None)));
}

#[test]
fn a_hello_that_contradicts_itself_is_refused() {
    let change = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut value = serde_json::to_value(hello()).unwrap();
        change(&mut value);
        refused(MessageKind::Hello, &value.to_string())
    };
    assert!(change(&|v| v["protocol"]["min"] = 2.into()).contains("protocols"));
    assert!(change(&|v| v["ancestry"] = serde_json::json!([])).contains("follow"));
    assert!(change(&|v| v["ancestry"][1]["parent"] = "03".repeat(16).into()).contains("follow"));
    assert!(change(&|v| v["group"]["id"] = "xyz".into()).contains("hexadecimal"));
    assert!(change(&|v| v["group"]["name"] = "a/b".into()).contains("name"));
    assert!(change(&|v| v["group"]["name"] = "".into()).contains("name"));
    assert!(change(&|v| v["volumes"][0]["name"] = "a@b".into()).contains("name"));
    assert!(change(&|v| v["volumes"][0]["sectors"] = 0.into()).contains("size"));
    assert!(change(&|v| v["volumes"][0]["sectors"] = ((1u64 << 48) + 1).into()).contains("size"));
    assert!(change(&|v| v["volumes"][0]["logical_block_bytes"] = 513.into()).contains("block"));
    assert!(
        change(&|v| {
            let volume = v["volumes"][0].clone();
            v["volumes"].as_array_mut().unwrap().push(volume);
        })
        .contains("twice")
    );
    assert!(change(&|v| v["ceiling"] = (-1).into()).contains("integer"));
    assert!(change(&|v| drop(v.as_object_mut().unwrap().remove("acked"))).contains("acked"));
}

#[test]
fn a_newer_peer_may_say_more() {
    let mut value = serde_json::to_value(hello()).unwrap();
    value["a_later_field"] = 1.into();
    let body = value.to_string().into_bytes();
    assert_eq!(Message::decode(MessageKind::Hello, body).unwrap(), Message::Hello(hello()));
    let refuse = br#"{"code":"a_later_code","sentence":"no"}"#.to_vec();
    let refuse = Message::decode(MessageKind::Refuse, refuse).unwrap();
    assert_eq!(refuse, Message::Refuse(Refuse::new(RefuseCode::Other, "no")));
    let notice = br#"{"severity":"a_later_one","sentence":"no"}"#.to_vec();
    let notice = Message::decode(MessageKind::Notice, notice).unwrap();
    assert_eq!(notice, Message::Notice(Notice::new(Severity::Error, "no")));
    for severity in [Severity::Info, Severity::Warning, Severity::Error] {
        let message = Message::Notice(Notice::new(severity, "same"));
        assert_eq!(decoded(&encoded(&message), 100).unwrap(), [message]);
    }
}

#[test]
fn sentences_of_a_peer_are_fit_for_a_terminal() {
    let refuse = Refuse::new(RefuseCode::Other, format!("a\n\u{1b}[31mb{}", "c".repeat(2000)));
    let bytes = encoded(&Message::Refuse(refuse));
    let messages = decoded(&bytes, 100).unwrap();
    let [Message::Refuse(refuse)] = &messages[..] else { panic!("{messages:?}") };
    assert!(refuse.sentence.starts_with("a\u{fffd}\u{fffd}[31mbccc"));
    assert_eq!(refuse.sentence.chars().count(), SENTENCE_CHARS_MAX);
}

#[test]
fn an_ack_that_contradicts_itself_is_refused() {
    let ack = |hop_received: u64, hop_durable: u64, final_durable: u64| {
        let message = Message::Ack(Ack {
            term: TermId([1; 16]),
            hop_received: Seq(hop_received),
            hop_durable: Seq(hop_durable),
            final_durable: Seq(final_durable),
            flags: AckFlags::default(),
        });
        decoded(&encoded(&message), 100)
    };
    assert!(ack(5, 5, 5).is_ok() && ack(5, 0, 5).is_ok() && ack(0, 0, 0).is_ok());
    assert!(ack(5, 6, 5).is_err() && ack(5, 5, 6).is_err());
    let mut bytes = encoded(&Message::Ack(Ack {
        term: TermId([1; 16]),
        hop_received: Seq(1),
        hop_durable: Seq(1),
        final_durable: Seq(1),
        flags: AckFlags::default(),
    }));
    bytes[8 + 40] = 2;
    assert!(decoded(&bytes, 100).is_err(), "an unknown flag");
}

#[test]
fn the_newest_common_protocol_is_chosen() {
    let range = |min, max| ProtocolRange { min, max };
    assert_eq!(range(1, 3).common(range(2, 5)), Some(3));
    assert_eq!(range(2, 5).common(range(1, 3)), Some(3));
    assert_eq!(range(1, 1).common(range(2, 5)), None);
    assert_eq!(ProtocolRange::OWN.common(ProtocolRange::OWN), Some(PROTOCOL_MAX));
}

#[test]
fn needs_name_blocks() {
    let mut need = Need::nothing(Seq(1));
    assert!(need.is_empty());
    [3, 200, 255].into_iter().for_each(|block| need.want(block));
    assert_eq!(need.wanted().collect::<Vec<_>>(), [3, 200, 255]);
    assert!(!need.is_empty() && need.wants(200) && !need.wants(4) && !need.wants(256));
}

/// What any message may carry as a sequence or a generation.
fn any_count() -> impl Strategy<Value = u64> + Clone {
    0..=Seq::MAX.0 / 2
}

fn any_position() -> impl Strategy<Value = Position> {
    (any::<[u8; 16]>(), any_count())
        .prop_map(|(term, seq)| Position { term: TermId(term), seq: Seq(seq) })
}

fn any_message() -> impl Strategy<Value = Message> {
    let counts = (any_count(), any_count(), any_count());
    let ack =
        (any::<[u8; 16]>(), counts, any::<bool>()).prop_map(|(term, (one, two, three), full)| {
            Message::Ack(Ack {
                term: TermId(term),
                hop_received: Seq(one.max(two).max(three)),
                hop_durable: Seq(two),
                final_durable: Seq(three),
                flags: AckFlags { full },
            })
        });
    let numbers = (any::<(u64, u64, i64)>(), any_count());
    let heartbeat = (numbers, any_position()).prop_map(|(numbers, vouched)| {
        let ((number, journal_ns, wall_ns), map_generation) = numbers;
        Message::Heartbeat(Heartbeat { number, journal_ns, wall_ns, vouched, map_generation })
    });
    let welcome = (option::of(any_position()), (any::<u16>(), any_count()), "[ -~]{0,20}")
        .prop_map(|(position, (protocol, map_generation), software)| {
            let mut welcome = welcome();
            welcome.position = position;
            (welcome.protocol, welcome.map_generation) = (protocol, map_generation);
            welcome.software = software;
            Message::Welcome(welcome)
        });
    let hello = (any_position(), (any_count(), any_count()), "[a-z]{1,20}", 1..=1u64 << 48)
        .prop_map(|(acked, (ceiling, map_generation), name, sectors)| {
            let mut hello = hello();
            (hello.acked, hello.ceiling) = (acked, Seq(ceiling));
            hello.map_generation = map_generation;
            hello.volumes[0].sectors = sectors;
            hello.group.name = name;
            Message::Hello(hello)
        });
    prop_oneof![
        ack,
        heartbeat,
        welcome,
        hello,
        any::<(u64, i64)>().prop_map(|(number, received_wall_ns)| {
            Message::Echo(Echo { number, received_wall_ns })
        }),
        (any_count(), any::<[u8; 32]>())
            .prop_map(|(seq, blocks)| Message::Need(Need { seq: Seq(seq), blocks })),
        vec(any::<u8>(), 1..5000).prop_map(Message::Frame),
        "\\PC{0,50}".prop_map(|text| Message::Notice(Notice::new(Severity::Info, text))),
        "\\PC{0,50}".prop_map(|text| Message::Refuse(Refuse::new(RefuseCode::Busy, text))),
        Just(Message::Bye),
        vec((any::<u16>(), any::<u16>(), 1..1_000_000u32), 1..20).prop_map(|runs| {
            let run = |(volume, first, regions): (u16, u16, u32)| RegionRun {
                volume: VolumeId(volume),
                first: first.into(),
                regions,
            };
            Message::Repair(Repair { runs: runs.into_iter().map(run).collect() })
        }),
    ]
}

proptest! {
    #[test]
    fn what_is_sent_arrives(messages in vec(any_message(), 0..6), step in 1usize..3000) {
        let bytes: Vec<u8> = messages.iter().flat_map(encoded).collect();
        prop_assert_eq!(decoded(&bytes, step).unwrap(), messages);
    }

    #[test]
    fn random_bytes_never_panic(bytes in vec(any::<u8>(), 0..300)) {
        let mut decoder = Decoder::new();
        let mut rest = &bytes[..];
        while let Ok((taken, _)) = decoder.feed(rest) {
            rest = &rest[taken..];
            if rest.is_empty() {
                break;
            }
        }
    }

    #[test]
    fn random_bodies_never_panic(kind in 0usize..MessageKind::ALL.len(), bytes in vec(any::<u8>(), 0..300)) {
        let _ = Message::decode(MessageKind::ALL[kind], bytes);
    }

    #[test]
    fn a_changed_byte_never_panics(message in any_message(), at in any::<usize>(), by in 1u8..) {
        let mut bytes = encoded(&message);
        let at = at % bytes.len();
        bytes[at] ^= by;
        let mut decoder = Decoder::new();
        let mut rest = &bytes[..];
        while let Ok((taken, _)) = decoder.feed(rest) {
            rest = &rest[taken..];
            if rest.is_empty() {
                break;
            }
        }
    }
}
