use std::{num::NonZeroU64, time::Duration};

use super::*;

fn minute(text: &str) -> Minute {
    text.parse().unwrap()
}

fn rate(bytes: u64) -> Option<NonZeroU64> {
    NonZeroU64::new(bytes)
}

#[test]
fn times_of_day_are_read_and_written() {
    assert_eq!(minute("00:00"), Minute(0));
    assert_eq!(minute("23:59"), Minute(1439));
    assert_eq!(String::from(minute("07:05")), "07:05");
    assert_eq!(Minute::of_second(86_399), minute("23:59"));
    assert_eq!(Minute::of_second(86_400), minute("00:00"));
    for bad in ["", "7:05", "24:00", "12:60", "12-30", "1a:00", "+1:00", "12:3", "12:030"] {
        assert!(bad.parse::<Minute>().is_err(), "{bad:?}");
    }
}

#[test]
fn windows_hold_by_the_time_of_day() {
    let schedule = Schedule {
        bytes_per_second: rate(1000),
        windows: vec![
            Window { from: minute("22:00"), to: minute("06:00"), bytes_per_second: None },
            Window { from: minute("12:00"), to: minute("13:00"), bytes_per_second: rate(500) },
            Window { from: minute("12:30"), to: minute("14:00"), bytes_per_second: rate(1) },
        ],
    };
    for (time, expected) in [
        ("21:59", rate(1000)),
        ("22:00", None),
        ("00:00", None),
        ("05:59", None),
        ("06:00", rate(1000)),
        ("12:45", rate(500)),
        ("13:00", rate(1)),
        ("14:00", rate(1000)),
    ] {
        assert_eq!(schedule.rate(minute(time)), expected, "at {time}");
    }
    let all_day = Window { from: minute("09:00"), to: minute("09:00"), bytes_per_second: rate(2) };
    let schedule = Schedule { bytes_per_second: None, windows: vec![all_day] };
    for second in (0..86_400).step_by(60) {
        assert_eq!(schedule.rate(Minute::of_second(second)), rate(2));
    }
}

#[test]
fn a_schedule_is_read_from_configuration() {
    let text = r#"{"bytes_per_second": 5, "windows": [{"from": "22:00", "to": "06:00"}]}"#;
    let schedule: Schedule = serde_json::from_str(text).unwrap();
    assert_eq!(schedule.rate(minute("23:00")), None);
    assert_eq!(schedule.rate(minute("10:00")), rate(5));
    for bad in
        [r#"{"rate": 5}"#, r#"{"bytes_per_second": 0}"#, r#"{"windows": [{"from": "22:00"}]}"#]
    {
        assert!(serde_json::from_str::<Schedule>(bad).is_err(), "{bad}");
    }
}

#[test]
fn the_rate_is_kept_to_over_time() {
    let noon = minute("12:00");
    let schedule = Schedule { bytes_per_second: rate(1_000_000), windows: Vec::new() };
    let mut throttle = Throttle::new(schedule);
    let piece = throttle.piece_bytes(noon);
    assert_eq!(piece, 50_000, "a twentieth of a second's worth");
    let (mut now, mut sent) = (Duration::from_secs(7), 0);
    while sent < 10_000_000 {
        now += throttle.take(piece, now, noon);
        sent += piece;
    }
    // Ten seconds' worth, less a burst of 100 ms and the last piece, which need not be paid for.
    let took = now - Duration::from_secs(7);
    assert!((9_800..=9_900).contains(&took.as_millis()), "{took:?}");
}

#[test]
fn a_pause_earns_no_more_than_a_burst() {
    let noon = minute("12:00");
    let schedule = Schedule { bytes_per_second: rate(1_000_000), windows: Vec::new() };
    let mut throttle = Throttle::new(schedule);
    throttle.take(10_000, Duration::from_secs(1), noon);
    let later = Duration::from_secs(3600);
    assert_eq!(throttle.take(1_000_000, later, noon), Duration::ZERO);
    assert_eq!(throttle.take(1, later, noon), Duration::from_millis(900));
}

#[test]
fn unlimited_costs_nothing_and_owes_nothing() {
    let noon = minute("12:00");
    let mut throttle = Throttle::new(Schedule::default());
    let now = Duration::from_secs(1);
    assert_eq!(throttle.take(usize::MAX >> 1, now, noon), Duration::ZERO);
    throttle.set_schedule(Schedule { bytes_per_second: rate(1), windows: Vec::new() });
    assert_eq!(throttle.take(1, now, noon), Duration::ZERO);
    assert_eq!(throttle.take(usize::MAX >> 1, now, noon), Duration::from_millis(900));
    assert!(throttle.take(1, now, noon) > Duration::from_secs(1 << 33), "no overflow");
    assert_eq!(throttle.piece_bytes(noon), 4096);
}
