use clap::Parser;
use tidemark_link::pki::Identity;

use super::*;
use crate::cli::{Cli, Command};

fn init(dir: &Path, more: &[&str]) -> Result<ExitCode> {
    let words = [&["tidemark", "init", "--dir", dir.to_str().unwrap()], more].concat();
    let cli = Cli::try_parse_from(words).unwrap();
    let Command::Init(args) = &cli.command else { unreachable!() };
    run(args, Output::new(true))
}

fn certificate(dir: &Path, node: &str) -> Vec<u8> {
    let read = |name: &str| fs::read(dir.join("nodes").join(node).join(name)).unwrap();
    let identity = Identity::from_pem(&read("node.pem"), &read("node.key")).unwrap();
    assert_eq!(identity.name().as_str(), node);
    identity.chain()[0].to_vec()
}

fn has(certificate: &[u8], part: &[u8]) -> bool {
    certificate.windows(part.len()).any(|window| window == part)
}

#[test]
fn addresses_stand_in_the_certificate_of_their_node_alone() {
    let dir = tempfile::tempdir().unwrap();
    let recovery = "--node=recovery=192.0.2.7,dr.example.org,2001:db8::7";
    init(dir.path(), &["--node=db1", recovery]).unwrap();
    // As alternative names: 0x82 is a DNS name, 0x87 an IP address.
    let v6 = [0x87, 16, 0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7];
    let parts = [&b"\x82\x0edr.example.org"[..], &[0x87, 4, 192, 0, 2, 7], &v6];
    let (db1, made) = (certificate(dir.path(), "db1"), certificate(dir.path(), "recovery"));
    for part in parts {
        assert!(has(&made, part) && !has(&db1, part), "{part:?}");
    }

    let again = init(dir.path(), &["--node=recovery=192.0.2.8"]).unwrap_err().to_string();
    assert!(again.contains("give --renew to replace it"), "{again}");
    init(dir.path(), &["--node=recovery=192.0.2.8", "--renew"]).unwrap();
    let renewed = certificate(dir.path(), "recovery");
    assert!(has(&renewed, &[0x87, 4, 192, 0, 2, 8]) && !has(&renewed, parts[1]));
}

#[test]
fn what_is_no_address_is_refused() {
    for bad in ["recovery=", "recovery=a b", "recovery=192.0.2.7,", "recovery=x.tidemark.internal"]
    {
        let words = ["tidemark", "init", "--node", bad];
        let said = Cli::try_parse_from(words).unwrap_err().to_string();
        assert!(said.contains("is not an address"), "{bad}: {said}");
    }
}
