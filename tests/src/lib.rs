//! End-to-end tests: on the host, in guests, with real NBD clients.

pub mod journal;
pub mod pair;
pub mod proxy;
pub mod site;
pub mod small_disk;
pub mod vm;
pub mod volatile;
pub mod workload;
