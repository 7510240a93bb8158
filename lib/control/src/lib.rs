//! What the daemons and the command line share: the local API and the reading of configuration.
//!
//! Each daemon answers HTTP with JSON on one Unix socket. [`server`] is the scaffolding that both
//! build on, [`client`] the other end, [`agent`] and [`target`] the questions and answers of the
//! two, which the daemons serve and the command line asks. Every answer is an object that carries
//! [`SCHEMA`] as `schema`; every failure has the one shape of [`ApiError`]. Numbers are integers
//! with their unit in the name; sentences are for people only.
//!
//! [`config`] reads TOML: an unknown key is refused with the file, the line and what was meant.

pub mod agent;
pub mod client;
pub mod config;
mod damage;
pub mod error;
pub mod server;
pub mod target;

use serde::{Deserialize, Serialize};

pub use client::{Client, ClientError};
pub use error::{ApiError, ErrorCode};

/// The version of the answers' shape. It grows when a field changes its meaning or goes away; a new
/// field alone does not change it.
pub const SCHEMA: u32 = 1;

/// An answer: its body's fields beside the schema version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer<T> {
    /// [`SCHEMA`] of who answers.
    pub schema: u32,
    /// The fields of the answer itself. It must be a struct or a map.
    #[serde(flatten)]
    pub body: T,
}

impl<T> Answer<T> {
    /// An answer in the shape of this version.
    pub fn new(body: T) -> Answer<T> {
        Answer { schema: SCHEMA, body }
    }
}

/// Nothing to say beyond that it was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {}
