//! The agent as a program.

use std::{io::IsTerminal, path::PathBuf, process::ExitCode};

use tracing_subscriber::EnvFilter;

const USAGE: &str = "usage: tidemark-agent [--config DIR]";

fn main() -> ExitCode {
    let mut directory = PathBuf::from(tidemark_agent::config::DIRECTORY);
    let mut arguments = std::env::args_os().skip(1);
    while let Some(argument) = arguments.next() {
        match (argument.to_str(), arguments.next()) {
            (Some("--config"), Some(path)) => directory = path.into(),
            (Some("--version"), None) => {
                println!("tidemark-agent {}", env!("CARGO_PKG_VERSION"));
                return ExitCode::SUCCESS;
            }
            (Some("--help"), None) => {
                println!("{USAGE}\n\nThe configuration is in /etc/tidemark unless told otherwise.");
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
    let format = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    if std::env::var_os("JOURNAL_STREAM").is_some() {
        format.without_time().init();
    } else {
        format.init();
    }
    match tidemark_agent::daemon::run(&directory) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
