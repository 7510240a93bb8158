use std::os::unix::fs::FileTypeExt;
use std::time::Duration;

use axum::routing::{get, post};
use serde::Deserialize;
use tokio::sync::oneshot;

use super::*;
use crate::client::{Client, ClientError, segment};
use crate::{Done, ErrorCode};

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Echo {
    text: String,
}

fn routes() -> Router {
    Router::new()
        .route("/echo", post(async |Body(echo): Body<Echo>| Ok(echo)))
        .route("/done", get(async || Ok(Done {})))
        .route("/slow", get(std::future::pending::<Response>))
        .route("/other", get(async || axum::Json(serde_json::json!({"schema": 7, "x": 1}))))
        .route(
            "/named/{name}",
            get(async |axum::extract::Path(text): axum::extract::Path<String>| Ok(Echo { text })),
        )
        .route("/refuse", get(async || ApiError::conflict("a name is taken")))
}

struct Served {
    client: Client,
    _stop: oneshot::Sender<()>,
    _directory: tempfile::TempDir,
}

fn served() -> Served {
    let directory = tempfile::tempdir().unwrap();
    let socket = Socket::bind(&directory.path().join("run/api.sock")).unwrap();
    let client = Client::new("agent", socket.path());
    let (stop, stopped) = oneshot::channel::<()>();
    tokio::spawn(serve(socket, routes(), async {
        let _ = stopped.await;
    }));
    Served { client, _stop: stop, _directory: directory }
}

#[tokio::test]
async fn questions_are_answered_with_the_schema() {
    let served = served();
    let echo = Echo { text: "hé".into() };
    assert_eq!(served.client.post::<Echo>("/echo", &echo).await.unwrap(), echo);
    assert_eq!(served.client.get::<Done>("/done").await.unwrap(), Done {});
    let raw: serde_json::Value = served.client.post("/echo", &echo).await.unwrap();
    assert_eq!(raw, serde_json::json!({"text": "hé"}));
    let name = "a b/ü%";
    let got: Echo = served.client.get(&format!("/named/{}", segment(name))).await.unwrap();
    assert_eq!(got.text, name);
}

#[tokio::test]
async fn every_failure_has_the_one_shape() {
    let served = served();
    let api = async |error: Result<Done, ClientError>| match error.unwrap_err() {
        ClientError::Api(error) => (error.code, error.error),
        other => panic!("{other}"),
    };
    let refused = api(served.client.get("/refuse").await).await;
    assert_eq!(refused, (ErrorCode::Conflict, "a name is taken".into()));
    let (code, sentence) = api(served.client.get("/nothing").await).await;
    assert_eq!((code, sentence.as_str()), (ErrorCode::NotFound, "there is no /nothing here"));
    let (code, sentence) = api(served.client.get("/echo").await).await;
    assert_eq!(code, ErrorCode::BadRequest);
    assert_eq!(sentence, "/echo cannot be used with GET");
    let body = serde_json::json!({"text": "x", "more": 1});
    let (code, sentence) = api(served.client.post("/echo", &body).await).await;
    assert_eq!(code, ErrorCode::BadRequest);
    assert!(sentence.contains("unknown field `more`"), "{sentence}");
    let long = Echo { text: "x".repeat(BODY_BYTES_MAX) };
    let (code, _) = api(served.client.post("/echo", &long).await).await;
    assert_eq!(code, ErrorCode::BadRequest);
}

#[tokio::test]
async fn another_version_is_noticed_before_its_shape() {
    let served = served();
    let error = served.client.get::<Echo>("/other").await.unwrap_err();
    assert!(matches!(error, ClientError::Schema { theirs: 7, .. }), "{error}");
}

#[tokio::test]
async fn a_silent_daemon_is_given_up() {
    let served = served();
    let client = served.client.clone().with_patience(Duration::from_millis(50));
    let error = client.get::<Done>("/slow").await.unwrap_err();
    assert!(matches!(error, ClientError::TimedOut { .. }), "{error}");
}

#[test]
fn a_missing_daemon_is_named_with_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let client = Client::new("agent", &directory.path().join("none.sock"));
    let error = client.wait(client.get::<Done>("/done")).unwrap_err().to_string();
    assert!(error.starts_with("the agent is not running: nothing answers on"), "{error}");
    assert!(error.contains("systemctl start tidemark-agent"), "{error}");
}

#[tokio::test]
async fn the_socket_file_is_private_and_goes_away() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("api.sock");
    let socket = Socket::bind(&path).unwrap();
    let metadata = fs::metadata(&path).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.mode() & 0o777, SOCKET_MODE);
    let second = Socket::bind(&path).unwrap_err();
    assert_eq!(second.kind(), io::ErrorKind::AddrInUse);
    assert!(second.to_string().contains("another process answers there"), "{second}");
    drop(socket);
    assert!(!path.exists());
}

#[tokio::test]
async fn a_dead_process_socket_is_replaced_and_any_other_file_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("api.sock");
    drop(net::UnixListener::bind(&path).unwrap());
    let socket = Socket::bind(&path).unwrap();
    assert!(net::UnixStream::connect(&path).is_ok());
    // One that has been replaced leaves its successor alone.
    fs::remove_file(&path).unwrap();
    let _successor = net::UnixListener::bind(&path).unwrap();
    drop(socket);
    assert!(path.exists());
    let file = directory.path().join("file");
    fs::write(&file, "precious").unwrap();
    assert!(Socket::bind(&file).is_err());
    assert_eq!(fs::read(&file).unwrap(), b"precious");
}

#[tokio::test]
async fn stopping_ends_the_loop_and_removes_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("api.sock");
    let socket = Socket::bind(&path).unwrap();
    serve(socket, routes(), async {}).await.unwrap();
    assert!(!path.exists());
}
