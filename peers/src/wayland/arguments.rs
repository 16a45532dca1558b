//! The arguments of messages.

use std::os::fd::OwnedFd;

use bowline::PassedDescriptor;

use super::framing::word;
use super::interfaces::{Interface, Signature};

/// An argument of a message, with its letter in a [signature](Signature).
#[derive(Debug)]
pub enum Argument<'a> {
    /// `i`: a signed number.
    Int(i32),
    /// `u`: an unsigned number.
    Uint(u32),
    /// `f`: a fixed-point number, in 256ths.
    Fixed(i32),
    /// `s`: a string, or `None` (`?s`). Its bytes have no known encoding, and no zero at
    /// the end.
    String(Option<&'a [u8]>),
    /// `o`: an object, or 0 (`?o`).
    Object(u32),
    /// `n`: a new object, which exists from now on.
    NewId(u32),
    /// `a`: an array of bytes.
    Array(&'a [u8]),
    /// `h`: a descriptor, or `None` once it was taken.
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

    /// Whether the argument is allowed where the signature has no `?`.
    pub(super) fn is_there(&self) -> bool {
        !matches!(
            self,
            Self::String(None) | Self::Object(0) | Self::NewId(0) | Self::Descriptor(None)
        )
    }

    /// Appends the encoded argument.
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

/// Appends bytes, preceded by their number and padded to whole words.
fn write_bytes(out: &mut Vec<u8>, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    // One that is too long for it is refused as a message.
    out.extend(u32::try_from(length).unwrap_or(u32::MAX).to_ne_bytes());
    parts.iter().for_each(|part| out.extend_from_slice(part));
    out.resize(out.len().next_multiple_of(4), 0);
}

/// A received message, parsed by the signature of its object's interface.
#[derive(Debug)]
pub struct WaylandMessage<'a> {
    /// The object that it is sent to, or comes from.
    pub object: u32,
    /// The interface of that object.
    pub interface: &'static Interface,
    /// The opcode: the position of the request or event in its interface.
    pub opcode: u16,
    /// The request or event.
    pub signature: &'static Signature,
    /// Its arguments, with the number and the types that the signature says.
    pub arguments: Vec<Argument<'a>>,
}

/// The panic if an argument is of another type. The signature says what the arguments are,
/// so this is the caller's mistake.
const OTHER: &str = "the signature says what arguments there are";

impl<'a> WaylandMessage<'a> {
    /// Returns the name of the request or event.
    pub fn name(&self) -> &'static str {
        self.signature.name
    }

    /// Returns the argument at `place`, of type `i`.
    ///
    /// # Panics
    ///
    /// The argument is of another type. This holds for all of these methods.
    #[track_caller]
    pub fn int(&self, place: usize) -> i32 {
        match self.arguments.get(place) {
            Some(Argument::Int(value)) => *value,
            other => panic!("{OTHER}: {other:?}"),
        }
    }

    /// Returns the argument at `place`, of type `u`.
    #[track_caller]
    pub fn uint(&self, place: usize) -> u32 {
        match self.arguments.get(place) {
            Some(Argument::Uint(value)) => *value,
            other => panic!("{OTHER}: {other:?}"),
        }
    }

    /// Returns the argument at `place`, of type `o` or `n`; 0 if there is no object.
    #[track_caller]
    pub fn object(&self, place: usize) -> u32 {
        match self.arguments.get(place) {
            Some(Argument::Object(id) | Argument::NewId(id)) => *id,
            other => panic!("{OTHER}: {other:?}"),
        }
    }

    /// Returns the argument at `place`, of type `s`. Invalid UTF-8 in it is replaced.
    #[track_caller]
    pub fn string(&self, place: usize) -> std::borrow::Cow<'a, str> {
        match self.arguments.get(place) {
            Some(Argument::String(text)) => String::from_utf8_lossy(text.unwrap_or_default()),
            other => panic!("{OTHER}: {other:?}"),
        }
    }

    /// Takes the descriptor at `place`, of type `h`. Descriptors that are not taken are
    /// closed.
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

/// Parses the arguments of a message. Returns `None` if they do not fit the signature, or
/// if descriptors are missing.
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
