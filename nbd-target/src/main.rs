//! The target as a daemon.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context;
use tidemark_target::{Config, Target};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

const USAGE: &str = "usage: tidemark-target --config PATH";
const DEFAULT_CONFIG: &str = "/etc/tidemark/target.toml";

fn main() -> ExitCode {
    let mut config = PathBuf::from(DEFAULT_CONFIG);
    let mut arguments = std::env::args_os().skip(1);
    while let Some(argument) = arguments.next() {
        match (argument.to_str(), arguments.next()) {
            (Some("--config"), Some(path)) => config = path.into(),
            (Some("--version"), None) => {
                println!("{}", tidemark_target::receiver::SOFTWARE);
                return ExitCode::SUCCESS;
            }
            (Some("--help"), None) => {
                println!(
                    "{USAGE}\n\nThe configuration is {DEFAULT_CONFIG} unless another is named."
                );
                return ExitCode::SUCCESS;
            }
            _ => {
                eprintln!("{USAGE}");
                return ExitCode::from(2);
            }
        }
    }
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // Under systemd, standard error goes to the journal, which has its own clock.
    let format = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if std::env::var_os("JOURNAL_STREAM").is_some() {
        format.without_time().with_ansi(false).init();
    } else {
        format.init();
    }
    match run(&config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(config: &std::path::Path) -> anyhow::Result<()> {
    let config = Config::load(config)?;
    // Before any thread: signals are then taken by nobody else.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut stop, mut interrupt) = {
        let _inside = runtime.enter();
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)
    };
    raise_open_files();
    let target = Target::start(&config)?;
    tracing::info!(link = %target.link_addr(), "{}", tidemark_target::receiver::SOFTWARE);
    let status = format!("receiving on {}", target.link_addr());
    let states = [sd_notify::NotifyState::Ready, sd_notify::NotifyState::Status(&status)];
    sd_notify::notify(&states).context("cannot tell the service manager")?;
    runtime.block_on(async {
        tokio::select! {
            _ = stop.recv() => {}
            _ = interrupt.recv() => {}
        }
    });
    tracing::info!("ending");
    // Without a service manager there is nobody to tell.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    target.shutdown();
    Ok(())
}

/// Each sealed segment that is read keeps a descriptor.
fn raise_open_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!("cannot raise the number of open files: {error}");
    }
}
