//! The status as an indented tree.

use std::fmt::Write;

use tidemark_control::agent::{
    AgentStatus, GroupStatus, LinkState, LinkStatus, Progress, Rung, SyncStage, SyncStatus,
    VolumeStatus,
};
use tidemark_control::target::{ReplicaStatus, ReplicaVolume, TargetStatus, ZeroLoss};
use tidemark_journal::SECTOR_BYTES;

use crate::commands::{points, scrub};
use crate::words;

/// What the agent says.
pub fn agent(out: &mut String, status: &AgentStatus, now_ns: i64) {
    let _ = writeln!(out, "agent {}", status.node);
    if status.groups.is_empty() && status.unprotected.is_empty() {
        let _ = writeln!(out, "  no group is protected; 'tidemark protect' begins one");
    }
    for group in &status.groups {
        source_group(out, group, now_ns);
    }
    for failure in &status.unprotected {
        let _ = writeln!(out, "  group {} is NOT PROTECTED", failure.group);
        for line in failure.error.lines() {
            let _ = writeln!(out, "    {line}");
        }
    }
}

/// What the target says.
pub fn target(out: &mut String, status: &TargetStatus, now_ns: i64) {
    let _ = writeln!(out, "target {}", status.node);
    if status.groups.is_empty() {
        let _ = writeln!(out, "  no group has been received");
    }
    for group in &status.groups {
        replica(out, group, now_ns);
    }
}

fn source_group(out: &mut String, group: &GroupStatus, now_ns: i64) {
    let _ = writeln!(out, "  group {} to {} ({})", group.name, group.target_name, group.target);
    let _ = writeln!(out, "    link   {}", link(&group.link, now_ns));
    let _ = writeln!(out, "    lag    {}", lag(group, now_ns));
    let _ = match group.rung {
        Rung::Ring | Rung::Spool => {
            writeln!(out, "    ring   {} % full", group.ring_fill_permille.div_ceil(10))
        }
        Rung::Gap => writeln!(out, "    ring   full: writes are only noted until it empties"),
    };
    if let Some(status) = &group.sync {
        let _ = writeln!(out, "    sync   {}", sync(status));
    }
    ladder(out, group);
    let _ = write!(out, "    sent   {}", words::bytes(group.sent_bytes_total));
    let _ = match group.raw_bytes_total.checked_div(group.sent_bytes_total / 10) {
        Some(tenths) if tenths > 10 => writeln!(
            out,
            " for {}, {}.{} times smaller",
            words::bytes(group.raw_bytes_total),
            tenths / 10,
            tenths % 10
        ),
        _ => writeln!(out),
    };
    for problem in &group.problems {
        let _ = writeln!(out, "    problem: {problem}");
    }
    if let Some(ended) = group.verified.ended_wall_ns {
        let ago = words::duration_ns(words::age_ns(ended, now_ns));
        let _ = match group.verified.differing_bytes {
            0 => writeln!(out, "    verify {ago} ago: the target had what the disks have"),
            bytes => writeln!(
                out,
                "    verify {ago} ago: {} differed at the target and were sent again",
                words::bytes(bytes)
            ),
        };
    }
    if let Some(reason) = &group.doubt {
        let _ = writeln!(out, "    doubt  {reason}; everything is compared");
    }
    for volume in &group.volumes {
        source_volume(out, volume);
    }
}

/// Whether answers wait for the target, and if not, why.
fn sync(status: &SyncStatus) -> String {
    let reason = status.reason.as_deref().unwrap_or_default();
    match status.stage {
        SyncStage::Sync => "yes: what is answered is at the target".to_owned(),
        SyncStage::Async => format!("NO, async: {reason}"),
        SyncStage::Entering => "NO, entering: what was answered before is on its way".to_owned(),
        SyncStage::Leaving => {
            format!("NO, leaving: {reason}; answers wait until no zero-loss lease is left")
        }
    }
}

/// What is in the spool, and when the next rung is reached.
fn ladder(out: &mut String, group: &GroupStatus) {
    let ladder = &group.ladder;
    if group.rung == Rung::Spool || ladder.spool_bytes > 0 {
        let _ = writeln!(
            out,
            "    spool  {} of {} in use",
            words::bytes(ladder.spool_bytes),
            words::bytes(ladder.spool_bytes_max)
        );
    }
    if let Some(warning) = words::next_rung(ladder) {
        let _ = writeln!(out, "    warning: {warning}");
    }
}

/// How far the target is behind, against what was asked for.
fn lag(group: &GroupStatus, now_ns: i64) -> String {
    let lag_ns = real_lag_ns(group, now_ns);
    let waiting = match group.lag_bytes {
        0 => String::new(),
        bytes => format!(", {} to send", words::bytes(bytes)),
    };
    let judged = match group.rpo_target_s {
        None => String::new(),
        Some(target) if lag_ns <= target.saturating_mul(1_000_000_000) => {
            format!(", within the {} asked for", words::duration_s(target))
        }
        Some(target) => format!(", MORE than the {} asked for", words::duration_s(target)),
    };
    match lag_ns {
        0 => "none: the target has everything".to_owned(),
        _ => format!("{} behind{judged}{waiting}", words::duration_ns(lag_ns)),
    }
}

/// The age of what the target is known to have: an idle source with a broken link lags too.
pub fn real_lag_ns(group: &GroupStatus, now_ns: i64) -> u64 {
    match group.link.state {
        LinkState::Up => group.lag_ns,
        _ if group.link.since_wall_ns <= 0 => group.lag_ns,
        _ => group.lag_ns.max(words::age_ns(group.link.since_wall_ns, now_ns)),
    }
}

fn link(link: &LinkStatus, now_ns: i64) -> String {
    let state = match link.state {
        LinkState::Up => "up",
        LinkState::Connecting => "connecting",
        LinkState::Refused => "REFUSED",
        LinkState::Down => "down",
    };
    let age = match link.since_wall_ns {
        // Not since the daemon started.
        ..=0 => String::new(),
        since => {
            let age_s = words::age_ns(since, now_ns) / 1_000_000_000;
            format!(" for {}", words::duration_s(age_s))
        }
    };
    match &link.sentence {
        Some(sentence) => format!("{state}{age}: {sentence}"),
        None => format!("{state}{age}"),
    }
}

fn source_volume(out: &mut String, volume: &VolumeStatus) {
    let _ = writeln!(
        out,
        "    volume {}  {}  ({} on {}, {})",
        volume.name,
        volume.device.display(),
        volume.front.as_str(),
        volume.backing.display(),
        size(volume.sectors)
    );
    let _ = match (&volume.gap, &volume.catch_up) {
        (None, _) => writeln!(out, "      every write is captured"),
        (Some(reason), None) => writeln!(out, "      in a gap: {reason}; waiting to catch up"),
        (Some(reason), Some(walk)) => {
            writeln!(out, "      catching up, {}: {reason}", progress(walk))
        }
    };
    if let Some(walk) = &volume.verify {
        let _ = writeln!(out, "      verifying, {}", progress(walk));
    }
}

fn progress(walk: &Progress) -> String {
    let permille = walk.done_regions.saturating_mul(1000).checked_div(walk.total_regions);
    let permille = permille.unwrap_or(1000);
    let left = match walk.eta_s {
        Some(seconds) => format!(", {} left", words::duration_s(seconds)),
        None => String::new(),
    };
    format!("{}.{} % at {}/s{left}", permille / 10, permille % 10, words::bytes(walk.bytes_per_s))
}

fn replica(out: &mut String, group: &ReplicaStatus, now_ns: i64) {
    let _ = writeln!(out, "  group {} from {}", group.name, group.source);
    let _ = writeln!(out, "    link   {}", link(&group.link, now_ns));
    let _ = writeln!(
        out,
        "    newest {} ({} ago)",
        words::time_before(group.vouched_wall_ns),
        words::duration_ns(words::age_ns(group.vouched_wall_ns, now_ns))
    );
    if let Some(claim) = group.zero_loss {
        let _ = writeln!(out, "    sync   {}", zero_loss(claim));
    }
    let window = words::duration_s(group.window_s);
    let _ = match group.oldest_wall_ns {
        // Nothing has left the window yet.
        ..=0 => writeln!(out, "    oldest the first sync (a window of {window})"),
        oldest => {
            writeln!(out, "    oldest {} (a window of {window})", words::time_after(oldest))
        }
    };
    let _ = writeln!(
        out,
        "    space  {} of log, {} of base",
        words::bytes(group.log_bytes),
        words::bytes(group.base_bytes)
    );
    if group.exports > 0 {
        let _ = writeln!(out, "    {} open", words::count(group.exports as usize, "export"));
    }
    if group.scrub.running {
        let _ = writeln!(out, "    scrub  {}", scrub::progress(&group.scrub));
    } else if group.scrub.finished_wall_ns > 0 {
        let at = words::time_before(group.scrub.finished_wall_ns);
        let found = words::count(group.scrub.finished_found as usize, "damaged place");
        let _ = writeln!(out, "    scrub  last ended {at}, {found} found");
    }
    for problem in &group.problems {
        let _ = writeln!(out, "    problem: {problem}");
    }
    for damage in &group.damage {
        let _ = writeln!(out, "    damaged: {}", points::damage(&group.name, damage));
    }
    for volume in &group.volumes {
        replica_volume(out, volume);
    }
}

/// What a failover now would lose.
pub fn zero_loss(claim: ZeroLoss) -> String {
    match claim {
        ZeroLoss::Held => "zero loss: every write that was answered is here".to_owned(),
        ZeroLoss::Until { wall_ns } => {
            let time = words::time_before(wall_ns);
            format!("zero loss until {time}; later writes may be missing")
        }
        ZeroLoss::None => "no zero loss: writes that were answered may be missing".to_owned(),
    }
}

fn replica_volume(out: &mut String, volume: &ReplicaVolume) {
    let _ = write!(out, "    volume {}  {}", volume.name, size(volume.sectors));
    let _ = match &volume.gap {
        None => writeln!(out, ", can be recovered as of any write"),
        Some(reason) => writeln!(out, ", in a gap: {reason}"),
    };
}

fn size(sectors: u64) -> String {
    words::bytes(sectors.saturating_mul(SECTOR_BYTES))
}

#[cfg(test)]
pub mod tests;
