//! What is wrong with an endpoint string, and where.

use std::error::Error;
use std::fmt;
use std::io;

/// Why a string is not a valid endpoint, or why the endpoint could not be used.
///
/// `{}` shows one line. `{:#}` shows the string too, with a mark under the place of the
/// error:
///
/// ```
/// let error = "tcp:http".parse::<bowline::endpoint::ServerEndpoint>().unwrap_err();
/// assert_eq!(format!("{error:#}"), "\
/// \"http\" is no port, which is a number up to 65535, at column 5:
///   tcp:http
///       ^^^^");
/// ```
#[derive(Debug)]
pub struct EndpointError {
    what: String,
    place: Option<Place>,
    source: Option<io::Error>,
}

/// A part of a string.
#[derive(Debug)]
struct Place {
    text: String,
    /// In bytes, from the start.
    start: usize,
    end: usize,
}

impl EndpointError {
    pub(super) fn at(text: &str, start: usize, end: usize, what: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            place: Some(Place {
                text: text.to_owned(),
                start,
                end,
            }),
            source: None,
        }
    }

    /// Returns the place of the error in the string, in bytes. `None` if the string is
    /// valid, and the system refused the endpoint.
    pub fn place(&self) -> Option<std::ops::Range<usize>> {
        let place = self.place.as_ref()?;
        Some(place.start..place.end)
    }
}

impl From<io::Error> for EndpointError {
    fn from(error: io::Error) -> Self {
        Self {
            what: error.to_string(),
            place: None,
            source: Some(error),
        }
    }
}

impl fmt::Display for EndpointError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        let Some(Place { text, start, end }) = &self.place else {
            return Ok(());
        };
        let before = text[..*start].chars().count();
        write!(f, ", at column {}", before + 1)?;
        if f.alternate() {
            let marks = "^".repeat(text[*start..*end].chars().count().max(1));
            write!(f, ":\n  {text}\n  {:before$}{marks}", "")?;
        }
        Ok(())
    }
}

impl Error for EndpointError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        let source = self.source.as_ref()?;
        source.source()
    }
}
