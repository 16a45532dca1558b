//! Messages in a stream of bytes.
//!
//! A [`Framer`] says where frames begin and end, and does nothing else. It is a pure
//! value that is shown bytes. There are three: [`LineFramer`], [`NetstringFramer`] and
//! [`LengthPrefixedFramer`]. Others are written in a few lines. Around a framer,
//!
//! - [`Framed`] is a whole [`Protocol`](crate::Protocol): it calls your code, a
//!   [`FrameReceiver`], once for each frame;
//! - [`FrameBuffer`] is the same without a connection: bytes in, frames out.
//!
//! [`Questions`] keeps what waits for an answer, where a protocol asks and answers.
//!
//! A frame that arrives in one piece is never copied: the receiver sees it in
//! the reactor's read buffer. An idle connection owns no buffer.
//!
//! # What is promised for each frame
//!
//! Before each frame the state of the connection is checked. A paused connection keeps
//! the rest and goes on with it when reading is resumed. A connection that closes, or
//! was aborted, delivers nothing more. No frame is delivered twice.
//!
//! Any callback may switch framing off and on, change limits and take the rest away, as
//! often as it likes. Callbacks still never nest.
//!
//! # Examples
//!
//! A line protocol that reads a body of as many bytes as a line said:
//!
//! ```
//! use bowline::framing::{FrameContext, FrameReceiver, Framed, LineFramer};
//! use bowline::{Address, Factory, Transport};
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
//! fn factory() -> impl Factory<Protocol = Framed<LineFramer, Mailbox>> {
//!     |_: &Address| Framed::new(LineFramer::new(), Mailbox { body: Vec::new() })
//! }
//! # let _ = factory();
//! ```
//!
//! Requests behind their length, each together with exactly its descriptors:
//!
//! ```
//! use std::os::fd::OwnedFd;
//!
//! use bowline::framing::{
//!     FrameContext, FrameReceiver, Framed, LengthPrefixedFramer, Pairing,
//!     SendFrameError,
//! };
//! use bowline::{Protocol, UnixTransport};
//!
//! type Cx<'a, T> = FrameContext<'a, T, LengthPrefixedFramer>;
//!
//! #[derive(Default)]
//! struct Keeper {
//!     kept: Vec<OwnedFd>,
//! }
//!
//! impl<T: UnixTransport> FrameReceiver<T, LengthPrefixedFramer> for Keeper {
//!     fn frame_received(&mut self, cx: &mut Cx<'_, T>, request: &[u8]) {
//!         if request == b"keep" {
//!             self.kept.extend(cx.framing.descriptors()); // what is not taken is closed
//!         } else if request == b"give back" && self.give_back(cx).is_err() {
//!             cx.transport.abort_connection();
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
//!     let framed = Framed::new(framer, Keeper::default());
//!     framed.pairing(Pairing::Exact).max_descriptors(4)
//! }
//! # fn check<T: UnixTransport>() { let _ = build::<T>(); }
//! ```
//!
//! # Which descriptors belong to a frame
//!
//! On Linux, descriptors come with the first byte of the call that sent them. A read
//! that brings some can begin with bytes that were sent earlier. It ends behind the
//! bytes of that call (unix(7)). What a peer *means* is another matter. There are four
//! rules, with a [`Pairing`] for each.
//!
//! | rule | a frame has | reads | who does it |
//! |---|---|---|---|
//! | [`Loose`](Pairing::Loose) | none: each is told as it arrives | not limited | console sockets of OCI runtimes |
//! | [`Exact`](Pairing::Exact) | those sent with its own bytes | two or more for each frame | vhost-user, zbus |
//! | [`Claimed`](Pairing::Claimed) | as many as it says, oldest first | not limited | D-Bus, Wayland, imsg (tmux up to 3.5), HAProxy's `_getsocks`, Node's IPC, the channels of bowline's pools and restarts |
//! | [`ByLastByte`](Pairing::ByLastByte) | those that came with the read that ends in it | not limited | varlink, dbus-broker, imsg of OpenBSD since 2025 (tmux from 3.6 on) |
//!
//! To be understood by all of them, send each frame in one call, with its descriptors on
//! its first byte:
//! [`send_frame_with_descriptors`](FrameContext::send_frame_with_descriptors).
//! With `send_file_descriptor` it is open which byte a descriptor travels with. That is
//! as good where frames *claim* their descriptors.
//!
//! If a frame says how many it has, take *claimed*. It costs nothing, and pairs
//! correctly whatever the peer lumps together. Take it for lines, too: *exact* needs a
//! read for every byte or two of a line. A transfer that takes 15 reads otherwise took
//! 661 that way.
//!
//! | bound | default | holds for |
//! |---|---|---|
//! | [`max_descriptors`](Framed::max_descriptors) of a frame | 16 | all rules but loose; not if the receiver claims |
//! | [`max_waiting`](Framed::max_waiting): wait for a frame to claim them | 64 | claimed |
//! | [`descriptor_deadline`](Framed::descriptor_deadline) to find their frame | 30 s | all rules but loose |
//! | `DescriptorLimits::unclaimed`: closed because nobody took them | 64 | all rules |
//!
//! The rule can be changed at any time, even in the middle of the bytes of one read. The
//! new rule holds from the next frame on. Values that a frame carries beside its payload
//! are its encoder's [header](FrameEncoder::Header).
//!
//! # Examples
//!
//! A message has a kind, a flag that says whether it owns a descriptor, and a
//! length; several of them can leave in one call:
//!
//! ```
//! use bowline::framing::{
//!     Decoded, EncodeError, Envelope, FrameContext, FrameEncoder, FrameReceiver, Framed,
//!     Framer, FramingError, Pairing, Unclaimed,
//! };
//! use bowline::{Protocol, UnixTransport};
//!
//! /// One byte each: kind, flag, length of the payload.
//! struct Messages;
//!
//! impl Framer for Messages {
//!     fn decode(&mut self, input: &[u8]) -> Result<Decoded, FramingError> {
//!         let end = match input {
//!             [_, 0..=1, length, ..] => 3 + usize::from(*length),
//!             [_, _, ..] if input[1] > 1 => {
//!                 return Err(FramingError::Malformed { what: "flag" });
//!             }
//!             _ => 3,
//!         };
//!         Ok(if input.len() < end {
//!             Decoded::NeedMore { at_least: end - input.len() }
//!         } else {
//!             // With its header, which the receiver wants to see.
//!             Decoded::Frame { payload: 0..end, consumed: end }
//!         })
//!     }
//!
//!     fn claims(&self, frame: &[u8]) -> Option<usize> {
//!         Some(frame[1].into())
//!     }
//! }
//!
//! impl FrameEncoder for Messages {
//!     /// The kind.
//!     type Header = u8;
//!
//!     fn envelope(
//!         &self,
//!         kind: &u8,
//!         payload: &[u8],
//!         descriptors: usize,
//!     ) -> Result<Envelope<'_>, EncodeError> {
//!         let length = payload.len();
//!         let too_long = EncodeError::TooLong { length, limit: 255 };
//!         let length = u8::try_from(length).map_err(|_| too_long)?;
//!         Ok(Envelope::new(&[*kind, descriptors as u8, length], b""))
//!     }
//!
//!     fn max_descriptors(&self) -> usize {
//!         1
//!     }
//! }
//!
//! struct Mirror;
//!
//! impl<T: UnixTransport> FrameReceiver<T, Messages> for Mirror {
//!     fn frame_received(&mut self, cx: &mut FrameContext<'_, T, Messages>, message: &[u8]) {
//!         let [kind, _, _, payload @ ..] = message else { return };
//!         let back = cx.framing.descriptors().map(Into::into).collect();
//!         if cx.send_frame_of_with_descriptors(kind, payload, back).is_err() {
//!             cx.transport.abort_connection();
//!         }
//!     }
//! }
//!
//! fn build<T: UnixTransport>() -> impl Protocol<T> {
//!     Framed::new(Messages, Mirror).pairing(Pairing::Claimed(Unclaimed::Fail))
//! }
//! # fn check<T: UnixTransport>() { let _ = build::<T>(); }
//! ```

use std::fmt;
use std::ops::Range;

use crate::descriptors::PassedDescriptor;
use crate::error::SendDescriptorError;
use crate::transport::{Transport, UnixTransport, WriteStatus};

mod buffer;
mod error;
mod framed;
mod length_prefixed;
mod line;
mod netstring;
mod pairing;
mod questions;
mod receiver;

pub use self::buffer::FrameBuffer;
pub use self::error::{EncodeError, FramingError, SendFrameError, SendFrameErrorKind};
pub use self::framed::Framed;
pub use self::length_prefixed::LengthPrefixedFramer;
pub use self::line::LineFramer;
pub use self::netstring::NetstringFramer;
pub use self::pairing::{FrameDescriptors, Pairing, Unclaimed};
pub use self::questions::Questions;
pub use self::receiver::{FrameContext, FrameReceiver, Framing};

/// Says where frames begin and end.
///
/// A framer finds frames in bytes and does not change the bytes: the payload is a part
/// of the input.
///
/// # Examples
///
/// Records of a fixed length:
///
/// ```
/// use bowline::framing::{Decoded, FrameBuffer, Framer, FramingError};
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
    /// Looks for a frame at the beginning of `input`. `input` is all bytes that were
    /// received and belong to no frame yet.
    ///
    /// After [`Decoded::NeedMore`] it is called again with the same bytes and more
    /// behind them, so it may remember how far it has looked. After any other answer,
    /// and after [`reset`](Self::reset), the next input is a new one. The answer must
    /// depend on the bytes only, not on how they were cut.
    ///
    /// # Errors
    ///
    /// The peer broke the framing. Nothing more of this stream is decoded.
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FramingError>;

    /// Forgets everything it remembers of the bytes it was shown. The next bytes do not
    /// continue them.
    fn reset(&mut self) {}

    /// How many descriptors `frame` says that it owns. Asked with [`Pairing::Claimed`]
    /// only, once for each frame, when it is whole. `frame` includes the bytes around
    /// the payload.
    ///
    /// The default says `None`: the receiver knows, and
    /// [takes](Framing::descriptors) them.
    fn claims(&self, frame: &[u8]) -> Option<usize> {
        let _ = frame;
        None
    }
}

/// What a [`Framer`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decoded {
    /// A frame.
    Frame {
        /// Where in the input the payload is. It lies within the first `consumed` bytes.
        payload: Range<usize>,
        /// How many bytes the frame takes, including those around the payload; at least
        /// 1.
        consumed: usize,
    },
    /// No whole frame yet.
    NeedMore {
        /// The frame cannot end before this many further bytes; at least 1. A framer that
        /// does not know says 1. A read of this many bytes never passes the end of the
        /// frame: [`Pairing::Exact`] relies on that.
        at_least: usize,
    },
}

/// Makes frames out of payloads.
pub trait FrameEncoder {
    /// The values that a frame carries beside its payload and the number of its
    /// descriptors: a kind, a number, flags. `()` if there are none.
    type Header: ?Sized;

    /// The bytes to put before and behind `payload`, in a frame with this header that is
    /// sent with so many descriptors.
    ///
    /// # Errors
    ///
    /// The header or the payload does not fit the format.
    fn envelope(
        &self,
        header: &Self::Header,
        payload: &[u8],
        descriptors: usize,
    ) -> Result<Envelope<'_>, EncodeError>;

    /// How many descriptors one frame may own. More are refused before anything is sent.
    ///
    /// It should be as many as the peers of this protocol take from one message: 28 for a
    /// Wayland library, for example. The default is 253, as many as the kernel takes.
    fn max_descriptors(&self) -> usize {
        MAX_DESCRIPTORS
    }

    /// Appends a frame with `payload`, sent with so many descriptors, to `out`.
    ///
    /// # Errors
    ///
    /// As [`envelope`](Self::envelope), or there are more descriptors than
    /// [one frame may own](Self::max_descriptors). Nothing is appended then.
    fn encode(
        &self,
        header: &Self::Header,
        payload: &[u8],
        descriptors: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        let limit = self.max_descriptors();
        if descriptors > limit {
            let count = descriptors;
            return Err(EncodeError::TooManyDescriptors { count, limit });
        }
        let envelope = self.envelope(header, payload, descriptors)?;
        let length = envelope.head().len() + payload.len() + envelope.tail().len();
        out.reserve(length);
        out.extend_from_slice(envelope.head());
        out.extend_from_slice(payload);
        out.extend_from_slice(envelope.tail());
        Ok(())
    }

    /// Writes a frame with `payload` to any transport. It is one write, and the frame is
    /// not put together first.
    ///
    /// # Errors
    ///
    /// As [`envelope`](Self::envelope). Nothing is written then.
    fn send_to<T: Transport + ?Sized>(
        &self,
        transport: &mut T,
        header: &Self::Header,
        payload: &[u8],
    ) -> Result<WriteStatus, EncodeError>
    where
        Self: Sized,
    {
        let envelope = self.envelope(header, payload, 0)?;
        Ok(transport.write_sequence(&[envelope.head(), payload, envelope.tail()]))
    }

    /// Writes a frame with `payload` and these descriptors as one message. The
    /// descriptors are attached to its first byte; see
    /// [`UnixTransport::write_with_descriptors`].
    ///
    /// # Errors
    ///
    /// As [`encode`](Self::encode), or the transport refuses. Nothing is sent then, and
    /// the descriptors come back in the error.
    fn send_with_descriptors_to<T: UnixTransport + ?Sized>(
        &self,
        transport: &mut T,
        header: &Self::Header,
        payload: &[u8],
        descriptors: Vec<PassedDescriptor>,
    ) -> Result<WriteStatus, SendFrameError>
    where
        Self: Sized,
    {
        let mut frame = Vec::new();
        if let Err(error) = self.encode(header, payload, descriptors.len(), &mut frame) {
            return Err(SendFrameError {
                kind: SendFrameErrorKind::Encode(error),
                descriptors,
            });
        }
        transport
            .write_with_descriptors(&frame, descriptors)
            .map_err(|SendDescriptorError { kind, descriptors }| SendFrameError {
                kind: SendFrameErrorKind::Transport(kind),
                descriptors,
            })
    }
}

/// The bytes around a payload that make it a frame.
#[derive(Clone)]
pub struct Envelope<'a> {
    head: Head,
    tail: &'a [u8],
}

#[derive(Clone)]
enum Head {
    Short { bytes: [u8; MAX_HEAD], length: u8 },
    Long(Vec<u8>),
}

impl<'a> Envelope<'a> {
    /// How many bytes a head may have to be kept without an allocation. More than the
    /// longest netstring needs.
    pub const MAX_HEAD: usize = MAX_HEAD;

    /// Puts `head` before the payload and `tail` behind it.
    pub fn new(head: &[u8], tail: &'a [u8]) -> Self {
        let mut bytes = [0; MAX_HEAD];
        let head = match bytes.get_mut(..head.len()) {
            None => Head::Long(head.to_vec()),
            Some(place) => {
                place.copy_from_slice(head);
                let length = head.len() as u8;
                Head::Short { bytes, length }
            }
        };
        Self { head, tail }
    }

    /// The bytes before the payload.
    pub fn head(&self) -> &[u8] {
        match &self.head {
            Head::Short { bytes, length } => &bytes[..usize::from(*length)],
            Head::Long(bytes) => bytes,
        }
    }

    /// The bytes behind the payload.
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

/// What the kernel carries in one message.
const MAX_DESCRIPTORS: usize = 253;

/// Forwards to the framer inside the box. A `Box<dyn Framer>` can be replaced by a
/// framer of another type.
impl<F: Framer + ?Sized> Framer for Box<F> {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FramingError> {
        (**self).decode(input)
    }

    fn reset(&mut self) {
        (**self).reset();
    }

    fn claims(&self, frame: &[u8]) -> Option<usize> {
        (**self).claims(frame)
    }
}

#[cfg(test)]
mod test_support;
