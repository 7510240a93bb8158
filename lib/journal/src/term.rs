//! Terms and the tree they form.
//!
//! A term is a stretch of history by one writer. It continues its parent: its past is what the
//! parent's path holds up to and including `fork_seq`, and its own records come after. A source
//! that lost its ring starts a new term at the ceiling of the sequences it had reserved, so
//! `fork_seq` may lie above the last record that anybody kept; what lies between never left the
//! source and is covered by the gap with which such a term begins. A branch forks from a point, so
//! parent records above its `fork_seq` are another path's.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use crate::ids::{Position, Seq, TermId};

/// The most terms in an [`Ancestry`]; older ones are dropped from its start.
pub const ANCESTRY_MAX: usize = 256;

/// A stretch of history by one writer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Term {
    /// Its id.
    pub id: TermId,
    /// The term it continues; nil for the first of a group.
    pub parent: TermId,
    /// The parent's last sequence that is part of its past. Its own records are above.
    pub fork_seq: Seq,
}

impl Term {
    /// The first term of a group.
    pub fn root(id: TermId) -> Term {
        Term { id, parent: TermId::default(), fork_seq: Seq::ZERO }
    }
}

/// A path of the tree: each term is the parent of the one after it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "Vec<Term>", into = "Vec<Term>")]
pub struct Ancestry(Vec<Term>);

/// A list of terms that is no path.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the terms do not follow from each other")]
pub struct NotAPath;

impl TryFrom<Vec<Term>> for Ancestry {
    type Error = NotAPath;

    fn try_from(terms: Vec<Term>) -> Result<Ancestry, NotAPath> {
        let follows =
            |pair: &[Term]| pair[1].parent == pair[0].id && pair[1].fork_seq >= pair[0].fork_seq;
        let bounded = (1..=ANCESTRY_MAX).contains(&terms.len());
        let ids: HashSet<_> = terms.iter().map(|term| term.id).collect();
        if !bounded
            || ids.len() < terms.len()
            || !terms.windows(2).all(follows)
            || terms.iter().any(|t| t.id.is_nil())
        {
            return Err(NotAPath);
        }
        Ok(Ancestry(terms))
    }
}

impl From<Ancestry> for Vec<Term> {
    fn from(ancestry: Ancestry) -> Vec<Term> {
        ancestry.0
    }
}

impl Ancestry {
    /// The path of a group's first term.
    pub fn root(id: TermId) -> Ancestry {
        Ancestry(vec![Term::root(id)])
    }

    /// Continues the path with a new term after `fork_seq`.
    ///
    /// # Errors
    /// [`NotAPath`] when `fork_seq` lies before the current term's own fork.
    pub fn fork(&self, id: TermId, fork_seq: Seq) -> Result<Ancestry, NotAPath> {
        let mut terms = self.0.clone();
        terms.push(Term { id, parent: self.current().id, fork_seq });
        if terms.len() > ANCESTRY_MAX {
            terms.remove(0);
        }
        terms.try_into()
    }

    /// The newest term, whose records are being written.
    pub fn current(&self) -> &Term {
        self.0.last().expect("an ancestry holds at least one term")
    }

    /// The terms from the oldest to the newest.
    pub fn terms(&self) -> &[Term] {
        &self.0
    }

    /// The position that a sequence has on this path: in the newest term that begins at it or below.
    /// A sequence below the path's start has the start's.
    pub fn at(&self, seq: Seq) -> Position {
        let term = self.0.iter().rfind(|term| term.fork_seq <= seq).unwrap_or(&self.0[0]);
        Position { term: term.id, seq: seq.max(term.fork_seq) }
    }

    /// Whether the position lies on this path: its term is here, and its sequence is not above the
    /// place where the path left that term.
    pub fn contains(&self, position: Position) -> bool {
        let Some(index) = self.0.iter().position(|term| term.id == position.term) else {
            return false;
        };
        position.seq >= self.0[index].fork_seq
            && self.0.get(index + 1).is_none_or(|next| position.seq <= next.fork_seq)
    }

    /// The path as far as the position's term; none if the position does not lie on it.
    pub fn until(&self, position: Position) -> Option<Ancestry> {
        let on_it = self.contains(position);
        let last = self.0.iter().position(|term| term.id == position.term).filter(|_| on_it)?;
        Some(Ancestry(self.0[..=last].to_vec()))
    }

    /// Whether a frame whose header names `before` may follow the durable position `at`, both on
    /// this path. Inside one term it must continue exactly; the first frame of a term names the end
    /// of its parent, and follows whatever part of the parent's path has been kept.
    pub fn continues(&self, at: Position, before: Position) -> bool {
        if at == before {
            return true;
        }
        let index = |id| self.0.iter().position(|term| term.id == id);
        let (Some(have), Some(term)) = (index(at.term), index(before.term)) else { return false };
        // `before` must be the very end of its term on this path: the first frame of a new term.
        let ends = self.0.get(term + 1).is_some_and(|next| next.fork_seq == before.seq);
        ends && self.contains(at) && (have < term || (have == term && at.seq <= before.seq))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u8) -> TermId {
        TermId([n; 16])
    }

    fn at(n: u8, seq: u64) -> Position {
        Position { term: id(n), seq: Seq(seq) }
    }

    #[test]
    fn a_path_knows_its_positions() {
        let path =
            Ancestry::root(id(1)).fork(id(2), Seq(100)).unwrap().fork(id(3), Seq(250)).unwrap();
        assert!(path.contains(at(1, 0)) && path.contains(at(1, 100)) && path.contains(at(2, 100)));
        assert!(!path.contains(at(1, 101)), "the path left term 1 at 100");
        assert!(!path.contains(at(2, 99)) && !path.contains(at(4, 0)));
        assert!(path.contains(at(3, u64::MAX)));
        assert_eq!(path.until(at(3, 250)).as_ref(), Some(&path));
        assert_eq!(path.until(at(1, 100)), Some(Ancestry::root(id(1))));
        assert_eq!((path.until(at(1, 101)), path.until(at(4, 0))), (None, None));
        assert_eq!(
            [0, 99, 100, 249, 250].map(|seq| path.at(Seq(seq))),
            [at(1, 0), at(1, 99), at(2, 100), at(2, 249), at(3, 250)]
        );
        assert_eq!(
            Ancestry::root(id(1)).fork(id(2), Seq(5)).unwrap().fork(id(3), Seq(4)),
            Err(NotAPath)
        );
    }

    #[test]
    fn frames_continue_exactly_or_open_a_term() {
        let path =
            Ancestry::root(id(1)).fork(id(2), Seq(100)).unwrap().fork(id(3), Seq(250)).unwrap();
        assert!(path.continues(at(3, 300), at(3, 300)));
        assert!(!path.continues(at(3, 300), at(3, 301)) && !path.continues(at(3, 301), at(3, 300)));
        // Term 2 opens with "before = 1:100"; the target may have kept less of term 1.
        assert!(path.continues(at(1, 100), at(1, 100)) && path.continues(at(1, 70), at(1, 100)));
        // Term 3 opens with "before = 2:250" and follows term 1 too when all of term 2 was lost.
        assert!(path.continues(at(1, 70), at(2, 250)));
        assert!(!path.continues(at(1, 70), at(1, 99)), "99 is not where term 1 ended");
        assert!(!path.continues(at(3, 260), at(2, 250)), "the target already has part of term 3");
        assert!(!path.continues(at(1, 101), at(2, 250)), "101 is another path's");
    }

    #[test]
    fn json_refuses_what_is_no_path() {
        let good = serde_json_like(&[(1, 0, 0), (2, 1, 9)]);
        assert!(Ancestry::try_from(good).is_ok());
        assert!(Ancestry::try_from(serde_json_like(&[(1, 0, 0), (3, 2, 9)])).is_err());
        assert!(Ancestry::try_from(Vec::new()).is_err());
        let around = serde_json_like(&[(1, 0, 0), (2, 1, 9), (1, 2, 9)]);
        assert!(Ancestry::try_from(around).is_err(), "a term that is its own past");
    }

    fn serde_json_like(rows: &[(u8, u8, u64)]) -> Vec<Term> {
        rows.iter()
            .map(|&(term, parent, fork)| Term {
                id: id(term),
                parent: id(parent),
                fork_seq: Seq(fork),
            })
            .collect()
    }
}
