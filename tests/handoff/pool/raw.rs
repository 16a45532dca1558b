//! One end of a channel by hand: frames of any kind, sent and read by plain
//! calls.

use std::io::{ErrorKind, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;

use bowline::handoff::channel::{Hello, Role};
use bowline::handoff::pool::{Dispatch, FromWorker, WorkerRefusal};
use bowline::handoff::wire::{Message, decode_payload, encode_frame};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::frames::Frames;

/// The other end of a worker's, or a pool's, channel.
pub(crate) struct Raw {
    pub(crate) socket: StdUnixStream,
    frames: Frames,
}

impl Raw {
    /// Says nothing.
    pub(crate) fn silent(socket: StdUnixStream) -> Self {
        socket.set_nonblocking(true).expect("a socket");
        Self {
            socket,
            frames: Frames::default(),
        }
    }

    /// Says hello in this role.
    pub(crate) fn new(socket: StdUnixStream, role: Role) -> Self {
        let raw = Self::silent(socket);
        raw.send(&hello(role), &[]).expect("room");
        raw
    }

    pub(crate) fn send<M: Message>(
        &self,
        message: &M,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), Errno> {
        send_bytes(&self.socket, &frame(message, fds.len()), fds)
    }

    /// What has come, the hello left out; `None` at the end.
    pub(crate) fn receive(&mut self) -> Option<Vec<FromWorker>> {
        let mut messages = Vec::new();
        let mut bytes = [0; 4096];
        let is_over = loop {
            match self.socket.read(&mut bytes) {
                Ok(0) => break true,
                Ok(count) => self.frames.feed(&bytes[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break false,
                Err(error) if error.kind() == ErrorKind::ConnectionReset => break true,
                Err(error) => panic!("{error}"),
            }
        };
        while let Some(frame) = self.frames.next() {
            if frame.kind >= 0x100 {
                let message = decode_payload(frame.kind, 1, &frame.payload);
                messages.push(message.expect("well formed"));
            }
        }
        (!is_over || !messages.is_empty()).then_some(messages)
    }
}

pub(crate) fn hello(role: Role) -> Hello {
    Hello {
        versions: 1..=1,
        role,
        pid: std::process::id(),
        max_payload: 1 << 20,
    }
}

/// Of one that knows messages with several connections.
pub(crate) fn hello_of_today(role: Role) -> Hello {
    Hello {
        versions: 1..=2,
        ..hello(role)
    }
}

pub(crate) fn dispatch(id: u64, read: &[u8]) -> Dispatch {
    Dispatch {
        id,
        label: 0,
        peer: None,
        read: read.to_vec(),
        unsent: Vec::new(),
        is_recalled: false,
        moved: None,
    }
}

/// What a worker says of one that it did not take.
pub(crate) fn refused(id: u64, reason: WorkerRefusal, live: u32) -> FromWorker {
    FromWorker::Refused { id, reason, live }
}

pub(crate) fn frame<M: Message>(message: &M, descriptors: usize) -> Vec<u8> {
    let mut frame = Vec::new();
    encode_frame(message, descriptors, &mut frame).expect("it fits");
    frame
}

/// Sends all of the bytes, with the descriptors on the first.
pub(crate) fn send_bytes(
    socket: &StdUnixStream,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let sent = sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)?;
    assert_eq!(sent, bytes.len(), "small messages go whole");
    Ok(())
}

/// A connected pair over TCP: the client, and what was accepted.
pub(crate) fn tcp_pair() -> (std::net::TcpStream, OwnedFd) {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("listens");
    let client = std::net::TcpStream::connect(listener.local_addr().expect("an address"));
    let (accepted, _) = listener.accept().expect("it connects");
    (client.expect("it listens"), accepted.into())
}

/// Everything that is no connection.
pub(crate) fn wrong_kinds() -> Vec<(&'static str, OwnedFd)> {
    use rustix::event::epoll;
    use rustix::fs::{Mode, OFlags, open};
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("listens");
    // Another holder has closed it: this copy still listens.
    let closed = listener.as_fd().try_clone_to_owned().expect("a copy");
    drop(listener);
    let datagram = std::net::UdpSocket::bind(("127.0.0.1", 0)).expect("bound");
    let (pipe, _) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("a pipe");
    let at = |path: &str, flags| {
        open(path, flags | OFlags::CLOEXEC, Mode::empty()).expect("it is there")
    };
    vec![
        ("file", at("/proc/self/comm", OFlags::RDONLY)),
        ("directory", at("/", OFlags::RDONLY | OFlags::DIRECTORY)),
        ("pipe", pipe),
        (
            "epoll",
            epoll::create(epoll::CreateFlags::CLOEXEC).expect("an epoll"),
        ),
        ("path", at("/", OFlags::PATH)),
        ("datagram", datagram.into()),
        ("closed listener", closed),
    ]
}
