//! The one error type of the library: a code for the C ABI and a sentence for people.

use std::fmt;

/// What went wrong; `code` is what the C ABI returns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    pub code: i32,
    pub message: String,
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub const INVALID_ARGUMENT: i32 = -1;
    pub const INVALID_DATA: i32 = -2;
    pub const UNSUPPORTED: i32 = -3;
    /// Out of memory or out of KV-cache blocks.
    pub const EXHAUSTED: i32 = -4;
    pub const IO: i32 = -5;
    pub const BAD_HANDLE: i32 = -6;
    /// A sequence was asked to continue from a position it has not reached.
    pub const SEQUENCE_GAP: i32 = -7;
    pub const STOPPED: i32 = -8;
    /// A connection is not there any more, or cannot be made.
    pub const LOST: i32 = -9;
    pub const PANIC: i32 = -99;

    pub fn new(code: i32, message: impl Into<String>) -> Self {
        Error { code, message: message.into() }
    }

    pub fn argument(message: impl Into<String>) -> Self {
        Self::new(Self::INVALID_ARGUMENT, message)
    }

    pub fn data(message: impl Into<String>) -> Self {
        Self::new(Self::INVALID_DATA, message)
    }

    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(Self::UNSUPPORTED, message)
    }

    pub fn exhausted(message: impl Into<String>) -> Self {
        Self::new(Self::EXHAUSTED, message)
    }

    /// The same error with a leading "where: ", for instance the name of a tensor.
    pub fn within(mut self, place: &str) -> Self {
        self.message = format!("{place}: {}", self.message);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (code {})", self.message, self.code)
    }
}

impl std::error::Error for Error {}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        Self::new(Self::IO, error.to_string())
    }
}
