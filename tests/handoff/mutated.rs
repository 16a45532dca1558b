//! Frames that are almost right, with whatever may be sent along.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bowline::handoff::wire::HEADER_BYTES;
use bowline::testing::Random;

use crate::pool::raw::{tcp_pair, wrong_kinds};

/// What may be sent along.
pub(crate) struct Kinds {
    all: Vec<OwnedFd>,
    _client: std::net::TcpStream,
}

impl Kinds {
    pub(crate) fn new() -> Self {
        let (client, accepted) = tcp_pair();
        let mut all: Vec<_> = wrong_kinds().into_iter().map(|(_, fd)| fd).collect();
        all.push(accepted);
        Self {
            all,
            _client: client,
        }
    }

    pub(crate) fn some(&self, random: &mut Random) -> Vec<BorrowedFd<'_>> {
        let count = [0, 1, 1, 1, 1, 2, 3, 9][random.below(8)];
        (0..count)
            .map(|_| self.all[random.below(self.all.len())].as_fd())
            .collect()
    }

    /// The one that is a connection, over TCP.
    pub(crate) fn connection(&self) -> BorrowedFd<'_> {
        self.all.last().expect("there are some").as_fd()
    }
}

/// Changes one thing or several, or nothing but the descriptors.
pub(crate) fn mutate(random: &mut Random, bytes: &mut Vec<u8>) {
    for _ in 0..[0, 1, 1, 1, 2, 4][random.below(6)] {
        match random.below(9) {
            // The fields of the header: length, kind, version, count.
            0 => bytes[random.below(4)] = random.any() as u8,
            1 => bytes[3] = bytes[3].wrapping_add(random.below(5) as u8).wrapping_sub(2),
            2 => bytes[4 + random.below(2)] = random.any() as u8,
            3 => bytes[5] = bytes[5].wrapping_add(1),
            4 => bytes[6] = random.below(4) as u8,
            5 => bytes[7] = random.below(256) as u8,
            // The payload.
            6 if bytes.len() > HEADER_BYTES => {
                let at = HEADER_BYTES + random.below(bytes.len() - HEADER_BYTES);
                bytes[at] ^= 1 << random.below(8);
            }
            7 if bytes.len() > HEADER_BYTES => {
                let at = HEADER_BYTES + random.below(bytes.len() - HEADER_BYTES);
                bytes.truncate(at);
            }
            _ => {
                let extra = random.below(20);
                bytes.extend((0..extra).map(|_| random.any() as u8));
            }
        }
    }
}
