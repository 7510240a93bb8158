//! Connections that have not greeted yet: whoever can reach the port can make them, so they are few,
//! and one makes room when there are too many: the oldest of the network that has the most. A source
//! therefore never waits for strangers, and whoever makes many cuts its own.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    rc::Rc,
};

use tidemark_link::seam::{Stream, StreamCloser};
use tidemark_nbd::Origin;

/// The connections that have not greeted, in the order in which they came.
#[derive(Default)]
pub struct Pending {
    next: Cell<u64>,
    closers: RefCell<BTreeMap<u64, (Option<IpAddr>, StreamCloser)>>,
}

/// One of them; dropped, it is none any more.
pub struct Newcomer {
    pending: Rc<Pending>,
    number: u64,
}

impl Pending {
    /// Takes a connection in. If there are `max` already, one is closed.
    pub fn admit(self: &Rc<Self>, stream: &Stream, from: SocketAddr, max: usize) -> Newcomer {
        if self.closers.borrow().len() >= max {
            self.close_one();
        }
        let number = self.next.get();
        self.next.set(number + 1);
        let entry = (Origin::Tcp(from).network(), stream.closer());
        self.closers.borrow_mut().insert(number, entry);
        Newcomer { pending: Rc::clone(self), number }
    }

    /// Closes one, so that its place becomes free.
    pub fn close_one(&self) {
        let mut closers = self.closers.borrow_mut();
        let mut numbers: HashMap<Option<IpAddr>, usize> = HashMap::new();
        for (from, _) in closers.values() {
            *numbers.entry(*from).or_default() += 1;
        }
        let most = numbers.values().copied().max();
        let oldest = closers.iter().find(|(_, (from, _))| numbers.get(from).copied() == most);
        let oldest = oldest.map(|(number, _)| *number);
        if let Some((_, closer)) = oldest.and_then(|number| closers.remove(&number)) {
            closer.close();
        }
    }
}

impl Drop for Newcomer {
    fn drop(&mut self) {
        self.pending.closers.borrow_mut().remove(&self.number);
    }
}
