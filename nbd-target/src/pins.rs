//! Positions that must not be folded away while somebody reads them.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tidemark_journal::Seq;

/// The pins of a group.
#[derive(Default)]
pub struct Pins {
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    next: u64,
    pins: BTreeMap<u64, Pin>,
}

/// Somebody's hold on a position.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pin {
    /// The position.
    pub seq: Seq,
    /// Who holds it, for people.
    pub what: String,
}

/// Keeps a position pinned until it is dropped.
pub struct PinGuard {
    pins: Arc<Pins>,
    id: u64,
}

impl Pins {
    /// Pins a position that is still retained: `oldest` is asked under the lock that
    /// [`raise`](Self::raise) takes too.
    ///
    /// # Errors
    /// The oldest position, when the one wanted lies below it.
    pub fn pin(
        self: &Arc<Self>,
        seq: Seq,
        what: impl Into<String>,
        oldest: impl FnOnce() -> Seq,
    ) -> Result<PinGuard, Seq> {
        let mut table = self.lock();
        let oldest = oldest();
        if seq < oldest {
            return Err(oldest);
        }
        Ok(self.add(&mut table, Pin { seq, what: what.into() }))
    }

    /// Pins the oldest position, whatever that is: nothing leaves. `oldest` is asked as in
    /// [`pin`](Self::pin).
    pub fn pin_oldest(
        self: &Arc<Self>,
        what: impl Into<String>,
        oldest: impl FnOnce() -> Seq,
    ) -> PinGuard {
        let mut table = self.lock();
        let seq = oldest();
        self.add(&mut table, Pin { seq, what: what.into() })
    }

    /// Raises the oldest position by `raise` unless a pin lies below `to`.
    ///
    /// # Errors
    /// The lowest pin, when it is in the way.
    pub fn raise<T>(&self, to: Seq, raise: impl FnOnce() -> T) -> Result<T, Pin> {
        let table = self.lock();
        match table.pins.values().min_by_key(|pin| pin.seq) {
            Some(pin) if pin.seq < to => Err(pin.clone()),
            _ => Ok(raise()),
        }
    }

    /// All pins.
    pub fn list(&self) -> Vec<Pin> {
        self.lock().pins.values().cloned().collect()
    }

    fn add(self: &Arc<Self>, table: &mut Table, pin: Pin) -> PinGuard {
        let id = table.next;
        table.next += 1;
        table.pins.insert(id, pin);
        PinGuard { pins: Arc::clone(self), id }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for PinGuard {
    fn drop(&mut self) {
        self.pins.lock().pins.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_holds_the_oldest_position_down() {
        let pins = Arc::new(Pins::default());
        let pin = pins.pin(Seq(10), "a reader", || Seq(5)).unwrap_or_else(|_| panic!("retained"));
        assert_eq!(pins.raise(Seq(10), || "raised"), Ok("raised"), "up to the pin itself");
        assert_eq!(pins.raise(Seq(11), || "raised").expect_err("pinned").what, "a reader");
        drop(pin);
        assert_eq!(pins.raise(Seq(11), || "raised"), Ok("raised"));
        assert_eq!(pins.pin(Seq(4), "late", || Seq(5)).err(), Some(Seq(5)));
        let all = pins.pin_oldest("nobody knows what", || Seq(5));
        assert_eq!(pins.raise(Seq(6), || "raised").expect_err("pinned").seq, Seq(5));
        drop(all);
    }
}
