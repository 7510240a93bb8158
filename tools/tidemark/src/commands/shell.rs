//! `completions` and `man`, from the same source as the parser.

use std::fs;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::CommandFactory;
use serde_json::json;

use crate::cli::{Cli, Completions, Man};
use crate::output::Output;

/// Prints a shell's completions.
pub fn completions(args: &Completions, output: Output) -> Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "tidemark", &mut script);
    let script = String::from_utf8(script).context("the completions")?;
    output
        .answer(&json!({"shell": args.shell.to_string(), "script": script}), || script.clone())?;
    Ok(ExitCode::SUCCESS)
}

/// Writes the man pages.
pub fn man(args: &Man, output: Output) -> Result<ExitCode> {
    let shown = args.dir.display();
    fs::create_dir_all(&args.dir).with_context(|| format!("cannot make {shown}"))?;
    clap_mangen::generate_to(Cli::command(), &args.dir)
        .with_context(|| format!("cannot write man pages to {shown}"))?;
    output.answer(&json!({"dir": args.dir}), || format!("The man pages are in {shown}.\n"))?;
    Ok(ExitCode::SUCCESS)
}
