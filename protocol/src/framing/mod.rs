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
//!     FrameContext, FrameReceiver, Framed, LengthPrefixedFramer, Pairing, SendFrameError,
//! };
//! use bowline_protocol::{Protocol, UnixTransport};
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
//! On Linux descriptors come with the first byte of the call that sent them. A
//! read that brings some can begin with bytes that were sent earlier, and ends
//! behind that call's (unix(7)). What a peer *means* is another matter: there
//! are four rules, a [`Pairing`] for each.
//!
//! | rule | a frame has | reads | who does it |
//! |---|---|---|---|
//! | [`Loose`](Pairing::Loose) | none: each is told as it comes | as large as they come | console sockets of OCI runtimes |
//! | [`Exact`](Pairing::Exact) | those sent with its own bytes | two or more for each frame | vhost-user, zbus |
//! | [`Claimed`](Pairing::Claimed) | as many as it says, oldest first | as large as they come | D-Bus, Wayland, imsg (tmux up to 3.5), HAProxy's `_getsocks`, Node's IPC, the channels of bowline's pools and restarts |
//! | [`ByLastByte`](Pairing::ByLastByte) | those that came with the read that ends in it | as large as they come | varlink, dbus-broker, imsg of OpenBSD since 2025 (tmux from 3.6 on) |
//!
//! To be understood by all of them, send each frame by one call with its
//! descriptors on its first byte:
//! [`send_frame_with_descriptors`](FrameContext::send_frame_with_descriptors).
//! `send_file_descriptor` leaves open with which byte one travels; where frames
//! *claim* theirs that is as good.
//!
//! Where a frame says how many it has, take *claimed*: it costs nothing, and
//! pairs whatever the peer lumps together. It is also the way for lines: to keep
//! lines *exact* takes a read for every byte or two, 661 of them for what takes
//! 15 otherwise.
//!
//! | bound | default | holds for |
//! |---|---|---|
//! | [`max_descriptors`](Framed::max_descriptors) of a frame | 16 | all rules but loose; not where the receiver claims |
//! | [`max_waiting`](Framed::max_waiting) for frames to claim them | 64 | claimed |
//! | [`descriptor_deadline`](Framed::descriptor_deadline) to find their frame | 30 s | all rules but loose |
//! | `DescriptorLimits::unclaimed`, closed since nobody took them | 64 | all rules |
//!
//! A rule can be changed at any time, in the middle of what one read brought
//! too: it holds from the frame on that follows. What a frame sends beside its
//! payload is its encoder's [header](FrameEncoder::Header).
//!
//! # Examples
//!
//! A message has a kind, a flag that says whether it owns a descriptor, and a
//! length; several of them can leave in one call:
//!
//! ```
//! use bowline_protocol::framing::{
//!     Decoded, EncodeError, Envelope, FrameContext, FrameEncoder, FrameReceiver, Framed, Framer,
//!     FramingError, Pairing, Unclaimed,
//! };
//! use bowline_protocol::{Protocol, UnixTransport};
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
mod receiver;

pub use self::buffer::FrameBuffer;
pub use self::error::{EncodeError, FramingError, SendFrameError, SendFrameErrorKind};
pub use self::framed::Framed;
pub use self::length_prefixed::LengthPrefixedFramer;
pub use self::line::LineFramer;
pub use self::netstring::NetstringFramer;
pub use self::pairing::{FrameDescriptors, Pairing, Unclaimed};
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

    /// How many descriptors `frame` says that it owns; asked with
    /// [`Pairing::Claimed`] only, once for each frame, when it is whole. `frame`
    /// is all of it, with what surrounds the payload.
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
        /// [`Pairing::Exact`] relies on. A framer that does not know says 1.
        at_least: usize,
    },
}

/// Makes frames of payloads.
pub trait FrameEncoder {
    /// What a frame says beside its payload and how many descriptors it owns: a
    /// kind, a number, flags. `()` where there is nothing of the kind.
    type Header: ?Sized;

    /// What to put before and behind `payload`, in a frame with these values
    /// that is sent with so many descriptors.
    ///
    /// # Errors
    ///
    /// The values or the payload do not fit the format.
    fn envelope(
        &self,
        header: &Self::Header,
        payload: &[u8],
        descriptors: usize,
    ) -> Result<Envelope<'_>, EncodeError>;

    /// How many descriptors one frame may own: what peers of this protocol take
    /// by one message, 28 for a Wayland library for instance. The default is
    /// what the kernel takes, 253. More are refused before anything is sent.
    fn max_descriptors(&self) -> usize {
        MAX_DESCRIPTORS
    }

    /// Appends a frame with `payload`, sent with so many descriptors, to `out`.
    ///
    /// # Errors
    ///
    /// As [`envelope`](Self::envelope), and more descriptors than
    /// [one may own](Self::max_descriptors); nothing is appended then.
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

    /// Writes a frame with `payload` to any transport, as one write and without
    /// putting it together first.
    ///
    /// # Errors
    ///
    /// As [`envelope`](Self::envelope); nothing is written then.
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

    /// Writes a frame with `payload` and these descriptors, as one message, the
    /// descriptors attached to its first byte; see
    /// [`UnixTransport::write_with_descriptors`].
    ///
    /// # Errors
    ///
    /// As [`encode`](Self::encode), and where the transport refuses. Nothing is
    /// sent then, and the descriptors come back in the error.
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

/// What surrounds a payload to make it a frame.
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
    /// How long a head may be, in bytes, to be kept without an allocation:
    /// longer than the longest netstring's.
    pub const MAX_HEAD: usize = MAX_HEAD;

    /// `head` before the payload, `tail` behind it.
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

    /// What comes before the payload.
    pub fn head(&self) -> &[u8] {
        match &self.head {
            Head::Short { bytes, length } => &bytes[..usize::from(*length)],
            Head::Long(bytes) => bytes,
        }
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

/// What the kernel carries in one message.
const MAX_DESCRIPTORS: usize = 253;

/// Forwards to what is inside the box; a `Box<dyn Framer>` can be replaced by
/// a framer of another type.
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
