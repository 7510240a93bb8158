//! Which daemons are on this machine, and how to reach them.

use std::path::{Path, PathBuf};

use tidemark_agent::config::{NODE_FILE, NodeConfig};
use tidemark_control::agent::{self, AgentClient};
use tidemark_control::config::Source;
use tidemark_control::target::{self, TargetClient};

use crate::cli::Global;

/// The target's configuration in its directory.
pub const TARGET_FILE: &str = "target.toml";

/// A daemon that this machine may have.
pub struct Daemon<C> {
    /// The way to it.
    pub client: C,
    /// This machine has a configuration for it, or the caller named its socket.
    pub expected: bool,
}

/// The agent of this machine.
pub fn agent(global: &Global) -> Daemon<AgentClient> {
    let file = global.config_dir.join(NODE_FILE);
    let configured = || Some(NodeConfig::parse(&Source::read(&file).ok()?).ok()?.api_socket);
    let socket = global.agent_socket.clone().or_else(configured);
    Daemon {
        client: AgentClient::new(&socket.unwrap_or_else(|| agent::SOCKET.into())),
        expected: global.agent_socket.is_some() || file.exists(),
    }
}

/// The target of this machine.
pub fn target(global: &Global) -> Daemon<TargetClient> {
    let file = global.config_dir.join(TARGET_FILE);
    let socket = global.target_socket.clone().or_else(|| target_socket(&file));
    Daemon {
        client: TargetClient::new(&socket.unwrap_or_else(|| target::SOCKET.into())),
        expected: global.target_socket.is_some() || file.exists(),
    }
}

fn target_socket(file: &Path) -> Option<PathBuf> {
    Some(tidemark_target::Config::load(file).ok()?.api.socket)
}
