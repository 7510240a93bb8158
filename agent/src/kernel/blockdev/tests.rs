use super::below::device;
use super::usage::{holders, mounts, parts, source_of_mount};
use super::*;
use std::fs;

/// A sysfs with disk `sdx` (8:16) and its partition `sdx1` (8:17), below LVM.
fn fake_sysfs() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let disk = root.path().join("devices/pci0/block/sdx");
    for (name, value) in [
        ("size", "2097152"),
        ("dev", "8:16"),
        ("ro", "0"),
        ("diskseq", "9"),
        ("stat", "1 0 8 0 2 0 16 0 0 0 0 0 0 0 0 0 0"),
        ("queue/logical_block_size", "512"),
        ("queue/physical_block_size", "4096"),
        ("queue/minimum_io_size", "4096"),
        ("queue/optimal_io_size", "65536"),
        ("queue/rotational", "1"),
        ("queue/write_cache", "write back"),
        ("queue/fua", "1"),
        ("queue/discard_max_bytes", "1048576"),
        ("queue/discard_granularity", "4096"),
        ("queue/write_zeroes_max_bytes", "2097152"),
        ("device/model", "Fine Disk       "),
        ("device/wwid", "naa.5000c500a1b2c3d4"),
        ("serial", "XYZ 1"),
        ("sdx1/partition", "1"),
        ("sdx1/start", "2048"),
        ("sdx1/uevent", "DEVTYPE=partition\nPARTN=1\nPARTUUID=5f3c-01"),
        ("sdx1/dev", "8:17"),
        ("sdx1/size", "2048"),
        ("sdx1/ro", "1"),
        ("sdx1/stat", "1 0 8 0 1 0 8 0 0 0 0"),
        ("sdx1/discard_alignment", "512"),
        ("sdx1/holders/dm-3/dm/name", "vg-data"),
    ] {
        let path = disk.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("{value}\n")).unwrap();
    }
    let numbers = root.path().join("dev/block");
    fs::create_dir_all(&numbers).unwrap();
    std::os::unix::fs::symlink(&disk, numbers.join("8:16")).unwrap();
    std::os::unix::fs::symlink(disk.join("sdx1"), numbers.join("8:17")).unwrap();
    root
}

const DISK: DeviceNumber = DeviceNumber { major: 8, minor: 16 };
const PARTITION: DeviceNumber = DeviceNumber { major: 8, minor: 17 };

#[test]
fn a_disk_is_described_by_its_attributes() {
    let root = fake_sysfs();
    let disk = Sysfs::at(root.path()).inspect(DISK).unwrap();
    let geometry = Geometry {
        size_bytes: 1 << 30,
        logical_block_bytes: 512,
        physical_block_bytes: 4096,
        io_min_bytes: 4096,
        io_opt_bytes: 65536,
    };
    assert_eq!(disk.geometry, geometry);
    let unmap = UnmapLimits { granularity_bytes: 4096, alignment_bytes: 0, max_bytes: 1_048_576 };
    let abilities = Abilities {
        read_only: false,
        rotational: true,
        volatile_cache: true,
        fua: true,
        unmap: Some(unmap),
        fast_zeroes: true,
    };
    assert_eq!(disk.abilities, abilities);
    let identity = Identity {
        kernel_name: "sdx".into(),
        model: Some("Fine Disk".into()),
        serial: Some("XYZ 1".into()),
        wwn: Some("naa.5000c500a1b2c3d4".into()),
        dm_uuid: None,
        partition: None,
        partition_start: None,
        partition_uuid: None,
    };
    assert_eq!(disk.identity, identity);
}

#[test]
fn a_partition_has_its_own_size_and_its_disks_abilities() {
    let root = fake_sysfs();
    let sysfs = Sysfs::at(root.path());
    let partition = sysfs.inspect(PARTITION).unwrap();
    assert_eq!(partition.geometry.size_bytes, 1 << 20);
    assert_eq!(partition.geometry.physical_block_bytes, 4096);
    assert!(partition.abilities.read_only);
    assert_eq!(partition.abilities.unmap.unwrap().alignment_bytes, 512);
    assert_eq!(partition.identity.partition, Some(1));
    assert_eq!(partition.identity.serial.as_deref(), Some("XYZ 1"));
    assert_eq!(partition.identity.partition_start, Some(2048));
    assert_eq!(partition.identity.partition_uuid.as_deref(), Some("5f3c-01"));
    let counters = sysfs.counters(PARTITION).unwrap();
    assert_eq!((counters.disk_sequence, counters.sectors_written), (9, 8));
}

#[test]
fn what_cannot_guarantee_zeroes_has_no_unmap() {
    let root = fake_sysfs();
    let queue = root.path().join("devices/pci0/block/sdx/queue");
    fs::write(queue.join("write_zeroes_max_bytes"), "0").unwrap();
    fs::write(queue.join("write_cache"), "write through").unwrap();
    let disk = Sysfs::at(root.path()).inspect(DISK).unwrap();
    assert_eq!(disk.abilities.unmap, None);
    assert!(!disk.abilities.fast_zeroes);
    assert!(!disk.abilities.volatile_cache);
}

#[test]
fn mounts_and_holders_of_partitions_count_for_the_disk() {
    let root = fake_sysfs();
    let parts = parts(&Sysfs::at(root.path()), DISK).unwrap();
    let info = "22 1 8:99 / /other rw - ext4 /dev/sdz rw\n\
                36 35 8:17 / /mnt/my\\040data rw,noatime shared:1 - xfs /dev/sdx1 rw\n";
    let found = mounts(info, &parts);
    assert_eq!(
        found,
        [Usage::Mounted { device: "/dev/sdx1".into(), mount_point: "/mnt/my data".into() }]
    );
    let above = holders(&parts);
    assert_eq!(above.len(), 1);
    assert_eq!(above[0].to_string(), "/dev/sdx1 belongs to vg-data");
    let error = BackingError::InUse { path: "/dev/sdx".into(), users: found };
    assert_eq!(
        error.to_string(),
        "/dev/sdx is in use: /dev/sdx1 is mounted on /mnt/my data; unmount it first"
    );
}

#[test]
fn a_claim_leaves_an_images_time_of_modification_alone() {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let before = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    image.as_file().set_times(FileTimes::new().set_modified(before)).unwrap();
    let backing = Backing::claim(image.path()).unwrap();
    assert_eq!(backing.found().modified().unwrap(), before);
    assert_eq!(backing.file().metadata().unwrap().modified().unwrap(), before);
}

#[test]
fn an_image_is_claimed_once() {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let first = Backing::claim(image.path()).unwrap();
    assert_eq!(first.geometry().size_bytes, 1 << 20);
    assert_eq!(first.geometry().logical_block_bytes, 512);
    let second = Backing::claim(image.path()).unwrap_err();
    let BackingError::InUse { users, .. } = second else { panic!("{second}") };
    assert!(users.is_empty(), "nobody is looked for at each attempt");
    let file = first.file().clone();
    drop(first);
    assert!(Backing::claim(image.path()).is_err(), "a clone keeps the claim");
    drop(file);
    Backing::claim(image.path()).unwrap();
}

#[test]
fn odd_backings_are_refused_with_a_sentence() {
    let empty = tempfile::NamedTempFile::new().unwrap();
    let refused = Backing::claim(empty.path()).unwrap_err();
    assert!(refused.to_string().contains("is 0 bytes"), "{refused}");
    empty.as_file().set_len(1000).unwrap();
    let refused = Backing::claim(empty.path()).unwrap_err();
    assert!(matches!(refused, BackingError::BadSize { size_bytes: 1000, .. }));
    let refused = Backing::claim(Path::new("/dev/null")).unwrap_err();
    assert!(matches!(refused, BackingError::WrongKind { .. }));
    let refused = Backing::claim(Path::new("/nonexistent")).unwrap_err();
    assert!(refused.to_string().starts_with("cannot look at /nonexistent"), "{refused}");
}

#[test]
fn probing_an_image_for_holes_changes_nothing_of_it() {
    let image = tempfile::NamedTempFile::new().unwrap();
    let content: Vec<u8> = (0..10_240u32).map(|i| i as u8 | 1).collect();
    fs::write(image.path(), &content).unwrap();
    let backing = Backing::claim(image.path()).unwrap();
    assert_eq!(backing.geometry().size_bytes, 10_240);
    drop(backing);
    assert_eq!(fs::read(image.path()).unwrap(), content);
}

#[test]
fn what_a_volume_of_lvm_lies_on_is_found_down_to_the_whole_disk() {
    let root = fake_sysfs();
    let mapped = root.path().join("devices/virtual/block/dm-3");
    let slave = root.path().join("devices/pci0/block/sdx/sdx1");
    fs::create_dir_all(mapped.join("slaves")).unwrap();
    std::os::unix::fs::symlink(&slave, mapped.join("slaves/sdx1")).unwrap();
    std::os::unix::fs::symlink(&mapped, root.path().join("dev/block/253:3")).unwrap();
    let sysfs = Sysfs::at(root.path());
    let volume = DeviceNumber { major: 253, minor: 3 };
    let mut found = std::collections::BTreeSet::new();
    device(&sysfs, volume, &mut found);
    let expected = [volume, PARTITION, DISK].map(Disk::Device);
    assert_eq!(found, expected.into_iter().collect());
    // The disk does not lie on its partitions.
    found.clear();
    device(&sysfs, DISK, &mut found);
    assert_eq!(found, [Disk::Device(DISK)].into_iter().collect());
}

#[test]
fn what_the_image_behind_a_loop_device_lies_on_is_found() {
    let root = fake_sysfs();
    let image = tempfile::NamedTempFile::new().unwrap();
    let looped = root.path().join("devices/virtual/block/loop7");
    fs::create_dir_all(looped.join("loop")).unwrap();
    fs::write(looped.join("loop/backing_file"), image.path().to_str().unwrap()).unwrap();
    std::os::unix::fs::symlink(&looped, root.path().join("dev/block/7:7")).unwrap();
    let mut found = std::collections::BTreeSet::new();
    device(&Sysfs::at(root.path()), DeviceNumber { major: 7, minor: 7 }, &mut found);
    assert!(found.contains(&Disk::of(image.path()).unwrap()), "{found:?}");
}

#[test]
fn a_file_system_of_several_devices_is_found_by_its_source() {
    let table = "36 35 0:44 /root /mnt/a\\040b rw - btrfs /dev/sdx1 rw\n37 35 0:45 / /proc rw - proc proc rw\n";
    let of = |minor| source_of_mount(table, DeviceNumber { major: 0, minor });
    assert_eq!(of(44), Some("/dev/sdx1".into()));
    assert_eq!(of(46), None);
}

/// A device with users must not be taken away; what nobody has, nobody uses.
#[test]
fn what_somebody_has_open_for_writing_is_not_reserved() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.img");
    assert!(reserve(&path).unwrap().is_none());
    fs::write(&path, "x").unwrap();
    assert!(reserve(&path).unwrap().is_some());
    let mut writer = std::process::Command::new("sleep")
        .arg("600")
        .stdout(OpenOptions::new().append(true).open(&path).unwrap())
        .spawn()
        .unwrap();
    let refused = reserve(&path).map(|_| ()).unwrap_err().to_string();
    let in_use = || BackingError::InUse { path: path.clone(), users: Vec::new() };
    assert_eq!(in_use().with_users().to_string(), refused);
    let user = format!("process {} (", writer.id());
    assert!(refused.contains("is in use") && refused.contains(&user), "{refused}");
    writer.kill().unwrap();
    writer.wait().unwrap();
    assert!(reserve(&path).unwrap().is_some());
}
