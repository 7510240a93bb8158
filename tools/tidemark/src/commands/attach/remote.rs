//! A point of a target on another machine, known by its NBD port alone.

use std::net::ToSocketAddrs;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use tidemark_agent::config::{HostPort, NODE_FILE, NodeConfig, TlsConfig};
use tidemark_control::config::Source;
use tidemark_control::target::ExportName;
use tidemark_journal::SECTOR_BYTES;
use tidemark_link::NodeName;
use tidemark_nbd::client::{Address, Client, Options};
use tidemark_target::points::{PointName, Spec};

use super::Plan;
use super::worker::Server;
use crate::cli::{Attach, Global};
use crate::output::Usage;

/// The port of NBD.
const NBD_PORT: u16 = 10809;

/// Finds the exports that show the point.
pub fn plan(
    args: &Attach,
    point: &PointName,
    address: &str,
    name: &NodeName,
    global: &Global,
) -> Result<Plan> {
    let branch = matches!(point.spec, Spec::Branch(_));
    if !branch && !args.read_only {
        let sentence = format!(
            "a point of a target on another machine can be attached with --read-only; to write, run \
             'tidemark branch create NAME {}' there and attach {}@branch:NAME",
            args.point, point.group
        );
        return Err(Usage(sentence).into());
    }
    let wanted = HostPort::parse(address, NBD_PORT).map_err(Usage)?;
    let tls = tls(&global.config_dir);
    let found = (wanted.host(), wanted.port())
        .to_socket_addrs()
        .with_context(|| format!("cannot find the host of {wanted}"))?
        .next();
    let server = Server::Tcp {
        address: found.ok_or_else(|| anyhow!("the host of {wanted} has no address"))?,
        name: name.clone(),
        ca: tls.ca,
        certificate: tls.certificate,
        key: tls.key,
    };
    let (address, options) = server.connection()?;
    let exports = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(exports(&address, &options, point, args.read_only))?;
    let read_only = args.read_only;
    Ok(Plan { server, exports, temporary_branch: None, read_only, wall_ns: None, damage: None })
}

/// This node's certificates.
fn tls(directory: &Path) -> TlsConfig {
    let node =
        Source::read(&directory.join(NODE_FILE)).and_then(|source| NodeConfig::parse(&source));
    node.map_or_else(|_| TlsConfig::default(), |node| node.tls)
}

async fn exports(
    address: &Address,
    options: &Options,
    point: &PointName,
    read_only: bool,
) -> Result<Vec<ExportName>> {
    let volumes = match &point.volume {
        Some(volume) => vec![volume.clone()],
        None => volumes(address, options, &point.group).await?,
    };
    let mut spec = point.spec.clone();
    let mut exports = Vec::new();
    for volume in volumes {
        let wanted = PointName {
            group: point.group.clone(),
            volume: Some(volume.clone()),
            spec: spec.clone(),
        };
        let info = Client::info_of(address.clone(), &wanted.to_string(), options)
            .await
            .with_context(|| format!("cannot have {wanted}"))?;
        if info.features.read_only && !read_only {
            bail!(
                "this node may read {wanted} and not write it: attach it with --read-only, or add \
                 this node to the 'branch_writers' of the group in the target's configuration"
            );
        }
        let export = info.canonical_name.unwrap_or_else(|| wanted.to_string());
        // All volumes at one position: the one that the first of them was resolved to.
        if let Ok(PointName { spec: fixed @ Spec::Seq(_), .. }) = PointName::parse(&export) {
            spec = fixed;
        }
        exports.push(ExportName { volume, export, sectors: info.size / SECTOR_BYTES });
    }
    Ok(exports)
}

/// The volumes of a group, by the target's listing.
async fn volumes(address: &Address, options: &Options, group: &str) -> Result<Vec<String>> {
    let listed = Client::list(address.clone(), options).await.context("cannot list the exports")?;
    let mut found: Vec<String> = listed
        .iter()
        .filter_map(|entry| PointName::parse(&entry.name).ok())
        .filter(|name| name.group == group)
        .filter_map(|name| name.volume)
        .collect();
    found.sort();
    found.dedup();
    if found.is_empty() {
        bail!("the target lists no volume of a group '{group}'");
    }
    Ok(found)
}
