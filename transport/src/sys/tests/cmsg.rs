//! Control messages: bytes that no kernel would write, and those that it does.

use std::os::fd::{AsFd, AsRawFd};

use proptest::prelude::*;

use crate::sys::{
    CONTROL_BUFFER_BYTES, ControlBuffer, ControlMessage, Credentials, MAX_DESCRIPTORS, walk,
};

const WORD: usize = size_of::<usize>();
const HEADER: usize = WORD + 8;

/// A message as an independent hand would write it: header, payload, padding.
fn message(length: usize, level: i32, kind: i32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(level.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(payload);
    while !bytes.len().is_multiple_of(WORD) {
        bytes.push(0xAA);
    }
    bytes
}

fn rights(numbers: &[i32]) -> Vec<u8> {
    let payload: Vec<u8> = numbers.iter().flat_map(|n| n.to_ne_bytes()).collect();
    message(
        HEADER + payload.len(),
        libc::SOL_SOCKET,
        libc::SCM_RIGHTS,
        &payload,
    )
}

/// What a walk saw, in a form that compares.
#[derive(Clone, Debug, PartialEq)]
enum Seen {
    Descriptors(Vec<i32>),
    Credentials(Credentials),
    PidFd(i32),
    Segments(usize),
    Stamp,
    Unknown(i32, i32),
}

fn seen(bytes: &[u8]) -> Vec<Seen> {
    walk(bytes)
        .map(|message| match message {
            ControlMessage::Descriptors(numbers) => {
                let count = numbers.len();
                let numbers: Vec<i32> = numbers.collect();
                assert_eq!(numbers.len(), count);
                Seen::Descriptors(numbers)
            }
            ControlMessage::Credentials(credentials) => Seen::Credentials(credentials),
            ControlMessage::PidFd(number) => Seen::PidFd(number),
            ControlMessage::Segments(size) => Seen::Segments(size),
            ControlMessage::Stamp => Seen::Stamp,
            ControlMessage::Unknown { level, kind } => Seen::Unknown(level, kind),
        })
        .collect()
}

#[test]
fn a_stamp_is_one_whatever_time_it_says() {
    let stamp = message(HEADER + 16, libc::SOL_SOCKET, libc::SCM_TIMESTAMP, &[7; 16]);
    assert_eq!(seen(&stamp), [Seen::Stamp]);
}

#[test]
fn length_of_segments_is_a_number_that_makes_sense() {
    let said = |payload: &[u8]| {
        let length = HEADER + payload.len();
        seen(&message(length, libc::SOL_UDP, libc::UDP_GRO, payload))
    };
    assert_eq!(said(&1_200_i32.to_ne_bytes()), [Seen::Segments(1_200)]);
    let unknown = [Seen::Unknown(libc::SOL_UDP, libc::UDP_GRO)];
    assert_eq!(said(&(-1_i32).to_ne_bytes()), unknown);
    assert_eq!(said(&[1, 2]), unknown);
}

#[test]
fn sizes_are_those_of_the_c_library() {
    // SAFETY: arithmetic, no more.
    assert_eq!(unsafe { libc::CMSG_LEN(0) } as usize, HEADER);
    for count in [0, 1, 2, 15, 16, MAX_DESCRIPTORS] {
        let open = std::fs::File::open("/dev/null").unwrap();
        let mut control = ControlBuffer::new();
        let list = vec![open.as_fd(); count];
        let encoded = control.encode_descriptors(&list).unwrap();
        // SAFETY: arithmetic, no more.
        let space = unsafe { libc::CMSG_SPACE(4 * count as u32) } as usize;
        assert_eq!(encoded.len(), if count == 0 { 0 } else { space });
    }
    assert_eq!(align_of::<ControlBuffer>(), align_of::<libc::cmsghdr>());
}

#[test]
fn what_is_encoded_is_walked_to_the_same_numbers() {
    let open: Vec<_> = (0..MAX_DESCRIPTORS)
        .map(|_| std::fs::File::open("/dev/null").unwrap())
        .collect();
    let borrowed: Vec<_> = open.iter().map(AsFd::as_fd).collect();
    let numbers: Vec<i32> = open.iter().map(AsRawFd::as_raw_fd).collect();
    let mut control = ControlBuffer::new();
    // From many to few: what an earlier message left behind must not show.
    for count in (1..=MAX_DESCRIPTORS).rev() {
        let encoded = control.encode_descriptors(&borrowed[..count]).unwrap();
        assert_eq!(
            seen(encoded),
            [Seen::Descriptors(numbers[..count].to_vec())]
        );
    }
    assert_eq!(control.encode_descriptors(&[]).unwrap(), []);
}

#[test]
fn more_than_a_message_holds_is_not_encoded() {
    let open = std::fs::File::open("/dev/null").unwrap();
    let list = vec![open.as_fd(); MAX_DESCRIPTORS + 1];
    assert!(ControlBuffer::new().encode_descriptors(&list).is_none());
}

#[test]
fn numbers_in_a_control_buffer_are_not_printed() {
    assert_eq!(
        format!("{:?}", ControlBuffer::new()),
        "ControlBuffer { .. }"
    );
}

/// Contract S-25.
#[test]
fn several_messages_are_walked_in_order() {
    let mut ucred = Vec::new();
    ucred.extend(17_i32.to_ne_bytes());
    ucred.extend(1000_u32.to_ne_bytes());
    ucred.extend(100_u32.to_ne_bytes());
    let mut bytes = message(HEADER + 12, libc::SOL_SOCKET, libc::SCM_CREDENTIALS, &ucred);
    bytes.extend(rights(&[3, 4, 5]));
    bytes.extend(message(
        HEADER + 4,
        libc::SOL_SOCKET,
        4,
        &9_i32.to_ne_bytes(),
    ));
    bytes.extend(message(HEADER, 41, 7, &[]));
    bytes.extend(rights(&[6]));
    let expected = [
        Seen::Credentials(Credentials {
            pid: Some(17),
            uid: 1000,
            gid: 100,
        }),
        Seen::Descriptors(vec![3, 4, 5]),
        Seen::PidFd(9),
        Seen::Unknown(41, 7),
        Seen::Descriptors(vec![6]),
    ];
    assert_eq!(seen(&bytes), expected);

    // The same at every alignment.
    for shift in 1..WORD {
        let mut shifted = vec![0; shift];
        shifted.extend(&bytes);
        assert_eq!(seen(&shifted[shift..]), expected);
    }
}

#[test]
fn header_cut_short_ends_the_walk() {
    let whole = rights(&[3]);
    for end in 0..HEADER {
        assert_eq!(seen(&whole[..end]), []);
    }
    let mut two = rights(&[3, 4]);
    let first = two.len();
    two.extend(rights(&[5]));
    for end in first..first + HEADER {
        assert_eq!(seen(&two[..end]), [Seen::Descriptors(vec![3, 4])]);
    }
}

#[test]
fn payload_cut_short_yields_the_numbers_before_the_cut() {
    let whole = rights(&[3, 4]);
    for (end, numbers) in [
        (HEADER, vec![]),
        (HEADER + 3, vec![]),
        (HEADER + 4, vec![3]),
        (HEADER + 7, vec![3]),
        (HEADER + 8, vec![3, 4]),
    ] {
        assert_eq!(seen(&whole[..end]), [Seen::Descriptors(numbers)]);
    }
}

#[test]
fn length_that_no_header_fits_ends_the_walk() {
    for length in 0..HEADER {
        let mut bytes = message(length, libc::SOL_SOCKET, libc::SCM_RIGHTS, &[1; 16]);
        bytes.extend(rights(&[3]));
        assert_eq!(seen(&bytes), [], "length {length}");
    }
}

#[test]
fn length_beyond_the_end_stops_at_the_end() {
    let payload: Vec<u8> = [3_i32, 4].iter().flat_map(|n| n.to_ne_bytes()).collect();
    for length in [
        HEADER + 9,
        1 << 20,
        isize::MAX as usize,
        usize::MAX - WORD,
        usize::MAX - 1,
        usize::MAX,
    ] {
        let bytes = message(length, libc::SOL_SOCKET, libc::SCM_RIGHTS, &payload);
        assert_eq!(
            seen(&bytes),
            [Seen::Descriptors(vec![3, 4])],
            "length {length}"
        );
    }
}

/// Contract W-18.
#[test]
fn payload_that_is_no_multiple_of_four_loses_its_tail() {
    for stray in 1..4 {
        let mut payload = 3_i32.to_ne_bytes().to_vec();
        payload.extend(vec![0xFF; stray]);
        let mut bytes = message(
            HEADER + payload.len(),
            libc::SOL_SOCKET,
            libc::SCM_RIGHTS,
            &payload,
        );
        bytes.extend(rights(&[8]));
        assert_eq!(
            seen(&bytes),
            [Seen::Descriptors(vec![3]), Seen::Descriptors(vec![8])]
        );
    }
}

#[test]
fn credentials_and_pidfd_too_short_are_unknown() {
    let kind = libc::SCM_CREDENTIALS;
    let bytes = message(HEADER + 8, libc::SOL_SOCKET, kind, &[0; 8]);
    assert_eq!(seen(&bytes), [Seen::Unknown(libc::SOL_SOCKET, kind)]);
    let bytes = message(HEADER + 3, libc::SOL_SOCKET, 4, &[0; 3]);
    assert_eq!(seen(&bytes), [Seen::Unknown(libc::SOL_SOCKET, 4)]);
}

#[test]
fn process_zero_is_nobody() {
    let bytes = message(
        HEADER + 12,
        libc::SOL_SOCKET,
        libc::SCM_CREDENTIALS,
        &[0; 12],
    );
    let nobody = Credentials {
        pid: None,
        uid: 0,
        gid: 0,
    };
    assert_eq!(seen(&bytes), [Seen::Credentials(nobody)]);
}

/// Bytes with a chance to be headers: small lengths, known levels and kinds.
fn plausible() -> impl Strategy<Value = Vec<u8>> {
    let length = prop_oneof![0..64_usize, any::<usize>(), usize::MAX - 32..=usize::MAX];
    let level = prop_oneof![Just(libc::SOL_SOCKET), any::<i32>()];
    let kind = prop_oneof![0..6_i32, any::<i32>()];
    let payload = prop::collection::vec(any::<u8>(), 0..48);
    let part = (length, level, kind, payload)
        .prop_map(|(length, level, kind, payload)| message(length, level, kind, &payload));
    (prop::collection::vec(part, 0..6), 0..32_usize).prop_map(|(parts, cut)| {
        let mut bytes = parts.concat();
        bytes.truncate(bytes.len().saturating_sub(cut));
        bytes
    })
}

#[track_caller]
fn expect_walk_stays_inside(bytes: &[u8]) {
    let mut at = 0;
    let mut steps = 0;
    for seen in seen(bytes) {
        steps += 1;
        if let Seen::Descriptors(numbers) = seen {
            for number in numbers {
                // Each number is further on than the one before it.
                let wanted = number.to_ne_bytes();
                let found = bytes[at..].windows(4).position(|window| window == wanted);
                at += found.expect("the number is not in the bytes") + 4;
            }
        }
    }
    assert!(steps <= bytes.len() / HEADER);
}

proptest! {
    #[test]
    fn walk_survives_random_bytes(bytes in prop::collection::vec(any::<u8>(), 0..CONTROL_BUFFER_BYTES)) {
        expect_walk_stays_inside(&bytes);
    }

    #[test]
    fn walk_survives_plausible_bytes(bytes in plausible()) {
        expect_walk_stays_inside(&bytes);
    }

    #[test]
    fn walk_finds_every_well_formed_message(
        lists in prop::collection::vec(prop::collection::vec(any::<i32>(), 0..20), 0..8),
        shift in 0..WORD,
    ) {
        let mut bytes = vec![0xEE; shift];
        for list in &lists {
            bytes.extend(rights(list));
        }
        let expected: Vec<_> = lists.into_iter().map(Seen::Descriptors).collect();
        prop_assert_eq!(seen(&bytes[shift..]), expected);
    }
}
