//! The command against daemons that answer from memory: what is asked of them, and what becomes of
//! their answers.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract;
use axum::routing::{delete, get};
use serde_json::Value;
use tidemark_agent::api::{Control, routes};
use tidemark_control::agent::{
    AgentStatus, FrontKind, GroupFailure, GroupStatus, Ladder, LinkState, LinkStatus, Marked,
    Reloaded, Rung, VerifyStarted, VolumeStatus,
};
use tidemark_control::server::{self, Body, Ok as Answer, Socket};
use tidemark_control::target::{BranchRequest, BranchStatus, Branches, ExportName, TargetStatus};
use tidemark_control::{ApiError, Done};
use tidemark_journal::{GroupId, Position, Seq, TermId, VolumeId};

/// An agent that protects whatever its directory says, but for the disk `bad.img`.
struct Agent {
    directory: PathBuf,
    told: Mutex<Vec<String>>,
    running: Mutex<Vec<String>>,
    in_use: bool,
}

fn group(name: &str) -> GroupStatus {
    GroupStatus {
        name: name.into(),
        id: GroupId([1; 16]),
        target: "192.0.2.7:7410".into(),
        target_name: "recovery".into(),
        link: LinkStatus { state: LinkState::Up, since_wall_ns: 1, sentence: None },
        position: position(),
        durable_seq: Seq(42),
        rpo_target_s: None,
        lag_ns: 0,
        lag_bytes: 0,
        ring_fill_permille: 0,
        rung: Rung::Ring,
        ladder: Ladder::default(),
        sent_bytes_total: 1,
        raw_bytes_total: 1,
        frames_total: 1,
        gaps_total: 0,
        compared_bytes_total: 0,
        sync: None,
        problems: Vec::new(),
        doubt: None,
        verified: Default::default(),
        volumes: vec![VolumeStatus {
            name: "data".into(),
            id: VolumeId(1),
            backing: "/disk.img".into(),
            device: format!("/run/tidemark/nbd/{name}/data.sock").into(),
            front: FrontKind::NbdSocket,
            sectors: 8,
            gap: None,
            catch_up: None,
            verify: None,
            active_regions: 0,
            dirty_regions: 0,
            uncaptured_regions: 0,
        }],
    }
}

fn position() -> Position {
    Position { term: TermId([2; 16]), seq: Seq(42) }
}

impl Control for Agent {
    async fn status(&self) -> AgentStatus {
        let groups = self.running.lock().unwrap().iter().map(|name| group(name)).collect();
        let failed = |error: &str| GroupFailure { group: "store".into(), error: error.into() };
        let unprotected = match self.directory.join("agent.d/store.toml").exists() {
            true => vec![failed("the disk took no claim")],
            false => Vec::new(),
        };
        AgentStatus { node: "db1".into(), version: "1".into(), groups, unprotected }
    }

    async fn mark(&self, group: &str, name: &str) -> Result<Marked, ApiError> {
        self.told.lock().unwrap().push(format!("mark {group} {name}"));
        Ok(Marked {
            position: position(),
            durable_seq: Seq(40),
            wall_ns: 1_795_427_970_000_000_000,
        })
    }

    async fn verify(&self, group: &str, volume: Option<&str>) -> Result<VerifyStarted, ApiError> {
        self.told.lock().unwrap().push(format!("verify {group} {volume:?}"));
        Ok(VerifyStarted { volumes: vec!["data".into()] })
    }

    async fn reload(self: &Arc<Self>) -> Result<Reloaded, ApiError> {
        let mut reloaded = Reloaded::default();
        for entry in fs::read_dir(self.directory.join("agent.d")).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            if fs::read_to_string(&path).unwrap().contains("bad.img") {
                let error = "the disk took no claim".to_owned();
                reloaded.failed.push(GroupFailure { group: name, error });
            } else {
                self.running.lock().unwrap().push(name.clone());
                reloaded.started.push(name);
            }
        }
        Ok(reloaded)
    }

    async fn stop_group(&self, group: &str) -> Result<(), ApiError> {
        let configured = self.directory.join(format!("agent.d/{group}.toml")).exists();
        let still = if configured { ", which may be started again" } else { "" };
        self.told.lock().unwrap().push(format!("stop {group}{still}"));
        match self.in_use {
            true => Err(ApiError::conflict("data is mounted on /srv")),
            false => Ok(()),
        }
    }
}

/// A machine whose daemons run in this process.
struct Machine {
    directory: tempfile::TempDir,
    agent: Arc<Agent>,
    runtime: tokio::runtime::Runtime,
}

impl Machine {
    fn new(in_use: bool) -> Machine {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        fs::write(
            path.join("agent.toml"),
            format!("node = \"db1\"\nstate_dir = \"{}/state\"\n", path.display()),
        )
        .unwrap();
        for image in ["disk.img", "bad.img"] {
            fs::write(path.join(image), vec![0; 4096]).unwrap();
        }
        let agent = Arc::new(Agent {
            directory: path.to_owned(),
            told: Mutex::default(),
            running: Mutex::default(),
            in_use,
        });
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let socket = Socket::bind(&path.join("agent.sock")).unwrap();
        runtime.spawn(server::serve(socket, routes(agent.clone()), std::future::pending()));
        Machine { directory, agent, runtime }
    }

    fn serve_target(&self, routes: Router) {
        let socket = Socket::bind(&self.path().join("target.sock")).unwrap();
        self.runtime.spawn(server::serve(socket, routes, std::future::pending()));
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn run(&self, words: &[&str]) -> Output {
        let directory = self.path().to_str().unwrap();
        Command::new(env!("CARGO_BIN_EXE_tidemark"))
            .args(words.iter().map(|word| word.replace("@/", &format!("{directory}/"))))
            .args(["--config-dir", directory])
            .args(["--agent-socket", &format!("{directory}/agent.sock")])
            .args(["--target-socket", &format!("{directory}/target.sock")])
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// Runs it and returns what it says; it must succeed.
    fn good(&self, words: &[&str]) -> String {
        let output = self.run(words);
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs it and returns why it failed.
    fn bad(&self, words: &[&str]) -> String {
        let output = self.run(words);
        assert_eq!(output.status.code(), Some(1), "{words:?}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    fn protect(&self, group: &'static str, volume: &'static str) -> Output {
        let words = ["protect", group, volume, "--target=192.0.2.7", "--target-name=recovery"];
        self.run(&words)
    }

    fn told(&self) -> Vec<String> {
        std::mem::take(&mut self.agent.told.lock().unwrap())
    }
}

#[test]
fn the_agent_is_asked_and_its_answers_are_shown() {
    let machine = Machine::new(false);
    let said = machine.good(&["mark", "shop", "before the update"]);
    assert_eq!(
        said,
        "shop@mark:before the update is the state at 2026-11-23T09:59:30Z (@seq:42).\n\
         The target does not have it yet: it is at @seq:40.\n"
    );
    machine.agent.running.lock().unwrap().push("shop".into());
    let answer: Value =
        serde_json::from_str(&machine.good(&["mark", "shop", "x", "--json"])).unwrap();
    assert_eq!((&answer["schema"], &answer["position"]["seq"]), (&1.into(), &42.into()));
    assert_eq!(answer["durable_seq"], 42, "the target got it meanwhile");
    let said = machine.good(&["mark", "shop", "y"]);
    assert!(said.ends_with("(@seq:42). The target has it.\n"), "{said}");
    assert!(machine.good(&["verify", "shop/data"]).starts_with("Comparing data of group shop"));
    assert_eq!(
        machine.told(),
        ["mark shop before the update", "mark shop x", "mark shop y", "verify shop Some(\"data\")"]
    );
    let refused = machine.run(&["mark", "shop", "a/b", "--json"]);
    assert_eq!(refused.status.code(), Some(1));
    let answer: Value = serde_json::from_slice(&refused.stdout).unwrap();
    assert_eq!(answer["code"], "bad_request");
}

#[test]
fn a_group_is_protected_shown_and_unprotected() {
    let machine = Machine::new(false);
    let output = machine.protect("shop", "--volume=data=@/disk.img");
    let said = String::from_utf8(output.stdout).unwrap();
    let uri = "nbd+unix:///data?socket=/run/tidemark/nbd/shop/data.sock";
    assert!(said.contains(&format!("{uri} in place of")), "{said}");
    // The target's socket was named, so that its absence counts.
    let output = machine.run(&["status"]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        said.contains("group shop to recovery") && said.contains("target is not running"),
        "{said}"
    );

    fs::create_dir_all(machine.path().join("state/shop")).unwrap();
    let file = machine.path().join("agent.d/shop.toml");
    let said = machine.good(&["unprotect", "shop", "--dry-run"]);
    assert!(said.starts_with("Would end the protection of group shop"), "{said}");
    assert!(file.exists() && machine.told().is_empty());
    machine.good(&["unprotect", "shop"]);
    assert_eq!(machine.told(), ["stop shop"]);
    assert!(!machine.path().join("state/shop").exists());
    assert_eq!(fs::read_dir(machine.path().join("agent.d")).unwrap().count(), 0);
}

#[test]
fn an_unprotect_that_was_cut_short_is_gone_on_with() {
    let machine = Machine::new(false);
    assert!(machine.protect("shop", "--volume=data=@/disk.img").status.success());
    let directory = machine.path().join("agent.d");
    fs::rename(directory.join("shop.toml"), directory.join("shop.unprotected")).unwrap();
    machine.good(&["unprotect", "shop"]);
    assert_eq!(machine.told(), ["stop shop"]);
    assert_eq!(fs::read_dir(directory).unwrap().count(), 0);
}

#[test]
fn a_group_that_does_not_run_is_shown_and_fails_the_check() {
    let machine = Machine::new(false);
    machine.serve_target(Router::new().route(
        "/v1/status",
        get(async || {
            let nothing = TargetStatus {
                node: "recovery".into(),
                version: "1".into(),
                nbd_listen: Vec::new(),
                nbd_socket: None,
                groups: Vec::new(),
            };
            Answer(nothing)
        }),
    ));
    assert!(machine.protect("shop", "--volume=data=@/disk.img").status.success());
    machine.good(&["status"]);
    machine.good(&["check"]);
    fs::write(machine.path().join("agent.d/store.toml"), "").unwrap();
    let output = machine.run(&["status"]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("group store is NOT PROTECTED\n    the disk took no claim\n"), "{said}");
    for words in [&["check"][..], &["check", "--group=store"]] {
        let output = machine.run(words);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let said = String::from_utf8(output.stdout).unwrap();
        let expected = "TIDEMARK CRITICAL - store: not protected: the disk took no claim";
        assert!(said.starts_with(expected), "{said}");
    }
    machine.good(&["check", "--group=shop"]);
}

#[test]
fn a_socket_is_named_as_clients_want_it_also_before_the_agent_runs() {
    let machine = Machine::new(false);
    fs::remove_file(machine.path().join("agent.sock")).unwrap();
    let protect = |group, front| {
        let words = ["protect", group, "--volume=data=@/disk.img", "--target=192.0.2.7"];
        let said = machine.good(&[&words[..], &["--target-name=recovery", front]].concat());
        fs::remove_file(machine.path().join(format!("agent.d/{group}.toml"))).unwrap();
        assert!(said.contains("No agent runs"), "{said}");
        said
    };
    let said = protect("shop", "--front=nbd-socket");
    let uri = "nbd+unix:///data?socket=/run/tidemark/nbd/shop/data.sock";
    assert!(said.contains(&format!("{uri} in place of")) && !said.contains("/dev"), "{said}");
    let said = protect("store", "--front=ublk");
    assert!(said.contains("/dev/tidemark/store/data in place of"), "{said}");
}

#[test]
fn what_the_agent_refuses_is_taken_back() {
    let machine = Machine::new(false);
    let output = machine.protect("shop", "--volume=data=@/bad.img");
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("cannot protect the group: the disk took no claim"), "{said}");
    assert!(!machine.path().join("agent.d/shop.toml").exists());
}

#[test]
fn a_disk_in_use_stays_protected() {
    let machine = Machine::new(true);
    assert!(machine.protect("shop", "--volume=data=@/disk.img").status.success());
    let said = machine.bad(&["unprotect", "shop"]);
    assert!(
        said.contains("data is mounted on /srv; stop what uses the protected devices"),
        "{said}"
    );
    assert!(machine.path().join("agent.d/shop.toml").exists());
}

fn branch(request: BranchRequest) -> BranchStatus {
    let export = format!("{}/data@branch:test", request.group);
    BranchStatus {
        name: request.name.unwrap_or_else(|| "made-up".into()),
        group: request.group,
        parent: position(),
        wall_ns: 1_795_427_970_000_000_000,
        created_wall_ns: 1_795_427_970_000_000_000,
        written_bytes: 3 << 20,
        temporary: request.temporary,
        clients: 0,
        damage: None,
        problem: None,
        exports: vec![ExportName { volume: "data".into(), export, sectors: 8 }],
    }
}

#[test]
fn branches_are_made_listed_and_dropped() {
    let machine = Machine::new(false);
    let all: Arc<Mutex<Vec<BranchStatus>>> = Arc::default();
    let (made, listed, dropped) = (all.clone(), all.clone(), all.clone());
    machine.serve_target(
        Router::new()
            .route(
                "/v1/branches",
                get(async move || {
                    Answer(Branches {
                        branches: listed.lock().unwrap().clone(),
                        unread: Vec::new(),
                    })
                })
                .post(async move |Body(request): Body<BranchRequest>| {
                    assert_eq!(request.point, "mark:before the update");
                    let made_now = branch(request);
                    made.lock().unwrap().push(made_now.clone());
                    Answer(made_now)
                }),
            )
            .route(
                "/v1/groups/{group}/branches/{name}",
                delete(async move |extract::Path(of): extract::Path<(String, String)>| {
                    let is_it =
                        |branch: &BranchStatus| (&branch.group, &branch.name) == (&of.0, &of.1);
                    dropped.lock().unwrap().retain(|branch| !is_it(branch));
                    Answer(Done {})
                }),
            ),
    );
    assert_eq!(machine.good(&["branch", "list"]), "There are no branches.\n");
    let said = machine.good(&["branch", "create", "test", "shop@mark:before the update"]);
    assert!(said.contains("'tidemark attach shop@branch:test' presents it"), "{said}");
    let said = machine.good(&["branch", "list"]);
    assert_eq!(said, "test  of shop at 2026-11-23T09:59:30Z, 3.0 MiB written\n");
    assert!(machine.bad(&["branch", "drop", "other"]).contains("there is no branch 'other'"));
    assert!(machine.good(&["branch", "drop", "test", "--dry-run"]).starts_with("Would drop"));
    assert_eq!(all.lock().unwrap().len(), 1);
    let of_till = BranchStatus { group: "till".to_owned(), ..all.lock().unwrap()[0].clone() };
    all.lock().unwrap().push(of_till);
    let said = machine.bad(&["branch", "drop", "test"]);
    assert!(said.contains("say which of shop@branch:test, till@branch:test"), "{said}");
    assert!(machine.good(&["branch", "drop", "till@branch:test"]).contains("test of group till"));
    assert!(machine.good(&["branch", "drop", "test"]).starts_with("Dropped branch test"));
    assert!(all.lock().unwrap().is_empty());
}

#[test]
fn a_replica_is_forgotten_only_when_that_is_confirmed() {
    let machine = Machine::new(false);
    let forgotten: Arc<Mutex<Vec<String>>> = Arc::default();
    let list = forgotten.clone();
    let route = delete(async move |extract::Path(group): extract::Path<String>| {
        if group == "live" {
            return Err(ApiError::conflict("it is in the target's configuration"));
        }
        list.lock().unwrap().push(group);
        Ok(Answer(Done {}))
    });
    machine.serve_target(Router::new().route("/v1/groups/{group}", route));
    let output = machine.run(&["forget", "shop"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(said.contains("no way back; give --yes"), "{said}");
    assert!(machine.bad(&["forget", "live", "--yes"]).contains("in the target's configuration"));
    assert!(forgotten.lock().unwrap().is_empty());
    let said = machine.good(&["forget", "shop", "--yes"]);
    assert_eq!(said, "The target has removed all that it kept of the group 'shop'.\n");
    assert_eq!(*forgotten.lock().unwrap(), ["shop"]);
}
