//! What of a layer goes along when its connection is given to another process.

use std::fmt;
use std::os::fd::OwnedFd;

/// What of a layer the same layer of another process needs to go on:
/// [`FileDescriptor::pack`](crate::FileDescriptor::pack) answers it.
///
/// Its bytes pass through the buffers of two channels and of the kernel, and none of
/// those wipes them. A layer with secrets sends them encrypted, and has the key go another
/// way: `bowline-tls` has it in a pipe that is one of the descriptors.
pub struct LayerState {
    /// What the layer calls itself. The other process knows by that which layer to put
    /// there.
    pub name: String,
    /// Its state.
    pub state: Vec<u8>,
    /// What belongs to it. Given away, so that the layer keeps copies of its own of what
    /// it needs to [come back](crate::FileDescriptor::come_back).
    pub descriptors: Vec<OwnedFd>,
}

impl fmt::Debug for LayerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayerState")
            .field("name", &self.name)
            .field("state", &self.state.len())
            .field("descriptors", &self.descriptors)
            .finish()
    }
}

/// Why a connection stays in its process, and is not given to another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Stays {
    /// It is closing, half-closed by us, or broken.
    Closing,
    /// It has a producer, which could not be told where its consumer has gone.
    Producer,
    /// Its protocol wants to go on where it is.
    Protocol,
    /// It has two descriptors, of which the other process would be told of one.
    TwoDescriptors,
    /// A layer holds more than it can give away.
    Layer,
    /// Its layer was not told that connections may move.
    NotAllowed,
    /// Its handshake is not done.
    Handshake,
    /// A message with descriptors is on its way, in part.
    Descriptors,
    /// It holds more than one message to the other process can carry.
    TooLarge,
    /// The system has refused what a move takes, a descriptor for example.
    System,
    /// The other process did not take it.
    Refused,
}

impl fmt::Display for Stays {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Closing => "it is closing",
            Self::Producer => "it has a producer",
            Self::Protocol => "its protocol stays",
            Self::TwoDescriptors => "it has two descriptors",
            Self::Layer => "its layer holds more than it gives away",
            Self::NotAllowed => "its layer may not move",
            Self::Handshake => "it is in its handshake",
            Self::Descriptors => "descriptors are on their way",
            Self::TooLarge => "it holds too much",
            Self::System => "the system refused",
            Self::Refused => "the other process did not take it",
        })
    }
}
