//! Reading TOML configuration, with errors that show the line.
//!
//! Types derive `Deserialize` with `deny_unknown_fields`. What is wrong is told with the file, the
//! line and the line's text, and for an unknown key with the key that was probably meant:
//!
//! ```text
//! /etc/tidemark/agent.d/db.toml, line 3: unknown key 'ring_byte'; did you mean 'ring_bytes'?
//!     3 | ring_byte = 1
//!       | ^^^^^^^^^
//! ```
//!
//! A field that needs more than its type says is a newtype with `TryFrom`, so that its complaint
//! points at the line too; [`Source::fault`] does the same for a [`toml::Spanned`] value.

use std::fmt;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

mod name;
mod suggest;
mod units;

pub use name::{Name, NameError};
pub use units::{Bytes, Seconds, UnitError};

/// The longest file that is read.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Something in it is wrong.
    #[error("{}{}", path.display(), Rest(sentence, place.as_ref()))]
    Content {
        /// The file.
        path: PathBuf,
        /// The line concerned, where there is one.
        place: Option<Place>,
        /// What is wrong.
        sentence: String,
    },
}

impl ConfigError {
    /// A complaint about a file as a whole.
    pub fn file(path: &Path, sentence: impl Into<String>) -> ConfigError {
        ConfigError::Content { path: path.to_owned(), place: None, sentence: sentence.into() }
    }

    /// Whether what was to be read is not there at all.
    pub fn is_missing(&self) -> bool {
        matches!(self, ConfigError::Read { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// A part of a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Counted from 1.
    pub line: usize,
    /// In characters, counted from 0.
    pub column: usize,
    /// Characters concerned, at least 1.
    pub width: usize,
    /// The line's text.
    pub text: String,
}

struct Rest<'a>(&'a str, Option<&'a Place>);

impl fmt::Display for Rest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Rest(sentence, Some(place)) = self else { return write!(f, ": {}", self.0) };
        let number = place.line.to_string();
        let margin = number.len();
        writeln!(f, ", line {number}: {sentence}")?;
        writeln!(f, "    {number} | {}", place.text)?;
        write!(f, "    {:margin$} | {:column$}", "", "", column = place.column)?;
        (0..place.width).try_for_each(|_| f.write_str("^"))
    }
}

/// A file's text, for reading and for complaints.
#[derive(Clone, Debug)]
pub struct Source {
    path: PathBuf,
    text: String,
}

impl Source {
    /// Reads a file.
    ///
    /// # Errors
    /// [`ConfigError::Read`].
    pub fn read(path: &Path) -> Result<Source, ConfigError> {
        let fail = |source| ConfigError::Read { path: path.to_owned(), source };
        if fs::metadata(path).map_err(fail)?.len() > FILE_BYTES_MAX {
            return Err(fail(io::Error::other("it is longer than 1 MiB: not a configuration")));
        }
        Ok(Source::new(path, fs::read_to_string(path).map_err(fail)?))
    }

    /// A text that stands for a file.
    pub fn new(path: &Path, text: impl Into<String>) -> Source {
        Source { path: path.to_owned(), text: text.into() }
    }

    /// Where it comes from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its values.
    ///
    /// # Errors
    /// [`ConfigError::Content`] with the line.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, ConfigError> {
        toml::from_str(&self.text).map_err(|error| {
            let sentence = suggest::improve(error.message());
            match error.span() {
                Some(span) => self.fault(span, sentence),
                None => ConfigError::file(&self.path, sentence),
            }
        })
    }

    /// A complaint about the bytes `span` of the text.
    pub fn fault(&self, span: Range<usize>, sentence: impl Into<String>) -> ConfigError {
        ConfigError::Content {
            path: self.path.clone(),
            place: Some(self.place(span)),
            sentence: sentence.into(),
        }
    }

    fn place(&self, span: Range<usize>) -> Place {
        // A span may start at a line's end (a missing value) or beyond the text.
        let at = |offset: usize| {
            let mut offset = offset.min(self.text.len());
            while !self.text.is_char_boundary(offset) {
                offset -= 1;
            }
            offset
        };
        let (start, end) = (at(span.start), at(span.end));
        let before = self.text.get(..start).unwrap_or_default();
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let rest = self.text.get(line_start..).unwrap_or_default();
        let text = rest.lines().next().unwrap_or_default();
        let column = self.text.get(line_start..start).unwrap_or_default().chars().count();
        let chosen = self.text.get(start..end).unwrap_or_default();
        let width = chosen.lines().next().unwrap_or_default().chars().count().max(1);
        Place {
            line: before.matches('\n').count() + 1,
            column,
            width,
            text: text.replace('\t', " "),
        }
    }
}

/// The files `*.toml` of a directory, in the order of their names.
///
/// # Errors
/// [`ConfigError::Read`], also if there is no directory ([`ConfigError::is_missing`]).
pub fn files_in(directory: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let fail = |source| ConfigError::Read { path: directory.to_owned(), source };
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if path.extension().is_some_and(|extension| extension == "toml") && !hidden {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests;
