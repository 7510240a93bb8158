//! The logs of branches: the last part of a pass.

use std::{io, sync::Arc, time::Instant};

use super::{Cursor, Pass, Scrubs, mended};
use crate::{
    branch::Branch,
    damage::{Place, Spot},
    replica::Replica,
};

impl Scrubs {
    /// One step of a pass in the logs of a group's branches: a segment of the branch of this name, or
    /// of the next one there is.
    pub(super) fn step_branch(
        &self,
        replica: &Arc<Replica>,
        name: &str,
        segment: u64,
        pass: &mut Pass,
    ) -> anyhow::Result<Option<Cursor>> {
        // By name inside a group, as the registry has them.
        let mut branches = self.branches.list().into_iter();
        let of_it = |branch: &Arc<Branch>| branch.parent().name() == replica.name();
        let Some(branch) = branches.find(|branch| of_it(branch) && branch.name() >= name) else {
            return Ok(None);
        };
        let from = if branch.name() == name { segment } else { 0 };
        let checked = self.check_branch(replica, &branch, from, pass);
        match checked {
            // One that is being dropped is not looked at further.
            Err(error) if !branch.is_ending() => Err(error),
            Ok(Some(segment)) => {
                Ok(Some(Cursor::Branch { name: branch.name().to_owned(), segment }))
            }
            // The least name after it.
            _ => Ok(Some(Cursor::Branch { name: format!("{}\0", branch.name()), segment: 0 })),
        }
    }

    /// Checks the first segment of a branch's log from this number on; the number that comes next, if
    /// there was one.
    fn check_branch(
        &self,
        replica: &Arc<Replica>,
        branch: &Branch,
        from: u64,
        pass: &mut Pass,
    ) -> anyhow::Result<Option<u64>> {
        let Some(_there) = branch.there() else { return Ok(None) };
        let segments = branch.journal().segments();
        let Some(segment) = segments.iter().find(|segment| segment.number() >= from) else {
            return Ok(None);
        };
        let (number, group) = (segment.number(), replica.group().id);
        let known = replica.catalogue().segments(&branch.log_name())?;
        let mut last = Instant::now();
        let mut bytes = 0;
        let (findings, mended) = mended(segment, group, &known, &mut |step| {
            bytes += step;
            if branch.is_ending() {
                return Err(io::Error::new(io::ErrorKind::Interrupted, "the branch ends"));
            }
            // Nothing else is looked at meanwhile: whoever drops the branch waits for this.
            self.hold_up(replica, step, &mut last)
        })?;
        self.count_mended(replica, mended);
        let spots: Vec<Spot> = findings
            .into_iter()
            .map(|finding| Spot {
                place: Place::of_segment(number, finding.what),
                text: format!("the branch '{}': {}", branch.name(), finding.text),
                found_wall_ns: 0,
                extents: Vec::new(),
            })
            .collect();
        pass.bytes += bytes;
        pass.found += spots.len() as u64;
        branch.damages().replace(|place| place.segment() == Some(number), spots);
        Ok(Some(number + 1))
    }
}
