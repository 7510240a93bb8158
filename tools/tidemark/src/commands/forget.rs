//! `forget`.

use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;

use crate::cli::{Forget, Global};
use crate::daemons;
use crate::output::{Output, Usage};

#[derive(Serialize)]
struct Forgotten<'a> {
    group: &'a str,
}

/// Has the target remove all that it keeps of a group.
pub fn run(args: &Forget, global: &Global, output: Output) -> Result<ExitCode> {
    let group = args.group.as_str();
    if !args.yes {
        let sentence = format!(
            "this removes all that the target keeps of the group '{group}', with every point and \
             branch, and there is no way back; give --yes if that is wanted"
        );
        return Err(Usage(sentence).into());
    }
    let target = daemons::target(global).client;
    target.client().wait(target.forget(group))?;
    output.answer(&Forgotten { group }, || {
        format!("The target has removed all that it kept of the group '{group}'.\n")
    })?;
    Ok(ExitCode::SUCCESS)
}
