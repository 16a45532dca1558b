//! Messages: their headers, and their bytes; pure.

use std::num::NonZeroU32;
use std::ops::Range;

use bowline::framing::{EncodeError, FramingError};

use super::names;

/// The longest message in bytes, by the specification: 128 MiB.
pub const LONGEST_MESSAGE: usize = 1 << 27;

/// The longest array in bytes, by the specification: 64 MiB. The header fields are an
/// array.
const LONGEST_ARRAY: usize = 1 << 26;

/// How many bytes a message has before its header fields.
const FIXED: usize = 16;

/// The byte order of a message. Each message has its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ByteOrder {
    /// Little-endian: `l`.
    Little,
    /// Big-endian: `B`.
    Big,
}

impl ByteOrder {
    /// The byte order of this machine.
    pub const NATIVE: Self = match cfg!(target_endian = "big") {
        true => Self::Big,
        false => Self::Little,
    };

    fn u32(self, bytes: [u8; 4]) -> u32 {
        match self {
            Self::Little => u32::from_le_bytes(bytes),
            Self::Big => u32::from_be_bytes(bytes),
        }
    }

    pub(super) fn bytes(self, number: u32) -> [u8; 4] {
        match self {
            Self::Little => number.to_le_bytes(),
            Self::Big => number.to_be_bytes(),
        }
    }
}

/// The type of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DbusKind {
    /// A method call. It has a path and a member.
    Call,
    /// The answer to a call, with the results. It has the serial of the call.
    Return,
    /// The answer to a call that failed. It has the serial of the call and the name of the
    /// error. The first value of the body is usually a text for people.
    Error,
    /// A signal. It has a path, an interface and a member.
    Signal,
    /// A type that a later specification may define. Ignore it.
    Other(u8),
}

/// The header of a message: everything but its body.
///
/// The same type is used for messages that are sent and for those that were received. The
/// serial of a sent message, the number of its descriptors and the length of its body are
/// set automatically.
///
/// # Examples
///
/// ```
/// use bowline_peers::dbus::DbusHeader;
///
/// let ask = DbusHeader::call("/org/freedesktop/DBus", "GetId")
///     .interface("org.freedesktop.DBus")
///     .destination("org.freedesktop.DBus");
/// assert_eq!(ask.member, Some("GetId"));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DbusHeader<'a> {
    /// The type of the message.
    pub kind: DbusKind,
    /// The sender of a call wants no answer, and ignores one.
    pub no_reply: bool,
    /// The bus must not start a program for the destination.
    pub no_auto_start: bool,
    /// The caller is willing to wait while a person is asked for permission.
    pub allows_interaction: bool,
    /// The object that a call is for, or that a signal comes from.
    pub path: Option<&'a str>,
    /// The interface of the member. A call may have none.
    pub interface: Option<&'a str>,
    /// The method or the signal.
    pub member: Option<&'a str>,
    /// The name of an error.
    pub error_name: Option<&'a str>,
    /// The serial of the call that this answers.
    pub reply_serial: Option<NonZeroU32>,
    /// The name on the bus that the message is for.
    pub destination: Option<&'a str>,
    /// The name of the sender. The bus fills it in; from anybody else, do not believe it.
    pub sender: Option<&'a str>,
    /// The types of the values in the body; empty if there are none.
    pub signature: &'a str,
}

impl<'a> DbusHeader<'a> {
    /// Makes the header of a method call.
    pub fn call(path: &'a str, member: &'a str) -> Self {
        Self {
            path: Some(path),
            member: Some(member),
            ..Self::of(DbusKind::Call)
        }
    }

    /// Makes the header of a signal.
    pub fn signal(path: &'a str, interface: &'a str, member: &'a str) -> Self {
        Self {
            path: Some(path),
            interface: Some(interface),
            member: Some(member),
            ..Self::of(DbusKind::Signal)
        }
    }

    pub(super) fn of(kind: DbusKind) -> Self {
        Self {
            kind,
            no_reply: false,
            no_auto_start: false,
            allows_interaction: false,
            path: None,
            interface: None,
            member: None,
            error_name: None,
            reply_serial: None,
            destination: None,
            sender: None,
            signature: "",
        }
    }

    /// Sets the interface of the member.
    #[must_use]
    pub fn interface(mut self, name: &'a str) -> Self {
        self.interface = Some(name);
        self
    }

    /// Sets the name on the bus that the message is for.
    #[must_use]
    pub fn destination(mut self, name: &'a str) -> Self {
        self.destination = Some(name);
        self
    }

    /// Sets the types of the values in the body.
    #[must_use]
    pub fn signature(mut self, types: &'a str) -> Self {
        self.signature = types;
        self
    }

    /// Says that no answer is wanted.
    #[must_use]
    pub fn no_reply(mut self) -> Self {
        self.no_reply = true;
        self
    }

    /// Says that no program is to be started for the destination.
    #[must_use]
    pub fn no_auto_start(mut self) -> Self {
        self.no_auto_start = true;
        self
    }

    /// Checks that it has what its type needs, and that all of it is well-formed.
    fn check(&self) -> Result<(), &'static str> {
        let has_all = match self.kind {
            DbusKind::Call => self.path.is_some() && self.member.is_some(),
            DbusKind::Return => self.reply_serial.is_some(),
            DbusKind::Error => self.reply_serial.is_some() && self.error_name.is_some(),
            DbusKind::Signal => {
                self.path.is_some() && self.interface.is_some() && self.member.is_some()
            }
            DbusKind::Other(kind) => kind > 4,
        };
        if !has_all {
            return Err("a header without a field of its kind");
        }
        for (value, is_good, what) in [
            (self.path, names::is_path as fn(&str) -> bool, "a bad path"),
            (self.interface, names::is_interface, "a bad interface"),
            (self.member, names::is_member, "a bad member"),
            (self.error_name, names::is_interface, "a bad error name"),
            (self.destination, names::is_bus_name, "a bad destination"),
            (self.sender, names::is_bus_name, "a bad sender"),
        ] {
            if value.is_some_and(|value| !is_good(value)) {
                return Err(what);
            }
        }
        match names::is_signature(self.signature.as_bytes()) {
            true => Ok(()),
            false => Err("a bad signature"),
        }
    }

    fn flags(&self) -> u8 {
        u8::from(self.no_reply)
            | u8::from(self.no_auto_start) << 1
            | u8::from(self.allows_interaction) << 2
    }

    /// Encodes everything before the body into `out`, which is emptied first.
    ///
    /// # Errors
    ///
    /// A field is missing or malformed, or the message would be too long.
    pub fn encode(
        &self,
        order: ByteOrder,
        serial: NonZeroU32,
        body: usize,
        descriptors: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        self.check()
            .map_err(|what| EncodeError::Malformed { what })?;
        out.clear();
        let kind = match self.kind {
            DbusKind::Call => 1,
            DbusKind::Return => 2,
            DbusKind::Error => 3,
            DbusKind::Signal => 4,
            DbusKind::Other(kind) => kind,
        };
        let mark = match order {
            ByteOrder::Little => b'l',
            ByteOrder::Big => b'B',
        };
        let too_long = |length| EncodeError::TooLong {
            length,
            limit: LONGEST_MESSAGE as u64,
        };
        let body = u32::try_from(body).map_err(|_| too_long(body))?;
        let descriptors = u32::try_from(descriptors).unwrap_or(u32::MAX);
        out.extend([mark, kind, self.flags(), 1]);
        out.extend(order.bytes(body));
        out.extend(order.bytes(serial.get()));
        out.extend([0; 4]);
        self.encode_fields(order, descriptors, out);
        let fields = out.len() - FIXED;
        let fields = u32::try_from(fields).map_err(|_| too_long(fields))?;
        out[12..FIXED].copy_from_slice(&order.bytes(fields));
        pad(out, 8);
        let length = out.len() + body as usize;
        match length > LONGEST_MESSAGE || fields as usize > LONGEST_ARRAY {
            true => Err(too_long(length)),
            false => Ok(()),
        }
    }

    fn encode_fields(&self, order: ByteOrder, descriptors: u32, out: &mut Vec<u8>) {
        let mut field = |code: u8, kind: u8, text: Option<&str>, number: u32| {
            if text.is_none() && number == 0 {
                return;
            }
            pad(out, 8);
            out.extend([code, 1, kind, 0]);
            match text {
                Some(text) if kind == b'g' => out.push(text.len() as u8),
                Some(text) => out.extend(order.bytes(text.len() as u32)),
                None => out.extend(order.bytes(number)),
            }
            if let Some(text) = text {
                out.extend(text.as_bytes());
                out.push(0);
            }
        };
        let signature = Some(self.signature).filter(|it| !it.is_empty());
        field(PATH, b'o', self.path, 0);
        field(INTERFACE, b's', self.interface, 0);
        field(MEMBER, b's', self.member, 0);
        field(ERROR_NAME, b's', self.error_name, 0);
        let reply_serial = self.reply_serial.map_or(0, NonZeroU32::get);
        field(REPLY_SERIAL, b'u', None, reply_serial);
        field(DESTINATION, b's', self.destination, 0);
        field(SENDER, b's', self.sender, 0);
        field(SIGNATURE, b'g', signature, 0);
        field(DESCRIPTORS, b'u', None, descriptors);
    }
}

const PATH: u8 = 1;
const INTERFACE: u8 = 2;
const MEMBER: u8 = 3;
const ERROR_NAME: u8 = 4;
const REPLY_SERIAL: u8 = 5;
const DESTINATION: u8 = 6;
const SENDER: u8 = 7;
const SIGNATURE: u8 = 8;
const DESCRIPTORS: u8 = 9;

fn pad(out: &mut Vec<u8>, to: usize) {
    out.resize(out.len().next_multiple_of(to), 0);
}

/// A received message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DbusMessage<'a> {
    /// The byte order of its body.
    pub order: ByteOrder,
    /// Its serial: its number among the messages of its sender.
    pub serial: NonZeroU32,
    /// Its header.
    pub header: DbusHeader<'a>,
    /// How many descriptors it has. A value of the type `h` in the body is an index into
    /// them.
    pub descriptors: usize,
    /// The values, as they were sent.
    pub body: &'a [u8],
}

impl<'a> DbusMessage<'a> {
    /// Parses a whole message.
    ///
    /// # Errors
    ///
    /// It violates the specification.
    pub fn parse(message: &'a [u8]) -> Result<Self, FramingError> {
        let layout = Layout::parse(message)?;
        Ok(layout.view(message))
    }

    /// Returns the text of an error: the first value of its body, if that is a string.
    pub fn error_text(&self) -> Option<&'a str> {
        let mut reader = Reader::new(self.body, self.order);
        match self.header.signature.as_bytes().first() {
            Some(b's') => {
                let text = reader.string(false).ok()?;
                str::from_utf8(&self.body[text]).ok()
            }
            _ => None,
        }
    }
}

/// Returns the length of the message that `input` begins with, or `None` if it is not known
/// yet.
pub(super) fn length_of(input: &[u8], longest: usize) -> Result<Option<usize>, FramingError> {
    let order = match input.first() {
        None => return Ok(None),
        Some(b'l') => ByteOrder::Little,
        Some(b'B') => ByteOrder::Big,
        Some(_) => return Err(malformed("an unknown byte order")),
    };
    if input.get(1) == Some(&0) {
        return Err(malformed("a message of the kind 0"));
    }
    if input.get(3).is_some_and(|version| *version != 1) {
        return Err(malformed("an unknown version"));
    }
    let Some((fixed, _)) = input.split_first_chunk::<FIXED>() else {
        return Ok(None);
    };
    let word = |at: usize| order.u32([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]);
    let (body, fields) = (u64::from(word(4)), u64::from(word(12)));
    let length = FIXED as u64 + fields.next_multiple_of(8) + body;
    if length > longest as u64 || fields > LONGEST_ARRAY as u64 {
        return Err(FramingError::TooLong {
            length: Some(length),
            limit: longest,
        });
    }
    Ok(Some(length as usize))
}

/// Where everything is in a message that was checked.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    order: ByteOrder,
    kind: DbusKind,
    flags: u8,
    serial: NonZeroU32,
    /// Path, interface, member, error name, destination, sender, signature. The index is
    /// the code of the field, minus one.
    texts: [Option<(u32, u32)>; 8],
    reply_serial: Option<NonZeroU32>,
    pub(super) descriptors: u32,
    body: usize,
}

impl Layout {
    pub(super) fn parse(message: &[u8]) -> Result<Self, FramingError> {
        let length = length_of(message, LONGEST_MESSAGE)?;
        if length != Some(message.len()) {
            return Err(malformed("a length that is not the message's"));
        }
        let order = match message[0] {
            b'l' => ByteOrder::Little,
            _ => ByteOrder::Big,
        };
        let mut reader = Reader::new(message, order);
        reader.at = 8;
        let serial = NonZeroU32::new(reader.u32()?).ok_or_else(|| malformed("the serial 0"))?;
        let fields = reader.u32()? as usize;
        let mut layout = Self {
            order,
            kind: match message[1] {
                1 => DbusKind::Call,
                2 => DbusKind::Return,
                3 => DbusKind::Error,
                4 => DbusKind::Signal,
                other => DbusKind::Other(other),
            },
            flags: message[2],
            serial,
            texts: [None; 8],
            reply_serial: None,
            descriptors: 0,
            body: FIXED + fields.next_multiple_of(8),
        };
        reader.bytes = &message[..FIXED + fields];
        while reader.at < reader.bytes.len() {
            layout.parse_field(&mut reader)?;
        }
        reader.bytes = &message[..layout.body];
        reader.align(8)?;
        let header = layout.view(message).header;
        header.check().map_err(malformed)?;
        if header.signature.is_empty() && layout.body < message.len() {
            return Err(malformed("a body without a signature"));
        }
        Ok(layout)
    }

    fn parse_field(&mut self, reader: &mut Reader<'_>) -> Result<(), FramingError> {
        reader.align(8)?;
        let code = reader.u8()?;
        let signature = reader.string(true)?;
        let kind = &reader.bytes[signature];
        let wanted: &[u8] = match code {
            0 => return Err(malformed("a field of the number 0")),
            PATH => b"o",
            INTERFACE | MEMBER | ERROR_NAME | DESTINATION | SENDER => b"s",
            REPLY_SERIAL | DESCRIPTORS => b"u",
            SIGNATURE => b"g",
            // Of a later version of the specification.
            _ => match names::complete_type(kind, 0, 0) {
                Some((_, [])) => return reader.skip(kind, 0),
                _ => return Err(malformed("a field of no type")),
            },
        };
        if kind != wanted {
            return Err(malformed("a field of another type"));
        }
        match code {
            REPLY_SERIAL => self.reply_serial = NonZeroU32::new(reader.u32()?),
            DESCRIPTORS => self.descriptors = reader.u32()?,
            _ => {
                let text = reader.string(code == SIGNATURE)?;
                if str::from_utf8(&reader.bytes[text.clone()]).is_err() {
                    return Err(malformed("a field that is no UTF-8"));
                }
                self.texts[usize::from(code) - 1] = Some((text.start as u32, text.end as u32));
            }
        }
        Ok(())
    }

    pub(super) fn view<'a>(&self, message: &'a [u8]) -> DbusMessage<'a> {
        let text = |code: u8| {
            let (start, end) = self.texts[usize::from(code) - 1]?;
            str::from_utf8(&message[start as usize..end as usize]).ok()
        };
        DbusMessage {
            order: self.order,
            serial: self.serial,
            header: DbusHeader {
                kind: self.kind,
                no_reply: self.flags & 1 != 0,
                no_auto_start: self.flags & 2 != 0,
                allows_interaction: self.flags & 4 != 0,
                path: text(PATH),
                interface: text(INTERFACE),
                member: text(MEMBER),
                error_name: text(ERROR_NAME),
                reply_serial: self.reply_serial,
                destination: text(DESTINATION),
                sender: text(SENDER),
                signature: text(SIGNATURE).unwrap_or_default(),
            },
            descriptors: self.descriptors as usize,
            body: &message[self.body..],
        }
    }
}

/// Reads values, one after the other.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    order: ByteOrder,
}

impl<'a> Reader<'a> {
    fn new(bytes: &'a [u8], order: ByteOrder) -> Self {
        Self {
            bytes,
            at: 0,
            order,
        }
    }

    fn take(&mut self, count: usize) -> Result<Range<usize>, FramingError> {
        let end = self.at.checked_add(count);
        let end = end.filter(|end| *end <= self.bytes.len());
        let taken = self.at..end.ok_or_else(|| malformed("a value beyond the end"))?;
        self.at = taken.end;
        Ok(taken)
    }

    fn align(&mut self, to: usize) -> Result<(), FramingError> {
        let padding = self.take(self.at.next_multiple_of(to) - self.at)?;
        match self.bytes[padding].iter().all(|it| *it == 0) {
            true => Ok(()),
            false => Err(malformed("padding that is not zero")),
        }
    }

    fn u8(&mut self) -> Result<u8, FramingError> {
        let at = self.take(1)?;
        Ok(self.bytes[at.start])
    }

    fn u32(&mut self) -> Result<u32, FramingError> {
        self.align(4)?;
        let at = self.take(4)?.start;
        let bytes = &self.bytes[at..];
        Ok(self.order.u32([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    /// Returns where a string is, or a signature, which has a short length.
    fn string(&mut self, is_signature: bool) -> Result<Range<usize>, FramingError> {
        let length = match is_signature {
            true => self.u8()?.into(),
            false => self.u32()? as usize,
        };
        let text = self.take(length)?;
        let is_ended = self.u8()? == 0;
        match is_ended && !self.bytes[text.clone()].contains(&0) {
            true => Ok(text),
            false => Err(malformed("a string with no zero, or another, at its end")),
        }
    }

    /// Skips one value of this complete type. `depth` also counts variants in variants,
    /// which no signature shows.
    fn skip(&mut self, kind: &[u8], depth: u8) -> Result<(), FramingError> {
        if depth > 64 {
            return Err(malformed("values too deep in each other"));
        }
        match kind[0] {
            b'y' => self.take(1).map(drop),
            b'n' | b'q' => self.align(2).and_then(|()| self.take(2)).map(drop),
            b'b' | b'i' | b'u' | b'h' => self.u32().map(drop),
            b'x' | b't' | b'd' => self.align(8).and_then(|()| self.take(8)).map(drop),
            b's' | b'o' => self.string(false).map(drop),
            b'g' => self.string(true).map(drop),
            b'v' => {
                let inner = self.string(true)?;
                let inner = &self.bytes[inner];
                match names::complete_type(inner, 0, 0) {
                    Some((_, [])) => self.skip(inner, depth + 1),
                    _ => Err(malformed("a variant of no type")),
                }
            }
            b'a' => {
                let length = self.u32()? as usize;
                let element = &kind[1..];
                if b"xtd({".contains(&element[0]) {
                    self.align(8)?;
                }
                // What it holds is skipped with it; nothing of it is looked at.
                self.take(length).map(drop)
            }
            _ => {
                self.align(8)?;
                let mut rest = &kind[1..kind.len() - 1];
                while let Some((first, behind)) = names::complete_type(rest, 0, 0) {
                    self.skip(first, depth + 1)?;
                    rest = behind;
                }
                Ok(())
            }
        }
    }
}

/// Makes a body of one string.
pub(super) fn string_body(order: ByteOrder, text: &str) -> Vec<u8> {
    let mut body = Vec::with_capacity(text.len() + 5);
    body.extend(order.bytes(text.len() as u32));
    body.extend(text.as_bytes());
    body.push(0);
    body
}

pub(super) fn malformed(what: &'static str) -> FramingError {
    FramingError::Malformed { what }
}
