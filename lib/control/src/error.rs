//! The one shape of a failure on the local API.

use serde::{Deserialize, Serialize};

use crate::SCHEMA;

/// Why a request failed: `{"schema": 1, "code": "not_found", "error": "a sentence"}`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{error}")]
pub struct ApiError {
    /// [`SCHEMA`] of who answers.
    pub schema: u32,
    /// For programs.
    pub code: ErrorCode,
    /// For people: what is wrong and what to do.
    pub error: String,
}

/// The kinds of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request makes no sense.
    BadRequest,
    /// What it names does not exist.
    NotFound,
    /// It contradicts the present state: a name is taken, a point lies inside a gap.
    Conflict,
    /// It would work at another time: not started yet, no link, no room.
    Unavailable,
    /// The daemon failed, or answers with a code that this version does not know.
    #[serde(other)]
    Internal,
}

impl ErrorCode {
    /// The HTTP status that goes with it.
    pub fn status(self) -> u16 {
        match self {
            ErrorCode::BadRequest => 400,
            ErrorCode::NotFound => 404,
            ErrorCode::Conflict => 409,
            ErrorCode::Unavailable => 503,
            ErrorCode::Internal => 500,
        }
    }
}

impl ApiError {
    /// A failure with its sentence.
    pub fn new(code: ErrorCode, sentence: impl Into<String>) -> ApiError {
        ApiError { schema: SCHEMA, code, error: sentence.into() }
    }

    /// The request makes no sense.
    pub fn bad_request(sentence: impl Into<String>) -> ApiError {
        ApiError::new(ErrorCode::BadRequest, sentence)
    }

    /// What it names does not exist.
    pub fn not_found(sentence: impl Into<String>) -> ApiError {
        ApiError::new(ErrorCode::NotFound, sentence)
    }

    /// It contradicts the present state.
    pub fn conflict(sentence: impl Into<String>) -> ApiError {
        ApiError::new(ErrorCode::Conflict, sentence)
    }

    /// It would work at another time.
    pub fn unavailable(sentence: impl Into<String>) -> ApiError {
        ApiError::new(ErrorCode::Unavailable, sentence)
    }

    /// The daemon failed.
    pub fn internal(sentence: impl Into<String>) -> ApiError {
        ApiError::new(ErrorCode::Internal, sentence)
    }
}
