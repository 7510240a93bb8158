//! Which groups a client may read over NBD, and whose branches it may write.
//!
//! Who comes by the Unix socket may do everything: the socket's permissions have let it in. Over TCP it
//! is the node that its certificate names. What a client has no right to is not named to it, neither in
//! a listing nor in a sentence: a refusal reads the same whether there is such a group or not.

use tidemark_link::{NodeName, pki};
use tidemark_nbd::{ClientInfo, Origin};

use crate::config::GroupConfig;

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    /// A process of this machine, let in by the permissions of the Unix socket.
    Local,
    /// A node, by its certificate.
    Node(NodeName),
    /// A certificate of the authority that names no node.
    Nameless,
    /// Nobody knows: there is no certificate.
    Stranger,
}

/// What a caller may do with the exports of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Right {
    /// Nothing, nor know of it.
    None,
    /// Read its points and branches.
    Read,
    /// Write its branches too.
    WriteBranches,
}

/// The rules of a target.
#[derive(Clone, Debug)]
pub struct Access {
    /// The target's own name.
    pub node: NodeName,
    /// Whether strangers are let in (`require_client_certificate = false`).
    pub strangers: bool,
}

impl Caller {
    /// By the place where it came in and its certificate.
    pub fn of(client: &ClientInfo) -> Caller {
        match (client.origin, &client.certificate) {
            (Origin::Unix { .. }, _) => Caller::Local,
            (_, Some(certificate)) => match pki::peer_name(std::slice::from_ref(certificate)) {
                Ok(node) => Caller::Node(node),
                Err(_) => Caller::Nameless,
            },
            (_, None) => Caller::Stranger,
        }
    }
}

impl Access {
    /// What a caller may do with a group of this configuration; none if it is not configured.
    pub fn right(&self, caller: &Caller, group: Option<&GroupConfig>) -> Right {
        match (caller, group) {
            (Caller::Local, _) => Right::WriteBranches,
            (Caller::Stranger, _) if self.strangers => Right::Read,
            (Caller::Node(node), _) if *node == self.node => Right::WriteBranches,
            (Caller::Node(node), Some(group)) if group.branch_writers.contains(node) => {
                Right::WriteBranches
            }
            (Caller::Node(node), Some(group))
                if group.node == *node || group.readers.contains(node) =>
            {
                Right::Read
            }
            (Caller::Node(_) | Caller::Nameless | Caller::Stranger, _) => Right::None,
        }
    }

    /// Why a caller without a right gets nothing, and what to do about it.
    pub fn refusal(&self, caller: &Caller, group: &str) -> String {
        match caller {
            Caller::Node(node) => format!(
                "the node '{node}' may not read a group '{group}' here: if it should, add \"{node}\" \
                 to the 'readers' of that [[group]] in the target's configuration and restart the \
                 target"
            ),
            Caller::Nameless | Caller::Stranger | Caller::Local => {
                "this client's certificate names no node: use one made by 'tidemark init'"
                    .to_owned()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tidemark_control::config::{Bytes, Seconds};

    use super::*;

    fn node(name: &str) -> NodeName {
        name.parse().expect("a name")
    }

    /// Who comes in by the Unix socket has no need of a certificate; over TCP nothing else counts.
    #[test]
    fn a_caller_is_who_the_certificate_says() {
        use rustls::pki_types::CertificateDer;
        use tidemark_link::pki::{Authority, Identity};

        let of = |origin, certificate| {
            Caller::of(&ClientInfo { origin, certificate, ..ClientInfo::default() })
        };
        let authority = Authority::create("test").expect("an authority");
        let address = "db.example.org".parse().expect("an address");
        let pem = authority.issue_for(&node("db1"), &[address]).expect("a certificate");
        let (certificate, key) = (pem.certificate_pem.as_bytes(), pem.key_pem.as_bytes());
        let good = Identity::from_pem(certificate, key).expect("good").chain().first().cloned();
        let bad = Some(CertificateDer::from(vec![1, 2, 3]));

        let remote = Origin::Tcp(([10, 0, 0, 1], 1).into());
        assert_eq!(of(remote, good.clone()), Caller::Node(node("db1")));
        assert_eq!(of(Origin::Other, good), Caller::Node(node("db1")));
        assert_eq!(of(remote, bad), Caller::Nameless);
        assert_eq!(of(remote, None), Caller::Stranger);
        assert_eq!(of(Origin::Unix { uid: 7, pid: None }, None), Caller::Local);
    }

    #[test]
    fn every_caller_has_its_right() {
        let group = GroupConfig {
            name: "shop".parse().expect("a name"),
            node: node("db1"),
            readers: vec![node("report")],
            branch_writers: vec![node("recovery2")],
            window: Seconds(1),
            window_min: Seconds(1),
            size_max: Bytes(1),
        };
        let closed = Access { node: node("dr1"), strangers: false };
        let open = Access { strangers: true, ..closed.clone() };
        let named = |name| Caller::Node(node(name));
        // Who, and the right to this group and to one that is not configured; with strangers let in.
        for (caller, here, elsewhere, open_here) in [
            (Caller::Local, Right::WriteBranches, Right::WriteBranches, Right::WriteBranches),
            (named("dr1"), Right::WriteBranches, Right::WriteBranches, Right::WriteBranches),
            (named("recovery2"), Right::WriteBranches, Right::None, Right::WriteBranches),
            (named("report"), Right::Read, Right::None, Right::Read),
            (named("db1"), Right::Read, Right::None, Right::Read),
            (named("db2"), Right::None, Right::None, Right::None),
            (Caller::Nameless, Right::None, Right::None, Right::None),
            (Caller::Stranger, Right::None, Right::None, Right::Read),
        ] {
            assert_eq!(closed.right(&caller, Some(&group)), here, "{caller:?}");
            assert_eq!(closed.right(&caller, None), elsewhere, "{caller:?}");
            assert_eq!(open.right(&caller, Some(&group)), open_here, "{caller:?}");
        }
    }
}
