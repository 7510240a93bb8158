//! Answers that are held back in sync mode, until what they say is final-durable.
//!
//! There are as many as requests under way, which the fronts bound.

use std::collections::VecDeque;

use tidemark_journal::Seq;

/// Answers in the order in which they could have been given.
pub struct Answers<T> {
    held: VecDeque<Held<T>>,
}

#[derive(Clone, Copy)]
struct Held<T> {
    answer: T,
    needs: Option<Seq>,
    since_ns: u64,
}

impl<T: Copy> Answers<T> {
    /// None are held back; there is room for so many without asking for memory.
    pub fn with_capacity(capacity: usize) -> Answers<T> {
        Answers { held: VecDeque::with_capacity(capacity) }
    }

    /// Holds an answer back that could be given now. `needs` is the sequence that has to be
    /// final-durable first; with none nothing makes it so, and it waits until answers are no longer
    /// held back.
    pub fn hold(&mut self, answer: T, needs: Option<Seq>, now_ns: u64) {
        self.held.push_back(Held { answer, needs, since_ns: now_ns });
    }

    /// Gives what may be answered to `each`: with `holds`, what is final-durable.
    pub fn release(&mut self, durable: Seq, holds: bool, mut each: impl FnMut(T)) {
        self.held.retain(|held| {
            let ready = !holds || held.needs.is_some_and(|seq| seq <= durable);
            if ready {
                each(held.answer);
            }
            !ready
        });
    }

    /// Since when the oldest waits.
    pub fn waiting_since_ns(&self) -> Option<u64> {
        self.held.front().map(|held| held.since_ns)
    }

    /// Nothing makes those final-durable any more that are held back.
    pub fn make_endless(&mut self) {
        for held in &mut self.held {
            held.needs = None;
        }
    }

    /// Whether one is held back that nothing makes final-durable.
    pub fn has_endless(&self) -> bool {
        self.held.iter().any(|held| held.needs.is_none())
    }

    /// How many are held back.
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether none is held back.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }
}
