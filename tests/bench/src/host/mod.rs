//! On this machine, everything native: sockets, files, TLS.

mod peers;
pub mod writes;
