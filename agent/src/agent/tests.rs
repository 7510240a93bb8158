use std::fs;

use tidemark_control::agent::GroupFailure;
use tidemark_journal::VolumeId;
use tidemark_link::pki::Authority;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::{
    front::Reserved, group::opening::regions, kernel::blockdev::Backing, state::files::StateFiles,
};

/// A node's configuration directory, with images, whose target does not answer.
struct Machine(tempfile::TempDir);

impl Machine {
    fn new() -> Machine {
        let machine = Machine(tempfile::tempdir().unwrap());
        let authority = Authority::create("test").unwrap();
        let issued = authority.issue(&"db1".parse().unwrap()).unwrap();
        machine.write("ca.pem", &authority.pem().certificate_pem);
        machine.write("node.pem", &issued.certificate_pem);
        machine.write("node.key", &issued.key_pem);
        let at = machine.0.path().display();
        let node = format!(
            "node = \"db1\"\nstate_dir = \"{at}/state\"\nruntime_dir = \"{at}/run\"\n\
             api_socket = \"{at}/agent.sock\"\n[tls]\nca = \"{at}/ca.pem\"\n\
             certificate = \"{at}/node.pem\"\nkey = \"{at}/node.key\"\n"
        );
        machine.write("agent.toml", &node);
        fs::create_dir(machine.0.path().join(GROUP_DIRECTORY)).unwrap();
        machine
    }

    fn write(&self, name: &str, content: &str) {
        fs::write(self.0.path().join(name), content).unwrap();
    }

    fn image(&self, name: &str) {
        self.write(&format!("{name}.img"), &"x".repeat(1 << 20));
    }

    /// A group whose disk is the image of its name.
    fn group(&self, name: &str) {
        let id = blake3::hash(name.as_bytes()).to_hex();
        let text = format!(
            "id = \"{}\"\nring_bytes = \"16 MiB\"\nfront = \"nbd-socket\"\n\
             target = {{ address = \"127.0.0.1:1\", name = \"recovery\" }}\n\
             volume = [{{ id = 1, name = \"data\", backing = \"{}/{name}.img\" }}]\n",
            &id[..32],
            self.0.path().display()
        );
        self.write(&format!("agent.d/{name}.toml"), &text);
    }

    async fn start(&self) -> Arc<Agent> {
        let loaded = AgentConfig::load(self.0.path()).unwrap();
        let agent = Agent::new(&loaded, Some(self.0.path())).unwrap();
        agent.start_groups(loaded.config.names()).await;
        agent
    }
}

fn id_of(group: &str) -> GroupId {
    GroupId(blake3::hash(group.as_bytes()).as_bytes()[..16].try_into().unwrap())
}

async fn running(agent: &Agent) -> Vec<String> {
    agent.status().await.groups.into_iter().map(|group| group.name).collect()
}

async fn unprotected(agent: &Agent) -> Vec<(String, String)> {
    let told = agent.status().await.unprotected.into_iter();
    told.map(|GroupFailure { group, error }| (group, error)).collect()
}

/// The next attempts of those that could not be started, when it is time for all of them.
async fn try_late(agent: &Arc<Agent>) {
    while agent.late.due(Instant::now()) != agent.late.groups() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    agent.start_late_groups().await;
}

#[tokio::test]
async fn what_is_configured_and_does_not_run_is_told_until_it_runs() {
    let machine = Machine::new();
    for name in ["good", "late", "broken"] {
        machine.group(name);
    }
    machine.image("good");
    machine.write("agent.d/broken.toml", "id = 5");
    let agent = machine.start().await;
    assert_eq!(running(&agent).await, ["good"]);
    let told = unprotected(&agent).await;
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(told[0].0 == "broken" && told[0].1.contains("broken.toml, line 1"), "{told:?}");
    assert!(told[1].0 == "late" && told[1].1.contains("late.img"), "{told:?}");

    // Another mistake in the file is told instead of the first one.
    machine.write("agent.d/broken.toml", "idd = 5");
    try_late(&agent).await;
    let told = unprotected(&agent).await;
    assert!(told[0].1.contains("unknown key 'idd'"), "{told:?}");

    machine.group("broken");
    machine.image("broken");
    machine.image("late");
    try_late(&agent).await;
    assert_eq!(running(&agent).await, ["broken", "good", "late"]);
    assert_eq!(unprotected(&agent).await, []);
    agent.stop().await;
    let told = unprotected(&agent).await;
    assert_eq!(told.len(), 3, "{told:?}");
    assert_eq!(told[0].1, "the agent is stopping");
}

/// A front that cannot be made leaves nothing behind that holds the disk; and an attempt goes on with the ring
/// of the one before, so that no write is lost with it and no term is used up.
#[tokio::test]
async fn a_group_whose_front_cannot_be_made_is_started_when_it_can() {
    let machine = Machine::new();
    machine.group("shop");
    machine.image("shop");
    let socket = machine.0.path().join("run/nbd/shop/data.sock");
    fs::create_dir_all(socket.join("in-the-way")).unwrap();
    let agent = machine.start().await;
    for _ in 0..2 {
        let told = unprotected(&agent).await;
        assert!(told[0].1.contains("listen on"), "{told:?}");
        try_late(&agent).await;
    }
    fs::remove_dir_all(&socket).unwrap();
    try_late(&agent).await;
    assert_eq!(unprotected(&agent).await, []);
    assert_eq!(running(&agent).await, ["shop"]);
    agent.stop_within(Duration::from_secs(1)).await;
    let group = id_of("shop");
    let state = machine.0.path().join("state/shop");
    let (_, found) = StateFiles::open(&state, group, &regions(&[(VolumeId(1), 2048)])).unwrap();
    assert_eq!(found.ancestry.unwrap().terms().len(), 1);
}

#[tokio::test]
async fn a_group_whose_device_is_in_use_is_not_stopped() {
    let machine = Machine::new();
    machine.group("shop");
    machine.image("shop");
    let agent = machine.start().await;
    let socket = machine.0.path().join("run/nbd/shop/data.sock");
    let mut client = tokio::net::UnixStream::connect(&socket).await.unwrap();
    client.read_exact(&mut [0; 18]).await.expect("the server's greeting");
    for _ in 0..2 {
        let refused = agent.stop_group("shop").await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::Conflict);
        assert!(refused.error.contains("volume data: "), "{refused}");
        assert!(refused.error.contains("data.sock is in use"), "{refused}");
        let status = agent.status().await;
        assert_eq!(status.groups[0].volumes[0].device, socket);
    }
    fs::remove_file(machine.0.path().join("agent.d/shop.toml")).unwrap();
    let reloaded = agent.reload().await.unwrap();
    assert!(reloaded.stopped.is_empty() && reloaded.failed[0].group == "shop", "{reloaded:?}");
    client.write_all(&[0; 4]).await.expect("it is served all the while");
    drop(client);
    // The server notices in a moment.
    while agent.stop_group("shop").await.is_err() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(running(&agent).await.is_empty());
    Backing::claim(&machine.0.path().join("shop.img")).expect("nobody has it");
}

/// A directory that is out of sight for a moment says nothing of its groups.
#[tokio::test]
async fn a_reload_without_a_directory_changes_nothing() {
    let machine = Machine::new();
    machine.group("late");
    machine.group("shop");
    machine.image("shop");
    let agent = machine.start().await;
    let (directory, away) = (machine.0.path().join(GROUP_DIRECTORY), machine.0.path().join("away"));
    fs::rename(&directory, &away).unwrap();
    let refused = agent.reload().await.unwrap_err();
    assert!(refused.error.contains("agent.d: No such file"), "{refused}");
    try_late(&agent).await;
    assert_eq!(running(&agent).await, ["shop"]);
    assert_eq!(unprotected(&agent).await[0].0, "late");
    fs::rename(&away, &directory).unwrap();
    let reloaded = agent.reload().await.unwrap();
    assert!(reloaded.stopped.is_empty() && reloaded.failed.len() == 1, "{reloaded:?}");
    agent.stop_within(Duration::from_secs(1)).await;
}

/// Another has the disk of one group.
#[tokio::test]
async fn a_group_that_waits_for_its_disk_holds_up_no_other_and_no_stop() {
    let machine = Machine::new();
    for name in ["busy", "good"] {
        machine.group(name);
        machine.image(name);
    }
    let held = Backing::claim(&machine.0.path().join("busy.img")).unwrap();
    let loaded = AgentConfig::load(machine.0.path()).unwrap();
    let agent = Agent::new(&loaded, Some(machine.0.path())).unwrap();
    let starting = tokio::spawn({
        let agent = agent.clone();
        async move { agent.start_groups(loaded.config.names()).await }
    });
    let began = Instant::now();
    while running(&agent).await.is_empty() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(unprotected(&agent).await, [("busy".to_owned(), BEING_CHANGED.to_owned())]);
    assert!(!starting.is_finished());
    agent.stop_within(Duration::from_secs(1)).await;
    starting.await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(20), "it waited for the disk");
    drop(held);
}

/// Of what has begun nothing is left to run on, and what begins later is refused.
#[tokio::test]
async fn a_stop_waits_for_the_changes_that_have_begun() {
    let machine = Machine::new();
    let agent = machine.start().await;
    machine.group("shop");
    machine.image("shop");
    let group = AgentConfig::load(machine.0.path()).unwrap().config.groups.remove(0);
    let change = agent.changes.begin("shop").await;
    let starting = tokio::spawn({
        let agent = agent.clone();
        async move { agent.start_group(&group).await }
    });
    tokio::task::yield_now().await;
    let stopping = tokio::spawn({
        let agent = agent.clone();
        async move { agent.stop().await }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!starting.is_finished() && !stopping.is_finished(), "one change at a time");
    drop(change);
    let refused = starting.await.unwrap().unwrap_err();
    assert_eq!(refused.to_string(), STOPPING);
    assert!(stopping.await.unwrap());
    assert!(running(&agent).await.is_empty());
}

#[tokio::test]
async fn a_group_waits_for_the_claim_before_to_end() {
    let machine = Machine::new();
    machine.group("shop");
    machine.image("shop");
    let held = Backing::claim(&machine.0.path().join("shop.img")).unwrap();
    let freeing = tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(100)).await;
        drop(held);
    });
    let agent = machine.start().await;
    freeing.await.unwrap();
    assert_eq!(running(&agent).await, ["shop"]);
    agent.stop_within(Duration::from_secs(1)).await;
}

/// It had read the file, and waited for its turn; and the file had been removed before that came.
#[tokio::test]
async fn a_reload_does_not_start_a_group_that_has_been_unprotected_meanwhile() {
    let machine = Machine::new();
    machine.group("shop");
    machine.image("shop");
    let loaded = AgentConfig::load(machine.0.path()).unwrap();
    let agent = Agent::new(&loaded, Some(machine.0.path())).unwrap();
    let change = agent.changes.begin("shop").await;
    let reloading = tokio::spawn({
        let agent = agent.clone();
        async move { agent.reload().await.unwrap() }
    });
    while agent.reloading.try_lock().is_ok() {
        tokio::task::yield_now().await;
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!reloading.is_finished());
    fs::remove_file(machine.0.path().join("agent.d/shop.toml")).unwrap();
    drop(change);
    assert_eq!(reloading.await.unwrap(), Reloaded::default());
    assert!(running(&agent).await.is_empty());
}

#[tokio::test]
async fn what_is_asked_of_a_group_that_does_not_run_is_refused_with_the_reason() {
    let machine = Machine::new();
    machine.group("late");
    let agent = machine.start().await;
    let refused = agent.mark("late", "m").await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::Conflict);
    assert!(refused.error.contains("late.img"), "{refused}");
    let change = agent.changes.begin("shop").await;
    let refused = agent.verify("shop", None).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::Unavailable);
    assert!(refused.error.contains(BEING_CHANGED), "{refused}");
    drop(change);
    assert_eq!(agent.mark("shop", "m").await.unwrap_err().code, ErrorCode::NotFound);
    agent.stop().await;
    assert_eq!(agent.mark("shop", "m").await.unwrap_err().code, ErrorCode::Unavailable);
}

/// A disk that is not the one is put back in a moment.
#[tokio::test]
async fn a_group_with_another_disk_is_tried_again_soon() {
    let machine = Machine::new();
    machine.group("shop");
    machine.image("shop");
    machine.start().await.stop_within(Duration::from_secs(1)).await;
    machine.write("shop.img", &"x".repeat(2 << 20));
    let agent = machine.start().await;
    for _ in 0..4 {
        let told = unprotected(&agent).await;
        assert!(told[0].1.contains("had 1048576 when it was protected"), "{told:?}");
        try_late(&agent).await;
    }
    let soon = Instant::now() + RETRY;
    assert_eq!(agent.late.due(soon), ["shop"]);
}

/// It is as large as the ring of a group that runs.
#[tokio::test]
async fn the_ring_of_a_group_that_never_ran_goes_with_its_file() {
    let machine = Machine::new();
    for group in ["asked", "seen"] {
        machine.group(group);
        machine.image(group);
        let socket = machine.0.path().join(format!("run/nbd/{group}/data.sock"));
        fs::create_dir_all(socket.join("in-the-way")).unwrap();
    }
    let agent = machine.start().await;
    let kept = |group| !agent.rings.left(id_of(group)).unwrap().is_empty();
    assert!(running(&agent).await.is_empty() && kept("asked") && kept("seen"));
    let remove = |file| fs::remove_file(machine.0.path().join("agent.d").join(file)).unwrap();
    remove("asked.toml");
    assert_eq!(agent.stop_group("asked").await.unwrap_err().code, ErrorCode::NotFound);
    assert!(!kept("asked") && kept("seen"));
    // Whose file is at fault may need its ring once that is mended.
    remove("seen.toml");
    machine.write("agent.d/broken.toml", "id = 5");
    agent.reload().await.unwrap();
    assert!(kept("seen"));
    remove("broken.toml");
    agent.reload().await.unwrap();
    assert!(!kept("seen"));
}

#[tokio::test]
async fn a_volume_without_a_device_is_told() {
    let machine = Machine::new();
    machine.group("shop");
    machine.image("shop");
    let agent = machine.start().await;
    let mut groups = agent.groups.lock().await;
    let shop = groups.get_mut("shop").unwrap();
    shop.remove_devices(vec![Reserved::default()]).await.unwrap();
    let problems = shop.status().await.problems;
    assert!(problems.iter().any(|told| told.contains("volume data has no device")), "{problems:?}");
    drop(groups);
    agent.stop_within(Duration::from_secs(1)).await;
}

#[tokio::test]
async fn a_group_that_was_stopped_or_never_seen_is_told_while_its_file_is_there() {
    let machine = Machine::new();
    machine.group("shop");
    machine.image("shop");
    let agent = machine.start().await;
    assert_eq!(unprotected(&agent).await, []);
    agent.stop_group("shop").await.unwrap();
    machine.group("new");
    let told = unprotected(&agent).await;
    let names: Vec<&str> = told.iter().map(|(group, _)| group.as_str()).collect();
    assert_eq!(names, ["new", "shop"]);
    assert!(told.iter().all(|(_, error)| error == NOT_TAKEN_UP), "{told:?}");
    // Neither is started without being asked for.
    try_late(&agent).await;
    assert!(running(&agent).await.is_empty());

    fs::remove_file(machine.0.path().join("agent.d/shop.toml")).unwrap();
    let reloaded = agent.reload().await.unwrap();
    assert_eq!(reloaded.failed.len(), 1, "{reloaded:?}");
    assert_eq!(unprotected(&agent).await, [("new".into(), reloaded.failed[0].error.clone())]);
    fs::remove_file(machine.0.path().join("agent.d/new.toml")).unwrap();
    assert_eq!(unprotected(&agent).await, []);
    agent.stop().await;
    assert!(agent.reload().await.is_err(), "nothing is started any more");
}

#[tokio::test]
async fn groups_wait_for_the_target_together() {
    let machine = Machine::new();
    for name in ["a", "b", "c"] {
        machine.group(name);
        machine.image(name);
    }
    let agent = machine.start().await;
    let sockets =
        ["a", "b", "c"].map(|name| machine.0.path().join(format!("run/nbd/{name}/data.sock")));
    let open = |socket: &PathBuf| std::os::unix::net::UnixStream::connect(socket).is_ok();
    assert!(sockets.iter().all(open));
    // None of them has an end to its waiting, and yet each begins to stop.
    let stopping = tokio::spawn(async move { agent.stop_within(Duration::MAX).await });
    let left = async {
        while sockets.iter().any(open) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), left).await.expect("one waits for another");
    assert!(!stopping.is_finished(), "the target has nothing");
    stopping.abort();
}
