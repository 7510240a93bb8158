//! `init`.

use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use tidemark_link::NodeName;
use tidemark_link::pki::{Address, Authority, CertificateAndKey};

use crate::cli::{Init, NodeArgument};
use crate::output::Output;

/// Where a node looks for its files unless its configuration says otherwise.
const INSTALLED: &str = "/etc/tidemark/pki";

#[derive(Serialize)]
struct Made {
    dir: PathBuf,
    /// The authority was made now, not before.
    authority_made: bool,
    nodes: Vec<MadeNode>,
}

#[derive(Serialize)]
struct MadeNode {
    name: NodeName,
    /// At which NBD clients reach it, besides its name.
    addresses: Vec<Address>,
    dir: PathBuf,
}

/// Makes the authority, if there is none, and the nodes' certificates.
pub fn run(args: &Init, output: Output) -> Result<ExitCode> {
    let nodes_dir = args.dir.join("nodes");
    for NodeArgument { name, .. } in &args.nodes {
        let dir = nodes_dir.join(name.as_str());
        if dir.exists() && !args.renew {
            bail!(
                "the node '{name}' has a certificate in {} already; give --renew to replace it",
                dir.display()
            );
        }
    }
    make_directory(&args.dir)?;
    let (authority, authority_made) = authority(&args.dir)?;
    make_directory(&nodes_dir)?;
    let mut nodes = Vec::new();
    for NodeArgument { name, addresses } in &args.nodes {
        let issued = authority.issue_for(name, addresses).context("cannot make the certificate")?;
        let dir = nodes_dir.join(name.as_str());
        make_directory(&dir)?;
        write(&dir.join("ca.pem"), &authority.pem().certificate_pem, 0o644)?;
        write(&dir.join("node.pem"), &issued.certificate_pem, 0o644)?;
        write(&dir.join("node.key"), &issued.key_pem, 0o600)?;
        nodes.push(MadeNode { name: name.clone(), addresses: addresses.clone(), dir });
    }
    let made = Made { dir: args.dir.clone(), authority_made, nodes };
    output.answer(&made, || say(&made))?;
    Ok(ExitCode::SUCCESS)
}

fn say(made: &Made) -> String {
    let mut out = String::new();
    let dir = made.dir.display();
    if made.authority_made {
        let _ = writeln!(
            out,
            "Made a private certificate authority in {dir}. Its key, {dir}/ca.key, makes nodes: \
             keep the\ndirectory safe and off the nodes.\n"
        );
    }
    let _ = writeln!(out, "Put each node's files in place:");
    for node in &made.nodes {
        let _ = writeln!(
            out,
            "  ssh root@{name} mkdir -p -m 755 {INSTALLED} && scp -p {dir}/* root@{name}:{INSTALLED}/",
            name = node.name,
            dir = node.dir.display(),
        );
    }
    out.push_str(
        "\nThen, on a source: tidemark protect GROUP --volume NAME=DISK --target HOST --target-name \
         NODE\n",
    );
    out
}

fn authority(dir: &Path) -> Result<(Authority, bool)> {
    let (certificate, key) = (dir.join("ca.pem"), dir.join("ca.key"));
    if !certificate.exists() && !key.exists() {
        let authority =
            Authority::create("Tidemark private CA").context("cannot make the authority")?;
        write(&key, &authority.pem().key_pem, 0o600)?;
        write(&certificate, &authority.pem().certificate_pem, 0o644)?;
        return Ok((authority, true));
    }
    let read = |path: &Path| {
        fs::read_to_string(path).with_context(|| {
            format!("cannot read {}, a part of the authority that is there", path.display())
        })
    };
    let pem = CertificateAndKey { certificate_pem: read(&certificate)?, key_pem: read(&key)? };
    let authority = Authority::from_pem(pem)
        .with_context(|| format!("the authority in {} cannot be used", dir.display()))?;
    Ok((authority, false))
}

/// For the owner alone.
fn make_directory(path: &Path) -> Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        made => made.with_context(|| format!("cannot make the directory {}", path.display())),
    }
}

/// Replaces a file as a whole.
fn write(path: &Path, text: &str, mode: u32) -> Result<()> {
    let fresh = path.with_extension("new");
    let written = || -> io::Result<()> {
        match fs::remove_file(&fresh) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&fresh)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&fresh, path)
    };
    written().with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests;
