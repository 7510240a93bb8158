//! Over TCP a node reads the groups that it was given, and nothing tells it of others.

mod common;

use std::net::SocketAddr;

use common::{Lab, run, source::Source};
use tidemark_control::target::{BranchRequest, TargetClient};
use tidemark_journal::{GapReason, GroupId};
use tidemark_link::pki::Authority;
use tidemark_nbd::{
    Errno,
    client::{Client, ConnectError, Options},
    proto::options::ReplyType,
};

const CONTENT: [u8; 4096] = [7; 4096];

/// A target with the groups `shop` of `db1` and `till` of `db2`, each with content and a branch. `shop`
/// may be read by `report`, and its branches written by `recovery2`.
async fn two_groups(certificates: bool) -> Lab {
    let more = "readers = [\"report\"]\nbranch_writers = [\"recovery2\"]";
    let mut lab = Lab::new("", more);
    lab.config.nbd.listen = Some(SocketAddr::from(([127, 0, 0, 1], 0)));
    lab.config.nbd.require_client_certificate = certificates;
    let mut till = lab.config.groups[0].clone();
    (till.name, till.node) = ("till".parse().expect("a name"), "db2".parse().expect("a name"));
    (till.readers, till.branch_writers) = (Vec::new(), Vec::new());
    lab.config.groups.push(till);
    lab.restart();
    let api = TargetClient::new(&lab.config.api.socket);
    for (group, node, id) in [("shop", "db1", 7), ("till", "db2", 8)] {
        let mut source = Source::new(&[1 << 20]);
        (source.name, source.node) = (group.into(), node.into());
        source.group = GroupId([id; 16]);
        source.connect(&lab).await;
        source.gap_begin(0, GapReason::FirstSync);
        source.gap_end(0);
        source.write(0, 0, &CONTENT);
        source.send().await;
        source.acknowledged().await;
        let branch = BranchRequest {
            name: Some(format!("{group}-fix")),
            group: group.to_owned(),
            volume: None,
            point: "latest".to_owned(),
            temporary: false,
        };
        api.create_branch(&branch).await.expect("made");
    }
    lab
}

async fn open(lab: &Lab, options: &Options, export: &str) -> Result<Client, ConnectError> {
    Client::connect(lab.target().nbd_addr().expect("configured"), export, options).await
}

/// The kind and the sentence of a refusal; both ways of asking are told the same.
async fn refusal(lab: &Lab, options: &Options, export: &str) -> (u32, String) {
    let address = lab.target().nbd_addr().expect("configured");
    let looked = Client::info_of(address, export, options).await.map(|_| ());
    let opened = open(lab, options, export).await.map(|_| ());
    let said = [looked, opened].map(|answer| match answer {
        Err(ConnectError::Refused { kind, message }) => (kind, message),
        other => panic!("{export} is not refused: {other:?}"),
    });
    assert_eq!(said[0], said[1]);
    said[0].clone()
}

async fn listed(lab: &Lab, options: &Options) -> Vec<String> {
    let address = lab.target().nbd_addr().expect("configured");
    let entries = Client::list(address, options).await.expect("a listing");
    entries.into_iter().map(|entry| entry.name).collect()
}

/// Any certificate of the authority read every group, and wrote every branch.
#[test]
fn a_node_reads_its_own_groups_and_learns_of_no_other() {
    run(async || {
        let lab = two_groups(true).await;
        for (node, may) in [
            ("db1", &["shop"][..]),
            ("report", &["shop"]),
            ("recovery2", &["shop"]),
            ("db2", &["till"]),
            ("db3", &[]),
            ("dr1", &["shop", "till"]),
        ] {
            let options = lab.nbd_options(Some(node));
            let names = listed(&lab, &options).await;
            for group in ["shop", "till"] {
                let own = format!("{group}/disk0@latest");
                let branch = format!("{group}/disk0@branch:{group}-fix");
                let named = names.iter().any(|name| name.contains(group));
                assert_eq!(named, may.contains(&group), "{node} is shown {names:?}");
                if may.contains(&group) {
                    assert!(names.contains(&own) && names.contains(&branch), "{names:?}");
                    for export in [own, branch] {
                        let client = open(&lab, &options, &export).await.expect(&export);
                        assert_eq!(client.read(0, 4096).await.expect("read")[..], CONTENT);
                        client.disconnect().await;
                    }
                    continue;
                }
                // The same for what is there and what is not.
                let nothing = refusal(&lab, &options, "none/disk0@latest").await;
                for rest in ["disk0@latest", "other@seq:1", "disk0@mark:x", "disk0@branch:till-fix"]
                {
                    let (kind, sentence) =
                        refusal(&lab, &options, &format!("{group}/{rest}")).await;
                    assert_eq!(kind, ReplyType::ErrPolicy as u32, "{sentence}");
                    assert_eq!(sentence.replace(group, "none"), nothing.1);
                    let what = format!(
                        "the node '{node}' may not read a group '{group}' here: if it should, \
                         add \"{node}\" to the 'readers'"
                    );
                    assert!(sentence.starts_with(&what), "{sentence}");
                }
            }
        }
        // Nor does a group that it may read lead to another's branch.
        let options = lab.nbd_options(Some("db1"));
        let (_, sentence) = refusal(&lab, &options, "shop/disk0@branch:till-fix").await;
        assert_eq!(sentence, "there is no branch of that name: shop/disk0@branch:till-fix");
        // The target's own node is told what there is.
        let options = lab.nbd_options(Some("dr1"));
        let (_, sentence) = refusal(&lab, &options, "none/disk0@latest").await;
        assert!(sentence.ends_with("it has: shop, till"), "{sentence}");
    });
}

/// A branch whose log could not be opened said so, with its place, to whoever asked for a branch of that
/// name in a group of his own.
#[test]
fn a_broken_branch_is_told_to_its_own_group_alone() {
    run(async || {
        let mut lab = two_groups(true).await;
        lab.stop();
        let dir = lab.config.data_dir.join("groups/till/branches/till-fix");
        std::fs::remove_dir_all(&dir).expect("it is there");
        std::fs::write(&dir, "no directory").expect("written");
        lab.start();
        let options = lab.nbd_options(Some("db2"));
        let (_, sentence) = refusal(&lab, &options, "till/disk0@branch:till-fix").await;
        assert!(sentence.contains("branches/till-fix"), "{sentence}");
        let options = lab.nbd_options(Some("db1"));
        let (_, sentence) = refusal(&lab, &options, "shop/disk0@branch:till-fix").await;
        assert_eq!(sentence, "there is no branch of that name: shop/disk0@branch:till-fix");
    });
}

/// A branch is somebody's work, such as a recovery from a source that has been broken into: that source
/// reads it, and writes it only if it was given that.
#[test]
fn a_branch_is_written_by_whom_it_was_given_to() {
    run(async || {
        let lab = two_groups(true).await;
        let export = "shop/disk0@branch:shop-fix";
        let mut content = CONTENT;
        for (node, may) in
            [("db1", false), ("report", false), ("recovery2", true), ("dr1", true), ("db1", false)]
        {
            let client = open(&lab, &lab.nbd_options(Some(node)), export).await.expect("open");
            assert_eq!(client.info().features.read_only, !may, "{node}");
            let wanted = [node.len() as u8; 4096];
            let written = client.write(0, wanted.to_vec().into(), true).await;
            let zeroed = client.trim(8192, 4096).await;
            if may {
                written.and(zeroed).expect("written");
                content = wanted;
            } else {
                assert_eq!(written.expect_err("refused").errno, Errno::Perm);
                assert_eq!(zeroed.expect_err("refused").errno, Errno::Perm);
            }
            assert_eq!(client.read(0, 4096).await.expect("read")[..], content);
            client.disconnect().await;
        }
        // Who comes in by the Unix socket writes, as before.
        let local = lab.open(export).await.expect("open");
        local.write(0, CONTENT.to_vec().into(), true).await.expect("written");
    });
}

#[test]
fn a_certificate_of_the_authority_is_needed() {
    run(async || {
        let lab = two_groups(true).await;
        let other = Authority::create("other").expect("an authority");
        for options in [lab.nbd_options(None), lab.nbd_options_by(&other, Some("db1"))] {
            match open(&lab, &options, "shop/disk0@latest").await.map(|_| ()) {
                Err(ConnectError::Io(_)) => {}
                other => panic!("not refused in TLS: {other:?}"),
            }
        }
        let plain = open(&lab, &Options::default(), "shop/disk0@latest").await.map(|_| ());
        match plain {
            Err(ConnectError::Refused { kind, .. }) => {
                assert_eq!(kind, ReplyType::ErrTlsReqd as u32);
            }
            other => panic!("served without TLS: {other:?}"),
        }
    });
}

/// Where strangers are let in nobody is asked for a certificate, so none counts: everybody reads
/// everything, and writes no branch.
#[test]
fn where_strangers_are_let_in_a_certificate_gives_nothing() {
    run(async || {
        let lab = two_groups(false).await;
        for node in [None, Some("recovery2"), Some("db3")] {
            let options = lab.nbd_options(node);
            for group in ["shop", "till"] {
                let client = open(&lab, &options, &format!("{group}/disk0@latest")).await;
                let client = client.expect("open");
                assert_eq!(client.read(0, 4096).await.expect("read")[..], CONTENT);
                client.disconnect().await;
                let branch = format!("{group}/disk0@branch:{group}-fix");
                let client = open(&lab, &options, &branch).await.expect("open");
                assert!(client.info().features.read_only);
                client.disconnect().await;
            }
        }
    });
}

/// A source refuses such names; one that has been broken into does not, and what it calls a mark is shown
/// on the terminals of the other site.
#[test]
fn the_name_of_a_mark_is_fit_for_a_terminal() {
    run(async || {
        let lab = Lab::new("", "");
        let mut source = Source::new(&[1 << 20]);
        source.connect(&lab).await;
        source.gap_begin(0, GapReason::FirstSync);
        source.gap_end(0);
        source.mark("a\u{1b}[2J\nb");
        source.send().await;
        source.acknowledged().await;
        let socket = lab.target().nbd_unix().expect("configured");
        let entries = Client::list(socket, &Options::default()).await.expect("a listing");
        assert!(entries.iter().all(|entry| !entry.name.contains(char::is_control)), "{entries:?}");
        lab.open("shop/disk0@mark:a\u{fffd}[2J\u{fffd}b").await.expect("by the name that is shown");
    });
}
