//! The target: keeps the ordered log and presents the disk as of any write.
//!
//! The way through this crate: [`receiver`] takes frames from a source and hands them to a
//! [`store::log`]; a [`replica`] reads any position out of the log and the base below it;
//! [`lease`] says
//! whether it lacks anything; [`points`] turns names into positions; [`export`] serves them over NBD. [`Target`] is all of it
//! in one process.

pub mod api;
pub mod bounds;
pub mod branch;
pub mod catalogue;
pub mod clock;
pub mod config;
pub mod daemon;
pub mod damage;
pub mod export;
pub mod groups;
pub mod history;
pub mod lease;
pub mod ledger;
pub mod machine;
pub mod pins;
pub mod points;
pub mod receiver;
pub mod replica;
pub mod reserve;
pub mod retention;
pub mod scrub;
#[cfg(feature = "simulation")]
pub mod simulation;
pub mod store;
mod target;
mod threads;

pub use config::Config;
pub use target::Target;
