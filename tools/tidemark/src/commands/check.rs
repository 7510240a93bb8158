//! `check`: a monitoring plugin.
//!
//! One line with a verdict and figures, and the plugins' exit codes. A daemon that should run and
//! does not is critical; what cannot be asked is unknown.

use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;
use tidemark_control::ClientError;
use tidemark_control::agent::{AgentStatus, GroupFailure, GroupStatus, SyncStage};
use tidemark_control::target::{ReplicaStatus, TargetStatus, ZeroLoss};

use super::{
    points,
    status::{real_lag_ns, zero_loss},
};
use crate::cli::{Check, Global};
use crate::output::Output;
use crate::{daemons, words};

/// Lag from which to warn if nobody has said.
const WARNING_S: u64 = 60;
/// How much later than a warning it is critical if nobody has said.
const CRITICAL_FACTOR: u64 = 5;
const SECOND_NS: u64 = 1_000_000_000;

/// Worse is greater, but for `Unknown`, which is the worst only when there is nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
enum Level {
    Ok,
    Unknown,
    Warning,
    Critical,
}

impl Level {
    fn code(self) -> u8 {
        match self {
            Level::Ok => 0,
            Level::Warning => 1,
            Level::Critical => 2,
            Level::Unknown => 3,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Level::Ok => "OK",
            Level::Warning => "WARNING",
            Level::Critical => "CRITICAL",
            Level::Unknown => "UNKNOWN",
        }
    }
}

/// What was found.
#[derive(Debug, Default, Serialize)]
struct Verdict {
    findings: Vec<Finding>,
    perfdata: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Finding {
    level: Level,
    sentence: String,
}

#[derive(Serialize)]
struct Answer<'a> {
    level: Level,
    exit_code: u8,
    #[serde(flatten)]
    verdict: &'a Verdict,
}

/// Judges the replication.
pub fn run(args: &Check, global: &Global, output: Output) -> Result<ExitCode> {
    let mut verdict = Verdict::default();
    if let (Some(warning), Some(critical)) = (args.warning, args.critical)
        && critical < warning
    {
        let sentence = format!(
            "the critical lag (-c {critical}) is below that from which to warn (-w {warning}): \
             it must not be"
        );
        verdict.find(Level::Unknown, sentence);
        return verdict.tell(output);
    }
    let now_ns = words::now_ns();
    let (agent, target) = (daemons::agent(global), daemons::target(global));
    let agent_status = agent.client.client().wait(agent.client.status());
    if let Some(status) = verdict.answered(agent_status, agent.expected) {
        verdict.agent(&status, args, now_ns);
    }
    let target_status = target.client.client().wait(target.client.status());
    if let Some(status) = verdict.answered(target_status, target.expected) {
        verdict.target(&status, args, now_ns);
    }
    if verdict.findings.is_empty() {
        let sentence = match &args.group {
            Some(group) => format!("no group '{group}' is on this machine"),
            None => "nothing is protected or received on this machine".to_owned(),
        };
        verdict.find(Level::Unknown, sentence);
    }
    verdict.tell(output)
}

/// The answer to arguments that cannot be read: to a monitoring system the usual exit code would
/// mean that the replication is broken.
pub fn wrongly_asked(error: &clap::Error) -> ExitCode {
    let mut verdict = Verdict::default();
    let text = error.to_string();
    let line = text.lines().next().unwrap_or_default();
    verdict.find(Level::Unknown, line.strip_prefix("error: ").unwrap_or(line));
    let json = std::env::args_os().any(|argument| argument == "--json");
    // If nobody reads, the exit code says it.
    verdict.tell(Output::new(json)).unwrap_or(Level::Unknown.code().into())
}

impl Verdict {
    /// Prints it; its exit code. What cannot be printed is unknown too.
    fn tell(&self, output: Output) -> Result<ExitCode> {
        let level = self.level();
        let answer = Answer { level, exit_code: level.code(), verdict: self };
        match output.answer(&answer, || self.line()) {
            Ok(()) => Ok(level.code().into()),
            Err(error) => {
                output.failure(&error.into());
                Ok(Level::Unknown.code().into())
            }
        }
    }

    fn find(&mut self, level: Level, sentence: impl Into<String>) {
        self.findings.push(Finding { level, sentence: sentence.into() });
    }

    fn level(&self) -> Level {
        self.findings.iter().map(|finding| finding.level).max().unwrap_or(Level::Unknown)
    }

    /// The worst first, on one line: `|` would begin the figures.
    fn line(&self) -> String {
        let level = self.level();
        let worst = self.findings.iter().filter(|finding| finding.level == level);
        let words: Vec<&str> = worst.map(|finding| finding.sentence.as_str()).collect();
        let text = words.join("; ").replace(['|', '\n'], " ");
        let figures = match self.perfdata.is_empty() {
            true => String::new(),
            false => format!(" | {}", self.perfdata.join(" ")),
        };
        format!("TIDEMARK {} - {text}{figures}\n", level.word())
    }

    /// What a daemon says, if it is here and says something.
    fn answered<T>(&mut self, answer: Result<T, ClientError>, expected: bool) -> Option<T> {
        match answer {
            Ok(status) => return Some(status),
            Err(ClientError::NotRunning { .. }) if !expected => {}
            Err(error @ ClientError::NotRunning { .. }) => {
                self.find(Level::Critical, error.to_string());
            }
            Err(error) => self.find(Level::Unknown, error.to_string()),
        }
        None
    }

    fn agent(&mut self, status: &AgentStatus, args: &Check, now_ns: i64) {
        let chosen = |group: &&GroupStatus| {
            args.group.as_ref().is_none_or(|wanted| wanted.as_str() == group.name)
        };
        for group in status.groups.iter().filter(chosen) {
            self.source_group(group, args, now_ns);
        }
        let chosen = |failure: &&GroupFailure| {
            args.group.as_ref().is_none_or(|wanted| wanted.as_str() == failure.group)
        };
        for failure in status.unprotected.iter().filter(chosen) {
            // The lines after the first show the place in a file.
            let reason = failure.error.lines().next().unwrap_or_default();
            self.find(Level::Critical, format!("{}: not protected: {reason}", failure.group));
        }
    }

    fn source_group(&mut self, group: &GroupStatus, args: &Check, now_ns: i64) {
        let name = &group.name;
        let (warning_s, critical_s) = thresholds(args, group.rpo_target_s);
        let lag_ns = real_lag_ns(group, now_ns);
        let lag = format!("{name}: the target is {} behind", words::duration_ns(lag_ns));
        let lag = match &group.link.sentence {
            Some(why) if lag_ns > warning_s.saturating_mul(SECOND_NS) => format!("{lag} ({why})"),
            _ => lag,
        };
        self.find(judge(lag_ns, warning_s, critical_s), lag);
        for problem in &group.problems {
            self.find(Level::Critical, format!("{name}: {problem}"));
        }
        for volume in &group.volumes {
            if let Some(reason) = &volume.gap {
                let sentence = format!("{name}/{}: no present point, {reason}", volume.name);
                self.find(Level::Warning, sentence);
            }
        }
        if let Some(ended) = group.verified.ended_wall_ns {
            let bytes = group.verified.differing_bytes;
            if bytes > 0 {
                let sentence = format!(
                    "{name}: the last verify found {} that differed, and mended them",
                    words::bytes(bytes)
                );
                self.find(Level::Warning, sentence);
            }
            let age_s = words::age_ns(ended, now_ns) / SECOND_NS;
            self.perfdata.push(format!("'{name}_verify_age'={age_s}s;;;0"));
            self.perfdata.push(format!("'{name}_verify_differing'={bytes}B;;;0"));
        }
        if let Some(sync) = &group.sync {
            let in_sync = sync.stage == SyncStage::Sync;
            if !in_sync {
                let reason = sync.reason.as_deref().unwrap_or("it is being entered");
                self.find(Level::Warning, format!("{name}: not in sync, {reason}"));
            }
            self.perfdata.push(format!("'{name}_sync'={};;;0;1", u8::from(in_sync)));
            self.perfdata.push(format!("'{name}_sync_left'={}c;;;0", sync.left_total));
            self.perfdata.push(format!("'{name}_answers_waiting'={};;;0", sync.answers_waiting));
        }
        if let Some(warning) = words::next_rung(&group.ladder) {
            self.find(Level::Warning, format!("{name}: {warning}"));
        }
        self.perfdata.push(seconds(&format!("{name}_lag"), lag_ns, warning_s, critical_s));
        self.perfdata.push(format!("'{name}_lag_bytes'={}B;;;0", group.lag_bytes));
        let fill = group.ring_fill_permille;
        self.perfdata.push(format!("'{name}_ring'={}.{}%;;;0;100", fill / 10, fill % 10));
        let ladder = &group.ladder;
        if ladder.spool_bytes_max > 0 {
            let (bytes, most) = (ladder.spool_bytes, ladder.spool_bytes_max);
            self.perfdata.push(format!("'{name}_spool'={bytes}B;;;0;{most}"));
        }
    }

    fn target(&mut self, status: &TargetStatus, args: &Check, now_ns: i64) {
        let chosen = |group: &&ReplicaStatus| {
            args.group.as_ref().is_none_or(|wanted| wanted.as_str() == group.name)
        };
        for group in status.groups.iter().filter(chosen) {
            self.replica(group, args, now_ns);
        }
    }

    fn replica(&mut self, group: &ReplicaStatus, args: &Check, now_ns: i64) {
        let name = &group.name;
        let (warning_s, critical_s) = thresholds(args, None);
        let age_ns = words::age_ns(group.vouched_wall_ns, now_ns);
        let level = judge(age_ns, warning_s, critical_s);
        let age = words::duration_ns(age_ns);
        self.find(level, format!("{name}: the newest point received is {age} old"));
        for problem in &group.problems {
            self.find(Level::Critical, format!("{name}: {problem}"));
        }
        for damage in &group.damage {
            // The newest point is among the problems too, if it is concerned.
            let level = if damage.last_seq.is_none() { Level::Critical } else { Level::Warning };
            let what = points::damage(name, damage);
            self.find(level, format!("{name}: damaged points, {what}"));
        }
        if let Some(claim) = group.zero_loss {
            let held = claim == ZeroLoss::Held;
            if !held {
                self.find(Level::Warning, format!("{name}: {}", zero_loss(claim)));
            }
            self.perfdata.push(format!("'{name}_zero_loss'={};;;0;1", u8::from(held)));
        }
        for volume in &group.volumes {
            if let Some(reason) = &volume.gap {
                let sentence = format!("{name}/{}: no present point, {reason}", volume.name);
                self.find(Level::Warning, sentence);
            }
        }
        self.perfdata.push(seconds(&format!("{name}_point_age"), age_ns, warning_s, critical_s));
        self.perfdata.push(format!("'{name}_window'={}s;;;0", group.window_s));
        self.perfdata.push(format!("'{name}_log'={}B;;;0", group.log_bytes));
    }
}

fn thresholds(args: &Check, rpo_target_s: Option<u64>) -> (u64, u64) {
    let usual = rpo_target_s.unwrap_or(WARNING_S);
    let warning = args.warning.unwrap_or(usual.min(args.critical.unwrap_or(usual)));
    (warning, args.critical.unwrap_or(warning.saturating_mul(CRITICAL_FACTOR)))
}

fn judge(age_ns: u64, warning_s: u64, critical_s: u64) -> Level {
    if age_ns > critical_s.saturating_mul(SECOND_NS) {
        Level::Critical
    } else if age_ns > warning_s.saturating_mul(SECOND_NS) {
        Level::Warning
    } else {
        Level::Ok
    }
}

/// `'label'=value;warning;critical;minimum`, as plugins write it.
fn seconds(label: &str, ns: u64, warning_s: u64, critical_s: u64) -> String {
    let (whole, milli) = (ns / SECOND_NS, ns % SECOND_NS / 1_000_000);
    format!("'{label}'={whole}.{milli:03}s;{warning_s};{critical_s};0")
}

#[cfg(test)]
mod tests;
