//! The file's text, and what follows from each difference.

use std::{fs::File, os::unix::fs::FileExt, time::SystemTime};

use super::*;
use crate::kernel::blockdev::IoCounters;

const GROUP: GroupId = GroupId([1; 16]);

fn place(dir: &Path) -> Place<'_> {
    Place { dir, group: GROUP, name: "shop" }
}

fn device() -> Facts {
    Facts::Device {
        wwn: Some("naa.5000".into()),
        serial: Some("A".into()),
        dm_uuid: None,
        partition: Some((1, 2048)),
        partition_uuid: None,
    }
}

fn disks() -> Disks {
    let rest = Rest::sample(IoCounters { writes: 3, ..IoCounters::default() });
    let row = |volume, facts, rest| Disk { volume: VolumeId(volume), sectors: 64, facts, rest };
    let image = Facts::Image { inode: 7, born_ns: Some(9) };
    let disks = vec![row(0, Some(device()), Some(rest)), row(1, Some(image), None)];
    Disks { doubt: Some("why".into()), disks, ..Disks::new(GROUP) }
}

#[test]
fn golden_text() {
    let text = concat!(
        r#"{"version":1,"group":"01010101010101010101010101010101","doubt":"why","disks":["#,
        r#"{"volume":0,"sectors":64,"facts":{"device":{"wwn":"naa.5000","serial":"A","#,
        r#""dm_uuid":null,"partition":[1,2048],"partition_uuid":null}},"#,
        r#""rest":{"boot":"b","counters":{"disk_sequence":0,"sectors_read":0,"writes":3,"#,
        r#""sectors_written":0,"sectors_discarded":0,"flushes":0},"modified_ns":5,"imprint":"00"}},"#,
        r#"{"volume":1,"sectors":64,"facts":{"image":{"inode":7,"born_ns":9}},"rest":null}]}"#
    );
    assert_eq!(serde_json::to_string(&disks()).unwrap(), text);
    assert_eq!(serde_json::from_str::<Disks>(text).unwrap(), disks());
}

#[test]
fn whatever_a_disk_tells_has_to_be_the_same() {
    let Facts::Device { wwn, serial, dm_uuid, partition, partition_uuid } = device() else {
        unreachable!()
    };
    let other = |text: &str| Some(text.to_owned());
    let same = |wwn, serial, dm_uuid, partition, partition_uuid| {
        let now = Facts::Device { wwn, serial, dm_uuid, partition, partition_uuid };
        device().difference(&now)
    };
    assert_eq!(same(wwn.clone(), serial.clone(), dm_uuid.clone(), partition, None), None);
    // A driver that tells less, or more.
    assert_eq!(same(None, serial.clone(), None, partition, None), None);
    assert_eq!(same(wwn.clone(), serial.clone(), other("x"), partition, other("y")), None);
    let refused = [
        (same(other("B"), serial.clone(), None, partition, None), "its world-wide name is 'B'"),
        (same(wwn.clone(), other("B"), None, partition, None), "its serial number is 'B', it was"),
        (same(wwn.clone(), serial, None, Some((1, 4096)), None), "its partition is number 1 from"),
        (same(wwn, None, None, None, None), "its partition is none"),
        (same(None, None, dm_uuid, partition, partition_uuid), "it tells nothing"),
    ];
    for (difference, sentence) in refused {
        let difference = difference.expect(sentence);
        assert!(difference.starts_with(sentence), "{difference}");
    }
    let silent = Facts::Device {
        wwn: None,
        serial: None,
        dm_uuid: None,
        partition: None,
        partition_uuid: None,
    };
    assert_eq!(silent.difference(&silent), None);
    let image = |inode, born_ns| Facts::Image { inode, born_ns };
    assert_eq!(image(1, None).difference(&image(1, Some(3))), None);
    assert!(image(1, Some(2)).difference(&image(1, Some(3))).is_some());
    assert!(image(1, Some(2)).difference(&image(4, Some(2))).is_some());
    assert!(image(1, Some(2)).difference(&device()).is_some());
    assert!(device().difference(&image(1, Some(2))).is_some());
}

/// A directory with an image, and what a start finds of it.
struct Image {
    dir: tempfile::TempDir,
}

impl Image {
    fn new(bytes: u64) -> Image {
        let dir = tempfile::tempdir().unwrap();
        File::create(dir.path().join("disk")).unwrap().set_len(bytes).unwrap();
        Image { dir }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    fn claim(&self) -> Backing {
        Backing::claim(&self.path()).unwrap()
    }

    fn check(&self) -> Result<Checked, DiskError> {
        check(place(self.dir.path()), &[(VolumeId(3), &self.claim())])
    }

    /// A start and a stop in order.
    fn run(&self) {
        let backing = self.claim();
        let volumes = [(VolumeId(3), &backing)];
        check(place(self.dir.path()), &volumes).unwrap().record(place(self.dir.path())).unwrap();
        backing.file().set_len(1 << 20).unwrap();
        record_rest(place(self.dir.path()), &volumes).unwrap();
    }

    fn doubt(&self, clean: bool) -> Option<String> {
        self.check().unwrap().doubt(clean).map(str::to_owned)
    }
}

#[test]
fn a_disk_at_rest_is_in_no_doubt_until_it_is_written() {
    let image = Image::new(1 << 20);
    assert_eq!(image.doubt(true), None, "nothing is recorded yet");
    image.run();
    for _ in 0..2 {
        assert_eq!(image.doubt(true), None);
    }
    let file = File::options().write(true).open(image.path()).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    file.write_all_at(b"past the agent", 4096).unwrap();
    let sentence = image.doubt(true).unwrap();
    assert!(sentence.contains("its time of modification has changed"), "{sentence}");
    // After a crash the agent's own writes explain it.
    assert_eq!(image.doubt(false), None);
    // One who puts the time back is found out by what he wrote.
    file.set_times(fs::FileTimes::new().set_modified(modified)).unwrap();
    let sentence = image.doubt(true).unwrap();
    assert!(sentence.contains("its content is not what it was"), "{sentence}");
    image.run();
    assert_eq!(image.doubt(true), None);
    // What one run recorded says nothing after the next one has begun.
    image.check().unwrap().record(place(image.dir.path())).unwrap();
    file.set_times(fs::FileTimes::new().set_modified(SystemTime::UNIX_EPOCH)).unwrap();
    assert_eq!(image.doubt(true), None);
}

#[test]
fn another_image_is_refused_until_it_is_accepted_and_then_doubted_once() {
    let image = Image::new(1 << 20);
    image.run();
    let copy = image.dir.path().join("copy");
    fs::copy(image.path(), &copy).unwrap();
    fs::rename(&copy, image.path()).unwrap();
    let sentence = image.check().unwrap_err().to_string();
    assert!(
        sentence.contains("another disk") && sentence.contains("accept-disk shop"),
        "{sentence}"
    );
    accept(place(image.dir.path()), Some(VolumeId(4))).unwrap();
    assert!(image.check().is_err(), "another volume was accepted");
    accept(place(image.dir.path()), Some(VolumeId(3))).unwrap();
    for _ in 0..2 {
        assert!(image.doubt(true).is_some() && image.doubt(false).is_some());
    }
    image.run();
    assert_eq!(image.doubt(true), None);
}

#[test]
fn another_size_is_refused_even_if_accepted() {
    let image = Image::new(1 << 20);
    image.run();
    let resize = |bytes| File::options().write(true).open(image.path()).unwrap().set_len(bytes);
    resize(2 << 20).unwrap();
    let sentence = image.check().unwrap_err().to_string();
    assert!(sentence.contains("has 2097152 bytes, and had 1048576"), "{sentence}");
    accept(place(image.dir.path()), None).unwrap();
    assert!(matches!(image.check(), Err(DiskError::Resized { .. })));
    resize(1 << 20).unwrap();
    assert!(image.doubt(true).is_some());
}

#[test]
fn a_named_doubt_stays_until_a_start_has_dealt_with_it() {
    let image = Image::new(1 << 20);
    distrust(place(image.dir.path()), "nothing was captured").unwrap();
    assert_eq!(image.doubt(false).as_deref(), Some("nothing was captured"));
    image.run();
    assert_eq!(image.doubt(false), None);
    distrust(place(image.dir.path()), "nothing was captured").unwrap();
    assert!(image.doubt(true).is_some());
}

#[test]
fn a_damaged_file_is_refused_with_the_way_out_and_another_groups_is_not_ours() {
    let image = Image::new(1 << 20);
    image.run();
    let path = image.dir.path().join(FILE);
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("01010101010101010101010101010101", &"02".repeat(16))).unwrap();
    assert_eq!(image.doubt(true), None);
    for damaged in [text.replace("\"version\": 1", "\"version\": 2"), text[..40].to_owned()] {
        fs::write(&path, damaged).unwrap();
        let sentence = image.check().unwrap_err().to_string();
        assert!(sentence.contains("is damaged") && sentence.contains("accept-disk"), "{sentence}");
        assert!(distrust(place(image.dir.path()), "no").is_err());
    }
    accept(place(image.dir.path()), None).unwrap();
    assert!(image.doubt(false).is_some());
}
