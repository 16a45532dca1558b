//! The kinds of connection with TLS on them, and what plays their peer: rustls as it
//! comes, whose record layer is not ours.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener as StdTcpListener, TcpStream as StdTcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use bowline::endpoint::{Adopt as _, Connect as _, Listen as _, TransportFor, Wrap};
use bowline::error::ReattachError;
use bowline::layers::{SendmsgMixin, Stream, TcpSocket, UnixSocket};
use bowline::testing::{Memory, MemoryPeer, MemorySocket, SimulatedKernel};
use bowline::tls::rustls::crypto::CryptoProvider;
use bowline::tls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use bowline::tls::rustls::{
    self, ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig,
    ServerConnection, SupportedProtocolVersion,
};
use bowline::tls::{StartTls, Tls, TlsClient, TlsServer};
use bowline::{
    Address, Detached, ListenerHandle, Reactor, Tcp, TransportHandle, Transports, Unix, UnixAddress,
};
use rustix::net::sockopt;
use tempfile::TempDir;

pub(crate) use crate::link::{Buffers, DynContext, End, Link, Script, pattern};
use crate::support::{DEADLINE, Record};

/// The kinds, by how our end came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    AcceptedTcp,
    ConnectingTcp,
    /// The same two with TLS 1.2.
    AcceptedTcp12,
    ConnectingTcp12,
    /// On a UNIX socket, as it is.
    AcceptedUnix,
    ConnectingUnix,
    /// On a UNIX socket, with `SendmsgMixin` on top.
    AcceptedPassing,
    ConnectingPassing,
    AdoptedPassing,
    /// On the simulated kernel, with `SendmsgMixin` on top.
    Memory,
    /// The layer is there, and nobody has asked for TLS.
    PlainTcp,
    PlainPassing,
}

pub(crate) type TlsTcp = Stream<Tls<TcpSocket>>;
pub(crate) type TlsUnix = Stream<Tls<UnixSocket>>;
pub(crate) type TlsPassing = Stream<SendmsgMixin<Tls<UnixSocket>>>;
type TlsMemory = Stream<SendmsgMixin<Tls<MemorySocket>>>;

/// What certifies our server, and the keys of both.
pub(crate) struct Identity {
    pub(crate) authority: rcgen::CertifiedIssuer<'static, rcgen::KeyPair>,
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivateKeyDer<'static>,
}

/// What tests have certificates of: made once in each run.
pub(crate) static IDENTITY: LazyLock<Identity> = LazyLock::new(|| {
    let mut parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
    parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let name = &mut parameters.distinguished_name;
    name.push(rcgen::DnType::CommonName, "tests of bowline");
    let key = rcgen::KeyPair::generate().unwrap();
    let authority = rcgen::CertifiedIssuer::self_signed(parameters, key).unwrap();
    let (chain, key) = certified(&authority, &["localhost"]);
    Identity {
        authority,
        chain,
        key,
    }
});

/// A certificate for these names.
pub(crate) fn certified(
    authority: &rcgen::CertifiedIssuer<'_, rcgen::KeyPair>,
    names: &[&str],
) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let names: Vec<String> = names.iter().map(|name| (*name).into()).collect();
    let parameters = rcgen::CertificateParams::new(names).unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = parameters.signed_by(&key, authority).unwrap();
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    (vec![certificate.der().clone()], key)
}

pub(crate) fn roots() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add(IDENTITY.authority.der().clone()).unwrap();
    roots
}

/// All that are built in.
pub(crate) fn providers() -> Vec<CryptoProvider> {
    vec![
        rustls::crypto::ring::default_provider(),
        #[cfg(feature = "tls-aws-lc-rs")]
        rustls::crypto::aws_lc_rs::default_provider(),
    ]
}

/// The cryptography that everything here is tested with, on both sides: with the feature
/// `tls-aws-lc-rs` that one, and else that of ring.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    static INSTALLED: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
        let last = providers().pop().expect("one");
        last.install_default().expect("nobody else does");
        bowline::tls::crypto_provider()
    });
    Arc::clone(&INSTALLED)
}

/// Both versions.
pub(crate) const BOTH: &[&SupportedProtocolVersion] =
    &[&rustls::version::TLS13, &rustls::version::TLS12];
pub(crate) const ONLY_12: &[&SupportedProtocolVersion] = &[&rustls::version::TLS12];

/// Without tickets, which would wait unread in the sockets of paused clients.
pub(crate) fn server_config(versions: &[&'static SupportedProtocolVersion]) -> ServerConfig {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(versions)
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(IDENTITY.chain.clone(), IDENTITY.key.clone_key())
        .unwrap();
    config.send_tls13_tickets = 0;
    config
}

pub(crate) fn client_config(versions: &[&'static SupportedProtocolVersion]) -> ClientConfig {
    ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots())
        .with_no_client_auth()
}

pub(crate) fn server() -> TlsServer {
    TlsServer::new(server_config(BOTH))
}

pub(crate) fn client() -> TlsClient {
    TlsClient::new(client_config(BOTH), "localhost").unwrap()
}

impl Kind {
    pub(crate) fn is_tcp(self) -> bool {
        matches!(
            self,
            Self::AcceptedTcp
                | Self::ConnectingTcp
                | Self::AcceptedTcp12
                | Self::ConnectingTcp12
                | Self::PlainTcp
        )
    }

    pub(crate) fn is_socket(self) -> bool {
        true
    }

    /// As `tests/transport/harness.rs` says.
    pub(crate) fn has_one_event(self) -> bool {
        true
    }

    /// Whether a peer that closes with something unread is told apart.
    pub(crate) fn is_unix_socket(self) -> bool {
        !self.is_tcp()
    }

    pub(crate) fn is_secured(self) -> bool {
        !matches!(self, Self::PlainTcp | Self::PlainPassing)
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
        self.is_secured()
    }

    pub(crate) fn end_of_abort(self) -> End {
        match self {
            it if it.is_tcp() => End::Reset,
            it if it.is_secured() => End::CutOff,
            _ => End::Clean,
        }
    }

    /// Whether we are the client.
    pub(crate) fn is_client(self) -> bool {
        matches!(
            self,
            Self::ConnectingTcp
                | Self::ConnectingTcp12
                | Self::ConnectingUnix
                | Self::ConnectingPassing
        )
    }

    fn versions(self) -> &'static [&'static SupportedProtocolVersion] {
        match self {
            Self::AcceptedTcp12 | Self::ConnectingTcp12 => ONLY_12,
            _ => BOTH,
        }
    }

    pub(crate) fn reattach(
        self,
        reactor: &mut Reactor,
        detached: Detached<Script>,
    ) -> Result<TransportHandle, ReattachError<Script>> {
        match self {
            it if it.is_tcp() => reactor.reattach::<TlsTcp, _>(detached),
            Self::AcceptedUnix | Self::ConnectingUnix => reactor.reattach::<TlsUnix, _>(detached),
            Self::Memory => reactor.reattach::<TlsMemory, _>(detached),
            _ => reactor.reattach::<TlsPassing, _>(detached),
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
        let (server, client) = (server(), client());
        let (raw, directory) = self.connect_raw(reactor, buffers, script, server, client);
        let mut peer = Peer::new(raw);
        if self.is_secured() {
            peer.secure(match self.is_client() {
                true => accepting(server_config(self.versions())),
                false => connecting(client_config(self.versions())),
            });
            peer.shake_hands(reactor, &record);
        } else {
            crate::support::run_until(reactor, |_| !record.summary().is_empty());
        }
        (peer, directory)
    }

    /// The same, before the handshake.
    pub(crate) fn connect_raw(
        self,
        reactor: &mut Reactor,
        buffers: Buffers,
        script: Script,
        server: TlsServer,
        client: TlsClient,
    ) -> (Raw, Option<TempDir>) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let raw = match self {
            Self::PlainTcp => accepted_tcp(reactor, buffers, script, StartTls),
            Self::AcceptedTcp | Self::AcceptedTcp12 => {
                accepted_tcp(reactor, buffers, script, server)
            }
            Self::ConnectingTcp | Self::ConnectingTcp12 => {
                let listener = StdTcpListener::bind("127.0.0.1:0").unwrap();
                let there = Tcp::to(listener.local_addr().unwrap()).layer(client);
                reactor.connect(there, once(script)).unwrap();
                reactor.turn(Some(Duration::ZERO));
                Raw::Tcp(listener.accept().unwrap().0)
            }
            Self::AcceptedUnix | Self::AcceptedPassing | Self::PlainPassing => {
                let here = Unix::at(path.as_path());
                let record = script.record();
                let factory = once(script);
                let listener = match self {
                    Self::AcceptedUnix => reactor.listen(here.layer(server), factory),
                    Self::PlainPassing => reactor.listen(here.layer(StartTls.passing()), factory),
                    _ => reactor.listen(here.layer(server.passing()), factory),
                };
                let peer = StdUnixStream::connect(&path).unwrap();
                accept_one(reactor, listener.unwrap(), &record);
                Raw::Unix(peer)
            }
            Self::ConnectingUnix | Self::ConnectingPassing => {
                let listener = StdUnixListener::bind(&path).unwrap();
                let there = Unix::to(path.as_path());
                let factory = once(script);
                match self {
                    Self::ConnectingUnix => reactor.connect(there.layer(client), factory),
                    _ => reactor.connect(there.layer(client.passing()), factory),
                }
                .unwrap();
                reactor.turn(Some(Duration::ZERO));
                Raw::Unix(listener.accept().unwrap().0)
            }
            Self::AdoptedPassing => {
                let (ours, theirs) = StdUnixStream::pair().unwrap();
                shrink(&ours, buffers);
                let kind = Unix.layer(server.passing());
                reactor.adopt(kind, ours.into(), script).unwrap();
                Raw::Unix(theirs)
            }
            Self::Memory => {
                let kernel = SimulatedKernel::new();
                if buffers == Buffers::Small {
                    set_send_buffer(&kernel, 16_384);
                }
                let (ours, theirs) = kernel.pair();
                let kind = Memory.layer(server.passing());
                reactor.adopt(kind, ours, script).unwrap();
                Raw::Memory(MemoryPeer::new(theirs))
            }
        };
        raw.prepare();
        (raw, Some(directory))
    }
}

/// A factory of one protocol.
fn once(script: Script) -> impl FnMut(&Address) -> Script + 'static {
    let mut script = Some(script);
    move |_: &Address| script.take().expect("one")
}

fn accepted_tcp<W>(reactor: &mut Reactor, buffers: Buffers, script: Script, wrap: W) -> Raw
where
    W: Wrap<TcpSocket>,
    W::Transport: TransportFor<Script>,
{
    let here = Tcp::at(([127, 0, 0, 1], 0).into()).layer(wrap);
    let record = script.record();
    let listener = reactor.listen(here, once(script)).unwrap();
    let address = reactor.get(listener).unwrap().address().as_inet().unwrap();
    // Accepted sockets inherit it.
    let same = reactor.get(listener).unwrap().duplicate().unwrap();
    shrink(&same, buffers);
    let peer = StdTcpStream::connect(address).unwrap();
    accept_one(reactor, listener, &record);
    Raw::Tcp(peer)
}

fn accept_one(reactor: &mut Reactor, listener: ListenerHandle, record: &Record) {
    let before = reactor.registered();
    // One in the clear may be over in the turn that accepts it.
    crate::support::run_until(reactor, |reactor| {
        reactor.registered() > before || !record.summary().is_empty()
    });
    reactor.get(listener).unwrap().stop_listening();
    reactor.turn(Some(Duration::ZERO));
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

pub(crate) fn accepting(config: ServerConfig) -> Connection {
    ServerConnection::new(Arc::new(config)).unwrap().into()
}

pub(crate) fn connecting(config: ClientConfig) -> Connection {
    let name = ServerName::try_from("localhost").unwrap();
    ClientConnection::new(Arc::new(config), name)
        .unwrap()
        .into()
}

/// What is under a peer.
#[derive(Debug)]
pub(crate) enum Raw {
    Tcp(StdTcpStream),
    Unix(StdUnixStream),
    Memory(MemoryPeer),
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
            Self::Memory(_) => {}
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
        };
    }
}

impl Read for Raw {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buffer),
            Self::Unix(stream) => stream.read(buffer),
            Self::Memory(peer) => peer.receive(buffer.len()).map(|read| {
                buffer[..read.bytes.len()].copy_from_slice(&read.bytes);
                read.bytes.len()
            }),
        }
    }
}

impl Write for Raw {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(data),
            Self::Unix(stream) => stream.write(data),
            Self::Memory(peer) => peer.send(data),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The other end.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) raw: Raw,
    /// `None` where the bytes are sent as they are.
    pub(crate) tls: Option<Connection>,
}

impl Peer {
    pub(crate) fn new(raw: Raw) -> Self {
        Self { raw, tls: None }
    }

    pub(crate) fn secure(&mut self, tls: Connection) {
        self.tls = Some(tls);
    }

    /// Turns the reactor until the connection is made.
    #[track_caller]
    pub(crate) fn shake_hands(&mut self, reactor: &mut Reactor, record: &Record) {
        let began = Instant::now();
        while self.step().unwrap() || record.summary().is_empty() {
            assert!(began.elapsed() < DEADLINE, "no end of the handshake");
            reactor.turn(Some(Duration::from_millis(1)));
        }
    }

    /// A step of the peer's handshake; whether it goes on.
    pub(crate) fn step(&mut self) -> io::Result<bool> {
        let tls = self.tls.as_mut().expect("secured");
        while tls.wants_write() {
            match tls.write_tls(&mut self.raw) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                written => drop(written?),
            }
        }
        if tls.is_handshaking() {
            match tls.read_tls(&mut self.raw) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {
                    let processed = tls.process_new_packets();
                    let _ = tls.write_tls(&mut self.raw);
                    processed.map_err(io::Error::other)?;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(tls.is_handshaking() || tls.wants_write())
    }

    fn flush(&mut self) -> io::Result<()> {
        while let Some(tls) = self.tls.as_mut().filter(|tls| tls.wants_write()) {
            tls.write_tls(&mut self.raw)?;
        }
        Ok(())
    }

    pub(crate) fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.flush()?;
        let Some(tls) = &mut self.tls else {
            return self.raw.write(data);
        };
        // Sealed once, since that cannot be undone.
        let count = tls.writer().write(&data[..data.len().min(16_384)])?;
        match self.flush() {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(count),
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
        // The rest of a record.
        self.raw.make_room();
        self.flush().unwrap();
        sent
    }

    /// One read. `UnexpectedEof` is an end without a word.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // As far as it goes.
        let _ = self.flush();
        loop {
            let Some(tls) = &mut self.tls else {
                return self.raw.read(buffer);
            };
            match tls.reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return read,
            }
            tls.read_tls(&mut self.raw)?;
            tls.process_new_packets().map_err(io::Error::other)?;
        }
    }

    fn say_close(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.send_close_notify();
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
    pub(crate) fn shut_read(&self) {
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
        }
    }
}

/// Makes each behaviour a test of its own over each kind.
macro_rules! over_every_kind {
    ($($behaviour:ident),* $(,)?) => {$(
        mod $behaviour {
            $crate::harness::over_every_kind!(@ $behaviour
                accepted_tcp AcceptedTcp, connecting_tcp ConnectingTcp,
                accepted_tcp_12 AcceptedTcp12, connecting_tcp_12 ConnectingTcp12,
                accepted_unix AcceptedUnix, connecting_unix ConnectingUnix,
                accepted_passing AcceptedPassing, connecting_passing ConnectingPassing,
                adopted_passing AdoptedPassing, memory Memory,
                plain_tcp PlainTcp, plain_passing PlainPassing);
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
                accepted_tcp_12 AcceptedTcp12, connecting_tcp_12 ConnectingTcp12,
                accepted_unix AcceptedUnix, connecting_unix ConnectingUnix,
                accepted_passing AcceptedPassing, connecting_passing ConnectingPassing,
                adopted_passing AdoptedPassing, plain_tcp PlainTcp,
                plain_passing PlainPassing);
        }
    )*};
}

pub(crate) use over_every_socket;

/// There are no terminals here.
macro_rules! over_terminals {
    ($($behaviour:ident),* $(,)?) => {};
}

pub(crate) use over_terminals;

/// As [`over_every_kind`], for those that are secured.
macro_rules! over_every_layer {
    ($($behaviour:ident),* $(,)?) => {$(
        mod $behaviour {
            $crate::harness::over_every_kind!(@ $behaviour
                accepted_tcp AcceptedTcp, connecting_tcp ConnectingTcp,
                accepted_tcp_12 AcceptedTcp12, connecting_tcp_12 ConnectingTcp12,
                accepted_unix AcceptedUnix, connecting_unix ConnectingUnix,
                accepted_passing AcceptedPassing, connecting_passing ConnectingPassing,
                adopted_passing AdoptedPassing, memory Memory);
        }
    )*};
}

#[allow(unused_imports)]
pub(crate) use over_every_layer;
