//! Single connections: `sockpair@`.

use std::fmt;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;

use bowline::framing::{
    Decoded, EncodeError, Envelope, FrameContext, FrameEncoder, FrameReceiver, Framed, Framer,
    FramingError, Pairing, Unclaimed,
};
use bowline::process::describe_socket;
use bowline::{Address, Reactor, UnixTransport};

/// Bytes of a message. HAProxy sends zeros, and does not read them.
const MESSAGE: usize = 2;

/// Makes a protocol that accepts connections on one end of a pair of sockets. `connection`
/// is called with one end of each connection, to be [adopted](bowline::Transports::adopt)
/// as a [`Unix`](bowline::Unix) stream.
///
/// A descriptor that is not a connected UNIX stream is closed and logged. A message without
/// a descriptor, or with more than one, breaks the framing.
pub fn take_connections(
    connection: impl FnMut(&mut Reactor, OwnedFd) + 'static,
) -> Framed<SockpairFramer, ConnectionTaker> {
    let taker = ConnectionTaker {
        connection: Box::new(connection),
    };
    Framed::new(SockpairFramer, taker)
        .pairing(Pairing::Claimed(Unclaimed::Fail))
        .max_descriptors(1)
}

/// Opens a connection to the process at the other end of `transport`. Returns our end, to
/// be [adopted](bowline::Transports::adopt). What is written to it before the peer has
/// received its end waits in the kernel.
///
/// # Errors
///
/// No descriptors are available; the error is the kernel's. Or
/// [`write_with_descriptors`](UnixTransport::write_with_descriptors) refuses; the error is
/// [`Other`](io::ErrorKind::Other).
pub fn give_connection(transport: &mut (impl UnixTransport + ?Sized)) -> io::Result<OwnedFd> {
    let (ours, theirs) = StdUnixStream::pair()?;
    let theirs = vec![OwnedFd::from(theirs).into()];
    SockpairFramer
        .send_with_descriptors_to(transport, &(), b"", theirs)
        .map_err(|error| io::Error::other(error.kind))?;
    Ok(ours.into())
}

/// Finds and encodes messages of two bytes, each of which has one descriptor.
#[derive(Clone, Copy, Debug, Default)]
pub struct SockpairFramer;

impl Framer for SockpairFramer {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FramingError> {
        Ok(match input.len() {
            MESSAGE.. => Decoded::Frame {
                payload: 0..MESSAGE,
                consumed: MESSAGE,
            },
            length => Decoded::NeedMore {
                at_least: MESSAGE - length,
            },
        })
    }

    fn claims(&self, _: &[u8]) -> Option<usize> {
        Some(1)
    }
}

impl FrameEncoder for SockpairFramer {
    type Header = ();

    /// Encodes a message, which has no payload and exactly one descriptor.
    fn envelope(
        &self,
        _: &(),
        payload: &[u8],
        descriptors: usize,
    ) -> Result<Envelope<'_>, EncodeError> {
        let what = match (payload.len(), descriptors) {
            (0, 1) => return Ok(Envelope::new(&[0; MESSAGE], b"")),
            (0, _) => "a connection is one descriptor",
            _ => "a connection has no payload",
        };
        Err(EncodeError::Malformed { what })
    }

    /// 1. HAProxy writes past the end of its own memory if there are two.
    fn max_descriptors(&self) -> usize {
        1
    }
}

type OnConnection = Box<dyn FnMut(&mut Reactor, OwnedFd)>;

/// The receiver that [`take_connections`] puts into its [`Framed`].
pub struct ConnectionTaker {
    connection: OnConnection,
}

impl<T: UnixTransport> FrameReceiver<T, SockpairFramer> for ConnectionTaker {
    fn frame_received(&mut self, cx: &mut FrameContext<'_, T, SockpairFramer>, _: &[u8]) {
        let fd = cx
            .framing
            .descriptors()
            .next()
            .expect("a message claims one");
        let is_connection = describe_socket(fd.as_fd()).is_ok_and(|it| {
            it.is_stream && !it.is_listening && matches!(it.address, Some(Address::Unix(_)))
        });
        if is_connection {
            (self.connection)(cx.reactor, fd);
        } else {
            cx.transport.close_unclaimed(vec![fd]);
        }
    }
}

impl fmt::Debug for ConnectionTaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionTaker").finish_non_exhaustive()
    }
}
