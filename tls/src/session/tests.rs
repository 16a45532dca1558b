//! Sessions against rustls as it comes, whose record layer is not ours: with each
//! provider that is built in, in each suite.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::sync::Arc;

use proptest::prelude::*;
use rustls::client::UnbufferedClientConnection;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::server::UnbufferedServerConnection;
use rustls::{
    ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig, ServerConnection,
};

use super::*;
use crate::handshake::Handshake;
use crate::outgoing::Outgoing;
use crate::record::{self, HEADER};
use crate::secret::keeping;

fn providers() -> Vec<CryptoProvider> {
    vec![
        #[cfg(feature = "ring")]
        rustls::crypto::ring::default_provider(),
        #[cfg(feature = "aws-lc-rs")]
        rustls::crypto::aws_lc_rs::default_provider(),
    ]
}

/// A provider with one of its suites, for each.
fn single_suites() -> Vec<Arc<CryptoProvider>> {
    let mut single = Vec::new();
    for provider in providers() {
        for suite in &provider.cipher_suites {
            // The keys of the test are of that kind.
            if !format!("{suite:?}").contains("ECDHE_RSA") {
                let cipher_suites = vec![*suite];
                single.push(Arc::new(CryptoProvider {
                    cipher_suites,
                    ..provider.clone()
                }));
            }
        }
    }
    assert!(single.len() >= 6, "three suites of each version");
    single
}

fn configs(provider: &Arc<CryptoProvider>) -> (ServerConfig, ClientConfig) {
    let certified = rcgen::generate_simple_self_signed(vec!["localhost".into()]).unwrap();
    let chain = vec![certified.cert.der().clone()];
    let key = PrivateKeyDer::try_from(certified.signing_key.serialize_der()).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(chain[0].clone()).unwrap();
    let version = [provider.cipher_suites[0].version()];
    let mut server = ServerConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&version)
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    let mut client = ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&version)
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    (server.key_log, client.key_log) = (keeping(server.key_log), keeping(client.key_log));
    (
        server.enable_secret_extraction,
        client.enable_secret_extraction,
    ) = (true, true);
    (server, client)
}

/// Ours and a peer, secured.
struct Pair {
    ours: Session,
    peer: Connection,
}

impl Pair {
    fn new(provider: &Arc<CryptoProvider>, is_client: bool) -> Self {
        let (server, client) = configs(provider);
        let (server, client) = (Arc::new(server), Arc::new(client));
        let name = ServerName::try_from("localhost").unwrap();
        let (mut ours, mut peer) = match is_client {
            true => (
                Handshake::client(
                    UnbufferedClientConnection::new(client, name).unwrap(),
                    "localhost".into(),
                ),
                Connection::from(ServerConnection::new(server).unwrap()),
            ),
            false => (
                Handshake::server(UnbufferedServerConnection::new(server).unwrap()),
                Connection::from(ClientConnection::new(client, name).unwrap()),
            ),
        };
        let mut out = Outgoing::default();
        let mut is_done = ours.advance(&[], &mut out).unwrap();
        let mut behind = Vec::new();
        while !is_done || peer.is_handshaking() || !out.is_empty() {
            feed(&mut peer, &all_of(&mut out));
            let bytes = taken(&mut peer);
            let mut rest = &bytes[..];
            while let Some(header) = record::next(rest).unwrap() {
                let (one, others) = rest.split_at(header.whole());
                match is_done {
                    // Tickets, for the session.
                    true => behind.push(one.to_vec()),
                    false => is_done = ours.advance(one, &mut out).unwrap(),
                }
                rest = others;
            }
        }
        let (ours, agreed) = ours.finish(true).unwrap();
        assert_eq!(agreed.suite, provider.cipher_suites[0]);
        let mut pair = Self { ours, peer };
        for record in behind {
            assert!(pair.open(&record).unwrap().is_empty());
        }
        pair
    }

    /// What ours makes of what the peer has sealed.
    fn open(&mut self, sealed: &[u8]) -> Result<Vec<u8>, Failure> {
        let mut data = Vec::new();
        let mut rest = sealed.to_vec();
        while let Some(header) = record::next(&rest).map_err(Failure::of_framing)? {
            let behind = rest.split_off(header.whole());
            let body = &mut rest[HEADER..];
            if let Opened::Data(place) = self.ours.open(header, body)? {
                data.extend_from_slice(&body[place]);
            }
            rest = behind;
        }
        Ok(data)
    }

    /// Has ours be in other hands.
    fn move_on(&mut self) {
        let bare = fuzzing::session(self.ours.suite, false);
        let session = std::mem::replace(&mut self.ours, bare);
        self.ours = fuzzing::moved(session.suite, session);
    }

    fn seal(&mut self, data: &[u8]) -> Vec<u8> {
        let mut sealed = self.ours.before_data(1).unwrap().unwrap_or_default();
        let record = self.ours.seal_data(OutboundChunks::Single(data));
        sealed.extend(record.unwrap());
        sealed
    }

    /// Has the peer get it.
    fn deliver(&mut self, data: &[u8]) {
        let sealed = self.seal(data);
        feed(&mut self.peer, &sealed);
        let mut received = vec![0; data.len()];
        self.peer.reader().read_exact(&mut received).unwrap();
        assert!(received == data);
    }

    fn peer_seals(&mut self, data: &[u8]) -> Vec<u8> {
        self.peer.writer().write_all(data).unwrap();
        taken(&mut self.peer)
    }
}

fn all_of(out: &mut Outgoing) -> Vec<u8> {
    let mut all = Vec::new();
    while !out.is_empty() {
        let offered = out.offer::<()>(|pieces| {
            let before = all.len();
            pieces.iter().for_each(|piece| all.extend_from_slice(piece));
            Ok(all.len() - before)
        });
        offered.unwrap();
    }
    all
}

fn feed(peer: &mut Connection, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        peer.read_tls(&mut bytes).unwrap();
        peer.process_new_packets().unwrap();
    }
}

fn taken(peer: &mut Connection) -> Vec<u8> {
    let mut bytes = Vec::new();
    while peer.wants_write() {
        peer.write_tls(&mut bytes).unwrap();
    }
    bytes
}

fn is_peers(failure: Failure, wanted: &Error) -> bool {
    matches!(failure.error, TlsError::Peer(error) if error == *wanted)
}

/// Far more than a few: some providers take the number that they begin with for 0, and
/// refuse others only later.
#[test]
fn records_go_both_ways_in_each_suite_of_each_provider() {
    for provider in single_suites() {
        for is_client in [false, true] {
            let mut pair = Pair::new(&provider, is_client);
            for number in 0..200 {
                let data = vec![number as u8; number * number % 16_385];
                let sealed = pair.peer_seals(&data);
                assert!(pair.open(&sealed).unwrap() == data);
                if !data.is_empty() {
                    pair.deliver(&data);
                }
            }
            pair.deliver(&vec![7; MOST_PLAIN]);
        }
    }
}

#[test]
fn keys_are_updated_by_either_side() {
    for provider in single_suites() {
        if provider.cipher_suites[0].tls13().is_none() {
            continue;
        }
        for is_client in [false, true] {
            let mut pair = Pair::new(&provider, is_client);
            for round in 0..50 {
                pair.peer.refresh_traffic_keys().unwrap();
                let sealed = pair.peer_seals(b"under new keys");
                assert_eq!(pair.open(&sealed).unwrap(), b"under new keys");
                assert!(pair.ours.is_update_owed(), "round {round}");
                // The answer comes with the data.
                pair.deliver(b"under ours");
                assert!(!pair.ours.is_update_owed());
                // And one that ours finds is due.
                pair.ours.sealer.most = 0;
                pair.deliver(b"again");
                pair.ours.sealer.most = u64::MAX;
            }
        }
    }
}

/// In TLS 1.2, which has no others.
#[test]
fn nothing_is_sealed_by_keys_that_are_used_up() {
    for provider in single_suites() {
        let is_13 = provider.cipher_suites[0].tls13().is_some();
        let mut pair = Pair::new(&provider, false);
        pair.ours.sealer.most = pair.ours.sealer.next + 10;
        for _ in 0..9 {
            pair.deliver(b"data");
        }
        assert_eq!(pair.ours.sealer.next + 1, pair.ours.sealer.most);
        match is_13 {
            true => {
                pair.deliver(b"under new keys");
                assert_eq!(pair.ours.sealer.next, 1);
            }
            false => {
                let refused = pair.ours.before_data(1).unwrap_err();
                assert!(matches!(refused, TlsError::KeysUsedUp));
                // A goodbye is still possible.
                let goodbye = pair.ours.seal_alert(AlertDescription::CloseNotify);
                feed(&mut pair.peer, &goodbye.unwrap());
                assert_eq!(pair.peer.reader().read(&mut [0]).unwrap(), 0);
            }
        }
    }
}

#[test]
fn the_last_numbers_are_never_reached() {
    let mut pair = Pair::new(&single_suites()[0], false);
    pair.ours.sealer.next = LAST_NUMBER;
    let refused = pair.ours.seal_alert(AlertDescription::CloseNotify);
    assert!(matches!(refused, Err(TlsError::KeysUsedUp)));
    assert_eq!(pair.ours.sealer.next, LAST_NUMBER);
}

#[test]
fn no_number_seals_twice() {
    for provider in single_suites() {
        let mut pair = Pair::new(&provider, false);
        // What is sealed twice under a number is the same, byte for byte. From whatever number
        // the handshake has come to, odd or even.
        let sealed: BTreeSet<_> = (0..8).map(|_| pair.seal(b"the same")).collect();
        assert_eq!(sealed.len(), 8, "{:?}", provider.cipher_suites);
        let lengths: BTreeSet<_> = sealed.iter().map(Vec::len).collect();
        assert_eq!(lengths.len(), 1);
    }
}

/// Nothing between is skipped, nothing comes twice, nothing is moved.
#[test]
fn records_are_opened_in_their_order_only() {
    for provider in single_suites() {
        for way in ["twice", "skipped", "cut"] {
            let mut pair = Pair::new(&provider, true);
            let (first, second) = (pair.peer_seals(b"first"), pair.peer_seals(b"second"));
            let wrong = match way {
                "twice" => [&first[..], &first].concat(),
                "skipped" => second,
                _ => {
                    // A record that says that it is shorter than it is.
                    let mut cut = first[..first.len() - 1].to_vec();
                    cut[4] -= 1;
                    cut
                }
            };
            let failure = pair.open(&wrong).unwrap_err();
            assert_eq!(failure.alert, Some(AlertDescription::BadRecordMac));
            assert!(is_peers(failure, &Error::DecryptError), "{way}");
        }
    }
}

/// A record that a peer seals who does not keep to the rules.
fn sealed_by_peer(pair: &mut Pair, kind: ContentType, body: &[u8]) -> Vec<u8> {
    // Ours seals under keys that the other side of another pair opens by.
    pair.ours.seal(kind, OutboundChunks::Single(body)).unwrap()
}

/// Two of ours that speak to each other, so that either may say what it should not.
fn two_of_ours(provider: &Arc<CryptoProvider>) -> (Pair, Session) {
    let (server, client) = configs(provider);
    let name = ServerName::try_from("localhost").unwrap();
    let server = UnbufferedServerConnection::new(Arc::new(server)).unwrap();
    let client = UnbufferedClientConnection::new(Arc::new(client), name).unwrap();
    let mut server = Handshake::server(server);
    let mut client = Handshake::client(client, "localhost".into());
    let (mut to_server, mut to_client) = (Outgoing::default(), Outgoing::default());
    client.advance(&[], &mut to_server).unwrap();
    let (mut is_served, mut is_done) = (false, false);
    let mut tickets = Vec::new();
    while !is_served || !is_done {
        let mut rest = &all_of(&mut to_server)[..];
        while let Some(header) = record::next(rest).unwrap() {
            let (one, others) = rest.split_at(header.whole());
            is_served = server.advance(one, &mut to_client).unwrap();
            rest = others;
        }
        let mut rest = &all_of(&mut to_client)[..];
        while let Some(header) = record::next(rest).unwrap() {
            let (one, others) = rest.split_at(header.whole());
            match is_done {
                true => tickets.push(one.to_vec()),
                false => is_done = client.advance(one, &mut to_server).unwrap(),
            }
            rest = others;
        }
    }
    tickets.push(all_of(&mut to_client));
    let ours = server.finish(true).unwrap().0;
    let (theirs, _) = client.finish(true).unwrap();
    let mut pair = Pair::new(provider, true);
    pair.ours = theirs;
    for ticket in tickets {
        let _ = pair.open(&ticket).unwrap();
    }
    (pair, ours)
}

#[test]
fn what_a_peer_may_not_say_ends_the_session() {
    let misbehaved = |it: PeerMisbehaved| Error::PeerMisbehaved(it);
    for provider in single_suites() {
        let is_13 = provider.cipher_suites[0].tls13().is_some();
        let client_hello = [1, 0, 0, 0];
        let mut cases: Vec<(ContentType, Vec<Vec<u8>>, Option<Error>)> = vec![
            (
                ContentType::Alert,
                vec![vec![1]],
                Some(InvalidMessage::MessageTooShort.into()),
            ),
            (ContentType::Handshake, vec![vec![20, 0, 0, 0]], None),
        ];
        if is_13 {
            let update = |body: &[u8]| [&[24, 0, 0, body.len() as u8], body].concat();
            let not_valid: Error = InvalidMessage::InvalidKeyUpdate.into();
            let pending = misbehaved(PeerMisbehaved::KeyEpochWithPendingFragment);
            let kind = ContentType::Handshake;
            cases.push((kind, vec![update(&[2])], Some(not_valid.clone())));
            cases.push((kind, vec![update(&[0, 0])], Some(not_valid)));
            cases.push((kind, vec![[update(&[0]), vec![24]].concat()], Some(pending)));
            let too_long: Error = InvalidMessage::HandshakePayloadTooLarge.into();
            cases.push((kind, vec![vec![24, 1, 0, 0]], Some(too_long)));
        } else {
            let again = misbehaved(PeerMisbehaved::TooManyRenegotiationRequests);
            let twice = vec![client_hello.to_vec(); 2];
            cases.push((ContentType::Handshake, twice, Some(again)));
            let warnings = misbehaved(PeerMisbehaved::TooManyWarningAlertsReceived);
            let five = vec![vec![1, 90]; 5];
            cases.push((ContentType::Alert, five, Some(warnings)));
        }
        for (kind, bodies, wanted) in cases {
            let (mut peer, mut ours) = two_of_ours(&provider);
            let mut failure = None;
            for (number, body) in bodies.iter().enumerate() {
                let mut record = sealed_by_peer(&mut peer, kind, body);
                let header = record::next(&record).unwrap().unwrap();
                let opened = ours.open(header, &mut record[HEADER..]);
                assert!(opened.is_err() == (number + 1 == bodies.len()), "{body:?}");
                failure = opened.err();
            }
            let failure = failure.unwrap();
            assert!(failure.alert.is_some());
            match wanted {
                Some(wanted) => assert!(is_peers(failure, &wanted), "{wanted:?}"),
                None => assert!(matches!(
                    failure.error,
                    TlsError::Peer(Error::InappropriateHandshakeMessage { .. })
                )),
            }
        }
    }
}

#[test]
fn records_without_a_byte_do_not_go_on_for_ever() {
    for provider in single_suites() {
        let (mut peer, mut ours) = two_of_ours(&provider);
        for number in 0..=MOST_EMPTY {
            let mut record = sealed_by_peer(&mut peer, ContentType::ApplicationData, b"");
            let header = record::next(&record).unwrap().unwrap();
            let opened = ours.open(header, &mut record[HEADER..]);
            match number < MOST_EMPTY {
                true => assert!(matches!(opened, Ok(Opened::Data(place)) if place.is_empty())),
                false => {
                    let error = PeerMisbehaved::TooManyEmptyFragments;
                    assert!(is_peers(opened.unwrap_err(), &Error::PeerMisbehaved(error)));
                }
            }
        }
    }
}

/// A message of the handshake in pieces of every length.
#[test]
fn messages_may_come_in_pieces() {
    for provider in single_suites() {
        if provider.cipher_suites[0].tls13().is_none() {
            continue;
        }
        for cut in 1..5 {
            let (mut peer, mut ours) = two_of_ours(&provider);
            let update = [24, 0, 0, 1, 1];
            for piece in [&update[..cut], &update[cut..]] {
                assert!(!ours.is_update_owed(), "before its last byte");
                let mut record = sealed_by_peer(&mut peer, ContentType::Handshake, piece);
                let header = record::next(&record).unwrap().unwrap();
                let opened = ours.open(header, &mut record[HEADER..]).unwrap();
                assert_eq!(opened, Opened::Nothing);
            }
            assert!(ours.is_update_owed());
            // And data between them is an error.
            let (mut peer, mut ours) = two_of_ours(&provider);
            for (kind, body) in [
                (ContentType::Handshake, &update[..cut]),
                (ContentType::ApplicationData, b"between"),
            ] {
                let mut record = sealed_by_peer(&mut peer, kind, body);
                let header = record::next(&record).unwrap().unwrap();
                let opened = ours.open(header, &mut record[HEADER..]);
                assert_eq!(opened.is_err(), kind == ContentType::ApplicationData);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is changed in a record, it is not opened; and nothing panics.
    #[test]
    fn forged_records_are_refused(place in 0usize..200, bit in 0u8..8, suite in 0usize..6) {
        let provider = &single_suites()[suite];
        let mut pair = Pair::new(provider, false);
        let mut record = pair.peer_seals(&[7; 150]);
        let place = place % record.len();
        record[place] ^= 1 << bit;
        let opened = pair.open(&record);
        // The version in the header is not looked at in TLS 1.3, nor is a length that
        // has not come yet.
        let is_open = matches!(&opened, Ok(data) if data.is_empty() || place == 2);
        prop_assert!(opened.is_err() || is_open, "{place} {bit}");
    }
}

/// Whoever had the keys before cannot seal with what follows.
#[test]
fn a_session_in_other_hands_begins_with_new_keys() {
    for provider in single_suites() {
        for is_client in [false, true] {
            let mut pair = Pair::new(&provider, is_client);
            for round in 0..40 {
                pair.deliver(b"before");
                let next = pair.ours.sealer.next;
                pair.move_on();
                assert_eq!(pair.ours.sealer.next, next, "a number was left out");
                pair.deliver(b"after");
                let wanted = match pair.ours.is_13() {
                    true => 1,
                    false => next + 1,
                };
                assert_eq!(pair.ours.sealer.next, wanted, "round {round}");
                let sealed = pair.peer_seals(b"back");
                assert_eq!(pair.open(&sealed).unwrap(), b"back");
            }
        }
    }
}

/// How much was used up is counted over all hands.
#[test]
fn limits_go_along() {
    for provider in single_suites() {
        let mut pair = Pair::new(&provider, false);
        let limit = pair.ours.sealer.most;
        let left = |session: &Session| {
            (
                session.key_updates_left,
                session.warnings_left,
                session.renegotiations_left,
                session.empty_left,
            )
        };
        pair.ours.key_updates_left = 7;
        pair.ours.warnings_left = 2;
        pair.ours.renegotiations_left = 0;
        pair.ours.empty_left = 9;
        let before = left(&pair.ours);
        pair.move_on();
        assert_eq!(left(&pair.ours), before);
        assert_eq!(pair.ours.sealer.most, limit);
    }
}

proptest! {
    /// The fuzz target, for a moment.
    #[test]
    fn whatever_a_peer_says_is_taken_or_refused(
        data in proptest::collection::vec(any::<u8>(), 0..300),
    ) {
        fuzzing::records(&data);
    }
}
