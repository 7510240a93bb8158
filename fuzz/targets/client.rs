//! An NBD client before a server that sends anything. The first byte says what the client asks for.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidemark_fuzz::stream::{Sent, runtime};
use tidemark_nbd::client::{Client, Options};

fuzz_target!(|bytes: &[u8]| {
    let Some((mode, bytes)) = bytes.split_first() else { return };
    let stream = Box::new(Sent::new(bytes));
    let options = Options { simple_replies_only: mode & 1 != 0, ..Options::default() };
    runtime().block_on(async {
        if mode & 2 != 0 {
            let _ = Client::list_over(stream, &options).await;
            return;
        }
        let Ok(client) = Client::over(stream, "disk", &options).await else { return };
        // Their cookies are 0 to 3, and all of them wait before the first reply is read.
        let (part, more, status, _) = tokio::join!(
            client.read(512, 1024),
            client.read(u64::MAX - 4096, 4096),
            client.block_status(0, 1 << 20, false),
            client.flush(),
        );
        assert!(part.map_or(true, |data| data.len() == 1024), "all that was asked for");
        assert!(more.map_or(true, |data| data.len() == 4096));
        assert!(status.map_or(true, |extents| extents.len() <= bytes.len() / 8));
    });
});
