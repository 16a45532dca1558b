//! Connections that are given to another process: here it is the same one, in which
//! nothing of them is left meanwhile.

use std::cell::{Cell, RefCell};
use std::io::{ErrorKind, Read as _, Write as _};
use std::num::NonZeroUsize;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::process::Command;
use std::rc::Rc;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};

use bowline::endpoint::{Adopt as _, Carried};
use bowline::error::ReattachError;
use bowline::layers::{LayerState, Stays};
use bowline::tls::rustls::crypto::CryptoProvider;
use bowline::tls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use bowline::tls::rustls::{ClientConfig, Connection, ServerConfig, SupportedCipherSuite};
use bowline::tls::{MoveError, MovedTls, TlsClient, TlsServer, TlsTransport};
use bowline::{
    AfterReadClosed, CloseReason, Context, Detached, Protocol, Reactor, Transport, TransportHandle,
    Transports, Unix, Unsent,
};

use crate::harness::{
    IDENTITY, TlsUnix, accepting, connecting, pattern, provider, providers, roots,
};
use crate::recorder::{Note, doubled, recording};
use crate::support::peers::has_program;
use crate::support::{DEADLINE, DescriptorLedger};

/// Sends back what it receives.
#[derive(Default)]
struct Echo {
    received: Rc<RefCell<Vec<u8>>>,
    handle: Rc<Cell<Option<TransportHandle>>>,
    lost: Rc<RefCell<Option<String>>>,
    is_quiet: Rc<Cell<bool>>,
    is_pausing: bool,
}

impl<T: Transport> Protocol<T> for Echo {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        self.handle.set(Some(cx.transport.handle()));
        if self.is_pausing {
            cx.transport.set_read_limit(Some(NonZeroUsize::MIN));
        }
    }

    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        self.received.borrow_mut().extend_from_slice(data);
        if !self.is_quiet.get() {
            cx.transport.write(data);
        }
        if std::mem::take(&mut self.is_pausing) {
            cx.transport.pause_producing();
        }
    }

    fn read_connection_lost(&mut self, _: &mut Context<'_, T>) -> AfterReadClosed {
        AfterReadClosed::LoseConnection
    }

    fn connection_lost(&mut self, _: &mut Context<'_, T>, reason: &CloseReason) {
        *self.lost.borrow_mut() = Some(reason.to_string());
    }
}

enum Role {
    Server(TlsServer),
    Client(TlsClient),
}

impl Role {
    fn resume(&self, state: LayerState) -> Result<MovedTls, MoveError> {
        match self {
            Self::Server(server) => server.resume(state),
            Self::Client(client) => client.resume(state),
        }
    }
}

/// Our end of a connection and its peer, whose record layer is rustls' own.
struct Pair {
    reactor: Reactor,
    role: Role,
    received: Rc<RefCell<Vec<u8>>>,
    handle: Rc<Cell<Option<TransportHandle>>>,
    lost: Rc<RefCell<Option<String>>>,
    is_quiet: Rc<Cell<bool>>,
    stream: StdUnixStream,
    peer: Connection,
    /// What the peer has got back.
    back: Vec<u8>,
}

/// A certificate with a key for RSA, which OpenSSL makes; `None` without it, which is said.
static RSA: LazyLock<Option<Certified>> = LazyLock::new(|| {
    if !has_program("openssl", "version", "openssl") {
        return None;
    }
    let made = Command::new("openssl")
        .args(["genpkey", "-algorithm", "RSA"])
        .args(["-pkeyopt", "rsa_keygen_bits:2048"])
        .output()
        .unwrap();
    let pem = String::from_utf8(made.stdout).unwrap();
    let key = rcgen::KeyPair::from_pem(&pem).unwrap();
    let parameters = rcgen::CertificateParams::new(vec!["localhost".into()]).unwrap();
    let certificate = parameters.signed_by(&key, &IDENTITY.authority).unwrap();
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    Some((vec![certificate.der().clone()], key))
});

type Certified = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn is_of_rsa(suite: SupportedCipherSuite) -> bool {
    format!("{suite:?}").contains("ECDHE_RSA")
}

/// For `peers`, which has one suite.
fn configs(provider: &CryptoProvider, peers: &CryptoProvider) -> (ServerConfig, ClientConfig) {
    let [suite] = peers.cipher_suites[..] else {
        panic!("{peers:?} has others");
    };
    let versions = [suite.version()];
    let (chain, key) = match &*RSA {
        Some((chain, key)) if is_of_rsa(suite) => (chain, key),
        _ => (&IDENTITY.chain, &IDENTITY.key),
    };
    let server = ServerConfig::builder_with_provider(Arc::new(provider.clone()))
        .with_protocol_versions(&versions)
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain.clone(), key.clone_key())
        .unwrap();
    let client = ClientConfig::builder_with_provider(Arc::new(peers.clone()))
        .with_protocol_versions(&versions)
        .unwrap()
        .with_root_certificates(roots())
        .with_no_client_auth();
    (server, client)
}

/// This provider with each of its suites alone.
fn single_suites(provider: &CryptoProvider) -> Vec<CryptoProvider> {
    let suites = provider.cipher_suites.iter().copied();
    let single: Vec<_> = suites
        .filter(|suite| !is_of_rsa(*suite) || RSA.is_some())
        .map(|suite| CryptoProvider {
            cipher_suites: vec![suite],
            ..provider.clone()
        })
        .collect();
    // Three of TLS 1.3, and as many of 1.2 for each sort of key.
    assert_eq!(single.len(), if RSA.is_some() { 9 } else { 6 });
    single
}

impl Pair {
    fn new(ours: &CryptoProvider, peers: &CryptoProvider, is_client: bool) -> Self {
        let mut pair = Self::begun(ours, peers, is_client, true);
        pair.shake_hands();
        pair
    }

    /// Whose handshake has yet to begin.
    fn begun(
        ours: &CryptoProvider,
        peers: &CryptoProvider,
        is_client: bool,
        may_move: bool,
    ) -> Self {
        let (role, peer) = match is_client {
            false => {
                let (server, client) = configs(ours, peers);
                let server = TlsServer::new(server).may_move(may_move);
                (Role::Server(server), connecting(client))
            }
            true => {
                let (server, client) = configs(peers, ours);
                let client = TlsClient::new(client, "localhost").unwrap();
                (Role::Client(client.may_move(may_move)), accepting(server))
            }
        };
        let mut reactor = Reactor::new().unwrap();
        let (socket, stream) = StdUnixStream::pair().unwrap();
        stream.set_nonblocking(true).unwrap();
        let echo = Echo::default();
        let (received, handle) = (Rc::clone(&echo.received), Rc::clone(&echo.handle));
        let (lost, is_quiet) = (Rc::clone(&echo.lost), Rc::clone(&echo.is_quiet));
        match &role {
            Role::Server(server) => reactor
                .adopt(Unix.layer(server.clone()), socket.into(), echo)
                .map(|_| ()),
            Role::Client(client) => reactor
                .adopt(Unix.layer(client.clone()), socket.into(), echo)
                .map(|_| ()),
        }
        .unwrap();
        Self {
            reactor,
            role,
            received,
            handle,
            lost,
            is_quiet,
            stream,
            peer,
            back: Vec::new(),
        }
    }

    #[track_caller]
    fn shake_hands(&mut self) {
        let began = Instant::now();
        while self.peer.is_handshaking() || self.handle.get().is_none() {
            assert!(began.elapsed() < DEADLINE, "no handshake");
            let sealed = self.peer_seals(b"");
            self.stream.write_all(&sealed).unwrap();
            self.settle();
            self.peer_reads();
        }
        let sealed = self.peer_seals(b"");
        self.stream.write_all(&sealed).unwrap();
        self.settle();
        self.peer_reads();
    }

    fn settle(&mut self) {
        for _ in 0..3 {
            self.reactor.turn(Some(Duration::ZERO));
        }
    }

    fn peer_seals(&mut self, data: &[u8]) -> Vec<u8> {
        self.peer.writer().write_all(data).unwrap();
        let mut sealed = Vec::new();
        while self.peer.wants_write() {
            self.peer.write_tls(&mut sealed).unwrap();
        }
        sealed
    }

    /// Takes what has come.
    #[track_caller]
    fn peer_reads(&mut self) {
        let mut buffer = [0; 16_384];
        loop {
            let count = match self.stream.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => panic!("{error}"),
            };
            let mut rest = &buffer[..count];
            while !rest.is_empty() {
                self.peer.read_tls(&mut rest).unwrap();
                let state = self.peer.process_new_packets().unwrap();
                let mut plain = vec![0; state.plaintext_bytes_to_read()];
                self.peer.reader().read_exact(&mut plain).unwrap();
                self.back.extend(plain);
            }
        }
    }

    /// Takes the connection off its reactor.
    #[track_caller]
    fn detach(&mut self) -> Detached<Echo> {
        let result: Rc<RefCell<Option<Detached<Echo>>>> = Rc::default();
        let detached = Rc::clone(&result);
        let handle = self.handle.take().expect("it is made");
        self.reactor.detach(handle, move |_, it| {
            *detached.borrow_mut() = Some(it.unwrap());
        });
        self.reactor.turn(Some(Duration::ZERO));
        result.take().expect("it is open")
    }

    /// Gives the connection away, and goes on with what was given.
    #[track_caller]
    fn move_on(&mut self) {
        let mut detached = self.detach();
        let mut layers = detached.pack().expect("it may move");
        let state = layers.pop().expect("one of TLS");
        assert!(layers.is_empty());
        let Detached {
            fd,
            unsent,
            unread,
            protocol,
            ..
        } = detached;
        self.adopt(state, fd, unsent, unread, protocol);
    }

    #[track_caller]
    fn adopt(
        &mut self,
        state: LayerState,
        fd: std::os::fd::OwnedFd,
        bytes: Vec<u8>,
        unread: Vec<u8>,
        protocol: Echo,
    ) {
        let tls = self.role.resume(state).unwrap();
        let kind = Unix.layer(tls).carrying(Carried {
            unsent: Unsent {
                bytes,
                descriptors: Vec::new(),
            },
            unread,
            ends_for_all: false,
        });
        self.reactor.adopt(kind, fd, protocol).unwrap();
        self.settle();
        assert!(self.handle.get().is_some(), "it is made again");
    }

    /// Has it sent back, and checks that.
    #[track_caller]
    fn echo(&mut self, data: &[u8]) {
        let wanted = self.back.len() + data.len();
        let sealed = self.peer_seals(data);
        self.stream.write_all(&sealed).unwrap();
        let began = Instant::now();
        while self.back.len() < wanted {
            assert!(began.elapsed() < DEADLINE, "{:?}", self.lost.borrow());
            self.settle();
            self.peer_reads();
        }
        assert!(self.back.ends_with(data));
    }

    fn is_13(&self) -> bool {
        self.peer.protocol_version() == Some(bowline::tls::rustls::ProtocolVersion::TLSv1_3)
    }
}

/// One provider after the other, as we and as the process that goes on would have them.
#[test]
fn a_connection_moves_after_every_byte_in_each_suite() {
    let _ledger = DescriptorLedger::open();
    for base in providers() {
        let seen: Arc<Mutex<String>> = Arc::default();
        let noted = Arc::clone(&seen);
        let note: Note = Arc::new(move |sealed| noted.lock().unwrap().push_str(&sealed.to_line()));
        let ours = recording(&base, &note);
        for (peers, suite) in single_suites(&base).iter().zip(single_suites(&ours)) {
            for is_client in [false, true] {
                let ours = if is_client {
                    suite.clone()
                } else {
                    ours.clone()
                };
                let mut pair = Pair::new(&ours, peers, is_client);
                let mut sent = Vec::new();
                for round in 0..3 {
                    let data = pattern(1 + round * 30);
                    if pair.is_13() && round == 1 {
                        pair.peer.refresh_traffic_keys().unwrap();
                    }
                    for byte in pair.peer_seals(&data) {
                        pair.stream.write_all(&[byte]).unwrap();
                        pair.settle();
                        pair.move_on();
                    }
                    pair.settle();
                    pair.peer_reads();
                    sent.extend(data);
                    assert!(pair.back == sent, "{peers:?}: {} came", pair.back.len());
                    assert!(*pair.received.borrow() == sent);
                }
                // Far more than a few: some providers refuse numbers only later.
                for round in 0..40 {
                    pair.echo(&vec![round; 1 + usize::from(round) * 400]);
                }
            }
        }
        let (sealed, twice) = doubled(&seen.lock().unwrap());
        assert!(sealed > 500, "{sealed}");
        assert!(twice.is_empty(), "sealed twice: {twice:?}");
    }
}

#[test]
fn one_provider_goes_on_where_another_has_stopped() {
    let all = providers();
    for peers in single_suites(&all[0]) {
        let mut pair = Pair::new(&all[0], &peers, false);
        pair.echo(b"before");
        for round in 0..2 * all.len() {
            let (server, _) = configs(&all[round % all.len()], &peers);
            pair.role = Role::Server(TlsServer::new(server));
            pair.move_on();
            for number in 0..30 {
                pair.echo(&pattern(1 + number * 100));
            }
        }
    }
}

#[test]
fn what_is_sealed_and_unsent_moves_in_order() {
    for peers in single_suites(&provider()) {
        let mut pair = Pair::new(&provider(), &peers, false);
        pair.is_quiet.set(true);
        let data = pattern(900_000);
        let handle = pair.handle.get().unwrap();
        pair.reactor.get(handle).unwrap().write(&data);
        pair.settle();
        let began = Instant::now();
        while pair.back.len() < data.len() {
            assert!(began.elapsed() < DEADLINE, "{} came", pair.back.len());
            pair.move_on();
            // A part of what is there, in the middle of a record.
            let mut buffer = [0; 50_001];
            let Ok(count) = pair.stream.read(&mut buffer) else {
                continue;
            };
            let mut rest = &buffer[..count];
            while !rest.is_empty() {
                pair.peer.read_tls(&mut rest).unwrap();
                let state = pair.peer.process_new_packets().unwrap();
                let mut plain = vec![0; state.plaintext_bytes_to_read()];
                pair.peer.reader().read_exact(&mut plain).unwrap();
                pair.back.extend(plain);
            }
            pair.settle();
        }
        assert!(pair.back == data);
    }
}

#[test]
fn what_was_opened_and_nobody_took_moves() {
    let peers = single_suites(&provider()).remove(0);
    let mut pair = Pair::new(&provider(), &peers, false);
    let mut detached = pair.detach();
    detached.protocol.is_pausing = true;
    let state = detached.pack().unwrap().pop().unwrap();
    let Detached { fd, protocol, .. } = detached;
    pair.adopt(state, fd, Vec::new(), Vec::new(), protocol);
    let data = pattern(30_000);
    let sealed = pair.peer_seals(&data);
    pair.stream.write_all(&sealed).unwrap();
    pair.settle();
    // One byte of a record was taken, and the rest of it is here in the clear.
    assert_eq!(pair.received.borrow().len(), 1);
    pair.move_on();
    let began = Instant::now();
    while pair.back.len() < data.len() {
        assert!(began.elapsed() < DEADLINE, "{} came", pair.back.len());
        pair.settle();
        pair.peer_reads();
    }
    assert!(pair.back == data);
}

#[test]
fn an_end_that_was_said_is_told_after_the_move() {
    let peers = single_suites(&provider()).remove(0);
    let mut pair = Pair::new(&provider(), &peers, false);
    pair.peer.send_close_notify();
    let sealed = pair.peer_seals(b"");
    let (last, rest) = sealed.split_last().unwrap();
    pair.stream.write_all(rest).unwrap();
    pair.settle();
    pair.move_on();
    pair.stream.write_all(&[*last]).unwrap();
    pair.settle();
    assert_eq!(pair.lost.borrow().as_deref(), Some("closed cleanly"));
    // And one that is cut off is no end.
    let mut pair = Pair::new(&provider(), &peers, false);
    pair.move_on();
    let (stream, _) = StdUnixStream::pair().unwrap();
    pair.stream = stream;
    pair.settle();
    let lost = pair.lost.borrow().clone().unwrap();
    assert!(lost.contains("cut off"), "{lost}");
}

#[test]
fn what_was_agreed_on_is_known_after_the_move() {
    let peers = single_suites(&provider()).remove(0);
    let mut pair = Pair::new(&provider(), &peers, false);
    let shown = |pair: &mut Pair| {
        let handle = pair.handle.get().unwrap();
        let secured = bowline::Handle::<TlsUnix>::new(handle.token(), |facet| facet.downcast_mut());
        let tls = pair.reactor.get(secured).unwrap().tls().unwrap();
        (
            tls.version(),
            tls.cipher_suite(),
            tls.key_exchange_group(),
            tls.server_name().map(str::to_owned),
            tls.is_resumed(),
            tls.is_established(),
        )
    };
    let before = shown(&mut pair);
    assert_eq!(before.3.as_deref(), Some("localhost"));
    pair.move_on();
    assert_eq!(shown(&mut pair), before);
}

/// The rule that all others are for: of two that could have it, one has.
#[test]
fn a_connection_is_in_one_pair_of_hands() {
    let _ledger = DescriptorLedger::open();
    for peers in single_suites(&provider()) {
        // The other process has taken it: it cannot come back.
        let mut pair = Pair::new(&provider(), &peers, false);
        let mut detached = pair.detach();
        let mut layers = detached.pack().unwrap();
        let fd = detached.fd.try_clone().unwrap();
        let state = layers.pop().unwrap();
        pair.adopt(
            state,
            fd,
            Vec::new(),
            Vec::new(),
            Echo {
                handle: Rc::clone(&pair.handle),
                ..Echo::default()
            },
        );
        let failed = pair.reactor.reattach::<TlsUnix, _>(detached).unwrap_err();
        assert!(
            failed.to_string().ends_with("another process has it"),
            "{failed}"
        );
        drop(failed);
        pair.echo(b"there");

        // It came back: the other process cannot have it any more.
        let mut pair = Pair::new(&provider(), &peers, false);
        let mut detached = pair.detach();
        let state = detached.pack().unwrap().pop().unwrap();
        let handle = match pair.reactor.reattach::<TlsUnix, _>(detached) {
            Ok(handle) => handle,
            Err(ReattachError { kind, .. }) => panic!("{kind}"),
        };
        pair.handle.set(Some(handle));
        let refused = pair.role.resume(state).unwrap_err();
        assert!(matches!(refused, MoveError::Taken), "{refused}");
        for number in 0..30 {
            pair.echo(&pattern(1 + number * 100));
        }
        // And can be given away again.
        pair.move_on();
        pair.echo(b"and again");

        // Nobody takes it: it is gone with the last hold on its pipe.
        let mut pair = Pair::new(&provider(), &peers, false);
        drop(pair.detach().pack().unwrap());
    }
}

#[test]
fn a_connection_that_cannot_move_says_why_and_goes_on() {
    let peers = single_suites(&provider()).remove(0);
    let stays = |pair: &mut Pair| {
        let mut detached = pair.detach();
        let stays = detached.pack().unwrap_err();
        assert!(!detached.travels());
        match pair.reactor.reattach::<TlsUnix, _>(detached) {
            Ok(handle) => pair.handle.set(Some(handle)),
            Err(error) => panic!("{error}"),
        }
        stays
    };
    let mut pair = Pair::begun(&provider(), &peers, false, false);
    pair.shake_hands();
    assert_eq!(stays(&mut pair), Stays::NotAllowed);
    pair.echo(b"it goes on");

    let mut pair = Pair::new(&provider(), &peers, false);
    let handle = pair.handle.get().unwrap();
    pair.reactor.get(handle).unwrap().lose_write_connection();
    pair.settle();
    assert_eq!(stays(&mut pair), Stays::Closing);
}

/// A state of something else, of a suite that is not there, of the other side, cut or
/// changed.
#[test]
fn what_is_not_to_be_gone_on_with_is_refused() {
    let all = single_suites(&provider());
    let given = |pair: &mut Pair| pair.detach().pack().unwrap().pop().unwrap();
    let mut pair = Pair::new(&provider(), &all[0], false);
    let Role::Server(server) = &pair.role else {
        unreachable!("it is one");
    };
    let server = server.clone();
    let state = given(&mut pair);
    assert!(server.can_resume(&state));
    let (other, _) = configs(&all[1], &all[1]);
    let other = TlsServer::new(other);
    assert!(!other.can_resume(&state), "a suite that it lacks");
    let refused = other.resume(state).unwrap_err();
    assert!(
        matches!(refused, MoveError::Unsupported { .. }),
        "{refused}"
    );

    for place in 0..7 {
        let mut pair = Pair::new(&provider(), &all[0], false);
        let mut state = given(&mut pair);
        match place {
            6 => state.name = "another".into(),
            place => state.state[place] ^= 1,
        }
        let refused = server.resume(state).unwrap_err();
        assert!(
            !matches!(refused, MoveError::Taken),
            "at {place}: {refused}"
        );
    }
    let mut pair = Pair::new(&provider(), &all[0], false);
    let mut state = given(&mut pair);
    state.descriptors.clear();
    assert!(!server.can_resume(&state), "without its key");
}

#[test]
fn nothing_that_is_secret_is_shown() {
    let peers = single_suites(&provider()).remove(0);
    let mut pair = Pair::new(&provider(), &peers, false);
    pair.echo(b"a word that is secret");
    let mut detached = pair.detach();
    let state = detached.pack().unwrap().pop().unwrap();
    let shown = format!("{detached:?} {state:?}");
    assert!(
        shown.contains("LayerState { name: \"tls\", state: "),
        "{shown}"
    );
    // Lengths, numbers of descriptors and names, and no list of bytes.
    assert!(shown.len() < 400, "{shown}");
    let moved = pair.role.resume(state).unwrap();
    let shown = format!("{moved:?}");
    assert!(shown.len() < 400, "{shown}");
}
