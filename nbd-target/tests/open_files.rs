//! A process without descriptors left. The limit is the whole process's, so this test has one to itself.

mod common;

use common::{Lab, equals, run, send_until_full, synced};

const MIB: usize = 1 << 20;

#[test]
fn too_many_open_files_stop_the_log_only_for_a_while() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    run(async || {
        let lab = Lab::new("segment = \"1 MiB\"", "");
        let mut source = synced(&lab, 4 * MIB).await;
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
        let open = std::fs::read_dir("/proc/self/fd").expect("listed").count() as u64;
        setrlimit(Resource::RLIMIT_NOFILE, open.saturating_sub(1), hard).expect("lowered");
        send_until_full(&mut source).await;
        let progress = lab.replica().journal().progress();
        assert!(progress.failed.is_none(), "it is not final");
        let why = progress.stalled.expect("it waits");
        // A segment cannot be sealed, or the next one not be begun.
        assert!(why.contains("at present") && why.contains("(os error 24)"), "{why}");
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).expect("raised");
        source.acknowledged().await;
        let last = source.before.seq;
        equals(&lab, &source, last).await;
        source.disconnect();
    });
}
