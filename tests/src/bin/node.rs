//! An agent or a target in a process of its own, so that a test can kill it or look at its memory.
//!
//! `node agent NODE.toml GROUP.toml...`, `node passthrough NODE.toml GROUP.toml...` or `node target TARGET.toml`. It prints
//! a line when it runs, and ends in order when its standard input does; its exit code then says whether it ended cleanly.

use std::io::{Read, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use tidemark_agent::Agent;
use tidemark_agent::api::routes;
use tidemark_agent::config::{AgentConfig, GroupConfig, NodeConfig};
use tidemark_agent::passthrough::Passthrough;
use tidemark_control::config::Source;
use tidemark_control::server::{Socket, serve};
use tidemark_target::{Config, Target};

fn main() -> Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    tidemark_tests::site::log();
    let clean = match arguments[..] {
        ["agent", node, ref groups @ ..] => agent(Path::new(node), groups)?,
        ["passthrough", node, ref groups @ ..] => passthrough(Path::new(node), groups)?,
        ["target", config] => {
            let target = Target::start(&Config::load(Path::new(config))?)?;
            run_until_the_end_of_input()?;
            target.shutdown();
            true
        }
        _ => bail!(
            "usage: node agent NODE.toml GROUP.toml... | node passthrough NODE.toml GROUP.toml... | \
             node target TARGET.toml"
        ),
    };
    Ok(ExitCode::from(u8::from(!clean)))
}

fn agent(node: &Path, groups: &[&str]) -> Result<bool> {
    let (node, configs) = configs(node, groups)?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let socket = Socket::bind(&node.api_socket)?;
    let agent = runtime.block_on(async {
        let agent = Agent::new(&AgentConfig { node, groups: Vec::new() }.into(), None)?;
        for group in &configs {
            agent.start_group(group).await?;
        }
        anyhow::Ok(agent)
    })?;
    runtime.spawn(serve(socket, routes(agent.clone()), std::future::pending()));
    run_until_the_end_of_input()?;
    Ok(runtime.block_on(agent.stop()))
}

fn passthrough(node: &Path, groups: &[&str]) -> Result<bool> {
    let (node, configs) = configs(node, groups)?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let mut serving = Vec::new();
    for group in &configs {
        serving.push(runtime.block_on(Passthrough::start(&node, group, false))?);
    }
    run_until_the_end_of_input()?;
    for group in serving {
        runtime.block_on(group.stop());
    }
    Ok(true)
}

fn configs(node: &Path, groups: &[&str]) -> Result<(NodeConfig, Vec<GroupConfig>)> {
    let node = NodeConfig::parse(&Source::read(node)?)?;
    let mut configs = Vec::new();
    for group in groups {
        configs.push(GroupConfig::parse(&Source::read(Path::new(group))?)?);
    }
    Ok((node, configs))
}

fn run_until_the_end_of_input() -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "running")?;
    out.flush()?;
    std::io::stdin().read_to_end(&mut Vec::new()).context("standard input")?;
    Ok(())
}
