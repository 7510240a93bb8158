//! The names of exports: `GROUP/VOLUME@POINT`.
//!
//! | after the `@` | is |
//! |---|---|
//! | `latest` | the newest position that can be recovered |
//! | `seq:N` | the state after the record of sequence N |
//! | `mark:NAME` | the newest mark of that name |
//! | `branch:NAME` | a writable branch |
//! | a time such as `2026-11-23T09:59:30Z` | the state at that moment of the source's clock |

use std::fmt;

use jiff::Timestamp;
use tidemark_journal::Seq;

/// What an export's or a point's name says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PointName {
    /// The group.
    pub group: String,
    /// The volume; none means all of the group's.
    pub volume: Option<String>,
    /// Which point.
    pub spec: Spec,
}

/// What stands after the `@`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Spec {
    /// The newest position.
    Latest,
    /// A sequence.
    Seq(Seq),
    /// A mark.
    Mark(String),
    /// A branch.
    Branch(String),
    /// A moment of the source's clock, nanoseconds since 1970.
    Time(i64),
}

const FORMS: &str = "@latest, @seq:N, @mark:NAME, @branch:NAME or a time such as \
                     @2026-11-23T09:59:30Z";

impl PointName {
    /// Reads a name.
    ///
    /// # Errors
    /// A sentence that says what a name looks like.
    pub fn parse(text: &str) -> Result<PointName, String> {
        let Some((place, spec)) = text.split_once('@') else {
            return Err(format!("'{text}' names no point: add {FORMS}"));
        };
        let (group, volume) = match place.split_once('/') {
            Some((group, volume)) => (group, Some(volume.to_owned())),
            None => (place, None),
        };
        if group.is_empty() || volume.as_ref().is_some_and(String::is_empty) {
            return Err(format!("'{text}' is not of the form GROUP/VOLUME@POINT"));
        }
        Ok(PointName { group: group.to_owned(), volume, spec: Spec::parse(spec)? })
    }
}

impl Spec {
    /// Reads what stands after the `@`.
    ///
    /// # Errors
    /// A sentence that says what may stand there.
    pub fn parse(text: &str) -> Result<Spec, String> {
        let bad = || format!("'@{text}' is not a point: use {FORMS}");
        if text == "latest" {
            return Ok(Spec::Latest);
        }
        match text.split_once(':') {
            Some(("seq", number)) => number.parse().map(|n| Spec::Seq(Seq(n))).map_err(|_| bad()),
            Some(("mark", name)) if !name.is_empty() => Ok(Spec::Mark(name.to_owned())),
            Some(("branch", name)) if !name.is_empty() => Ok(Spec::Branch(name.to_owned())),
            _ => {
                let time: Timestamp = text.parse().map_err(|_| bad())?;
                i64::try_from(time.as_nanosecond()).map(Spec::Time).map_err(|_| bad())
            }
        }
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Spec::Latest => f.write_str("latest"),
            Spec::Seq(seq) => write!(f, "seq:{seq}"),
            Spec::Mark(name) => write!(f, "mark:{name}"),
            Spec::Branch(name) => write!(f, "branch:{name}"),
            Spec::Time(wall_ns) => f.write_str(&crate::clock::format_wall(*wall_ns)),
        }
    }
}

impl fmt::Display for PointName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.volume {
            Some(volume) => write!(f, "{}/{volume}@{}", self.group, self.spec),
            None => write!(f, "{}@{}", self.group, self.spec),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written() {
        for text in [
            "shop/root@latest",
            "shop/root@seq:42",
            "shop@mark:before the upgrade",
            "shop/root@branch:test",
            "shop/root@2026-11-23T09:59:30Z",
            "shop/root@2026-11-23T09:59:30.25Z",
        ] {
            let name = PointName::parse(text).expect(text);
            assert_eq!(name.to_string(), text);
        }
        let offset = PointName::parse("a/b@2026-11-23T10:59:30+01:00").expect("an offset");
        assert_eq!(offset.to_string(), "a/b@2026-11-23T09:59:30Z");
    }

    #[test]
    fn what_is_no_name_is_refused_with_what_is() {
        for text in [
            "",
            "shop",
            "shop/root",
            "@latest",
            "shop/@latest",
            "a/b@seq:x",
            "a/b@mark:",
            "a/b@yesterday",
            "a/b@2026-11-23T09:59:30",
        ] {
            let sentence = PointName::parse(text).expect_err(text);
            assert!(sentence.contains('@'), "{sentence}");
        }
    }
}
