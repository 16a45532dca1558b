//! A counter behind a descriptor.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::sys;
use crate::sys::file::{is_event_counter, is_nonblocking, read_at_once, write};

/// A counter that processes and threads share by its descriptor. It is readable while
/// it is not 0 (eventfd(2)). Use it to wake somebody up, and to say how often.
///
/// # Examples
///
/// ```
/// use bowline::descriptor::{EventCounter, Next};
/// use bowline::Reactor;
///
/// let mut reactor = Reactor::new()?;
/// let counter = EventCounter::new()?;
/// let theirs = counter.try_clone()?;
/// std::thread::spawn(move || theirs.add(3));
/// reactor.call_each_time_readable(counter, |reactor, counter| {
///     assert_eq!(counter.take().expect("it can be read"), 3);
///     reactor.stop().expect("it runs");
///     Next::Keep
/// })?;
/// reactor.run()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct EventCounter {
    fd: OwnedFd,
}

impl EventCounter {
    /// Makes a counter that is 0.
    ///
    /// # Errors
    ///
    /// `EMFILE` or `ENFILE` if no descriptor number is free, `ENOMEM`.
    pub fn new() -> io::Result<Self> {
        let fd = sys::event_counter()?;
        Ok(Self { fd })
    }

    /// Takes the counter that `fd` names. It may come from another process.
    ///
    /// # Errors
    ///
    /// Gives the descriptor back if it is no such counter, or if it blocks (was made
    /// without `EFD_NONBLOCK`). Otherwise its other holders could make
    /// [`add`](Self::add) wait.
    pub fn from_descriptor(fd: OwnedFd) -> Result<Self, OwnedFd> {
        match is_event_counter(fd.as_fd()) && is_nonblocking(fd.as_fd()) {
            true => Ok(Self { fd }),
            false => Err(fd),
        }
    }

    /// Adds `count`. Adding 0 wakes nobody up.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if the counter would be above 2^64 - 2. `InvalidInput` if `count`
    /// is 2^64 - 1.
    pub fn add(&self, count: u64) -> io::Result<()> {
        let bytes = count.to_ne_bytes();
        write(self.fd.as_fd(), &[io::IoSlice::new(&bytes)])?;
        Ok(())
    }

    /// Sets the counter to 0, and returns what it was. (If somebody has made it with
    /// `EFD_SEMAPHORE`, this takes 1.)
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn take(&self) -> io::Result<u64> {
        let mut bytes = [0; size_of::<u64>()];
        match read_at_once(self.fd.as_fd(), &mut bytes) {
            Ok(_) => Ok(u64::from_ne_bytes(bytes)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(error) => Err(error),
        }
    }

    /// Makes another descriptor of the same counter, for another thread or process.
    ///
    /// # Errors
    ///
    /// `EMFILE` or `ENFILE` if no descriptor number is free.
    pub fn try_clone(&self) -> io::Result<Self> {
        let fd = self.fd.try_clone()?;
        Ok(Self { fd })
    }
}

impl AsFd for EventCounter {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<EventCounter> for OwnedFd {
    fn from(counter: EventCounter) -> Self {
        counter.fd
    }
}
