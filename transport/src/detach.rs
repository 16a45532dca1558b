//! Taking connections apart, to give them away or to put them together again.

use std::any::{Any, TypeId};
use std::fmt;
use std::os::fd::OwnedFd;

use bowline_protocol::{Address, Context, ProducerKind, ProducerRef};

use crate::descriptor_queue::{self, UnsentDescriptors};
use crate::error::{AdoptErrorKind, CallError, DetachError};
use crate::link::Kept;

/// A connection taken apart: its socket and everything that had not left.
///
/// The socket is deregistered and open, non-blocking and close-on-exec; what
/// the kernel holds for it, unread or unsent, goes with it.
pub struct Detached<P> {
    /// The socket; of a kind with two descriptors, the one for reading.
    pub fd: OwnedFd,
    /// What is written to, where that is another descriptor: `fd` is only read then. Of
    /// a connection of two pipes, say.
    pub writing: Option<OwnedFd>,
    /// The protocol. It was not told of a loss.
    pub protocol: P,
    /// What was written and not taken by the kernel.
    pub unsent: Vec<u8>,
    /// What was [put back](bowline_protocol::Transport::push_back) and not
    /// delivered.
    pub unread: Vec<u8>,
    /// The descriptors that were queued, with the part of `unsent` they belong
    /// to.
    pub descriptors: Vec<UnsentDescriptors>,
    /// The producer that was registered. It was not told anything.
    pub producer: Option<(ProducerRef, ProducerKind)>,
    /// Our address.
    pub host: Address,
    /// The peer's address.
    pub peer: Address,
    /// For [`reattach`](crate::Transports::reattach).
    pub(crate) kept: Kept,
    /// What moved its bytes, without the socket.
    pub(crate) layer: Box<dyn Any>,
    /// Whether that is all there is to say of it.
    pub(crate) travels: bool,
}

/// What a connection that comes from elsewhere had not sent there.
#[derive(Debug, Default)]
pub struct Unsent {
    /// The bytes; as [`Detached::unsent`].
    pub bytes: Vec<u8>,
    /// The descriptors, with the part of `bytes` they belong to; as
    /// [`Detached::descriptors`].
    pub descriptors: Vec<UnsentDescriptors>,
}

impl Unsent {
    pub(crate) fn check(&self) -> Result<(), AdoptErrorKind> {
        match descriptor_queue::fit(&self.descriptors, self.bytes.len()) {
            true => Ok(()),
            false => Err(AdoptErrorKind::UnfitDescriptors),
        }
    }
}

impl<P> Detached<P> {
    /// Whether the connection can go on in another process, by what stands here. One
    /// with a layer that holds more (a cipher, say), or with two descriptors, cannot: it
    /// has to be [put together](crate::Transports::reattach) here again.
    pub fn travels(&self) -> bool {
        self.travels
    }

    /// The same, with another protocol in its place.
    pub(crate) fn map<Q>(self, map: impl FnOnce(P) -> Q) -> Detached<Q> {
        Detached {
            fd: self.fd,
            writing: self.writing,
            protocol: map(self.protocol),
            unsent: self.unsent,
            unread: self.unread,
            descriptors: self.descriptors,
            producer: self.producer,
            host: self.host,
            peer: self.peer,
            kept: self.kept,
            layer: self.layer,
            travels: self.travels,
        }
    }
}

impl Detached<Box<dyn Any>> {
    /// Says again of which type its protocol is.
    ///
    /// # Errors
    ///
    /// It is of another type, and comes back.
    pub fn downcast<P: 'static>(self) -> Result<Detached<P>, Box<Self>> {
        match (*self.protocol).is::<P>() {
            true => Ok(self.map(|protocol| *protocol.downcast().expect("it was looked at"))),
            false => Err(Box::new(self)),
        }
    }
}

impl<P> fmt::Debug for Detached<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Detached")
            .field("fd", &self.fd)
            .field("writing", &self.writing)
            .field("unsent", &self.unsent.len())
            .field("descriptors", &self.descriptors)
            .field("peer", &self.peer)
            .finish_non_exhaustive()
    }
}

/// A connection that was not put together again, and why.
pub struct ReattachError<P> {
    /// Why.
    pub kind: AdoptErrorKind,
    /// What was to be put together.
    pub detached: Box<Detached<P>>,
}

impl<P> fmt::Debug for ReattachError<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReattachError")
            .field("kind", &self.kind)
            .field("detached", &self.detached)
            .finish()
    }
}

impl<P> fmt::Display for ReattachError<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot put the connection together again: {}", self.kind)
    }
}

impl<P: 'static> std::error::Error for ReattachError<P> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.kind {
            AdoptErrorKind::Os(error) => Some(error),
            _ => None,
        }
    }
}

/// Asks a connection to take itself apart, with the part of its protocol that is
/// wanted.
pub(crate) struct DetachRequest {
    pub(crate) part: TypeId,
    pub(crate) result: Option<Result<Detached<Box<dyn Any>>, DetachError>>,
}

pub(crate) struct DetachListenerRequest {
    pub(crate) fd: Option<OwnedFd>,
}

type Call<T> = Box<dyn FnOnce(&mut dyn Any, &mut Context<'_, T>)>;

/// Asks a connection to call a part of its protocol.
pub(crate) struct ProtocolCall<T> {
    pub(crate) part: TypeId,
    pub(crate) call: Option<Call<T>>,
    pub(crate) error: CallError,
}
