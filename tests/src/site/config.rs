//! What both sides of a site are configured with.

use std::path::PathBuf;

use anyhow::Result;
use tidemark_agent::config::{GroupConfig, NodeConfig};
use tidemark_control::config::Source;

use super::{GROUP, SOURCE, Site, TARGET};

/// The name of a group, by its number.
pub fn group_name(group: usize) -> String {
    if group == 0 { GROUP.to_owned() } else { format!("{GROUP}-{group}") }
}

/// The file name of the image of a group's volume.
pub fn image_name(group: usize, volume: usize) -> String {
    if group == 0 { format!("v{volume}.img") } else { format!("g{group}-v{volume}.img") }
}

impl Site {
    /// The target's configuration.
    pub fn target_config(&self) -> String {
        let dir = self.dir().display();
        let mut text = format!(
            "data_dir = \"{dir}/target\"\n\
             [link]\nlisten = \"{}\"\nca = \"{dir}/ca.pem\"\ncertificate = \"{dir}/{TARGET}.pem\"\n\
             key = \"{dir}/{TARGET}.key\"\n\
             [nbd]\nunix = \"{dir}/exports.sock\"\nlisten = \"127.0.0.1:0\"\n\
             [api]\nsocket = \"{dir}/target.sock\"\n{}\n\
             [[group]]\nname = \"{}\"\nnode = \"{SOURCE}\"\n{}\n",
            self.link,
            self.plan.target_tables,
            self.plan.target_group,
            self.plan.target_group_lines
        );
        for group in 1..self.plan.groups {
            let name = group_name(group);
            text += &format!("[[group]]\nname = \"{name}\"\nnode = \"{SOURCE}\"\n");
        }
        text
    }

    /// The agent's configuration of its node, as another node's where `node` says so.
    pub fn node_config(&self, node: &str) -> Result<NodeConfig> {
        let source = Source::new(&self.dir().join("agent.toml"), self.node_text(node));
        Ok(NodeConfig::parse(&source)?)
    }

    fn node_text(&self, node: &str) -> String {
        let dir = self.dir().display();
        format!(
            "node = \"{node}\"\nstate_dir = \"{dir}/state\"\nruntime_dir = \"{dir}/run\"\n\
             api_socket = \"{dir}/agent.sock\"\n\
             [tls]\nca = \"{dir}/ca.pem\"\ncertificate = \"{dir}/{node}.pem\"\nkey = \"{dir}/{node}.key\"\n{}",
            self.spool_text()
        )
    }

    fn spool_text(&self) -> String {
        let Some(bytes_max) = self.plan.spool_bytes_max else { return String::new() };
        format!(
            "[spool]\ndirectory = \"{}\"\nbytes_max = {bytes_max}\n",
            self.spool_dir().display()
        )
    }

    /// The directory of the agent's spools.
    pub fn spool_dir(&self) -> PathBuf {
        self.dir().join("spool")
    }

    /// The first group's configuration at the source.
    pub fn group_config(&self) -> Result<GroupConfig> {
        self.group_config_of(0)
    }

    pub(super) fn group_configs(&self) -> Result<Vec<GroupConfig>> {
        (0..self.plan.groups).map(|group| self.group_config_of(group)).collect()
    }

    fn group_config_of(&self, group: usize) -> Result<GroupConfig> {
        Ok(GroupConfig::parse(&Source::new(&self.group_path(group), self.group_text(group)))?)
    }

    fn group_path(&self, group: usize) -> PathBuf {
        self.dir().join(format!("{}.toml", group_name(group)))
    }

    /// Writes the files of the agent: the node's, and one for each group.
    pub(super) fn write_agent_files(&self) -> Result<Vec<PathBuf>> {
        let node = self.dir().join("agent.toml");
        std::fs::write(&node, self.node_text(SOURCE))?;
        let mut files = vec![node];
        for group in 0..self.plan.groups {
            let path = self.group_path(group);
            std::fs::write(&path, self.group_text(group))?;
            files.push(path);
        }
        Ok(files)
    }

    fn group_text(&self, group: usize) -> String {
        let mut text = format!(
            "id = \"{}\"\nring_bytes = {}\ncompression = {}\nfront = \"nbd-socket\"\n{}\n\
             [target]\naddress = \"{}\"\nname = \"{TARGET}\"\n",
            self.ids[group],
            self.plan.ring_bytes,
            if self.plan.compression == "off" { "\"off\"" } else { self.plan.compression },
            self.plan.group_lines,
            if self.plan.through_network { self.proxy.address() } else { self.link },
        );
        for index in 0..self.plan.sizes_bytes.len() {
            let backing = self.image_of(group, index);
            text += &format!(
                "[[volume]]\nid = {index}\nname = \"v{index}\"\nbacking = \"{}\"\n",
                backing.display()
            );
        }
        text
    }
}
