//! The agent: sits in front of a disk, captures every write in order and sends it.

pub mod kernel;

pub mod capture;
pub mod dirty;
