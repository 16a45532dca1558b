//! Lines of JSON, and what they mean to Node; pure.

use std::borrow::Cow;

use bowline::framing::{
    Decoded, EncodeError, Envelope, FrameEncoder, Framer, FramingError, LineFramer,
};
use serde::Deserialize;
use serde_json::value::RawValue;

/// Finds messages, which are lines, in the bytes, and encodes them.
///
/// It does not say how many descriptors a line has. A line whose descriptor is missing does
/// not break the framing; it is answered with a refusal.
#[derive(Clone, Debug)]
pub struct NodeFramer {
    lines: LineFramer,
}

impl NodeFramer {
    /// The default [limit](Self::with_max_length) in bytes.
    pub const MAX_LENGTH: usize = 64 << 20;

    /// Makes a framer with the default limit.
    pub fn new() -> Self {
        let lines = LineFramer::with_delimiter(b"\n".as_slice());
        Self {
            lines: lines.with_max_length(Self::MAX_LENGTH),
        }
    }

    /// Sets how many bytes a received message may have; default 64 MiB.
    #[must_use]
    pub fn with_max_length(self, max_length: usize) -> Self {
        Self {
            lines: self.lines.with_max_length(max_length),
        }
    }
}

impl Default for NodeFramer {
    fn default() -> Self {
        Self::new()
    }
}

impl Framer for NodeFramer {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FramingError> {
        self.lines.decode(input)
    }

    fn reset(&mut self) {
        self.lines.reset();
    }
}

impl FrameEncoder for NodeFramer {
    type Header = ();

    /// Refuses a message that contains a line feed.
    fn envelope(
        &self,
        _: &(),
        payload: &[u8],
        descriptors: usize,
    ) -> Result<Envelope<'_>, EncodeError> {
        self.lines.envelope(&(), payload, descriptors)
    }

    /// 1. If Node is sent two, all later descriptors are assigned to the wrong messages.
    fn max_descriptors(&self) -> usize {
        1
    }
}

/// What a line is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line<'a> {
    /// A message of the program.
    Message,
    /// A message of the program with a descriptor.
    Handle {
        kind: Cow<'a, str>,
        /// Only for `net.Socket`: the key by which the sender counts connections.
        key: Option<Cow<'a, str>>,
        /// Only for `dgram.Socket`: `udp4` or `udp6`.
        datagrams: Option<Cow<'a, str>>,
        message: &'a str,
    },
    Acknowledged,
    Refused,
    /// Any other internal message of Node.
    Internal,
}

/// The parts of a message that Node looks at.
#[derive(Deserialize)]
struct Parts<'a> {
    #[serde(borrow)]
    cmd: Option<Cow<'a, str>>,
    #[serde(borrow, rename = "type")]
    kind: Option<Cow<'a, str>>,
    #[serde(borrow)]
    key: Option<Cow<'a, str>>,
    #[serde(borrow, rename = "dgramType")]
    datagrams: Option<Cow<'a, str>>,
    #[serde(borrow)]
    msg: Option<&'a RawValue>,
}

/// What the command of an internal message begins with.
const INTERNAL: &str = "NODE_";

impl<'a> Line<'a> {
    /// Reads a line. Only a line that could be an internal message is parsed, so only of
    /// such a line it is known whether it is JSON.
    pub(super) fn of(line: &'a str) -> Result<Self, FramingError> {
        // Whatever is escaped in it: Node itself compares the parsed text, but no Node
        // writes it so.
        if !line.contains(INTERNAL) {
            return Ok(Line::Message);
        }
        let Ok(parts) = serde_json::from_str::<Parts<'a>>(line) else {
            // The program's own, in which these keys mean something else.
            return match serde_json::from_str::<serde::de::IgnoredAny>(line) {
                Ok(_) => Ok(Line::Message),
                Err(_) => Err(malformed("message that is no JSON")),
            };
        };
        Ok(match parts.cmd.as_deref() {
            Some("NODE_HANDLE_ACK") => Line::Acknowledged,
            Some("NODE_HANDLE_NACK") => Line::Refused,
            Some("NODE_HANDLE") => Line::Handle {
                kind: parts
                    .kind
                    .ok_or_else(|| malformed("handle without a type"))?,
                key: parts.key,
                datagrams: parts.datagrams,
                message: parts.msg.map_or("null", RawValue::get),
            },
            Some(cmd) if cmd.starts_with(INTERNAL) => Line::Internal,
            _ => Line::Message,
        })
    }
}

fn malformed(what: &'static str) -> FramingError {
    FramingError::Malformed { what }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_is_what_node_takes_it_for() {
        for message in [
            "1",
            r#""NODE_HANDLE""#,
            r#"{"cmd":"node_handle"}"#,
            r#"{"a":{"cmd":"NODE_HANDLE"}}"#,
            r#"{"cmd":7,"also":"NODE_HANDLE"}"#,
            r#"["cmd","NODE_HANDLE"]"#,
            "no JSON, which its reader finds out",
        ] {
            assert_eq!(Line::of(message), Ok(Line::Message), "{message}");
        }
        for (line, expected) in [
            (r#"{"cmd":"NODE_HANDLE_ACK"}"#, Line::Acknowledged),
            (r#"{"cmd":"NODE_HANDLE_NACK"}"#, Line::Refused),
            (r#"{"seq":1,"cmd":"NODE_CLUSTER"}"#, Line::Internal),
            (
                r#"{"cmd":"NODE_HANDLE","type":"net.Socket","msg":{"a":[1, 2]},"key":"k"}"#,
                Line::Handle {
                    kind: "net.Socket".into(),
                    key: Some("k".into()),
                    datagrams: None,
                    message: r#"{"a":[1, 2]}"#,
                },
            ),
            (
                r#"{"msg":null,"dgramType":"udp4","type":"dgram.Socket","cmd":"NODE_HANDLE"}"#,
                Line::Handle {
                    kind: "dgram.Socket".into(),
                    key: None,
                    datagrams: Some("udp4".into()),
                    message: "null",
                },
            ),
        ] {
            assert_eq!(Line::of(line), Ok(expected), "{line}");
        }
        for broken in [r#"{"cmd":"NODE_HANDLE""#, r#"{"cmd":"NODE_HANDLE"}"#] {
            assert!(Line::of(broken).is_err(), "{broken}");
        }
    }
}
