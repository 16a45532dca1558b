//! How a connection comes to be secured, what is known of it then, and whose fault it is
//! if it does not.

use std::cell::Cell;
use std::io::{self, IoSlice, Read, Write};
use std::rc::Rc;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use bowline::endpoint::Listen as _;
use bowline::layers::{FileDescriptor, Link, ReadBuffers, Received, Socket, TcpSocket};
use bowline::policies::{Handshake, LimitHandshakes};
use bowline::testing::ManualClock;
use bowline::tls::rustls::server::WebPkiClientVerifier;
use bowline::tls::rustls::{
    AlertDescription, CertificateError, CipherSuite, ClientConfig, Connection, Error, NamedGroup,
    ProtocolVersion, RootCertStore, ServerConfig, SupportedProtocolVersion,
};
use bowline::tls::{
    Certificates, TicketKey, Tickets, Tls, TlsClient, TlsError, TlsServer, TlsTransport,
    client_config_builder, server_config_builder,
};
use bowline::{
    Address, CloseReason, Context, Handle, Protocol, Reactor, Tcp, TcpStream, Transport,
    TransportHandle, Transports,
};

use crate::harness::{
    BOTH, Buffers, IDENTITY, Kind, ONLY_12, Peer, Raw, Script, TlsTcp, accepting, certified,
    client, client_config, connecting, over_every_layer, provider, roots, server, server_config,
};
use crate::support::{DEADLINE, DescriptorLedger, Event, Record, run_until, run_until_quiet};

over_every_layer!(
    a_handshake_that_takes_too_long_ends,
    a_peer_that_ends_in_the_handshake_is_told_of,
    what_is_no_record_ends_the_handshake_at_its_first_byte,
    a_handshake_in_single_bytes_is_one,
    what_is_written_at_once_leaves_before_the_end,
    what_comes_with_the_last_of_the_handshake_is_delivered,
);

const ONLY_13: &[&SupportedProtocolVersion] = &[&bowline::tls::rustls::version::TLS13];

/// Our end of a connection that has yet to be secured, and its peer.
struct Half {
    reactor: Reactor,
    clock: ManualClock,
    record: Record,
    peer: Peer,
    peers_error: Option<String>,
    /// The reason, as it is.
    reason: Rc<std::cell::RefCell<Option<TlsError>>>,
    _directory: Option<tempfile::TempDir>,
    _ledger: DescriptorLedger,
}

impl Half {
    fn new(kind: Kind, script: Script) -> Self {
        Self::with(kind, script, server(), client())
    }

    fn with(kind: Kind, script: Script, server: TlsServer, client: TlsClient) -> Self {
        let ledger = DescriptorLedger::open();
        let clock = ManualClock::new();
        let mut reactor = Reactor::with_clock(clock.clone()).unwrap();
        let record = script.record();
        let reason = Rc::new(std::cell::RefCell::new(None));
        let told = Rc::clone(&reason);
        let script = script.lost(move |_, reason| {
            told.replace(TlsError::of(reason).cloned());
        });
        let (raw, directory) =
            kind.connect_raw(&mut reactor, Buffers::Default, script, server, client);
        run_until_quiet(&mut reactor);
        Self {
            reactor,
            clock,
            record,
            peer: Peer::new(raw),
            peers_error: None,
            reason,
            _directory: directory,
            _ledger: ledger,
        }
    }

    fn lost(&self) -> String {
        let lost = std::cell::RefCell::new(None);
        self.record.count(|event| {
            if let Event::Lost(reason) = event {
                lost.replace(Some(reason.clone()));
            }
            false
        });
        lost.take().expect("it is lost")
    }

    fn reason(&self) -> TlsError {
        self.reason.borrow().clone().expect("TLS has failed")
    }

    /// Turns both until ours is lost without having been made.
    #[track_caller]
    fn run_until_lost(&mut self) {
        let Self {
            reactor,
            record,
            peer,
            peers_error,
            ..
        } = self;
        run_until(reactor, |_| {
            if peer.tls.is_some()
                && let Err(error) = peer.step()
            {
                peers_error.get_or_insert(error.to_string());
            }
            record.is_lost()
        });
        run_until_quiet(&mut self.reactor);
        let summary = self.record.summary();
        assert_eq!(summary.len(), 1, "{summary:?}");
    }

    /// What the peer's handshake has come to.
    fn peers_error(&mut self) -> String {
        let Self {
            reactor,
            peer,
            peers_error,
            ..
        } = self;
        run_until(reactor, |_| {
            if peers_error.is_none()
                && let Err(error) = peer.step()
            {
                *peers_error = Some(error.to_string());
            }
            peers_error.is_some()
        });
        peers_error.take().expect("it has failed")
    }
}

fn a_handshake_that_takes_too_long_ends(kind: Kind) {
    let time = Duration::from_secs(20);
    let server = server().handshake_timeout(time);
    let client = client().handshake_timeout(time);
    let mut half = Half::with(kind, Script::new(), server, client);
    half.clock.advance(time - Duration::from_millis(1));
    run_until_quiet(&mut half.reactor);
    assert!(!half.record.is_lost());
    half.clock.advance(Duration::from_millis(1));
    half.run_until_lost();
    assert!(matches!(half.reason(), TlsError::HandshakeTimedOut));
    assert!(half.lost().ends_with("the handshake took too long"));
}

fn a_peer_that_ends_in_the_handshake_is_told_of(kind: Kind) {
    for has_begun in [false, true] {
        let mut half = Half::new(kind, Script::new());
        if has_begun {
            // Half a record.
            half.peer.raw.write_all(&[22, 3, 1, 0]).unwrap();
            run_until_quiet(&mut half.reactor);
        }
        half.peer = Peer::new(Raw::Unix(crate::support::socketpair().0));
        half.run_until_lost();
        assert!(half.lost().starts_with("connection lost"));
    }
}

/// And does not wait for more: whoever does not speak TLS may say no more.
fn what_is_no_record_ends_the_handshake_at_its_first_byte(kind: Kind) {
    for (first, wanted) in [(&b"G"[..], true), (&[22, 2], true), (&[23, 3, 3], false)] {
        let mut half = Half::new(kind, Script::new());
        half.peer.raw.write_all(first).unwrap();
        run_until_quiet(&mut half.reactor);
        assert_eq!(half.record.is_lost(), wanted, "{first:?}");
        if wanted {
            half.run_until_lost();
            assert!(matches!(half.reason(), TlsError::NotTls));
        }
    }
}

fn peers_side(kind: Kind) -> Connection {
    let versions = match kind {
        Kind::AcceptedTcp12 | Kind::ConnectingTcp12 => ONLY_12,
        _ => BOTH,
    };
    match kind.is_client() {
        true => accepting(server_config(versions)),
        false => connecting(client_config(versions)),
    }
}

fn a_handshake_in_single_bytes_is_one(kind: Kind) {
    let mut half = Half::new(kind, Script::new());
    let mut tls = peers_side(kind);
    let mut buffer = [0; 16_384];
    while tls.is_handshaking() || half.record.summary().is_empty() {
        let mut flight = Vec::new();
        while tls.wants_write() {
            tls.write_tls(&mut flight).unwrap();
        }
        for byte in flight {
            half.peer.raw.write_all(&[byte]).unwrap();
            half.reactor.turn(Some(Duration::ZERO));
        }
        run_until_quiet(&mut half.reactor);
        if let Ok(count) = half.peer.raw.read(&mut buffer) {
            let mut rest = &buffer[..count];
            while !rest.is_empty() {
                tls.read_tls(&mut rest).unwrap();
                tls.process_new_packets().unwrap();
            }
        }
    }
    assert_eq!(half.record.summary(), ["made"]);
}

fn what_is_written_at_once_leaves_before_the_end(kind: Kind) {
    let script = Script::new().made(|cx| {
        let _ = cx.transport.write(b"first");
        cx.transport.lose_connection();
    });
    let mut half = Half::new(kind, script);
    half.peer.secure(peers_side(kind));
    let record = half.record.clone();
    half.peer.shake_hands(&mut half.reactor, &record);
    run_until(&mut half.reactor, |_| record.is_lost());
    let mut received = Vec::new();
    let mut buffer = [0; 64];
    loop {
        match half.peer.read(&mut buffer).unwrap() {
            0 => break,
            count => received.extend_from_slice(&buffer[..count]),
        }
    }
    assert_eq!(received, b"first");
}

/// In the same read, but after `connection_made`.
fn what_comes_with_the_last_of_the_handshake_is_delivered(kind: Kind) {
    if kind.is_client() && !matches!(kind, Kind::ConnectingTcp12) {
        // A server of TLS 1.3 has its last word before us.
        return;
    }
    let mut half = Half::new(
        kind,
        Script::new().made(|cx| cx.transport.pause_producing()),
    );
    let mut tls = peers_side(kind);
    let mut buffer = [0; 16_384];
    loop {
        let mut flight = Vec::new();
        let _ = tls.writer().write(b"");
        while tls.wants_write() {
            tls.write_tls(&mut flight).unwrap();
        }
        if !tls.is_handshaking() {
            tls.writer().write_all(b"with it").unwrap();
            tls.send_close_notify();
            while tls.wants_write() {
                tls.write_tls(&mut flight).unwrap();
            }
        }
        half.peer.raw.write_all(&flight).unwrap();
        run_until_quiet(&mut half.reactor);
        if !tls.is_handshaking() {
            break;
        }
        let count = half.peer.raw.read(&mut buffer).unwrap();
        let mut rest = &buffer[..count];
        while !rest.is_empty() {
            tls.read_tls(&mut rest).unwrap();
            tls.process_new_packets().unwrap();
        }
    }
    let record = half.record.clone();
    run_until(&mut half.reactor, |_| !record.summary().is_empty());
    run_until_quiet(&mut half.reactor);
    assert_eq!(record.summary(), ["made"], "it is paused");
    half.reactor
        .get(record.handle(0))
        .unwrap()
        .resume_producing();
    run_until(&mut half.reactor, |_| record.is_lost());
    assert_eq!(record.data(), b"with it");
}

/// Our end as what it is.
fn secured(handle: TransportHandle) -> Handle<TlsTcp> {
    Handle::new(handle.token(), |facet| facet.downcast_mut::<TlsTcp>())
}

/// Shakes hands over TCP.
fn shaken(server: TlsServer, client: TlsClient, kind: Kind, peer: Connection) -> Half {
    let mut half = Half::with(kind, Script::new(), server, client);
    half.peer.secure(peer);
    let record = half.record.clone();
    half.peer.shake_hands(&mut half.reactor, &record);
    half
}

fn with_protocols(mut config: ServerConfig, protocols: &[&str]) -> ServerConfig {
    config.alpn_protocols = protocols.iter().map(|it| it.as_bytes().to_vec()).collect();
    config
}

fn offering(mut config: ClientConfig, protocols: &[&str]) -> ClientConfig {
    config.alpn_protocols = protocols.iter().map(|it| it.as_bytes().to_vec()).collect();
    config
}

#[test]
fn what_was_agreed_on_can_be_asked_of_a_server() {
    for (versions, version) in [
        (ONLY_13, ProtocolVersion::TLSv1_3),
        (ONLY_12, ProtocolVersion::TLSv1_2),
    ] {
        let server = TlsServer::new(with_protocols(server_config(BOTH), &["h2", "http/1.1"]));
        let peer = connecting(offering(client_config(versions), &["http/1.1"]));
        let mut half = shaken(server, client(), Kind::AcceptedTcp, peer);
        let handle = secured(half.record.handle(0));
        let transport = half.reactor.get(handle).unwrap();
        let tls = transport.tls().expect("it has TLS");
        assert!(tls.is_established() && !tls.is_plain() && !tls.is_resumed());
        assert_eq!(tls.version(), Some(version));
        assert_eq!(tls.alpn_protocol(), Some(&b"http/1.1"[..]));
        assert_eq!(tls.server_name(), Some("localhost"));
        assert!(tls.peer_certificates().is_empty());
        let peer = half.peer.tls.as_ref().unwrap();
        let suite = peer.negotiated_cipher_suite().unwrap().suite();
        assert_eq!(tls.cipher_suite(), Some(suite));
        assert!(matches!(
            tls.key_exchange_group(),
            Some(NamedGroup::X25519 | NamedGroup::secp256r1 | NamedGroup::X25519MLKEM768)
        ));
        let seen = format!("{tls:?}");
        let wanted = format!(
            "TlsState {{ stage: \"open\", version: Some({version:?}), cipher_suite: \
            Some({suite:?}), incoming: 0, outgoing: 0, .. }}"
        );
        assert_eq!(seen, wanted, "nothing of the keys");
    }
}

#[test]
fn what_was_agreed_on_can_be_asked_of_a_client() {
    for versions in [ONLY_13, ONLY_12] {
        let config = offering(client_config(versions), &["smtp"]);
        let client = TlsClient::new(config, "localhost").unwrap();
        let peer = accepting(with_protocols(server_config(BOTH), &["smtp"]));
        let mut half = shaken(server(), client, Kind::ConnectingTcp, peer);
        let handle = secured(half.record.handle(0));
        let tls = half.reactor.get(handle).unwrap().tls().unwrap();
        assert_eq!(tls.peer_certificates(), IDENTITY.chain);
        assert_eq!(tls.server_name(), Some("localhost"));
        assert_eq!(tls.alpn_protocol(), Some(&b"smtp"[..]));
    }
}

/// On a connection that has no layer for it nothing is known.
#[test]
fn a_connection_without_tls_says_so() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (ours, _theirs) = std::net::TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| {
            let theirs = std::net::TcpStream::connect(listener.local_addr()?)?;
            Ok((listener.accept()?.0, theirs))
        })
        .unwrap();
    let handle = reactor.adopt(Tcp, ours.into(), Script::new()).unwrap();
    let handle = Handle::new(handle.token(), |it| it.downcast_mut::<TcpStream>());
    let transport = reactor.get(handle).unwrap();
    assert!(transport.tls().is_none());
    let error = transport.start_tls(&server(), b"").unwrap_err();
    assert!(error.to_string().ends_with("has no layer for it"));
}

/// The peer is told of it before the end.
#[test]
fn a_certificate_that_we_do_not_trust_is_the_peers_fault() {
    for versions in [ONLY_13, ONLY_12] {
        let mut none = RootCertStore::empty();
        let other = {
            let key = rcgen::KeyPair::generate().unwrap();
            rcgen::CertificateParams::new(Vec::new())
                .unwrap()
                .self_signed(&key)
                .unwrap()
        };
        none.add(other.der().clone()).unwrap();
        let config = client_config_builder()
            .with_root_certificates(none)
            .with_no_client_auth();
        let client = TlsClient::new(config, "localhost").unwrap();
        let mut half = Half::with(Kind::ConnectingTcp, Script::new(), server(), client);
        half.peer.secure(accepting(server_config(versions)));
        half.run_until_lost();
        assert!(
            matches!(
                half.reason(),
                TlsError::Certificate(Error::InvalidCertificate(CertificateError::UnknownIssuer))
            ),
            "{:?}",
            half.reason()
        );
        let told = half.peers_error();
        assert!(told.contains("UnknownCA"), "{told}");
    }
}

#[test]
fn a_certificate_of_another_name_is_the_peers_fault() {
    let client = client().to("elsewhere.example").unwrap();
    let mut half = Half::with(Kind::ConnectingTcp, Script::new(), server(), client);
    half.peer.secure(accepting(server_config(BOTH)));
    half.run_until_lost();
    assert!(matches!(half.reason(), TlsError::Certificate(_)));
}

#[test]
fn a_peer_that_does_not_trust_us_has_refused_us() {
    let mut half = Half::with(Kind::AcceptedTcp, Script::new(), server(), client());
    let mut config = client_config(BOTH);
    config = {
        let mut roots = RootCertStore::empty();
        let (chain, _) = certified(&IDENTITY.authority, &["x"]);
        roots.add(chain[0].clone()).unwrap();
        drop(config);
        client_config_builder()
            .with_root_certificates(roots)
            .with_no_client_auth()
    };
    half.peer.secure(connecting(config));
    half.run_until_lost();
    assert!(matches!(
        half.reason(),
        TlsError::Refused(AlertDescription::UnknownCA)
    ));
}

#[test]
fn a_peer_without_a_protocol_of_ours_is_told_so() {
    let server = TlsServer::new(with_protocols(server_config(BOTH), &["h2"]));
    let mut half = Half::with(Kind::AcceptedTcp, Script::new(), server, client());
    let config = offering(client_config(BOTH), &["gopher"]);
    half.peer.secure(connecting(config));
    half.run_until_lost();
    assert!(matches!(
        half.reason(),
        TlsError::Peer(Error::NoApplicationProtocol)
    ));
    let told = half.peers_error();
    assert!(told.contains("NoApplicationProtocol"), "{told}");
}

#[test]
fn a_server_without_a_certificate_of_that_name_is_at_fault_itself() {
    let certificates = Certificates::only_named();
    let server = TlsServer::with_certificates(&certificates);
    let mut half = Half::with(Kind::AcceptedTcp, Script::new(), server, client());
    half.peer.secure(connecting(client_config(BOTH)));
    half.run_until_lost();
    assert!(matches!(half.reason(), TlsError::Configuration(_)));
}

/// Of the certificate that a client has asked for by name, exactly or as one of many.
#[test]
fn certificates_are_found_by_name_and_replaced_while_it_serves() {
    let new = |names: &[&str]| certified(&IDENTITY.authority, names);
    let (chain, key) = new(&["localhost"]);
    let certificates = Certificates::new(chain.clone(), key).unwrap();
    let server = TlsServer::with_certificates(&certificates);
    let shown = |name: &'static str| {
        let client = client().to(name).unwrap();
        drop(client);
        let config = Arc::new(client_config(BOTH));
        let name = bowline::tls::rustls::pki_types::ServerName::try_from(name).unwrap();
        let peer = bowline::tls::rustls::ClientConnection::new(config, name).unwrap();
        let mut half = Half::with(
            Kind::AcceptedTcp,
            Script::new(),
            server.clone(),
            crate::harness::client(),
        );
        half.peer.secure(peer.into());
        let record = half.record.clone();
        half.peer.shake_hands(&mut half.reactor, &record);
        half.peer.tls.unwrap().peer_certificates().unwrap()[0].clone()
    };
    assert_eq!(shown("localhost"), chain[0]);
    let (exact, key) = new(&["a.example.org"]);
    certificates
        .set_named("A.example.org", exact.clone(), key)
        .unwrap();
    let (wild, key) = new(&["*.example.org"]);
    certificates
        .set_named("*.example.org", wild.clone(), key)
        .unwrap();
    assert_eq!(shown("a.example.org"), exact[0]);
    assert_eq!(shown("b.example.org"), wild[0]);
    assert!(certificates.remove_named("a.example.org"));
    assert!(!certificates.remove_named("a.example.org"));
    assert_eq!(shown("a.example.org"), wild[0]);
    let (newer, key) = new(&["localhost"]);
    let (_, others_key) = new(&["localhost"]);
    let refused = certificates.set(newer.clone(), others_key).unwrap_err();
    assert!(
        refused
            .to_string()
            .starts_with("cannot use the certificate")
    );
    assert_eq!(shown("localhost"), chain[0], "what was there stays");
    certificates.set(newer.clone(), key).unwrap();
    assert_eq!(shown("localhost"), newer[0]);
}

#[test]
fn certificates_come_from_files() {
    let directory = tempfile::tempdir().unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let parameters = rcgen::CertificateParams::new(vec!["localhost".into()]).unwrap();
    let certificate = parameters.signed_by(&key, &IDENTITY.authority).unwrap();
    let (chain_file, key_file) = (directory.path().join("c"), directory.path().join("k"));
    let both = [certificate.pem(), IDENTITY.authority.pem()].concat();
    std::fs::write(&chain_file, both).unwrap();
    std::fs::write(&key_file, key.serialize_pem()).unwrap();
    let server = TlsServer::from_pem_files(&chain_file, &key_file).unwrap();
    let peer = connecting(client_config(BOTH));
    let half = shaken(server, client(), Kind::AcceptedTcp, peer);
    assert_eq!(half.peer.tls.unwrap().peer_certificates().unwrap().len(), 2);
    // In the wrong order, and what is not there.
    let wrong = Certificates::from_pem_files(&key_file, &chain_file).unwrap_err();
    assert!(
        wrong.to_string().contains("no certificate in it"),
        "{wrong}"
    );
    let missing = Certificates::from_pem_files(directory.path().join("x"), &key_file);
    assert!(missing.unwrap_err().to_string().contains("cannot load"));
}

fn asking_for_certificates() -> ServerConfig {
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots()), provider())
        .build()
        .unwrap();
    let mut config = server_config_builder()
        .with_client_cert_verifier(verifier)
        .with_single_cert(IDENTITY.chain.clone(), IDENTITY.key.clone_key())
        .unwrap();
    config.send_tls13_tickets = 0;
    config
}

#[test]
fn a_client_shows_its_certificate() {
    for versions in [ONLY_13, ONLY_12] {
        let (chain, key) = certified(&IDENTITY.authority, &["us"]);
        let config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(versions)
            .unwrap()
            .with_root_certificates(roots())
            .with_client_auth_cert(chain.clone(), key)
            .unwrap();
        let client = TlsClient::new(config.clone(), "localhost").unwrap();
        let peer = accepting(asking_for_certificates());
        let half = shaken(server(), client, Kind::ConnectingTcp, peer);
        let seen = half.peer.tls.as_ref().unwrap().peer_certificates();
        assert_eq!(seen.unwrap(), chain, "as theirs sees it");
        drop(half);
        let server = TlsServer::new(asking_for_certificates());
        let mut half = shaken(
            server,
            crate::harness::client(),
            Kind::AcceptedTcp,
            connecting(config),
        );
        let handle = secured(half.record.handle(0));
        let tls = half.reactor.get(handle).unwrap().tls().unwrap();
        assert_eq!(tls.peer_certificates(), chain, "as ours sees it");
    }
}

#[test]
fn a_client_without_a_certificate_is_refused_where_one_is_wanted() {
    for versions in [ONLY_13, ONLY_12] {
        let server = TlsServer::new(asking_for_certificates());
        let mut half = Half::with(Kind::AcceptedTcp, Script::new(), server, client());
        half.peer.secure(connecting(client_config(versions)));
        half.run_until_lost();
        assert!(matches!(
            half.reason(),
            TlsError::Certificate(Error::NoCertificatesPresented)
        ));
    }
}

/// One worker gives the ticket, another takes it.
#[test]
fn sessions_go_on_at_whoever_has_the_keys_of_the_tickets() {
    for versions in [ONLY_13, ONLY_12] {
        let key = TicketKey::generate().unwrap();
        let other = TicketKey::generate().unwrap();
        let worker = |key: &TicketKey| {
            let mut config = server_config(versions);
            config.send_tls13_tickets = 2;
            config.ticketer = Tickets::new(key.clone()).ticketer();
            TlsServer::new(config)
        };
        let config = client_config(versions);
        let visit = |server: TlsServer| {
            let mut half = shaken(
                server,
                client(),
                Kind::AcceptedTcp,
                connecting(config.clone()),
            );
            // Its tickets come behind the handshake.
            run_until_quiet(&mut half.reactor);
            let _ = half.peer.read(&mut [0]);
            let handle = secured(half.record.handle(0));
            let tls = half.reactor.get(handle).unwrap().tls().unwrap();
            tls.is_resumed()
        };
        assert!(!visit(worker(&key)), "nothing to go on with");
        assert!(visit(worker(&key)), "another worker with the same key");
        assert!(!visit(worker(&other)), "one with another");
    }
}

/// What its peer gives, in TLS 1.3 behind the handshake, and what it does with that.
#[test]
fn our_client_goes_on_with_its_sessions() {
    for versions in [ONLY_13, ONLY_12] {
        let ours = TlsClient::new(client_config(versions), "localhost").unwrap();
        let mut config = server_config(versions);
        config.send_tls13_tickets = 1;
        let config = Arc::new(config);
        let mut resumed = Vec::new();
        for _ in 0..3 {
            let peer = bowline::tls::rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
            let mut half = shaken(server(), ours.clone(), Kind::ConnectingTcp, peer.into());
            half.peer.send(b"here");
            let record = half.record.clone();
            run_until(&mut half.reactor, |_| record.data() == b"here");
            let handle = secured(half.record.handle(0));
            resumed.push(
                half.reactor
                    .get(handle)
                    .unwrap()
                    .tls()
                    .unwrap()
                    .is_resumed(),
            );
        }
        assert_eq!(resumed, [false, true, true], "{versions:?}");
    }
}

/// Waits in its handshake until it is secured.
struct Limited(Handshake);

impl<T: Transport> Protocol<T> for Limited {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        self.0.complete(cx.reactor);
    }

    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}
}

#[test]
fn so_many_may_be_in_their_handshake() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let factory = LimitHandshakes::new(|_: &Address, handshake| Limited(handshake)).most(2);
    let count = factory.count();
    let here = Tcp::at(([127, 0, 0, 1], 0).into()).layer(server());
    let listener = reactor.listen(here, factory).unwrap();
    let address = reactor.get(listener).unwrap().address().as_inet().unwrap();
    let mut peers = Vec::new();
    for _ in 0..3 {
        let stream = std::net::TcpStream::connect(address).unwrap();
        stream.set_nonblocking(true).unwrap();
        let mut peer = Peer::new(Raw::Tcp(stream));
        peer.secure(connecting(client_config(BOTH)));
        peers.push(peer);
    }
    run_until(&mut reactor, |_| count.open() == 2);
    run_until_quiet(&mut reactor);
    assert_eq!(count.open(), 2, "the third waits in the kernel");
    for peer in &mut peers {
        run_until(&mut reactor, |_| !peer.step().unwrap());
    }
    run_until(&mut reactor, |_| count.open() == 0);
}

#[test]
fn errors_name_their_cause() {
    let reason = CloseReason::Lost(TlsError::CutOff.into());
    assert!(matches!(TlsError::of(&reason), Some(TlsError::CutOff)));
    assert!(TlsError::of(&CloseReason::Done).is_none());
    assert_eq!(
        reason.to_string(),
        "connection lost: TLS: the peer's stream was cut off"
    );
    let suite = format!("{:?}", CipherSuite::TLS13_AES_128_GCM_SHA256);
    assert!(suite.contains("AES_128"));
}

/// Between TLS and the socket: counts what leaves, and how often.
struct Counted {
    socket: TcpSocket,
    sends: Rc<Cell<usize>>,
}

impl FileDescriptor for Counted {
    fn write_some_data(&mut self, link: &mut Link, data: &[u8]) -> io::Result<usize> {
        self.sends.set(self.sends.get() + 1);
        self.socket.write_some_data(link, data)
    }

    fn write_some_pieces(&mut self, link: &mut Link, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        self.sends.set(self.sends.get() + 1);
        self.socket.write_some_pieces(link, pieces)
    }

    fn do_read(
        &mut self,
        link: &mut Link,
        buffers: &mut ReadBuffers,
        limit: usize,
    ) -> io::Result<Received> {
        self.socket.do_read(link, buffers, limit)
    }

    fn below(&self) -> Option<&dyn FileDescriptor> {
        Some(&self.socket)
    }

    fn below_mut(&mut self) -> Option<&mut dyn FileDescriptor> {
        Some(&mut self.socket)
    }

    fn socket(&self) -> &dyn Socket {
        self.socket.socket()
    }

    fn socket_mut(&mut self) -> &mut dyn Socket {
        self.socket.socket_mut()
    }
}

struct Answers;

impl<T: Transport> Protocol<T> for Answers {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.write(data);
    }
}

/// The tickets that end a handshake of TLS 1.3 leave with the first answer.
#[test]
fn a_handshake_and_an_answer_are_two_sends() {
    let _ledger = DescriptorLedger::open();
    for (versions, resumes) in [(BOTH, true), (BOTH, false), (ONLY_12, true)] {
        let mut config = server_config(versions);
        config.send_tls13_tickets = if resumes { 2 } else { 0 };
        let mut reactor = Reactor::new().unwrap();
        let sends = Rc::<Cell<usize>>::default();
        let counted = Rc::clone(&sends);
        let here = Tcp::at(([127, 0, 0, 1], 0).into());
        let server = TlsServer::new(config);
        let here = here.layer(move |socket: TcpSocket, _| {
            let sends = Rc::clone(&counted);
            Tls::new(Counted { socket, sends }, &server)
        });
        let listener = reactor.listen(here, |_: &Address| Answers).unwrap();
        let address = reactor.get(listener).unwrap().address().as_inet().unwrap();
        let peer = thread::spawn(move || {
            let mut socket = std::net::TcpStream::connect(address).unwrap();
            socket.set_read_timeout(Some(DEADLINE)).unwrap();
            let mut tls = connecting(client_config(BOTH));
            // With the last of the handshake.
            tls.writer().write_all(b"question").unwrap();
            tls.complete_io(&mut socket).unwrap();
            let mut answer = [0; 8];
            while tls.reader().read(&mut answer).is_err() {
                tls.complete_io(&mut socket).unwrap();
            }
            answer
        });
        run_until(&mut reactor, |_| peer.is_finished());
        assert_eq!(&peer.join().unwrap(), b"question");
        let is_13 = versions.len() > 1;
        assert_eq!(sends.get(), if is_13 { 2 } else { 3 }, "{resumes}");
    }
}
