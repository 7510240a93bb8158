use super::*;

const SECOND_NS: u64 = 1_000_000_000;

fn at(tenths: u64) -> Moment {
    Moment(tenths * SECOND_NS / 10)
}

#[test]
fn a_lease_lasts_from_the_asking() {
    let (mut asks, mut holder) = (Asks::default(), Holder::default());
    assert_eq!(holder.look(at(0), true), Claim::None);
    let number = asks.ask(at(10));
    // However late the grant comes.
    let until = asks.granted(number, LEASE).unwrap().expect("asked for");
    assert_eq!(until, at(30));
    holder.hold(until);
    assert_eq!(holder.look(at(29), true), Claim::Held);
    assert_eq!(holder.look(at(30), true), Claim::Until(at(30)));
    assert_eq!(holder.look(at(99), false), Claim::Until(at(30)), "what was said stays true");
}

#[test]
fn a_grant_answers_its_own_ask_alone() {
    let mut asks = Asks::default();
    let numbers: Vec<u64> = (0..3).map(|second| asks.ask(at(second * 10))).collect();
    assert_eq!(numbers, [1, 2, 3]);
    assert_eq!(asks.granted(4, LEASE), Err(Unasked(4)));
    assert_eq!(asks.granted(0, LEASE), Err(Unasked(0)));
    assert_eq!(asks.granted(2, LEASE), Ok(Some(at(30))));
    assert_eq!(asks.granted(2, LEASE), Ok(None), "once");
    assert_eq!(asks.granted(1, LEASE), Ok(None), "an older one was given up");
    assert_eq!(
        asks.granted(3, Duration::from_secs(3600)),
        Ok(Some(at(120))),
        "at most the longest"
    );
    for second in 0..100 {
        asks.ask(at(second));
    }
    assert_eq!(asks.open.len(), OPEN_MAX);
    assert_eq!(asks.granted(4, LEASE), Ok(None), "there were too many after it");
}

#[test]
fn where_it_is_not_sound_the_claim_ends_with_the_last_look_that_found_it_so() {
    let mut holder = Holder::default();
    holder.hold(at(20));
    assert_eq!(holder.look(at(5), true), Claim::Held);
    assert_eq!(holder.look(at(9), false), Claim::Until(at(5)));
    assert_eq!(holder.look(at(10), true), Claim::Until(at(5)), "not again without a grant");
    holder.hold(at(40));
    assert_eq!(holder.look(at(30), true), Claim::Held);
    let mut never = Holder::default();
    never.hold(at(20));
    assert_eq!(never.look(at(1), false), Claim::None);
}

#[test]
fn the_source_counts_longer_than_the_target() {
    assert_eq!(outlived_ns(0, LEASE), 2 * SECOND_NS + SECOND_NS / 10);
    assert_eq!(outlived_ns(u64::MAX, LEASE), u64::MAX);
}
