//! The `tidemark` command.
//!
//! [`cli`] is what may be typed, and the source of the completions and man pages; each module of
//! [`commands`] is one command; [`daemons`] finds the daemons of this machine; [`output`] prints
//! words or JSON; [`words`] puts figures into words.
//!
//! Exit codes: 0 done, 1 failed, 2 wrongly asked; `check` has those of monitoring plugins.

mod cli;
mod commands;
mod daemons;
mod demo;
mod output;
mod words;

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use cli::Cli;

/// What monitoring systems take for "cannot tell".
const UNKNOWN: u8 = 3;

fn main() -> ExitCode {
    match Cli::try_parse() {
        Ok(cli) => {
            let output = output::Output::new(cli.global.json);
            match commands::run(&cli, output) {
                Ok(code) => code,
                Err(error) => {
                    let code = output.failure(&error);
                    if matches!(cli.command, cli::Command::Check(_)) {
                        UNKNOWN.into()
                    } else {
                        code
                    }
                }
            }
        }
        Err(error) => {
            // A reader that has gone needs no help text.
            let _ = error.print();
            match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
                // For a monitoring system 2 would mean that the replication is broken.
                _ if std::env::args().nth(1).as_deref() == Some("check") => UNKNOWN.into(),
                _ => output::USAGE.into(),
            }
        }
    }
}
