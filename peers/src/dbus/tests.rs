//! Bytes as the specification has them, and bytes that are not.

use std::num::NonZeroU32;

use bowline::framing::{FrameBuffer, FramingError};

use super::*;

/// What a client of a bus sends first, written by hand after the specification.
fn hello(order: ByteOrder) -> Vec<u8> {
    let number = |it: u32| order.bytes(it);
    let mark = if order == ByteOrder::Little {
        b'l'
    } else {
        b'B'
    };
    let mut bytes = vec![mark, 1, 0, 1];
    bytes.extend(number(0)); // body
    bytes.extend(number(1)); // serial
    bytes.extend(number(109)); // fields
    for (code, kind, text, padding) in [
        (1, b'o', "/org/freedesktop/DBus", 2),
        (2, b's', "org.freedesktop.DBus", 3),
        (3, b's', "Hello", 2),
        (6, b's', "org.freedesktop.DBus", 0),
    ] {
        bytes.extend([code, 1, kind, 0]);
        bytes.extend(number(text.len() as u32));
        bytes.extend(text.as_bytes());
        bytes.resize(bytes.len() + 1 + padding, 0);
    }
    bytes.resize(128, 0);
    bytes
}

fn hello_header() -> DbusHeader<'static> {
    DbusHeader::call("/org/freedesktop/DBus", "Hello")
        .interface("org.freedesktop.DBus")
        .destination("org.freedesktop.DBus")
}

#[test]
fn message_is_written_and_read_as_by_hand_in_both_orders() {
    for order in [ByteOrder::Little, ByteOrder::Big] {
        let by_hand = hello(order);
        let mut written = Vec::new();
        let header = hello_header();
        header
            .encode(order, NonZeroU32::MIN, 0, 0, &mut written)
            .unwrap();
        assert_eq!(written, by_hand, "{order:?}");
        let read = DbusMessage::parse(&by_hand).unwrap();
        assert_eq!(read.header, header);
        assert_eq!(
            (read.order, read.serial.get(), read.descriptors),
            (order, 1, 0)
        );
        assert!(read.body.is_empty());
    }
}

fn everything(order: ByteOrder) -> Vec<u8> {
    let header = DbusHeader {
        no_reply: true,
        no_auto_start: true,
        allows_interaction: true,
        path: Some("/a/b"),
        interface: Some("a.b"),
        member: Some("M"),
        error_name: Some("a.b.Wrong"),
        reply_serial: NonZeroU32::new(7),
        destination: Some(":1.2"),
        sender: Some("c.d-e"),
        signature: "sh",
        ..hello_header()
    };
    let mut body = order.bytes(3).to_vec();
    body.extend(b"abc\0");
    body.extend(order.bytes(0));
    let mut bytes = Vec::new();
    header
        .encode(order, NonZeroU32::MAX, body.len(), 1, &mut bytes)
        .unwrap();
    assert_eq!(bytes.len() % 8, 0);
    let read = bytes.clone();
    bytes.extend(body);
    let message = DbusMessage::parse(&bytes).unwrap();
    assert_eq!(message.header, header);
    assert_eq!((message.serial, message.descriptors), (NonZeroU32::MAX, 1));
    assert_eq!(message.body, &bytes[read.len()..]);
    assert_eq!(message.error_text(), Some("abc"));
    bytes
}

#[test]
fn all_fields_come_back_as_they_were() {
    everything(ByteOrder::Little);
    everything(ByteOrder::Big);
}

#[test]
fn no_change_of_a_byte_and_no_cut_is_taken_for_more_than_it_is() {
    for order in [ByteOrder::Little, ByteOrder::Big] {
        let good = everything(order);
        for at in 0..good.len() {
            for value in [0, 1, 7, 9, b'a', b'v', b'(', 0x7f, 0xff] {
                let mut bytes = good.clone();
                bytes[at] = value;
                // It is read or refused; nothing is read beyond it.
                if let Ok(message) = DbusMessage::parse(&bytes) {
                    assert!(message.body.len() < bytes.len());
                }
            }
            assert!(DbusMessage::parse(&good[..at]).is_err(), "cut at {at}");
        }
    }
}

fn refusal(change: impl FnOnce(&mut Vec<u8>)) -> FramingError {
    let mut bytes = hello(ByteOrder::Little);
    change(&mut bytes);
    DbusMessage::parse(&bytes).unwrap_err()
}

#[test]
fn messages_that_are_none_are_refused() {
    let malformed = |what| FramingError::Malformed { what };
    assert_eq!(
        refusal(|it| it[0] = b'L'),
        malformed("an unknown byte order")
    );
    assert_eq!(
        refusal(|it| it[1] = 0),
        malformed("a message of the kind 0")
    );
    assert_eq!(refusal(|it| it[3] = 2), malformed("an unknown version"));
    assert_eq!(refusal(|it| it[8] = 0), malformed("the serial 0"));
    assert_eq!(
        refusal(|it| it[16] = 0),
        malformed("a field of the number 0")
    );
    assert_eq!(
        refusal(|it| it[18] = b's'),
        malformed("a field of another type")
    );
    assert_eq!(refusal(|it| it[24] = b'x'), malformed("a bad path"));
    assert_eq!(
        refusal(|it| it[25] = 0xff),
        malformed("a field that is no UTF-8")
    );
    assert_eq!(
        refusal(|it| it[46] = 1),
        malformed("padding that is not zero")
    );
    // A signal has to have an interface, a return what it answers.
    let lacking = malformed("a header without a field of its kind");
    assert_eq!(refusal(|it| it[1] = 2), lacking);
    assert_eq!(
        refusal(|it| it.extend([0; 4])),
        malformed("a length that is not the message's")
    );
    let body = |it: &mut Vec<u8>| {
        it[4] = 4;
        it.extend([0; 4]);
    };
    assert_eq!(refusal(body), malformed("a body without a signature"));
}

/// A field of a later version of the specification, of any type.
#[test]
fn fields_that_are_not_known_are_passed() {
    for (signature, value) in [
        ("(yai)", &[5, 0, 0, 0, 4, 0, 0, 0, 9, 9, 9, 9][..]),
        ("v", &[1, b'y', 0, 7]),
        ("t", &[1; 8]),
        ("ax", &[0, 0, 0, 0]),
        ("a{sv}", &[0, 0, 0, 0]),
    ] {
        let mut bytes = hello(ByteOrder::Little);
        let fields = bytes.len() - 16;
        bytes.extend([200, signature.len() as u8]);
        bytes.extend(signature.as_bytes());
        bytes.push(0);
        let align = match signature {
            "v" => 1,
            "ax" | "a{sv}" => 4,
            _ => 8,
        };
        bytes.resize(bytes.len().next_multiple_of(align), 0);
        bytes.extend(value);
        // Of 8 bytes each, wherever it begins.
        if signature.starts_with("a") {
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        let length = (bytes.len() - 16) as u32;
        assert!(length as usize > fields);
        bytes[12..16].copy_from_slice(&length.to_le_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        let read = DbusMessage::parse(&bytes);
        assert_eq!(read.map(|it| it.header), Ok(hello_header()), "{signature}");
    }
}

#[test]
fn nothing_malformed_is_sent() {
    let mut out = Vec::new();
    let mut encode = |header: DbusHeader<'_>, body| {
        header.encode(ByteOrder::NATIVE, NonZeroU32::MIN, body, 0, &mut out)
    };
    assert!(encode(hello_header(), 0).is_ok());
    for header in [
        DbusHeader::call("org", "Hello"),
        DbusHeader::call("/org", "He.llo"),
        DbusHeader::signal("/org", "org", "Hello"),
        hello_header().destination("nobody"),
        hello_header().signature("a"),
    ] {
        assert!(encode(header, 0).is_err(), "{header:?}");
    }
    assert!(encode(hello_header(), LONGEST_MESSAGE - 128).is_ok());
    let error = encode(hello_header(), LONGEST_MESSAGE - 127).unwrap_err();
    assert!(error.to_string().contains("does not fit"), "{error}");
}

#[test]
fn lines_and_messages_are_found_wherever_they_are_cut() {
    let lines = b"\0AUTH EXTERNAL 30\r\nBEGIN\r\n";
    let messages = [everything(ByteOrder::Big), hello(ByteOrder::Little)].concat();
    for size in 1..80 {
        let mut buffer = FrameBuffer::new(DbusFramer::of_lines());
        let mut found = Vec::new();
        for mut piece in lines.chunks(size) {
            while let Some(line) = buffer.next_frame(&mut piece).unwrap() {
                found.push(line.to_vec());
            }
        }
        assert_eq!(found, [&b"\0AUTH EXTERNAL 30"[..], b"BEGIN"], "{size}");
        buffer.framer_mut().begin_messages();
        let mut found = Vec::new();
        for mut piece in messages.chunks(size) {
            while let Some(message) = buffer.next_frame(&mut piece).unwrap() {
                found.extend_from_slice(message);
            }
        }
        assert_eq!(found, messages, "{size}");
    }
}

#[test]
fn lines_and_messages_that_are_too_long_are_refused_before_they_have_come() {
    let mut buffer = FrameBuffer::new(DbusFramer::of_lines());
    let line = [b'x'; 16 * 1_024];
    assert_eq!(buffer.next_frame(&mut &line[..]), Ok(None));
    assert!(buffer.next_frame(&mut &b"x"[..]).is_err());
    let mut buffer = FrameBuffer::new(DbusFramer::of_lines());
    assert_eq!(buffer.next_frame(&mut &line[..]), Ok(None));
    let whole = buffer.next_frame(&mut &b"\r\n"[..]);
    assert_eq!(whole.map(|it| it.map(<[u8]>::len)), Ok(Some(line.len())));

    let framer = DbusFramer::of_messages().with_max_length(127);
    let mut buffer = FrameBuffer::new(framer);
    let begins = &hello(ByteOrder::Little)[..16];
    let error = buffer.next_frame(&mut &begins[..]).unwrap_err();
    let (length, limit) = (Some(128), 127);
    assert_eq!(error, FramingError::TooLong { length, limit });
}

#[test]
fn addresses_of_buses_are_read() {
    let path = |it: &str| Some(UnixAddress::Path(it.into()));
    assert_eq!(unix_address("unix:path=/run/bus,guid=1f"), path("/run/bus"));
    assert_eq!(
        unix_address("tcp:host=a;unix:guid=1,path=/b%20c"),
        path("/b c")
    );
    let name = Some(UnixAddress::Abstract(b"x".to_vec()));
    assert_eq!(unix_address("unix:abstract=x"), name);
    for none in [
        "",
        "tcp:host=a",
        "unix:tmpdir=/tmp",
        "unix:path=%zz",
        "autolaunch:",
    ] {
        assert_eq!(unix_address(none), None, "{none}");
    }
}
