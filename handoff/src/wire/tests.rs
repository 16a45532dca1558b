use bowline_protocol::framing::FrameBuffer;
use proptest::prelude::*;

use super::*;

/// A message of any kind and payload.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Note {
    kind: u16,
    payload: Vec<u8>,
}

impl Message for Note {
    fn kind(&self) -> u16 {
        self.kind
    }

    fn encode(&self, payload: &mut PayloadWriter<'_>) {
        payload.bytes(&self.payload);
    }

    fn decode(kind: u16, _: u16, payload: &mut PayloadReader<'_>) -> Result<Self, WireError> {
        let payload = payload.bytes()?.to_vec();
        Ok(Self { kind, payload })
    }
}

fn note(kind: u16, payload: &[u8]) -> Note {
    Note {
        kind,
        payload: payload.to_vec(),
    }
}

fn frame(message: &Note, descriptors: usize) -> Vec<u8> {
    let mut frame = Vec::new();
    encode_frame(message, descriptors, &mut frame).expect("it fits");
    frame
}

/// Every message that is whole, and how many descriptors it claims; how many
/// bytes are left.
fn whole(
    max_payload: usize,
    pieces: &[&[u8]],
) -> Result<(Vec<(Note, usize)>, usize), FramingError> {
    let mut buffer = FrameBuffer::new(WireFramer::new(max_payload));
    let framer = WireFramer::new(max_payload);
    let mut all = Vec::new();
    for mut piece in pieces.iter().copied() {
        while let Some(frame) = buffer.next_frame(&mut piece)? {
            let (kind, payload) = kind_and_payload(frame).expect("it is whole");
            let message = decode_payload(kind, 1, payload).expect("well formed");
            all.push((message, framer.claims(frame).expect("it says so")));
        }
    }
    Ok((all, buffer.len()))
}

#[test]
fn layout_of_a_frame_is_as_documented() {
    let bytes = frame(&note(0x0102, b"ab"), 3);
    assert_eq!(bytes, [0, 0, 0, 6, 1, 2, 1, 3, 0, 0, 0, 2, b'a', b'b']);
}

#[test]
fn what_is_no_frame_is_a_typed_error() {
    let good = frame(&note(1, b"abc"), 0);
    let with = |position: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[position] = value;
        whole(1000, &[&bytes]).err()
    };
    let what = "frame of an unknown version";
    assert_eq!(with(0, 0), None);
    assert_eq!(with(6, 2), Some(FramingError::Malformed { what }));
    let limit = 253;
    let too_many = FramingError::TooManyDescriptors { limit };
    assert_eq!(with(7, 254), Some(too_many));
    let (length, limit) = (Some(4 * 256 + 7), 1000);
    assert_eq!(with(2, 4), Some(FramingError::TooLong { length, limit }));
    // The inner length says more, and less, than there is.
    for (value, error) in [
        (4, WireError::Truncated),
        (2, WireError::Surplus { bytes: 1 }),
    ] {
        let mut bytes = good.clone();
        bytes[11] = value;
        let (kind, payload) = kind_and_payload(&bytes).expect("it has a header");
        assert_eq!(decode_payload::<Note>(kind, 1, payload), Err(error));
    }
    assert_eq!(kind_and_payload(&good[..7]), Err(WireError::Truncated));
}

#[test]
fn what_does_not_fit_into_a_frame_is_refused_whole() {
    let mut out = b"before".to_vec();
    assert_eq!(
        encode_frame(&note(1, b""), 254, &mut out),
        Err(WireError::TooManyDescriptors { count: 254 })
    );
    let long = note(1, &vec![0; MAX_PAYLOAD]);
    assert!(matches!(
        encode_frame(&long, 0, &mut out),
        Err(WireError::TooLong { .. })
    ));
    assert_eq!(out, b"before");
}

#[test]
fn frames_of_the_greatest_length_and_number_of_descriptors_are_whole() {
    // Four bytes of the payload say how long the note is.
    let longest = note(1, &vec![0; MAX_PAYLOAD - 4]);
    let bytes = frame(&longest, MAX_DESCRIPTORS);
    let (got, left) = whole(usize::MAX, &[&bytes]).expect("well formed");
    assert!(got == [(longest, MAX_DESCRIPTORS)] && left == 0);

    let longer = note(1, &vec![0; MAX_PAYLOAD - 3]);
    assert_eq!(
        encode_frame(&longer, 0, &mut Vec::new()),
        Err(WireError::TooLong {
            length: MAX_PAYLOAD + 1,
            max: MAX_PAYLOAD
        })
    );
}

#[test]
fn frame_is_appended_behind_others() {
    let messages = [note(1, b"first"), note(2, b"second"), note(3, b"")];
    let mut bytes = Vec::new();
    for message in &messages {
        encode_frame(message, 0, &mut bytes).expect("it fits");
    }
    let (got, _) = whole(1000, &[&bytes]).expect("well formed");
    let got: Vec<_> = got.into_iter().map(|(message, _)| message).collect();
    assert_eq!(got, messages);
}

#[test]
fn what_is_wrong_is_said_with_its_numbers() {
    for (error, text) in [
        (
            WireError::UnknownKind { kind: 0x8001 },
            "message of unknown kind 0x8001",
        ),
        (
            WireError::TooLong { length: 9, max: 8 },
            "payload of 9 bytes, where 8 are accepted",
        ),
        (
            WireError::TooManyDescriptors { count: 254 },
            "254 descriptors are more than a frame can own",
        ),
        (WireError::Truncated, "payload ends inside of a value"),
        (
            WireError::Surplus { bytes: 4 },
            "4 bytes behind the message",
        ),
        (
            WireError::Malformed { what: "address" },
            "malformed address",
        ),
    ] {
        assert_eq!(error.to_string(), text);
        let unsent = SendError {
            kind: SendErrorKind::Wire(error),
            descriptors: Vec::new(),
        };
        assert_eq!(
            unsent.to_string(),
            format!("message does not fit into a frame: {text}")
        );
        assert_eq!(unsent.source().expect("the error").to_string(), text);
    }
    let refused = SendDescriptorErrorKind::NotConnected;
    let unsent = SendError {
        kind: SendErrorKind::Transport(refused),
        descriptors: Vec::new(),
    };
    assert_eq!(
        unsent.to_string(),
        "channel does not take the message: connection is lost or closing"
    );
    assert_eq!(
        unsent.source().expect("the error").to_string(),
        refused.to_string()
    );
}

#[test]
fn addresses_come_back_as_they_were() {
    let addresses = [
        None,
        Some("127.0.0.1:80".parse().expect("an address")),
        Some("[fe80::1]:65535".parse().expect("an address")),
        Some(SocketAddrV6::new(Ipv6Addr::LOCALHOST, 1, 2, 3).into()),
    ];
    let mut bytes = Vec::new();
    let mut writer = PayloadWriter::new(&mut bytes);
    for address in addresses {
        writer.socket_address(address);
    }
    let mut reader = PayloadReader::new(&bytes);
    for address in addresses {
        assert_eq!(reader.socket_address(), Ok(address));
    }
    assert_eq!(reader.finish(), Ok(()));
}

proptest! {
    /// Any bytes, cut anywhere, are frames or an error; never a panic.
    #[test]
    fn anything_is_frames_or_an_error(
        pieces in prop::collection::vec(
            prop::collection::vec(prop_oneof![any::<u8>(), Just(0), Just(1)], 0..24),
            0..8,
        ),
    ) {
        let mut buffer = FrameBuffer::new(WireFramer::new(64));
        let mut taken = 0;
        'all: for piece in &pieces {
            let mut input = &piece[..];
            loop {
                match buffer.next_frame(&mut input) {
                    Ok(Some(frame)) => taken += frame.len(),
                    Ok(None) => break,
                    Err(_) => break 'all,
                }
            }
        }
        prop_assert!(taken <= pieces.concat().len());
    }

    /// Frames of any number and size, with any number of descriptors, split
    /// anywhere.
    #[test]
    fn any_frames_in_any_pieces_come_out_whole(
        messages in prop::collection::vec(
            (any::<u16>(), prop::collection::vec(any::<u8>(), 0..40), 0..4_usize),
            1..8,
        ),
        piece in 1..60_usize,
    ) {
        let mut bytes = Vec::new();
        let mut expected = Vec::new();
        for (kind, payload, descriptors) in messages {
            let message = note(kind, &payload);
            bytes.extend(frame(&message, descriptors));
            expected.push((message, descriptors));
        }
        let pieces: Vec<_> = bytes.chunks(piece).collect();
        prop_assert_eq!(whole(64, &pieces), Ok((expected, 0)));
    }
}
