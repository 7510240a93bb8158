use std::collections::BTreeMap;
use std::path::Path;

use proptest::prelude::*;
use serde::Deserialize;

use super::*;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sample {
    #[serde(default)]
    ring_bytes: Bytes,
    #[serde(default)]
    age: Seconds,
    name: Option<Name>,
    front: Option<Front>,
    #[serde(default)]
    volume: Vec<BTreeMap<String, toml::Spanned<String>>>,
}

#[derive(Debug, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case")]
enum Front {
    NbdKernel,
    NbdSocket,
}

fn sample(text: &str) -> Result<Sample, ConfigError> {
    Source::new(Path::new("/etc/x.toml"), text).parse()
}

fn complaint(text: &str) -> String {
    sample(text).unwrap_err().to_string()
}

#[test]
fn an_unknown_key_is_refused_with_its_line_and_what_was_meant() {
    assert_eq!(
        complaint("age = 5\n\nring_byte = 1\n"),
        "/etc/x.toml, line 3: unknown key 'ring_byte'; did you mean 'ring_bytes'?\n\
        \x20   3 | ring_byte = 1\n\
        \x20     | ^^^^^^^^^"
    );
    assert_eq!(
        complaint("zzz = 1").lines().next(),
        Some(
            "/etc/x.toml, line 1: unknown key 'zzz'; known here: ring_bytes, age, name, front, volume"
        )
    );
}

#[test]
fn a_wrong_value_is_shown_where_it_stands() {
    let told = complaint("\tname = \"ok\"\n\tring_bytes = \"1 Gib\"");
    assert!(told.contains("line 2: '1 Gib' is not a size"), "{told}");
    assert!(
        told.ends_with("    2 |  ring_bytes = \"1 Gib\"\n      |               ^^^^^^^"),
        "{told}"
    );
    let told = complaint("front = \"nbd-kernal\"");
    assert!(told.contains("unknown value 'nbd-kernal'; did you mean 'nbd-kernel'?"), "{told}");
    let told = complaint("name = \"Db\"");
    assert!(told.contains("'Db' is not a name: 1 to 63 of a-z"), "{told}");
    let told = complaint("age = -1");
    assert!(told.contains("line 1: invalid value: integer `-1`, expected a time"), "{told}");
}

#[test]
fn what_is_no_toml_is_shown_too() {
    let told = complaint("age = 1\nage = 2\n");
    assert!(told.starts_with("/etc/x.toml, line 2: duplicate key"), "{told}");
    assert!(complaint("age = ").starts_with("/etc/x.toml, line 1: "));
}

#[test]
fn a_spanned_value_can_be_complained_about() {
    let source = Source::new(Path::new("g.toml"), "[[volume]]\nbacking = \"/dev/é\" # x\n");
    let sample: Sample = source.parse().unwrap();
    let value = &sample.volume[0]["backing"];
    assert_eq!(
        source.fault(value.span(), "there is no such disk").to_string(),
        "g.toml, line 2: there is no such disk\n\
        \x20   2 | backing = \"/dev/é\" # x\n\
        \x20     |           ^^^^^^^^"
    );
}

#[test]
fn sizes_and_times_take_numbers_and_units() {
    let read =
        sample("ring_bytes = \"256 MiB\"\nage = \"12h\"\nfront = \"nbd-socket\"\nname = \"x\"")
            .unwrap();
    assert_eq!((read.ring_bytes, read.age), (Bytes(256 << 20), Seconds(12 * 3600)));
    assert_eq!(read.front, Some(Front::NbdSocket));
    assert_eq!(read.name.unwrap().to_string(), "x");
    assert_eq!(sample("ring_bytes = 7").unwrap().ring_bytes, Bytes(7));
    for bad in ["", "x", "1 Mib", "1.5 GiB", "-1", "99999999999 TiB", "1 GiB 2"] {
        assert!(bad.parse::<Bytes>().is_err(), "{bad}");
    }
    assert_eq!(Bytes(3 << 30).to_string(), "3 GiB");
    assert_eq!(Seconds(5400).to_string(), "90 min");
}

#[test]
fn names_are_what_every_place_can_hold() {
    for good in ["a", "db-1", "0", &"x".repeat(63)] {
        assert_eq!(good.parse::<Name>().unwrap().as_str(), good);
    }
    for bad in ["", "-a", "a-", "A", "a_b", "a/b", "..", "ä", &"x".repeat(64)] {
        assert!(bad.parse::<Name>().is_err(), "{bad}");
    }
}

#[test]
fn a_directory_gives_its_files_in_order() {
    let directory = tempfile::tempdir().unwrap();
    assert!(files_in(&directory.path().join("missing")).unwrap_err().is_missing());
    for name in ["b.toml", "a.toml", ".hidden.toml", "c.toml.new", "toml"] {
        fs::write(directory.path().join(name), "").unwrap();
    }
    let names: Vec<_> = files_in(directory.path())
        .unwrap()
        .iter()
        .map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
        .collect();
    assert_eq!(names, ["a.toml", "b.toml"]);
}

proptest! {
    #[test]
    fn any_text_gives_a_complaint_or_values(text in "\\PC*|[a-z_]{1,12} = [\"a-z0-9\\[\\]\n]{0,20}") {
        if let Err(error) = sample(&text) {
            prop_assert!(error.to_string().starts_with("/etc/x.toml"));
        }
    }

    #[test]
    fn a_size_and_a_time_read_back_as_written(value: u64) {
        prop_assert_eq!(Bytes(value).to_string().parse::<Bytes>().unwrap(), Bytes(value));
        prop_assert_eq!(Seconds(value).to_string().parse::<Seconds>().unwrap(), Seconds(value));
    }
}
