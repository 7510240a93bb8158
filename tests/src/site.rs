//! A source and its target in this process: image files, certificates and loopback, in one directory.
//!
//! What the guests do with services, this does with the same libraries, so that a test can stop, start and
//! look at either side at will.

mod config;
mod manager;
mod process;

use std::{
    fs::File,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;
use tidemark_agent::{
    Agent,
    agent::STOP_PATIENCE,
    api::Control,
    config::{AgentConfig, NodeConfig},
};
use tidemark_control::agent::{AgentClient, GroupStatus};
use tidemark_journal::GroupId;
use tidemark_link::pki::{Authority, NodeName};
use tidemark_nbd::client::{Client, Options};
use tidemark_target::{Config, Target};
use tokio::runtime::Runtime;
use tracing_subscriber::EnvFilter;

use crate::{
    proxy::Proxy,
    workload::{history::History, nbd::NbdDisk},
};
use manager::Manager;
use process::Process;

/// The group's name.
pub const GROUP: &str = "shop";
/// The source's node name. Besides it and the target's, `stranger` has a certificate.
pub const SOURCE: &str = "source";
/// The target's node name.
pub const TARGET: &str = "target";

/// What a site is to look like.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The volumes' sizes in bytes; their names are `v0`, `v1` and so on.
    pub sizes_bytes: Vec<u64>,
    /// How many groups there are, each with such volumes of its own; the first is [`GROUP`].
    pub groups: usize,
    /// Each group's ring in bytes.
    pub ring_bytes: u64,
    /// `off`, or a zstd level.
    pub compression: &'static str,
    /// The group's name in the target's configuration: [`GROUP`], or one that nobody asks for.
    pub target_group: &'static str,
    /// More lines for the group's file at the source, before its tables.
    pub group_lines: String,
    /// How large the agent's spool may be; none without one.
    pub spool_bytes_max: Option<u64>,
    /// More lines for the group's table at the target.
    pub target_group_lines: String,
    /// More tables for the target's file.
    pub target_tables: String,
    /// Whether the link goes through [`Site::network`], which costs time.
    pub through_network: bool,
}

impl Plan {
    /// Volumes of these sizes, a ring of 64 MiB, light compression.
    pub fn new(sizes_bytes: &[u64]) -> Plan {
        Plan {
            sizes_bytes: sizes_bytes.to_vec(),
            groups: 1,
            ring_bytes: 64 << 20,
            compression: "1",
            target_group: GROUP,
            group_lines: String::new(),
            spool_bytes_max: None,
            target_group_lines: String::new(),
            target_tables: String::new(),
            through_network: true,
        }
    }
}

/// A source and a target, each running or not.
pub struct Site {
    runtime: Runtime,
    dir: TempDir,
    plan: Plan,
    ids: Vec<GroupId>,
    target: Option<Side<Target>>,
    agent: Option<Side<Arc<Agent>>>,
    link: SocketAddr,
    proxy: Proxy,
    manager: Option<Manager>,
}

/// How one side runs.
enum Side<T> {
    Here(T),
    Elsewhere(Process),
}

impl Site {
    /// Makes the directory, the certificates and the images. Nothing runs yet.
    pub fn new(plan: Plan) -> Result<Site> {
        log();
        let dir = tempfile::Builder::new().prefix("tidemark-site-").tempdir()?;
        let authority = Authority::create("test")?;
        std::fs::write(dir.path().join("ca.pem"), &authority.pem().certificate_pem)?;
        for node in [SOURCE, TARGET, "stranger"] {
            let issued =
                authority.issue_for(&node.parse::<NodeName>()?, &["127.0.0.1".parse()?])?;
            std::fs::write(dir.path().join(format!("{node}.pem")), &issued.certificate_pem)?;
            std::fs::write(dir.path().join(format!("{node}.key")), &issued.key_pem)?;
        }
        let mut ids = Vec::new();
        for group in 0..plan.groups {
            ids.push(GroupId::random()?);
            for (index, size) in plan.sizes_bytes.iter().enumerate() {
                let image = dir.path().join(config::image_name(group, index));
                File::create(image)?.set_len(*size)?;
            }
        }
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let link = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let proxy = Proxy::start(link)?;
        Ok(Site { runtime, dir, plan, ids, target: None, agent: None, link, proxy, manager: None })
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

    /// The image of a volume of the first group.
    pub fn image(&self, volume: usize) -> PathBuf {
        self.image_of(0, volume)
    }

    /// The image of a volume.
    pub fn image_of(&self, group: usize, volume: usize) -> PathBuf {
        self.dir().join(config::image_name(group, volume))
    }

    /// Where the application finds a volume of the first group.
    pub fn front(&self, volume: usize) -> PathBuf {
        self.front_of(0, volume)
    }

    /// Where the application finds a volume.
    pub fn front_of(&self, group: usize, volume: usize) -> PathBuf {
        self.dir().join(format!("run/nbd/{}/v{volume}.sock", config::group_name(group)))
    }

    /// Where the target's exports are found.
    pub fn exports(&self) -> PathBuf {
        self.dir().join("exports.sock")
    }

    /// The directory of the segments of the target's log.
    pub fn log_dir(&self) -> PathBuf {
        self.dir().join(format!("target/groups/{GROUP}/log"))
    }

    /// What the site looks like.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What the site is to look like; what is changed counts from the next start of a side.
    pub fn plan_mut(&mut self) -> &mut Plan {
        &mut self.plan
    }

    /// The network between the two sides.
    pub fn network(&self) -> &Proxy {
        &self.proxy
    }

    /// Where the target listens, past the network.
    pub fn link(&self) -> SocketAddr {
        self.link
    }

    /// Starts the target in this process.
    pub fn start_target(&mut self) -> Result<()> {
        let config = Config::parse(&self.target_config())?;
        self.target = Some(Side::Here(Target::start(&config)?));
        Ok(())
    }

    /// Starts the target in a process of its own: `program` is that of `bin/node.rs`.
    pub fn spawn_target(&mut self, program: &str) -> Result<()> {
        let path = self.dir().join("target.toml");
        std::fs::write(&path, self.target_config())?;
        self.target = Some(Side::Elsewhere(Process::start(program, &[path], "target")?));
        Ok(())
    }

    /// Stops the target in order.
    pub fn stop_target(&mut self) -> Result<()> {
        match self.target.take() {
            Some(Side::Here(target)) => target.shutdown(),
            Some(Side::Elsewhere(process)) => {
                ensure!(process.stop()?, "the target did not end in order");
            }
            None => {}
        }
        Ok(())
    }

    /// Kills the target, which runs in a process of its own.
    pub fn kill_target(&mut self) -> Result<()> {
        match self.target.take() {
            Some(Side::Elsewhere(process)) => process.kill(),
            _ => bail!("the target does not run in a process of its own"),
        }
    }

    /// The target, which runs in this process.
    pub fn target(&self) -> Result<&Target> {
        match &self.target {
            Some(Side::Here(target)) => Ok(target),
            _ => bail!("the target does not run in this process"),
        }
    }

    /// The first group's id.
    pub fn group_id(&self) -> GroupId {
        self.ids[0]
    }

    /// The process ids of the agent and of the target, where they run in processes of their own.
    pub fn process_ids(&self) -> (Option<u32>, Option<u32>) {
        let agent = self.agent.as_ref().and_then(Side::process_id);
        (agent, self.target.as_ref().and_then(Side::process_id))
    }

    /// Starts the agent with its groups, in this process.
    pub fn start_agent(&mut self) -> Result<()> {
        self.start_agent_as(self.node_config(SOURCE)?)
    }

    /// Starts the agent with its groups, in this process, on a node of this configuration.
    pub fn start_agent_as(&mut self, node: NodeConfig) -> Result<()> {
        let groups = self.group_configs()?;
        let agent = self.runtime.block_on(async {
            let agent = Agent::new(&AgentConfig { node, groups: Vec::new() }.into(), None)?;
            for group in &groups {
                agent.start_group(group).await?;
            }
            anyhow::Ok(agent)
        })?;
        self.agent = Some(Side::Here(agent));
        Ok(())
    }

    /// Starts the agent with its groups in a process of its own: `program` is that of `bin/node.rs`.
    pub fn spawn_agent(&mut self, program: &str) -> Result<()> {
        let files = self.write_agent_files()?;
        let command = match &mut self.manager {
            Some(manager) => manager.command(program)?,
            None => std::process::Command::new(program),
        };
        let process = Process::start_by(command, &files, "agent")?;
        self.agent = Some(Side::Elsewhere(process));
        Ok(())
    }

    /// Serves the groups' devices without capture, in a process of its own in the agent's place.
    pub fn spawn_passthrough(&mut self, program: &str) -> Result<()> {
        let files = self.write_agent_files()?;
        let process = Process::start(program, &files, "passthrough")?;
        self.agent = Some(Side::Elsewhere(process));
        Ok(())
    }

    /// From now on, agents in processes of their own have a service manager that keeps their rings.
    pub fn manage_agents(&mut self) -> Result<()> {
        self.manager = Some(Manager::bind(&self.dir().join("notify.sock"))?);
        Ok(())
    }

    /// The names of what the service manager keeps for the agent.
    pub fn kept(&mut self) -> Result<Vec<String>> {
        self.manager.as_mut().context("there is no service manager")?.kept()
    }

    /// Stops the agent in order; says whether it ended cleanly.
    pub fn stop_agent(&mut self) -> Result<bool> {
        match self.agent.take() {
            Some(Side::Here(agent)) => Ok(self.runtime.block_on(agent.stop())),
            Some(Side::Elsewhere(process)) => process.stop(),
            None => Ok(true),
        }
    }

    /// Kills the agent, which runs in a process of its own.
    pub fn kill_agent(&mut self) -> Result<()> {
        match self.agent.take() {
            Some(Side::Elsewhere(process)) => process.kill(),
            _ => bail!("the agent does not run in a process of its own"),
        }
    }

    /// The agent, which runs in this process.
    pub fn agent(&self) -> Result<&Arc<Agent>> {
        match &self.agent {
            Some(Side::Here(agent)) => Ok(agent),
            _ => bail!("the agent does not run in this process"),
        }
    }

    /// For what the agent, in a process of its own, can be asked.
    pub fn agent_client(&self) -> AgentClient {
        AgentClient::new(&self.dir().join("agent.sock"))
    }

    /// The first group's status at the source.
    pub fn status(&self) -> Result<GroupStatus> {
        self.statuses()?.into_iter().next().context("the agent has no group")
    }

    /// The status of every group at the source.
    pub fn statuses(&self) -> Result<Vec<GroupStatus>> {
        let status = match &self.agent {
            Some(Side::Here(agent)) => self.runtime.block_on(agent.status()),
            Some(Side::Elsewhere(_)) => self.runtime.block_on(self.agent_client().status())?,
            None => bail!("the agent does not run"),
        };
        Ok(status.groups)
    }

    /// Waits until a look at the status of every group says yes.
    pub fn wait(&self, what: &str, mut until: impl FnMut(&GroupStatus) -> bool) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            let statuses = self.statuses()?;
            ensure!(!statuses.is_empty(), "the agent has no group");
            let Some(status) = statuses.iter().find(|status| !until(status)) else {
                return Ok(());
            };
            if Instant::now() > deadline {
                bail!("waited in vain for {what}: {status:#?}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until no volume is in a gap and everything is final-durable.
    pub fn wait_in_sync(&self) -> Result<()> {
        self.wait("the replica to be in sync", GroupStatus::is_in_sync)
    }

    /// Sets a mark; its sequence.
    pub fn mark(&self, name: &str) -> Result<u64> {
        let marked = match &self.agent {
            Some(Side::Here(agent)) => self.runtime.block_on(agent.mark(GROUP, name))?,
            _ => self.runtime.block_on(self.agent_client().mark(GROUP, name))?,
        };
        Ok(marked.position.seq.0)
    }

    /// Opens a volume as the application does.
    pub fn open_front(&self, volume: usize) -> Result<Client> {
        let path = self.front(volume);
        Ok(self.runtime.block_on(Client::connect(path.as_path(), "", &Options::default()))?)
    }

    /// A volume as a disk for a load, over so many connections.
    pub fn disk(&self, volume: usize, connections: usize) -> Result<NbdDisk> {
        let clients = (0..connections).map(|_| self.open_front(volume));
        Ok(NbdDisk::new(self.runtime.handle(), clients.collect::<Result<_>>()?))
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
        let content = self.read(&client, 0, size)?;
        self.runtime.block_on(client.disconnect());
        Ok(content)
    }

    /// Proves that every disk is what the model has at its end, and that its newest point is the disk.
    pub fn check_end(&self, model: &History) -> Result<()> {
        for (disk, size) in self.plan.sizes_bytes.iter().enumerate() {
            let image = std::fs::read(self.image(disk))?;
            ensure!(image.len() as u64 == *size);
            let difference = model.difference(disk, model.steps(), 0, &image);
            ensure!(difference.is_none(), "image {disk}: {}", difference.unwrap_or_default());
            ensure!(self.read_export(&format!("/v{disk}@latest"))? == image, "replica {disk}");
        }
        Ok(())
    }

    /// Reads a range of an export or a front.
    pub fn read(&self, client: &Client, offset_bytes: u64, length_bytes: u64) -> Result<Vec<u8>> {
        let end = offset_bytes + length_bytes;
        self.runtime.block_on(async {
            let mut content = Vec::with_capacity(usize::try_from(length_bytes)?);
            for at in (offset_bytes..end).step_by(1 << 20) {
                let bytes = u32::try_from((end - at).min(1 << 20))?;
                content.extend_from_slice(&client.read(at, bytes).await?);
            }
            Ok(content)
        })
    }
}

/// Writes what both sides say to standard error, which is shown with a test that fails.
pub fn log() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // Another site of this process may have done it already.
    let _ =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
}

impl<T> Side<T> {
    fn process_id(&self) -> Option<u32> {
        match self {
            Side::Here(_) => None,
            Side::Elsewhere(process) => Some(process.id()),
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        // A failed test leaves quickly; what is lost is only the test's.
        if let Some(Side::Here(agent)) = self.agent.take() {
            let stop = async { tokio::time::timeout(STOP_PATIENCE, agent.stop()).await.is_ok() };
            self.runtime.block_on(stop);
        }
        if let Some(Side::Here(target)) = self.target.take() {
            target.shutdown();
        }
    }
}
