//! Descriptors on their way: to be sent, and received.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::vec::Drain;

/// A descriptor to be passed to a peer: owned, or shared.
///
/// The kernel copies it when the message leaves. Ours is closed then, or earlier if the
/// connection ends first. With a shared one you can send one listener or file to many
/// peers without a `dup` for each; it closes with its last holder.
#[derive(Debug)]
pub enum PassedDescriptor {
    /// Ours alone.
    Owned(OwnedFd),
    /// Held by others too.
    Shared(Rc<OwnedFd>),
}

impl<F: Into<OwnedFd>> From<F> for PassedDescriptor {
    fn from(fd: F) -> Self {
        Self::Owned(fd.into())
    }
}

impl PassedDescriptor {
    /// A descriptor that others hold too.
    pub fn shared(fd: &Rc<OwnedFd>) -> Self {
        Self::Shared(Rc::clone(fd))
    }
}

impl AsFd for PassedDescriptor {
    #[inline]
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Owned(fd) => fd.as_fd(),
            Self::Shared(fd) => fd.as_fd(),
        }
    }
}

/// The descriptors of one read, in the order they were sent: an iterator of
/// [`OwnedFd`].
///
/// A descriptor that is taken belongs to the taker. It is close-on-exec. Descriptors
/// that are left when the callback returns are closed, logged and counted.
///
/// To close one from a peer that is not trusted, give it to `close_received`: dropping
/// a UNIX socket can hold up the loop.
pub struct ReceivedDescriptors<'a> {
    descriptors: Drain<'a, OwnedFd>,
}

impl<'a> ReceivedDescriptors<'a> {
    /// Offers all of `descriptors`. The vector is empty afterwards. For transports, and
    /// for tests of protocols.
    pub fn new(descriptors: &'a mut Vec<OwnedFd>) -> Self {
        Self {
            descriptors: descriptors.drain(..),
        }
    }
}

impl Iterator for ReceivedDescriptors<'_> {
    type Item = OwnedFd;

    #[inline]
    fn next(&mut self) -> Option<OwnedFd> {
        self.descriptors.next()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.descriptors.size_hint()
    }
}

impl ExactSizeIterator for ReceivedDescriptors<'_> {}

impl fmt::Debug for ReceivedDescriptors<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.descriptors.as_slice()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn descriptors_not_yet_taken_are_counted_and_printed() {
        let open = || OwnedFd::from(File::open("/dev/null").expect("Linux has it"));
        let mut descriptors = vec![open(), open(), open()];
        let mut received = ReceivedDescriptors::new(&mut descriptors);
        let first = received.next().expect("the first of three");
        assert_eq!(received.len(), 2);
        let printed = format!("{received:?}");
        assert_eq!(printed.matches("OwnedFd").count(), 2, "{printed}");
        assert!(!printed.contains(&format!("{first:?}")), "{printed}");
    }
}
