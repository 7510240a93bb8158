//! Numbers with which sums would overflow are refused when they come in, on either side.
//!
//! Sums wrap silently in a release build. A target that said that its replica ends at the last sequence
//! of 64 bits had its source begin the next term with sequence 0, before all that it had ever written; one
//! that named the highest generation had it count on from 0, so that every later greeting found the
//! source's own state to be an old one.

use super::*;

const HIGH: u64 = u64::MAX;

fn refused(kind: MessageKind, body: Vec<u8>) {
    let error = Message::decode(kind, body).expect_err("refused");
    assert!(matches!(error, DecodeError::Body { .. }), "{error}");
}

/// The same message with one of its numbers high.
fn json(message: impl serde::Serialize, change: impl FnOnce(&mut serde_json::Value)) -> Vec<u8> {
    let mut value = serde_json::to_value(message).unwrap();
    change(&mut value);
    serde_json::to_vec(&value).unwrap()
}

#[test]
fn a_greeting_with_impossible_numbers_is_refused() {
    let hello = |change: fn(&mut serde_json::Value)| json(hello(), change);
    refused(MessageKind::Hello, hello(|hello| hello["ceiling"] = HIGH.into()));
    refused(MessageKind::Hello, hello(|hello| hello["acked"]["seq"] = HIGH.into()));
    refused(MessageKind::Hello, hello(|hello| hello["ancestry"][1]["fork_seq"] = HIGH.into()));
    refused(MessageKind::Hello, hello(|hello| hello["map_generation"] = HIGH.into()));
    Message::decode(MessageKind::Hello, hello(|_| {})).expect("as it was, it is good");
}

#[test]
fn a_welcome_with_impossible_numbers_is_refused() {
    let welcome = |change: fn(&mut serde_json::Value)| json(welcome(), change);
    refused(MessageKind::Welcome, welcome(|welcome| welcome["position"]["seq"] = HIGH.into()));
    refused(MessageKind::Welcome, welcome(|welcome| welcome["map_generation"] = HIGH.into()));
    // The source needs room to go on above it.
    let last = |welcome: &mut serde_json::Value| welcome["position"]["seq"] = Seq::MAX.0.into();
    refused(MessageKind::Welcome, welcome(last));
    let last = |welcome: &mut serde_json::Value| welcome["path"][0]["fork_seq"] = Seq::MAX.0.into();
    refused(MessageKind::Welcome, welcome(last));
    Message::decode(MessageKind::Welcome, welcome(|_| {})).expect("as it was, it is good");
}

#[test]
fn what_is_said_in_between_has_possible_numbers() {
    let term = [2; 16];
    let ack = |received: u64| [&term[..], &received.to_le_bytes(), &[0; 24]].concat();
    refused(MessageKind::Ack, ack(HIGH));
    Message::decode(MessageKind::Ack, ack(Seq::MAX.0)).expect("the last there can be");
    let beat = |vouched: u64, generation: u64| {
        let numbers = [vouched.to_le_bytes(), generation.to_le_bytes()].concat();
        [&[0; 24][..], &term, &numbers].concat()
    };
    refused(MessageKind::Heartbeat, beat(HIGH, 1));
    refused(MessageKind::Heartbeat, beat(1, HIGH));
    Message::decode(MessageKind::Heartbeat, beat(1, 1)).expect("possible");
    let need = |seq: u64| [&seq.to_le_bytes()[..], &[0; 32]].concat();
    refused(MessageKind::Need, need(HIGH));
    Message::decode(MessageKind::Need, need(1)).expect("possible");
}
