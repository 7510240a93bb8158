//! The agent as a program.

use std::{io::IsTerminal, path::PathBuf, process::ExitCode};

use tracing_subscriber::EnvFilter;

const USAGE: &str =
    "usage: tidemark-agent [--config DIR] [--passthrough [GROUP] [--tracking-lost]]";
const HELP: &str = "
The configuration is in /etc/tidemark unless told otherwise.

--passthrough     serve the devices of GROUP, or of all groups, without capturing anything: for when the
                  agent does not start. Everything is compared with the target afterwards.
--tracking-lost   even if the state directory cannot be written, so that nothing remembers that. Run
                  'tidemark accept-disk GROUP' before the agent is started again.";

/// What was typed.
struct Arguments {
    directory: PathBuf,
    /// Without capture, and of which group.
    passthrough: Option<Option<String>>,
    tracking_lost: bool,
}

/// None: not understood.
fn arguments(mut typed: impl Iterator<Item = String>) -> Option<Arguments> {
    let directory = PathBuf::from(tidemark_agent::config::DIRECTORY);
    let mut found = Arguments { directory, passthrough: None, tracking_lost: false };
    while let Some(argument) = typed.next() {
        match (argument.as_str(), &mut found.passthrough) {
            ("--config", _) => found.directory = typed.next()?.into(),
            ("--passthrough", passthrough @ None) => *passthrough = Some(None),
            ("--tracking-lost", Some(_)) => found.tracking_lost = true,
            (group, Some(wanted @ None)) if !group.starts_with('-') => *wanted = Some(argument),
            _ => return None,
        }
    }
    Some(found)
}

fn main() -> ExitCode {
    let typed: Vec<String> =
        std::env::args_os().skip(1).map(|argument| argument.to_string_lossy().into()).collect();
    match typed.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--version"] => {
            println!("tidemark-agent {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        ["--help"] => {
            println!("{USAGE}\n{HELP}");
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    let Some(arguments) = arguments(typed.into_iter()) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
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
    let Arguments { directory, passthrough, tracking_lost } = arguments;
    let ended = match passthrough {
        None => tidemark_agent::daemon::run(&directory),
        Some(group) => {
            tidemark_agent::daemon::run_passthrough(&directory, group.as_deref(), tracking_lost)
        }
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_understood_or_refused() {
        let parse = |line: &str| arguments(line.split_whitespace().map(str::to_owned));
        let found = parse("--config /c --passthrough shop --tracking-lost").unwrap();
        assert_eq!((found.directory, found.tracking_lost), ("/c".into(), true));
        assert_eq!(found.passthrough, Some(Some("shop".to_owned())));
        assert_eq!(parse("--passthrough").unwrap().passthrough, Some(None));
        assert!(parse("").unwrap().passthrough.is_none());
        for wrong in ["--config", "shop", "--tracking-lost", "--passthrough a b", "--passtrough"] {
            assert!(parse(wrong).is_none(), "{wrong}");
        }
    }
}
