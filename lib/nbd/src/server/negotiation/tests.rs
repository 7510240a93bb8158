//! Option sequences and their answers.

use super::*;
use crate::export::Features;
use crate::proto::options::{MetaContextRequest, OptionReplyHeader};

const FIXED: ClientFlags = ClientFlags { fixed_newstyle: true, no_zeroes: true };

/// The replies in `out`: option, type, data.
fn replies(out: &mut BytesMut) -> Vec<(u32, u32, Vec<u8>)> {
    let mut replies = Vec::new();
    while let Some(raw) = out.first_chunk() {
        let header = OptionReplyHeader::parse(raw).expect("the reply magic");
        let _ = out.split_to(raw.len());
        let data = out.split_to(header.length as usize).to_vec();
        replies.push((header.option, header.kind, data));
    }
    assert!(out.is_empty(), "a reply is whole");
    replies
}

/// Gives one option; the step, and the types of the replies.
fn give(negotiation: &mut Negotiation, option: u32, data: &[u8]) -> (Step, Vec<u32>) {
    let mut out = BytesMut::new();
    let step = negotiation.option(option, data, &mut out);
    let kinds = replies(&mut out).into_iter().map(|(answered, kind, _)| {
        assert_eq!(answered, option);
        kind
    });
    (step, kinds.collect())
}

fn meta(export: &str, query: &str) -> BytesMut {
    let mut data = BytesMut::new();
    MetaContextRequest { name: export.into(), queries: vec![query.into()] }.encode(&mut data);
    data
}

const ACK: u32 = ReplyType::Ack as u32;
const CONTEXT: u32 = ReplyType::MetaContext as u32;
const INVALID: u32 = ReplyType::ErrInvalid as u32;

#[test]
fn required_tls_answers_nothing_before_it() {
    let mut negotiation = Negotiation::new(FIXED, TlsState::Required);
    let required = (Step::Continue, vec![ReplyType::ErrTlsReqd as u32]);
    for number in [option::LIST, option::INFO, option::GO, option::STRUCTURED_REPLY, 10, 99] {
        assert_eq!(give(&mut negotiation, number, b"junk"), required);
    }
    assert!(matches!(give(&mut negotiation, option::EXPORT_NAME, b"disk").0, Step::End(_)));
    assert_eq!(give(&mut negotiation, option::STARTTLS, b""), (Step::StartTls, vec![ACK]));
    let mut negotiation = negotiation.after_tls();
    assert_eq!(give(&mut negotiation, option::LIST, b"").0, Step::List);
    assert_eq!(give(&mut negotiation, option::STARTTLS, b""), (Step::Continue, vec![INVALID]));
}

#[test]
fn tls_forgets_what_was_negotiated_in_the_clear() {
    let mut negotiation = Negotiation::new(FIXED, TlsState::Offered);
    give(&mut negotiation, option::STRUCTURED_REPLY, b"");
    give(&mut negotiation, option::SET_META_CONTEXT, &meta("disk", "base:allocation"));
    assert!(negotiation.structured() && negotiation.allocation_selected("disk"));
    let negotiation = negotiation.after_tls();
    assert!(!negotiation.structured() && !negotiation.allocation_selected("disk"));
}

#[test]
fn tls_that_is_off_is_refused_and_never_demanded() {
    let mut negotiation = Negotiation::new(FIXED, TlsState::Off);
    let policy = ReplyType::ErrPolicy as u32;
    assert_eq!(give(&mut negotiation, option::STARTTLS, b""), (Step::Continue, vec![policy]));
    let mut out = BytesMut::new();
    negotiation.refused(Opening::Go, &OpenError::tls_required("no"), &mut out);
    assert_eq!(replies(&mut out), [(option::GO, policy, b"no".to_vec())]);
}

#[test]
fn contexts_need_structured_replies_and_belong_to_one_export() {
    let mut negotiation = Negotiation::new(FIXED, TlsState::Off);
    let ask = meta("disk", "base:allocation");
    for number in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
        assert_eq!(give(&mut negotiation, number, &ask), (Step::Continue, vec![INVALID]));
    }
    give(&mut negotiation, option::STRUCTURED_REPLY, b"");
    let set = option::SET_META_CONTEXT;
    assert_eq!(give(&mut negotiation, set, &ask).1, [CONTEXT, ACK]);
    assert!(negotiation.allocation_selected("disk"));
    assert!(!negotiation.allocation_selected("other"));
    // A wildcard lists but does not select, and a new choice replaces the old one.
    let wild = meta("disk", "base:");
    assert_eq!(give(&mut negotiation, option::LIST_META_CONTEXT, &wild).1, [CONTEXT, ACK]);
    assert!(negotiation.allocation_selected("disk"));
    assert_eq!(give(&mut negotiation, set, &wild).1, [ACK]);
    assert!(!negotiation.allocation_selected("disk"));
    // So does one that fails.
    give(&mut negotiation, set, &ask);
    assert_eq!(give(&mut negotiation, set, b"\0").1, [INVALID]);
    assert!(!negotiation.allocation_selected("disk"));
    assert_eq!(give(&mut negotiation, set, &meta("disk", "x-other:thing")).1, [ACK]);
}

#[test]
fn unknown_options_are_unsupported_and_abort_is_acknowledged() {
    let mut negotiation = Negotiation::new(FIXED, TlsState::Off);
    let unsupported = ReplyType::ErrUnsup as u32;
    for number in [0, 4, 11, u32::MAX] {
        assert_eq!(give(&mut negotiation, number, b"x"), (Step::Continue, vec![unsupported]));
    }
    let (step, kinds) = give(&mut negotiation, option::ABORT, b"ignored");
    assert!(matches!(step, Step::End(_)));
    assert_eq!(kinds, [ACK]);
}

#[test]
fn a_client_without_fixed_newstyle_has_one_option() {
    let flags = ClientFlags { fixed_newstyle: false, no_zeroes: false };
    let mut negotiation = Negotiation::new(flags, TlsState::Off);
    assert!(matches!(give(&mut negotiation, option::LIST, b"").0, Step::End(_)));
    let step = give(&mut negotiation, option::EXPORT_NAME, b"disk").0;
    let request = InfoRequest { name: "disk".into(), wanted: vec![] };
    assert_eq!(step, Step::Open { how: Opening::Bare, request });
}

#[test]
fn go_tells_what_was_asked_for() {
    let mut negotiation = Negotiation::new(FIXED, TlsState::Off);
    let export = ExportInfo {
        size: 1 << 20,
        features: Features { read_only: true, trim: true, ..Features::default() },
        canonical_name: Some("disk@7".into()),
        description: Some("words".into()),
        ..ExportInfo::default()
    };
    let answer = |negotiation: &Negotiation, wanted: &[u16]| {
        let mut out = BytesMut::new();
        let request = InfoRequest { name: "disk".into(), wanted: wanted.to_vec() };
        negotiation.opened(Opening::Go, &request, &export, &mut out);
        replies(&mut out)
    };
    let plain = answer(&negotiation, &[]);
    assert_eq!(plain.len(), 3, "export, block sizes, ack");
    assert_eq!(plain[0].2, [0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 3], "no trim when read-only");
    assert_eq!(plain[2].1, ACK);
    give(&mut negotiation, option::STRUCTURED_REPLY, b"");
    let full = answer(&negotiation, &[info::NAME, info::DESCRIPTION, 77]);
    assert_eq!(full[0].2[10..], [0, 0x83], "DF comes with structured replies");
    assert_eq!(full[1].2, b"\0\x01disk@7");
    assert_eq!(full[2].2, b"\0\x02words");
}
