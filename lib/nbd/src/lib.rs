//! A complete NBD server as a library, and a small client.
//!
//! Implement [`Exports`] (find an export by name) and [`Export`] (serve it), make a [`Server`] and
//! give it [`Listener`]s. The protocol itself is in [`proto`], free of I/O.

pub mod buffer;
pub mod client;
mod export;
pub mod proto;
mod server;
pub mod tls;

pub use buffer::Buffer;
pub use export::{
    BlockSizes, BoxFuture, Chunk, ClientInfo, Error, Export, ExportEntry, ExportInfo, Exports,
    Extent, Features, OpenError, Origin, Purpose, Reply, Zeroing,
};
pub use proto::Errno;
pub use server::{Limits, Listener, Server};
pub use tls::Tls;
