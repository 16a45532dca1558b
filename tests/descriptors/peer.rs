//! The other end: raw calls by rustix, files that can be told apart, and the
//! records of the log.

use std::cell::RefCell;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::rc::Rc;
use std::sync::Once;

use bowline::{
    CloseReason, Context, Protocol, Reactor, Transports, UnixStream, UnixTransport,
    UnixTransportHandle,
};
use rustix::fs::MemfdFlags;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::support::{in_short, socketpair};

/// The most descriptors that one message carries.
pub(crate) const MOST: usize = 253;

/// What one read of the raw peer brought.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) data: Vec<u8>,
    pub(crate) descriptors: Vec<OwnedFd>,
}

impl Message {
    /// The bytes, and what the descriptors refer to.
    pub(crate) fn contents(&self) -> (&[u8], Vec<Identity>) {
        (&self.data, identities(&self.descriptors))
    }
}

/// Reads once, at most `limit` bytes; `None` if there is nothing yet.
#[track_caller]
pub(crate) fn receive(peer: &StdUnixStream, limit: usize) -> Option<Message> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut data = vec![0; limit];
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let parts = &mut [IoSliceMut::new(&mut data)];
    let received = match rustix::net::recvmsg(peer, parts, &mut control, flags) {
        Ok(received) => received,
        Err(rustix::io::Errno::WOULDBLOCK) => return None,
        Err(error) => panic!("recvmsg: {error}"),
    };
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(list) = message {
            descriptors.extend(list);
        }
    }
    data.truncate(received.bytes);
    Some(Message { data, descriptors })
}

/// Reads until nothing is left.
#[track_caller]
pub(crate) fn receive_all(peer: &StdUnixStream) -> Vec<Message> {
    let mut all = Vec::new();
    while let Some(message) = receive(peer, 65_536) {
        if message.data.is_empty() {
            break;
        }
        all.push(message);
    }
    all
}

/// Sends once.
pub(crate) fn send(
    peer: &StdUnixStream,
    data: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let sent = rustix::net::sendmsg(peer, &[IoSlice::new(data)], &mut control, flags)?;
    Ok(sent)
}

/// Sends all of `data` at once.
#[track_caller]
pub(crate) fn send_message(peer: &StdUnixStream, data: &[u8], descriptors: &[OwnedFd]) {
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    assert_eq!(send(peer, data, &borrowed).expect("room"), data.len());
}

/// What a descriptor refers to: device and inode.
pub(crate) type Identity = (u64, u64);

#[track_caller]
pub(crate) fn identity(fd: impl AsFd) -> Identity {
    let status = rustix::fs::fstat(fd).expect("it is open");
    (status.st_dev, status.st_ino)
}

#[track_caller]
pub(crate) fn identities(descriptors: &[OwnedFd]) -> Vec<Identity> {
    descriptors.iter().map(identity).collect()
}

/// A file like no other.
pub(crate) fn file() -> OwnedFd {
    rustix::fs::memfd_create("passed", MemfdFlags::CLOEXEC).expect("a descriptor is free")
}

/// Files, and what they are.
pub(crate) fn files(count: usize) -> (Vec<OwnedFd>, Vec<Identity>) {
    let all: Vec<OwnedFd> = std::iter::repeat_with(file).take(count).collect();
    let identities = identities(&all);
    (all, identities)
}

/// As many descriptors as the system lets us have.
pub(crate) fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, raised).expect("up to the maximum is allowed");
}

/// A protocol on one end of a socketpair, and the other end.
#[track_caller]
pub(crate) fn adopt(
    reactor: &mut Reactor,
    protocol: impl Protocol<UnixStream>,
) -> (UnixTransportHandle, StdUnixStream) {
    let (ours, theirs) = socketpair();
    let handle = reactor
        .adopt_unix_stream(ours.into(), protocol)
        .expect("adopted");
    (handle, theirs)
}

/// The smallest send buffer that the kernel allows.
pub(crate) fn shrink_send_buffer(socket: &StdUnixStream) {
    rustix::net::sockopt::set_socket_send_buffer_size(socket, 1).expect("a socket");
}

#[track_caller]
pub(crate) fn transport(
    reactor: &mut Reactor,
    handle: UnixTransportHandle,
) -> &mut dyn UnixTransport {
    reactor.get(handle).expect("it is still there")
}

/// Runs something inside a callback: each part of a connection's life is one
/// closure.
pub(crate) type Callback<A, R> = Box<dyn FnMut(&mut Context<'_, UnixStream>, A) -> R>;

/// A protocol that takes descriptors one by one, as `on_descriptor` says.
pub(crate) struct OneByOne {
    pub(crate) on_descriptor: Callback<OwnedFd, Result<(), OwnedFd>>,
    pub(crate) seen: Seen,
}

/// What a [`OneByOne`] was told, in order.
#[derive(Clone, Default)]
pub(crate) struct Seen(Rc<RefCell<Vec<String>>>);

impl Seen {
    pub(crate) fn push(&self, what: impl Into<String>) {
        self.0.borrow_mut().push(what.into());
    }

    pub(crate) fn all(&self) -> Vec<String> {
        self.0.borrow().clone()
    }

    pub(crate) fn has(&self, what: &str) -> bool {
        self.0.borrow().iter().any(|seen| seen.starts_with(what))
    }
}

impl OneByOne {
    pub(crate) fn new(
        seen: &Seen,
        on_descriptor: impl FnMut(&mut Context<'_, UnixStream>, OwnedFd) -> Result<(), OwnedFd>
        + 'static,
    ) -> Self {
        Self {
            on_descriptor: Box::new(on_descriptor),
            seen: seen.clone(),
        }
    }
}

impl Protocol<UnixStream> for OneByOne {
    fn file_descriptor_received(
        &mut self,
        cx: &mut Context<'_, UnixStream>,
        fd: OwnedFd,
    ) -> Result<(), OwnedFd> {
        self.seen.push("descriptor");
        (self.on_descriptor)(cx, fd)
    }

    fn data_received(&mut self, _: &mut Context<'_, UnixStream>, data: &[u8]) {
        self.seen.push(format!("data {}", data.escape_ascii()));
    }

    fn descriptors_sent(&mut self, _: &mut Context<'_, UnixStream>, count: usize) {
        self.seen.push(format!("sent {count}"));
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, UnixStream>, reason: &CloseReason) {
        let unsent = cx.transport.unsent_descriptors();
        self.seen
            .push(format!("lost {}; {unsent} unsent", in_short(reason)));
    }
}

/// A protocol that wants bytes and no descriptors.
pub(crate) struct BytesOnly {
    pub(crate) seen: Seen,
}

impl<T: bowline::Transport> Protocol<T> for BytesOnly {
    fn data_received(&mut self, _: &mut Context<'_, T>, data: &[u8]) {
        self.seen.push(format!("data {}", data.escape_ascii()));
    }

    fn connection_lost(&mut self, _: &mut Context<'_, T>, reason: &CloseReason) {
        self.seen.push(format!("lost {reason}"));
    }
}

thread_local! {
    static LOGGED: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

struct Capture;

impl log::Log for Capture {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let line = format!("{} {}: {}", record.level(), record.target(), record.args());
        LOGGED.with_borrow_mut(|lines| lines.push(line));
    }

    fn flush(&self) {}
}

/// Keeps what this thread logs from now on; what it has logged so far is
/// forgotten.
pub(crate) fn capture_log() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&Capture).expect("there is no other");
        log::set_max_level(log::LevelFilter::Debug);
    });
    LOGGED.with_borrow_mut(Vec::clear);
}

/// The lines with `level` and `text` in them.
pub(crate) fn logged(level: log::Level, text: &str) -> Vec<String> {
    LOGGED.with_borrow(|lines| {
        let matches = |line: &&String| line.starts_with(level.as_str()) && line.contains(text);
        lines.iter().filter(matches).cloned().collect()
    })
}
