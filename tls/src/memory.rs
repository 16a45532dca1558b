//! Memory for bytes that are kept from one read to the next. Connections borrow it while
//! they have some.

use std::cell::RefCell;

/// How many unused pieces each thread keeps: at most 1 MiB.
const MOST_SPARE: usize = 16;

/// What is kept between reads is mostly part of one record.
const FIRST_BYTES: usize = 16_384 + 2_048 + 5;

/// Never more than one read brings.
const LARGEST: usize = 65_536;

thread_local! {
    static SPARE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// Returns empty memory.
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
