//! Sealed records that have not been sent yet; pure.

use std::collections::VecDeque;
use std::io::IoSlice;

/// How many pieces are offered to the socket at once: as many records as are sealed at
/// once, and our own messages.
pub(crate) const MOST_PIECES: usize = 8;

/// Records in order; the first may have been sent in part. Owns no memory while it is
/// empty.
#[derive(Default)]
pub(crate) struct Outgoing {
    queue: Option<Box<Queue>>,
}

#[derive(Default)]
struct Queue {
    records: VecDeque<Vec<u8>>,
    /// How much of the first has been sent.
    start: usize,
    /// How many bytes have not been sent.
    bytes: usize,
}

impl Outgoing {
    pub(crate) fn push(&mut self, record: Vec<u8>) {
        if !record.is_empty() {
            let queue = self.queue.get_or_insert_default();
            queue.bytes += record.len();
            queue.records.push_back(record);
        }
    }

    /// As [`push`](Self::push), for a record of which the first `start` bytes have been
    /// sent.
    pub(crate) fn push_rest(&mut self, record: Vec<u8>, start: usize) {
        debug_assert!(self.is_empty());
        if start < record.len() {
            self.push(record);
            self.consume(start);
        }
    }

    /// Returns everything that has not been sent.
    pub(crate) fn to_vec(&self) -> Vec<u8> {
        let Some(queue) = &self.queue else {
            return Vec::new();
        };
        let mut bytes = Vec::with_capacity(queue.bytes);
        let mut start = queue.start;
        for record in &queue.records {
            bytes.extend_from_slice(&record[start..]);
            start = 0;
        }
        bytes
    }

    /// Offers the first records to `send`, which returns how many bytes it took.
    pub(crate) fn offer<E>(
        &mut self,
        send: impl FnOnce(&[IoSlice<'_>]) -> Result<usize, E>,
    ) -> Result<(), E> {
        let Some(queue) = &self.queue else {
            return Ok(());
        };
        let mut pieces = [IoSlice::new(&[]); MOST_PIECES];
        let mut count = 0;
        for (piece, record) in pieces.iter_mut().zip(&queue.records) {
            let start = if count == 0 { queue.start } else { 0 };
            *piece = IoSlice::new(&record[start..]);
            count += 1;
        }
        let taken = send(&pieces[..count])?;
        self.consume(taken);
        Ok(())
    }

    fn consume(&mut self, mut count: usize) {
        let Some(queue) = &mut self.queue else {
            return;
        };
        queue.bytes -= count;
        if queue.bytes == 0 {
            self.queue = None;
            return;
        }
        while let Some(first) = queue.records.front() {
            let left = first.len() - queue.start;
            if count < left {
                queue.start += count;
                return;
            }
            count -= left;
            queue.start = 0;
            queue.records.pop_front();
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_none()
    }

    /// Returns how many bytes have not been sent.
    pub(crate) fn len(&self) -> usize {
        self.queue.as_ref().map_or(0, |queue| queue.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Offers everything, and takes `at_most` bytes each time.
    fn drained(mut outgoing: Outgoing, at_most: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while !outgoing.is_empty() {
            let offered = outgoing.offer::<()>(|pieces| {
                let bytes: Vec<u8> = pieces.iter().flat_map(|it| it.to_vec()).collect();
                let count = bytes.len().min(at_most);
                all.extend_from_slice(&bytes[..count]);
                Ok(count)
            });
            offered.unwrap();
        }
        assert_eq!(outgoing.len(), 0);
        all
    }

    #[test]
    fn records_leave_in_order_whatever_the_socket_takes() {
        for at_most in 1..40 {
            let mut outgoing = Outgoing::default();
            outgoing.push_rest(b"xxfirst".to_vec(), 2);
            for number in 0..20u8 {
                outgoing.push(vec![number; 3]);
                outgoing.push(Vec::new());
            }
            assert_eq!(outgoing.len(), 65);
            let mut wanted = b"first".to_vec();
            wanted.extend((0..20u8).flat_map(|number| [number; 3]));
            assert_eq!(drained(outgoing, at_most), wanted, "{at_most} at a time");
        }
    }

    #[test]
    fn what_is_not_taken_stays() {
        let mut outgoing = Outgoing::default();
        outgoing.push(b"record".to_vec());
        assert_eq!(outgoing.offer(|_| Err("later")), Err("later"));
        assert_eq!(outgoing.len(), 6);
        assert_eq!(drained(outgoing, 100), b"record");
    }

    #[test]
    fn nothing_is_left_of_what_has_left() {
        let mut outgoing = Outgoing::default();
        outgoing.push_rest(b"record".to_vec(), 6);
        assert!(outgoing.is_empty());
    }
}
