//! Frames of channels taken apart by hand, as a program would that knows nothing
//! of bowline: a queue of descriptors, and each frame takes as many as it says.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

/// What was read and is not taken yet.
#[derive(Default)]
pub(crate) struct Frames {
    bytes: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
}

pub(crate) struct Frame {
    pub(crate) kind: u16,
    pub(crate) payload: Vec<u8>,
    pub(crate) descriptors: Vec<OwnedFd>,
}

impl Frames {
    /// Takes the descriptors that came with the bytes fed next.
    pub(crate) fn descriptors(&mut self, descriptors: impl IntoIterator<Item = OwnedFd>) {
        self.descriptors.extend(descriptors);
    }

    pub(crate) fn feed(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next frame, if it is whole.
    pub(crate) fn next(&mut self) -> Option<Frame> {
        let (header, rest) = self.bytes.split_first_chunk::<8>()?;
        let [l0, l1, l2, l3, k0, k1, version, count] = *header;
        assert_eq!(version, 1, "of a frame");
        let payload = rest.get(..u32::from_be_bytes([l0, l1, l2, l3]) as usize)?;
        let frame = Frame {
            kind: u16::from_be_bytes([k0, k1]),
            payload: payload.to_vec(),
            descriptors: self.descriptors.drain(..usize::from(count)).collect(),
        };
        self.bytes.drain(..8 + frame.payload.len());
        Some(frame)
    }
}
