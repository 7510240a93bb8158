//! Linux's own NBD client on a point: over the network with TLS from another machine, and over a Unix socket
//! on the target.

use anyhow::{Result, ensure};
use tidemark_tests::pair::{GROUP, Pair, Plan};
use tidemark_tests::vm::Lab;

const MIB: u64 = 1 << 20;
/// A device that udev still looks at, since it is new, is in use as far as the kernel is concerned.
const LOAD_MODULE: &str = "modprobe nbd && udevadm settle";

#[test]
fn the_kernels_client_reads_a_point_over_tls_and_unix() -> Result<()> {
    Lab::run("clients", 2, |lab| {
        Pair::run(lab, Plan::new(&[("data", 96 * MIB)]), |pair| {
            pair.check_filesystem("data")?;
            pair.source.sh("sync")?;
            pair.wait_in_sync()?;
            let export = format!("{GROUP}/data@latest");

            let client =
                format!("nbd-client {} 10809 /dev/nbd5 -N '{export}'", pair.target_address);
            let plain = pair.source.run(&client)?;
            ensure!(!plain.success(), "a remote client was served without TLS");
            let pki = "/etc/tidemark/pki";
            let tls = format!(
                "{client} -certfile {pki}/node.pem -keyfile {pki}/node.key \
                 -cacertfile {pki}/ca.pem -tlshostname target.tidemark.internal"
            );
            pair.source.sh(&format!("{LOAD_MODULE} && {tls}"))?;
            let raw = pair.raw_disk("data");
            pair.source.sh(&format!(
                "[ $(blockdev --getro /dev/nbd5) = 1 ] && cmp /dev/nbd5 {raw} && \
                 mount -o ro,noload /dev/nbd5 /mnt && diff -r /usr/sbin /mnt/sbin && umount /mnt && \
                 nbd-client -d /dev/nbd5"
            ))?;

            let sum = pair.source.sh(&format!("md5sum <{raw}"))?;
            let unix = pair.target.sh(&format!(
                "{LOAD_MODULE} && \
                 nbd-client -unix /run/tidemark/nbd.sock /dev/nbd5 -N '{export}' >&2 && \
                 md5sum </dev/nbd5 && nbd-client -d /dev/nbd5 >&2"
            ))?;
            ensure!(unix == sum, "over the Unix socket it is {unix}, the disk is {sum}");
            Ok(())
        })
    })
}
