//! Connections that have not greeted yet: whoever can reach the port can make them, so they are few,
//! and the oldest makes room when there are too many. A source therefore never waits for strangers.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    rc::Rc,
};

use tidemark_link::seam::{Stream, StreamCloser};

/// The connections that have not greeted, in the order in which they came.
#[derive(Default)]
pub struct Pending {
    next: Cell<u64>,
    closers: RefCell<BTreeMap<u64, StreamCloser>>,
}

/// One of them; dropped, it is none any more.
pub struct Newcomer {
    pending: Rc<Pending>,
    number: u64,
}

impl Pending {
    /// Takes a connection in. If there are `max` already, the oldest is closed.
    pub fn admit(self: &Rc<Self>, stream: &Stream, max: usize) -> Newcomer {
        if self.closers.borrow().len() >= max {
            self.close_oldest();
        }
        let number = self.next.get();
        self.next.set(number + 1);
        self.closers.borrow_mut().insert(number, stream.closer());
        Newcomer { pending: Rc::clone(self), number }
    }

    /// Closes the oldest, so that its place becomes free.
    pub fn close_oldest(&self) {
        let oldest = self.closers.borrow_mut().pop_first();
        if let Some((_, closer)) = oldest {
            closer.close();
        }
    }
}

impl Drop for Newcomer {
    fn drop(&mut self) {
        self.pending.closers.borrow_mut().remove(&self.number);
    }
}
