//! The kinds of connection that come with bowline. Each is a file.
//!
//! A new kind takes a file here, a line in the list below, tests, and documentation.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use bowline_protocol::ConnectError;

use crate::endpoint::Dial;
use crate::error::{AdoptError, AdoptErrorKind};
use crate::sys::{self, Connecting, Family, SocketName};

mod ends;
mod pipe;
mod socket_fd;
mod socket_file;
mod tcp;
mod udp;
mod unix;
mod unix_datagram;
mod unix_messages;
mod unix_seqpacket;

pub(crate) use self::pipe::OwnEnd;
pub use self::pipe::{Pipe, PipeEnds, PipePair, PipeStream, PipeWay, Stdio};
pub use self::socket_file::StaleSocket;
pub use self::tcp::{OverTcp, Tcp, TcpConnect, TcpListen, TcpListener, TcpSocket, TcpStream};
pub use self::udp::{Udp, UdpConnect, UdpEndpoint, UdpListen, UdpPort, UdpSocket};
pub use self::unix::{Unix, UnixConnect, UnixListen, UnixListener, UnixSocket, UnixStream};
pub(crate) use self::unix::{address_of, address_ref};
pub use self::unix_datagram::{
    UnixDatagram, UnixDatagramConnect, UnixDatagramEndpoint, UnixDatagramListen, UnixDatagramPort,
    UnixDatagramSocket,
};
pub use self::unix_seqpacket::{
    UnixSeqpacket, UnixSeqpacketConnect, UnixSeqpacketListen, UnixSeqpacketListener,
    UnixSeqpacketPort, UnixSeqpacketSocket,
};

/// The layers that a kind puts on its sockets by itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct Plain;

/// How many connections may wait to be accepted by default. The kernel cuts it to
/// `net.core.somaxconn`.
const BACKLOG: u32 = 1024;

/// How long an attempt to connect may take by default. (Twisted: 30 s.)
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

fn backlog(asked: u32) -> i32 {
    i32::try_from(asked).unwrap_or(i32::MAX)
}

impl Connecting {
    /// The result of dialling with `socket`.
    fn dial<S>(self, socket: S) -> Dial<S> {
        match self {
            Self::Done => Dial::Connected(socket),
            Self::InProgress => Dial::InProgress(socket),
            Self::BacklogFull => Dial::Full,
        }
    }
}

/// Asks whether a socket is connected by now. `None` after a spurious event, if it
/// neither is nor has failed.
pub(crate) fn outcome(socket: BorrowedFd<'_>) -> Option<Result<(), ConnectError>> {
    match sys::take_error(socket) {
        Ok(None) => match sys::peer_name(socket) {
            Ok(_) => Some(Ok(())),
            Err(error) if error.kind() == io::ErrorKind::NotConnected => None,
            Err(error) => Some(Err(ConnectError::Os(error))),
        },
        Ok(Some(error)) | Err(error) => Some(Err(ConnectError::from_os(error))),
    }
}

/// The family that a stream socket should have.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Of {
    Inet,
    Unix,
}

/// Checks a connected socket that came from somewhere else, makes it fit for the loop,
/// and returns its peer. It is made non-blocking. Its other holders can notice nothing
/// else.
fn check_connected(fd: OwnedFd, wanted: Of) -> Result<(OwnedFd, SocketName), AdoptError> {
    match connected(fd.as_fd(), wanted).and_then(|peer| made_fit(fd.as_fd()).map(|()| peer)) {
        Ok(peer) => Ok((fd, peer)),
        Err(kind) => Err(AdoptError { kind, fd }),
    }
}

/// As [`check_connected`], for a socket that listens.
fn check_listening(fd: OwnedFd, wanted: Of) -> Result<OwnedFd, AdoptError> {
    match look_closely(fd.as_fd(), wanted, true).and_then(|()| made_fit(fd.as_fd())) {
        Ok(()) => Ok(fd),
        Err(kind) => Err(AdoptError { kind, fd }),
    }
}

fn made_fit(fd: BorrowedFd<'_>) -> Result<(), AdoptErrorKind> {
    sys::set_nonblocking(fd).map_err(AdoptErrorKind::Os)?;
    sys::set_close_on_exec(fd).map_err(AdoptErrorKind::Os)
}

fn connected(fd: BorrowedFd<'_>, wanted: Of) -> Result<SocketName, AdoptErrorKind> {
    // This asks two questions for each connection that was accepted elsewhere. The
    // closer look asks three. A socket with a peer does not listen, and the peer's name
    // has the family of the socket.
    match sys::peer_name(fd) {
        Ok(name) if is_of(&name, wanted) && sys::is_stream(fd).unwrap_or(false) => Ok(name),
        answer => {
            look_closely(fd, wanted, false)?;
            answer.map_err(|error| match error.kind() {
                io::ErrorKind::NotConnected => AdoptErrorKind::NotConnected,
                _ => AdoptErrorKind::Os(error),
            })
        }
    }
}

fn is_of(name: &SocketName, wanted: Of) -> bool {
    match name {
        SocketName::Inet(_) => wanted == Of::Inet,
        SocketName::UnixUnnamed | SocketName::UnixPath(_) | SocketName::UnixAbstract(_) => {
            wanted == Of::Unix
        }
        SocketName::Other(_) => false,
    }
}

/// Checks a datagram socket that came from somewhere else, and makes it fit for the
/// loop. Returns its family, and its peer if it has one.
fn check_datagrams(
    fd: OwnedFd,
    wanted: Of,
) -> Result<(OwnedFd, Family, Option<SocketName>), AdoptError> {
    match datagrams(fd.as_fd(), wanted) {
        Ok((family, peer)) => Ok((fd, family, peer)),
        Err(kind) => Err(AdoptError { kind, fd }),
    }
}

fn datagrams(
    fd: BorrowedFd<'_>,
    wanted: Of,
) -> Result<(Family, Option<SocketName>), AdoptErrorKind> {
    let kind = kind_of(fd)?;
    let family = match kind.domain {
        Some(family @ (Family::Inet4 | Family::Inet6)) if wanted == Of::Inet => family,
        Some(family @ Family::Unix) if wanted == Of::Unix => family,
        _ => return Err(AdoptErrorKind::WrongFamily),
    };
    if !sys::is_datagram(fd).map_err(AdoptErrorKind::Os)? {
        return Err(AdoptErrorKind::NotADatagramSocket);
    }
    let peer = match sys::peer_name(fd) {
        Ok(name) => Some(name),
        Err(error) if error.kind() == io::ErrorKind::NotConnected => None,
        Err(error) => return Err(AdoptErrorKind::Os(error)),
    };
    made_fit(fd)?;
    Ok((family, peer))
}

/// Checks a UNIX socket of sequenced packets that came from somewhere else, connected
/// or listening, and makes it fit for the loop. Returns its peer, if it is connected.
fn check_packets(
    fd: OwnedFd,
    listening: bool,
) -> Result<(OwnedFd, Option<SocketName>), AdoptError> {
    match packets(fd.as_fd(), listening) {
        Ok(peer) => Ok((fd, peer)),
        Err(kind) => Err(AdoptError { kind, fd }),
    }
}

fn packets(fd: BorrowedFd<'_>, listening: bool) -> Result<Option<SocketName>, AdoptErrorKind> {
    let kind = kind_of(fd)?;
    if kind.domain != Some(Family::Unix) {
        return Err(AdoptErrorKind::WrongFamily);
    }
    if !sys::is_packets(fd).map_err(AdoptErrorKind::Os)? {
        return Err(AdoptErrorKind::NotPackets);
    }
    let peer = match (kind.listening, listening) {
        (true, false) => return Err(AdoptErrorKind::Listening),
        (false, true) => return Err(AdoptErrorKind::NotListening),
        (true, true) => None,
        (false, false) => match sys::peer_name(fd) {
            Ok(name) => Some(name),
            Err(error) if error.kind() == io::ErrorKind::NotConnected => {
                return Err(AdoptErrorKind::NotConnected);
            }
            Err(error) => return Err(AdoptErrorKind::Os(error)),
        },
    };
    made_fit(fd)?;
    Ok(peer)
}

fn kind_of(fd: BorrowedFd<'_>) -> Result<sys::SocketKind, AdoptErrorKind> {
    sys::socket_kind(fd).map_err(|error| {
        if sys::is_not_a_socket(&error) {
            AdoptErrorKind::NotASocket
        } else {
            AdoptErrorKind::Os(error)
        }
    })
}

/// Returns what is wrong with `fd`, if anything is.
fn look_closely(fd: BorrowedFd<'_>, wanted: Of, listening: bool) -> Result<(), AdoptErrorKind> {
    let kind = kind_of(fd)?;
    match kind.domain {
        Some(Family::Inet4 | Family::Inet6) if wanted == Of::Inet => {}
        Some(Family::Unix) if wanted == Of::Unix => {}
        _ => return Err(AdoptErrorKind::WrongFamily),
    }
    if !kind.stream {
        return Err(AdoptErrorKind::NotAStream);
    }
    match (kind.listening, listening) {
        (true, false) => Err(AdoptErrorKind::Listening),
        (false, true) => Err(AdoptErrorKind::NotListening),
        _ => Ok(()),
    }
}
