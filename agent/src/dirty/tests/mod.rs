//! Tests of the dirty map.

mod crash;
mod formats;
pub(crate) mod random;
mod waits;
