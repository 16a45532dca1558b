//! One connection of any kind: our transport at one end, a plain socket under
//! the test's control at the other.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener as StdTcpListener, TcpStream as StdTcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{
    SocketAddr as StdUnixAddress, UnixListener as StdUnixListener, UnixStream as StdUnixStream,
};
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bowline::error::ReattachError;
use bowline::layers::StreamTransport as _;
use bowline::testing::{MemoryPeer, MemoryStream, SimulatedKernel};
use bowline::{
    Address, BuildContext, CloseReason, ConnectError, Detached, Factory, FileAddress, Pipe,
    PipeStream, Reactor, TcpStream, TransportHandle, Transports, UnixAddress, UnixStream,
};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::net::sockopt;
use rustix::pipe::fcntl_setpipe_size;
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
use tempfile::TempDir;

pub(crate) use crate::link::{Buffers, DynContext, End, Link, Script, pattern};
use crate::support::{DescriptorLedger, in_short};

/// The kinds of stream transports, by how ours came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    AcceptedTcpV4,
    ConnectingTcpV4,
    AcceptedTcpV6,
    ConnectingTcpV6,
    AcceptedUnixPath,
    ConnectingUnixPath,
    AcceptedUnixAbstract,
    ConnectingUnixAbstract,
    AdoptedSocketpair,
    AdoptedTcp,
    /// A memory transport: it has to be indistinguishable.
    Memory,
    /// Two pipes as one connection.
    Pipes,
    /// The side of a pseudo-terminal that holds it; the peer has the other, raw.
    Terminal,
}

impl Kind {
    pub(crate) fn is_tcp(self) -> bool {
        matches!(
            self,
            Self::AcceptedTcpV4
                | Self::ConnectingTcpV4
                | Self::AcceptedTcpV6
                | Self::ConnectingTcpV6
                | Self::AdoptedTcp
        )
    }

    /// Whether its end is that of one thing: of two pipes, that nobody reads ours any
    /// more is told for itself, and there is no such thing as a reset.
    pub(crate) fn is_socket(self) -> bool {
        !matches!(self, Self::Pipes | Self::Terminal)
    }

    /// Whether that it can be read and that it can be written is said by one event, and not
    /// by one for each of two descriptors.
    pub(crate) fn has_one_event(self) -> bool {
        self != Self::Pipes
    }

    /// Whether an abort of ours is a reset for the peer: a TCP socket that
    /// nobody else may hold.
    pub(crate) fn aborts_with_reset(self) -> bool {
        self.is_tcp() && self != Self::AdoptedTcp
    }

    /// Whether a close can wait for the peer: there are resets, and nobody else may hold
    /// the socket.
    pub(crate) fn lingers(self) -> bool {
        self.aborts_with_reset()
    }

    /// Whether a close with something unread destroys what is on its way to the peer.
    pub(crate) fn closes_with_reset(self) -> bool {
        self.is_tcp() && !self.lingers()
    }

    /// What the peer sees of an abort.
    pub(crate) fn end_of_abort(self) -> End {
        match self.aborts_with_reset() {
            true => End::Reset,
            false => End::Clean,
        }
    }

    /// Whether a peer that closes with something unread is told apart.
    pub(crate) fn is_unix_socket(self) -> bool {
        self.is_socket() && !self.is_tcp()
    }

    /// Whether the end of the stream is said by bytes that have to be read, and not by
    /// the kernel.
    pub(crate) fn has_own_end(self) -> bool {
        false
    }

    /// Puts a connection together again.
    pub(crate) fn reattach(
        self,
        reactor: &mut Reactor,
        detached: Detached<Script>,
    ) -> Result<TransportHandle, ReattachError<Script>> {
        if self == Self::Memory {
            let handle = reactor.reattach::<MemoryStream, _>(detached)?;
            Ok(MemoryStream::transport_named(handle.into()))
        } else if !self.is_socket() {
            reactor.reattach::<PipeStream, _>(detached)
        } else if self.is_tcp() {
            reactor.reattach::<TcpStream, _>(detached)
        } else {
            let handle = reactor.reattach::<UnixStream, _>(detached)?;
            Ok(UnixStream::transport_named(handle.into()))
        }
    }

    /// A connection of the kind: our end with `script` on it, and the peer; and where its
    /// file is, if it has one.
    #[track_caller]
    pub(crate) fn connect(
        self,
        reactor: &mut Reactor,
        buffers: Buffers,
        script: Script,
    ) -> (Peer, Option<TempDir>) {
        let directory = matches!(self, Self::AcceptedUnixPath | Self::ConnectingUnixPath)
            .then(|| tempfile::tempdir().unwrap());
        let path = directory
            .as_ref()
            .map(|directory| directory.path().join("s"));
        let peer = match self {
            Self::AcceptedTcpV4 => accepted_tcp(reactor, "127.0.0.1:0", buffers, script),
            Self::AcceptedTcpV6 => accepted_tcp(reactor, "[::1]:0", buffers, script),
            Self::ConnectingTcpV4 => connecting_tcp(reactor, "127.0.0.1:0", script),
            Self::ConnectingTcpV6 => connecting_tcp(reactor, "[::1]:0", script),
            Self::AcceptedUnixPath => accepted_unix(reactor, path.unwrap().into(), script),
            Self::AcceptedUnixAbstract => {
                accepted_unix(reactor, UnixAddress::Abstract(abstract_name()), script)
            }
            Self::ConnectingUnixPath => connecting_unix(reactor, path.unwrap().into(), script),
            Self::ConnectingUnixAbstract => {
                connecting_unix(reactor, UnixAddress::Abstract(abstract_name()), script)
            }
            Self::AdoptedSocketpair => {
                let (ours, theirs) = StdUnixStream::pair().unwrap();
                shrink(&ours, buffers);
                reactor.adopt_unix_stream(ours.into(), script).unwrap();
                Peer::Unix(theirs)
            }
            Self::AdoptedTcp => {
                let (ours, theirs) = tcp_pair();
                shrink(&ours, buffers);
                reactor.adopt_tcp_stream(ours.into(), script).unwrap();
                Peer::Tcp(theirs)
            }
            Self::Memory => {
                let kernel = SimulatedKernel::new();
                if buffers == Buffers::Small {
                    kernel.set_settings(kernel.settings().send_buffer(2 * SMALL_BYTES));
                }
                let (ours, theirs) = kernel.pair();
                ours.adopt(reactor, script).unwrap();
                Peer::Memory(MemoryPeer::new(theirs))
            }
            Self::Pipes => {
                let (reading, their_writing) = io::pipe().unwrap();
                // About what sockets take.
                fcntl_setpipe_size(&their_writing, 4 * 65_536).unwrap();
                let (their_reading, writing) = io::pipe().unwrap();
                if buffers == Buffers::Small {
                    fcntl_setpipe_size(&writing, SMALL_BYTES).unwrap();
                }
                let ends = (reading.into(), writing.into());
                reactor.adopt(Pipe::pair(), ends, script).unwrap();
                let their_writing = File::from(OwnedFd::from(their_writing));
                Peer::Pipes(
                    OwnedFd::from(their_reading).into(),
                    RefCell::new(Some(their_writing)),
                )
            }
            Self::Terminal => {
                let (ours, theirs) = raw_terminal();
                reactor.adopt(Pipe, ours, script).unwrap();
                Peer::Terminal(theirs)
            }
        };
        peer.set_nonblocking();
        (peer, directory)
    }

    /// Whether this machine has it; says so if not.
    pub(crate) fn is_available(self) -> bool {
        if !matches!(self, Self::AcceptedTcpV6 | Self::ConnectingTcpV6) {
            return true;
        }
        // Not while another test counts descriptors.
        let alone = DescriptorLedger::open();
        let is_available = StdTcpListener::bind("[::1]:0").is_ok();
        drop(alone);
        if !is_available {
            #[allow(clippy::print_stderr, reason = "a skipped test has to be seen")]
            {
                eprintln!("SKIPPED: {self:?} was NOT tested, [::1] cannot be bound here");
            }
        }
        is_available
    }
}

/// Makes each behaviour a test of its own over each kind of transport.
macro_rules! over_every_kind {
    ($($behaviour:ident),* $(,)?) => {$(
        mod $behaviour {
            $crate::harness::over_every_kind!(@ $behaviour
                accepted_tcp_v4 AcceptedTcpV4, connecting_tcp_v4 ConnectingTcpV4,
                accepted_tcp_v6 AcceptedTcpV6, connecting_tcp_v6 ConnectingTcpV6,
                accepted_unix_path AcceptedUnixPath, connecting_unix_path ConnectingUnixPath,
                accepted_unix_abstract AcceptedUnixAbstract,
                connecting_unix_abstract ConnectingUnixAbstract,
                adopted_socketpair AdoptedSocketpair, adopted_tcp AdoptedTcp, memory Memory,
                pipes Pipes);
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

/// As [`over_every_kind`], for what needs a real socket.
macro_rules! over_every_socket {
    ($($behaviour:ident),* $(,)?) => {$(
        mod $behaviour {
            $crate::harness::over_every_kind!(@ $behaviour
                accepted_tcp_v4 AcceptedTcpV4, connecting_tcp_v4 ConnectingTcpV4,
                accepted_tcp_v6 AcceptedTcpV6, connecting_tcp_v6 ConnectingTcpV6,
                accepted_unix_path AcceptedUnixPath, connecting_unix_path ConnectingUnixPath,
                accepted_unix_abstract AcceptedUnixAbstract,
                connecting_unix_abstract ConnectingUnixAbstract,
                adopted_socketpair AdoptedSocketpair, adopted_tcp AdoptedTcp);
        }
    )*};
}

pub(crate) use over_every_socket;

/// As [`over_every_kind`], for the behaviours that a terminal has as well: it cannot be
/// half-closed, drops what is unread at a hang-up, and holds some thousand bytes.
macro_rules! over_terminals {
    ($($behaviour:ident),* $(,)?) => {
        mod on_terminals {$(
            #[test]
            fn $behaviour() {
                super::$behaviour($crate::harness::Kind::Terminal);
            }
        )*}
    };
}

pub(crate) use over_terminals;

/// The other end: a non-blocking socket of std, or of the simulated kernel.
#[derive(Debug)]
pub(crate) enum Peer {
    Tcp(StdTcpStream),
    Unix(StdUnixStream),
    Memory(MemoryPeer),
    /// What it reads, and what it writes to until it closes that.
    Pipes(File, RefCell<Option<File>>),
    Terminal(File),
}

impl Peer {
    pub(crate) fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(data),
            Self::Unix(stream) => stream.write(data),
            Self::Memory(peer) => peer.send(data),
            Self::Pipes(_, writing) => match writing.get_mut() {
                Some(writing) => writing.write(data),
                None => Err(io::ErrorKind::BrokenPipe.into()),
            },
            Self::Terminal(terminal) => terminal.write(data),
        }
    }

    /// Sends what certainly fits.
    #[track_caller]
    pub(crate) fn send(&mut self, data: &[u8]) {
        assert_eq!(self.write(data).unwrap(), data.len());
    }

    /// Sends zeros until nothing more fits; how many.
    pub(crate) fn fill(&mut self) -> usize {
        let mut sent = 0;
        loop {
            match self.write(&[0; 65_536]) {
                Ok(count) => sent += count,
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    return sent;
                }
            }
        }
    }

    /// One read.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buffer),
            Self::Unix(stream) => stream.read(buffer),
            Self::Memory(peer) => peer.receive(buffer.len()).map(|read| {
                buffer[..read.bytes.len()].copy_from_slice(&read.bytes);
                read.bytes.len()
            }),
            Self::Pipes(reading, _) => reading.read(buffer),
            // A hang-up.
            Self::Terminal(terminal) => terminal.read(buffer).or_else(|error| {
                let is_end = error.raw_os_error() == Some(Errno::IO.raw_os_error());
                if is_end { Ok(0) } else { Err(error) }
            }),
        }
    }

    /// Closes its sending side, if it is still connected.
    pub(crate) fn shut_write(&mut self) {
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Write),
            Self::Unix(stream) => stream.shutdown(Shutdown::Write),
            Self::Memory(peer) => {
                peer.shutdown_write();
                Ok(())
            }
            Self::Pipes(_, writing) => {
                writing.take();
                Ok(())
            }
            Self::Terminal(_) => unreachable!("it has one descriptor"),
        };
    }

    /// Reads no more, as only a UNIX socket tells its peer.
    pub(crate) fn shut_read(&mut self) {
        if let Self::Unix(stream) = self {
            stream.shutdown(Shutdown::Read).unwrap();
        }
    }

    /// Closes.
    pub(crate) fn close(self) {}

    /// Closes, so that our end sees a reset.
    pub(crate) fn reset(self) {
        if let Self::Tcp(stream) = &self {
            sockopt::set_socket_linger(stream, Some(Duration::ZERO)).unwrap();
        }
    }

    fn set_nonblocking(&self) {
        match self {
            Self::Tcp(stream) => stream.set_nonblocking(true),
            Self::Unix(stream) => stream.set_nonblocking(true),
            Self::Memory(_) => Ok(()),
            Self::Pipes(reading, writing) => {
                set_nonblocking(reading);
                set_nonblocking(writing.borrow().as_ref().expect("not closed"));
                Ok(())
            }
            Self::Terminal(terminal) => {
                set_nonblocking(terminal);
                Ok(())
            }
        }
        .expect("a socket");
    }

    /// Our address as the peer sees it, and its own.
    pub(crate) fn addresses(&self) -> (Address, Address) {
        match self {
            Self::Tcp(stream) => (
                stream.peer_addr().unwrap().into(),
                stream.local_addr().unwrap().into(),
            ),
            Self::Unix(stream) => (
                unix_address(&stream.peer_addr().unwrap()).into(),
                unix_address(&stream.local_addr().unwrap()).into(),
            ),
            Self::Memory(_) => (UnixAddress::Unnamed.into(), UnixAddress::Unnamed.into()),
            Self::Pipes(..) => (FileAddress::Unnamed.into(), FileAddress::Unnamed.into()),
            Self::Terminal(_) => {
                let master = FileAddress::Path("/dev/pts/ptmx".into());
                (master.clone().into(), master.into())
            }
        }
    }
}

impl AsFd for Peer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
            Self::Memory(_) | Self::Pipes(..) | Self::Terminal(_) => {
                unreachable!("asked for of TCP only")
            }
        }
    }
}

fn set_nonblocking(file: &File) {
    let flags = fcntl_getfl(file).unwrap();
    fcntl_setfl(file, flags | OFlags::NONBLOCK).unwrap();
}

/// Both sides of a pseudo-terminal, the second raw: what is written there comes as it
/// is, and nothing is echoed.
pub(crate) fn raw_terminal() -> (OwnedFd, File) {
    let (master, terminal) = terminal();
    let mut settings = tcgetattr(&terminal).unwrap();
    settings.make_raw();
    tcsetattr(&terminal, OptionalActions::Now, &settings).unwrap();
    (master, terminal)
}

/// Both sides of a pseudo-terminal, as the kernel makes it.
pub(crate) fn terminal() -> (OwnedFd, File) {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let terminal = ioctl_tiocgptpeer(&master, flags).unwrap();
    (master, terminal.into())
}

pub(crate) fn unix_address(address: &StdUnixAddress) -> UnixAddress {
    if let Some(path) = address.as_pathname() {
        UnixAddress::Path(path.into())
    } else if let Some(name) = address.as_abstract_name() {
        UnixAddress::Abstract(name.into())
    } else {
        UnixAddress::Unnamed
    }
}

/// A name that no other test has.
pub(crate) fn abstract_name() -> Vec<u8> {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let next = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("bowline-test-{}-{next}", std::process::id()).into_bytes()
}

/// A connected pair over the loopback interface.
pub(crate) fn tcp_pair() -> (StdTcpStream, StdTcpStream) {
    let listener = StdTcpListener::bind("127.0.0.1:0").unwrap();
    let ours = StdTcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (theirs, _) = listener.accept().unwrap();
    (ours, theirs)
}

/// Not the receiver's: with a tiny window TCP waits for its timers.
fn shrink(ours: &impl AsFd, buffers: Buffers) {
    if buffers == Buffers::Small {
        sockopt::set_socket_send_buffer_size(ours, SMALL_BYTES).unwrap();
    }
}

const SMALL_BYTES: usize = 8_192;

fn accepted_tcp(reactor: &mut Reactor, address: &str, buffers: Buffers, script: Script) -> Peer {
    let record = script.record();
    let mut script = Some(script);
    let address: SocketAddr = address.parse().unwrap();
    let listener = reactor
        .listen_tcp(address, move |_: &Address| script.take().expect("one"))
        .unwrap();
    let address = reactor.get(listener).unwrap().address().as_inet().unwrap();
    // Accepted sockets inherit it.
    let same: OwnedFd = reactor.get(listener).unwrap().duplicate().unwrap();
    shrink(&same, buffers);
    drop(same);
    let peer = StdTcpStream::connect(address).unwrap();
    crate::support::run_until(reactor, |_| !record.summary().is_empty());
    reactor.get(listener).unwrap().stop_listening();
    reactor.turn(Some(Duration::ZERO));
    Peer::Tcp(peer)
}

fn connecting_tcp(reactor: &mut Reactor, address: &str, script: Script) -> Peer {
    let record = script.record();
    let mut script = Some(script);
    let listener = StdTcpListener::bind(address).unwrap();
    let address = listener.local_addr().unwrap();
    reactor
        .connect_tcp(address, move |_: &Address| script.take().expect("one"))
        .unwrap();
    crate::support::run_until(reactor, |_| !record.summary().is_empty());
    Peer::Tcp(listener.accept().unwrap().0)
}

fn accepted_unix(reactor: &mut Reactor, address: UnixAddress, script: Script) -> Peer {
    let record = script.record();
    let mut script = Some(script);
    let listener = reactor
        .listen_unix(address.clone(), move |_: &Address| {
            script.take().expect("one")
        })
        .unwrap();
    let peer = StdUnixStream::connect_addr(&std_address(&address)).unwrap();
    crate::support::run_until(reactor, |_| !record.summary().is_empty());
    reactor.get(listener).unwrap().stop_listening();
    reactor.turn(Some(Duration::ZERO));
    Peer::Unix(peer)
}

fn connecting_unix(reactor: &mut Reactor, address: UnixAddress, script: Script) -> Peer {
    let record = script.record();
    let mut script = Some(script);
    let listener = StdUnixListener::bind_addr(&std_address(&address)).unwrap();
    reactor
        .connect_unix(address, move |_: &Address| script.take().expect("one"))
        .unwrap();
    crate::support::run_until(reactor, |_| !record.summary().is_empty());
    Peer::Unix(listener.accept().unwrap().0)
}

pub(crate) fn std_address(address: &UnixAddress) -> StdUnixAddress {
    match address {
        UnixAddress::Path(path) => StdUnixAddress::from_pathname(path),
        UnixAddress::Abstract(name) => StdUnixAddress::from_abstract_name(name),
        UnixAddress::Unnamed => unreachable!("nobody listens there"),
    }
    .unwrap()
}

/// The callbacks of a factory, and of its protocols, in words and in order.
pub(crate) type Log = Rc<RefCell<Vec<String>>>;
type FactoryHook = Box<dyn FnMut(&mut BuildContext<'_>)>;
type BuildHook = Box<dyn FnMut(&mut BuildContext<'_>) -> Option<Script>>;

/// A factory that logs everything, and does in each callback what the test
/// says.
pub(crate) struct Doorman {
    log: Log,
    on_started: FactoryHook,
    on_build: BuildHook,
    on_failed: FactoryHook,
    on_lost: FactoryHook,
}

impl Doorman {
    /// One that builds a protocol for everybody.
    pub(crate) fn new(log: &Log) -> Self {
        let scripts = Rc::clone(log);
        Self {
            log: Rc::clone(log),
            on_started: Box::new(|_| {}),
            on_build: Box::new(move |_| Some(logging_script(&scripts))),
            on_failed: Box::new(|_| {}),
            on_lost: Box::new(|_| {}),
        }
    }

    pub(crate) fn started(mut self, hook: impl FnMut(&mut BuildContext<'_>) + 'static) -> Self {
        self.on_started = Box::new(hook);
        self
    }

    pub(crate) fn build(
        mut self,
        hook: impl FnMut(&mut BuildContext<'_>) -> Option<Script> + 'static,
    ) -> Self {
        self.on_build = Box::new(hook);
        self
    }

    pub(crate) fn failed(mut self, hook: impl FnMut(&mut BuildContext<'_>) + 'static) -> Self {
        self.on_failed = Box::new(hook);
        self
    }

    pub(crate) fn lost(mut self, hook: impl FnMut(&mut BuildContext<'_>) + 'static) -> Self {
        self.on_lost = Box::new(hook);
        self
    }

    fn note(&self, text: impl Into<String>) {
        self.log.borrow_mut().push(text.into());
    }
}

/// A protocol whose beginning and end stand in the log.
pub(crate) fn logging_script(log: &Log) -> Script {
    let (made, lost) = (Rc::clone(log), Rc::clone(log));
    Script::new()
        .made(move |_| made.borrow_mut().push("made".into()))
        .lost(move |_, reason| {
            lost.borrow_mut()
                .push(format!("protocol lost: {}", in_short(reason)));
        })
}

/// The kind of failure, in words.
pub(crate) fn failure_in_short(error: &ConnectError) -> String {
    match error {
        ConnectError::Refused(_) => "connection refused".into(),
        ConnectError::Unreachable(_) => "destination unreachable".into(),
        ConnectError::TimedOutByKernel(_) => "connecting timed out".into(),
        _ => in_short(error),
    }
}

impl Factory for Doorman {
    type Protocol = Script;

    fn build_protocol(&mut self, cx: &mut BuildContext<'_>, _: &Address) -> Option<Script> {
        self.note("build");
        (self.on_build)(cx)
    }

    fn started(&mut self, cx: &mut BuildContext<'_>) {
        self.note("started");
        (self.on_started)(cx);
    }

    fn stopped(&mut self, _: &mut BuildContext<'_>) {
        self.note("stopped");
    }

    fn connection_failed(&mut self, cx: &mut BuildContext<'_>, error: &ConnectError) {
        self.note(format!("failed: {}", failure_in_short(error)));
        (self.on_failed)(cx);
    }

    fn connection_lost(&mut self, cx: &mut BuildContext<'_>, reason: &CloseReason) {
        self.note(format!("lost: {}", in_short(reason)));
        (self.on_lost)(cx);
    }
}
