//! A table of descriptors for a thread and those it starts.

#![allow(
    unsafe_code,
    reason = "no safe package gives a thread a table of its own"
)]

use std::cell::Cell;
use std::io;

/// The first number after the standard streams, which everybody keeps.
const FIRST: u32 = 3;

thread_local! {
    static HAS_OWN: Cell<bool> = const { Cell::new(false) };
}

/// Says that the process runs no other test, and may have opened something already.
pub(crate) fn keep_that_of_the_process() {
    HAS_OWN.set(true);
}

/// Gives this thread a table of its own, with the standard streams in it and nothing else
/// (close_range(2), `CLOSE_RANGE_UNSHARE`). Threads and processes that it starts have that
/// one too. What other tests open and close is not seen here, nor kept open by it.
///
/// Only once: what has been opened since stays open.
pub(crate) fn have_own_table() {
    if HAS_OWN.replace(true) {
        return;
    }
    // SAFETY: takes integers only. The thread has opened nothing yet, or it would find out
    // at once: what it uses next is closed. What others own is untouched in their table.
    let result = unsafe {
        let flags = libc::CLOSE_RANGE_UNSHARE as libc::c_int;
        libc::close_range(FIRST, libc::c_uint::MAX, flags)
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}
