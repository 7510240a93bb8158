//! `@latest`: one moment for all connections of a client.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tidemark_journal::Seq;
use tidemark_nbd::{ClientInfo, Origin};
use tokio::time::Instant;

use super::{
    name::Spec,
    resolve::{Refusal, Scope, resolve},
};
use crate::{pins::PinGuard, replica::Replica};

/// Who asks, as far as it can be told.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Client(String);

impl Client {
    /// By certificate, else by address or user.
    pub fn of(info: &ClientInfo) -> Client {
        Client(match (&info.peer_name, info.origin) {
            (Some(name), _) => format!("node {name}"),
            (None, Origin::Tcp(address)) => format!("address {}", address.ip()),
            (None, Origin::Unix { uid, .. }) => format!("user {uid}"),
            (None, Origin::Other) => "a stream".to_owned(),
        })
    }
}

/// The moments that `@latest` means at present, by group and client.
pub struct LatestTable {
    linger: Duration,
    table: Mutex<HashMap<(String, Client), Moment>>,
}

struct Moment {
    seq: Seq,
    connections: usize,
    gone: Instant,
    _pin: PinGuard,
}

/// One connection's hold on its client's moment.
pub struct LatestGuard {
    table: Arc<LatestTable>,
    key: (String, Client),
}

impl LatestTable {
    /// A table in which a moment stays for `linger` after its last connection has gone.
    pub fn new(linger: Duration) -> Arc<LatestTable> {
        Arc::new(LatestTable { linger, table: Mutex::default() })
    }

    /// The position for a client that opens a volume's `@latest`.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn open(
        self: &Arc<Self>,
        replica: &Replica,
        volume: &str,
        client: &Client,
    ) -> Result<(Seq, LatestGuard), Refusal> {
        self.forget_gone();
        let key = (replica.name().to_owned(), client.clone());
        let mut table = self.lock();
        let seq = match table.get_mut(&key) {
            Some(moment) => {
                let seq = checked(replica, volume, moment.seq)?;
                moment.connections += 1;
                seq
            }
            None => {
                let seq = resolve(replica, Some(volume), &Spec::Latest)?.seq;
                let what = format!("@latest of {}", client.0);
                let pin = replica.pin(seq, what).map_err(|oldest| {
                    Refusal(format!("@seq:{seq} is no longer retained; try @seq:{oldest}"))
                })?;
                let gone = Instant::now();
                table.insert(key.clone(), Moment { seq, connections: 1, gone, _pin: pin });
                seq
            }
        };
        Ok((seq, LatestGuard { table: Arc::clone(self), key }))
    }

    /// The position that opening would give, without holding it.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn look(&self, replica: &Replica, volume: &str, client: &Client) -> Result<Seq, Refusal> {
        self.forget_gone();
        let key = (replica.name().to_owned(), client.clone());
        match self.lock().get(&key).map(|moment| moment.seq) {
            Some(seq) => checked(replica, volume, seq),
            None => resolve(replica, Some(volume), &Spec::Latest).map(|resolved| resolved.seq),
        }
    }

    /// Lets go of the moments whose clients have been gone long enough.
    pub fn forget_gone(&self) {
        let linger = self.linger;
        self.lock().retain(|_, moment| moment.connections > 0 || moment.gone.elapsed() < linger);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(String, Client), Moment>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Another volume of the group at the moment that the client has already.
fn checked(replica: &Replica, volume: &str, seq: Seq) -> Result<Seq, Refusal> {
    let end = replica.journal().progress().durable.seq;
    replica.ledger().history(|history| {
        Scope::of(history, replica.name(), Some(volume))?.check(history, seq, end)
    })
}

impl Drop for LatestGuard {
    fn drop(&mut self) {
        if let Some(moment) = self.table.lock().get_mut(&self.key) {
            moment.connections = moment.connections.saturating_sub(1);
            moment.gone = Instant::now();
        }
    }
}
