//! imsg: the messages of OpenBSD's privilege-separated programs and of tmux.
//!
//! A message has a type, two numbers that the program chooses, data, and at most one
//! descriptor. There is no handshake, and either side may begin. Implement
//! [`FrameReceiver`](bowline::framing::FrameReceiver) for [`ImsgFramer`], and make a
//! protocol of it with [`protocol`].
//!
//! # Two dialects
//!
//! The header has 16 bytes in both, in the byte order of the machine. They differ in the
//! second word. Nothing on the wire says which dialect it is.
//!
//! | dialect | second word | who |
//! |---|---|---|
//! | [`Legacy`](ImsgDialect::Legacy) | 16 bits of length, 16 bits of flags (1: has a descriptor) | OpenBSD up to 7.6, tmux up to 3.5, libimsg of Debian 12 |
//! | [`Current`](ImsgDialect::Current) | 31 bits of length, the highest bit says that it has a descriptor | OpenBSD since 2025, tmux from 3.6 on |
//!
//! A message without a descriptor looks the same in both (on a little-endian machine). So a
//! receiver learns the dialect of its peer from the first message that has a descriptor:
//! [`ImsgFramer::learning`].
//!
//! # Which message a descriptor belongs to
//!
//! The flag says that a message has a descriptor. Descriptors are assigned in the order in
//! which they arrive.
//!
//! A legacy sender may send several messages in one call, and attaches the descriptor to
//! the first byte of the call. So a descriptor may be early; then it
//! [waits](Unclaimed::Wait). A descriptor that no message has goes to the next message that
//! has one, as in the reference implementation.
//!
//! A current sender attaches the descriptor to the first byte of its own message. A
//! descriptor that no message has is closed.
//!
//! | limit | default | of |
//! |---|---|---|
//! | bytes of a message, header included | 16,384 | `MAX_IMSGSIZE` |
//! | descriptors of a message | 1 | the format |
//! | descriptors that wait | 16 | ours; the reference has no limit |
//! | how long they wait | 30 s | [`Framed`] |
//!
//! # Examples
//!
//! The privileged half of a program opens files for the half that may not open them:
//!
//! ```
//! use std::fs::File;
//!
//! use bowline::framing::{FrameContext, FrameReceiver};
//! use bowline_peers::imsg::{self, Imsg, ImsgDialect, ImsgFramer, ImsgHeader};
//! use bowline::{Protocol, UnixTransport};
//!
//! const OPEN: u32 = 1;
//! const OPENED: u32 = 2;
//! const REFUSED: u32 = 3;
//!
//! struct Opener;
//!
//! impl<T: UnixTransport> FrameReceiver<T, ImsgFramer> for Opener {
//!     fn frame_received(&mut self, cx: &mut FrameContext<'_, T, ImsgFramer>, frame: &[u8]) {
//!         let Imsg { header, data } = Imsg::of(frame);
//!         let file = match header.kind {
//!             OPEN => File::open(String::from_utf8_lossy(data).as_ref()),
//!             _ => return cx.transport.abort_connection(),
//!         };
//!         let answer = |kind| ImsgHeader { kind, ..header };
//!         let is_sent = match file {
//!             Ok(file) => cx
//!                 .send_frame_of_with_descriptors(&answer(OPENED), b"", vec![file.into()])
//!                 .is_ok(),
//!             Err(_) => cx.send_frame_of(&answer(REFUSED), b"").is_ok(),
//!         };
//!         if !is_sent {
//!             cx.transport.abort_connection();
//!         }
//!     }
//! }
//!
//! fn build<T: UnixTransport>() -> impl Protocol<T> {
//!     imsg::protocol(ImsgFramer::new(ImsgDialect::Current), Opener)
//! }
//! # fn check<T: UnixTransport>() { let _ = build::<T>(); }
//! ```

use bowline::framing::{
    Decoded, EncodeError, Envelope, FrameEncoder, Framed, Framer, FramingError, Pairing, Unclaimed,
};

/// Bytes of a header.
const HEADER: usize = 16;

/// How many descriptors may wait for their message. Each call of a sender carries one, so
/// more than a few are a mistake.
const MAX_WAITING: usize = 16;

/// The bit in the second word of a current header that says that there is a descriptor.
const HAS_DESCRIPTOR: u32 = 1 << 31;

/// The same bit in the flags of a legacy header.
const LEGACY_HAS_DESCRIPTOR: u16 = 1;

/// Makes a protocol that delivers messages with their descriptors to `receiver`. It has the
/// limits of the [module](self), which can be changed on the returned value.
pub fn protocol<R>(framer: ImsgFramer, receiver: R) -> Framed<ImsgFramer, R> {
    let unclaimed = framer.unclaimed();
    Framed::new(framer, receiver)
        .pairing(Pairing::Claimed(unclaimed))
        .max_descriptors(1)
        .max_waiting(MAX_WAITING)
}

/// The layout of a header; see the [module](self#two-dialects).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImsgDialect {
    /// 16 bits of length and 16 bits of flags.
    Legacy,
    /// 31 bits of length, and one bit that says whether there is a descriptor.
    Current,
}

/// The header of a message, without its length and its flag. Those are set automatically.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImsgHeader {
    /// The type of the message, as the program defines it; `type` in C.
    pub kind: u32,
    /// A number that the program chooses. tmux puts its protocol version here.
    pub peer_id: u32,
    /// The process ID of the sender, or a number that the program chooses. `imsg_compose`
    /// replaces 0 by the process ID. Here, it is sent as it is.
    pub pid: u32,
}

/// A received message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Imsg<'a> {
    /// Its header.
    pub header: ImsgHeader,
    /// What follows the header.
    pub data: &'a [u8],
}

impl<'a> Imsg<'a> {
    /// Parses a received frame.
    ///
    /// # Panics
    ///
    /// `frame` is shorter than a header. No frame of an [`ImsgFramer`] is.
    #[track_caller]
    pub fn of(frame: &'a [u8]) -> Self {
        let (header, data) = frame.split_at(HEADER);
        let header = ImsgHeader {
            kind: word(header, 0),
            peer_id: word(header, 8),
            pid: word(header, 12),
        };
        Self { header, data }
    }
}

/// Finds messages in the bytes, and encodes them.
///
/// A frame is a whole message; [`Imsg::of`] parses it. Unknown flags are ignored, as in the
/// reference implementation.
#[derive(Clone, Debug)]
pub struct ImsgFramer {
    dialect: ImsgDialect,
    is_learning: bool,
    max_length: usize,
}

impl ImsgFramer {
    /// The default [limit](Self::with_max_length), in bytes: `MAX_IMSGSIZE`.
    pub const MAX_LENGTH: usize = 16_384;

    /// Makes a framer that reads and writes this dialect.
    pub fn new(dialect: ImsgDialect) -> Self {
        Self {
            dialect,
            is_learning: false,
            max_length: Self::MAX_LENGTH,
        }
    }

    /// Makes a framer that reads both dialects, and writes the dialect of the peer. Until
    /// the peer has sent a message that shows its dialect, it writes the dialect `first`.
    ///
    /// It is only for messages of less than 32 KiB: with a higher
    /// [limit](Self::with_max_length), a header can have two meanings.
    pub fn learning(first: ImsgDialect) -> Self {
        Self {
            is_learning: true,
            ..Self::new(first)
        }
    }

    /// Sets how many bytes a received or sent message may have, including the header;
    /// default 16,384. A legacy message never has more than 65,535. While the dialect is
    /// being learned, a message never has more than 32,767.
    #[must_use]
    pub fn with_max_length(mut self, max_length: usize) -> Self {
        self.max_length = max_length;
        self
    }

    /// Returns how many bytes a message may have, including the header.
    pub fn max_length(&self) -> usize {
        self.max_length.min(match self.dialect {
            _ if self.is_learning => 0x7fff,
            ImsgDialect::Legacy => 0xffff,
            ImsgDialect::Current => 0x7fff_ffff,
        })
    }

    /// Returns the dialect in which messages are written now.
    pub fn dialect(&self) -> ImsgDialect {
        self.dialect
    }

    /// Whether the dialect of the peer is not known yet.
    pub fn is_learning(&self) -> bool {
        self.is_learning
    }

    /// Returns what happens to descriptors that are early; see the [module](self).
    fn unclaimed(&self) -> Unclaimed {
        match (self.is_learning, self.dialect) {
            (false, ImsgDialect::Current) => Unclaimed::Close,
            _ => Unclaimed::Wait,
        }
    }

    /// Returns the length in the second word of a header, and whether there is a
    /// descriptor.
    fn length_of(&self, second: [u8; 4]) -> Result<(usize, bool), u64> {
        if !self.is_learning {
            let (length, has_descriptor) = read(self.dialect, second);
            return match self.fits(length) {
                true => Ok((length as usize, has_descriptor)),
                false => Err(length.into()),
            };
        }
        let (length, has_descriptor) = self
            .candidates(second)
            .map(|dialect| read(dialect, second))
            .next()
            .ok_or_else(|| u64::from(read(self.dialect, second).0))?;
        Ok((length as usize, has_descriptor))
    }

    /// Returns the dialects in which this second word makes sense.
    fn candidates(&self, second: [u8; 4]) -> impl Iterator<Item = ImsgDialect> {
        [ImsgDialect::Legacy, ImsgDialect::Current]
            .into_iter()
            .filter(move |&dialect| {
                let (length, _) = read(dialect, second);
                let flags = u16::from_ne_bytes([second[2], second[3]]);
                let is_known = dialect == ImsgDialect::Current || flags <= LEGACY_HAS_DESCRIPTOR;
                is_known && self.fits(length)
            })
    }

    fn fits(&self, length: u32) -> bool {
        (HEADER..=self.max_length()).contains(&(length as usize))
    }

    /// Learns the dialect of the peer, if this message shows it.
    fn learn(&mut self, second: [u8; 4]) {
        let mut candidates = self.candidates(second);
        if let (Some(dialect), None) = (candidates.next(), candidates.next()) {
            drop(candidates);
            self.dialect = dialect;
            self.is_learning = false;
        }
    }
}

/// Reads the length and the flag in the second word of a header.
fn read(dialect: ImsgDialect, second: [u8; 4]) -> (u32, bool) {
    match dialect {
        ImsgDialect::Legacy => {
            let [a, b, c, d] = second;
            let flags = u16::from_ne_bytes([c, d]);
            let has_descriptor = flags & LEGACY_HAS_DESCRIPTOR != 0;
            (u16::from_ne_bytes([a, b]).into(), has_descriptor)
        }
        ImsgDialect::Current => {
            let word = u32::from_ne_bytes(second);
            (word & !HAS_DESCRIPTOR, word & HAS_DESCRIPTOR != 0)
        }
    }
}

/// Makes the second word of a header.
fn written(dialect: ImsgDialect, length: u32, has_descriptor: bool) -> [u8; 4] {
    match dialect {
        ImsgDialect::Legacy => {
            let [a, b] = (length as u16).to_ne_bytes();
            let [c, d] = u16::from(has_descriptor).to_ne_bytes();
            [a, b, c, d]
        }
        ImsgDialect::Current => (length | u32::from(has_descriptor) << 31).to_ne_bytes(),
    }
}

impl Framer for ImsgFramer {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FramingError> {
        let Some(header) = input.get(..HEADER) else {
            let at_least = HEADER - input.len();
            return Ok(Decoded::NeedMore { at_least });
        };
        let (end, _) =
            self.length_of(second_of(header))
                .map_err(|length| match length < HEADER as u64 {
                    true => FramingError::Malformed {
                        what: "message shorter than its header",
                    },
                    false => FramingError::TooLong {
                        length: Some(length),
                        limit: self.max_length(),
                    },
                })?;
        if input.len() < end {
            let at_least = end - input.len();
            return Ok(Decoded::NeedMore { at_least });
        }
        if self.is_learning {
            self.learn(second_of(header));
        }
        Ok(Decoded::Frame {
            payload: 0..end,
            consumed: end,
        })
    }

    fn claims(&self, frame: &[u8]) -> Option<usize> {
        let has_descriptor = self.length_of(second_of(frame)).is_ok_and(|it| it.1);
        Some(has_descriptor.into())
    }
}

impl FrameEncoder for ImsgFramer {
    type Header = ImsgHeader;

    /// Refuses a message that is longer than the [limit](ImsgFramer::with_max_length): the
    /// peer would end the connection.
    fn envelope(
        &self,
        header: &ImsgHeader,
        payload: &[u8],
        descriptors: usize,
    ) -> Result<Envelope<'_>, EncodeError> {
        let limit = self.max_length();
        let length = HEADER + payload.len();
        if length > limit {
            return Err(EncodeError::TooLong {
                length: payload.len(),
                limit: limit.saturating_sub(HEADER) as u64,
            });
        }
        let mut head = [0; HEADER];
        head[..4].copy_from_slice(&header.kind.to_ne_bytes());
        let second = written(self.dialect, length as u32, descriptors > 0);
        head[4..8].copy_from_slice(&second);
        head[8..12].copy_from_slice(&header.peer_id.to_ne_bytes());
        head[12..].copy_from_slice(&header.pid.to_ne_bytes());
        Ok(Envelope::new(&head, b""))
    }

    /// 1: a message has at most one descriptor.
    fn max_descriptors(&self) -> usize {
        1
    }
}

fn second_of(header: &[u8]) -> [u8; 4] {
    word(header, 4).to_ne_bytes()
}

/// Returns the word at `at`, which must be there.
fn word(bytes: &[u8], at: usize) -> u32 {
    let word = bytes[at..].first_chunk().expect("a header has four words");
    u32::from_ne_bytes(*word)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: [ImsgDialect; 2] = [ImsgDialect::Legacy, ImsgDialect::Current];

    fn message(dialect: ImsgDialect, kind: u32, data: &[u8], descriptors: usize) -> Vec<u8> {
        let header = ImsgHeader {
            kind,
            peer_id: 8,
            pid: u32::MAX,
        };
        let mut out = Vec::new();
        ImsgFramer::new(dialect)
            .encode(&header, data, descriptors, &mut out)
            .unwrap();
        out
    }

    /// What tmux 3.3a sends when it says what its standard input is.
    #[cfg(target_endian = "little")]
    #[test]
    fn message_is_what_tmux_sends() {
        let expected = b"h\0\0\0\x10\0\x01\0\x08\0\0\0\xff\xff\xff\xff";
        assert_eq!(message(ImsgDialect::Legacy, 104, b"", 1), expected);
        let expected = b"h\0\0\0\x10\0\0\x80\x08\0\0\0\xff\xff\xff\xff";
        assert_eq!(message(ImsgDialect::Current, 104, b"", 1), expected);
    }

    #[test]
    fn dialect_is_learned_from_the_first_message_with_a_descriptor() {
        for (first, spoken) in [(0, 1), (1, 0), (0, 0), (1, 1)].map(|(a, b)| (BOTH[a], BOTH[b])) {
            let mut framer = ImsgFramer::learning(first);
            let plain = message(spoken, 1, b"data", 0);
            assert!(matches!(framer.decode(&plain), Ok(Decoded::Frame { .. })));
            assert_eq!(framer.claims(&plain), Some(0));
            if cfg!(target_endian = "little") {
                assert!(framer.is_learning(), "both look alike");
                assert_eq!(framer.dialect(), first);
            }
            let with_one = message(spoken, 1, b"data", 1);
            assert!(matches!(
                framer.decode(&with_one),
                Ok(Decoded::Frame { .. })
            ));
            assert_eq!(framer.claims(&with_one), Some(1));
            assert!(!framer.is_learning());
            assert_eq!(framer.dialect(), spoken);
        }
    }

    #[test]
    fn length_of_exactly_the_limit_is_accepted_and_one_more_is_refused() {
        for dialect in BOTH {
            for (mut framer, limit) in [
                (ImsgFramer::new(dialect), 16_384),
                (ImsgFramer::new(dialect).with_max_length(40), 40),
                (
                    ImsgFramer::learning(dialect).with_max_length(65_536),
                    0x7fff,
                ),
            ] {
                let mut out = Vec::new();
                let header = ImsgHeader::default();
                framer
                    .encode(&header, &vec![1; limit - 16], 0, &mut out)
                    .unwrap();
                assert_eq!(
                    framer.decode(&out),
                    Ok(Decoded::Frame {
                        payload: 0..limit,
                        consumed: limit
                    })
                );
                let too_long = framer.encode(&header, &vec![1; limit - 15], 0, &mut out);
                assert_eq!(
                    too_long,
                    Err(EncodeError::TooLong {
                        length: limit - 15,
                        limit: limit as u64 - 16
                    })
                );
                out[4..8].copy_from_slice(&written(dialect, limit as u32 + 1, false));
                assert_eq!(
                    framer.decode(&out[..16]),
                    Err(FramingError::TooLong {
                        length: Some(limit as u64 + 1),
                        limit
                    }),
                    "at its header"
                );
            }
        }
    }

    #[test]
    fn message_shorter_than_its_header_is_refused() {
        for dialect in BOTH {
            let mut short = message(dialect, 1, b"", 0);
            short[4..8].copy_from_slice(&written(dialect, 15, false));
            for mut framer in [ImsgFramer::new(dialect), ImsgFramer::learning(dialect)] {
                let what = "message shorter than its header";
                assert_eq!(framer.decode(&short), Err(FramingError::Malformed { what }));
            }
        }
    }

    #[test]
    fn unknown_flag_is_ignored_in_a_known_dialect_only() {
        let mut strange = message(ImsgDialect::Legacy, 1, b"", 0);
        strange[6..8].copy_from_slice(&4_u16.to_ne_bytes());
        let mut framer = ImsgFramer::new(ImsgDialect::Legacy);
        assert!(matches!(framer.decode(&strange), Ok(Decoded::Frame { .. })));
        assert_eq!(framer.claims(&strange), Some(0));
        assert!(
            ImsgFramer::learning(ImsgDialect::Legacy)
                .decode(&strange)
                .is_err()
        );
    }
}
