//! Session tickets that every process with the same keys accepts.

use std::fmt;
use std::sync::{Arc, RwLock};

use rustls::crypto::CryptoProvider;
use rustls::crypto::cipher::{
    AeadKey, InboundOpaqueMessage, Iv, NONCE_LEN, OutboundChunks, OutboundPlainMessage,
};
use rustls::server::ProducesTickets;
use rustls::{CipherSuite, ContentType, ProtocolVersion, Tls13CipherSuite};
use zeroize::Zeroize;

use crate::config::crypto_provider;

/// The length of a [`TicketKey`] in bytes.
///
/// Feature `tls`, or `tls-aws-lc-rs`.
pub const TICKET_KEY_BYTES: usize = NAME_BYTES + KEY_BYTES;

const NAME_BYTES: usize = 16;
const KEY_BYTES: usize = 32;
const TAG_BYTES: usize = 16;

/// How long a ticket is valid by default: as in rustls.
const LIFETIME_SECONDS: u32 = 12 * 60 * 60;

/// How long the contents of a ticket may be: a session, with the client's certificates.
const MOST_BYTES: usize = 16_384;

/// How many keys are tried: the one that seals, and older ones.
const MOST_KEYS: usize = 8;

/// A key that seals session tickets. It is secret, and wiped when it is dropped.
///
/// Feature `tls`, or `tls-aws-lc-rs`.
#[derive(Clone)]
pub struct TicketKey {
    name: [u8; NAME_BYTES],
    key: [u8; KEY_BYTES],
}

impl TicketKey {
    /// Generates a new key.
    ///
    /// # Errors
    ///
    /// The system has no random bytes.
    ///
    /// # Panics
    ///
    /// As [`crypto_provider`].
    pub fn generate() -> Result<Self, rustls::Error> {
        let mut bytes = [0; TICKET_KEY_BYTES];
        crypto_provider().secure_random.fill(&mut bytes)?;
        let key = Self::from_bytes(&bytes);
        bytes.zeroize();
        Ok(key)
    }

    /// Makes a key of the bytes of one from another process. The first 16 of the 48 bytes
    /// name the key in each ticket; the others seal it.
    pub fn from_bytes(bytes: &[u8; TICKET_KEY_BYTES]) -> Self {
        let mut key = Self {
            name: [0; NAME_BYTES],
            key: [0; KEY_BYTES],
        };
        let (name, secret) = bytes.split_at(NAME_BYTES);
        key.name.copy_from_slice(name);
        key.key.copy_from_slice(secret);
        key
    }

    /// Returns the key as bytes, to send to another process in a message that nobody else
    /// can read. Whoever has it can resume the sessions of all tickets that it sealed. Of
    /// TLS 1.2 sessions, they can also read what was said.
    pub fn to_bytes(&self) -> [u8; TICKET_KEY_BYTES] {
        let mut bytes = [0; TICKET_KEY_BYTES];
        bytes[..NAME_BYTES].copy_from_slice(&self.name);
        bytes[NAME_BYTES..].copy_from_slice(&self.key);
        bytes
    }
}

impl Drop for TicketKey {
    fn drop(&mut self) {
        self.key.zeroize();
    }
}

impl fmt::Debug for TicketKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TicketKey").finish_non_exhaustive()
    }
}

/// Session tickets with keys that the program provides. A session that began at one worker
/// of a pool, or before a restart, can so be resumed at another.
///
/// It is the `ticketer` of a rustls configuration. Keys wear out: the program has to make a
/// [new one](Self::rotate) at least once in the lifetime of a ticket, and hand it to all
/// processes. A clone is cheap and shares the same keys.
///
/// # Examples
///
/// ```
/// # use bowline::tls::{
/// #     Certificates, TicketKey, Tickets, TlsServer, rustls, server_config_builder,
/// # };
/// # fn serve(certificates: &Certificates) -> Result<TlsServer, Box<dyn std::error::Error>> {
/// let key = TicketKey::generate().map_err(rustls::Error::from)?;
/// let tickets = Tickets::new(key);
/// let mut config = server_config_builder()
///     .with_no_client_auth()
///     .with_cert_resolver(certificates.resolver());
/// config.ticketer = tickets.ticketer();
/// # Ok(TlsServer::new(config))
/// # }
/// ```
///
/// Feature `tls`, or `tls-aws-lc-rs`.
#[derive(Clone)]
pub struct Tickets(Arc<Shared>);

struct Shared {
    provider: Arc<CryptoProvider>,
    suite: &'static Tls13CipherSuite,
    lifetime: u32,
    /// The first one seals.
    keys: RwLock<Vec<TicketKey>>,
}

impl Tickets {
    /// Makes tickets that `key` seals.
    ///
    /// # Panics
    ///
    /// As [`crypto_provider`], and also if that has no TLS 1.3 suite with keys of 256 bits.
    pub fn new(key: TicketKey) -> Self {
        let provider = crypto_provider();
        let suite = suite_of(&provider).expect("providers have such a suite");
        Self(Arc::new(Shared {
            provider,
            suite,
            lifetime: LIFETIME_SECONDS,
            keys: RwLock::new(vec![key]),
        }))
    }

    /// Seals with `key` from now on. Tickets that earlier keys sealed, up to seven keys,
    /// are still accepted.
    pub fn rotate(&self, key: TicketKey) {
        let keys = self.0.keys.write();
        let mut keys = keys.unwrap_or_else(std::sync::PoisonError::into_inner);
        keys.retain(|other| other.name != key.name);
        keys.insert(0, key);
        keys.truncate(MOST_KEYS);
    }

    /// Also accepts tickets that `key` has sealed, for when other processes seal with it
    /// already. Has no effect if the key is known, or if there are eight keys already.
    pub fn accept(&self, key: TicketKey) {
        let keys = self.0.keys.write();
        let mut keys = keys.unwrap_or_else(std::sync::PoisonError::into_inner);
        if keys.len() < MOST_KEYS && keys.iter().all(|other| other.name != key.name) {
            keys.push(key);
        }
    }

    /// Returns the tickets in the form that a rustls configuration takes (`ticketer`).
    pub fn ticketer(&self) -> Arc<dyn ProducesTickets> {
        Arc::clone(&self.0) as Arc<dyn ProducesTickets>
    }
}

/// Returns a suite whose keys have 256 bits, since such keys can be made of bytes.
pub(crate) fn suite_of(provider: &CryptoProvider) -> Option<&'static Tls13CipherSuite> {
    let of = |wanted| {
        let mut suites = provider.cipher_suites.iter();
        suites.find_map(|suite| suite.tls13().filter(|it| it.common.suite == wanted))
    };
    of(CipherSuite::TLS13_AES_256_GCM_SHA384)
        .or_else(|| of(CipherSuite::TLS13_CHACHA20_POLY1305_SHA256))
}

impl ProducesTickets for Shared {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        self.lifetime
    }

    /// The name of the key, a random nonce, and the body of a TLS record.
    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        if plain.len() > MOST_BYTES {
            return None;
        }
        let mut nonce = [0; NONCE_LEN];
        self.provider.secure_random.fill(&mut nonce).ok()?;
        let keys = self.keys.read().ok()?;
        let TicketKey { name, key } = keys.first()?;
        let mut sealer = self
            .suite
            .aead_alg
            .encrypter(AeadKey::from(*key), Iv::from(nonce));
        let message = OutboundPlainMessage {
            typ: ContentType::ApplicationData,
            version: ProtocolVersion::TLSv1_2,
            payload: OutboundChunks::Single(plain),
        };
        let sealed = sealer.encrypt(message, 0).ok()?;
        Some([name, &nonce[..], sealed.payload.as_ref()].concat())
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        let (name, rest) = ticket.split_at_checked(NAME_BYTES)?;
        let (nonce, sealed) = rest.split_first_chunk::<NONCE_LEN>()?;
        if !(TAG_BYTES..=MOST_BYTES + 1 + TAG_BYTES).contains(&sealed.len()) {
            return None;
        }
        let keys = self.keys.read().ok()?;
        let key = keys.iter().find(|key| key.name[..] == *name)?;
        let mut opener = self
            .suite
            .aead_alg
            .decrypter(AeadKey::from(key.key), Iv::from(*nonce));
        let mut body = sealed.to_vec();
        let record = InboundOpaqueMessage::new(
            ContentType::ApplicationData,
            ProtocolVersion::TLSv1_2,
            &mut body,
        );
        Some(opener.decrypt(record, 0).ok()?.payload.to_vec())
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tickets").finish_non_exhaustive()
    }
}

impl fmt::Debug for Tickets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u8) -> TicketKey {
        TicketKey::from_bytes(&[number; TICKET_KEY_BYTES])
    }

    #[test]
    fn a_ticket_is_taken_by_whoever_has_its_key() {
        let (ours, theirs) = (Tickets::new(key(1)), Tickets::new(key(1)));
        let ticket = ours.ticketer().encrypt(b"session").unwrap();
        assert_ne!(ticket, ours.ticketer().encrypt(b"session").unwrap());
        assert_eq!(theirs.ticketer().decrypt(&ticket).unwrap(), b"session");
        let others = Tickets::new(key(2));
        assert_eq!(others.ticketer().decrypt(&ticket), None);
        // One of the same name.
        let mut bytes = [2; TICKET_KEY_BYTES];
        bytes[..NAME_BYTES].fill(1);
        let forged = Tickets::new(TicketKey::from_bytes(&bytes));
        assert_eq!(forged.ticketer().decrypt(&ticket), None);
    }

    #[test]
    fn keys_that_came_before_are_known_for_a_while() {
        let tickets = Tickets::new(key(1));
        let ticket = tickets.ticketer().encrypt(b"session").unwrap();
        for number in 2..=8 {
            tickets.rotate(key(number));
            assert!(tickets.ticketer().decrypt(&ticket).is_some(), "{number}");
        }
        let newest = tickets.ticketer().encrypt(b"session").unwrap();
        assert_eq!(newest[..NAME_BYTES], [8; NAME_BYTES]);
        tickets.rotate(key(9));
        assert_eq!(tickets.ticketer().decrypt(&ticket), None);
        let other = Tickets::new(key(10));
        other.accept(key(8));
        assert!(other.ticketer().decrypt(&newest).is_some());
        let sealed = other.ticketer().encrypt(b"").unwrap();
        assert_eq!(sealed[..NAME_BYTES], [10; NAME_BYTES]);
    }

    #[test]
    fn what_was_changed_is_no_ticket() {
        let tickets = Tickets::new(key(1));
        let ticket = tickets.ticketer().encrypt(b"session").unwrap();
        for place in 0..ticket.len() {
            let mut changed = ticket.clone();
            changed[place] ^= 1;
            assert_eq!(tickets.ticketer().decrypt(&changed), None, "at {place}");
            assert_eq!(tickets.ticketer().decrypt(&ticket[..place]), None);
        }
        let too_long = vec![0; MOST_BYTES + 1];
        assert_eq!(tickets.ticketer().encrypt(&too_long), None);
    }

    #[test]
    fn a_key_is_the_same_as_bytes() {
        let key = TicketKey::generate().unwrap();
        assert_ne!(key.to_bytes(), TicketKey::generate().unwrap().to_bytes());
        let same = TicketKey::from_bytes(&key.to_bytes());
        assert_eq!(same.to_bytes(), key.to_bytes());
        assert_eq!(format!("{key:?}"), "TicketKey { .. }");
    }
}
