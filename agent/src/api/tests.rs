use std::sync::Mutex;
use std::time::Duration;

use tidemark_control::agent::{AgentClient, GroupFailure};
use tidemark_control::server::{self, Socket};
use tidemark_control::{ClientError, ErrorCode};
use tidemark_journal::{Position, Seq, TermId};

use super::*;

/// An agent with one group, `shop`, that remembers what it was told.
#[derive(Default)]
struct Fake {
    told: Mutex<Vec<String>>,
    /// How long a change takes.
    takes: Duration,
}

impl Fake {
    fn tell(&self, group: &str, what: String) -> Result<(), ApiError> {
        if group != "shop" {
            return Err(ApiError::not_found(format!("there is no group '{group}'")));
        }
        self.told.lock().unwrap().push(what);
        Ok(())
    }
}

fn marked() -> Marked {
    let position = Position { term: TermId([7; 16]), seq: Seq(42) };
    Marked { position, durable_seq: Seq(40), wall_ns: 5 }
}

impl Control for Fake {
    async fn status(&self) -> AgentStatus {
        AgentStatus {
            node: "db1".into(),
            version: "1".into(),
            groups: Vec::new(),
            unprotected: Vec::new(),
        }
    }

    async fn mark(&self, group: &str, name: &str) -> Result<Marked, ApiError> {
        self.tell(group, format!("mark {name}"))?;
        Ok(marked())
    }

    async fn verify(&self, group: &str, volume: Option<&str>) -> Result<VerifyStarted, ApiError> {
        self.tell(group, format!("verify {volume:?}"))?;
        Ok(VerifyStarted { volumes: vec!["data".into()] })
    }

    async fn reload(self: &Arc<Self>) -> Result<Reloaded, ApiError> {
        tokio::time::sleep(self.takes).await;
        self.tell("shop", "reloaded".into())?;
        let failed = vec![GroupFailure { group: "x".into(), error: "no such disk".into() }];
        Ok(Reloaded { started: vec!["shop".into()], failed, ..Reloaded::default() })
    }

    async fn stop_group(&self, group: &str) -> Result<(), ApiError> {
        tokio::time::sleep(self.takes).await;
        self.tell(group, "stopped".into())?;
        Err(ApiError::conflict("/dev/tidemark/shop/data is in use"))
    }
}

fn served() -> (AgentClient, Arc<Fake>, tempfile::TempDir) {
    serve(Fake::default())
}

fn serve(fake: Fake) -> (AgentClient, Arc<Fake>, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let socket = Socket::bind(&directory.path().join("agent.sock")).unwrap();
    let client = AgentClient::new(socket.path());
    let fake = Arc::new(fake);
    tokio::spawn(server::serve(socket, routes(fake.clone()), std::future::pending()));
    (client, fake, directory)
}

fn refusal<T: std::fmt::Debug>(answer: Result<T, ClientError>) -> (ErrorCode, String) {
    match answer.unwrap_err() {
        ClientError::Api(error) => (error.code, error.error),
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn every_question_reaches_the_agent_and_its_answer_the_client() {
    let (client, fake, _directory) = served();
    assert_eq!(client.status().await.unwrap().node, "db1");
    assert_eq!(client.mark("shop", "before the update").await.unwrap(), marked());
    assert_eq!(client.verify("shop", None).await.unwrap().volumes, ["data"]);
    assert_eq!(client.verify("shop", Some("data")).await.unwrap().volumes, ["data"]);
    let reloaded = client.reload().await.unwrap();
    assert_eq!((reloaded.started.len(), reloaded.failed[0].error.as_str()), (1, "no such disk"));
    let stopped = refusal(client.stop_group("shop").await);
    assert_eq!(stopped, (ErrorCode::Conflict, "/dev/tidemark/shop/data is in use".into()));
    let told = fake.told.lock().unwrap().clone();
    let wanted =
        ["mark before the update", "verify None", "verify Some(\"data\")", "reloaded", "stopped"];
    assert_eq!(told, wanted);
}

/// Somebody pressed Ctrl-C, or did not want to wait any longer.
#[tokio::test]
async fn a_change_comes_to_its_end_when_who_asked_for_it_goes_away() {
    let takes = Duration::from_millis(300);
    let (client, fake, _directory) = serve(Fake { takes, ..Fake::default() });
    let hurry = Duration::from_millis(100);
    assert!(tokio::time::timeout(hurry, client.stop_group("shop")).await.is_err());
    assert!(tokio::time::timeout(hurry, client.reload()).await.is_err());
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(*fake.told.lock().unwrap(), ["stopped", "reloaded"]);
}

#[tokio::test]
async fn what_cannot_be_a_name_does_not_reach_the_agent() {
    let (client, fake, _directory) = served();
    let (code, sentence) = refusal(client.mark("other", "x").await);
    assert_eq!((code, sentence.as_str()), (ErrorCode::NotFound, "there is no group 'other'"));
    for group in ["", "Shop", "../shop", "shop/verify", "shop mark"] {
        let (code, _) = refusal(client.mark(group, "x").await);
        assert!(matches!(code, ErrorCode::BadRequest | ErrorCode::NotFound), "{group}");
    }
    for name in ["", "a/b", "a@b", "a%20b", "a\nb", "a\u{9b}b", " a", "a\u{a0}", &"x".repeat(256)] {
        assert_eq!(refusal(client.mark("shop", name).await).0, ErrorCode::BadRequest, "{name}");
        let request = MarkRequest { name: name.to_owned() };
        let told = client.client().post::<Marked>("/v1/groups/shop/mark", &request).await;
        assert_eq!(refusal(told).0, ErrorCode::BadRequest, "{name}, past the client's own look");
    }
    let long = MarkRequest { name: "x".repeat(1 << 20) };
    let told = client.client().post::<Marked>("/v1/groups/shop/mark", &long).await;
    assert_eq!(refusal(told).1, "the request is longer than the 65536 bytes that are taken");
    assert!(fake.told.lock().unwrap().is_empty());
}
