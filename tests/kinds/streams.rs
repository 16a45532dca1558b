//! Streams: each method of their transports, each callback of their protocols.

use std::cell::{Cell as StdCell, RefCell};
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Seek, SeekFrom, Write};
use std::mem::MaybeUninit;
use std::net::{TcpListener as StdTcpListener, TcpStream as StdTcpStream};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use bowline::endpoint::Connect as _;
use bowline::error::DetachError;
use bowline::layers::{Stream, TcpSocket};
use bowline::tls::rustls::pki_types::PrivateKeyDer;
use bowline::tls::rustls::{RootCertStore, ServerConfig, ServerConnection};
use bowline::tls::{
    StartTls, Tls, TlsClient, TlsRole, TlsTransport, client_config_builder, server_config_builder,
};
use bowline::{
    Address, AfterReadClosed, AfterTruncation, AnyConnection as _, AtDrain, CloseReason, Context,
    DescriptorLimits, Detached, GracefulStop, Linger, LingeringClose, Part, Pipe, PipeStream,
    ProducerKind, ProducerRef, Protocol, Reactor, ReceivedDescriptors, Remains, Tcp, TcpStream,
    TcpTransport, Transport, TransportHandle, TransportState, Transports, Unix, UnixStream,
    UnixTransport, UnixTransportHandle, Watermarks, WriteObserver, WriteStatus,
};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, sockopt,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use crate::support::{DescriptorLedger, socketpair};
use crate::{Cell, Table, assert_right, has, methods_of, until};

const CONNECTION: &str = "protocol/src/connection.rs";
const TRANSPORT: &str = "protocol/src/transport.rs";
const PROTOCOL: &str = "protocol/src/protocol.rs";
const METHODS: &str = "What can be asked of a stream";
const CALLBACKS: &str = "What the protocol of a stream is told";

type TlsStream = Stream<Tls<TcpSocket>>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Tcp,
    Tls,
    Unix,
    Pair,
    Reading,
    Writing,
    Terminal,
    File,
}

/// The columns of both tables.
const KINDS: [(&str, Kind); 8] = [
    ("`Tcp`", Kind::Tcp),
    ("TLS on it", Kind::Tls),
    ("`Unix`", Kind::Unix),
    ("`Pipe::pair`", Kind::Pair),
    ("`Pipe::reading`", Kind::Reading),
    ("`Pipe::writing`", Kind::Writing),
    ("terminal", Kind::Terminal),
    ("file", Kind::File),
];

impl Kind {
    fn passes_descriptors(self) -> bool {
        match self {
            Self::Tcp => has!(TcpStream: UnixTransport),
            Self::Tls => has!(TlsStream: UnixTransport),
            Self::Unix => has!(UnixStream: UnixTransport),
            _ => has!(PipeStream: UnixTransport),
        }
    }

    fn has_tcp_options(self) -> bool {
        match self {
            Self::Tcp => has!(TcpStream: TcpTransport),
            Self::Tls => has!(TlsStream: TcpTransport),
            Self::Unix => has!(UnixStream: TcpTransport),
            _ => has!(PipeStream: TcpTransport),
        }
    }

    fn is_socket(self) -> bool {
        matches!(self, Self::Tcp | Self::Tls | Self::Unix)
    }
}

/// What the protocol was told.
#[derive(Default)]
struct Notes {
    calls: RefCell<Vec<&'static str>>,
    data: RefCell<Vec<Vec<u8>>>,
    received: RefCell<Vec<OwnedFd>>,
    handle: StdCell<Option<TransportHandle>>,
    reason: RefCell<String>,
}

/// Notes its callbacks, and begins paused.
struct Probe(Rc<Notes>);

impl Probe {
    fn note(&self, call: &'static str) {
        self.0.calls.borrow_mut().push(call);
    }
}

impl<T: Transport> Protocol<T> for Probe {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        self.note("connection_made");
        self.0.handle.set(Some(cx.transport.handle()));
        cx.transport.pause_producing();
    }

    fn data_received(&mut self, _: &mut Context<'_, T>, data: &[u8]) {
        self.note("data_received");
        self.0.data.borrow_mut().push(data.to_vec());
    }

    fn file_descriptor_received(
        &mut self,
        _: &mut Context<'_, T>,
        fd: OwnedFd,
    ) -> Result<(), OwnedFd> {
        self.note("file_descriptor_received");
        self.0.received.borrow_mut().push(fd);
        Ok(())
    }

    fn descriptors_received(
        &mut self,
        cx: &mut Context<'_, T>,
        descriptors: &mut ReceivedDescriptors<'_>,
        data: &[u8],
    ) {
        self.note("descriptors_received");
        for fd in descriptors {
            self.file_descriptor_received(cx, fd).unwrap();
        }
        self.data_received(cx, data);
    }

    fn descriptors_truncated(&mut self, _: &mut Context<'_, T>, _: usize) -> AfterTruncation {
        self.note("descriptors_truncated");
        AfterTruncation::KeepConnection
    }

    fn descriptors_sent(&mut self, _: &mut Context<'_, T>, _: usize) {
        self.note("descriptors_sent");
    }

    fn read_connection_lost(&mut self, _: &mut Context<'_, T>) -> AfterReadClosed {
        self.note("read_connection_lost");
        AfterReadClosed::KeepWriting
    }

    fn write_connection_lost(&mut self, _: &mut Context<'_, T>) {
        self.note("write_connection_lost");
    }

    fn connection_broken(&mut self, _: &mut Context<'_, T>, _: Remains) {
        self.note("connection_broken");
    }

    fn connection_lost(&mut self, _: &mut Context<'_, T>, reason: &CloseReason) {
        self.note("connection_lost");
        *self.0.reason.borrow_mut() = reason.to_string();
    }

    fn draining(&mut self, _: &mut Context<'_, T>) -> AtDrain {
        self.note("draining");
        AtDrain::LoseWhenIdle
    }

    fn is_idle(&self) -> bool {
        self.note("is_idle");
        true
    }

    fn reading_resumed(&mut self, _: &mut Context<'_, T>) {
        self.note("reading_resumed");
    }

    fn has_undelivered(&mut self) -> bool {
        self.note("has_undelivered");
        false
    }

    fn connection_reattached(&mut self, _: &mut Context<'_, T>) {
        self.note("connection_reattached");
    }

    fn connection_secured(&mut self, _: &mut Context<'_, T>) {
        self.note("connection_secured");
    }

    fn pause_producing(&mut self, _: &mut Context<'_, T>) {
        self.note("pause_producing");
    }

    fn resume_producing(&mut self, _: &mut Context<'_, T>) {
        self.note("resume_producing");
    }

    fn stop_producing(&mut self, _: &mut Context<'_, T>) {
        self.note("stop_producing");
    }

    fn part(&mut self, id: std::any::TypeId) -> Option<&mut dyn std::any::Any> {
        self.note("part");
        let this = self.as_any_mut();
        ((*this).type_id() == id).then_some(this)
    }

    fn into_part(self: Box<Self>, id: std::any::TypeId) -> Option<Box<dyn std::any::Any>> {
        self.note("into_part");
        let this = self.into_any();
        ((*this).type_id() == id).then_some(this)
    }

    fn describe(&self, description: &mut bowline::descriptor::Description) {
        self.note("describe");
        description.section("Probe");
    }

    fn log_prefix(&self) -> std::borrow::Cow<'_, str> {
        self.note("log_prefix");
        "Probe".into()
    }
}

/// The other side, by descriptors that do not block.
struct Peer {
    /// What it reads of ours.
    reading: Option<File>,
    /// What it writes to ours.
    writing: Option<File>,
    /// What is between the two and what it says.
    tls: Option<ServerConnection>,
    is_at_end: bool,
}

impl Peer {
    fn new(reading: Option<OwnedFd>, writing: Option<OwnedFd>) -> Self {
        for fd in [&reading, &writing].into_iter().flatten() {
            let flags = fcntl_getfl(fd).unwrap();
            fcntl_setfl(fd, flags | OFlags::NONBLOCK).unwrap();
        }
        Self {
            reading: reading.map(File::from),
            writing: writing.map(File::from),
            tls: None,
            is_at_end: false,
        }
    }

    /// With rustls' own records.
    fn secured(fd: OwnedFd, config: ServerConfig) -> Self {
        let mut this = Self::both(fd);
        this.tls = Some(ServerConnection::new(config.into()).unwrap());
        this
    }

    /// Has leave what rustls has for us; what cannot, or not any more, is left.
    fn flush(&mut self) {
        while let (Some(tls), Some(writing)) = (&mut self.tls, &mut self.writing)
            && tls.wants_write()
            && tls.write_tls(writing).is_ok()
        {}
    }

    fn write(&mut self, data: &[u8]) -> bool {
        let Some(writing) = &mut self.writing else {
            return false;
        };
        match &mut self.tls {
            None => writing.write_all(data).is_ok(),
            Some(tls) => {
                tls.writer().write_all(data).unwrap();
                self.flush();
                true
            }
        }
    }

    fn read_secured(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        while let (Some(tls), Some(reading)) = (&mut self.tls, &mut self.reading) {
            match tls.read_tls(reading) {
                Ok(0) => self.is_at_end = true,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => self.is_at_end = true,
            }
            let state = tls.process_new_packets().unwrap();
            self.is_at_end |= state.peer_has_closed();
            let mut plain = vec![0; state.plaintext_bytes_to_read()];
            tls.reader().read_exact(&mut plain).unwrap();
            all.extend(plain);
            if self.is_at_end {
                break;
            }
        }
        self.flush();
        all
    }

    fn both(fd: OwnedFd) -> Self {
        Self::new(Some(fd.try_clone().unwrap()), Some(fd))
    }

    fn read(&mut self) -> Vec<u8> {
        if self.tls.is_some() {
            return self.read_secured();
        }
        let mut all = Vec::new();
        let mut buffer = [0; 65_536];
        let Some(reading) = &mut self.reading else {
            return all;
        };
        loop {
            match reading.read(&mut buffer) {
                Ok(0) => {
                    self.is_at_end = true;
                    return all;
                }
                Ok(count) => all.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return all,
                Err(_) => {
                    self.is_at_end = true;
                    return all;
                }
            }
        }
    }
}

/// One connection, and its other side.
struct Rig {
    kind: Kind,
    expected: Cell,
    reactor: Reactor,
    notes: Rc<Notes>,
    peer: Peer,
    unix: Option<UnixTransportHandle>,
    _file: Option<tempfile::NamedTempFile>,
}

impl Rig {
    fn new(kind: Kind, expected: Cell) -> Self {
        let mut reactor = Reactor::new().unwrap();
        reactor.start().unwrap();
        let notes = Rc::new(Notes::default());
        let probe = Probe(Rc::clone(&notes));
        let (mut unix, mut named) = (None, None);
        let peer = match kind {
            Kind::Tcp => {
                let listener = StdTcpListener::bind("127.0.0.1:0").unwrap();
                listener.set_nonblocking(true).unwrap();
                let mut probe = Some(probe);
                let to = Tcp::to(listener.local_addr().unwrap());
                let factory = move |_: &Address| probe.take().expect("one");
                reactor.connect(to, factory).unwrap();
                let mut all = None;
                assert!(until(&mut reactor, Cell::Yes, |_| {
                    all = all.take().or_else(|| listener.accept().ok());
                    notes.handle.get().is_some() && all.is_some()
                }));
                Peer::both(all.unwrap().0.into())
            }
            Kind::Tls => {
                let listener = StdTcpListener::bind("127.0.0.1:0").unwrap();
                let mut probe = Some(probe);
                let (client, config) = identity();
                let to = Tcp::to(listener.local_addr().unwrap()).layer(client);
                let factory = move |_: &Address| probe.take().expect("one");
                reactor.connect(to, factory).unwrap();
                let mut peer = Accepting::new(listener, config);
                assert!(until(&mut reactor, Cell::Yes, |_| {
                    peer.go_on();
                    notes.handle.get().is_some()
                }));
                peer.peer.expect("it was made")
            }
            Kind::Unix => {
                let (ours, theirs) = socketpair();
                unix = Some(reactor.adopt(Unix, ours.into(), probe).unwrap());
                Peer::both(theirs.into())
            }
            Kind::Pair => {
                let (reading, theirs) = io::pipe().unwrap();
                let (their_reading, writing) = io::pipe().unwrap();
                let ends = (reading.into(), writing.into());
                reactor.adopt(Pipe::pair(), ends, probe).unwrap();
                Peer::new(Some(their_reading.into()), Some(theirs.into()))
            }
            Kind::Reading => {
                let (reading, theirs) = io::pipe().unwrap();
                reactor
                    .adopt(Pipe::reading(), reading.into(), probe)
                    .unwrap();
                Peer::new(None, Some(theirs.into()))
            }
            Kind::Writing => {
                let (theirs, writing) = io::pipe().unwrap();
                reactor
                    .adopt(Pipe::writing(), writing.into(), probe)
                    .unwrap();
                Peer::new(Some(theirs.into()), None)
            }
            Kind::Terminal => {
                let (ours, theirs) = raw_terminal();
                reactor.adopt(Pipe, ours, probe).unwrap();
                Peer::both(theirs)
            }
            Kind::File => {
                let file = tempfile::NamedTempFile::new().unwrap();
                reactor
                    .adopt(Pipe, file.reopen().unwrap().into(), probe)
                    .unwrap();
                let reading = file.reopen().unwrap().into();
                let writing = file.reopen().unwrap().into();
                named = Some(file);
                Peer::new(Some(reading), Some(writing))
            }
        };
        assert!(until(&mut reactor, Cell::Yes, |_| notes
            .handle
            .get()
            .is_some()));
        Self {
            kind,
            expected,
            reactor,
            notes,
            peer,
            unix,
            _file: named,
        }
    }

    fn handle(&self) -> TransportHandle {
        self.notes.handle.get().expect("it was made")
    }

    fn get(&mut self) -> &mut dyn Transport {
        let handle = self.handle();
        self.reactor.get(handle).expect("it is there")
    }

    fn unix(&mut self) -> &mut dyn UnixTransport {
        let handle = self.unix.expect("it passes descriptors");
        self.reactor.get(handle).expect("it is there")
    }

    fn has(&self, call: &str) -> bool {
        self.notes.calls.borrow().contains(&call)
    }

    fn is_lost(&mut self) -> bool {
        let notes = Rc::clone(&self.notes);
        until(&mut self.reactor, self.expected, |_| {
            notes.calls.borrow().contains(&"connection_lost")
        })
    }

    fn reason(&self) -> String {
        self.notes.reason.borrow().clone()
    }

    /// Whether a callback comes.
    fn is_called(&mut self, call: &str) -> Cell {
        let notes = Rc::clone(&self.notes);
        Cell::called_if(until(&mut self.reactor, self.expected, |_| {
            notes.calls.borrow().contains(&call)
        }))
    }

    /// Lets the peer send, and whether it can.
    fn send(&mut self, data: &[u8]) -> bool {
        if let (Kind::File, Some(writing)) = (self.kind, &mut self.peer.writing) {
            writing.seek(SeekFrom::End(0)).unwrap();
        }
        self.peer.write(data)
    }

    fn arrives(&mut self, data: &[u8]) -> bool {
        let notes = Rc::clone(&self.notes);
        until(&mut self.reactor, self.expected, |_| {
            notes.data.borrow().concat() == data
        })
    }

    /// Nothing is delivered for a while.
    fn stays_quiet(&mut self) -> bool {
        let notes = Rc::clone(&self.notes);
        !until(&mut self.reactor, Cell::Nothing, |_| {
            !notes.data.borrow().is_empty()
        })
    }

    fn leaves(&mut self, data: &[u8]) -> bool {
        let mut seen = Vec::new();
        let peer = &mut self.peer;
        until(&mut self.reactor, self.expected, |_| {
            seen.extend(peer.read());
            seen == data
        })
    }

    fn written(&mut self, write: impl FnOnce(&mut dyn Transport) -> WriteStatus) -> Cell {
        match write(self.get()) {
            WriteStatus::Refused => Cell::Refused,
            _ => Cell::yes_if(self.leaves(b"hello")),
        }
    }

    /// Writes until no more is taken, or much was; whether something waits.
    fn fill(&mut self) -> bool {
        let low = Watermarks::default().high(10);
        self.get().set_watermarks(low);
        for _ in 0..256 {
            if self.get().write(&[7; 65_536]) == WriteStatus::Refused {
                return false;
            }
            self.reactor.turn(Some(Duration::ZERO));
            self.reactor.turn(Some(Duration::ZERO));
            if self.get().unsent_bytes() > 65_536 {
                return true;
            }
        }
        false
    }

    fn produce(&mut self) -> bool {
        let own = ProducerRef::Protocol;
        self.get()
            .register_producer(own, ProducerKind::Push)
            .is_ok()
    }

    /// The peer goes, so that ours can no longer write.
    fn break_off(&mut self) {
        match self.kind {
            Kind::Tcp | Kind::Tls => {
                let socket = self.peer.writing.as_ref().unwrap();
                sockopt::set_socket_linger(socket, Some(Duration::ZERO)).unwrap();
            }
            Kind::Unix => {
                // What it has not read makes it a reset.
                self.get().write(b"unread");
                self.reactor.turn(Some(Duration::ZERO));
            }
            Kind::Pair => {
                // It still could write.
                self.peer.reading = None;
                return;
            }
            _ => {}
        }
        self.peer.reading = None;
        self.peer.writing = None;
    }

    /// The peer says that no more comes.
    fn end(&mut self) {
        match self.kind {
            Kind::Tcp | Kind::Unix => {
                let socket = self.peer.writing.as_ref().unwrap();
                rustix::net::shutdown(socket, Shutdown::Write).unwrap();
            }
            Kind::Tls => {
                self.peer.tls.as_mut().unwrap().send_close_notify();
                self.peer.flush();
            }
            Kind::Terminal => {
                self.peer.reading = None;
                self.peer.writing = None;
            }
            _ => self.peer.writing = None,
        }
    }

    /// The peer sends a descriptor; whether the kernel takes it.
    fn send_descriptor(&self, fd: impl AsFd) -> io::Result<()> {
        let socket = self
            .peer
            .writing
            .as_ref()
            .ok_or(io::ErrorKind::NotConnected)?;
        let fds = [fd.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let data = [IoSlice::new(b"d")];
        rustix::net::sendmsg(socket, &data, &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Whether the peer receives a descriptor.
    fn passes(&mut self) -> bool {
        let expected = self.expected;
        let socket = self.peer.reading.as_ref().unwrap();
        until(&mut self.reactor, expected, |_| {
            let mut data = [0; 16];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(&mut data)];
            let flags = RecvFlags::CMSG_CLOEXEC;
            let received = rustix::net::recvmsg(socket, &mut parts, &mut control, flags);
            received.is_ok()
                && control.drain().any(|message| match message {
                    RecvAncillaryMessage::ScmRights(rights) => rights.count() > 0,
                    _ => false,
                })
        })
    }

    /// Takes it apart, and puts it together again.
    fn reattach(&mut self) {
        fn again<T>(reactor: &mut Reactor, detached: Result<Detached<Probe>, DetachError>)
        where
            T: bowline::endpoint::TransportFor<Probe>,
        {
            let detached = detached.expect("it can be detached");
            assert!(reactor.reattach::<T, _>(detached).is_ok());
        }
        let handle = self.handle();
        match self.kind {
            Kind::Tcp => self.reactor.detach(handle, again::<TcpStream>),
            Kind::Tls => self.reactor.detach(handle, again::<TlsStream>),
            Kind::Unix => self.reactor.detach(handle, again::<UnixStream>),
            _ => self.reactor.detach(handle, again::<PipeStream>),
        }
    }

    fn stop_gracefully(&mut self) {
        let how = GracefulStop::new()
            .grace(Duration::ZERO)
            .deadline(Duration::from_secs(20));
        self.reactor.stop_gracefully(how).unwrap();
    }
}

/// No number is free for a descriptor, for as long as this is there. It is a limit of the
/// whole process.
struct NoneFree(Rlimit);

impl NoneFree {
    fn new() -> Self {
        let before = getrlimit(Resource::Nofile);
        let lowest = File::open("/dev/null").unwrap().as_raw_fd();
        let none = Rlimit {
            current: Some(lowest as u64),
            ..before
        };
        setrlimit(Resource::Nofile, none).unwrap();
        Self(before)
    }
}

impl Drop for NoneFree {
    fn drop(&mut self) {
        setrlimit(Resource::Nofile, self.0).unwrap();
    }
}

/// Who trusts whom.
fn identity() -> (TlsClient, ServerConfig) {
    let names = vec!["localhost".to_owned()];
    let signed = rcgen::generate_simple_self_signed(names).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(signed.cert.der().clone()).unwrap();
    let client = client_config_builder().with_root_certificates(roots);
    let client = TlsClient::new(client.with_no_client_auth(), "localhost").unwrap();
    let key = PrivateKeyDer::try_from(signed.signing_key.serialize_der()).unwrap();
    let server = server_config_builder().with_no_client_auth();
    let mut server = server
        .with_single_cert(vec![signed.cert.der().clone()], key)
        .unwrap();
    // Which would wait unread, since ours begins paused.
    server.send_tls13_tickets = 0;
    (client.may_move(true), server)
}

/// Whether it is told that a connection which began in the clear is secured.
fn is_secured(expected: Cell) -> Cell {
    struct Starts(TlsRole, Rc<StdCell<bool>>);
    impl<T: TlsTransport> Protocol<T> for Starts {
        fn connection_made(&mut self, cx: &mut Context<'_, T>) {
            cx.transport.start_tls(self.0.clone(), b"").unwrap();
        }

        fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}

        fn connection_secured(&mut self, _: &mut Context<'_, T>) {
            self.1.set(true);
        }
    }
    let mut reactor = Reactor::new().unwrap();
    let listener = StdTcpListener::bind("127.0.0.1:0").unwrap();
    let (client, config) = identity();
    let told = Rc::new(StdCell::new(false));
    let starts = Starts(TlsRole::from(&client), Rc::clone(&told));
    let mut starts = Some(starts);
    let to = Tcp::to(listener.local_addr().unwrap()).layer(StartTls);
    let factory = move |_: &Address| starts.take().expect("one");
    reactor.connect(to, factory).unwrap();
    let mut peer = Accepting::new(listener, config);
    Cell::called_if(until(&mut reactor, expected, |_| {
        peer.go_on();
        told.get()
    }))
}

/// A peer that accepts a connection and secures it.
struct Accepting {
    listener: StdTcpListener,
    config: Option<ServerConfig>,
    peer: Option<Peer>,
}

impl Accepting {
    fn new(listener: StdTcpListener, config: ServerConfig) -> Self {
        listener.set_nonblocking(true).unwrap();
        Self {
            listener,
            config: Some(config),
            peer: None,
        }
    }

    fn go_on(&mut self) {
        if let Some(peer) = &mut self.peer {
            assert_eq!(peer.read(), b"");
        } else if let Ok((socket, _)) = self.listener.accept() {
            let config = self.config.take().expect("it accepts once");
            self.peer = Some(Peer::secured(socket.into(), config));
        }
    }
}

fn raw_terminal() -> (OwnedFd, OwnedFd) {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let terminal = ioctl_tiocgptpeer(&master, flags).unwrap();
    let mut settings = tcgetattr(&terminal).unwrap();
    settings.make_raw();
    tcsetattr(&terminal, OptionalActions::Now, &settings).unwrap();
    (master, terminal)
}

#[derive(Debug)]
struct Observer(Rc<StdCell<usize>>);

impl WriteObserver for Observer {
    fn written(&self, data: &[u8]) {
        self.0.set(self.0.get() + data.len());
    }
}

/// What a method of `Transport` does.
fn transport_method(rig: &mut Rig, row: &str) -> Option<Cell> {
    Some(match row {
        "write" => rig.written(|it| it.write(b"hello")),
        "write_sequence" => rig.written(|it| it.write_sequence(&[b"he", b"", b"llo"])),
        "write_owned" => rig.written(|it| it.write_owned(b"hello".to_vec())),
        "unsent_bytes" => {
            rig.get().write(b"hello");
            Cell::yes_if(rig.get().unsent_bytes() == 5)
        }
        "bytes_sent" => {
            rig.get().write(b"hello");
            let (handle, expected) = (rig.handle(), rig.expected);
            Cell::yes_if(until(&mut rig.reactor, expected, |reactor| {
                reactor.get(handle).is_some_and(|it| it.bytes_sent() == 5)
            }))
        }
        "when_sent" => {
            rig.get().write(b"hello");
            let told = Rc::new(StdCell::new(false));
            let tell = Rc::clone(&told);
            rig.get()
                .when_sent(5, Box::new(move |_, sent| tell.set(sent.is_ok())));
            let expected = rig.expected;
            Cell::yes_if(until(&mut rig.reactor, expected, |_| told.get()))
        }
        "is_send_buffer_full" => {
            rig.get().set_watermarks(Watermarks::default().high(10));
            rig.get().write(&[7; 20]);
            Cell::yes_if(rig.get().is_send_buffer_full())
        }
        "watermarks" => Cell::yes_if(rig.get().watermarks() == Watermarks::default()),
        "set_watermarks" => {
            rig.get().set_watermarks(Watermarks::default().limit(3));
            // Before, all of it is taken.
            Cell::yes_if(
                rig.get().watermarks().limit == 3
                    && rig.get().write(b"hello") == WriteStatus::Refused
                    && rig.get().write(b"hel") != WriteStatus::Refused,
            )
        }
        "register_producer" => match rig.produce() {
            false => Cell::Refused,
            true => {
                rig.fill();
                let is_told = rig.is_called("pause_producing") == Cell::Yes;
                Cell::yes_if(is_told)
            }
        },
        "stop_consuming" => {
            rig.produce();
            rig.get().stop_consuming();
            Cell::yes_if(rig.is_lost())
        }
        "unregister_producer" => {
            rig.produce();
            rig.get().lose_connection();
            let notes = Rc::clone(&rig.notes);
            let is_lost = move || notes.calls.borrow().contains(&"connection_lost");
            let waits = !until(&mut rig.reactor, Cell::Nothing, |_| is_lost());
            if waits {
                rig.get().unregister_producer();
            }
            Cell::yes_if(waits && rig.is_lost())
        }
        "is_producer_paused" => {
            rig.produce();
            rig.get().set_watermarks(Watermarks::default().high(10));
            rig.get().write(&[7; 20]);
            Cell::yes_if(rig.get().is_producer_paused())
        }
        _ => return reading_method(rig, row).or_else(|| closing_method(rig, row)),
    })
}

fn reading_method(rig: &mut Rig, row: &str) -> Option<Cell> {
    Some(match row {
        // It was paused at its beginning.
        "pause_producing" | "resume_producing" => {
            rig.send(b"abc");
            let is_quiet = rig.stays_quiet();
            rig.get().resume_producing();
            Cell::yes_if(is_quiet && rig.arrives(b"abc"))
        }
        "is_reading_paused" => {
            let before = rig.get().is_reading_paused();
            rig.get().resume_producing();
            Cell::yes_if(before && !rig.get().is_reading_paused())
        }
        "hold_reading" | "release_reading" => {
            rig.get().hold_reading();
            rig.get().resume_producing();
            rig.send(b"abc");
            let is_quiet = rig.stays_quiet();
            rig.get().release_reading();
            Cell::yes_if(is_quiet && rig.arrives(b"abc"))
        }
        "is_open_for_reading" => {
            let before = rig.get().is_open_for_reading();
            rig.get().lose_connection();
            Cell::yes_if(before && !rig.get().is_open_for_reading())
        }
        "set_read_limit" => {
            rig.get().set_read_limit(NonZeroUsize::new(2));
            rig.send(b"abcd");
            rig.get().resume_producing();
            let all = rig.arrives(b"abcd");
            let first = rig.notes.data.borrow().first().map(Vec::len);
            Cell::yes_if(all && first == Some(2))
        }
        "push_back" => {
            rig.get().push_back(b"pushed".to_vec());
            rig.get().resume_producing();
            Cell::yes_if(rig.arrives(b"pushed"))
        }
        _ => return None,
    })
}

fn closing_method(rig: &mut Rig, row: &str) -> Option<Cell> {
    Some(match row {
        "lose_connection" => {
            rig.get().write(b"hello");
            rig.get().lose_connection();
            let is_done = rig.is_lost() && rig.reason() == "closed cleanly";
            // A terminal hangs up, which may be told before what it holds.
            let is_sent = matches!(rig.kind, Kind::Reading | Kind::Terminal);
            Cell::yes_if(is_done && (is_sent || rig.leaves(b"hello")))
        }
        "lose_connection_within" => {
            let is_full = rig.fill();
            rig.get().lose_connection_within(Duration::from_millis(3));
            let is_lost = rig.is_lost();
            let is_cut = rig.reason().contains("deadline");
            assert_eq!(is_full, is_cut, "{:?}: {}", rig.kind, rig.reason());
            Cell::yes_if(is_lost)
        }
        "set_lingering_close" => {
            rig.send(b"unread");
            rig.get().write(b"hello");
            rig.get()
                .set_lingering_close(Some(LingeringClose::default()));
            rig.get().lose_connection();
            let notes = Rc::clone(&rig.notes);
            let is_over = move || notes.calls.borrow().contains(&"connection_lost");
            let waits = !until(&mut rig.reactor, Cell::Nothing, |_| is_over());
            let is_whole = waits && rig.leaves(b"hello") && rig.peer.is_at_end;
            rig.peer = Peer::new(None, None);
            Cell::yes_if(is_whole && rig.is_lost())
        }
        "abort_connection" => {
            rig.get().abort_connection();
            Cell::yes_if(rig.is_lost() && rig.reason() == "aborted by us")
        }
        "lose_write_connection" => half_close(rig),
        "state" => {
            let before = rig.get().state();
            rig.fill();
            rig.produce();
            rig.get().lose_connection();
            let states = (before, rig.get().state());
            Cell::yes_if(states == (TransportState::Connected, TransportState::Closing))
        }
        "host" | "peer" => {
            let address = match row {
                "host" => rig.get().host(),
                _ => rig.get().peer(),
            };
            Cell::yes_if(match rig.kind {
                Kind::Tcp | Kind::Tls => {
                    matches!(address, Address::Inet(address) if address.port() > 0)
                }
                Kind::Unix => matches!(address, Address::Unix(_)),
                _ => matches!(address, Address::File(_)),
            })
        }
        "connection_handle" => {
            let handle = rig.get().connection_handle();
            Cell::yes_if(rig.reactor.get(handle).is_some())
        }
        "handle" => Cell::yes_if(rig.get().handle() == rig.handle()),
        "as_dyn" => Cell::yes_if(rig.get().as_dyn().handle() == rig.handle()),
        "socket_descriptor" => Cell::yes_if(rig.get().socket_descriptor().is_some()),
        "set_write_observer" => {
            let seen = Rc::new(StdCell::new(0));
            let observer = Rc::new(Observer(Rc::clone(&seen)));
            rig.get().set_write_observer(Some(observer));
            rig.get().write(b"hello");
            Cell::yes_if(seen.get() == 5)
        }
        "close_unclaimed" => {
            let (reading, mut writing) = io::pipe().unwrap();
            rig.get().close_unclaimed(vec![reading.into()]);
            let expected = rig.expected;
            Cell::yes_if(until(&mut rig.reactor, expected, |_| {
                writing.write(b"x").is_err()
            }))
        }
        _ => return None,
    })
}

fn half_close(rig: &mut Rig) -> Cell {
    if rig.get().write(b"hello") == WriteStatus::Refused {
        rig.get().lose_write_connection();
        return Cell::called_if(rig.is_called("write_connection_lost") == Cell::Yes).or_nothing();
    }
    rig.get().lose_write_connection();
    assert_eq!(rig.get().write(b"more"), WriteStatus::Refused);
    assert!(rig.leaves(b"hello"), "what was written before leaves");
    let expected = match rig.expected {
        Cell::Ours => Cell::Nothing,
        other => other,
    };
    let is_file = rig.kind == Kind::File;
    let peer = &mut rig.peer;
    let is_seen = until(&mut rig.reactor, expected, |_| {
        peer.read();
        peer.is_at_end && !is_file
    });
    match is_seen {
        true => Cell::Yes,
        false => Cell::Ours,
    }
}

impl Cell {
    fn or_nothing(self) -> Self {
        match self {
            Self::Missing => Self::Nothing,
            other => other,
        }
    }
}

/// What a method of `UnixTransport` does.
fn unix_method(rig: &mut Rig, row: &str) -> Option<Cell> {
    let file = || OwnedFd::from(File::open("/dev/null").unwrap());
    Some(match row {
        "send_file_descriptor" => {
            rig.unix().send_file_descriptor(file().into()).unwrap();
            rig.unix().write(b"f");
            Cell::yes_if(rig.passes())
        }
        "write_with_descriptors" => {
            let sent = rig.unix().write_with_descriptors(b"f", vec![file().into()]);
            Cell::yes_if(sent.is_ok() && rig.passes())
        }
        "unsent_descriptors" => {
            rig.unix().send_file_descriptor(file().into()).unwrap();
            Cell::yes_if(rig.unix().unsent_descriptors() == 1)
        }
        "reclaim_descriptors" => Cell::yes_if(reclaims()),
        "descriptors_sent" => {
            rig.unix().send_file_descriptor(file().into()).unwrap();
            rig.unix().write(b"f");
            let passes = rig.passes();
            Cell::yes_if(passes && rig.unix().descriptors_sent() == 1)
        }
        "descriptor_limits" => {
            Cell::yes_if(rig.unix().descriptor_limits() == DescriptorLimits::default())
        }
        "set_descriptor_limits" => {
            let limits = DescriptorLimits::default().queued(0);
            rig.unix().set_descriptor_limits(limits);
            Cell::yes_if(rig.unix().send_file_descriptor(file().into()).is_err())
        }
        "set_received_linger" => {
            rig.unix().set_received_linger(Linger::Keep);
            let listener = StdTcpListener::bind("127.0.0.1:0").unwrap();
            let socket = StdTcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let time = Some(Duration::from_secs(1));
            sockopt::set_socket_linger(&socket, time).unwrap();
            rig.send_descriptor(&socket).unwrap();
            rig.get().resume_producing();
            rig.is_called("file_descriptor_received");
            let received = rig.notes.received.borrow();
            let kept = received
                .first()
                .map(|it| sockopt::socket_linger(it).unwrap());
            sockopt::set_socket_linger(&socket, None).unwrap();
            Cell::yes_if(kept == Some(time))
        }
        "set_descriptors_accepted" => {
            rig.unix().set_descriptors_accepted(false).unwrap();
            let refused = rig.send_descriptor(file()).unwrap_err();
            Cell::yes_if(refused.kind() == io::ErrorKind::PermissionDenied)
        }
        "refuse_input" => {
            rig.unix().refuse_input().unwrap();
            let error = rig.peer.writing.as_mut().unwrap().write(b"x");
            Cell::yes_if(error.is_err_and(|it| it.kind() == io::ErrorKind::BrokenPipe))
        }
        "peer_credentials" => {
            let credentials = rig.unix().peer_credentials().unwrap();
            Cell::yes_if(credentials.pid == Some(std::process::id()))
        }
        "peer_pidfd" => Cell::yes_if(rig.unix().peer_pidfd().is_ok()),
        "unix_handle" => Cell::yes_if(Some(rig.unix().unix_handle()) == rig.unix),
        _ => return None,
    })
}

/// Takes back, at the end, what it had queued.
fn reclaims() -> bool {
    struct Reclaims(Rc<StdCell<usize>>);
    impl<T: UnixTransport> Protocol<T> for Reclaims {
        fn connection_made(&mut self, cx: &mut Context<'_, T>) {
            let file = OwnedFd::from(File::open("/dev/null").unwrap());
            cx.transport.send_file_descriptor(file.into()).unwrap();
            cx.transport.abort_connection();
        }

        fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}

        fn connection_lost(&mut self, cx: &mut Context<'_, T>, _: &CloseReason) {
            self.0.set(cx.transport.reclaim_descriptors().len());
        }
    }
    let count = Rc::new(StdCell::new(0));
    let mut reactor = Reactor::new().unwrap();
    let (ours, _theirs) = socketpair();
    reactor
        .adopt(Unix, ours.into(), Reclaims(Rc::clone(&count)))
        .unwrap();
    until(&mut reactor, Cell::Yes, |_| count.get() == 1)
}

/// What a method of `TcpTransport` does.
fn tcp_method(rig: &mut Rig, row: &str) -> Option<Cell> {
    fn at(rig: &mut Rig, call: impl FnOnce(&mut TcpStream) -> bool + 'static) -> Cell {
        let seen = Rc::new(StdCell::new(None));
        let noted = Rc::clone(&seen);
        let call = move |_: &mut Probe, cx: &mut Context<'_, TcpStream>| {
            noted.set(Some(call(cx.transport)));
        };
        let handle = rig.handle();
        rig.reactor.call_protocol(handle, call);
        assert!(until(&mut rig.reactor, Cell::Yes, |_| seen.get().is_some()));
        Cell::yes_if(seen.get() == Some(true))
    }
    Some(match row {
        "no_delay" | "set_no_delay" => at(rig, |it| {
            let before = it.no_delay().unwrap();
            it.set_no_delay(true).unwrap();
            !before && it.no_delay().unwrap()
        }),
        "keep_alive" | "set_keep_alive" => at(rig, |it| {
            let before = it.keep_alive().unwrap();
            it.set_keep_alive(true).unwrap();
            !before && it.keep_alive().unwrap()
        }),
        "set_keep_alive_times" => at(rig, |it| {
            let second = Duration::from_secs(1);
            it.set_keep_alive_times(7 * second, second, 3).unwrap();
            let socket = it.socket_descriptor().unwrap();
            sockopt::tcp_keepidle(socket).unwrap() == 7 * second
        }),
        _ => return None,
    })
}

/// Whether a callback of `Protocol` comes.
fn callback(rig: &mut Rig, row: &str) -> Option<Cell> {
    let file = File::open("/dev/null").unwrap();
    match row {
        "connection_made" => {}
        "data_received" | "reading_resumed" => {
            rig.send(b"abc");
            rig.get().resume_producing();
        }
        "file_descriptor_received" | "descriptors_received" | "descriptors_truncated" => {
            if rig.send_descriptor(&file).is_err() {
                return Some(Cell::Missing);
            }
            let _none_free = (row == "descriptors_truncated").then(NoneFree::new);
            rig.get().resume_producing();
            return Some(rig.is_called(row));
        }
        "descriptors_sent" => {
            if !rig.kind.passes_descriptors() {
                return Some(Cell::Missing);
            }
            rig.unix()
                .send_file_descriptor(OwnedFd::from(file).into())
                .unwrap();
            rig.unix().write(b"f");
        }
        "read_connection_lost" => {
            rig.end();
            rig.get().resume_producing();
        }
        "write_connection_lost" => rig.get().lose_write_connection(),
        "connection_broken" => {
            rig.send(b"abc");
            rig.break_off();
        }
        "has_undelivered" => rig.break_off(),
        "connection_lost" => rig.get().abort_connection(),
        "draining" | "is_idle" => {
            rig.get().resume_producing();
            rig.stop_gracefully();
        }
        "connection_reattached" | "into_part" => rig.reattach(),
        "connection_secured" if rig.kind == Kind::Tls => return Some(is_secured(rig.expected)),
        "connection_secured" => {
            // Nothing of these asks for it: bytes both ways, and the ends.
            rig.get().write(b"hello");
            rig.send(b"abc");
            rig.get().resume_producing();
        }
        "pause_producing" | "stop_producing" | "resume_producing" => {
            rig.produce();
            rig.fill();
            match row {
                "stop_producing" => rig.get().abort_connection(),
                "resume_producing" => {
                    let peer = &mut rig.peer;
                    let notes = Rc::clone(&rig.notes);
                    return Some(Cell::called_if(until(
                        &mut rig.reactor,
                        rig.expected,
                        |_| {
                            peer.read();
                            notes.calls.borrow().contains(&"resume_producing")
                        },
                    )));
                }
                _ => {}
            }
        }
        "part" => {
            let handle = rig.handle();
            rig.reactor.call_protocol_or(
                handle,
                |_: &mut Probe, _: &mut Context<'_, UnixStream>| {},
                |_, _| {},
            );
            match rig.kind {
                Kind::Tcp => rig
                    .reactor
                    .call_protocol(handle, |_: &mut Probe, _: &mut Context<'_, TcpStream>| {}),
                Kind::Tls => rig
                    .reactor
                    .call_protocol(handle, |_: &mut Probe, _: &mut Context<'_, TlsStream>| {}),
                Kind::Unix => {}
                _ => rig
                    .reactor
                    .call_protocol(handle, |_: &mut Probe, _: &mut Context<'_, PipeStream>| {}),
            }
        }
        "describe" | "log_prefix" => {
            for descriptor in rig.reactor.descriptors() {
                let _ = descriptor.describe();
            }
        }
        _ => return None,
    }
    Some(rig.is_called(row))
}

#[test]
fn tables_of_streams_have_every_method_and_callback() {
    let mut methods = methods_of(CONNECTION, "AnyConnection");
    methods.extend(methods_of(TRANSPORT, "Transport"));
    methods.extend(methods_of(TRANSPORT, "UnixTransport"));
    methods.extend(methods_of(TRANSPORT, "TcpTransport"));
    assert!(methods.len() > 40, "the sources were read");
    Table::under(METHODS).assert_rows(methods);
    Table::under(CALLBACKS).assert_rows(methods_of(PROTOCOL, "Protocol"));
}

#[test]
fn every_method_of_a_stream_does_what_its_table_says() {
    let _ledger = DescriptorLedger::open();
    let of_unix = methods_of(TRANSPORT, "UnixTransport");
    let of_tcp = methods_of(TRANSPORT, "TcpTransport");
    let table = Table::under(METHODS);
    assert_eq!(table.columns, KINDS.map(|(column, _)| column));
    let mut wrong = Vec::new();
    for (column, kind) in KINDS {
        wrong.extend(table.check(column, |row, expected| {
            let row_of = |names: &[String]| names.iter().any(|it| it == row);
            if row_of(&of_unix) && !kind.passes_descriptors()
                || row_of(&of_tcp) && !kind.has_tcp_options()
            {
                return Cell::Missing;
            }
            let mut rig = Rig::new(kind, expected);
            let seen = transport_method(&mut rig, row)
                .or_else(|| unix_method(&mut rig, row))
                .or_else(|| tcp_method(&mut rig, row));
            seen.unwrap_or_else(|| panic!("nobody tries {row}"))
        }));
    }
    assert_right(&wrong);
}

#[test]
fn every_callback_of_a_stream_comes_as_its_table_says() {
    let _ledger = DescriptorLedger::alone();
    let table = Table::under(CALLBACKS);
    assert_eq!(table.columns, KINDS.map(|(column, _)| column));
    let mut wrong = Vec::new();
    for (column, kind) in KINDS {
        wrong.extend(table.check(column, |row, expected| {
            let mut rig = Rig::new(kind, expected);
            assert!(!rig.has(row) || row == "connection_made" || row == "log_prefix");
            let seen = callback(&mut rig, row);
            seen.unwrap_or_else(|| panic!("nobody tries {row}"))
        }));
    }
    assert_right(&wrong);
}

#[test]
fn only_sockets_have_what_sockets_have() {
    for (_, kind) in KINDS {
        assert_eq!(kind.passes_descriptors(), kind == Kind::Unix);
        assert_eq!(kind.has_tcp_options(), kind == Kind::Tcp);
        assert!(kind.is_socket() || !kind.has_tcp_options());
    }
}
