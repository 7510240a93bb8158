//! Both sides of NBD.

use bytes::{BufMut, BytesMut};
use tidemark_nbd::Errno;
use tidemark_nbd::proto::options::{
    BASE_ALLOCATION, InfoRequest, MetaContextRequest, OptionHeader, ReplyType, info, option,
    put_reply,
};
use tidemark_nbd::proto::transmission::{
    Command, Request, chunk, put_block_status, put_chunk, put_data_chunk, put_error_chunk,
    put_hole_chunk, put_simple_reply,
};
use tidemark_nbd::proto::{FLAG_FIXED_NEWSTYLE, INIT_MAGIC, OPTION_MAGIC};

use crate::put;

/// Clients for the server, and servers for the client.
pub fn put_all() -> std::io::Result<()> {
    let mut haggling = BytesMut::new();
    haggling.put_u8(0);
    haggling.put_u32(3);
    let put_option = |out: &mut BytesMut, number, data: &[u8]| {
        OptionHeader { option: number, length: data.len() as u32 }.encode(out);
        out.put_slice(data);
    };
    put_option(&mut haggling, option::STRUCTURED_REPLY, &[]);
    put_option(&mut haggling, option::LIST, &[]);
    let mut data = BytesMut::new();
    MetaContextRequest { name: "disk".into(), queries: vec![BASE_ALLOCATION.into()] }
        .encode(&mut data);
    put_option(&mut haggling, option::SET_META_CONTEXT, &data);
    let mut data = BytesMut::new();
    InfoRequest { name: "disk".into(), wanted: vec![1, 2, 3] }.encode(&mut data);
    put_option(&mut haggling, option::INFO, &data);
    put_option(&mut haggling, option::GO, &data);
    let mut requests = BytesMut::new();
    let all = [
        (Command::Read, 0),
        (Command::Write, 1),
        (Command::Flush, 0),
        (Command::Trim, 0),
        (Command::Cache, 0),
        (Command::WriteZeroes, 2),
        (Command::BlockStatus, 8),
        (Command::Disconnect, 0),
    ];
    for (number, (command, flags)) in all.into_iter().enumerate() {
        let length = if matches!(command, Command::Flush | Command::Disconnect) { 0 } else { 512 };
        Request { flags, command, cookie: number as u64, offset: length.into(), length }
            .encode(&mut requests);
        if command == Command::Write {
            requests.put_slice(&[0x5a; 512]);
        }
    }
    haggling.put_slice(&requests);
    put("nbd", "options-and-requests", &haggling)?;
    let mut bare = BytesMut::new();
    bare.put_u8(0);
    bare.put_u32(1);
    put_option(&mut bare, option::EXPORT_NAME, b"disk");
    bare.put_slice(&requests);
    put("nbd", "export-name", &bare)?;
    put("nbd", "entered", &[&[1], &requests[..]].concat())?;
    client()
}

/// What a server says: to a client that is offered structured replies, to one that wants none, and to one
/// that asks for a list.
fn client() -> std::io::Result<()> {
    let greeting = |mode: u8| {
        let mut out = BytesMut::new();
        out.put_u8(mode);
        out.put_u64(INIT_MAGIC);
        out.put_u64(OPTION_MAGIC);
        out.put_u16(FLAG_FIXED_NEWSTYLE);
        out
    };
    let mut export = BytesMut::new();
    export.put_u16(info::EXPORT);
    export.put_u64(1 << 20);
    export.put_u16(1);
    let mut sizes = BytesMut::new();
    sizes.put_u16(info::BLOCK_SIZE);
    [1, 4096, 1 << 20].into_iter().for_each(|size| sizes.put_u32(size));
    let put_go = |out: &mut BytesMut| {
        put_reply(out, option::GO, ReplyType::Info, &export);
        put_reply(out, option::GO, ReplyType::Info, &sizes);
        put_reply(out, option::GO, ReplyType::Ack, &[]);
    };
    let mut out = greeting(0);
    put_reply(&mut out, option::STRUCTURED_REPLY, ReplyType::Ack, &[]);
    put_reply(
        &mut out,
        option::SET_META_CONTEXT,
        ReplyType::MetaContext,
        b"\0\0\0\x01base:allocation",
    );
    put_reply(&mut out, option::SET_META_CONTEXT, ReplyType::Ack, &[]);
    put_go(&mut out);
    put_data_chunk(&mut out, false, 0, 512, 512);
    out.put_slice(&[0x5a; 512]);
    put_hole_chunk(&mut out, true, 0, 1024, 512);
    put_error_chunk(&mut out, 1, Errno::Inval, "beyond the end");
    put_block_status(&mut out, 2, 1, [(1 << 20, 3)].into_iter());
    put_chunk(&mut out, true, chunk::NONE, 3, 0);
    put("client", "structured", &out)?;
    let mut out = greeting(1);
    put_go(&mut out);
    for (cookie, bytes) in [(0, 1024), (1, 4096), (3, 0)] {
        put_simple_reply(&mut out, cookie, None);
        out.put_slice(&vec![7; bytes]);
    }
    put_simple_reply(&mut out, 2, Some(Errno::Inval));
    put("client", "simple", &out)?;
    let mut out = greeting(2);
    put_reply(&mut out, option::LIST, ReplyType::Server, b"\0\0\0\x04diska disk");
    put_reply(&mut out, option::LIST, ReplyType::Ack, &[]);
    put("client", "list", &out)
}
