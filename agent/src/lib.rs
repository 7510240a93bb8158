//! The agent: sits in front of a disk, captures every write in order and sends it.

pub mod api;
pub mod config;
pub mod kernel;

pub mod capture;
pub mod clock;
pub mod dirty;
pub mod encoder;
pub mod engine;
pub mod lag;
pub mod link;
pub mod outbox;
pub mod state;
