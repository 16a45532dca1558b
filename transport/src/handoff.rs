//! Taking sockets over from somewhere else, and giving them away.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};

use bowline_protocol::{Address, Context, ProducerKind, ProducerRef};

use crate::connection::{HostName, Names};
use crate::descriptor_queue::{self, UnsentDescriptors};
use crate::error::{AdoptError, AdoptErrorKind};
use crate::file_descriptor::Kept;
use crate::sys::{self, Family, SocketName};

/// A connection taken apart: its socket and everything that had not left.
///
/// The socket is deregistered and open, non-blocking and close-on-exec; what
/// the kernel holds for it, unread or unsent, goes with it.
pub struct Detached<P> {
    /// The socket.
    pub fd: OwnedFd,
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

impl<P> fmt::Debug for Detached<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Detached")
            .field("fd", &self.fd)
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

pub(crate) struct DetachRequest<P> {
    pub(crate) result: Option<Detached<P>>,
    /// The protocol was of the right type, and there is no connection.
    pub(crate) is_lost: bool,
}

pub(crate) struct DetachListenerRequest {
    pub(crate) fd: Option<OwnedFd>,
}

type Call<F, P> = Box<dyn FnOnce(&mut P, &mut Context<'_, F>)>;

pub(crate) struct ProtocolCall<F, P> {
    pub(crate) call: Option<Call<F, P>>,
}

/// What is to be adopted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Adopted {
    TcpListener,
    UnixListener,
    TcpStream,
    UnixStream,
}

/// Checks a descriptor that came from somewhere else, and makes it fit for the
/// loop. Nothing is done to the socket that its other holders could notice but
/// making it non-blocking.
pub(crate) fn check(fd: OwnedFd, wanted: Adopted) -> Result<(OwnedFd, Names), AdoptError> {
    match check_kind(&fd, wanted) {
        Ok(names) => Ok((fd, names)),
        Err(kind) => Err(AdoptError { kind, fd }),
    }
}

fn check_kind(fd: &OwnedFd, wanted: Adopted) -> Result<Names, AdoptErrorKind> {
    let peer = match wanted {
        Adopted::TcpListener | Adopted::UnixListener => {
            look_closely(fd, wanted)?;
            SocketName::Other(0)
        }
        // Two questions where the closer look has three, for every connection that
        // somebody accepted elsewhere: what has a peer does not listen, and the
        // peer's name is of the socket's family.
        Adopted::TcpStream | Adopted::UnixStream => match sys::peer_name(fd.as_fd()) {
            Ok(name) if is_of(&name, wanted) && sys::is_stream(fd.as_fd()).unwrap_or(false) => name,
            answer => {
                look_closely(fd, wanted)?;
                answer.map_err(|error| match error.kind() {
                    std::io::ErrorKind::NotConnected => AdoptErrorKind::NotConnected,
                    _ => AdoptErrorKind::Os(error),
                })?
            }
        },
    };
    sys::set_nonblocking(fd.as_fd()).map_err(AdoptErrorKind::Os)?;
    sys::set_close_on_exec(fd.as_fd()).map_err(AdoptErrorKind::Os)?;
    Ok(Names {
        host: HostName::Unknown,
        peer,
        refuses_descriptors: false,
    })
}

fn is_of(name: &SocketName, wanted: Adopted) -> bool {
    match name {
        SocketName::Inet(_) => wanted == Adopted::TcpStream,
        SocketName::UnixUnnamed | SocketName::UnixPath(_) | SocketName::UnixAbstract(_) => {
            wanted == Adopted::UnixStream
        }
        SocketName::Other(_) => false,
    }
}

/// Says what is wrong with `fd`, if anything is.
fn look_closely(fd: &OwnedFd, wanted: Adopted) -> Result<(), AdoptErrorKind> {
    let kind = sys::socket_kind(fd.as_fd()).map_err(|error| {
        if sys::is_not_a_socket(&error) {
            AdoptErrorKind::NotASocket
        } else {
            AdoptErrorKind::Os(error)
        }
    })?;
    let is_tcp = matches!(wanted, Adopted::TcpListener | Adopted::TcpStream);
    let is_listener = matches!(wanted, Adopted::TcpListener | Adopted::UnixListener);
    match kind.domain {
        Some(Family::Inet4 | Family::Inet6) if is_tcp => {}
        Some(Family::Unix) if !is_tcp => {}
        _ => return Err(AdoptErrorKind::WrongFamily),
    }
    if !kind.stream {
        return Err(AdoptErrorKind::NotAStream);
    }
    match (kind.listening, is_listener) {
        (true, false) => Err(AdoptErrorKind::Listening),
        (false, true) => Err(AdoptErrorKind::NotListening),
        _ => Ok(()),
    }
}
