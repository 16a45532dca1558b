//! What stands in a message.

use std::os::fd::OwnedFd;

use bowline::PassedDescriptor;

use super::framing::word;
use super::interfaces::{Interface, Signature};

/// An argument of a message, by its letter in a [signature](Signature).
#[derive(Debug)]
pub enum Argument<'a> {
    /// `i`
    Int(i32),
    /// `u`
    Uint(u32),
    /// `f`: a number in 256ths.
    Fixed(i32),
    /// `s`, or nothing (`?s`). Bytes of no known encoding, without the zero at the end.
    String(Option<&'a [u8]>),
    /// `o`, or 0 (`?o`).
    Object(u32),
    /// `n`: the object is there from now on.
    NewId(u32),
    /// `a`
    Array(&'a [u8]),
    /// `h`: nothing, once it was taken.
    Descriptor(Option<PassedDescriptor>),
}

impl Argument<'_> {
    pub(super) fn letter(&self) -> char {
        match self {
            Self::Int(_) => 'i',
            Self::Uint(_) => 'u',
            Self::Fixed(_) => 'f',
            Self::String(_) => 's',
            Self::Object(_) => 'o',
            Self::NewId(_) => 'n',
            Self::Array(_) => 'a',
            Self::Descriptor(_) => 'h',
        }
    }

    /// Whether it may stand where the signature does not say `?`.
    pub(super) fn is_there(&self) -> bool {
        !matches!(
            self,
            Self::String(None) | Self::Object(0) | Self::NewId(0) | Self::Descriptor(None)
        )
    }

    /// Appends what it is on the wire.
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        match *self {
            Self::Int(value) | Self::Fixed(value) => out.extend(value.to_ne_bytes()),
            Self::Uint(value) | Self::Object(value) | Self::NewId(value) => {
                out.extend(value.to_ne_bytes());
            }
            Self::String(None) => out.extend([0; 4]),
            Self::String(Some(text)) => write_bytes(out, &[text, b"\0"]),
            Self::Array(bytes) => write_bytes(out, &[bytes]),
            // It has no bytes.
            Self::Descriptor(_) => {}
        }
    }
}

/// Bytes behind their number, filled up to whole words.
fn write_bytes(out: &mut Vec<u8>, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    // One that is too long for it is refused as a message.
    out.extend(u32::try_from(length).unwrap_or(u32::MAX).to_ne_bytes());
    parts.iter().for_each(|part| out.extend_from_slice(part));
    out.resize(out.len().next_multiple_of(4), 0);
}

/// A message that was received, taken apart by the signature of its object's interface.
#[derive(Debug)]
pub struct WaylandMessage<'a> {
    /// The object that it is for, or from.
    pub object: u32,
    /// What that object is.
    pub interface: &'static Interface,
    /// The place of the request or event in its interface.
    pub opcode: u16,
    /// The request or event.
    pub signature: &'static Signature,
    /// Its arguments: as many as the signature says, of the types that it says.
    pub arguments: Vec<Argument<'a>>,
}

/// What an argument is asked for that is another. The signature says what they are, so that
/// this is a mistake of who asks.
const OTHER: &str = "the signature says what arguments there are";

impl<'a> WaylandMessage<'a> {
    /// The name of the request or event.
    pub fn name(&self) -> &'static str {
        self.signature.name
    }

    /// The argument at this place, an `i`.
    ///
    /// # Panics
    ///
    /// If it is none, as all of these methods do.
    #[track_caller]
    pub fn int(&self, place: usize) -> i32 {
        match self.arguments.get(place) {
            Some(Argument::Int(value)) => *value,
            other => panic!("{OTHER}: {other:?}"),
        }
    }

    /// The argument at this place, a `u`.
    #[track_caller]
    pub fn uint(&self, place: usize) -> u32 {
        match self.arguments.get(place) {
            Some(Argument::Uint(value)) => *value,
            other => panic!("{OTHER}: {other:?}"),
        }
    }

    /// The argument at this place, an `o` or an `n`; 0 where there is no object.
    #[track_caller]
    pub fn object(&self, place: usize) -> u32 {
        match self.arguments.get(place) {
            Some(Argument::Object(id) | Argument::NewId(id)) => *id,
            other => panic!("{OTHER}: {other:?}"),
        }
    }

    /// The argument at this place, an `s`; what is no UTF-8 in it is replaced.
    #[track_caller]
    pub fn string(&self, place: usize) -> std::borrow::Cow<'a, str> {
        match self.arguments.get(place) {
            Some(Argument::String(text)) => String::from_utf8_lossy(text.unwrap_or_default()),
            other => panic!("{OTHER}: {other:?}"),
        }
    }

    /// Takes the descriptor at this place, an `h`. What is not taken is closed.
    #[track_caller]
    pub fn take_descriptor(&mut self, place: usize) -> OwnedFd {
        match self.arguments.get_mut(place) {
            Some(Argument::Descriptor(fd)) => match fd.take() {
                Some(PassedDescriptor::Owned(fd)) => fd,
                _ => panic!("it was taken before"),
            },
            other => panic!("{OTHER}: {other:?}"),
        }
    }
}

/// Takes the arguments of a message apart. `None` if they are not as the signature says, or
/// descriptors are missing.
pub(super) fn read<'a>(
    signature: &Signature,
    mut bytes: &'a [u8],
    mut descriptors: impl Iterator<Item = OwnedFd>,
) -> Option<Vec<Argument<'a>>> {
    let mut arguments = Vec::new();
    for (letter, may_be_missing) in signature.letters() {
        let argument = match letter {
            'h' => Argument::Descriptor(Some(PassedDescriptor::Owned(descriptors.next()?))),
            's' => Argument::String(match take_bytes(&mut bytes)? {
                [] => None,
                [text @ .., 0] if !text.contains(&0) => Some(text),
                _ => return None,
            }),
            'a' => Argument::Array(take_bytes(&mut bytes)?),
            _ => {
                let value = take_word(&mut bytes)?;
                match letter {
                    'i' => Argument::Int(value.cast_signed()),
                    'f' => Argument::Fixed(value.cast_signed()),
                    'o' => Argument::Object(value),
                    'n' => Argument::NewId(value),
                    _ => Argument::Uint(value),
                }
            }
        };
        if !may_be_missing && !argument.is_there() {
            return None;
        }
        arguments.push(argument);
    }
    bytes.is_empty().then_some(arguments)
}

fn take_word(bytes: &mut &[u8]) -> Option<u32> {
    let (taken, rest) = bytes.split_at_checked(4)?;
    *bytes = rest;
    Some(word(taken))
}

fn take_bytes<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = usize::try_from(take_word(bytes)?).ok()?;
    let (taken, rest) = bytes.split_at_checked(length.checked_next_multiple_of(4)?)?;
    *bytes = rest;
    Some(&taken[..length])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_nothing_shorter_or_longer() {
        let signature = Signature::new("all", "iuf?sson?oa");
        let arguments = [
            Argument::Int(-1),
            Argument::Uint(7),
            Argument::Fixed(-256),
            Argument::String(None),
            Argument::String(Some(b"four")),
            Argument::Object(3),
            Argument::NewId(4),
            Argument::Object(0),
            Argument::Array(b"12345"),
        ];
        let mut bytes = Vec::new();
        arguments.iter().for_each(|it| it.write(&mut bytes));
        let none = || std::iter::empty::<OwnedFd>();
        let read_again = read(&signature, &bytes, none()).expect("as it was written");
        assert_eq!(format!("{read_again:?}"), format!("{arguments:?}"));
        for length in 0..bytes.len() {
            assert!(
                read(&signature, &bytes[..length], none()).is_none(),
                "{length}"
            );
        }
        bytes.extend([0; 4]);
        assert!(
            read(&signature, &bytes, none()).is_none(),
            "a word too many"
        );
    }

    #[test]
    fn what_has_to_be_there_is_missed() {
        for (letters, bytes) in [
            ("s", &[0_u32][..]),
            ("o", &[0]),
            ("n", &[0]),
            ("h", &[]),
            // No zero at the end; one in the middle; longer than the message.
            ("s", &[4, u32::from_ne_bytes(*b"abcd")]),
            ("s", &[4, u32::from_ne_bytes(*b"a\0b\0")]),
            ("a", &[5, 0]),
            ("a", &[u32::MAX, 0]),
        ] {
            let bytes: Vec<_> = bytes.iter().flat_map(|it| it.to_ne_bytes()).collect();
            let signature = Signature::new("one", letters);
            let read = read(&signature, &bytes, std::iter::empty::<OwnedFd>());
            assert!(read.is_none(), "{letters} {bytes:?}");
        }
    }
}
