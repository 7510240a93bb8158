//! The mutual-TLS link between agent, relay and target, and the tokio-uring seam.
//!
//! The way through this crate: [`pki`] makes certificates and the TLS configurations; [`message`]
//! is the wire, encoded and decoded without I/O; [`hello`] decides what a greeting means, [`lease`]
//! when a target may say that it lacks nothing; [`seam`] is the only place that knows tokio-uring:
//! sockets and files; [`conn`] puts TLS and messages on a socket; [`throttle`] bounds what is sent,
//! by the time of day.

pub mod conn;
pub mod hello;
pub mod lease;
pub mod message;
pub mod pki;
pub mod seam;
pub mod throttle;

pub use conn::{Connection, LinkError, Receiver, Sender, Timeouts};
pub use message::Message;
pub use pki::NodeName;
