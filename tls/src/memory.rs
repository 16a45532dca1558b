//! Memory for bytes that have to be kept from one read to the next, lent to connections
//! while they have some.

use std::cell::RefCell;

/// How many unused pieces are kept in each thread: 1 MiB at the very most.
const MOST_SPARE: usize = 16;

/// What is kept between reads is a part of one record, mostly.
const FIRST_BYTES: usize = 16_384 + 2_048 + 5;

/// Not more than one read brings.
const LARGEST: usize = 65_536;

thread_local! {
    static SPARE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// Memory that is empty.
pub(crate) fn take() -> Vec<u8> {
    SPARE
        .with_borrow_mut(Vec::pop)
        .unwrap_or_else(|| Vec::with_capacity(FIRST_BYTES))
}

/// Takes memory back. What was in it is ciphertext.
pub(crate) fn give_back(mut memory: Vec<u8>) {
    if !(FIRST_BYTES..=LARGEST).contains(&memory.capacity()) {
        return;
    }
    memory.clear();
    // A thread that ends has none any more.
    let _ = SPARE.try_with(|spare| {
        let mut spare = spare.borrow_mut();
        if spare.len() < MOST_SPARE {
            spare.push(memory);
        }
    });
}
