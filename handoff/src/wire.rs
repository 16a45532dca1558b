//! The encoding of messages between processes that pass each other descriptors. It is
//! pure: nothing here reads or writes.
//!
//! # A frame
//!
//! ```text
//!  0        4      6         7             8
//! +--------+------+---------+-------------+----------------+
//! | length | kind | version | descriptors | payload        |
//! | u32    | u16  | u8      | u8          | length bytes   |
//! +--------+------+---------+-------------+----------------+
//! ```
//!
//! All numbers are big-endian. `length` counts the payload only, and is at most
//! [`MAX_PAYLOAD`]. `version` is the version of this layout, [`FRAME_VERSION`]. The
//! version of the payloads, those of a [`Message`] set, is agreed on in the
//! [handshake](crate::channel). `descriptors` is the number of descriptors that the
//! frame owns, and is at most [`MAX_DESCRIPTORS`].
//!
//! # Which descriptors belong to which frame
//!
//! The sender attaches a frame's descriptors to the frame's first byte. [`send`] does
//! so, by [`write_with_descriptors`](UnixTransport::write_with_descriptors). The kernel
//! delivers them with the read that takes that byte. So when a frame is whole, its
//! descriptors are there. Frames
//! [claim](bowline_protocol::framing::Pairing::Claimed) them: each takes as many as it
//! says, oldest first. This is exact however the stream was cut or glued, and it needs
//! no more reads than there are bytes for. Descriptors that no frame claims break the
//! framing.
//!
//! If the kernel has no free number for a descriptor, the frame arrives without any and
//! says how many it [lost](Incoming::lost). The frames after it have theirs.
//!
//! # Message sets
//!
//! A message set is an enum that implements [`Message`]. It chooses the numbers of its
//! kinds outside of the ranges that [`kinds`] lists. Kinds below 256 are the channel's.

use std::error::Error;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::OwnedFd;

use bowline_protocol::framing::{Decoded, Framer, FramingError};
use bowline_protocol::{
    PassedDescriptor, SendDescriptorError, SendDescriptorErrorKind, UnixTransport, WriteStatus,
};

/// The version of the frame's layout.
pub const FRAME_VERSION: u8 = 1;

/// How many bytes stand before the payload.
pub const HEADER_BYTES: usize = 8;

/// The most bytes that a payload may have: 16 MiB. By default a channel accepts less
/// ([`max_payload`](crate::channel::ChannelSettings::max_payload)).
pub const MAX_PAYLOAD: usize = 16 << 20;

/// The most descriptors that a frame may own. The kernel carries no more in one
/// message.
pub const MAX_DESCRIPTORS: usize = 253;

/// The kinds of messages, by message set.
pub mod kinds {
    use std::ops::RangeInclusive;

    /// The channel itself: the handshake.
    pub const CHANNEL: RangeInclusive<u16> = 0x0000..=0x00ff;
    /// Worker pools.
    pub const POOL: RangeInclusive<u16> = 0x0100..=0x01ff;
    /// Restarts.
    pub const RESTART: RangeInclusive<u16> = 0x0200..=0x02ff;
    /// Keeping descriptors between the lives of a program.
    pub const HOLDER: RangeInclusive<u16> = 0x0300..=0x03ff;
    /// Free for programs.
    pub const PRIVATE: RangeInclusive<u16> = 0x8000..=0xffff;
}

/// A set of messages that one side sends or receives. Usually it is an enum.
///
/// # Examples
///
/// ```
/// use bowline::handoff::wire::{Message, PayloadReader, PayloadWriter, WireError};
///
/// #[derive(Debug, PartialEq)]
/// enum Question {
///     HowMany,
///     WhatIs { name: String },
/// }
///
/// impl Message for Question {
///     fn kind(&self) -> u16 {
///         match self {
///             Self::HowMany => 0x8000,
///             Self::WhatIs { .. } => 0x8001,
///         }
///     }
///
///     fn encode(&self, payload: &mut PayloadWriter<'_>) {
///         match self {
///             Self::HowMany => {}
///             Self::WhatIs { name } => payload.string(name),
///         }
///     }
///
///     fn decode(kind: u16, _: u16, payload: &mut PayloadReader<'_>) -> Result<Self, WireError> {
///         match kind {
///             0x8000 => Ok(Self::HowMany),
///             0x8001 => Ok(Self::WhatIs { name: payload.string()? }),
///             kind => Err(WireError::UnknownKind { kind }),
///         }
///     }
/// }
/// ```
pub trait Message: Sized + 'static {
    /// The number of this kind of message.
    fn kind(&self) -> u16;

    /// Appends the payload.
    fn encode(&self, payload: &mut PayloadWriter<'_>);

    /// Reads the payload of a message of this `kind`. `version` is the version of the
    /// message set, as agreed on in the handshake. Read all of the payload: bytes that
    /// are left over are an error.
    ///
    /// # Errors
    ///
    /// [`WireError::UnknownKind`], [`WireError::Malformed`], and those of the reader.
    fn decode(kind: u16, version: u16, payload: &mut PayloadReader<'_>) -> Result<Self, WireError>;
}

/// A message as it arrived, with exactly its descriptors.
#[derive(Debug)]
pub struct Incoming<M> {
    /// The message.
    pub message: M,
    /// Its descriptors, in the order in which they were sent. Dropping them closes
    /// them.
    pub descriptors: Vec<OwnedFd>,
    /// How many descriptors were lost on the way. This process had no free number for
    /// them, or a security module refused. Either all of a message's descriptors are
    /// lost or none.
    pub lost: usize,
}

/// Appends `message` as a frame that owns `descriptors` descriptors.
///
/// # Errors
///
/// [`WireError::TooLong`] and [`WireError::TooManyDescriptors`]. `out` is unchanged
/// then.
pub fn encode_frame<M: Message>(
    message: &M,
    descriptors: usize,
    out: &mut Vec<u8>,
) -> Result<(), WireError> {
    encode_frame_of(message.kind(), descriptors, out, |payload| {
        message.encode(payload);
    })
}

/// As [`encode_frame`], with a payload that is nowhere in one piece.
fn encode_frame_of(
    kind: u16,
    descriptors: usize,
    out: &mut Vec<u8>,
    encode: impl FnOnce(&mut PayloadWriter<'_>),
) -> Result<(), WireError> {
    let Some(count) = u8::try_from(descriptors)
        .ok()
        .filter(|count| usize::from(*count) <= MAX_DESCRIPTORS)
    else {
        return Err(WireError::TooManyDescriptors { count: descriptors });
    };
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&[FRAME_VERSION, count]);
    encode(&mut PayloadWriter { bytes: out });
    let length = out.len() - start - HEADER_BYTES;
    if length > MAX_PAYLOAD {
        out.truncate(start);
        return Err(WireError::TooLong {
            length,
            max: MAX_PAYLOAD,
        });
    }
    out[start..start + 4].copy_from_slice(&(length as u32).to_be_bytes());
    Ok(())
}

/// Writes one message with its descriptors to a channel's transport. In a callback
/// that is the callback's own transport, elsewhere one that you reach by its handle.
///
/// The message is taken in full or not at all. It leaves at the end of the turn. The
/// call never waits: the transport's buffer grows, and [`is_send_buffer_full`] says
/// when to stop.
///
/// [`is_send_buffer_full`]: bowline_protocol::AnyConnection::is_send_buffer_full
///
/// # Errors
///
/// [`SendError`] gives the descriptors back.
pub fn send<T, M>(
    transport: &mut T,
    message: &M,
    descriptors: Vec<PassedDescriptor>,
) -> Result<WriteStatus, SendError>
where
    T: UnixTransport + ?Sized,
    M: Message,
{
    send_of(transport, message.kind(), descriptors, |payload| {
        message.encode(payload);
    })
}

/// As [`send`], with a payload that is nowhere in one piece.
pub(crate) fn send_of<T: UnixTransport + ?Sized>(
    transport: &mut T,
    kind: u16,
    descriptors: Vec<PassedDescriptor>,
    encode: impl FnOnce(&mut PayloadWriter<'_>),
) -> Result<WriteStatus, SendError> {
    let mut frame = Vec::with_capacity(64);
    if let Err(error) = encode_frame_of(kind, descriptors.len(), &mut frame, encode) {
        return Err(SendError {
            kind: SendErrorKind::Wire(error),
            descriptors,
        });
    }
    transport
        .write_with_descriptors(&frame, descriptors)
        .map_err(|error| {
            let SendDescriptorError { kind, descriptors } = error;
            SendError {
                kind: SendErrorKind::Transport(kind),
                descriptors,
            }
        })
}

/// A message that was not sent, and why.
#[derive(Debug)]
pub struct SendError {
    /// The reason.
    pub kind: SendErrorKind,
    /// The descriptors that were to go with it, in order. Dropping them closes them.
    pub descriptors: Vec<PassedDescriptor>,
}

/// Why a message was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SendErrorKind {
    /// It does not fit into a frame.
    Wire(WireError),
    /// The transport refused it.
    Transport(SendDescriptorErrorKind),
}

impl fmt::Display for SendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            SendErrorKind::Wire(error) => write!(f, "message does not fit into a frame: {error}"),
            SendErrorKind::Transport(error) => {
                write!(f, "channel does not take the message: {error}")
            }
        }
    }
}

impl Error for SendError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match &self.kind {
            SendErrorKind::Wire(error) => Some(error),
            SendErrorKind::Transport(error) => Some(error),
        }
    }
}

/// What is wrong with a message, or with bytes that claim to be one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WireError {
    /// The set has no message of this kind.
    UnknownKind {
        /// The number of the kind.
        kind: u16,
    },
    /// The payload is too long.
    TooLong {
        /// Its length in bytes.
        length: usize,
        /// The longest that is accepted.
        max: usize,
    },
    /// More descriptors than a frame can own.
    TooManyDescriptors {
        /// How many.
        count: usize,
    },
    /// The payload ends in the middle of a value.
    Truncated,
    /// The payload goes on behind the message.
    Surplus {
        /// How many bytes too many there are.
        bytes: usize,
    },
    /// A value means nothing.
    Malformed {
        /// The value that was to be read.
        what: &'static str,
    },
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownKind { kind } => write!(f, "message of unknown kind {kind:#06x}"),
            Self::TooLong { length, max } => {
                write!(f, "payload of {length} bytes, where {max} are accepted")
            }
            Self::TooManyDescriptors { count } => {
                write!(f, "{count} descriptors are more than a frame can own")
            }
            Self::Truncated => f.write_str("payload ends inside of a value"),
            Self::Surplus { bytes } => write!(f, "{bytes} bytes behind the message"),
            Self::Malformed { what } => write!(f, "malformed {what}"),
        }
    }
}

impl Error for WireError {}

/// Cuts a stream into frames, and says how many descriptors each owns. A frame keeps
/// its header; [`kind_and_payload`] takes it apart.
#[derive(Clone, Debug)]
pub struct WireFramer {
    max_payload: usize,
}

impl WireFramer {
    /// Makes one that accepts payloads of up to `max_payload` bytes, and never more
    /// than [`MAX_PAYLOAD`].
    pub fn new(max_payload: usize) -> Self {
        Self {
            max_payload: max_payload.min(MAX_PAYLOAD),
        }
    }
}

impl Framer for WireFramer {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FramingError> {
        let Some(header) = input.first_chunk::<HEADER_BYTES>() else {
            return Ok(Decoded::NeedMore {
                at_least: HEADER_BYTES - input.len(),
            });
        };
        let [l0, l1, l2, l3, _, _, version, count] = *header;
        if version != FRAME_VERSION {
            let what = "frame of an unknown version";
            return Err(FramingError::Malformed { what });
        }
        if usize::from(count) > MAX_DESCRIPTORS {
            let limit = MAX_DESCRIPTORS;
            return Err(FramingError::TooManyDescriptors { limit });
        }
        let length = u32::from_be_bytes([l0, l1, l2, l3]);
        let end = HEADER_BYTES + length as usize;
        if length as usize > self.max_payload {
            return Err(FramingError::TooLong {
                length: Some(length.into()),
                limit: self.max_payload,
            });
        }
        Ok(if input.len() < end {
            Decoded::NeedMore {
                at_least: end - input.len(),
            }
        } else {
            Decoded::Frame {
                payload: 0..end,
                consumed: end,
            }
        })
    }

    fn claims(&self, frame: &[u8]) -> Option<usize> {
        Some(claims(frame))
    }
}

/// How many descriptors a whole frame says that it owns.
pub(crate) fn claims(frame: &[u8]) -> usize {
    frame.get(HEADER_BYTES - 1).copied().map_or(0, usize::from)
}

/// Takes a whole frame apart: the number of the message's kind, and the payload.
///
/// # Errors
///
/// [`WireError::Truncated`] if it is shorter than a header.
pub fn kind_and_payload(frame: &[u8]) -> Result<(u16, &[u8]), WireError> {
    let (header, payload) = frame
        .split_first_chunk::<HEADER_BYTES>()
        .ok_or(WireError::Truncated)?;
    Ok((u16::from_be_bytes([header[4], header[5]]), payload))
}

/// Appends the values of a payload.
#[derive(Debug)]
pub struct PayloadWriter<'a> {
    bytes: &'a mut Vec<u8>,
}

impl<'a> PayloadWriter<'a> {
    /// Makes a writer that appends to `bytes`.
    pub fn new(bytes: &'a mut Vec<u8>) -> Self {
        Self { bytes }
    }

    /// Appends a number of one byte.
    pub fn u8(&mut self, value: u8) {
        self.bytes.push(value);
    }

    /// Appends a number of two bytes.
    pub fn u16(&mut self, value: u16) {
        self.bytes.extend_from_slice(&value.to_be_bytes());
    }

    /// Appends a number of four bytes.
    pub fn u32(&mut self, value: u32) {
        self.bytes.extend_from_slice(&value.to_be_bytes());
    }

    /// Appends a number of eight bytes.
    pub fn u64(&mut self, value: u64) {
        self.bytes.extend_from_slice(&value.to_be_bytes());
    }

    /// Appends a length in four bytes, and the bytes. (Any frame is short enough for
    /// such a length.)
    pub fn bytes(&mut self, value: &[u8]) {
        self.u32(u32::try_from(value.len()).unwrap_or(u32::MAX));
        self.bytes.extend_from_slice(value);
    }

    /// Appends text, in the form of its bytes.
    pub fn string(&mut self, value: &str) {
        self.bytes(value.as_bytes());
    }

    /// Appends the address of an internet peer, or says that there is none.
    pub fn socket_address(&mut self, value: Option<SocketAddr>) {
        match value {
            None => self.u8(0),
            Some(SocketAddr::V4(address)) => {
                self.u8(4);
                self.bytes.extend_from_slice(&address.ip().octets());
                self.u16(address.port());
            }
            Some(SocketAddr::V6(address)) => {
                self.u8(6);
                self.bytes.extend_from_slice(&address.ip().octets());
                self.u16(address.port());
                self.u32(address.flowinfo());
                self.u32(address.scope_id());
            }
        }
    }
}

/// Reads the values of a payload, in the order in which they were written.
#[derive(Debug)]
pub struct PayloadReader<'a> {
    rest: &'a [u8],
}

impl<'a> PayloadReader<'a> {
    /// Makes a reader that begins at the start of `payload`.
    pub fn new(payload: &'a [u8]) -> Self {
        Self { rest: payload }
    }

    /// Reads a number of one byte.
    ///
    /// # Errors
    ///
    /// [`WireError::Truncated`], as for all values.
    pub fn u8(&mut self) -> Result<u8, WireError> {
        self.array().map(u8::from_be_bytes)
    }

    /// Reads a number of two bytes.
    ///
    /// # Errors
    ///
    /// As [`u8`](Self::u8).
    pub fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_be_bytes)
    }

    /// Reads a number of four bytes.
    ///
    /// # Errors
    ///
    /// As [`u8`](Self::u8).
    pub fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_be_bytes)
    }

    /// Reads a number of eight bytes.
    ///
    /// # Errors
    ///
    /// As [`u8`](Self::u8).
    pub fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_be_bytes)
    }

    /// Reads a length and as many bytes.
    ///
    /// # Errors
    ///
    /// As [`u8`](Self::u8).
    pub fn bytes(&mut self) -> Result<&'a [u8], WireError> {
        let length = self.u32()? as usize;
        let (bytes, rest) = self
            .rest
            .split_at_checked(length)
            .ok_or(WireError::Truncated)?;
        self.rest = rest;
        Ok(bytes)
    }

    /// Reads text.
    ///
    /// # Errors
    ///
    /// As [`u8`](Self::u8); [`WireError::Malformed`] if it is not UTF-8.
    pub fn string(&mut self) -> Result<String, WireError> {
        let text = std::str::from_utf8(self.bytes()?);
        text.map(str::to_owned)
            .map_err(|_| WireError::Malformed { what: "text" })
    }

    /// Reads the address of an internet peer, or `None`.
    ///
    /// # Errors
    ///
    /// As [`u8`](Self::u8); [`WireError::Malformed`] for an unknown family.
    pub fn socket_address(&mut self) -> Result<Option<SocketAddr>, WireError> {
        match self.u8()? {
            0 => Ok(None),
            4 => {
                let ip = IpAddr::V4(Ipv4Addr::from(self.array::<4>()?));
                Ok(Some(SocketAddr::new(ip, self.u16()?)))
            }
            6 => {
                let ip = Ipv6Addr::from(self.array::<16>()?);
                let port = self.u16()?;
                let flow = self.u32()?;
                let scope = self.u32()?;
                Ok(Some(SocketAddrV6::new(ip, port, flow, scope).into()))
            }
            _ => Err(WireError::Malformed { what: "address" }),
        }
    }

    /// Reads the rest.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// Ends reading. Nothing may be left.
    ///
    /// # Errors
    ///
    /// [`WireError::Surplus`].
    pub fn finish(self) -> Result<(), WireError> {
        match self.rest.len() {
            0 => Ok(()),
            bytes => Err(WireError::Surplus { bytes }),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (array, rest) = self
            .rest
            .split_first_chunk::<N>()
            .ok_or(WireError::Truncated)?;
        self.rest = rest;
        Ok(*array)
    }
}

/// Reads one whole payload.
///
/// # Errors
///
/// Those of [`Message::decode`], and [`WireError::Surplus`].
pub fn decode_payload<M: Message>(kind: u16, version: u16, payload: &[u8]) -> Result<M, WireError> {
    let mut reader = PayloadReader::new(payload);
    let message = M::decode(kind, version, &mut reader)?;
    reader.finish()?;
    Ok(message)
}

#[cfg(test)]
mod tests;
