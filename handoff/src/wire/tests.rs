use std::fs::File;
use std::os::fd::AsFd;

use proptest::prelude::*;
use rustix::fs::fstat;

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

/// A descriptor that can be told from all others.
fn descriptor() -> OwnedFd {
    rustix::fs::memfd_create("one of many", rustix::fs::MemfdFlags::empty()).expect("a memfd")
}

fn identity(fd: impl AsFd) -> u64 {
    fstat(fd).expect("it is open").st_ino
}

/// Everything that is whole: the messages with the identities of their
/// descriptors, and how many they lost.
fn whole(decoder: &mut Decoder) -> Result<Vec<(Note, Vec<u64>, usize)>, WireError> {
    let mut all = Vec::new();
    while let Some(frame) = decoder.next()? {
        let message = decode_payload(frame.kind, 1, frame.payload)?;
        let descriptors = frame.descriptors.iter().map(identity).collect();
        all.push((message, descriptors, frame.lost));
    }
    Ok(all)
}

fn first_error(bytes: &[u8]) -> Option<WireError> {
    let mut decoder = Decoder::new(1000);
    decoder.feed(bytes);
    whole(&mut decoder).err()
}

#[test]
fn layout_of_a_frame_is_as_documented() {
    let bytes = frame(&note(0x0102, b"ab"), 3);
    assert_eq!(bytes, [0, 0, 0, 6, 1, 2, 1, 3, 0, 0, 0, 2, b'a', b'b']);
}

#[test]
fn frames_cut_anywhere_have_their_own_descriptors() {
    let messages = [
        (note(1, b"none"), 0),
        (note(2, b"one"), 1),
        (note(3, b""), 2),
        (note(4, b"last"), 1),
    ];
    let bytes: Vec<Vec<u8>> = messages
        .iter()
        .map(|(message, count)| frame(message, *count))
        .collect();
    let length: usize = bytes.iter().map(Vec::len).sum();
    for cut in 1..length {
        let mut decoder = Decoder::new(1000);
        let mut got = Vec::new();
        let mut wanted = Vec::new();
        let mut position = 0;
        for ((message, count), bytes) in messages.iter().zip(&bytes) {
            let descriptors: Vec<_> = (0..*count).map(|_| descriptor()).collect();
            let identities: Vec<_> = descriptors.iter().map(identity).collect();
            wanted.push((message.clone(), identities, 0));
            // As the kernel does: they come with the first byte.
            decoder.descriptors(descriptors);
            let cut = cut.clamp(position, position + bytes.len()) - position;
            position += bytes.len();
            for piece in [&bytes[..cut], &bytes[cut..]] {
                if !piece.is_empty() {
                    decoder.feed(piece);
                    got.extend(whole(&mut decoder).expect("well formed"));
                }
            }
        }
        assert_eq!(got, wanted, "cut at {cut}");
        assert!(!decoder.is_inside_frame());
    }
}

#[test]
fn lost_descriptors_cost_their_own_frame_only() {
    let mut decoder = Decoder::new(1000);
    let kept = descriptor();
    let wanted = identity(&kept);
    decoder.feed(&frame(&note(1, b"plain"), 0));
    decoder.truncated();
    decoder.feed(&frame(&note(2, b"lost"), 2));
    decoder.descriptors([kept]);
    decoder.feed(&frame(&note(3, b"kept"), 1));
    let got = whole(&mut decoder).expect("well formed");
    let summary: Vec<_> = got
        .iter()
        .map(|(message, descriptors, lost)| (message.kind, descriptors.clone(), *lost))
        .collect();
    assert_eq!(
        summary,
        [(1, vec![], 0), (2, vec![], 2), (3, vec![wanted], 0)]
    );
}

#[test]
fn descriptors_without_an_owner_break_the_framing() {
    let mut decoder = Decoder::new(1000);
    decoder.descriptors([descriptor()]);
    decoder.feed(&frame(&note(1, b""), 0));
    assert_eq!(
        whole(&mut decoder),
        Err(WireError::DescriptorsUnannounced { count: 1 })
    );
    assert_eq!(decoder.clear().len(), 1);
}

#[test]
fn descriptors_beyond_those_of_the_frame_that_has_begun_break_the_framing() {
    let mut decoder = Decoder::new(1000);
    decoder.descriptors([descriptor(), descriptor()]);
    let bytes = frame(&note(1, b"abc"), 2);
    decoder.feed(&bytes[..10]);
    assert_eq!(whole(&mut decoder), Ok(vec![]));
    decoder.descriptors([descriptor()]);
    decoder.feed(&bytes[10..11]);
    assert_eq!(
        whole(&mut decoder),
        Err(WireError::DescriptorsUnannounced { count: 1 })
    );
}

#[test]
fn a_frame_without_its_descriptors_breaks_the_framing() {
    let mut decoder = Decoder::new(1000);
    decoder.descriptors([descriptor()]);
    decoder.feed(&frame(&note(1, b""), 2));
    assert_eq!(
        whole(&mut decoder),
        Err(WireError::DescriptorsMissing {
            announced: 2,
            received: 1
        })
    );
}

#[test]
fn a_frame_that_lost_some_of_its_descriptors_only_breaks_the_framing() {
    let mut decoder = Decoder::new(1000);
    decoder.descriptors([descriptor()]);
    decoder.truncated();
    decoder.feed(&frame(&note(1, b""), 2));
    assert_eq!(
        whole(&mut decoder),
        Err(WireError::DescriptorsMissing {
            announced: 2,
            received: 1
        })
    );
}

#[test]
fn what_is_no_frame_is_a_typed_error() {
    let good = frame(&note(1, b"abc"), 0);
    let with = |position: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[position] = value;
        first_error(&bytes)
    };
    assert_eq!(first_error(&good), None);
    assert_eq!(with(6, 2), Some(WireError::UnknownVersion { version: 2 }));
    assert_eq!(
        with(7, 254),
        Some(WireError::TooManyDescriptors { count: 254 })
    );
    assert_eq!(
        with(2, 4),
        Some(WireError::TooLong {
            length: 4 * 256 + 7,
            max: 1000
        })
    );
    // The inner length says more, and less, than there is.
    assert_eq!(with(11, 4), Some(WireError::Truncated));
    assert_eq!(with(11, 2), Some(WireError::Surplus { bytes: 1 }));
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
    let mut decoder = Decoder::new(usize::MAX);
    let file = File::open("/dev/null").expect("Linux has it");
    let copy = |_| file.try_clone().expect("a copy").into();
    decoder.descriptors((0..MAX_DESCRIPTORS).map(copy));
    decoder.feed(&bytes);
    let got = whole(&mut decoder).expect("well formed");
    assert_eq!(got.len(), 1);
    assert!(got[0].0 == longest);
    assert_eq!(got[0].1.len(), MAX_DESCRIPTORS);

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
    let mut decoder = Decoder::new(1000);
    decoder.feed(&bytes);
    let got = whole(&mut decoder).expect("well formed");
    let got: Vec<_> = got.into_iter().map(|(message, _, _)| message).collect();
    assert_eq!(got, messages);
}

#[test]
fn what_is_wrong_is_said_with_its_numbers() {
    for (error, text) in [
        (
            WireError::UnknownVersion { version: 2 },
            "frame of unknown version 2",
        ),
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
        (
            WireError::DescriptorsMissing {
                announced: 2,
                received: 1,
            },
            "frame owns 2 descriptors, and 1 came",
        ),
        (
            WireError::DescriptorsUnannounced { count: 3 },
            "3 descriptors that no frame owns",
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

#[test]
fn memory_of_long_frames_is_given_back() {
    for (length, is_kept) in [
        (KEPT_CAPACITY, true),
        (KEPT_CAPACITY + 1, false),
        (1 << 20, false),
    ] {
        let mut decoder = Decoder::new(MAX_PAYLOAD);
        let bytes = frame(&note(1, &vec![0; length - HEADER_BYTES - 4]), 0);
        assert_eq!(bytes.len(), length);
        decoder.feed(&bytes);
        assert_eq!(whole(&mut decoder).expect("well formed").len(), 1);
        let kept = if is_kept { length } else { 0 };
        assert_eq!(decoder.bytes.capacity(), kept, "of {length}");
    }
}

#[test]
fn memory_does_not_grow_where_no_read_ends_with_a_frame() {
    let bytes = frame(&note(1, &[7; 100]), 0);
    let (begin, end) = bytes.split_at(50);
    let mut decoder = Decoder::new(1000);
    decoder.feed(begin);
    for _ in 0..1000 {
        decoder.feed(&[end, begin].concat());
        assert_eq!(whole(&mut decoder).expect("well formed").len(), 1);
    }
    assert!(decoder.bytes.capacity() < 4 * bytes.len());
}

proptest! {
    /// Note bytes, cut anywhere, with any descriptors between, are frames or an
    /// error; never a panic, and never more descriptors out than in.
    #[test]
    fn anything_is_frames_or_an_error(
        pieces in prop::collection::vec(
            (prop::collection::vec(prop_oneof![any::<u8>(), Just(0), Just(1)], 0..24), 0..3_usize, any::<bool>()),
            0..8,
        ),
    ) {
        let file = File::open("/dev/null").expect("Linux has it");
        let mut decoder = Decoder::new(64);
        let (mut given, mut taken) = (0, 0);
        for (bytes, descriptors, truncated) in pieces {
            if truncated {
                decoder.truncated();
            }
            given += descriptors;
            decoder.descriptors((0..descriptors).map(|_| file.try_clone().expect("a copy").into()));
            decoder.feed(&bytes);
            let ended = loop {
                match decoder.next() {
                    Ok(Some(frame)) => taken += frame.descriptors.len(),
                    Ok(None) => break false,
                    Err(_) => break true,
                }
            };
            if ended {
                break;
            }
            prop_assert!(decoder.arrived.len() <= MAX_DESCRIPTORS);
        }
        prop_assert!(taken + decoder.clear().len() <= given);
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
        let file = File::open("/dev/null").expect("Linux has it");
        let mut decoder = Decoder::new(64);
        let mut got = Vec::new();
        for (kind, payload, descriptors) in &messages {
            decoder.descriptors((0..*descriptors).map(|_| file.try_clone().expect("a copy").into()));
            for bytes in frame(&note(*kind, payload), *descriptors).chunks(piece) {
                decoder.feed(bytes);
                while let Some(frame) = decoder.next().expect("well formed") {
                    let message: Note = decode_payload(frame.kind, 1, frame.payload).expect("well formed");
                    got.push((message.kind, message.payload, frame.descriptors.len()));
                }
            }
        }
        prop_assert_eq!(got, messages);
    }
}
