//! Bytes waiting to be sent; pure.
//!
//! Small writes are copied behind each other into one buffer, which is lent by
//! a pool while there is something in it. What does not fit, and what the
//! caller gave away, stands in chunks behind it, so that nothing is ever moved
//! to make room.

use std::collections::VecDeque;
use std::io::IoSlice;

/// How large a buffer of copied bytes may grow; more goes to another one. As
/// large as one read, so that what was read can be written back in one piece.
pub(crate) const CHUNK_BYTES: usize = 65_536;

/// How many slices one vectored send is given. Sixteen chunks are 1 MiB, more
/// than a socket takes at once.
pub(crate) const MAX_SLICES: usize = 16;

/// Given-away bytes shorter than this are copied: keeping a piece of its own
/// would cost more.
const MIN_OWNED_BYTES: usize = 4_096;

/// One pointer while nothing waits.
#[derive(Debug, Default)]
pub(crate) struct WriteBuffer {
    storage: Option<Box<Storage>>,
}

/// The memory of a buffer, lent by a pool while there is something in it.
#[derive(Debug, Default)]
pub(crate) struct Storage {
    /// Invariant: `start <= front.len()`, and `front` has unsent bytes whenever
    /// `rest` is there.
    front: Vec<u8>,
    start: usize,
    /// Invariant: never there without a chunk in it.
    rest: Option<Box<Rest>>,
}

#[derive(Debug, Default)]
struct Rest {
    chunks: VecDeque<Vec<u8>>,
    /// The sum of the chunks' lengths.
    bytes: usize,
    /// Whether the last chunk is of our making, and may be appended to.
    is_last_ours: bool,
}

impl WriteBuffer {
    /// How many bytes wait.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.storage.as_ref().map_or(0, |storage| storage.len())
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.storage
            .as_ref()
            .is_none_or(|storage| storage.is_empty())
    }

    /// Whether memory has to be lent before bytes can be copied in.
    #[inline]
    pub(crate) fn needs_storage(&self) -> bool {
        self.storage.is_none()
    }

    /// Lends memory to copy bytes into.
    #[inline]
    pub(crate) fn lend_storage(&mut self, storage: Box<Storage>) {
        debug_assert!(self.needs_storage() && storage.is_empty());
        self.storage = Some(storage);
    }

    /// Gives the memory back when nothing waits.
    #[inline]
    pub(crate) fn return_storage(&mut self) -> Option<Box<Storage>> {
        debug_assert!(self.is_empty());
        let mut storage = self.storage.take()?;
        storage.front.clear();
        storage.start = 0;
        Some(storage)
    }

    /// Appends a copy of `data`.
    #[inline]
    pub(crate) fn push(&mut self, data: &[u8]) {
        let storage = self.storage.get_or_insert_default();
        if storage.rest.is_none() && storage.front.len() + data.len() <= CHUNK_BYTES {
            storage.front.extend_from_slice(data);
        } else {
            storage.push_behind(data);
        }
    }

    /// Appends `data` without copying it, if it is long enough to be worth it.
    pub(crate) fn push_owned(&mut self, data: Vec<u8>) {
        if data.len() < MIN_OWNED_BYTES {
            self.push(&data);
            return;
        }
        let storage = self.storage.get_or_insert_default();
        if storage.is_empty() {
            storage.start = 0;
            storage.front = data;
        } else {
            let rest = storage.rest.get_or_insert_default();
            rest.bytes += data.len();
            rest.chunks.push_back(data);
            rest.is_last_ours = false;
        }
    }

    /// The bytes at the front, and whether they are all there is.
    #[inline(always)]
    pub(crate) fn front(&self) -> (&[u8], bool) {
        match &self.storage {
            Some(storage) => (&storage.front[storage.start..], storage.rest.is_none()),
            None => (&[], true),
        }
    }

    /// The first [`MAX_SLICES`] pieces of what waits.
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

    /// Forgets the first `count` bytes, which were sent.
    #[inline]
    pub(crate) fn consume(&mut self, count: usize) {
        debug_assert!(count <= self.len());
        if let Some(storage) = &mut self.storage {
            if storage.rest.is_none() {
                storage.start += count;
            } else {
                storage.consume_chunks(count);
            }
        }
    }

    /// Takes everything that waits, as one piece.
    pub(crate) fn take(&mut self) -> Vec<u8> {
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
    /// Memory with room for `bytes` to begin with.
    pub(crate) fn with_capacity(bytes: usize) -> Box<Self> {
        Box::new(Self {
            front: Vec::with_capacity(bytes),
            ..Self::default()
        })
    }

    /// For how many bytes there is room in one piece.
    #[inline]
    pub(crate) fn capacity(&self) -> usize {
        self.front.capacity()
    }

    #[inline]
    fn len(&self) -> usize {
        let rest = self.rest.as_ref().map_or(0, |rest| rest.bytes);
        self.front.len() - self.start + rest
    }

    #[inline]
    fn is_empty(&self) -> bool {
        self.front.len() == self.start
    }

    #[cold]
    fn push_behind(&mut self, mut data: &[u8]) {
        if data.is_empty() {
            return;
        }
        if self.is_empty() {
            // Everything before was sent: start anew, in a buffer large enough.
            self.front.clear();
            self.start = 0;
            self.front.extend_from_slice(data);
            return;
        }
        let rest = self.rest.get_or_insert_default();
        rest.bytes += data.len();
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

    #[cold]
    fn consume_chunks(&mut self, mut count: usize) {
        loop {
            let here = count.min(self.front.len() - self.start);
            self.start += here;
            count -= here;
            if self.start < self.front.len() {
                return;
            }
            let Some(rest) = &mut self.rest else {
                debug_assert_eq!(count, 0);
                return;
            };
            let Some(next) = rest.chunks.pop_front() else {
                self.rest = None;
                return;
            };
            rest.bytes -= next.len();
            if rest.chunks.is_empty() {
                self.rest = None;
            }
            self.front = next;
            self.start = 0;
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
        Return,
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
            Just(Operation::Return),
        ]
    }

    proptest! {
        /// Any list of operations against one flat list of bytes.
        #[test]
        fn bytes_come_out_in_the_order_they_went_in(operations in prop::collection::vec(operation(), 1..60)) {
            let mut buffer = WriteBuffer::default();
            let mut model: Vec<u8> = Vec::new();
            let mut next = 0u8;
            let mut bytes = |count: usize| -> Vec<u8> {
                (0..count).map(|_| { next = next.wrapping_add(7); next }).collect()
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
                        buffer.consume(count);
                        model.drain(..count);
                    }
                    Operation::Return => {
                        if buffer.is_empty() {
                            let storage = buffer.return_storage();
                            prop_assert!(storage.is_none_or(|storage| storage.is_empty()));
                            prop_assert!(buffer.needs_storage());
                        }
                    }
                }
                prop_assert_eq!(buffer.len(), model.len());
                prop_assert_eq!(buffer.is_empty(), model.is_empty());
                let (slices, count) = buffer.slices();
                let offered: Vec<u8> = slices[..count].iter().flat_map(|slice| slice.to_vec()).collect();
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
