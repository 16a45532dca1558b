//! Finds lines and messages in the bytes; pure.

use bowline::framing::{Decoded, Framer, FramingError};

use super::message::{DbusMessage, LONGEST_MESSAGE, Layout, length_of};

/// The longest line of an authentication in bytes, as in both daemons.
const LONGEST_LINE: usize = 16 * 1_024;

/// The framer of D-Bus: first lines, then messages.
///
/// A frame is a whole message, or a line. A message claims as many descriptors as its
/// header says, a line claims none. Messages and the length of lines are checked: what
/// violates the specification breaks the framing.
#[derive(Debug)]
pub struct DbusFramer {
    phase: Phase,
    longest: usize,
}

#[derive(Debug)]
enum Phase {
    Lines {
        /// How far the input was searched for the end of a line, without finding one.
        searched: usize,
    },
    Messages {
        /// The layout of the message that was found last.
        layout: Option<Box<Layout>>,
    },
}

impl DbusFramer {
    /// Makes a framer for lines, until [`begin_messages`](Self::begin_messages). The zero
    /// byte with which a client begins is part of its first line.
    pub fn of_lines() -> Self {
        Self::of(Phase::Lines { searched: 0 })
    }

    /// Makes a framer for messages only.
    pub fn of_messages() -> Self {
        Self::of(Phase::Messages { layout: None })
    }

    fn of(phase: Phase) -> Self {
        Self {
            phase,
            longest: LONGEST_MESSAGE,
        }
    }

    /// Sets how many bytes a message may have. The default is the most that the
    /// specification allows, 134,217,728.
    #[must_use]
    pub fn with_max_length(mut self, bytes: usize) -> Self {
        self.longest = bytes.min(LONGEST_MESSAGE);
        self
    }

    /// Switches to messages. Call it when the line arrives that ends the authentication.
    pub fn begin_messages(&mut self) {
        self.phase = Phase::Messages { layout: None };
    }

    /// Whether messages follow.
    pub fn is_of_messages(&self) -> bool {
        matches!(self.phase, Phase::Messages { .. })
    }

    /// Parses the message that is being delivered. `frame` is its bytes.
    ///
    /// # Errors
    ///
    /// It is not a message.
    pub fn message<'a>(&self, frame: &'a [u8]) -> Result<DbusMessage<'a>, FramingError> {
        match &self.phase {
            Phase::Messages {
                layout: Some(layout),
            } => Ok(layout.view(frame)),
            _ => DbusMessage::parse(frame),
        }
    }

    fn decode_line(input: &[u8], searched: &mut usize) -> Result<Decoded, FramingError> {
        let behind = &input[*searched..];
        let found = behind.windows(2).position(|it| it == b"\r\n");
        let end = found.map(|at| *searched + at);
        if end.unwrap_or(input.len()) > LONGEST_LINE {
            return Err(FramingError::TooLong {
                length: None,
                limit: LONGEST_LINE,
            });
        }
        *searched = match end {
            Some(_) => 0,
            None => input.len().saturating_sub(1),
        };
        Ok(match end {
            None => Decoded::NeedMore { at_least: 1 },
            Some(end) => Decoded::Frame {
                payload: 0..end,
                consumed: end + 2,
            },
        })
    }
}

impl Framer for DbusFramer {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FramingError> {
        let layout = match &mut self.phase {
            Phase::Lines { searched } => return Self::decode_line(input, searched),
            Phase::Messages { layout } => layout,
        };
        match length_of(input, self.longest)? {
            None => Ok(Decoded::NeedMore {
                at_least: 16 - input.len(),
            }),
            Some(length) if input.len() < length => Ok(Decoded::NeedMore {
                at_least: length - input.len(),
            }),
            Some(length) => {
                let parsed = Layout::parse(&input[..length])?;
                match layout {
                    Some(layout) => **layout = parsed,
                    None => *layout = Some(Box::new(parsed)),
                }
                Ok(Decoded::Frame {
                    payload: 0..length,
                    consumed: length,
                })
            }
        }
    }

    fn reset(&mut self) {
        if let Phase::Lines { searched } = &mut self.phase {
            *searched = 0;
        }
    }

    fn claims(&self, _: &[u8]) -> Option<usize> {
        Some(match &self.phase {
            Phase::Messages {
                layout: Some(layout),
            } => layout.descriptors as usize,
            _ => 0,
        })
    }
}
