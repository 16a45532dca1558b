//! What a message says, and where it ends; pure.

use bowline::framing::{Decoded, EncodeError, Envelope, FrameEncoder, Framer, FramingError};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// The longest message in bytes, as in sd-varlink: 16 MiB.
pub const LONGEST_MESSAGE: usize = 16 * 1_024 * 1_024;

/// How many descriptors a message may have: the limit of sd-varlink and of the kernel.
pub(super) const MOST_DESCRIPTORS: usize = 253;

/// Finds and encodes messages, each of which ends with a zero byte. The frame is the
/// message without its zero.
#[derive(Clone, Debug)]
pub struct VarlinkFramer {
    longest: usize,
    /// How far the input was searched for a zero, without finding one.
    searched: usize,
}

impl VarlinkFramer {
    /// Makes a framer for messages of at most 16 MiB.
    pub fn new() -> Self {
        Self {
            longest: LONGEST_MESSAGE,
            searched: 0,
        }
    }

    /// Sets how many bytes a message may have, without its zero; default 16 MiB.
    #[must_use]
    pub fn with_max_length(mut self, bytes: usize) -> Self {
        self.longest = bytes;
        self
    }
}

impl Default for VarlinkFramer {
    fn default() -> Self {
        Self::new()
    }
}

impl Framer for VarlinkFramer {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FramingError> {
        let behind = &input[self.searched..];
        let found = behind.iter().position(|it| *it == 0);
        let end = found.map(|at| self.searched + at);
        if end.unwrap_or(input.len()) > self.longest {
            return Err(FramingError::TooLong {
                length: None,
                limit: self.longest,
            });
        }
        self.searched = match end {
            Some(_) => 0,
            None => input.len(),
        };
        Ok(match end {
            None => Decoded::NeedMore { at_least: 1 },
            Some(end) => Decoded::Frame {
                payload: 0..end,
                consumed: end + 1,
            },
        })
    }

    fn reset(&mut self) {
        self.searched = 0;
    }
}

impl FrameEncoder for VarlinkFramer {
    type Header = ();

    fn envelope(&self, (): &(), payload: &[u8], _: usize) -> Result<Envelope<'_>, EncodeError> {
        if payload.contains(&0) {
            return Err(EncodeError::ContainsDelimiter);
        }
        if payload.len() > self.longest {
            return Err(EncodeError::TooLong {
                length: payload.len(),
                limit: self.longest as u64,
            });
        }
        Ok(Envelope::new(b"", b"\0"))
    }

    fn max_descriptors(&self) -> usize {
        MOST_DESCRIPTORS
    }
}

/// A call of a method.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[non_exhaustive]
pub struct VarlinkCall<'a> {
    /// The interface and the method: `org.example.ftl.Jump`. It contains no escapes.
    #[serde(borrow)]
    pub method: &'a str,
    /// The arguments, as JSON. `None` is the same as an empty object.
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<&'a RawValue>,
    /// The caller wants no answer, and none may be sent.
    #[serde(default, skip_serializing_if = "is_false")]
    pub oneway: bool,
    /// The caller accepts several answers.
    #[serde(default, skip_serializing_if = "is_false")]
    pub more: bool,
    /// After the answer, the connection no longer speaks varlink.
    #[serde(default, skip_serializing_if = "is_false")]
    pub upgrade: bool,
}

impl<'a> VarlinkCall<'a> {
    /// Makes a call with one answer.
    pub fn new(method: &'a str) -> Self {
        Self {
            method,
            parameters: None,
            oneway: false,
            more: false,
            upgrade: false,
        }
    }

    /// Returns the same call with these arguments.
    #[must_use]
    pub fn parameters(mut self, parameters: &'a RawValue) -> Self {
        self.parameters = Some(parameters);
        self
    }

    /// Parses a message.
    ///
    /// # Errors
    ///
    /// It is not a call.
    pub fn parse(message: &'a [u8]) -> Result<Self, FramingError> {
        parse(message, "a call that is none")
    }

    /// Deserialises the arguments.
    ///
    /// # Errors
    ///
    /// They are of another type.
    pub fn arguments<A: Deserialize<'a>>(&self) -> serde_json::Result<A> {
        serde_json::from_str(self.parameters.map_or("{}", RawValue::get))
    }

    pub(super) fn wants_reply(&self) -> bool {
        !self.oneway
    }
}

/// An answer to a call.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct VarlinkReply<'a> {
    /// The name of an error: `org.varlink.service.MethodNotFound`. It contains no escapes.
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    pub error: Option<&'a str>,
    /// The results, or the details of the error, as JSON. `None` is the same as an empty
    /// object.
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<&'a RawValue>,
    /// More answers to this call follow.
    #[serde(default, skip_serializing_if = "is_false")]
    pub continues: bool,
}

impl<'a> VarlinkReply<'a> {
    /// Parses a message.
    ///
    /// # Errors
    ///
    /// It is not an answer, or contains an unknown field; sd-varlink is as strict.
    pub fn parse(message: &'a [u8]) -> Result<Self, FramingError> {
        parse(message, "an answer that is none")
    }

    /// Deserialises the results.
    ///
    /// # Errors
    ///
    /// They are of another type.
    pub fn results<A: Deserialize<'a>>(&self) -> serde_json::Result<A> {
        serde_json::from_str(self.parameters.map_or("{}", RawValue::get))
    }
}

/// Parses a JSON object. serde_json would accept an array as well.
fn parse<'a, M: Deserialize<'a>>(message: &'a [u8], what: &'static str) -> Result<M, FramingError> {
    let malformed = FramingError::Malformed { what };
    match message.trim_ascii_start().first() {
        Some(b'{') => serde_json::from_slice(message).map_err(|_| malformed),
        _ => Err(malformed),
    }
}

fn is_false(it: &bool) -> bool {
    !it
}

#[cfg(test)]
mod tests {
    use bowline::framing::FrameBuffer;

    use super::*;

    #[test]
    fn messages_are_found_wherever_they_are_cut() {
        let bytes = b"{}\0{\"method\":\"a.b.C\"}\0\0[1";
        for size in 1..bytes.len() {
            let mut buffer = FrameBuffer::new(VarlinkFramer::new());
            let mut found = Vec::new();
            for mut piece in bytes.chunks(size) {
                while let Some(message) = buffer.next_frame(&mut piece).unwrap() {
                    found.push(message.to_vec());
                }
            }
            assert_eq!(
                found,
                [&b"{}"[..], b"{\"method\":\"a.b.C\"}", b""],
                "{size}"
            );
        }
    }

    #[test]
    fn message_of_the_limit_is_taken_and_one_byte_more_is_not() {
        let framer = || VarlinkFramer::new().with_max_length(3);
        let mut buffer = FrameBuffer::new(framer());
        assert_eq!(buffer.next_frame(&mut &b"abc\0"[..]), Ok(Some(&b"abc"[..])));
        assert!(buffer.next_frame(&mut &b"abcd"[..]).is_err());
        let mut out = Vec::new();
        assert_eq!(framer().encode(&(), b"abc", 0, &mut out), Ok(()));
        assert_eq!(out, b"abc\0");
        assert!(framer().encode(&(), b"abcd", 0, &mut out).is_err());
        assert!(framer().encode(&(), b"a\0c", 0, &mut out).is_err());
        assert!(framer().encode(&(), b"abc", 254, &mut out).is_err());
        assert_eq!(out, b"abc\0");
    }

    #[test]
    fn calls_and_answers_say_what_they_say() {
        let call =
            VarlinkCall::parse(br#"{"method":"a.b.C","parameters":{"n":7},"more":true,"x":1}"#);
        let call = call.unwrap();
        assert_eq!(
            (call.method, call.more, call.oneway),
            ("a.b.C", true, false)
        );
        #[derive(Deserialize)]
        struct Arguments {
            n: u32,
        }
        assert_eq!(call.arguments::<Arguments>().unwrap().n, 7);
        let text = serde_json::to_string(&VarlinkCall::new("a.b.C")).unwrap();
        assert_eq!(text, r#"{"method":"a.b.C"}"#);
        let reply = VarlinkReply::parse(br#"{"error":"a.b.No","parameters":{}}"#).unwrap();
        assert_eq!((reply.error, reply.continues), (Some("a.b.No"), false));
        for none in [&b"[]"[..], b"{", b"{}", br#"{"method":1}"#] {
            assert!(VarlinkCall::parse(none).is_err());
        }
        for none in [&b"[]"[..], b"{", br#"{"parameters":{},"x":1}"#] {
            assert!(VarlinkReply::parse(none).is_err());
        }
    }
}
