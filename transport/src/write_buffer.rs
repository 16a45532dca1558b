//! Bytes that wait to be sent. The buffer is pure.
//!
//! Small writes are copied behind each other into one buffer. A pool lends it while
//! there is something in it. Bytes that do not fit, and long pieces that the caller
//! gave away, go into chunks behind it. So nothing is ever moved to make room.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::mem;

/// How large a buffer of copied bytes may grow. More bytes go into another one. It is
/// as large as one read, so that the bytes of a read can be written back in one piece.
pub(crate) const CHUNK_BYTES: usize = 65_536;

/// How many slices one vectored send has. Sixteen chunks are 1 MiB, more than a socket
/// takes at once.
pub(crate) const MAX_SLICES: usize = 16;

/// Bytes that are given away are copied if they are fewer than this. A chunk of their
/// own would cost more.
const MIN_OWNED_BYTES: usize = 4_096;

/// Has no memory while nothing waits.
#[derive(Debug, Default)]
pub(crate) struct WriteBuffer {
    /// How many bytes wait.
    unsent: usize,
    /// Invariant: `Some` while bytes wait.
    storage: Option<Box<Storage>>,
}

/// The memory of a buffer. A pool lends it while there is something in it.
#[derive(Debug, Default)]
pub(crate) struct Storage {
    /// Invariant: `start <= front.len()`. `front` has unsent bytes while any wait.
    /// Otherwise the storage is as it was when it was lent.
    front: Vec<u8>,
    start: usize,
    /// Invariant: `Some` only with a chunk in it.
    rest: Option<Box<Rest>>,
}

#[derive(Debug, Default)]
struct Rest {
    chunks: VecDeque<Vec<u8>>,
    /// Whether the last chunk was made here, and so may be appended to.
    is_last_ours: bool,
}

impl WriteBuffer {
    /// How many bytes wait.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.unsent
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.unsent == 0
    }

    /// Whether memory has to be lent before bytes can be copied in.
    #[inline]
    pub(crate) fn needs_storage(&self) -> bool {
        self.storage.is_none()
    }

    /// Lends memory to copy bytes into.
    #[inline(always)]
    pub(crate) fn lend_storage(&mut self, storage: Box<Storage>) {
        let earlier = self.storage.replace(storage);
        debug_assert!(earlier.is_none());
        // There is none, so there is nothing to drop.
        mem::forget(earlier);
    }

    /// Appends a copy of `data` if it fits into the memory at hand, and returns whether
    /// it did. Otherwise does nothing.
    #[inline(always)]
    pub(crate) fn append(&mut self, data: &[u8]) -> bool {
        let Some(storage) = &mut self.storage else {
            return false;
        };
        let room = storage.front.capacity() - storage.front.len();
        let fits = storage.rest.is_none() && data.len() <= room;
        if fits {
            storage.front.extend_from_slice(data);
            self.unsent += data.len();
        }
        fits
    }

    /// Appends a copy of `data`.
    pub(crate) fn push(&mut self, data: &[u8]) {
        if data.is_empty() {
            return;
        }
        let storage = self.storage.get_or_insert_default();
        let fits = storage.front.len() + data.len() <= CHUNK_BYTES;
        if self.unsent == 0 || (storage.rest.is_none() && fits) {
            storage.front.extend_from_slice(data);
        } else {
            storage.push_behind(data);
        }
        self.unsent += data.len();
    }

    /// Appends `data`, without copying it if it is long enough.
    pub(crate) fn push_owned(&mut self, data: Vec<u8>) {
        if data.len() < MIN_OWNED_BYTES {
            self.push(&data);
            return;
        }
        let length = data.len();
        let storage = self.storage.get_or_insert_default();
        if self.unsent == 0 {
            storage.front = data;
        } else {
            let rest = storage.rest.get_or_insert_default();
            rest.chunks.push_back(data);
            rest.is_last_ours = false;
        }
        self.unsent += length;
    }

    /// The bytes at the front, and whether they are all of the bytes.
    #[inline(always)]
    pub(crate) fn front(&self) -> (&[u8], bool) {
        match &self.storage {
            Some(storage) => (&storage.front[storage.start..], storage.rest.is_none()),
            None => (&[], true),
        }
    }

    /// The first [`MAX_SLICES`] pieces of the bytes.
    pub(crate) fn slices(&self) -> ([IoSlice<'_>; MAX_SLICES], usize) {
        let mut slices = [IoSlice::new(&[]); MAX_SLICES];
        slices[0] = IoSlice::new(self.front().0);
        let rest = self.storage.iter().flat_map(|storage| storage.rest.iter());
        let chunks = rest.flat_map(|rest| rest.chunks.iter());
        let mut count = 1;
        for (slice, chunk) in slices[1..].iter_mut().zip(chunks) {
            *slice = IoSlice::new(chunk);
            count += 1;
        }
        (slices, count)
    }

    /// Removes the first `count` bytes, which were sent. Gives the memory back if no
    /// bytes are left.
    #[inline(always)]
    pub(crate) fn consume(&mut self, count: usize) -> Option<Box<Storage>> {
        debug_assert!(count <= self.unsent);
        self.unsent -= count;
        if self.unsent > 0 {
            if let Some(storage) = &mut self.storage {
                storage.consume_part(count);
            }
            return None;
        }
        let mut storage = self.storage.take()?;
        storage.front.clear();
        storage.start = 0;
        if storage.rest.is_some() {
            storage.rest = None;
        }
        Some(storage)
    }

    /// Takes all bytes, as one piece.
    pub(crate) fn take(&mut self) -> Vec<u8> {
        self.unsent = 0;
        let Some(storage) = self.storage.take() else {
            return Vec::new();
        };
        let mut all = storage.front;
        all.drain(..storage.start);
        if let Some(rest) = storage.rest {
            for chunk in rest.chunks {
                all.extend_from_slice(&chunk);
            }
        }
        all
    }
}

impl Storage {
    /// Makes memory with room for `bytes` bytes to begin with.
    pub(crate) fn with_capacity(bytes: usize) -> Box<Self> {
        Box::new(Self {
            front: Vec::with_capacity(bytes),
            ..Self::default()
        })
    }

    /// How many bytes fit in one piece.
    #[inline]
    pub(crate) fn capacity(&self) -> usize {
        self.front.capacity()
    }

    #[cold]
    fn push_behind(&mut self, mut data: &[u8]) {
        let rest = self.rest.get_or_insert_default();
        if rest.is_last_ours
            && let Some(last) = rest.chunks.back_mut()
        {
            let room = CHUNK_BYTES.saturating_sub(last.len());
            let (fits, left) = data.split_at(room.min(data.len()));
            last.extend_from_slice(fits);
            data = left;
        }
        if !data.is_empty() {
            let mut chunk = Vec::with_capacity(data.len().max(CHUNK_BYTES));
            chunk.extend_from_slice(data);
            rest.chunks.push_back(chunk);
            rest.is_last_ours = true;
        }
    }

    /// Removes the first `count` bytes, behind which there are more.
    #[inline(never)]
    fn consume_part(&mut self, mut count: usize) {
        loop {
            let here = count.min(self.front.len() - self.start);
            self.start += here;
            count -= here;
            if self.start < self.front.len() {
                return;
            }
            let Some(rest) = &mut self.rest else {
                debug_assert!(false, "there are more bytes");
                return;
            };
            self.front = rest.chunks.pop_front().unwrap_or_default();
            self.start = 0;
            if rest.chunks.is_empty() {
                self.rest = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn contents(buffer: &WriteBuffer) -> Vec<u8> {
        let mut all = buffer.front().0.to_vec();
        let rest = buffer
            .storage
            .iter()
            .flat_map(|storage| storage.rest.iter());
        for chunk in rest.flat_map(|rest| &rest.chunks) {
            all.extend_from_slice(chunk);
        }
        all
    }

    #[derive(Clone, Debug)]
    enum Operation {
        Push(usize),
        PushOwned(usize),
        Consume(usize),
        /// With so much memory lent, if any has to be.
        Append(usize, usize),
    }

    fn operation() -> impl Strategy<Value = Operation> {
        let length = prop_oneof![
            4 => 0..64usize,
            2 => 4_000..4_200usize,
            1 => 60_000..140_000usize,
        ];
        prop_oneof![
            length.clone().prop_map(Operation::Push),
            length.clone().prop_map(Operation::PushOwned),
            length.prop_map(Operation::Consume),
            (0..8_192usize, 0..5_000usize).prop_map(|(lent, count)| Operation::Append(lent, count)),
        ]
    }

    proptest! {
        /// Any list of operations against one flat list of bytes.
        #[test]
        fn bytes_come_out_in_the_order_they_went_in(operations in prop::collection::vec(operation(), 1..60)) {
            let mut buffer = WriteBuffer::default();
            let mut model: Vec<u8> = Vec::new();
            // A pattern in which what is missing, doubled or swapped shows.
            let source: Vec<u8> = (0..200_000u32).map(|at| (at % 251) as u8).collect();
            let mut from = 0;
            let mut bytes = |count: usize| -> Vec<u8> {
                from = (from + count) % 251;
                source[from..from + count].to_vec()
            };
            for operation in operations {
                match operation {
                    Operation::Push(count) => {
                        let data = bytes(count);
                        buffer.push(&data);
                        model.extend(data);
                    }
                    Operation::PushOwned(count) => {
                        let data = bytes(count);
                        model.extend(&data);
                        buffer.push_owned(data);
                    }
                    Operation::Consume(count) => {
                        let count = count.min(model.len());
                        let was_empty = model.is_empty();
                        let returned = buffer.consume(count);
                        model.drain(..count);
                        prop_assert_eq!(returned.is_some(), model.is_empty() && !was_empty);
                        prop_assert_eq!(buffer.needs_storage(), model.is_empty());
                        if let Some(storage) = returned {
                            prop_assert!(storage.front.is_empty() && storage.rest.is_none());
                            prop_assert_eq!(storage.start, 0);
                        }
                    }
                    Operation::Append(lent, count) => {
                        if buffer.needs_storage() {
                            buffer.lend_storage(Storage::with_capacity(lent));
                        }
                        let data = bytes(count);
                        if buffer.append(&data) {
                            model.extend(data);
                        }
                        if model.is_empty() {
                            // Lent and not used: nobody leaves it like that.
                            buffer = WriteBuffer::default();
                        }
                    }
                }
                prop_assert_eq!(buffer.len(), model.len());
                prop_assert_eq!(buffer.is_empty(), model.is_empty());
                let (slices, count) = buffer.slices();
                let mut offered = Vec::new();
                slices[..count].iter().for_each(|slice| offered.extend_from_slice(slice));
                prop_assert!(model.starts_with(&offered));
                prop_assert_eq!(offered.is_empty(), model.is_empty());
                prop_assert!(contents(&buffer) == model);
            }
            prop_assert!(buffer.take() == model);
            prop_assert!(buffer.is_empty());
        }
    }

    #[test]
    fn small_writes_share_one_piece() {
        let mut buffer = WriteBuffer::default();
        for _ in 0..10 {
            buffer.push(b"0123456789");
        }
        let (front, is_all) = buffer.front();
        assert_eq!((front.len(), is_all), (100, true));
    }

    /// Contract W-32.
    #[test]
    fn given_away_bytes_are_not_copied() {
        let mut buffer = WriteBuffer::default();
        buffer.push(b"head");
        let body = vec![1; MIN_OWNED_BYTES];
        let address = body.as_ptr();
        buffer.push_owned(body);
        buffer.push(b"tail");
        let (slices, count) = buffer.slices();
        assert_eq!(count, 3);
        assert_eq!(slices[1].as_ptr(), address);
    }

    /// Contract W-32.
    #[test]
    fn copied_bytes_are_never_moved_to_make_room() {
        let mut buffer = WriteBuffer::default();
        for _ in 0..64 {
            buffer.push(&[0; 10_000]);
        }
        let (slices, count) = buffer.slices();
        assert!(
            slices[..count]
                .iter()
                .all(|slice| slice.len() <= CHUNK_BYTES)
        );
    }
}
