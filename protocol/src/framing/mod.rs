//! Messages in a stream of bytes.
//!
//! A [`Framer`] says where frames begin and end, and does nothing else: it is
//! a pure value that is shown bytes. There are three, [`LineFramer`],
//! [`NetstringFramer`] and [`LengthPrefixedFramer`], and others are written in
//! a few lines. Around one of them,
//!
//! - [`Framed`] is a whole [`Protocol`](crate::Protocol): it calls a
//!   [`FrameReceiver`], your code, once for each frame;
//! - [`FrameBuffer`] is the part of that which needs no connection: bytes in,
//!   frames out.
//!
//! A frame that arrives in one piece is never copied: the receiver sees it in
//! the reactor's read buffer. An idle connection owns no buffer.
//!
//! # What is promised for each frame
//!
//! The state of the connection is looked at before each frame. One that is
//! paused keeps what is left and goes on with it when reading is resumed; one
//! that closes, or was aborted, delivers nothing more. No frame is delivered
//! twice, and framing may be switched off and on, limits changed and the rest
//! taken away from inside any callback, as often as one likes: nothing recurs.
//!
//! # Examples
//!
//! A line protocol that reads a body of as many bytes as a line said:
//!
//! ```
//! use bowline_protocol::framing::{FrameContext, FrameReceiver, Framed, LineFramer};
//! use bowline_protocol::{Address, Factory, Transport};
//!
//! struct Mailbox {
//!     body: Vec<u8>,
//! }
//!
//! impl<T: Transport> FrameReceiver<T, LineFramer> for Mailbox {
//!     fn frame_received(&mut self, cx: &mut FrameContext<'_, T, LineFramer>, line: &[u8]) {
//!         if line == b"QUIT" {
//!             cx.transport.lose_connection(); // no line behind this one is delivered
//!         } else if let Some(length) = parse_put(line) {
//!             self.body.clear();
//!             cx.framing.set_raw_mode_for(length);
//!         } else if cx.send_frame(b"what?").is_err() {
//!             unreachable!("there is no CR LF in it");
//!         }
//!     }
//!
//!     fn raw_data_received(&mut self, cx: &mut FrameContext<'_, T, LineFramer>, data: &[u8]) {
//!         self.body.extend_from_slice(data);
//!         if !cx.framing.is_raw_mode() {
//!             cx.transport.write(b"stored\r\n"); // that was the last of it
//!         }
//!     }
//! }
//!
//! fn parse_put(line: &[u8]) -> Option<u64> {
//!     str::from_utf8(line).ok()?.strip_prefix("PUT ")?.parse().ok()
//! }
//!
//! /// For `listen_tcp`, `listen_unix` and the like.
//! fn factory<T: Transport>() -> impl Factory<T> {
//!     |_: &Address| Framed::new(LineFramer::new(), Mailbox { body: Vec::new() })
//! }
//! # fn check<T: Transport>() { let _ = factory::<T>(); }
//! ```
//!
//! Requests behind their length, each together with exactly its descriptors:
//!
//! ```
//! use std::os::fd::OwnedFd;
//!
//! use bowline_protocol::framing::{
//!     FrameContext, FrameReceiver, Framed, FramingError, LengthPrefixedFramer, SendFrameError,
//! };
//! use bowline_protocol::{Protocol, ReceivedDescriptors, UnixTransport};
//!
//! type Cx<'a, T> = FrameContext<'a, T, LengthPrefixedFramer>;
//!
//! #[derive(Default)]
//! struct Keeper {
//!     kept: Vec<OwnedFd>,
//! }
//!
//! impl<T: UnixTransport> FrameReceiver<T, LengthPrefixedFramer> for Keeper {
//!     /// A request without descriptors.
//!     fn frame_received(&mut self, cx: &mut Cx<'_, T>, request: &[u8]) {
//!         if request == b"give back" && self.give_back(cx).is_err() {
//!             cx.transport.abort_connection();
//!         }
//!     }
//!
//!     /// A request with some.
//!     fn frame_with_descriptors(
//!         &mut self,
//!         _: &mut Cx<'_, T>,
//!         request: &[u8],
//!         descriptors: &mut ReceivedDescriptors<'_>,
//!     ) {
//!         if request == b"keep" {
//!             self.kept.extend(descriptors); // what is not taken is closed
//!         }
//!     }
//! }
//!
//! impl Keeper {
//!     fn give_back<T: UnixTransport>(&mut self, cx: &mut Cx<'_, T>) -> Result<(), SendFrameError> {
//!         let descriptors = self.kept.drain(..).map(Into::into).collect();
//!         cx.send_frame_with_descriptors(b"here", descriptors)?;
//!         Ok(())
//!     }
//! }
//!
//! fn build<T: UnixTransport>() -> impl Protocol<T> {
//!     let framer = LengthPrefixedFramer::u32().with_max_length(4096);
//!     Framed::with_descriptors(framer, Keeper::default()).max_descriptors(4)
//! }
//! # fn check<T: UnixTransport>() { let _ = build::<T>(); }
//! ```

use std::fmt;
use std::ops::Range;

use crate::transport::{Transport, WriteStatus};

mod buffer;
mod error;
mod framed;
mod length_prefixed;
mod line;
mod netstring;
mod receiver;

pub use self::buffer::FrameBuffer;
pub use self::error::{EncodeError, FramingError, SendFrameError, SendFrameErrorKind};
pub use self::framed::Framed;
pub use self::length_prefixed::LengthPrefixedFramer;
pub use self::line::LineFramer;
pub use self::netstring::NetstringFramer;
pub use self::receiver::{FrameContext, FrameReceiver, Framing};

/// Says where frames begin and end.
///
/// A framer finds frames in bytes and does not change them: the payload is a
/// part of the input.
///
/// # Examples
///
/// Records of a fixed length:
///
/// ```
/// use bowline_protocol::framing::{Decoded, FrameBuffer, Framer, FramingError};
///
/// struct Records(usize);
///
/// impl Framer for Records {
///     fn decode(&mut self, input: &[u8]) -> Result<Decoded, FramingError> {
///         Ok(if input.len() < self.0 {
///             Decoded::NeedMore { at_least: self.0 - input.len() }
///         } else {
///             Decoded::Frame { payload: 0..self.0, consumed: self.0 }
///         })
///     }
/// }
///
/// let mut buffer = FrameBuffer::new(Records(3));
/// let mut input = &b"abcdefg"[..];
/// assert_eq!(buffer.next_frame(&mut input)?, Some(&b"abc"[..]));
/// assert_eq!(buffer.next_frame(&mut input)?, Some(&b"def"[..]));
/// assert_eq!(buffer.next_frame(&mut input)?, None);
/// # Ok::<(), FramingError>(())
/// ```
pub trait Framer: 'static {
    /// Looks for a frame at the beginning of `input`: all bytes that were
    /// received and belong to no frame yet.
    ///
    /// After [`Decoded::NeedMore`] it is called again with the same bytes and
    /// more behind them, so that it may remember how far it has looked. After
    /// anything else, and after [`reset`](Self::reset), the next input is
    /// another. What it decides must depend on the bytes only, not on how they
    /// were cut.
    ///
    /// # Errors
    ///
    /// The peer broke the framing; nothing more of this stream is decoded.
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FramingError>;

    /// Forgets what it remembers of the bytes it was shown: those that come
    /// next do not continue them.
    fn reset(&mut self) {}
}

/// What a [`Framer`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decoded {
    /// A frame.
    Frame {
        /// Where in the input the payload is; within the first `consumed`
        /// bytes.
        payload: Range<usize>,
        /// How many bytes the frame takes, all that surrounds the payload
        /// included; at least 1.
        consumed: usize,
    },
    /// No whole frame yet.
    NeedMore {
        /// The frame cannot end before this many further bytes; at least 1.
        /// Reading no more than these never passes its end, which is what
        /// keeps [descriptors](Framed::with_descriptors) with their frame. A
        /// framer that does not know says 1.
        at_least: usize,
    },
}

/// Makes frames of payloads.
pub trait FrameEncoder {
    /// What to put before and behind `payload`.
    ///
    /// # Errors
    ///
    /// The payload does not fit the format.
    fn envelope(&self, payload: &[u8]) -> Result<Envelope<'_>, EncodeError>;

    /// Appends a frame with `payload` to `out`.
    ///
    /// # Errors
    ///
    /// As [`envelope`](Self::envelope); nothing is appended then.
    fn encode(&self, payload: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let envelope = self.envelope(payload)?;
        let length = envelope.head().len() + payload.len() + envelope.tail().len();
        out.reserve(length);
        out.extend_from_slice(envelope.head());
        out.extend_from_slice(payload);
        out.extend_from_slice(envelope.tail());
        Ok(())
    }

    /// Writes a frame with `payload` to any transport, as one write and without
    /// putting it together first.
    ///
    /// # Errors
    ///
    /// As [`envelope`](Self::envelope); nothing is written then.
    fn send_to<T: Transport + ?Sized>(
        &self,
        transport: &mut T,
        payload: &[u8],
    ) -> Result<WriteStatus, EncodeError>
    where
        Self: Sized,
    {
        let envelope = self.envelope(payload)?;
        Ok(transport.write_sequence(&[envelope.head(), payload, envelope.tail()]))
    }
}

/// What surrounds a payload to make it a frame.
#[derive(Clone, Copy)]
pub struct Envelope<'a> {
    head: [u8; MAX_HEAD],
    head_length: u8,
    tail: &'a [u8],
}

impl<'a> Envelope<'a> {
    /// How long a head may be, in bytes: longer than the longest netstring's.
    pub const MAX_HEAD: usize = MAX_HEAD;

    /// `head` before the payload, `tail` behind it.
    ///
    /// # Panics
    ///
    /// When `head` is longer than [`MAX_HEAD`](Self::MAX_HEAD).
    #[track_caller]
    pub fn new(head: &[u8], tail: &'a [u8]) -> Self {
        assert!(head.len() <= Self::MAX_HEAD, "head of a frame is too long");
        let mut envelope = Self {
            head: [0; MAX_HEAD],
            head_length: head.len() as u8,
            tail,
        };
        envelope.head[..head.len()].copy_from_slice(head);
        envelope
    }

    /// What comes before the payload.
    pub fn head(&self) -> &[u8] {
        &self.head[..self.head_length.into()]
    }

    /// What comes behind the payload.
    pub fn tail(&self) -> &'a [u8] {
        self.tail
    }
}

impl fmt::Debug for Envelope<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Envelope")
            .field("head", &self.head().escape_ascii().to_string())
            .field("tail", &self.tail.escape_ascii().to_string())
            .finish()
    }
}

const MAX_HEAD: usize = 30;

/// Forwards to what is inside the box; a `Box<dyn Framer>` can be replaced by
/// a framer of another type.
impl<F: Framer + ?Sized> Framer for Box<F> {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FramingError> {
        (**self).decode(input)
    }

    fn reset(&mut self) {
        (**self).reset();
    }
}

#[cfg(test)]
mod test_support;
