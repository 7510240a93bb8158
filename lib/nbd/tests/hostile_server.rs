//! A server that does not mean well: what it sends costs the client bounded memory, and is refused.

use std::time::Duration;

use bytes::{BufMut, BytesMut};
use tidemark_nbd::client::{Client, ConnectError, Options};
use tidemark_nbd::proto::options::{ReplyType, info, option, put_reply};
use tidemark_nbd::proto::transmission::{chunk, put_chunk};
use tidemark_nbd::proto::{FLAG_FIXED_NEWSTYLE, INIT_MAGIC, OPTION_MAGIC, REQUEST_MAGIC};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

fn greeting() -> BytesMut {
    let mut out = BytesMut::new();
    out.put_u64(INIT_MAGIC);
    out.put_u64(OPTION_MAGIC);
    out.put_u16(FLAG_FIXED_NEWSTYLE);
    out
}

/// Sends a greeting, then the same reply for as long as it is taken; how many bytes that were.
async fn repeat(mut stream: DuplexStream, option: u32, kind: ReplyType, data: &[u8]) -> usize {
    let mut out = greeting();
    let mut sent = 0;
    loop {
        for _ in 0..1000 {
            put_reply(&mut out, option, kind, data);
        }
        if stream.write_all(&out).await.is_err() {
            return sent;
        }
        sent += out.len();
        out.clear();
    }
}

/// They were gathered until there was no memory.
#[tokio::test]
async fn replies_without_end_are_not_gathered() {
    let options = Options { simple_replies_only: true, ..Options::default() };
    let empty_name = info::NAME.to_be_bytes();
    let (ours, theirs) = tokio::io::duplex(1 << 20);
    let (sent, entered) = tokio::join!(
        repeat(theirs, option::GO, ReplyType::Info, &empty_name),
        Client::over(Box::new(ours), "disk", &options),
    );
    assert!(matches!(entered.err(), Some(ConnectError::Protocol(_))));
    assert!((16 << 20..24 << 20).contains(&sent), "{sent}");

    let (ours, theirs) = tokio::io::duplex(1 << 20);
    let (sent, listed) = tokio::join!(
        repeat(theirs, option::LIST, ReplyType::Server, &[0; 4]),
        Client::list_over(Box::new(ours), &options),
    );
    assert!(matches!(listed.err(), Some(ConnectError::Protocol(_))));
    assert!((16 << 20..24 << 20).contains(&sent), "{sent}");
}

/// A block status of 64 MiB became a list of 192 MiB.
#[tokio::test]
async fn a_chunk_is_not_longer_than_its_request_allows() {
    let (ours, mut theirs) = tokio::io::duplex(1 << 20);
    let mut out = greeting();
    put_reply(&mut out, option::STRUCTURED_REPLY, ReplyType::Ack, &[]);
    put_reply(&mut out, option::SET_META_CONTEXT, ReplyType::Ack, &[]);
    let mut export = BytesMut::new();
    export.put_u16(info::EXPORT);
    export.put_u64(1 << 20);
    export.put_u16(1);
    put_reply(&mut out, option::GO, ReplyType::Info, &export);
    put_reply(&mut out, option::GO, ReplyType::Ack, &[]);
    theirs.write_all(&out).await.unwrap();
    let client = Client::over(Box::new(ours), "disk", &Options::default()).await.unwrap();
    let answer = tokio::spawn(async move { client.block_status(0, 1 << 20, false).await });
    let (mut asked, magic) = (BytesMut::new(), REQUEST_MAGIC.to_be_bytes());
    while !asked.windows(4).any(|bytes| bytes == magic) {
        assert!(theirs.read_buf(&mut asked).await.unwrap() > 0);
    }
    // The head alone: the rest is not waited for.
    let mut out = BytesMut::new();
    put_chunk(&mut out, true, chunk::BLOCK_STATUS, 0, 2 << 20);
    theirs.write_all(&out).await.unwrap();
    let answer = tokio::time::timeout(Duration::from_secs(60), answer).await;
    let refused = answer.expect("an answer").unwrap().unwrap_err();
    assert!(refused.to_string().contains("absurd length"), "{refused}");
}
