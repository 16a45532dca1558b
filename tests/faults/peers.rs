//! The other ends of the connections: sockets of std, driven by hand, whose
//! calls are not counted.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}

/// What a peer does when everything it expects has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Farewell {
    /// Closes its side and reads to the end.
    HalfClose,
    /// Closes.
    Close,
    /// Waits for the other end to close.
    Wait,
}

/// Sends, expects the same back, and says farewell.
pub(crate) struct Peer {
    socket: Option<Socket>,
    unsent: Vec<u8>,
    /// Messages, each of a byte and as many descriptors.
    messages: Vec<Vec<OwnedFd>>,
    expected: usize,
    expected_descriptors: usize,
    farewell: Farewell,
    is_reading: bool,
    has_said_farewell: bool,
    pub(crate) received: Vec<u8>,
    pub(crate) descriptors: Vec<OwnedFd>,
    /// How it ended: in order, or with an error.
    pub(crate) end: Option<io::Result<()>>,
}

impl Peer {
    pub(crate) fn tcp(address: SocketAddr) -> Self {
        Self::new(TcpStream::connect(address).and_then(|stream| {
            stream.set_nonblocking(true)?;
            Ok(Socket::Tcp(stream))
        }))
    }

    pub(crate) fn unix(path: &Path) -> Self {
        Self::new(UnixStream::connect(path).and_then(|stream| {
            stream.set_nonblocking(true)?;
            Ok(Socket::Unix(stream))
        }))
    }

    /// On a socket that is connected and non-blocking.
    pub(crate) fn on(stream: UnixStream) -> Self {
        Self::new(Ok(Socket::Unix(stream)))
    }

    pub(crate) fn on_tcp(stream: TcpStream) -> Self {
        let switched = stream.set_nonblocking(true);
        Self::new(switched.map(|()| Socket::Tcp(stream)))
    }

    fn new(socket: io::Result<Socket>) -> Self {
        let (socket, end) = match socket {
            Ok(socket) => (Some(socket), None),
            Err(error) => (None, Some(Err(error))),
        };
        Self {
            socket,
            unsent: Vec::new(),
            messages: Vec::new(),
            expected: 0,
            expected_descriptors: 0,
            farewell: Farewell::HalfClose,
            is_reading: true,
            has_said_farewell: false,
            received: Vec::new(),
            descriptors: Vec::new(),
            end,
        }
    }

    /// Sends these bytes and expects them back.
    pub(crate) fn echoes(mut self, bytes: usize) -> Self {
        self.unsent = pattern(bytes);
        self.expected = bytes;
        self
    }

    /// Sends these bytes and does not expect them back.
    pub(crate) fn says(mut self, bytes: usize) -> Self {
        self.unsent = pattern(bytes);
        self
    }

    /// Sends these, a byte to each message, and expects all back.
    pub(crate) fn passes(mut self, messages: Vec<Vec<OwnedFd>>) -> Self {
        self.expected = messages.len();
        self.expected_descriptors = messages.iter().map(Vec::len).sum();
        self.messages = messages;
        self.messages.reverse();
        self
    }

    /// Expects bytes that it does not ask for.
    pub(crate) fn expects(mut self, bytes: usize) -> Self {
        self.expected = bytes;
        self
    }

    pub(crate) fn then(mut self, farewell: Farewell) -> Self {
        self.farewell = farewell;
        self
    }

    /// How many descriptors it has open.
    pub(crate) fn open(&self) -> usize {
        let passed: usize = self.messages.iter().map(Vec::len).sum();
        usize::from(self.socket.is_some()) + passed + self.descriptors.len()
    }

    /// Never reads; notices the end by failing to send.
    pub(crate) fn without_reading(mut self) -> Self {
        self.is_reading = false;
        self
    }

    pub(crate) fn read_from_now_on(&mut self) {
        self.is_reading = true;
    }

    pub(crate) fn is_done(&self) -> bool {
        self.end.is_some()
    }

    /// Whether everything that it expected has come, as it was sent.
    pub(crate) fn is_satisfied(&self) -> bool {
        matches!(self.end, Some(Ok(())))
            && self.received.len() == self.expected
            && self.descriptors.len() == self.expected_descriptors
    }

    /// Whether it never received anything that it should not have.
    pub(crate) fn is_unharmed(&self) -> bool {
        self.received.len() <= self.expected
            && self.descriptors.len() <= self.expected_descriptors
            && (self.received == pattern(self.received.len())
                || self.received.iter().all(|byte| *byte == b'm'))
    }

    /// Does what it can without waiting.
    pub(crate) fn step(&mut self) {
        if let Err(error) = self.try_step() {
            self.end = Some(Err(error));
        }
        if self.end.is_some() {
            self.socket = None;
        }
    }

    fn try_step(&mut self) -> io::Result<()> {
        let Some(socket) = &mut self.socket else {
            return Ok(());
        };
        while !self.unsent.is_empty() {
            let sent = match socket {
                Socket::Tcp(stream) => stream.write(&self.unsent),
                Socket::Unix(stream) => stream.write(&self.unsent),
            };
            match sent {
                Ok(count) => drop(self.unsent.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        while let Some(message) = self.messages.last() {
            match send_message(socket.fd(), message) {
                Ok(()) => drop(self.messages.pop()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        while self.is_reading {
            let mut buffer = [0; 16_384];
            let count = match socket {
                Socket::Tcp(stream) => stream.read(&mut buffer),
                Socket::Unix(stream) => receive(stream.as_fd(), &mut buffer, &mut self.descriptors),
            };
            match count {
                Ok(0) => {
                    self.end = Some(Ok(()));
                    return Ok(());
                }
                Ok(count) => self.received.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        let has_all = self.received.len() >= self.expected
            && self.descriptors.len() >= self.expected_descriptors;
        if has_all && !self.has_said_farewell && self.unsent.is_empty() {
            self.has_said_farewell = true;
            match self.farewell {
                Farewell::Wait => {}
                Farewell::Close => self.end = Some(Ok(())),
                Farewell::HalfClose => match socket {
                    Socket::Tcp(stream) => stream.shutdown(Shutdown::Write)?,
                    Socket::Unix(stream) => stream.shutdown(Shutdown::Write)?,
                },
            }
        }
        Ok(())
    }
}

/// Bytes whose place can be told.
pub(crate) fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|n| (n % 251) as u8).collect()
}

fn send_message(fd: BorrowedFd<'_>, descriptors: &[OwnedFd]) -> io::Result<()> {
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&borrowed)));
    }
    sendmsg(fd, &[IoSlice::new(b"m")], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn receive(
    fd: BorrowedFd<'_>,
    buffer: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = recvmsg(
        fd,
        &mut [IoSliceMut::new(buffer)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    for received in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = received {
            descriptors.extend(received);
        }
    }
    Ok(message.bytes)
}
