//! What `cargo xtask setup` leaves for the tests, known in this one place: see [`cache`].

pub mod cache;
