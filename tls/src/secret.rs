//! The secrets of connections, and the keys made from them. They are wiped when they are
//! dropped. None of these types can be cloned or printed.

use std::cell::RefCell;
use std::sync::{Arc, LazyLock};

use rustls::crypto::cipher::{AeadKey, Iv, NONCE_LEN};
use rustls::crypto::tls13::{Hkdf, HkdfExpander, OkmBlock, OutputLengthError};
use rustls::crypto::{CipherSuiteCommon, hmac};
use rustls::quic::{Algorithm, HeaderProtectionKey, Keys, PacketKey, Tag, Version};
use rustls::{Error, KeyLog, Side, Tls13CipherSuite};
use zeroize::{Zeroize, Zeroizing};

use crate::config::crypto_provider;

/// The longest secret: that of SHA-512.
const MOST_BYTES: usize = 64;

/// A traffic secret of TLS 1.3 (RFC 8446 7.1).
pub(crate) struct Secret {
    bytes: [u8; MOST_BYTES],
    length: usize,
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.bytes.zeroize();
    }
}

impl Secret {
    /// Returns `None` if `secret` cannot be one.
    pub(crate) fn new(secret: &[u8]) -> Option<Self> {
        let mut bytes = [0; MOST_BYTES];
        bytes.get_mut(..secret.len())?.copy_from_slice(secret);
        Some(Self {
            bytes,
            length: secret.len(),
        })
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    fn expander(&self, suite: &Tls13CipherSuite) -> Box<dyn HkdfExpander> {
        let secret = OkmBlock::new(self.as_bytes());
        suite.hkdf_provider.expander_for_okm(&secret)
    }

    /// Derives the key and the initialisation vector (RFC 8446, 7.3).
    ///
    /// # Errors
    ///
    /// The suite has keys of a length that rustls has no way to make.
    pub(crate) fn keys(&self, suite: &Tls13CipherSuite) -> Result<(AeadKey, Iv), Error> {
        let expander = self.expander(suite);
        let mut key = Zeroizing::new([0; 32]);
        let key = key
            .get_mut(..suite.aead_alg.key_len())
            .ok_or_else(of_another_kind)?;
        expand(&*expander, b"key", key)?;
        let mut iv = Zeroizing::new([0; NONCE_LEN]);
        expand(&*expander, b"iv", &mut *iv)?;
        Ok((aead_key(key)?, Iv::from(*iv)))
    }

    /// Replaces this secret by the next one (RFC 8446, 7.2).
    ///
    /// # Errors
    ///
    /// The provider does not work as it should.
    pub(crate) fn update(&mut self, suite: &Tls13CipherSuite) -> Result<(), Error> {
        let expander = self.expander(suite);
        let mut next = Self {
            bytes: [0; MOST_BYTES],
            length: self.length,
        };
        expand(&*expander, b"traffic upd", &mut next.bytes[..self.length])?;
        *self = next;
        Ok(())
    }
}

/// HKDF-Expand-Label without a context (RFC 8446 7.1).
fn expand(expander: &dyn HkdfExpander, label: &[u8], output: &mut [u8]) -> Result<(), Error> {
    const PREFIX: &[u8] = b"tls13 ";
    let length = (output.len() as u16).to_be_bytes();
    let label_length = [(PREFIX.len() + label.len()) as u8];
    let info = [&length, &label_length[..], PREFIX, label, &[0]];
    let expanded = expander.expand_slice(&info, output);
    expanded.map_err(|OutputLengthError| Error::General("keys are too long".into()))
}

pub(crate) fn of_another_kind() -> Error {
    Error::General("a suite with keys of another kind".into())
}

/// The secrets of both directions.
pub(crate) struct Secrets {
    pub(crate) seal: Secret,
    pub(crate) open: Secret,
}

// Where they come from.

thread_local! {
    /// The traffic secrets that rustls last told in this thread: the client's and the
    /// server's.
    static TOLD: RefCell<[Option<Secret>; 2]> = const { RefCell::new([None, None]) };
}

/// Returns the client's and the server's secret, if rustls has told them since the last
/// call.
pub(crate) fn take_told() -> Option<[Secret; 2]> {
    match TOLD.take() {
        [Some(client), Some(server)] => Some([client, server]),
        _ => None,
    }
}

/// Is told the secrets of TLS 1.3, which rustls gives out in no other way, and passes them
/// on to the user's key log.
#[derive(Debug)]
struct KeepsSecrets(Arc<dyn KeyLog>);

impl KeepsSecrets {
    fn place(label: &str) -> Option<usize> {
        match label {
            "CLIENT_TRAFFIC_SECRET_0" => Some(0),
            "SERVER_TRAFFIC_SECRET_0" => Some(1),
            _ => None,
        }
    }
}

impl KeyLog for KeepsSecrets {
    fn log(&self, label: &str, client_random: &[u8], secret: &[u8]) {
        if let Some(place) = Self::place(label) {
            TOLD.with_borrow_mut(|told| told[place] = Secret::new(secret));
        }
        if self.0.will_log(label) {
            self.0.log(label, client_random, secret);
        }
    }

    fn will_log(&self, label: &str) -> bool {
        Self::place(label).is_some() || self.0.will_log(label)
    }
}

/// Returns a key log that keeps secrets for [`take_told`], and passes them on to `log`.
pub(crate) fn keeping(log: Arc<dyn KeyLog>) -> Arc<dyn KeyLog> {
    Arc::new(KeepsSecrets(log))
}

// Keys of bytes.

/// Makes a key of these bytes, of which there are 16 or 32.
///
/// # Errors
///
/// The length is another, or the provider has nothing for TLS 1.3.
pub(crate) fn aead_key(bytes: &[u8]) -> Result<AeadKey, Error> {
    if let Ok(bytes) = <[u8; 32]>::try_from(bytes) {
        return Ok(AeadKey::from(bytes));
    }
    if bytes.len() != ShortKeys.aead_key_len() {
        return Err(of_another_kind());
    }
    // rustls makes shorter keys by itself only: for QUIC it has them made by whom we say,
    // and gives them to whom we say.
    let suite = SHORT.as_ref().ok_or_else(of_another_kind)?;
    let keys = Keys::initial(Version::V1, suite, &ShortKeys, bytes, Side::Client);
    drop(keys);
    MADE.take().ok_or_else(of_another_kind)
}

thread_local! {
    static MADE: RefCell<Option<AeadKey>> = const { RefCell::new(None) };
}

/// A TLS 1.3 suite that derives nothing: its output is its input.
static SHORT: LazyLock<Option<Tls13CipherSuite>> = LazyLock::new(|| {
    let provider = crypto_provider();
    let base = provider.cipher_suites.iter().find_map(|it| it.tls13())?;
    Some(Tls13CipherSuite {
        common: CipherSuiteCommon {
            suite: base.common.suite,
            hash_provider: base.common.hash_provider,
            confidentiality_limit: 0,
        },
        hkdf_provider: &Identity,
        aead_alg: base.aead_alg,
        quic: None,
    })
});

/// Derives nothing: its output is its input.
struct Identity;

impl Hkdf for Identity {
    fn extract_from_zero_ikm(&self, _: Option<&[u8]>) -> Box<dyn HkdfExpander> {
        Box::new(Same(OkmBlock::new(&[])))
    }

    fn extract_from_secret(&self, _: Option<&[u8]>, secret: &[u8]) -> Box<dyn HkdfExpander> {
        Box::new(Same(OkmBlock::new(secret)))
    }

    fn expander_for_okm(&self, okm: &OkmBlock) -> Box<dyn HkdfExpander> {
        Box::new(Same(OkmBlock::new(okm.as_ref())))
    }

    fn hmac_sign(&self, _: &OkmBlock, _: &[u8]) -> hmac::Tag {
        hmac::Tag::new(&[])
    }
}

struct Same(OkmBlock);

impl HkdfExpander for Same {
    fn expand_slice(&self, _: &[&[u8]], output: &mut [u8]) -> Result<(), OutputLengthError> {
        output.fill(0);
        for (to, from) in output.iter_mut().zip(self.0.as_ref()) {
            *to = *from;
        }
        Ok(())
    }

    fn expand_block(&self, _: &[&[u8]]) -> OkmBlock {
        OkmBlock::new(self.0.as_ref())
    }

    fn hash_len(&self) -> usize {
        self.0.as_ref().len()
    }
}

/// Keeps the key that it is given.
struct ShortKeys;

impl Algorithm for ShortKeys {
    fn packet_key(&self, key: AeadKey, _: Iv) -> Box<dyn PacketKey> {
        MADE.set(Some(key));
        Box::new(NoKey)
    }

    fn header_protection_key(&self, _: AeadKey) -> Box<dyn HeaderProtectionKey> {
        Box::new(NoKey)
    }

    fn aead_key_len(&self) -> usize {
        16
    }
}

/// Protects nothing, and is never asked to.
struct NoKey;

impl PacketKey for NoKey {
    fn encrypt_in_place(&self, _: u64, _: &[u8], _: &mut [u8]) -> Result<Tag, Error> {
        Err(Error::EncryptError)
    }

    fn decrypt_in_place<'a>(&self, _: u64, _: &[u8], _: &'a mut [u8]) -> Result<&'a [u8], Error> {
        Err(Error::DecryptError)
    }

    fn tag_len(&self) -> usize {
        0
    }

    fn confidentiality_limit(&self) -> u64 {
        0
    }

    fn integrity_limit(&self) -> u64 {
        0
    }
}

impl HeaderProtectionKey for NoKey {
    fn encrypt_in_place(&self, _: &[u8], _: &mut u8, _: &mut [u8]) -> Result<(), Error> {
        Err(Error::EncryptError)
    }

    fn decrypt_in_place(&self, _: &[u8], _: &mut u8, _: &mut [u8]) -> Result<(), Error> {
        Err(Error::DecryptError)
    }

    fn sample_len(&self) -> usize {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_made_of_their_bytes() {
        for length in [16, 32] {
            let bytes: Vec<u8> = (1..=length).collect();
            assert_eq!(aead_key(&bytes).unwrap().as_ref(), bytes);
        }
        for length in [0, 15, 17, 24, 33] {
            assert!(aead_key(&vec![1; length]).is_err(), "{length} bytes");
        }
    }

    /// What RFC 8448 has in its first trace, of TLS_AES_128_GCM_SHA256.
    #[test]
    fn keys_are_those_of_their_secret() {
        let secret: [u8; 32] = [
            0xa1, 0x1a, 0xf9, 0xf0, 0x55, 0x31, 0xf8, 0x56, 0xad, 0x47, 0x11, 0x6b, 0x45, 0xa9,
            0x50, 0x32, 0x82, 0x04, 0xb4, 0xf4, 0x4b, 0xfb, 0x6b, 0x3a, 0x4b, 0x4f, 0x1f, 0x3f,
            0xcb, 0x63, 0x16, 0x43,
        ];
        let provider = crypto_provider();
        let mut suites = provider.cipher_suites.iter();
        let suite = suites.find_map(|it| {
            let suite = it.tls13()?;
            let wanted = rustls::CipherSuite::TLS13_AES_128_GCM_SHA256;
            (suite.common.suite == wanted).then_some(suite)
        });
        let suite = suite.unwrap();
        let (key, iv) = Secret::new(&secret).unwrap().keys(suite).unwrap();
        let wanted = [
            0x9f, 0x02, 0x28, 0x3b, 0x6c, 0x9c, 0x07, 0xef, 0xc2, 0x6b, 0xb9, 0xf2, 0xac, 0x92,
            0xe3, 0x56,
        ];
        assert_eq!(key.as_ref(), wanted);
        let wanted = [
            0xcf, 0x78, 0x2b, 0x88, 0xdd, 0x83, 0x54, 0x9a, 0xad, 0xf1, 0xe9, 0x84,
        ];
        assert_eq!(iv.as_ref(), wanted);
    }

    #[test]
    fn a_secret_is_as_long_as_it_is() {
        assert_eq!(Secret::new(&[7; 48]).unwrap().as_bytes(), [7; 48]);
        assert!(Secret::new(&[7; 65]).is_none());
    }
}
