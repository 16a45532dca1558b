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
fn cleared_memory_is_given_back() {
    let mut decoder = Decoder::new(MAX_PAYLOAD);
    decoder.feed(&frame(&note(1, &vec![0; 1 << 20]), 0));
    assert_eq!(whole(&mut decoder).expect("well formed").len(), 1);
    assert_eq!(decoder.bytes.capacity(), 0);
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
