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

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};

use cli::Cli;

fn main() -> ExitCode {
    match Cli::try_parse() {
        Ok(cli) => {
            let output = output::Output::new(cli.global.json);
            commands::run(&cli, output).unwrap_or_else(|error| output.failure(&error))
        }
        Err(error) => {
            // A reader that has gone needs no help text.
            let _ = error.print();
            match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
                _ if is_check() => commands::check::wrongly_asked(&error),
                _ => output::USAGE.into(),
            }
        }
    }
}

/// Whether it is `check` that was wrongly asked, wherever the options stand.
fn is_check() -> bool {
    let lenient = Cli::command().ignore_errors(true).try_get_matches();
    lenient.is_ok_and(|found| found.subcommand_name() == Some("check"))
}
