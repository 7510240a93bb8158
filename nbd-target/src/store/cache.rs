//! A bounded cache of equal-sized things, with second-chance eviction.

use std::{collections::HashMap, hash::Hash, sync::Mutex};

/// A bounded map that drops what has not been used for a while. Values are cheap to clone.
pub struct Cache<K, V> {
    inner: Mutex<Inner<K, V>>,
}

struct Inner<K, V> {
    slots: Vec<Slot<K, V>>,
    places: HashMap<K, usize>,
    hand: usize,
    capacity: usize,
}

struct Slot<K, V> {
    key: K,
    value: V,
    used: bool,
}

impl<K: Copy + Eq + Hash, V: Clone> Cache<K, V> {
    /// A cache of at most `capacity` values.
    pub fn new(capacity: usize) -> Cache<K, V> {
        let capacity = capacity.max(1);
        let inner = Inner { slots: Vec::new(), places: HashMap::new(), hand: 0, capacity };
        Cache { inner: Mutex::new(inner) }
    }

    /// The value, if it is here.
    pub fn get(&self, key: &K) -> Option<V> {
        let mut inner = self.lock();
        let place = *inner.places.get(key)?;
        let slot = inner.slots.get_mut(place)?;
        slot.used = true;
        Some(slot.value.clone())
    }

    /// Keeps a value, in place of one that was not used lately when the cache is full.
    pub fn put(&self, key: K, value: V) {
        let mut guard = self.lock();
        let inner = &mut *guard;
        if let Some(place) = inner.places.get(&key) {
            inner.slots[*place].value = value;
            return;
        }
        // A newcomer has no second chance yet: one long scan does not push out what is in use.
        let slot = Slot { key, value, used: false };
        if inner.slots.len() < inner.capacity {
            inner.places.insert(key, inner.slots.len());
            inner.slots.push(slot);
            return;
        }
        while std::mem::take(&mut inner.slots[inner.hand].used) {
            inner.hand = (inner.hand + 1) % inner.capacity;
        }
        let old = std::mem::replace(&mut inner.slots[inner.hand], slot);
        inner.places.remove(&old.key);
        inner.places.insert(key, inner.hand);
        inner.hand = (inner.hand + 1) % inner.capacity;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner<K, V>> {
        self.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_bounded_and_keeps_what_is_used() {
        let cache = Cache::new(4);
        cache.put(0, "zero");
        for n in 1..100 {
            assert_eq!(cache.get(&0), Some("zero"), "in use all the time");
            cache.put(n, "other");
        }
        assert_eq!((0..100).filter(|n| cache.get(n).is_some()).count(), 4);
        cache.put(0, "new");
        assert_eq!(cache.get(&0), Some("new"));
    }
}
