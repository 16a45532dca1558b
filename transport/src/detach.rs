//! Taking connections apart, to give them away or to put them together again.

use std::any::{Any, TypeId};
use std::fmt;
use std::mem;
use std::os::fd::OwnedFd;

use bowline_protocol::{Address, Context, ProducerKind, ProducerRef, Protocol};
use bowline_reactor::{Reactor, Token};

use crate::descriptor_queue::{self, UnsentDescriptors};
use crate::error::{AdoptErrorKind, CallError, DetachError};
use crate::establish::put_stream;
use crate::file_descriptor::{FileDescriptor, Socket};
use crate::layer_state::{LayerState, Stays};
use crate::link::{Flags, Kept};
use crate::stream::{Stream, StreamTransport};

/// A connection taken apart: its socket, and everything that is unsent.
///
/// The socket is deregistered and open, non-blocking and close-on-exec. Bytes that the
/// kernel holds for it, unread or unsent, go with it.
pub struct Detached<P> {
    /// The socket. If the connection has two descriptors, this is the one for reading.
    pub fd: OwnedFd,
    /// The descriptor for writing, if it is another one, as in a connection of two
    /// pipes. Then `fd` is only for reading.
    pub writing: Option<OwnedFd>,
    /// The protocol. It was not told of a loss.
    pub protocol: P,
    /// The bytes that were written and not taken by the kernel.
    pub unsent: Vec<u8>,
    /// The bytes that were [put back](bowline_protocol::Transport::push_back) and are
    /// not delivered yet.
    pub unread: Vec<u8>,
    /// The queued descriptors, with the part of `unsent` that they belong to.
    pub descriptors: Vec<UnsentDescriptors>,
    /// The producer that was registered. It was not told anything.
    pub producer: Option<(ProducerRef, ProducerKind)>,
    /// Our address.
    pub host: Address,
    /// The peer's address.
    pub peer: Address,
    /// For [`reattach`](crate::Transports::reattach).
    pub(crate) kept: Option<Kept>,
    /// The layers, without the socket.
    pub(crate) layer: Box<dyn Any>,
    /// Whether these values are all of its state.
    pub(crate) travels: bool,
    /// Asks the layers for theirs; none of a connection that is broken, or of packets.
    pub(crate) pack: Option<Pack>,
}

type Pack = fn(&mut dyn Any) -> Result<Vec<LayerState>, Stays>;

/// Bytes and descriptors that a connection had not sent before it was detached
/// elsewhere.
#[derive(Debug, Default)]
pub struct Unsent {
    /// The bytes. See [`Detached::unsent`].
    pub bytes: Vec<u8>,
    /// The descriptors, with the part of `bytes` that they belong to. See
    /// [`Detached::descriptors`].
    pub descriptors: Vec<UnsentDescriptors>,
}

impl Unsent {
    pub(crate) fn check(&self) -> Result<(), AdoptErrorKind> {
        check_unsent(&self.descriptors, &self.bytes)
    }
}

fn check_unsent(descriptors: &[UnsentDescriptors], bytes: &[u8]) -> Result<(), AdoptErrorKind> {
    match descriptor_queue::fit(descriptors, bytes.len()) {
        true => Ok(()),
        false => Err(AdoptErrorKind::UnfitDescriptors),
    }
}

impl<P> Detached<P> {
    /// Whether the connection can go on in another process with nothing but these
    /// values. A connection with two descriptors cannot. Nor can one whose layer holds
    /// more, such as a cipher: [`pack`](Self::pack) has that say what. Otherwise it has to
    /// be [put together](crate::Transports::reattach) again here.
    pub fn travels(&self) -> bool {
        self.travels
    }

    /// Has the layers say what another process needs of them beside these values, the
    /// topmost first ([`FileDescriptor::pack`]): nothing, if the connection
    /// [travels](Self::travels) anyway. From then on this process does not use them any
    /// more, unless the connection is [put together](crate::Transports::reattach) again,
    /// which fails if the other process has their state by then.
    ///
    /// # Errors
    ///
    /// The reason why the connection stays. It can be put together again.
    pub fn pack(&mut self) -> Result<Vec<LayerState>, Stays> {
        if self.travels {
            return Ok(Vec::new());
        }
        if self.writing.is_some() {
            return Err(Stays::TwoDescriptors);
        }
        match self.pack {
            Some(pack) => pack(&mut *self.layer),
            None => Err(Stays::Closing),
        }
    }

    /// Changes the protocol.
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
            pack: self.pack,
        }
    }
}

impl Detached<Box<dyn Any>> {
    /// Gives the protocol its type back.
    ///
    /// # Errors
    ///
    /// The protocol has another type. The error gives everything back.
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

/// A connection was not put together again. The error gives its parts back.
pub struct ReattachError<P> {
    /// The reason.
    pub kind: AdoptErrorKind,
    /// The parts.
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

impl<P: 'static> ReattachError<P> {
    pub(crate) fn new(kind: AdoptErrorKind, detached: Detached<P>) -> Self {
        let detached = Box::new(detached);
        Self { kind, detached }
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

/// See [`Transports::reattach`](crate::Transports::reattach).
pub(crate) fn reattach<T: StreamTransport, P: Protocol<T>>(
    reactor: &mut Reactor,
    mut detached: Detached<P>,
) -> Result<Token, ReattachError<P>> {
    let failed = |kind, detached| Err(ReattachError::new(kind, detached));
    if let Err(kind) = check_unsent(&detached.descriptors, &detached.unsent) {
        return failed(kind, detached);
    }
    let mut layer = match detached.layer.downcast::<T::Layer>() {
        Ok(layer) => *layer,
        Err(layer) => {
            return failed(AdoptErrorKind::WrongFamily, Detached { layer, ..detached });
        }
    };
    if let Err(error) = layer.come_back() {
        let layer = Box::new(layer);
        return failed(AdoptErrorKind::Os(error), Detached { layer, ..detached });
    }
    if let Err((fd, writing)) = attach(layer.socket_mut(), detached.fd, detached.writing) {
        let detached = Detached {
            fd,
            writing,
            layer: Box::new(layer),
            ..detached
        };
        return failed(AdoptErrorKind::WrongFamily, detached);
    }
    // Called only once nothing can fail any more.
    let mut kept = detached.kept.take();
    let prepare = |stream: &mut Stream<T::Layer>| {
        let is_paused = kept.as_ref().is_some_and(|kept| kept.producer_is_paused);
        restore_link(stream, kept.as_mut());
        stream.restore_unsent(Unsent {
            bytes: mem::take(&mut detached.unsent),
            descriptors: mem::take(&mut detached.descriptors),
        });
        stream.link.push_back(mem::take(&mut detached.unread));
        if let Some((producer, kind)) = detached.producer.take() {
            stream.restore_producer(producer, kind, is_paused);
        }
    };
    let protocol = detached.protocol;
    match put_stream::<T, _, _>(reactor, layer, |layer| layer, protocol, false, prepare) {
        Ok(token) => Ok(token),
        Err((error, mut layer, protocol)) => {
            let socket = layer.socket_mut();
            let fd = socket.detach().expect("it was just put there");
            let writing = socket.detach_writing();
            let detached = Detached {
                fd,
                writing,
                protocol,
                layer: Box::new(layer),
                kept,
                ..detached
            };
            failed(AdoptErrorKind::Os(error), detached)
        }
    }
}

fn restore_link<L: FileDescriptor>(stream: &mut Stream<L>, kept: Option<&mut Kept>) {
    stream.link.set(Flags::SHARED);
    if let Some(kept) = kept {
        stream.link.restore(kept);
    }
    if stream.layer.undelivered() > 0 {
        // No event reports this.
        stream.link.set(Flags::READABLE);
    }
}

/// Puts the descriptors back into a socket, or gives both back if that fails.
fn attach(
    socket: &mut dyn Socket,
    fd: OwnedFd,
    writing: Option<OwnedFd>,
) -> Result<(), (OwnedFd, Option<OwnedFd>)> {
    if let Err(fd) = socket.attach(fd) {
        return Err((fd, writing));
    }
    let Some(writing) = writing else {
        return Ok(());
    };
    socket.attach_writing(writing).map_err(|writing| {
        let fd = socket.detach().expect("it was just put there");
        (fd, Some(writing))
    })
}

/// Asks a connection to take itself apart, and names the part of its protocol that is
/// wanted.
pub(crate) struct DetachRequest {
    pub(crate) part: TypeId,
    pub(crate) result: Option<Result<Detached<Box<dyn Any>>, DetachError>>,
}

pub(crate) struct DetachListenerRequest {
    pub(crate) fd: Option<OwnedFd>,
}

type PartCall<T> = Box<dyn FnOnce(&mut dyn Any, &mut Context<'_, T>)>;

/// Asks a connection to call a part of its protocol.
pub(crate) struct ProtocolCall<T> {
    pub(crate) part: TypeId,
    pub(crate) call: Option<PartCall<T>>,
    pub(crate) error: CallError,
}
