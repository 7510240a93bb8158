use super::*;
use crate::kernel::blockdev::{Abilities, DeviceNumber, Geometry, Identity};

fn names(root: &Path) -> Names {
    for directory in ["dev", "sys/ublkb0", "udev"] {
        std::fs::create_dir_all(root.join(directory)).unwrap();
    }
    Names {
        run: root.join("run/devices"),
        dev: root.join("dev"),
        sys: root.join("sys"),
        udev_control: root.join("udev/control"),
    }
}

fn disk(identity: Identity) -> Inspection {
    Inspection {
        device: Some(DeviceNumber { major: 8, minor: 0 }),
        geometry: Geometry {
            size_bytes: 1 << 30,
            logical_block_bytes: 512,
            physical_block_bytes: 512,
            io_min_bytes: 512,
            io_opt_bytes: 0,
        },
        abilities: Abilities {
            read_only: false,
            rotational: false,
            volatile_cache: true,
            fua: false,
            unmap: None,
            fast_zeroes: false,
        },
        identity,
    }
}

#[test]
fn the_name_is_left_for_udev_to_import() {
    let root = tempfile::tempdir().unwrap();
    let names = names(root.path());
    std::fs::write(root.path().join("udev/control"), "").unwrap();
    let link = names.publish("ublkb0", "db", "data").unwrap();
    assert_eq!(link, root.path().join("dev/tidemark/db/data"));
    let left = std::fs::read_to_string(root.path().join("run/devices/ublkb0")).unwrap();
    assert_eq!(left, "TIDEMARK_NAME=db/data\n");
    assert!(!link.exists() && link.symlink_metadata().is_err(), "udev makes the link");
    names.trigger("ublkb0").unwrap();
    assert_eq!(std::fs::read_to_string(root.path().join("sys/ublkb0/uevent")).unwrap(), "change");
    names.withdraw("ublkb0", "db", "data").unwrap();
    assert_eq!(std::fs::read_dir(root.path().join("run/devices")).unwrap().count(), 0);
}

#[test]
fn without_udev_the_link_is_made_and_moved_and_taken_away() {
    let root = tempfile::tempdir().unwrap();
    let names = names(root.path());
    let link = names.publish("ublkb0", "db", "data").unwrap();
    assert_eq!(std::fs::read_link(&link).unwrap(), Path::new("../../ublkb0"));
    names.publish("ublkb3", "db", "data").unwrap();
    assert_eq!(std::fs::read_link(&link).unwrap(), Path::new("../../ublkb3"));
    names.withdraw("ublkb0", "db", "data").unwrap();
    assert!(link.symlink_metadata().is_ok(), "it names another device by now");
    names.withdraw("ublkb3", "db", "data").unwrap();
    assert!(link.symlink_metadata().is_err());
    names.withdraw("ublkb3", "db", "data").unwrap();
}

#[test]
fn a_device_that_bears_another_name_by_now_keeps_it() {
    let root = tempfile::tempdir().unwrap();
    let names = names(root.path());
    names.publish("nbd0", "db", "data").unwrap();
    let other = names.publish("nbd0", "shop", "log").unwrap();
    names.withdraw("nbd0", "db", "data").unwrap();
    let left = std::fs::read_to_string(root.path().join("run/devices/nbd0")).unwrap();
    assert_eq!(left, "TIDEMARK_NAME=shop/log\n");
    assert!(other.symlink_metadata().is_ok());
}

#[test]
fn links_of_the_disk_itself_are_found() {
    let root = tempfile::tempdir().unwrap();
    let names = names(root.path());
    let dev = root.path().join("dev");
    for name in ["sda", "sdb"] {
        std::fs::write(dev.join(name), "").unwrap();
    }
    for (link, to) in [
        ("disk/by-path/pci-1", "sda"),
        ("disk/by-id/wwn-2", "sda"),
        ("disk/by-id/wwn-3", "sdb"),
        ("disk/by-uuid/1234", "sda"),
    ] {
        std::fs::create_dir_all(dev.join(link).parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(Path::new("../..").join(to), dev.join(link)).unwrap();
    }
    assert_eq!(names.links("sda").unwrap(), ["disk/by-id/wwn-2", "disk/by-path/pci-1"]);
    assert!(names.links("sdz").is_err());
}

#[test]
fn names_that_leave_their_directory_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let names = names(root.path());
    let long = "x".repeat(65);
    for bad in ["", "..", ".hidden", "a/b", "a b", "a\nB=1", "\u{e9}", &long] {
        assert!(names.publish("ublkb0", bad, "data").is_err(), "{bad:?}");
        assert!(names.publish("ublkb0", "db", bad).is_err(), "{bad:?}");
        assert!(names.trigger(bad).is_err(), "{bad:?}");
        assert!(hide_rule_file("db", bad).is_err(), "{bad:?}");
    }
    assert_eq!(hide_rule_file("db", "data").unwrap(), "12-tidemark-hide-db-data.rules");
}

#[test]
fn a_disk_is_hidden_by_its_world_wide_name_and_keeps_its_own_links() {
    let identity = Identity {
        kernel_name: "sda".into(),
        serial: Some("S1".into()),
        wwn: Some("t10.ATA \"odd\" [x]*".into()),
        ..Identity::default()
    };
    let links = [
        "disk/by-id/wwn-0x5000".to_owned(),
        "disk/by-id/lvm-pv-uuid-abc".to_owned(),
        "disk/by-path/pci-0000:00:1f.2-ata-1".to_owned(),
        "disk/by-uuid/1234-5678".to_owned(),
        "disk/by-label/odd\"name".to_owned(),
        "disk/by-id/bad name".to_owned(),
    ];
    let rule = hide_rule(&disk(identity), &links, "db", "data").unwrap();
    let golden = r#"# Written by tidemark: this disk is protected as db/data and used only through
# /dev/tidemark/db/data. Removed again by `tidemark unprotect`.
SUBSYSTEM!="block", GOTO="tidemark_hide_end"
ACTION=="remove", GOTO="tidemark_hide_end"
ATTRS{wwid}=="t10.ATA ?odd? ?x??", GOTO="tidemark_hide"
GOTO="tidemark_hide_end"
LABEL="tidemark_hide"
ENV{UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG}="1"
ENV{SYSTEMD_READY}="0", ENV{UDISKS_IGNORE}="1"
ENV{DEVTYPE}=="disk", SYMLINK+="disk/by-id/wwn-0x5000 disk/by-path/pci-0000:00:1f.2-ata-1"
LABEL="tidemark_hide_end"
"#;
    assert_eq!(rule, golden);
}

#[test]
fn a_partition_is_hidden_alone() {
    let identity = Identity {
        kernel_name: "vda2".into(),
        serial: Some("disk-7".into()),
        partition: Some(2),
        ..Identity::default()
    };
    let links = ["disk/by-id/virtio-disk-7-part2".to_owned()];
    let rule = hide_rule(&disk(identity), &links, "db", "data").unwrap();
    assert!(
        rule.contains(
            "ATTRS{serial}==\"disk-7\", ATTR{partition}==\"2\", GOTO=\"tidemark_hide\"\n"
        ),
        "{rule}"
    );
    assert!(rule.contains("\nSYMLINK+=\"disk/by-id/virtio-disk-7-part2\"\n"), "{rule}");
}

#[test]
fn without_an_identity_the_place_or_the_kernel_name_is_used() {
    let identity = Identity { kernel_name: "vdb".into(), ..Identity::default() };
    let links = ["disk/by-path/pci-0000:00:05.0-part1".to_owned()];
    let rule = hide_rule(&disk(identity.clone()), &links, "db", "data").unwrap();
    assert!(rule.contains("IMPORT{builtin}=\"path_id\"\n"), "{rule}");
    assert!(rule.contains("ENV{ID_PATH}==\"pci-0000:00:05.0\", GOTO"), "{rule}");
    let rule = hide_rule(&disk(identity), &[], "db", "data").unwrap();
    assert!(rule.contains("KERNEL==\"vdb|vdb[0-9]*|vdbp[0-9]*\", GOTO"), "{rule}");
    assert!(!rule.contains("SYMLINK"), "{rule}");
}

#[test]
fn a_logical_volume_is_hidden_by_its_uuid() {
    let identity = Identity {
        kernel_name: "dm-3".into(),
        dm_uuid: Some("LVM-abcdef".into()),
        ..Identity::default()
    };
    let rule = hide_rule(&disk(identity), &[], "db", "data").unwrap();
    assert!(rule.contains("ENV{DM_UUID}==\"LVM-abcdef\", GOTO"), "{rule}");
    assert!(rule.contains("ENV{DM_UDEV_DISABLE_OTHER_RULES_FLAG}=\"1\""), "{rule}");
    assert!(!rule.contains("PERSISTENT_STORAGE"), "{rule}");
    for line in rule.lines().filter(|line| line.contains("!=")) {
        assert!(line.starts_with("SUBSYSTEM!="), "absent attributes never differ: {line}");
    }
    let image = Inspection { device: None, ..disk(Identity::default()) };
    assert!(hide_rule(&image, &[], "db", "data").is_err());
}
