//! Tests of the dirty map.

mod bounds;
mod crash;
mod formats;
pub(crate) mod random;
mod waits;
