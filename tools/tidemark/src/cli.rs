//! What may be typed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use tidemark_agent::config::HostPort;
use tidemark_control::config::{Bytes, Name, Seconds};
use tidemark_link::NodeName;
use tidemark_link::pki::{Address, PkiError};

/// Block-level disaster recovery: protect a disk, recover it as of any write.
#[derive(Debug, Parser)]
#[command(
    name = "tidemark",
    version,
    arg_required_else_help = true,
    after_help = "Exit codes: 0 done, 1 failed, 2 wrongly asked ('check': those of monitoring \
                  plugins)."
)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// What holds for every command.
#[derive(Debug, Args)]
pub struct Global {
    /// Answer in JSON, for programs: integers and a schema version.
    #[arg(long, global = true)]
    pub json: bool,
    /// Where the configuration lies.
    #[arg(long, global = true, value_name = "DIR", default_value = "/etc/tidemark")]
    pub config_dir: PathBuf,
    /// The agent's socket, if not the configured one.
    #[arg(long, global = true, value_name = "PATH")]
    pub agent_socket: Option<PathBuf>,
    /// The target's socket, if not the configured one.
    #[arg(long, global = true, value_name = "PATH")]
    pub target_socket: Option<PathBuf>,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a private certificate authority and the certificates of nodes.
    Init(Init),
    /// Protect disks: from then on every write to them is sent to the target.
    Protect(Protect),
    /// Take the disks that are there for those that were protected, and compare everything.
    AcceptDisk(AcceptDisk),
    /// End the protection of a group; its points stay at the target.
    Unprotect(Unprotect),
    /// Show what is protected and how far behind the target is.
    Status(Status),
    /// Judge the replication for a monitoring system (exit 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN).
    Check(Check),
    /// List what can be recovered (on the target).
    Points(Points),
    /// Name the present moment of a group (on the source), to recover it later.
    Mark(Mark),
    /// Make, list and drop writable branches of points (on the target).
    Branch(Branch),
    /// Remove the replica of a group with all its points and branches (on the target).
    Forget(Forget),
    /// Present a point as block devices of this machine.
    Attach(Attach),
    /// Take the block devices of an attached point away.
    Detach(Detach),
    /// Serve one attached device until it is detached; 'attach' starts it.
    #[command(hide = true)]
    AttachWorker,
    /// Compare all content of a group with the target and mend what differs (on the source).
    Verify(Verify),
    /// Read all that the target keeps of a group and compare it with its checksums (on the target).
    Scrub(Scrub),
    /// Look into journal files.
    Journal(Journal),
    /// Look at the configuration.
    Config(Config),
    /// The agent, on a source.
    Agent(Daemon),
    /// The target, on a recovery site.
    Target(Daemon),
    /// See it work: protect a disk, ruin it and recover two moments of it, here and now.
    Demo(Demo),
    /// Print completions for a shell.
    Completions(Completions),
    /// Write the man pages into a directory.
    Man(Man),
}

#[derive(Debug, Args)]
pub struct Daemon {
    #[command(subcommand)]
    pub action: DaemonAction,
}

#[derive(Debug, Subcommand)]
pub enum DaemonAction {
    /// Run it in the foreground until it is interrupted; its log goes to standard error.
    Run,
}

#[derive(Debug, Args)]
pub struct Demo {
    /// Work on a sparse copy of this image; it is only read.
    #[arg(long, value_name = "IMAGE")]
    pub disk: Option<PathBuf>,
    /// Leave everything running at the end, to look around.
    #[arg(long)]
    pub keep: bool,
}

#[derive(Debug, Args)]
pub struct Init {
    /// Directory for the authority and the nodes' certificates; keep it where nodes are enrolled.
    #[arg(long, value_name = "DIR", default_value = "tidemark-pki")]
    pub dir: PathBuf,
    /// A node to make a certificate for, with the host names and IP addresses at which NBD clients
    /// reach it, if there are any; may be given several times, and again later.
    #[arg(long = "node", value_name = "NAME[=ADDRESS,...]", required = true)]
    pub nodes: Vec<NodeArgument>,
    /// Replace the certificates of nodes that have one.
    #[arg(long)]
    pub renew: bool,
}

/// `NAME` or `NAME=ADDRESS,...`.
#[derive(Clone, Debug)]
pub struct NodeArgument {
    pub name: NodeName,
    pub addresses: Vec<Address>,
}

impl std::str::FromStr for NodeArgument {
    type Err = PkiError;

    fn from_str(text: &str) -> Result<NodeArgument, PkiError> {
        let (name, addresses) = match text.split_once('=') {
            None => (text, Vec::new()),
            Some((name, rest)) => {
                (name, rest.split(',').map(str::parse).collect::<Result<_, _>>()?)
            }
        };
        Ok(NodeArgument { name: name.parse()?, addresses })
    }
}

#[derive(Debug, Args)]
pub struct Protect {
    /// The group: volumes that share one write order.
    pub group: Name,
    /// A volume's name and its disk or image; may be given several times.
    #[arg(long = "volume", value_name = "NAME=PATH", required = true)]
    pub volumes: Vec<VolumeArgument>,
    /// Where the target listens.
    #[arg(long, value_name = "HOST[:PORT]")]
    pub target: HostPort,
    /// The target's node name, as in its certificate.
    #[arg(long, value_name = "NAME")]
    pub target_name: NodeName,
    /// How the volumes are presented.
    #[arg(long, value_enum, default_value_t = Front::Auto)]
    pub front: Front,
    /// Memory for writes on their way, such as "256 MiB".
    #[arg(long, value_name = "SIZE")]
    pub ring_bytes: Option<Bytes>,
    /// How far the target may lag before somebody should know, such as "60 s".
    #[arg(long, value_name = "TIME")]
    pub rpo_target: Option<Seconds>,
    /// Answer a write when the target has it too, so that a failover loses none.
    #[arg(long)]
    pub sync: bool,
    /// Only say what would be done.
    #[arg(long)]
    pub dry_run: bool,
}

/// `NAME=PATH`.
#[derive(Clone, Debug)]
pub struct VolumeArgument {
    pub name: Name,
    pub path: PathBuf,
}

impl std::str::FromStr for VolumeArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<VolumeArgument, String> {
        let (name, path) = text
            .split_once('=')
            .filter(|(_, path)| !path.is_empty())
            .ok_or("NAME=PATH is wanted, such as data=/dev/sdb")?;
        let name =
            name.parse().map_err(|error: tidemark_control::config::NameError| error.to_string())?;
        Ok(VolumeArgument { name, path: path.into() })
    }
}

/// How volumes are presented.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Front {
    /// The best that this kernel has.
    Auto,
    /// A ublk block device.
    Ublk,
    /// A block device of the kernel's NBD client.
    NbdKernel,
    /// A plain NBD Unix socket.
    NbdSocket,
}

impl Front {
    /// As it is written in configuration.
    pub fn name(self) -> &'static str {
        match self {
            Front::Auto => "auto",
            Front::Ublk => "ublk",
            Front::NbdKernel => "nbd-kernel",
            Front::NbdSocket => "nbd-socket",
        }
    }
}

#[derive(Debug, Args)]
pub struct AcceptDisk {
    /// GROUP, or GROUP/VOLUME for the disk of one volume.
    #[arg(value_name = "GROUP[/VOLUME]")]
    pub scope: Scope,
    /// Only say what would be done.
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub struct Unprotect {
    /// The group.
    pub group: Name,
    /// Only say what would be done.
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub struct Status {
    /// Show it again and again until interrupted.
    #[arg(long)]
    pub watch: bool,
    /// Seconds between two looks.
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub interval: u32,
}

#[derive(Debug, Args)]
pub struct Check {
    /// This group only.
    #[arg(long, value_name = "GROUP")]
    pub group: Option<Name>,
    /// Lag from which to warn; the group's own target if not given, else 60 s.
    #[arg(long, short, value_name = "SECONDS")]
    pub warning: Option<u64>,
    /// Lag from which it is critical; five times the warning if not given.
    #[arg(long, short, value_name = "SECONDS")]
    pub critical: Option<u64>,
}

#[derive(Debug, Args)]
pub struct Points {
    /// GROUP, or GROUP/VOLUME for one volume by itself.
    #[arg(value_name = "GROUP[/VOLUME]")]
    pub scope: Scope,
}

/// `GROUP` or `GROUP/VOLUME`.
#[derive(Clone, Debug)]
pub struct Scope {
    pub group: Name,
    pub volume: Option<Name>,
}

impl std::str::FromStr for Scope {
    type Err = tidemark_control::config::NameError;

    fn from_str(text: &str) -> Result<Scope, Self::Err> {
        match text.split_once('/') {
            None => Ok(Scope { group: text.parse()?, volume: None }),
            Some((group, volume)) => {
                Ok(Scope { group: group.parse()?, volume: Some(volume.parse()?) })
            }
        }
    }
}

#[derive(Debug, Args)]
pub struct Mark {
    /// The group.
    pub group: Name,
    /// The mark's name.
    pub name: String,
}

#[derive(Debug, Args)]
pub struct Branch {
    #[command(subcommand)]
    pub action: BranchAction,
}

#[derive(Debug, Subcommand)]
pub enum BranchAction {
    /// Make a writable branch of a point.
    Create {
        /// The branch's name.
        name: Name,
        /// The point: GROUP@latest, GROUP@mark:NAME, GROUP@seq:N or GROUP@2026-11-23T09:59:30Z.
        #[arg(value_name = "GROUP[/VOLUME]@POINT")]
        point: String,
    },
    /// List the branches.
    List,
    /// Drop a branch and everything written into it.
    Drop {
        /// The branch: its name, or GROUP@branch:NAME where several groups have one of that name.
        #[arg(value_name = "NAME")]
        branch: String,
        /// Only say what would be done.
        #[arg(long)]
        dry_run: bool,
    },
}

#[derive(Debug, Args)]
pub struct Forget {
    /// The group; it must not be in the target's configuration any more.
    pub group: Name,
    /// Yes, remove it: there is no way back.
    #[arg(long)]
    pub yes: bool,
}

#[derive(Debug, Args)]
pub struct Attach {
    /// The point: GROUP@latest, GROUP@mark:NAME, GROUP@seq:N, GROUP@2026-11-23T09:59:30Z or
    /// GROUP@branch:NAME; with GROUP/VOLUME one volume only.
    #[arg(value_name = "GROUP[/VOLUME]@POINT")]
    pub point: String,
    /// Read-only, with no branch made for it.
    #[arg(long)]
    pub read_only: bool,
    /// A target on another machine, where it serves NBD; with --target-name.
    #[arg(long, value_name = "HOST[:PORT]", requires = "target_name")]
    pub target: Option<String>,
    /// The node name of a target on another machine.
    #[arg(long, value_name = "NAME", requires = "target")]
    pub target_name: Option<NodeName>,
}

#[derive(Debug, Args)]
pub struct Detach {
    /// What to detach: GROUP, GROUP/VOLUME, or a device such as /dev/nbd0.
    #[arg(value_name = "GROUP[/VOLUME]|DEVICE")]
    pub what: String,
    /// Only say what would be done.
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub struct Verify {
    /// GROUP, or GROUP/VOLUME.
    #[arg(value_name = "GROUP[/VOLUME]")]
    pub scope: Scope,
}

#[derive(Debug, Args)]
pub struct Scrub {
    /// The group.
    pub group: Name,
    /// Wait until it has ended; exit 1 if anything is damaged.
    #[arg(long)]
    pub wait: bool,
}

#[derive(Debug, Args)]
pub struct Journal {
    #[command(subcommand)]
    pub action: JournalAction,
}

#[derive(Debug, Subcommand)]
pub enum JournalAction {
    /// Print the frames of a segment, or of a file of bare frames, record by record.
    Dump {
        /// The file.
        file: PathBuf,
    },
}

#[derive(Debug, Args)]
pub struct Config {
    #[command(subcommand)]
    pub action: ConfigAction,
}

#[derive(Debug, Subcommand)]
pub enum ConfigAction {
    /// Say whether the daemons could start with the configuration, and if not, why.
    Check,
}

#[derive(Debug, Args)]
pub struct Completions {
    /// The shell.
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

#[derive(Debug, Args)]
pub struct Man {
    /// The directory; it is made if it is missing.
    pub dir: PathBuf,
}
