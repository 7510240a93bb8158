//! Which points are whole, and what is said of those that are not.

use std::collections::BTreeMap;

use tidemark_control::target::DamagedPoints;
use tidemark_journal::{Seq, VolumeId};

use super::resolve::Scope;
use crate::{branch::Branch, damage::Stretch, history::History, replica::Replica};

/// The stretches of points at which some of a volume cannot be read.
pub fn damaged(replica: &Replica) -> Vec<DamagedPoints> {
    let stretches = replica.damages().stretches();
    replica.ledger().history(|history| {
        let told = |stretch: &Stretch| DamagedPoints {
            volume: name(history, stretch.volume),
            bytes: stretch.bytes,
            first_seq: stretch.from.max(history.oldest),
            last_seq: stretch.until.map(|until| Seq(until.0.saturating_sub(1))),
        };
        stretches.iter().map(told).collect()
    })
}

/// What of a volume, or of all of the group, cannot be read at a position: a clause such as
/// `8 KiB of shop/disk0`.
pub fn missing_at(replica: &Replica, volume: Option<&str>, at: Seq) -> Option<String> {
    clause(replica, volume, &replica.damages().at(at))
}

/// What of a branch cannot be read, in its point or in what was written into it: such a clause.
/// Blocks on the disk.
pub fn missing_of(branch: &Branch) -> Option<String> {
    let mut bytes = branch.parent().damages().at(branch.at().seq);
    for (volume, more) in branch.missing() {
        *bytes.entry(volume).or_default() += more;
    }
    clause(branch.parent(), branch.row().volume.as_deref(), &bytes)
}

fn clause(
    replica: &Replica,
    volume: Option<&str>,
    bytes: &BTreeMap<VolumeId, u64>,
) -> Option<String> {
    let parts: Vec<String> = replica.ledger().history(|history| {
        let named = bytes.iter().map(|(id, bytes)| (name(history, *id), *bytes));
        let wanted = named.filter(|(name, _)| volume.is_none_or(|volume| volume == name));
        let told = |(name, bytes)| {
            format!("{} of {}/{name}", tidemark_control::config::Bytes(bytes), replica.name())
        };
        wanted.map(told).collect()
    });
    (!parts.is_empty()).then(|| parts.join(", "))
}

/// The newest point at which nothing is damaged.
pub fn newest(replica: &Replica, scope: &Scope, end: Seq) -> Option<Seq> {
    let stretches = replica.damages().stretches();
    replica.ledger().history(|history| newest_of(history, scope, &stretches, end))
}

/// The same of a history that is at hand.
pub fn newest_of(history: &History, scope: &Scope, stretches: &[Stretch], end: Seq) -> Option<Seq> {
    let mut at = scope.newest_good(history, end)?;
    // Each step goes below a stretch, so it ends.
    loop {
        let concerned = stretches.iter().filter(|s| scope.concerns(s.volume) && s.contains(at));
        let Some(from) = concerned.map(|stretch| stretch.from).min() else { return Some(at) };
        at = scope.newest_good(history, Seq(from.0.checked_sub(1)?))?;
    }
}

/// Sentences for people, of what is damaged at the newest position.
pub fn problems(replica: &Replica) -> Vec<String> {
    let end = replica.journal().progress().durable.seq;
    let mut problems: Vec<String> = Vec::new();
    if let Some(missing) = missing_at(replica, None, end) {
        problems.push(format!(
            "what is kept is damaged: {missing} cannot be read at the newest point; it is mended \
             as soon as the source is connected and has it"
        ));
    }
    match replica.damages().unlisted() {
        0 => {}
        more => problems.push(format!(
            "{more} more places are damaged than can be listed: run 'tidemark verify' at the source"
        )),
    }
    problems
}

fn name(history: &History, id: VolumeId) -> String {
    let volume = history.volumes.iter().find(|volume| volume.id == id);
    volume.map_or_else(|| format!("volume {id}"), |volume| volume.name.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::{Gap, Size, Volume};

    #[test]
    fn the_newest_whole_point_is_below_the_damage_or_after_it() {
        let volume = Volume {
            id: VolumeId(1),
            name: "data".to_owned(),
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
            sizes: vec![Size { from: Seq::ZERO, sectors: 100 }],
            added: Seq::ZERO,
            removed: None,
            gaps: vec![Gap { begin: Seq(40), end: Some(Seq(50)), reason: 2 }],
            unreadable: Vec::new(),
        };
        let history = History { volumes: vec![volume], oldest: Seq(10), ..History::default() };
        let scope = Scope::of(&history, "shop", None).expect("all of it");
        let stretch = |volume, from, until: Option<u64>| Stretch {
            volume: VolumeId(volume),
            from: Seq(from),
            until: until.map(Seq),
            bytes: 1,
        };
        let newest = |stretches: &[Stretch]| newest_of(&history, &scope, stretches, Seq(90));
        assert_eq!(newest(&[]), Some(Seq(90)));
        assert_eq!(newest(&[stretch(1, 20, Some(90))]), Some(Seq(90)), "mended");
        assert_eq!(newest(&[stretch(1, 60, None)]), Some(Seq(59)));
        assert_eq!(newest(&[stretch(1, 60, None), stretch(1, 55, Some(60))]), Some(Seq(54)));
        assert_eq!(newest(&[stretch(1, 50, None)]), Some(Seq(39)), "not in a gap");
        assert_eq!(newest(&[stretch(1, 0, None)]), None);
    }
}
