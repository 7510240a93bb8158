//! Words for people, JSON for programs, and exit codes.

use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;

use serde::Serialize;
use tidemark_control::{Answer, ApiError, ClientError, ErrorCode};

/// Wrongly asked.
pub const USAGE: u8 = 2;

/// How to answer.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    json: bool,
}

/// The command makes no sense as it was given.
#[derive(Debug)]
pub struct Usage(pub String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

impl Output {
    /// In JSON, or in words.
    pub fn new(json: bool) -> Output {
        Output { json }
    }

    /// Whether JSON is wanted.
    pub fn is_json(self) -> bool {
        self.json
    }

    /// Prints an answer: as one line of JSON with the schema version, or as what `words` says.
    ///
    /// # Errors
    /// Standard output cannot be written.
    pub fn answer<T: Serialize>(self, body: &T, words: impl FnOnce() -> String) -> io::Result<()> {
        let text = if self.json {
            let mut line = serde_json::to_string(&Answer::new(body))?;
            line.push('\n');
            line
        } else {
            words()
        };
        print(&text)
    }

    /// Says why it failed, and the exit code for it.
    pub fn failure(self, error: &anyhow::Error) -> ExitCode {
        if error.chain().any(|cause| {
            cause.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
        }) {
            // Whoever read has seen enough.
            return ExitCode::SUCCESS;
        }
        let usage = error.is::<Usage>();
        let sentence = sentence(error);
        // If standard error is gone too, the exit code says it.
        let _ = writeln!(io::stderr(), "tidemark: {sentence}");
        if self.json {
            let code = match error.downcast_ref::<ClientError>() {
                Some(ClientError::Api(error)) => error.code,
                Some(ClientError::NotRunning { .. } | ClientError::TimedOut { .. }) => {
                    ErrorCode::Unavailable
                }
                _ if usage => ErrorCode::BadRequest,
                _ => ErrorCode::Internal,
            };
            if let Ok(line) = serde_json::to_string(&ApiError::new(code, sentence)) {
                let _ = print(&format!("{line}\n"));
            }
        }
        if usage { USAGE.into() } else { ExitCode::FAILURE }
    }
}

/// An error and its causes, but for those whose words are there already.
fn sentence(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |told, cause| {
        if told.is_empty() {
            cause
        } else if told.contains(&cause) {
            told
        } else {
            format!("{told}: {cause}")
        }
    })
}

/// Prints text to standard output.
///
/// # Errors
/// It cannot be written.
pub fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        let cause = io::Error::other("no such host");
        let error = anyhow::Error::new(cause).context("cannot connect: no such host");
        assert_eq!(sentence(&error), "cannot connect: no such host");
        let error = anyhow::Error::new(io::Error::other("full")).context("cannot write x");
        assert_eq!(sentence(&error), "cannot write x: full");
    }
}
