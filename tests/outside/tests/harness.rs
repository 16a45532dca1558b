//! The kinds of connection with something of ours in them, and what plays their peer.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener as StdTcpListener, TcpStream as StdTcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use bowline::endpoint::{Adopt as _, Connect as _, Listen as _, Side};
use bowline::error::ReattachError;
use bowline::layers::{
    FileDescriptor, PassDescriptors, SendmsgMixin, Stream, TcpSocket, UnixSocket,
};
use bowline::testing::{Memory, MemoryPeer, MemorySocket, SimulatedKernel};
use bowline::{
    Address, Detached, ListenerHandle, Reactor, Tcp, TransportHandle, Transports, Unix, UnixAddress,
};
use bowline_outside::{Codec, FifoPair, Fifos, FrameKind, Scramble, Settings, proof};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::net::sockopt;
use tempfile::TempDir;

pub(crate) use crate::link::{Buffers, DynContext, End, Link, Script, pattern};
use crate::support::{DEADLINE, Record};

/// The kinds, by how our end came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The layer on TCP.
    AcceptedTcp,
    ConnectingTcp,
    /// On a UNIX socket, as it is.
    AcceptedUnix,
    ConnectingUnix,
    /// On a UNIX socket, with `SendmsgMixin` on top.
    AcceptedPassing,
    ConnectingPassing,
    AdoptedPassing,
    /// On the simulated kernel, with `SendmsgMixin` on top.
    Memory,
    /// Two FIFOs as they are.
    AdoptedFifos,
    ConnectingFifos,
    /// The layer on two FIFOs.
    ScrambledFifos,
}

pub(crate) type ScrambledTcp = Stream<Scramble<TcpSocket>>;
pub(crate) type ScrambledUnix = Stream<Scramble<UnixSocket>>;
pub(crate) type Passing = Stream<SendmsgMixin<Scramble<UnixSocket>>>;
type PassingInMemory = Stream<SendmsgMixin<Scramble<MemorySocket>>>;

impl Kind {
    pub(crate) fn is_tcp(self) -> bool {
        matches!(self, Self::AcceptedTcp | Self::ConnectingTcp)
    }

    /// FIFOs tell what a socket tells.
    pub(crate) fn is_socket(self) -> bool {
        true
    }

    /// As `tests/transport/harness.rs` says.
    pub(crate) fn has_one_event(self) -> bool {
        !matches!(
            self,
            Self::AdoptedFifos | Self::ConnectingFifos | Self::ScrambledFifos
        )
    }

    /// Whether a peer that closes with something unread is told apart.
    pub(crate) fn is_unix_socket(self) -> bool {
        !self.is_tcp()
            && !matches!(
                self,
                Self::AdoptedFifos | Self::ConnectingFifos | Self::ScrambledFifos
            )
    }

    fn is_scrambled(self) -> bool {
        !matches!(self, Self::AdoptedFifos | Self::ConnectingFifos)
    }

    pub(crate) fn is_available(self) -> bool {
        true
    }

    pub(crate) fn lingers(self) -> bool {
        self.is_tcp()
    }

    pub(crate) fn closes_with_reset(self) -> bool {
        false
    }

    pub(crate) fn has_own_end(self) -> bool {
        self.is_scrambled()
    }

    pub(crate) fn end_of_abort(self) -> End {
        match self {
            Self::AcceptedTcp | Self::ConnectingTcp => End::Reset,
            it if it.is_scrambled() => End::CutOff,
            _ => End::Clean,
        }
    }

    pub(crate) fn reattach(
        self,
        reactor: &mut Reactor,
        detached: Detached<Script>,
    ) -> Result<TransportHandle, ReattachError<Script>> {
        match self {
            Self::AcceptedTcp | Self::ConnectingTcp => {
                reactor.reattach::<ScrambledTcp, _>(detached)
            }
            Self::AcceptedUnix | Self::ConnectingUnix => {
                reactor.reattach::<ScrambledUnix, _>(detached)
            }
            Self::AcceptedPassing | Self::ConnectingPassing | Self::AdoptedPassing => {
                reactor.reattach::<Passing, _>(detached)
            }
            Self::Memory => reactor.reattach::<PassingInMemory, _>(detached),
            Self::AdoptedFifos | Self::ConnectingFifos => {
                reactor.reattach::<Stream<FifoPair>, _>(detached)
            }
            Self::ScrambledFifos => reactor.reattach::<Stream<Scramble<FifoPair>>, _>(detached),
        }
    }

    #[track_caller]
    pub(crate) fn connect(
        self,
        reactor: &mut Reactor,
        buffers: Buffers,
        script: Script,
    ) -> (Peer, Option<TempDir>) {
        let record = script.record();
        let (raw, directory) = self.connect_raw(reactor, buffers, script, Settings::default());
        let is_client = !matches!(
            self,
            Self::ConnectingTcp | Self::ConnectingUnix | Self::ConnectingPassing
        );
        let mut peer = Peer::new(raw, self.is_scrambled().then_some(is_client));
        peer.shake_hands(reactor, &record, Settings::default().secret);
        (peer, directory)
    }

    /// The same, before the handshake.
    pub(crate) fn connect_raw(
        self,
        reactor: &mut Reactor,
        buffers: Buffers,
        script: Script,
        settings: Settings,
    ) -> (Raw, Option<TempDir>) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let mut script = Some(script);
        let raw = match self {
            Self::AcceptedTcp => {
                let here = Tcp::at(([127, 0, 0, 1], 0).into()).layer(scrambled(settings));
                let factory = move |_: &Address| script.take().expect("one");
                let listener = reactor.listen(here, factory).unwrap();
                let address = reactor.get(listener).unwrap().address().as_inet().unwrap();
                // Accepted sockets inherit it.
                let same = reactor.get(listener).unwrap().duplicate().unwrap();
                shrink(&same, buffers);
                let peer = StdTcpStream::connect(address).unwrap();
                accept_one(reactor, listener);
                Raw::Tcp(peer)
            }
            Self::ConnectingTcp => {
                let listener = StdTcpListener::bind("127.0.0.1:0").unwrap();
                let there = Tcp::to(listener.local_addr().unwrap()).layer(scrambled(settings));
                let factory = move |_: &Address| script.take().expect("one");
                reactor.connect(there, factory).unwrap();
                reactor.turn(Some(Duration::ZERO));
                Raw::Tcp(listener.accept().unwrap().0)
            }
            Self::AcceptedUnix | Self::AcceptedPassing => {
                let factory = move |_: &Address| script.take().expect("one");
                let here = Unix::at(path.as_path());
                let listener = match self {
                    Self::AcceptedUnix => reactor.listen(here.layer(scrambled(settings)), factory),
                    _ => reactor.listen(here.layer(passing(settings)), factory),
                };
                let peer = StdUnixStream::connect(&path).unwrap();
                accept_one(reactor, listener.unwrap());
                Raw::Unix(peer)
            }
            Self::ConnectingUnix | Self::ConnectingPassing => {
                let factory = move |_: &Address| script.take().expect("one");
                let listener = StdUnixListener::bind(&path).unwrap();
                let there = Unix::to(path.as_path());
                match self {
                    Self::ConnectingUnix => {
                        reactor.connect(there.layer(scrambled(settings)), factory)
                    }
                    _ => reactor.connect(there.layer(passing(settings)), factory),
                }
                .unwrap();
                reactor.turn(Some(Duration::ZERO));
                Raw::Unix(listener.accept().unwrap().0)
            }
            Self::AdoptedPassing => {
                let (ours, theirs) = StdUnixStream::pair().unwrap();
                shrink(&ours, buffers);
                let script = script.take().expect("one");
                let kind = Unix.layer(passing(settings));
                reactor.adopt(kind, ours.into(), script).unwrap();
                Raw::Unix(theirs)
            }
            Self::Memory => {
                let kernel = SimulatedKernel::new();
                if buffers == Buffers::Small {
                    set_send_buffer(&kernel, 16_384);
                }
                let (ours, theirs) = kernel.pair();
                let script = script.take().expect("one");
                let kind = Memory.layer(passing(settings));
                reactor.adopt(kind, ours, script).unwrap();
                Raw::Memory(MemoryPeer::new(theirs))
            }
            Self::AdoptedFifos | Self::ScrambledFifos => {
                let (their_reading, our_writing) = fifo(&directory.path().join("out"));
                let (our_reading, their_writing) = fifo(&directory.path().join("in"));
                resize(&our_writing, buffers);
                resize(&their_writing, Buffers::Default);
                let script = script.take().expect("one");
                let both = (our_reading, our_writing);
                match self {
                    Self::AdoptedFifos => reactor.adopt(Fifos, both, script),
                    _ => reactor.adopt(Fifos.layer(scrambled(settings)), both, script),
                }
                .unwrap();
                Raw::Fifos(
                    File::from(their_reading),
                    Some(File::from(their_writing)),
                    UnixAddress::Unnamed,
                )
            }
            Self::ConnectingFifos => {
                let here = directory.path();
                for name in ["to-server", "to-client"] {
                    make_fifo(&here.join(name));
                }
                let reading = open(&here.join("to-server"), OFlags::RDONLY);
                let held = open(&here.join("to-client"), OFlags::RDWR);
                resize(&held, Buffers::Default);
                let factory = move |_: &Address| script.take().expect("one");
                reactor.connect(Fifos::to(here), factory).unwrap();
                reactor.turn(Some(Duration::ZERO));
                let writing = open(&here.join("to-client"), OFlags::WRONLY);
                drop(held);
                let (reading, writing) = (File::from(reading), File::from(writing));
                let raw = Raw::Fifos(reading, Some(writing), here.into());
                return (raw, Some(directory));
            }
        };
        raw.prepare();
        (raw, Some(directory))
    }
}

pub(crate) fn scrambled<S: FileDescriptor>(
    settings: Settings,
) -> impl FnMut(S, Side) -> Scramble<S> + 'static {
    move |socket, side| Scramble::new(socket, side, settings)
}

pub(crate) fn passing<S: PassDescriptors>(
    settings: Settings,
) -> impl FnMut(S, Side) -> SendmsgMixin<Scramble<S>> + 'static {
    move |socket, side| SendmsgMixin::new(Scramble::new(socket, side, settings))
}

fn accept_one(reactor: &mut Reactor, listener: ListenerHandle) {
    let before = reactor.registered();
    crate::support::run_until(reactor, |reactor| reactor.registered() > before);
    reactor.get(listener).unwrap().stop_listening();
    reactor.turn(Some(Duration::ZERO));
}

fn make_fifo(path: &Path) {
    let how = Mode::RUSR | Mode::WUSR;
    rustix::fs::mknodat(CWD, path, rustix::fs::FileType::Fifo, how, 0).unwrap();
}

fn open(path: &Path, how: OFlags) -> OwnedFd {
    let how = how | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::open(path, how, Mode::empty()).unwrap()
}

/// One for reading, one for writing.
fn fifo(path: &Path) -> (OwnedFd, OwnedFd) {
    make_fifo(path);
    let reading = open(path, OFlags::RDONLY);
    (reading, open(path, OFlags::WRONLY))
}

fn resize(fifo: &OwnedFd, buffers: Buffers) {
    let size = match buffers {
        Buffers::Default => 262_144,
        Buffers::Small => 8_192,
    };
    rustix::pipe::fcntl_setpipe_size(fifo, size).unwrap();
}

/// Not the receiver's: with a tiny window TCP waits for its timers.
fn shrink(ours: &impl AsFd, buffers: Buffers) {
    if buffers == Buffers::Small {
        sockopt::set_socket_send_buffer_size(ours, 8_192).unwrap();
    }
}

fn set_send_buffer(kernel: &SimulatedKernel, send_buffer: usize) {
    kernel.set_settings(kernel.settings().send_buffer(send_buffer));
}

/// How much a peer sends by itself, so that what it has to say at its end finds room
/// beside that.
const PEERS_BUFFER: usize = 106_496;

/// What is under a peer.
#[derive(Debug)]
pub(crate) enum Raw {
    Tcp(StdTcpStream),
    Unix(StdUnixStream),
    Memory(MemoryPeer),
    /// Where they are, for who has connected to that.
    Fifos(File, Option<File>, UnixAddress),
}

impl Raw {
    fn prepare(&self) {
        match self {
            Self::Tcp(stream) => {
                stream.set_nonblocking(true).unwrap();
                // What is sent before a reset is there before it.
                stream.set_nodelay(true).unwrap();
                sockopt::set_socket_send_buffer_size(stream, PEERS_BUFFER).unwrap();
            }
            Self::Unix(stream) => stream.set_nonblocking(true).unwrap(),
            Self::Memory(_) | Self::Fifos(..) => {}
        }
    }

    /// Has room for more.
    fn make_room(&self) {
        match self {
            Self::Tcp(stream) => {
                sockopt::set_socket_send_buffer_size(stream, 2 * PEERS_BUFFER).unwrap();
            }
            Self::Unix(stream) => {
                sockopt::set_socket_send_buffer_size(stream, 2 * PEERS_BUFFER).unwrap();
            }
            Self::Memory(peer) => set_send_buffer(peer.kernel(), 4 * PEERS_BUFFER),
            Self::Fifos(_, Some(writing), _) => {
                let _ = rustix::pipe::fcntl_setpipe_size(writing, 524_288);
            }
            Self::Fifos(_, None, _) => {}
        }
    }

    pub(crate) fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(data),
            Self::Unix(stream) => stream.write(data),
            Self::Memory(peer) => peer.send(data),
            Self::Fifos(_, Some(writing), _) => writing.write(data),
            Self::Fifos(_, None, _) => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buffer),
            Self::Unix(stream) => stream.read(buffer),
            Self::Memory(peer) => peer.receive(buffer.len()).map(|read| {
                buffer[..read.bytes.len()].copy_from_slice(&read.bytes);
                read.bytes.len()
            }),
            Self::Fifos(reading, ..) => reading.read(buffer),
        }
    }

    fn shut_write(&mut self) {
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Write),
            Self::Unix(stream) => stream.shutdown(Shutdown::Write),
            Self::Memory(peer) => {
                peer.shutdown_write();
                Ok(())
            }
            Self::Fifos(_, writing, _) => {
                *writing = None;
                Ok(())
            }
        };
    }
}

/// The other end, with the layer's frames where there are some.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) raw: Raw,
    /// `None` where the bytes are sent as they are.
    codec: Option<Codec>,
    is_client: bool,
    /// Not sent yet.
    out: Vec<u8>,
    /// Opened, and not read.
    ready: Vec<u8>,
    pub(crate) keep_alives: usize,
    has_ended: bool,
    has_said_close: bool,
}

impl Peer {
    /// `is_client` says which side it is of the layer, if there is one.
    pub(crate) fn new(raw: Raw, is_client: Option<bool>) -> Self {
        Self {
            raw,
            codec: is_client.map(|_| Codec::default()),
            is_client: is_client.unwrap_or_default(),
            out: Vec::new(),
            ready: Vec::new(),
            keep_alives: 0,
            has_ended: false,
            has_said_close: false,
        }
    }

    /// Turns the reactor until the connection is made.
    #[track_caller]
    pub(crate) fn shake_hands(&mut self, reactor: &mut Reactor, record: &Record, secret: u64) {
        const HELLO: &[u8] = b"theirs..";
        if self.codec.is_some() {
            if self.is_client {
                self.say(FrameKind::Hello, HELLO);
                let hello = self.next_frame(reactor, FrameKind::Hello);
                self.say(FrameKind::Proof, &proof(secret, [HELLO, &hello]));
                self.next_frame(reactor, FrameKind::Accept);
            } else {
                let hello = self.next_frame(reactor, FrameKind::Hello);
                self.say(FrameKind::Hello, HELLO);
                let answer = self.next_frame(reactor, FrameKind::Proof);
                assert_eq!(answer, proof(secret, [&hello, HELLO]));
                assert!(record.summary().is_empty(), "made before it was accepted");
                self.say(FrameKind::Accept, &[]);
            }
            let codec = self.codec.as_mut().unwrap();
            codec.scramble(secret, self.is_client);
        }
        crate::support::run_until(reactor, |_| !record.summary().is_empty());
    }

    /// The next frame, byte for byte so that nothing behind it is read.
    #[track_caller]
    pub(crate) fn next_frame(&mut self, reactor: &mut Reactor, kind: FrameKind) -> Vec<u8> {
        let codec = self.codec.as_mut().expect("of a layer");
        let began = Instant::now();
        let mut byte = [0];
        loop {
            assert!(began.elapsed() < DEADLINE, "no {kind:?} came");
            match self.raw.read(&mut byte) {
                Ok(0) => panic!("the end instead of {kind:?}"),
                Ok(_) => {
                    if let Some(frame) = codec.open(&mut &byte[..]).unwrap() {
                        assert_eq!(frame.kind, kind);
                        return frame.body;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    reactor.turn(Some(Duration::from_millis(1)));
                }
                Err(error) => panic!("{error} instead of {kind:?}"),
            }
        }
    }

    /// Sends a frame that certainly fits.
    #[track_caller]
    pub(crate) fn say(&mut self, kind: FrameKind, body: &[u8]) {
        let frame = self.codec.as_mut().unwrap().seal(kind, body);
        assert_eq!(self.raw.write(&frame).unwrap(), frame.len());
    }

    fn flush(&mut self) -> io::Result<()> {
        while !self.out.is_empty() {
            let count = self.raw.write(&self.out)?;
            self.out.drain(..count);
        }
        Ok(())
    }

    pub(crate) fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.flush()?;
        let Some(codec) = &mut self.codec else {
            return self.raw.write(data);
        };
        let data = &data[..data.len().min(16_384)];
        // Sealed once, since that cannot be undone.
        self.out = codec.seal(FrameKind::Data, data);
        match self.flush() {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(data.len()),
        }
    }

    /// Sends what certainly fits.
    #[track_caller]
    pub(crate) fn send(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            data = &data[self.write(data).unwrap()..];
        }
        self.flush().unwrap();
    }

    /// Sends zeros until nothing more fits; how many.
    pub(crate) fn fill(&mut self) -> usize {
        let mut sent = 0;
        loop {
            match self.write(&[0; 65_536]) {
                Ok(count) => sent += count,
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    break;
                }
            }
        }
        if !self.out.is_empty() {
            // The rest of a frame.
            self.raw.make_room();
            self.flush().unwrap();
        }
        sent
    }

    /// One read. `UnexpectedEof` is an end without a word.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // As far as it goes.
        let _ = self.flush();
        loop {
            if !self.ready.is_empty() {
                let count = self.ready.len().min(buffer.len());
                buffer[..count].copy_from_slice(&self.ready[..count]);
                self.ready.drain(..count);
                return Ok(count);
            }
            let Some(codec) = &mut self.codec else {
                return self.raw.read(buffer);
            };
            if self.has_ended {
                return Ok(0);
            }
            let mut bytes = [0; 65_536];
            let count = self.raw.read(&mut bytes)?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let mut bytes = &bytes[..count];
            while !bytes.is_empty() {
                let Some(frame) = codec.open(&mut bytes)? else {
                    continue;
                };
                assert!(!self.has_ended, "{frame:?} after the end");
                match frame.kind {
                    FrameKind::Data => self.ready.extend(frame.body),
                    FrameKind::KeepAlive => self.keep_alives += 1,
                    FrameKind::Close => self.has_ended = true,
                    kind => panic!("{kind:?} out of place"),
                }
            }
        }
    }

    fn say_close(&mut self) {
        if let Some(codec) = &mut self.codec
            && !std::mem::replace(&mut self.has_said_close, true)
        {
            self.out.extend(codec.seal(FrameKind::Close, &[]));
            self.raw.make_room();
            // Nobody may be there any more.
            let _ = self.flush();
        }
    }

    pub(crate) fn shut_write(&mut self) {
        self.say_close();
        self.raw.shut_write();
    }

    /// Reads no more, as only a UNIX socket tells its peer.
    pub(crate) fn shut_read(&mut self) {
        if let Raw::Unix(stream) = &self.raw {
            stream.shutdown(Shutdown::Read).unwrap();
        }
    }

    /// Closes.
    pub(crate) fn close(mut self) {
        self.say_close();
    }

    /// Closes, so that our end sees a reset where there is one.
    pub(crate) fn reset(self) {
        if let Raw::Tcp(stream) = &self.raw {
            sockopt::set_socket_linger(stream, Some(Duration::ZERO)).unwrap();
        }
    }

    /// Our address as the peer sees it, and its own.
    pub(crate) fn addresses(&self) -> (Address, Address) {
        match &self.raw {
            Raw::Tcp(stream) => (
                stream.peer_addr().unwrap().into(),
                stream.local_addr().unwrap().into(),
            ),
            Raw::Unix(stream) => {
                let path = |address: std::os::unix::net::SocketAddr| {
                    let path = address.as_pathname();
                    path.map_or(UnixAddress::Unnamed, |path| UnixAddress::Path(path.into()))
                };
                (
                    path(stream.peer_addr().unwrap()).into(),
                    path(stream.local_addr().unwrap()).into(),
                )
            }
            Raw::Memory(_) => (UnixAddress::Unnamed.into(), UnixAddress::Unnamed.into()),
            Raw::Fifos(_, _, address) => (UnixAddress::Unnamed.into(), address.clone().into()),
        }
    }
}

/// Makes each behaviour a test of its own over each kind.
macro_rules! over_every_kind {
    ($($behaviour:ident),* $(,)?) => {$(
        mod $behaviour {
            $crate::harness::over_every_kind!(@ $behaviour
                accepted_tcp AcceptedTcp, connecting_tcp ConnectingTcp,
                accepted_unix AcceptedUnix, connecting_unix ConnectingUnix,
                accepted_passing AcceptedPassing, connecting_passing ConnectingPassing,
                adopted_passing AdoptedPassing, memory Memory,
                adopted_fifos AdoptedFifos, connecting_fifos ConnectingFifos,
                scrambled_fifos ScrambledFifos);
        }
    )*};
    (@ $behaviour:ident $($name:ident $kind:ident),*) => {$(
        #[test]
        fn $name() {
            if $crate::harness::Kind::$kind.is_available() {
                super::$behaviour($crate::harness::Kind::$kind);
            }
        }
    )*};
}

pub(crate) use over_every_kind;

/// As [`over_every_kind`], for what needs a kernel of its own.
macro_rules! over_every_socket {
    ($($behaviour:ident),* $(,)?) => {$(
        mod $behaviour {
            $crate::harness::over_every_kind!(@ $behaviour
                accepted_tcp AcceptedTcp, connecting_tcp ConnectingTcp,
                accepted_unix AcceptedUnix, connecting_unix ConnectingUnix,
                accepted_passing AcceptedPassing, connecting_passing ConnectingPassing,
                adopted_passing AdoptedPassing, adopted_fifos AdoptedFifos,
                connecting_fifos ConnectingFifos, scrambled_fifos ScrambledFifos);
        }
    )*};
}

pub(crate) use over_every_socket;

/// There are no terminals here.
macro_rules! over_terminals {
    ($($behaviour:ident),* $(,)?) => {};
}

pub(crate) use over_terminals;

/// As [`over_every_kind`], for the layer alone.
macro_rules! over_every_layer {
    ($($behaviour:ident),* $(,)?) => {$(
        mod $behaviour {
            $crate::harness::over_every_kind!(@ $behaviour
                accepted_tcp AcceptedTcp, connecting_tcp ConnectingTcp,
                accepted_unix AcceptedUnix, connecting_unix ConnectingUnix,
                accepted_passing AcceptedPassing, connecting_passing ConnectingPassing,
                adopted_passing AdoptedPassing, memory Memory,
                scrambled_fifos ScrambledFifos);
        }
    )*};
}

pub(crate) use over_every_layer;
