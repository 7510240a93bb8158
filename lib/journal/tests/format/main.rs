//! The format from outside: its bytes, what a reader gets back, and what damage does to it.

mod bounds;
mod cutting;
mod damage;
mod golden;
mod random;
mod reading;
mod segments;
