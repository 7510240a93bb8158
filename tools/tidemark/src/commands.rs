//! The commands, one module each.

use std::process::ExitCode;

use anyhow::Result;

use crate::cli::{Cli, Command};
use crate::demo;
use crate::output::Output;

mod accept_disk;
mod attach;
mod branch;
pub mod check;
mod config;
mod daemon;
mod forget;
mod init;
mod journal;
mod mark;
mod points;
mod protect;
mod scrub;
mod shell;
mod status;
mod unprotect;
mod verify;

/// Does what was typed.
///
/// # Errors
/// A sentence that says what is wrong and what to do.
pub fn run(cli: &Cli, output: Output) -> Result<ExitCode> {
    let global = &cli.global;
    match &cli.command {
        Command::Init(args) => init::run(args, output),
        Command::Protect(args) => protect::run(args, global, output),
        Command::AcceptDisk(args) => accept_disk::run(args, global, output),
        Command::Unprotect(args) => unprotect::run(args, global, output),
        Command::Status(args) => status::run(args, global, output),
        Command::Check(args) => check::run(args, global, output),
        Command::Points(args) => points::run(args, global, output),
        Command::Mark(args) => mark::run(args, global, output),
        Command::Branch(args) => branch::run(&args.action, global, output),
        Command::Forget(args) => forget::run(args, global, output),
        Command::Attach(args) => attach::run(args, global, output),
        Command::Detach(args) => attach::detach::run(args, global, output),
        Command::AttachWorker => attach::worker::run(),
        Command::Verify(args) => verify::run(args, global, output),
        Command::Scrub(args) => scrub::run(args, global, output),
        Command::Journal(args) => journal::run(&args.action, output),
        Command::Agent(args) => daemon::agent(&args.action, global),
        Command::Target(args) => daemon::target(&args.action, global),
        Command::Config(args) => config::run(&args.action, global, output),
        Command::Demo(args) => {
            let request = demo::Request { image: args.disk.clone(), keep: args.keep };
            demo::run(&request, output)
        }
        Command::Completions(args) => shell::completions(args, output),
        Command::Man(args) => shell::man(args, output),
    }
}
