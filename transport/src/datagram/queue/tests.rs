use std::fs::File;
use std::os::fd::OwnedFd;

use proptest::prelude::*;

use super::*;

fn contents(queue: &SendQueue) -> Vec<(Vec<u8>, Vec<u8>)> {
    let parts = |it: Queued<'_>| (it.data.to_vec(), it.name.to_vec());
    queue.in_line().map(parts).collect()
}

fn descriptor() -> PassedDescriptor {
    OwnedFd::from(File::open("/dev/null").unwrap()).into()
}

fn runs(queue: &SendQueue, most: usize, longest: usize) -> Vec<(usize, Option<u16>, usize)> {
    let runs = queue.runs(most, longest);
    runs.map(|(message, count)| (message.data.len(), message.segment, count))
        .collect()
}

#[test]
fn datagrams_keep_their_bounds_their_order_and_their_addresses() {
    let mut queue = SendQueue::default();
    queue.push(&[b"a", b"bc"], b"one", Vec::new());
    queue.push(&[], b"one", Vec::new());
    queue.push(&[b"d"], b"", vec![descriptor(), descriptor()]);
    assert_eq!(
        (queue.len(), queue.unsent_bytes(), queue.descriptors()),
        (3, 4, 2)
    );
    let all = contents(&queue);
    let expected: [(&[u8], &[u8]); 3] = [(b"abc", b"one"), (b"", b"one"), (b"d", b"")];
    assert_eq!(all, expected.map(|(data, name)| (data.into(), name.into())));
    queue.sent(2);
    assert_eq!((queue.len(), queue.unsent_bytes()), (1, 1));
    queue.sent(1);
    assert!(queue.is_empty());
    assert_eq!(queue.descriptors(), 0);
}

#[test]
fn datagrams_of_one_length_to_one_address_are_one_message() {
    let mut queue = SendQueue::default();
    for (data, name) in [
        ("aaaa", "one"),
        ("bbbb", "one"),
        ("cc", "one"),
        ("dd", "one"),
        ("eeee", "one"),
        ("ffff", "two"),
        ("gggg", "two"),
    ] {
        queue.push(&[data.as_bytes()], name.as_bytes(), Vec::new());
    }
    // A shorter one ends a run; a longer one begins another.
    let expected = [
        (10, Some(4), 3),
        (2, None, 1),
        (4, None, 1),
        (8, Some(4), 2),
    ];
    assert_eq!(runs(&queue, 64, 1_000), expected);
    assert_eq!(runs(&queue, 1, 1_000).len(), 7, "one each");
    assert_eq!(runs(&queue, 2, 1_000)[0], (8, Some(4), 2));
    assert_eq!(
        runs(&queue, 64, 3)[..3],
        [(4, None, 1), (4, None, 1), (4, Some(2), 2)],
        "not those that are too long"
    );
}

#[test]
fn run_ends_at_what_is_not_like_it() {
    let mut queue = SendQueue::default();
    queue.push(&[b"aa"], b"one", Vec::new());
    queue.push(&[], b"one", Vec::new());
    queue.push(&[b"bb"], b"one", Vec::new());
    queue.push(&[b"cc"], b"one", vec![descriptor()]);
    queue.push(&[b"dd"], b"one", Vec::new());
    // No bytes are a datagram, and one with descriptors leaves by itself.
    let expected = [(2, None, 1), (0, None, 1), (2, None, 1)];
    assert_eq!(runs(&queue, 64, 1_000), expected);
    let mut long = SendQueue::default();
    for _ in 0..50 {
        long.push(&[&[7; 2_000]], b"", Vec::new());
    }
    assert_eq!(runs(&long, 64, 2_000)[0], (64_000, Some(2_000), 32));
}

#[test]
fn what_is_held_back_lets_others_pass_and_keeps_its_order() {
    let mut queue = SendQueue::default();
    queue.push(&[b"1"], b"full", Vec::new());
    queue.push(&[b"2"], b"free", Vec::new());
    queue.push(&[b"3"], b"full", Vec::new());
    queue.hold_first();
    assert_eq!(queue.held_for(b"full"), 2);
    queue.push(&[b"4"], b"full", Vec::new());
    queue.push(&[b"5"], b"free", Vec::new());
    assert_eq!((queue.held_for(b"full"), queue.held_for(b"free")), (3, 0));
    let data = |queue: &SendQueue| -> Vec<u8> {
        contents(queue).into_iter().flat_map(|it| it.0).collect()
    };
    assert_eq!(data(&queue), b"25");
    queue.sent(1);
    assert_eq!((data(&queue), queue.len()), (b"5".to_vec(), 4));
    queue.release();
    assert_eq!(data(&queue), b"1345");
    let first = queue.take_out().unwrap();
    assert_eq!(
        (&first.data[..], &first.name[..]),
        (&b"1"[..], &b"full"[..])
    );
    assert_eq!(data(&queue), b"345");
    queue.sent(3);
    assert!(queue.is_empty());
}

#[test]
fn memory_that_is_spent_is_used_again() {
    let mut queue = SendQueue::default();
    for round in 0..10_000_u32 {
        queue.push(&[&[0; 1_000]], &round.to_ne_bytes(), Vec::new());
        if round > 100 {
            queue.sent(1);
        }
    }
    assert!(
        queue.bytes.capacity() < 1 << 20,
        "{}",
        queue.bytes.capacity()
    );
    assert!(
        queue.names.capacity() < 1 << 16,
        "{}",
        queue.names.capacity()
    );
}

proptest! {
    /// Beside a list that does the same by obvious means.
    #[test]
    fn queue_is_a_list(operations in prop::collection::vec((0..6_u8, 0..4_u8, 0..9_usize), 0..300)) {
        let mut queue = SendQueue::default();
        let mut list: Vec<(Vec<u8>, Vec<u8>, bool)> = Vec::new();
        for (operation, name, length) in operations {
            let name = vec![name; usize::from(name)];
            match operation {
                0..=2 => {
                    let data = vec![length as u8; length];
                    let is_held = list.iter().any(|it| it.1 == name && it.2);
                    queue.push(&[&data], &name, Vec::new());
                    list.push((data, name, is_held));
                }
                3 => {
                    let most = list.iter().filter(|it| !it.2).count();
                    let count = length.min(most);
                    queue.sent(count);
                    for _ in 0..count {
                        let first = list.iter().position(|it| !it.2).unwrap();
                        list.remove(first);
                    }
                }
                4 => {
                    queue.hold_first();
                    if let Some(first) = list.iter().find(|it| !it.2).map(|it| it.1.clone()) {
                        list.iter_mut().filter(|it| it.1 == first).for_each(|it| it.2 = true);
                    }
                }
                _ => {
                    queue.release();
                    list.iter_mut().for_each(|it| it.2 = false);
                }
            }
            let in_line: Vec<_> = list.iter().filter(|it| !it.2).cloned().map(|it| (it.0, it.1)).collect();
            prop_assert_eq!(contents(&queue), in_line.clone());
            prop_assert_eq!(queue.len(), list.len());
            prop_assert_eq!(queue.unsent_bytes(), list.iter().map(|it| it.0.len()).sum::<usize>());
            prop_assert_eq!(queue.has_any_in_line(), !in_line.is_empty());
            prop_assert_eq!(queue.has_held(), list.iter().any(|it| it.2));
            // Cut again, the messages are the datagrams.
            let mut cut = Vec::new();
            for (message, count) in queue.runs(3, 5) {
                let whole = message.data.len().max(1);
                let size = message.segment.map_or(whole, usize::from);
                let before = cut.len();
                if message.data.is_empty() {
                    cut.push((Vec::new(), message.name.to_vec()));
                }
                cut.extend(message.data.chunks(size).map(|it| (it.to_vec(), message.name.to_vec())));
                prop_assert_eq!(cut.len() - before, count);
                prop_assert!(count <= 3);
            }
            prop_assert_eq!(cut, in_line);
        }
    }
}
