//! A table that hands out small numbers for its rows.

/// Rows by number; freed numbers are used again.
pub(super) struct Slab<T> {
    rows: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Slab<T> {
    pub fn with_capacity(rows: usize) -> Slab<T> {
        Slab { rows: Vec::with_capacity(rows), free: Vec::with_capacity(rows) }
    }

    pub fn insert(&mut self, row: T) -> u32 {
        match self.free.pop() {
            Some(number) => {
                self.rows[number as usize] = Some(row);
                number
            }
            None => {
                self.rows.push(Some(row));
                (self.rows.len() - 1) as u32
            }
        }
    }

    /// # Panics
    /// On a number that is not in use.
    pub fn remove(&mut self, number: u32) -> T {
        let row = self.rows[number as usize].take().expect("a row in use");
        self.free.push(number);
        row
    }

    pub fn get(&self, number: u32) -> &T {
        self.rows[number as usize].as_ref().expect("a row in use")
    }

    pub fn get_mut(&mut self, number: u32) -> &mut T {
        self.rows[number as usize].as_mut().expect("a row in use")
    }

    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.rows.iter().flatten()
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.rows.iter_mut().flatten()
    }

    pub fn len(&self) -> usize {
        self.rows.len() - self.free.len()
    }
}
