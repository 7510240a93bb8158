//! A source and its target in this process: image files, certificates and loopback, in one directory.
//!
//! What the guests do with services, this does with the same libraries, so that a test can stop, start and
//! look at either side at will.

use std::{
    fs::File,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;
use tidemark_agent::{
    Agent,
    agent::STOP_PATIENCE,
    api::Control,
    config::{AgentConfig, GroupConfig, NodeConfig},
};
use tidemark_control::{agent::GroupStatus, config::Source};
use tidemark_journal::GroupId;
use tidemark_link::pki::{Authority, NodeName};
use tidemark_nbd::client::{Client, Options};
use tidemark_target::{Config, Target};
use tokio::runtime::Runtime;

/// The group's name.
pub const GROUP: &str = "shop";
/// The source's node name.
const SOURCE: &str = "source";
/// The target's node name.
const TARGET: &str = "target";

/// What a site is to look like.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The volumes' sizes in bytes; their names are `v0`, `v1` and so on.
    pub sizes_bytes: Vec<u64>,
    /// The agent's ring in bytes.
    pub ring_bytes: u64,
    /// `off`, or a zstd level.
    pub compression: &'static str,
    /// More lines for the group's file at the source, before its tables.
    pub group_lines: String,
    /// More lines for the group's table at the target.
    pub target_group_lines: String,
    /// More tables for the target's file.
    pub target_tables: String,
}

impl Plan {
    /// Volumes of these sizes, a ring of 64 MiB, light compression.
    pub fn new(sizes_bytes: &[u64]) -> Plan {
        Plan {
            sizes_bytes: sizes_bytes.to_vec(),
            ring_bytes: 64 << 20,
            compression: "1",
            group_lines: String::new(),
            target_group_lines: String::new(),
            target_tables: String::new(),
        }
    }
}

/// A source and a target, each running or not.
pub struct Site {
    runtime: Runtime,
    dir: TempDir,
    plan: Plan,
    id: GroupId,
    target: Option<Target>,
    agent: Option<Arc<Agent>>,
    link: SocketAddr,
}

impl Site {
    /// Makes the directory, the certificates and the images. Nothing runs yet.
    pub fn new(plan: Plan) -> Result<Site> {
        let dir = tempfile::Builder::new().prefix("tidemark-site-").tempdir()?;
        let authority = Authority::create("test")?;
        std::fs::write(dir.path().join("ca.pem"), &authority.pem().certificate_pem)?;
        for node in [SOURCE, TARGET, "stranger"] {
            let issued = authority.issue(&node.parse::<NodeName>()?)?;
            std::fs::write(dir.path().join(format!("{node}.pem")), &issued.certificate_pem)?;
            std::fs::write(dir.path().join(format!("{node}.key")), &issued.key_pem)?;
        }
        for (index, size) in plan.sizes_bytes.iter().enumerate() {
            File::create(dir.path().join(format!("v{index}.img")))?.set_len(*size)?;
        }
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let link = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let id = GroupId::random()?;
        Ok(Site { runtime, dir, plan, id, target: None, agent: None, link })
    }

    /// A site on which both sides run.
    pub fn started(plan: Plan) -> Result<Site> {
        let mut site = Site::new(plan)?;
        site.start_target()?;
        site.start_agent()?;
        Ok(site)
    }

    /// Everything is in here.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// For futures of the test.
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// The image of a volume.
    pub fn image(&self, volume: usize) -> PathBuf {
        self.dir().join(format!("v{volume}.img"))
    }

    /// Where the application finds a volume.
    pub fn front(&self, volume: usize) -> PathBuf {
        self.dir().join(format!("run/nbd/{GROUP}/v{volume}.sock"))
    }

    /// Where the target's exports are found.
    pub fn exports(&self) -> PathBuf {
        self.dir().join("exports.sock")
    }

    /// The target's configuration.
    pub fn target_config(&self) -> String {
        let dir = self.dir().display();
        format!(
            "data_dir = \"{dir}/target\"\n\
             [link]\nlisten = \"{}\"\nca = \"{dir}/ca.pem\"\ncertificate = \"{dir}/{TARGET}.pem\"\n\
             key = \"{dir}/{TARGET}.key\"\n\
             [nbd]\nunix = \"{dir}/exports.sock\"\n\
             [api]\nsocket = \"{dir}/target.sock\"\n{}\n\
             [[group]]\nname = \"{GROUP}\"\nnode = \"{SOURCE}\"\n{}\n",
            self.link, self.plan.target_tables, self.plan.target_group_lines
        )
    }

    /// Starts the target.
    pub fn start_target(&mut self) -> Result<()> {
        let config = Config::parse(&self.target_config())?;
        self.target = Some(Target::start(&config)?);
        Ok(())
    }

    /// Stops the target in order.
    pub fn stop_target(&mut self) {
        if let Some(target) = self.target.take() {
            target.shutdown();
        }
    }

    /// The running target.
    pub fn target(&self) -> Result<&Target> {
        self.target.as_ref().context("the target does not run")
    }

    /// The agent's configuration of its node, as another node's where `node` says so.
    pub fn node_config(&self, node: &str) -> Result<NodeConfig> {
        let dir = self.dir().display();
        let text = format!(
            "node = \"{node}\"\nstate_dir = \"{dir}/state\"\nruntime_dir = \"{dir}/run\"\n\
             api_socket = \"{dir}/agent.sock\"\n\
             [tls]\nca = \"{dir}/ca.pem\"\ncertificate = \"{dir}/{node}.pem\"\nkey = \"{dir}/{node}.key\"\n"
        );
        Ok(NodeConfig::parse(&Source::new(&self.dir().join("agent.toml"), text))?)
    }

    /// The group's configuration at the source.
    pub fn group_config(&self) -> Result<GroupConfig> {
        let mut text = format!(
            "id = \"{}\"\nring_bytes = {}\ncompression = {}\nfront = \"nbd-socket\"\n{}\n\
             [target]\naddress = \"{}\"\nname = \"{TARGET}\"\n",
            self.id,
            self.plan.ring_bytes,
            if self.plan.compression == "off" { "\"off\"" } else { self.plan.compression },
            self.plan.group_lines,
            self.link,
        );
        for index in 0..self.plan.sizes_bytes.len() {
            let backing = self.image(index);
            text += &format!(
                "[[volume]]\nid = {index}\nname = \"v{index}\"\nbacking = \"{}\"\n",
                backing.display()
            );
        }
        let path = self.dir().join(format!("{GROUP}.toml"));
        Ok(GroupConfig::parse(&Source::new(&path, text))?)
    }

    /// Starts the agent with its group.
    pub fn start_agent(&mut self) -> Result<()> {
        let node = self.node_config(SOURCE)?;
        let group = self.group_config()?;
        let agent = self.runtime.block_on(async {
            let agent = Agent::start(AgentConfig { node, groups: Vec::new() }, None).await?;
            agent.start_group(&group).await?;
            anyhow::Ok(agent)
        })?;
        self.agent = Some(agent);
        Ok(())
    }

    /// Stops the agent in order; says whether it ended cleanly.
    pub fn stop_agent(&mut self) -> bool {
        let Some(agent) = self.agent.take() else { return true };
        self.runtime.block_on(agent.stop())
    }

    /// The running agent.
    pub fn agent(&self) -> Result<&Arc<Agent>> {
        self.agent.as_ref().context("the agent does not run")
    }

    /// The group's status at the source.
    pub fn status(&self) -> Result<GroupStatus> {
        let status = self.runtime.block_on(self.agent()?.status());
        status.groups.into_iter().next().context("the agent has no group")
    }

    /// Waits until a look at the status says yes.
    pub fn wait(&self, what: &str, mut until: impl FnMut(&GroupStatus) -> bool) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            let status = self.status()?;
            if until(&status) {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("waited in vain for {what}: {status:#?}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until no volume is in a gap and everything is final-durable.
    pub fn wait_in_sync(&self) -> Result<()> {
        self.wait("the replica to be in sync", |status| {
            status.durable_seq == status.position.seq
                && status.volumes.iter().all(|v| v.gap.is_none() && v.uncaptured_regions == 0)
        })
    }

    /// Sets a mark; its sequence.
    pub fn mark(&self, name: &str) -> Result<u64> {
        let marked = self.runtime.block_on(self.agent()?.mark(GROUP, name));
        Ok(marked.map_err(|error| anyhow::anyhow!("{error}"))?.position.seq.0)
    }

    /// Opens a volume as the application does.
    pub fn open_front(&self, volume: usize) -> Result<Client> {
        let path = self.front(volume);
        Ok(self.runtime.block_on(Client::connect(path.as_path(), "", &Options::default()))?)
    }

    /// Opens an export of the target: what follows the group's name.
    pub fn open_export(&self, name: &str) -> Result<Client> {
        let name = format!("{GROUP}{name}");
        Ok(self.runtime.block_on(Client::connect(
            self.exports().as_path(),
            &name,
            &Options::default(),
        ))?)
    }

    /// Reads a whole export.
    pub fn read_export(&self, name: &str) -> Result<Vec<u8>> {
        let client = self.open_export(name)?;
        let size = client.info().size;
        self.runtime.block_on(async {
            let mut content = Vec::with_capacity(usize::try_from(size)?);
            for at in (0..size).step_by(1 << 20) {
                let bytes = u32::try_from((size - at).min(1 << 20))?;
                content.extend_from_slice(&client.read(at, bytes).await?);
            }
            client.disconnect().await;
            Ok(content)
        })
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        // A failed test leaves quickly; what is lost is only the test's.
        let patience = STOP_PATIENCE;
        if let Some(agent) = self.agent.take() {
            let stop = async { tokio::time::timeout(patience, agent.stop()).await.is_ok() };
            self.runtime.block_on(stop);
        }
        self.stop_target();
    }
}
