//! What a greeting means: may the stream go on where the replica ends, or is something wrong?
//!
//! Both ends decide by the same [`compare`]: the target to refuse at once, the source to know what
//! to do. The decision is a table over eight facts ([`TABLE`]); a test walks every combination.

use tidemark_journal::{Ancestry, Position, VolumeId};

use crate::message::{Hello, Refuse, RefuseCode, VolumeSize, Welcome};

/// What the target knows of the group.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct TargetMemory {
    /// The durable end of the replica; none when it is new.
    pub position: Option<Position>,
    /// The path of terms that ends with the position's, if it is known.
    pub path: Option<Ancestry>,
    /// The newest generation of the source's dirty map that it has durably seen.
    pub map_generation: u64,
    /// The sizes of its volumes. A volume that only one side knows is not compared.
    pub volumes: Vec<VolumeSize>,
}

impl From<&Welcome> for TargetMemory {
    fn from(welcome: &Welcome) -> TargetMemory {
        TargetMemory {
            position: welcome.position,
            path: welcome.path.clone(),
            map_generation: welcome.map_generation,
            volumes: welcome.volumes.clone(),
        }
    }
}

/// What follows from a greeting.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// The stream goes on after this position.
    Resume {
        /// The durable end of the replica.
        from: Position,
    },
    /// The replica is new: everything is sent.
    Fresh,
    /// The two sides' memories disagree: everything is compared, nothing is resumed.
    ///
    /// The source starts a new term that continues the replica's position (sequences above both
    /// its ceiling and that position), takes a map generation that is not below the target's, opens a gap and
    /// compares all volumes.
    Doubt {
        /// What disagrees.
        why: Doubt,
        /// The path that the new term continues, when the source's own does not hold the replica's
        /// position: it has forgotten terms of its own.
        path: Option<Ancestry>,
    },
    /// Nothing may be sent; people must decide.
    Refuse(Refuse),
}

/// What makes the two sides' memories disagree.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Doubt {
    /// The source contradicts itself: what it calls acknowledged is not on its own path, or above
    /// its own ceiling.
    SourceContradicts,
    /// The target holds sequences that the source has not reserved yet: the source's state is from
    /// an earlier time.
    SourceBehind,
    /// The target has seen a newer generation of the dirty map: the source's state is from an
    /// earlier time.
    MapBehind,
    /// The target lacks what it once acknowledged: its state is from an earlier time, or gone.
    TargetBehind,
}

impl Doubt {
    /// A sentence for people.
    pub fn sentence(self) -> &'static str {
        match self {
            Doubt::SourceContradicts => {
                "the source's own records contradict each other, so everything is compared"
            }
            Doubt::SourceBehind | Doubt::MapBehind => {
                "the source's state is older than what the target has seen of it (was it restored \
                 from an image?), so everything is compared"
            }
            Doubt::TargetBehind => {
                "the target no longer has what it once acknowledged (was it restored from an \
                 image?), so everything is compared"
            }
        }
    }
}

/// Compares what the source says with what the target knows.
pub fn compare(hello: &Hello, target: &TargetMemory) -> Verdict {
    let facts = Facts::of(hello, target);
    match (facts.decide(), target.position) {
        (Outcome::Resume, Some(from)) => Verdict::Resume { from },
        (Outcome::Resume | Outcome::Fresh, _) => Verdict::Fresh,
        (Outcome::Doubt(why), _) => {
            let path = target.path.clone().filter(|_| !facts.new && !facts.on_path);
            Verdict::Doubt { why, path }
        }
        (Outcome::SizeMismatch, _) => Verdict::Refuse(Refuse::new(
            RefuseCode::SizeMismatch,
            size_sentence(hello, target).unwrap_or_default(),
        )),
        (Outcome::Diverged, position) => Verdict::Refuse(Refuse::new(
            RefuseCode::Diverged,
            format!(
                "the replica of group '{}' ends at {}, which is not part of the source's history: \
                 both sides have been written to. Decide which one wins: give the source a new \
                 group id to start a replica beside this one, or remove this replica at the target",
                hello.group.name,
                position.unwrap_or_default(),
            ),
        )),
    }
}

/// What a decision rests on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Facts {
    /// A volume has another size here than there.
    sizes_differ: bool,
    /// The target holds nothing yet.
    new: bool,
    /// The target's position is part of the source's history.
    on_path: bool,
    /// The path to the target's position is known.
    path_known: bool,
    /// What the source calls acknowledged is not part of its own history or above its ceiling.
    contradicts: bool,
    /// The target's position is above the source's ceiling.
    above_ceiling: bool,
    /// The target has seen a newer generation of the map.
    map_newer: bool,
    /// The target is below what the source remembers as acknowledged.
    below_acked: bool,
}

/// What the table decides.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Outcome {
    Resume,
    Fresh,
    Doubt(Doubt),
    SizeMismatch,
    Diverged,
}

/// A row's demand on one fact.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Is {
    Yes,
    No,
    Any,
}

impl Is {
    fn met_by(self, fact: bool) -> bool {
        match self {
            Is::Yes => fact,
            Is::No => !fact,
            Is::Any => true,
        }
    }
}

use Is::{Any as A, No as N, Yes as Y};

/// The decision; exactly one row fits any facts. A refusal goes before a doubt, since comparing
/// everything would not help; doubts go in the order of how much they tell people.
#[rustfmt::skip]
const TABLE: [([Is; 8], Outcome); 13] = [
    // sizes  new  on    path   contra- above    map    below
    // differ      path  known  dicts   ceiling  newer  acked
    ([Y,      A,   A,    A,     A,      A,       A,     A], Outcome::SizeMismatch),
    // A source that knows less than it once told the target has forgotten; else somebody else wrote.
    ([N,      N,   N,    Y,     A,      A,       Y,     A], Outcome::Doubt(Doubt::MapBehind)),
    ([N,      N,   N,    N,     A,      A,       Y,     A], Outcome::Diverged),
    ([N,      N,   N,    A,     A,      A,       N,     A], Outcome::Diverged),
    ([N,      N,   Y,    A,     Y,      A,       A,     A], Outcome::Doubt(Doubt::SourceContradicts)),
    ([N,      N,   Y,    A,     N,      Y,       A,     A], Outcome::Doubt(Doubt::SourceBehind)),
    ([N,      N,   Y,    A,     N,      N,       Y,     A], Outcome::Doubt(Doubt::MapBehind)),
    ([N,      N,   Y,    A,     N,      N,       N,     Y], Outcome::Doubt(Doubt::TargetBehind)),
    ([N,      N,   Y,    A,     N,      N,       N,     N], Outcome::Resume),
    // A new replica has no position, so neither its path nor the ceiling says anything.
    ([N,      Y,   A,    A,     Y,      A,       A,     A], Outcome::Doubt(Doubt::SourceContradicts)),
    ([N,      Y,   A,    A,     N,      A,       Y,     A], Outcome::Doubt(Doubt::MapBehind)),
    ([N,      Y,   A,    A,     N,      A,       N,     Y], Outcome::Doubt(Doubt::TargetBehind)),
    ([N,      Y,   A,    A,     N,      A,       N,     N], Outcome::Fresh),
];

impl Facts {
    fn of(hello: &Hello, target: &TargetMemory) -> Facts {
        let acked = hello.acked;
        let any_acked = acked.seq.0 > 0;
        let position = target.position;
        let path = target.path.as_ref();
        Facts {
            sizes_differ: size_sentence(hello, target).is_some(),
            new: position.is_none(),
            on_path: position.is_some_and(|position| hello.ancestry.contains(position)),
            path_known: position.is_some_and(|at| path.is_some_and(|path| path.contains(at))),
            contradicts: any_acked
                && (acked.seq > hello.ceiling || !hello.ancestry.contains(acked)),
            above_ceiling: position.is_some_and(|position| position.seq > hello.ceiling),
            map_newer: target.map_generation > hello.map_generation,
            // Both lie on one path here, along which sequences never go back.
            below_acked: any_acked && position.is_none_or(|position| position.seq < acked.seq),
        }
    }

    fn list(self) -> [bool; 8] {
        [
            self.sizes_differ,
            self.new,
            self.on_path,
            self.path_known,
            self.contradicts,
            self.above_ceiling,
            self.map_newer,
            self.below_acked,
        ]
    }

    fn decide(self) -> Outcome {
        let fits = |row: &&([Is; 8], Outcome)| {
            row.0.iter().zip(self.list()).all(|(is, fact)| is.met_by(fact))
        };
        TABLE.iter().find(fits).expect("a test walks every combination of facts").1
    }
}

/// Which volume has another size here than there, as a sentence.
fn size_sentence(hello: &Hello, target: &TargetMemory) -> Option<String> {
    let size = |id: VolumeId| target.volumes.iter().find(|volume| volume.id == id);
    hello.volumes.iter().find_map(|source| {
        let replica = size(source.id).filter(|replica| replica.sectors != source.sectors)?;
        Some(format!(
            "volume '{}' has {} sectors at the source and {} at the target: was another disk put \
             in its place? Protect it as a new volume",
            source.name, source.sectors, replica.sectors,
        ))
    })
}

#[cfg(test)]
mod tests;
