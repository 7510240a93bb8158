//! Points: positions that can be recovered, and the names they go by.

pub mod latest;
pub mod name;
pub mod resolve;
pub mod time;
pub mod whole;

pub use name::{PointName, Spec};
pub use resolve::{Refusal, Resolved};
