use std::fs;
use std::time::Duration;

use proptest::prelude::*;
use tidemark_control::agent::FrontKind;
use tidemark_journal::{Compression, VolumeId};
use tidemark_link::NodeName;
use tidemark_link::pki::Authority;

use super::*;

const NODE: &str = "node = \"db1\"\n";
const GROUP: &str = r#"
id = "5f0c3a9be1d24c7f8a6b0d9e2c4f1a37"
ring_bytes = "32 MiB"
compression = 3
catch_up_bytes_per_s = "50 MiB"
rpo_target_s = "1 min"
sync = true
sync_timeout = "2 s"
front = "nbd-socket"

[target]
address = "192.0.2.7"
name = "recovery"

[throttle]
bytes_per_second = 10000000
windows = [{ from = "08:00", to = "18:00", bytes_per_second = 1000000 }]

[[volume]]
id = 2
name = "log"
backing = "/dev/sdc"
front = "ublk"

[[volume]]
id = 1
name = "data"
backing = "/dev/sdb"
socket = "/run/data.sock"

[verify]
every = "7 d"
"#;

fn group(text: &str) -> Result<GroupConfig, ConfigError> {
    GroupConfig::parse(&Source::new(Path::new("/etc/tidemark/agent.d/shop.toml"), text))
}

fn node(text: &str) -> Result<NodeConfig, ConfigError> {
    NodeConfig::parse(&Source::new(Path::new("/etc/tidemark/agent.toml"), text))
}

fn directory(files: &[(&str, &str)]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join(GROUP_DIRECTORY)).unwrap();
    for (name, text) in files {
        fs::write(directory.path().join(name), text).unwrap();
    }
    directory
}

#[test]
fn a_group_is_read_whole() {
    let group = group(GROUP).unwrap();
    assert_eq!(group.name.as_str(), "shop");
    assert_eq!(group.target.address.to_string(), "192.0.2.7:7410");
    assert_eq!(group.ring_bytes.get(), 32 << 20);
    assert_eq!(group.active_regions.get(), 4096);
    assert_eq!(group.compression.0, Compression::Zstd(3));
    assert_eq!(group.catch_up_bytes_per_s.unwrap().get(), 50 << 20);
    assert_eq!(group.rpo_target_s.unwrap().0, 60);
    assert_eq!(group.sync_timeout.unwrap().get(), Duration::from_secs(2));
    assert_eq!(group.verify_every_s.unwrap().0, 7 * 86_400);
    assert_eq!(group.throttle.windows.len(), 1);
    let volumes: Vec<_> =
        group.volumes.iter().map(|v| (v.id, v.name.as_str(), v.front.kind())).collect();
    assert_eq!(
        volumes,
        [
            (VolumeId(1), "data", Some(FrontKind::NbdSocket)),
            (VolumeId(2), "log", Some(FrontKind::Ublk))
        ]
    );
}

#[test]
fn little_needs_to_be_said() {
    let least = "id = \"5f0c3a9be1d24c7f8a6b0d9e2c4f1a37\"\n\
                 target = { address = \"r:1\", name = \"r\" }\n\
                 volume = [{ id = 1, name = \"d\", backing = \"/dev/sdb\" }]\n";
    let group = group(least).unwrap();
    assert_eq!(group.ring_bytes.get(), 256 << 20);
    assert_eq!(group.compression.0, Compression::Zstd(1));
    assert_eq!((group.catch_up_bytes_per_s, group.rpo_target_s), (None, None));
    assert_eq!((group.front, group.sync_timeout), (FrontChoice::Auto, None));
    let in_sync = self::group(&format!("sync = true\n{least}")).unwrap();
    assert_eq!(in_sync.sync_timeout.unwrap().get(), Duration::from_secs(3));
    let node = node(NODE).unwrap();
    assert_eq!(node.api_socket, Path::new("/run/tidemark/agent.sock"));
    assert_eq!(node.tls.ca, Path::new("/etc/tidemark/pki/ca.pem"));
    assert_eq!(node.state_of(&group.name), Path::new("/var/lib/tidemark/agent/shop"));
    let socket = node.socket_of(&group.name, &group.volumes[0]);
    assert_eq!(socket, Path::new("/run/tidemark/nbd/shop/d.sock"));
}

#[test]
fn fewer_regions_may_be_active() {
    let text = GROUP.replace("compression = 3", "active_regions = 1024");
    assert_eq!(group(&text).unwrap().active_regions.get(), 1024);
}

#[test]
fn every_mistake_is_told_where_it_stands() {
    let cases = [
        (
            "ring_bytes = \"32 MiB\"",
            "ring_byte = 1",
            "line 3: unknown key 'ring_byte'; did you mean 'ring_bytes'?",
        ),
        (
            "\"32 MiB\"",
            "\"15 MiB\"",
            "line 3: a ring of 15 MiB is not possible: 16 MiB to 64 GiB are",
        ),
        (
            "compression = 3",
            "active_regions = 1023",
            "line 4: 1023 active regions are not possible: 1024 to 4096 are",
        ),
        ("compression = 3", "compression = 20", "line 4: 20 is not a compression"),
        ("compression = 3", "compression = \"of\"", "line 4: \"of\" is not a compression"),
        ("\"50 MiB\"", "0", "line 5: 'catch_up_bytes_per_s' of 0 would stop it"),
        ("\"2 s\"", "\"6 s\"", "line 8: answers cannot wait for 6 s: 1 to 5 seconds are possible"),
        ("sync = true", "sync = false", "line 8: a time to wait is of use with sync = true only"),
        (
            "front = \"nbd-socket\"",
            "front = \"nbd-sock\"",
            "line 9: unknown value 'nbd-sock'; did you mean 'nbd-socket'?",
        ),
        ("\"192.0.2.7\"", "\"192.0.2.7:0\"", "line 12: '192.0.2.7:0' is not an address"),
        ("\"recovery\"", "\"Recovery\"", "line 13: 'Recovery' is not a node name"),
        (
            "\"5f0c3a9be1d24c7f8a6b0d9e2c4f1a37\"",
            "\"5f\"",
            "line 2: '5f' is not an id: 32 hexadecimal",
        ),
        (
            "5f0c3a9be1d24c7f8a6b0d9e2c4f1a37",
            "00000000000000000000000000000000",
            "line 2: an id of zeros",
        ),
        ("from = \"08:00\"", "from = \"8:00\"", "'8:00' is not a time of day"),
        ("id = 1\n", "id = 2\n", "line 26: another volume of the group has this id"),
        ("\"data\"", "\"log\"", "line 27: another volume of the group has this name"),
        ("\"/dev/sdb\"", "\"/dev/sdc\"", "line 28: another volume of the group has this backing"),
        ("\"/dev/sdb\"", "\"sdb\"", "line 28: this must be a path that begins with '/'"),
        ("\"/run/data.sock\"", "\"data.sock\"", "line 29: this must be a path"),
        (
            "socket = \"/run/data.sock\"",
            "socket = \"/s\"\nfront = \"ublk\"",
            "line 29: a socket is of use with",
        ),
        ("\"7 d\"", "0", "line 32: an interval of 0 would never end"),
        ("name = \"recovery\"", "", "the key 'name' is missing"),
    ];
    for (from, to, expected) in cases {
        let text = GROUP.replacen(from, to, 1);
        assert_ne!(text, GROUP, "{from}");
        let error = group(&text).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}\nwanted: {expected}");
        assert!(error.starts_with("/etc/tidemark/agent.d/shop.toml, line "), "{error}");
    }
    let none = GROUP.split("[[volume]]").next().unwrap();
    assert!(group(none).unwrap_err().to_string().contains("the group has no volume"));
}

#[test]
fn a_node_file_is_judged() {
    let told = |text: &str| node(text).unwrap_err().to_string();
    assert!(told("node = \"DB\"").contains("line 1: 'DB' is not a node name"));
    assert!(told("").contains("the key 'node' is missing"));
    assert!(told("node = \"a\"\nstate_dir = \"x\"").contains("'state_dir' must be a path"));
    assert!(
        told("node = \"a\"\n[tls]\nkeys = \"/x\"")
            .contains("unknown key 'keys'; did you mean 'key'?")
    );
}

#[test]
fn a_broken_group_leaves_the_others_in_force() {
    let other = GROUP
        .replace("5f0c", "5f0d")
        .replace("/run/data", "/run/other")
        .replace("/dev/sdb", "/dev/sdx")
        .replace("/dev/sdc", "/dev/sdy");
    let directory = directory(&[
        ("agent.toml", NODE),
        ("agent.d/a.toml", GROUP),
        ("agent.d/b.toml", &other.replace("/dev/sdy", "/dev/sdb")),
        ("agent.d/c.toml", "id = 5"),
        ("agent.d/d.toml", &GROUP.replace("/dev/", "/dev/mapper/")),
        ("agent.d/e.toml", &other),
        ("agent.d/Bad.toml", &other),
    ]);
    let loaded = AgentConfig::load(directory.path()).unwrap();
    let names: Vec<_> = loaded.config.groups.iter().map(|group| group.name.as_str()).collect();
    assert_eq!(names, ["a", "e"]);
    assert!(loaded.config.group("e").is_some() && loaded.config.group("b").is_none());
    let faults: Vec<_> =
        loaded.faults.iter().map(|fault| (fault.group.as_str(), fault.to_string())).collect();
    for (group, expected) in [
        ("Bad", "the file's name is the group's, and 'Bad' is not a name"),
        ("b", "/dev/sdb is protected by the group 'a' already"),
        ("c", "line 1"),
        ("d", "is that of the group 'a' too"),
    ] {
        assert!(
            faults.iter().any(|(g, told)| *g == group && told.contains(expected)),
            "{faults:?}"
        );
    }
    assert_eq!(faults.len(), 4);
}

#[test]
fn a_missing_node_file_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let error = AgentConfig::load(directory.path()).unwrap_err().to_string();
    assert!(error.contains("cannot read") && error.contains("agent.toml"), "{error}");
}

#[test]
fn a_socket_path_too_long_for_the_kernel_is_refused() {
    let long = format!("/run/{}.sock", "x".repeat(103));
    let directory = directory(&[
        ("agent.toml", NODE),
        ("agent.d/a.toml", &GROUP.replace("/run/data.sock", &long)),
    ]);
    let loaded = AgentConfig::load(directory.path()).unwrap();
    assert!(loaded.config.groups.is_empty());
    assert!(loaded.faults[0].to_string().contains("is longer than the 107 bytes"));
}

#[test]
fn a_disk_is_one_disk_by_whatever_path() {
    let directory = directory(&[("agent.toml", NODE), ("disk", "x"), ("other", "x")]);
    let at = |name: &str| directory.path().join(name).display().to_string();
    std::os::unix::fs::symlink(at("disk"), at("soft")).unwrap();
    fs::hard_link(at("disk"), at("hard")).unwrap();
    let write = |name: &str, id: &str, one: &str, two: &str| {
        let text = GROUP.replace("5f0c", id).replace("/run/data", &format!("/run/{id}"));
        let text = text.replace("/dev/sdb", &at(one)).replace("/dev/sdc", &at(two));
        fs::write(directory.path().join(name), text).unwrap();
    };
    write("agent.d/a.toml", "5f0c", "disk", "missing-1");
    write("agent.d/b.toml", "5f0d", "soft", "missing-2");
    write("agent.d/c.toml", "5f0e", "missing-3", "hard");
    write("agent.d/d.toml", "5f0f", "other", "missing-4");
    let loaded = AgentConfig::load(directory.path()).unwrap();
    let faults: Vec<_> = loaded.faults.iter().map(ToString::to_string).collect();
    assert_eq!(faults.len(), 2, "{faults:?}");
    for (fault, name) in faults.iter().zip(["soft", "hard"]) {
        let expected = format!("{} is protected by the group 'a' already", at(name));
        assert!(fault.contains(&expected), "{fault}");
    }
    write("agent.d/b.toml", "5f0d", "hard", "soft");
    fs::remove_file(directory.path().join("agent.d/a.toml")).unwrap();
    let loaded = AgentConfig::load(directory.path()).unwrap();
    assert!(loaded.faults[0].to_string().contains("are the same disk"), "{:?}", loaded.faults);
}

#[test]
fn every_socket_is_one_volumes_own() {
    let other = GROUP
        .replace("5f0c", "5f0d")
        .replace("/dev/sdb", "/dev/sdx")
        .replace("/dev/sdc", "/dev/sdy");
    let api = "/run/tidemark/agent.sock";
    let directory = directory(&[
        ("agent.toml", NODE),
        ("agent.d/a.toml", GROUP),
        ("agent.d/b.toml", &other),
        ("agent.d/c.toml", &other.replace("/run/data.sock", api)),
    ]);
    let loaded = AgentConfig::load(directory.path()).unwrap();
    let faults: Vec<_> = loaded.faults.iter().map(ToString::to_string).collect();
    assert_eq!(faults.len(), 2, "{faults:?}");
    assert!(faults[0].contains("the socket /run/data.sock is one of the group 'a' too"));
    assert!(faults[1].contains("the socket /run/tidemark/agent.sock is there twice"));
}

#[test]
fn certificates_must_be_this_nodes() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::create("test").unwrap();
    let name: NodeName = "db1".parse().unwrap();
    let issued = authority.issue(&name).unwrap();
    let tls = TlsConfig {
        ca: directory.path().join("ca.pem"),
        certificate: directory.path().join("node.pem"),
        key: directory.path().join("node.key"),
    };
    let missing = tls.read(&name).unwrap_err().to_string();
    assert!(missing.contains("'tidemark init' makes certificates"), "{missing}");
    fs::write(&tls.ca, &authority.pem().certificate_pem).unwrap();
    fs::write(&tls.certificate, &issued.certificate_pem).unwrap();
    fs::write(&tls.key, &issued.key_pem).unwrap();
    assert_eq!(tls.read(&name).unwrap().0.name(), &name);
    let other = tls.read(&"db2".parse().unwrap()).unwrap_err().to_string();
    assert!(
        other.contains("is that of the node 'db1', but the configuration says 'db2'"),
        "{other}"
    );
    fs::write(&tls.key, "nonsense").unwrap();
    assert!(matches!(tls.read(&name), Err(TlsError::Pki { .. })));
}

#[test]
fn addresses_are_read_as_people_write_them() {
    for (text, expected) in [
        ("r", "r:7410"),
        ("r.example.com:1", "r.example.com:1"),
        ("[2001:db8::7]", "[2001:db8::7]:7410"),
        ("[::1]:9", "[::1]:9"),
    ] {
        assert_eq!(text.parse::<HostPort>().unwrap().to_string(), expected);
    }
    for bad in ["", ":1", "a:", "a:b", "a:70000", "::1", "[::1", "[x]:1", "[::1]9", "a b:1", "a/b"]
    {
        assert!(bad.parse::<HostPort>().is_err(), "{bad}");
    }
}

proptest! {
    #[test]
    fn an_address_reads_back_as_written(text in "\\PC{0,20}|[a-z0-9.:\\[\\]]{0,20}") {
        if let Ok(address) = text.parse::<HostPort>() {
            prop_assert_eq!(address.to_string().parse::<HostPort>().unwrap(), address);
        }
    }
}
