//! Clients with all their connections: what one of them may have at once, so that it takes neither the
//! memory nor the places of others.
//!
//! A client is told apart by its certificate, else by its address. Those of Unix sockets are not
//! counted together: the socket's permissions have let them in.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::export::{BoxFuture, ClientInfo, OpenError};

/// The clients that have entered an export.
#[derive(Default)]
pub(crate) struct Clients(Mutex<HashMap<Client, Weak<Shared>>>);

#[derive(Clone, PartialEq, Eq, Hash)]
enum Client {
    Named(String),
    At(IpAddr),
}

/// What the connections of a client share. Each holds it once: so they are counted.
struct Shared {
    bytes: Arc<Semaphore>,
}

/// One connection's hold on that; none where nobody counts.
#[derive(Default)]
pub(crate) struct Account(Option<Arc<Shared>>);

/// What a connection has taken of its client's bytes.
#[derive(Default)]
pub(crate) struct Budget {
    bytes: Option<Arc<Semaphore>>,
    most: usize,
    held: Option<OwnedSemaphorePermit>,
    waiting: Option<BoxFuture<'static, Option<OwnedSemaphorePermit>>>,
}

impl Clients {
    /// Counts one more connection of a client until the account is dropped.
    pub(crate) fn enter(
        &self,
        info: &ClientInfo,
        connections: usize,
        bytes: usize,
    ) -> Result<Account, OpenError> {
        let client = match (&info.peer_name, info.origin.network()) {
            (Some(name), _) => Client::Named(name.clone()),
            (None, Some(address)) => Client::At(address),
            (None, None) => return Ok(Account::default()),
        };
        let mut clients = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = clients.get(&client).filter(|known| known.strong_count() > 0);
        if known.is_some_and(|known| known.strong_count() >= connections) {
            return Err(OpenError::denied(format!(
                "this client has {connections} connections here, and may have no more"
            )));
        }
        let account = known.and_then(Weak::upgrade).unwrap_or_else(|| {
            clients.retain(|_, account| account.strong_count() > 0);
            let bytes = Arc::new(Semaphore::new(bytes.min(Semaphore::MAX_PERMITS)));
            let account = Arc::new(Shared { bytes });
            clients.insert(client, Arc::downgrade(&account));
            account
        });
        Ok(Account(Some(account)))
    }
}

impl Budget {
    /// Nothing is taken; `most` is what the client has.
    pub(crate) fn new(account: &Account, most: usize) -> Self {
        let bytes = account.0.as_ref().map(|shared| Arc::clone(&shared.bytes));
        Self { bytes, most, ..Self::default() }
    }

    /// Takes bytes, once all that was asked for before by this client has been taken; what is more
    /// than the client has is all of it. Ask for the same until they are there.
    pub(crate) fn poll_take(&mut self, bytes: usize, cx: &mut Context<'_>) -> Poll<()> {
        let Some(all) = self.bytes.as_ref().filter(|_| bytes > 0) else {
            return Poll::Ready(());
        };
        let wanted = u32::try_from(bytes.min(self.most)).unwrap_or(u32::MAX);
        let waiting = self.waiting.get_or_insert_with(|| {
            let all = Arc::clone(all);
            // It is never closed.
            Box::pin(async move { all.acquire_many_owned(wanted).await.ok() })
        });
        let taken = std::task::ready!(waiting.as_mut().poll(cx));
        self.waiting = None;
        match (&mut self.held, taken) {
            (Some(held), Some(taken)) => held.merge(taken),
            (held @ None, taken) => *held = taken,
            (Some(_), None) => {}
        }
        Poll::Ready(())
    }

    /// Gives bytes back.
    pub(crate) fn give(&mut self, bytes: usize) {
        if let Some(held) = &mut self.held {
            drop(held.split(bytes.min(held.num_permits())));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::Origin;

    fn at(address: &str) -> ClientInfo {
        let origin = Origin::Tcp(address.parse().expect("an address"));
        ClientInfo { origin, ..ClientInfo::default() }
    }

    #[test]
    fn a_client_is_counted_over_its_addresses_or_by_its_name() {
        let clients = Clients::default();
        let enter = |info: &ClientInfo| clients.enter(info, 2, 10);
        let (one, two) = (at("[2001:db8::1]:1"), at("[2001:db8::ffff:2]:9"));
        let first = enter(&one).expect("a place");
        let _budget = Budget::new(&first, 10);
        let _second = enter(&two).expect("a place");
        assert!(enter(&one).is_err());
        let named = ClientInfo { peer_name: Some("db1".into()), ..one.clone() };
        let _named = [enter(&named).expect("a place"), enter(&named).expect("a place")];
        assert!(enter(&named).is_err());
        assert!(enter(&at("[2001:db8:0:1::1]:1")).is_ok() && enter(&at("10.0.0.1:1")).is_ok());
        let unix =
            ClientInfo { origin: Origin::Unix { uid: 0, pid: None }, ..ClientInfo::default() };
        let many: Vec<_> = (0..9).map(|_| enter(&unix)).collect();
        assert!(many.iter().all(Result::is_ok), "not counted");
        drop(first);
        enter(&two).expect("a place is free again");
    }

    #[tokio::test]
    async fn bytes_are_had_in_turn_and_given_back() {
        let clients = Clients::default();
        let account = clients.enter(&at("10.0.0.1:1"), 9, 100).expect("a place");
        let mut budgets = [0; 3].map(|_| Budget::new(&account, 100));
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let mut take = |budgets: &mut [Budget; 3], number: usize, bytes| {
            budgets[number].poll_take(bytes, &mut cx).is_ready()
        };
        assert!(take(&mut budgets, 0, 60) && take(&mut budgets, 0, 10));
        assert!(!take(&mut budgets, 1, 1000), "all of it, and more than there is");
        assert!(!take(&mut budgets, 2, 1), "it came later");
        assert!(take(&mut budgets, 2, 0), "what costs nothing waits for nobody");
        budgets[0].give(60);
        assert!(!take(&mut budgets, 1, 1000));
        budgets[0].give(10);
        assert!(take(&mut budgets, 1, 1000));
        assert!(!take(&mut budgets, 2, 1));
        // A connection that ends gives back what it has.
        budgets[1] = Budget::new(&account, 100);
        assert!(take(&mut budgets, 2, 1) && take(&mut budgets, 0, 99));
    }
}
