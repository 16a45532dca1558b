//! The messages of `_getsocks`; pure.

use bowline::framing::{Decoded, EncodeError, Envelope, FrameEncoder, Framer, FramingError};

/// How many listeners HAProxy sends at once (`MAX_SEND_FD`); musl did not allow one more.
pub(super) const MAX_BATCH: usize = 252;

/// The longest line of a request, in bytes: HAProxy's `tune.bufsize`.
const MAX_LINE: usize = 16_384;

/// Bytes of a count and of an acknowledgement: an `int` in C.
const INT: usize = 4;

/// Bytes of a record that are reserved for options. HAProxy sends zeros.
const OPTIONS: usize = 4;

/// What one end of a transfer receives next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GetsocksPart {
    /// The giving end: the line of the request. The frame is without its line feed.
    Request,
    /// The giving end: acknowledgements, of 4 bytes each.
    Acknowledgements,
    /// The taking end: the number of listeners, in 4 bytes.
    Count,
    /// The taking end: a record for each listener, which claims one descriptor.
    Records,
}

/// Where a listener of HAProxy belongs, besides its address.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct ListenerName {
    /// The name of its network namespace; empty for the namespace of the process.
    pub namespace: Vec<u8>,
    /// The interface that it is bound to; empty if it is bound to none.
    pub interface: Vec<u8>,
}

impl ListenerName {
    /// Parses a record: a received frame of [`GetsocksPart::Records`].
    ///
    /// # Panics
    ///
    /// `frame` is not a whole record.
    #[track_caller]
    pub fn of(frame: &[u8]) -> Self {
        let (namespace, rest) = counted(frame).expect("a whole record");
        let (interface, _) = counted(rest).expect("a whole record");
        Self {
            namespace: namespace.to_vec(),
            interface: interface.to_vec(),
        }
    }
}

/// Finds what either end of a transfer receives, and encodes records.
#[derive(Clone, Debug)]
pub struct GetsocksFramer {
    part: GetsocksPart,
}

impl GetsocksFramer {
    /// Makes a framer that begins with this part. The protocol goes on to the next part
    /// with [`set_part`](Self::set_part).
    pub fn new(part: GetsocksPart) -> Self {
        Self { part }
    }

    /// Returns what the next frame is.
    pub fn part(&self) -> GetsocksPart {
        self.part
    }

    /// Sets what the next frame is.
    pub fn set_part(&mut self, part: GetsocksPart) {
        self.part = part;
    }
}

impl Framer for GetsocksFramer {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FramingError> {
        let end = match self.part {
            GetsocksPart::Request => return decode_line(input),
            GetsocksPart::Acknowledgements | GetsocksPart::Count => Ok(INT),
            GetsocksPart::Records => record_end(input),
        };
        Ok(match end {
            Ok(end) if end <= input.len() => Decoded::Frame {
                payload: 0..end,
                consumed: end,
            },
            Ok(at_least) | Err(at_least) => Decoded::NeedMore {
                at_least: at_least - input.len(),
            },
        })
    }

    fn claims(&self, _: &[u8]) -> Option<usize> {
        Some((self.part == GetsocksPart::Records).into())
    }
}

impl FrameEncoder for GetsocksFramer {
    /// The header of an encoded frame, which is always a record.
    type Header = ListenerName;

    /// Encodes a record, which has no payload. Its names have at most 255 bytes.
    fn envelope(
        &self,
        name: &ListenerName,
        payload: &[u8],
        _: usize,
    ) -> Result<Envelope<'_>, EncodeError> {
        if !payload.is_empty() {
            let what = "a record has no payload";
            return Err(EncodeError::Malformed { what });
        }
        let mut record = Vec::with_capacity(2 + OPTIONS);
        for name in [&name.namespace, &name.interface] {
            let too_long = EncodeError::TooLong {
                length: name.len(),
                limit: u8::MAX.into(),
            };
            record.push(u8::try_from(name.len()).map_err(|_| too_long)?);
            record.extend_from_slice(name);
        }
        record.extend_from_slice(&[0; OPTIONS]);
        Ok(Envelope::new(&record, b""))
    }

    /// 252: the descriptors of a whole batch, which are sent together.
    fn max_descriptors(&self) -> usize {
        MAX_BATCH
    }
}

/// Returns the number in 4 bytes, which must be there.
pub(super) fn int(frame: &[u8]) -> i32 {
    i32::from_ne_bytes(*frame.first_chunk().expect("a frame of 4 bytes"))
}

fn decode_line(input: &[u8]) -> Result<Decoded, FramingError> {
    let limit = MAX_LINE;
    match input.iter().position(|byte| *byte == b'\n') {
        Some(length) if length < MAX_LINE => Ok(Decoded::Frame {
            payload: 0..length,
            consumed: length + 1,
        }),
        None if input.len() < MAX_LINE => Ok(Decoded::NeedMore { at_least: 1 }),
        _ => Err(FramingError::TooLong {
            length: None,
            limit,
        }),
    }
}

/// Returns where a record ends; as an error, where it ends at the earliest.
fn record_end(input: &[u8]) -> Result<usize, usize> {
    let least = 2 + OPTIONS;
    let namespace = usize::from(*input.first().ok_or(least)?);
    let interface = input.get(1 + namespace).ok_or(least + namespace)?;
    Ok(least + namespace + usize::from(*interface))
}

/// Splits off a string that is preceded by its length in one byte.
fn counted(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first()?;
    rest.split_at_checked((*length).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(namespace: &[u8], interface: &[u8]) -> ListenerName {
        ListenerName {
            namespace: namespace.to_vec(),
            interface: interface.to_vec(),
        }
    }

    #[test]
    fn record_is_what_haproxy_sends() {
        let mut framer = GetsocksFramer::new(GetsocksPart::Records);
        for (name, bytes) in [
            (name(b"", b""), &b"\0\0\0\0\0\0"[..]),
            (name(b"", b"eth0"), b"\0\x04eth0\0\0\0\0"),
            (name(b"blue", b"lo"), b"\x04blue\x02lo\0\0\0\0"),
            (name(b"blue", b""), b"\x04blue\0\0\0\0\0"),
        ] {
            let mut out = Vec::new();
            framer.encode(&name, b"", 1, &mut out).unwrap();
            assert_eq!(out, bytes);
            assert_eq!(ListenerName::of(&out), name);
            for cut in 0..out.len() {
                let Ok(Decoded::NeedMore { at_least }) = framer.decode(&out[..cut]) else {
                    panic!("a whole record in {cut} bytes");
                };
                assert!(
                    (1..=out.len() - cut).contains(&at_least),
                    "{at_least} at {cut}"
                );
            }
        }
    }

    #[test]
    fn names_of_255_bytes_fit_and_longer_ones_do_not() {
        let framer = GetsocksFramer::new(GetsocksPart::Records);
        let mut out = Vec::new();
        let longest = name(&[b'n'; 255], &[b'i'; 255]);
        framer.encode(&longest, b"", 1, &mut out).unwrap();
        assert_eq!(ListenerName::of(&out), longest);
        let longer = name(b"", &[b'i'; 256]);
        assert_eq!(
            framer.encode(&longer, b"", 1, &mut out),
            Err(EncodeError::TooLong {
                length: 256,
                limit: 255
            })
        );
    }

    #[test]
    fn line_of_a_request_has_its_limit() {
        let mut framer = GetsocksFramer::new(GetsocksPart::Request);
        let mut line = vec![b'x'; 16_383];
        line.push(b'\n');
        assert!(matches!(framer.decode(&line), Ok(Decoded::Frame { .. })));
        line.insert(0, b'x');
        for length in [16_384, 16_385] {
            assert_eq!(
                framer.decode(&line[..length]),
                Err(FramingError::TooLong {
                    length: None,
                    limit: 16_384
                })
            );
        }
    }
}
