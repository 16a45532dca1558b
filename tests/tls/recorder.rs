//! A provider that notes what it has sealed under which number of which key: so that it
//! shows if two hands seal under the same.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hasher as _};
use std::sync::Arc;

use bowline::tls::rustls::crypto::cipher::{
    AeadKey, Iv, KeyBlockShape, MessageDecrypter, MessageEncrypter, NONCE_LEN,
    OutboundOpaqueMessage, OutboundPlainMessage, Tls12AeadAlgorithm, Tls13AeadAlgorithm,
    UnsupportedOperationError,
};
use bowline::tls::rustls::crypto::{CipherSuiteCommon, CryptoProvider};
use bowline::tls::rustls::{
    ConnectionTrafficSecrets, Error, SupportedCipherSuite, Tls12CipherSuite, Tls13CipherSuite,
};

/// Is told of each record that is sealed: by which key, and with which nonce.
pub(crate) type Note = Arc<dyn Fn(Sealed) + Send + Sync>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Sealed {
    /// What names the key, and does not tell it.
    key: u64,
    nonce: [u8; NONCE_LEN],
}

impl Sealed {
    /// As a line of a file.
    pub(crate) fn to_line(self) -> String {
        let mut line = format!("{:016x} ", self.key);
        for byte in self.nonce {
            line.push_str(&format!("{byte:02x}"));
        }
        line.push('\n');
        line
    }
}

/// How many lines there are, and which of them more than once.
pub(crate) fn doubled(lines: &str) -> (usize, Vec<String>) {
    let mut times: BTreeMap<&str, usize> = BTreeMap::new();
    let mut count = 0;
    for line in lines.lines() {
        count += 1;
        *times.entry(line).or_default() += 1;
    }
    let twice = times.into_iter().filter(|(_, times)| *times > 1);
    (count, twice.map(|(line, _)| line.to_owned()).collect())
}

/// The same provider, which tells of what it seals.
pub(crate) fn recording(base: &CryptoProvider, note: &Note) -> CryptoProvider {
    let suites = base.cipher_suites.iter();
    CryptoProvider {
        cipher_suites: suites.map(|suite| recorded(*suite, note)).collect(),
        ..base.clone()
    }
}

fn recorded(suite: SupportedCipherSuite, note: &Note) -> SupportedCipherSuite {
    match suite {
        SupportedCipherSuite::Tls13(suite) => {
            let aead_alg = leak(Recorded {
                base: suite.aead_alg,
                note: Arc::clone(note),
            });
            SupportedCipherSuite::Tls13(leak(Tls13CipherSuite {
                common: common(&suite.common),
                hkdf_provider: suite.hkdf_provider,
                aead_alg,
                quic: suite.quic,
            }))
        }
        SupportedCipherSuite::Tls12(suite) => {
            let aead_alg = leak(Recorded {
                base: suite.aead_alg,
                note: Arc::clone(note),
            });
            SupportedCipherSuite::Tls12(leak(Tls12CipherSuite {
                common: common(&suite.common),
                prf_provider: suite.prf_provider,
                kx: suite.kx,
                sign: suite.sign,
                aead_alg,
            }))
        }
    }
}

/// Suites are static; each test has a few.
fn leak<T>(value: T) -> &'static T {
    Box::leak(Box::new(value))
}

fn common(of: &CipherSuiteCommon) -> CipherSuiteCommon {
    CipherSuiteCommon {
        suite: of.suite,
        hash_provider: of.hash_provider,
        confidentiality_limit: of.confidentiality_limit,
    }
}

struct Recorded<A: ?Sized + 'static> {
    base: &'static A,
    note: Note,
}

impl<A: ?Sized> Recorded<A> {
    fn encrypter(
        &self,
        by: Box<dyn MessageEncrypter>,
        key: u64,
        iv: [u8; NONCE_LEN],
        may_be_primed: bool,
    ) -> Box<dyn MessageEncrypter> {
        Box::new(Encrypter {
            by,
            key,
            iv,
            may_be_primed,
            note: Arc::clone(&self.note),
        })
    }
}

fn name_of(key: &AeadKey) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(key.as_ref());
    hasher.finish()
}

impl Tls13AeadAlgorithm for Recorded<dyn Tls13AeadAlgorithm> {
    fn encrypter(&self, key: AeadKey, iv: Iv) -> Box<dyn MessageEncrypter> {
        let (name, bytes) = (name_of(&key), iv.as_ref().try_into().unwrap());
        self.encrypter(self.base.encrypter(key, iv), name, bytes, true)
    }

    fn decrypter(&self, key: AeadKey, iv: Iv) -> Box<dyn MessageDecrypter> {
        self.base.decrypter(key, iv)
    }

    fn key_len(&self) -> usize {
        self.base.key_len()
    }

    fn extract_keys(
        &self,
        key: AeadKey,
        iv: Iv,
    ) -> Result<ConnectionTrafficSecrets, UnsupportedOperationError> {
        self.base.extract_keys(key, iv)
    }
}

impl Tls12AeadAlgorithm for Recorded<dyn Tls12AeadAlgorithm> {
    fn encrypter(&self, key: AeadKey, iv: &[u8], extra: &[u8]) -> Box<dyn MessageEncrypter> {
        let name = name_of(&key);
        let whole = [iv, extra].concat().try_into().unwrap();
        self.encrypter(self.base.encrypter(key, iv, extra), name, whole, false)
    }

    fn decrypter(&self, key: AeadKey, iv: &[u8]) -> Box<dyn MessageDecrypter> {
        self.base.decrypter(key, iv)
    }

    fn key_block_shape(&self) -> KeyBlockShape {
        self.base.key_block_shape()
    }

    fn extract_keys(
        &self,
        key: AeadKey,
        iv: &[u8],
        explicit: &[u8],
    ) -> Result<ConnectionTrafficSecrets, UnsupportedOperationError> {
        self.base.extract_keys(key, iv, explicit)
    }
}

struct Encrypter {
    by: Box<dyn MessageEncrypter>,
    key: u64,
    iv: [u8; NONCE_LEN],
    /// At the end of a handshake of TLS 1.3 the layer seals nothing as number 0, for
    /// aws-lc-rs to count from there. It is wiped and never leaves.
    may_be_primed: bool,
    note: Note,
}

impl MessageEncrypter for Encrypter {
    fn encrypt(
        &mut self,
        message: OutboundPlainMessage<'_>,
        number: u64,
    ) -> Result<OutboundOpaqueMessage, Error> {
        let is_primed = std::mem::take(&mut self.may_be_primed);
        if !(is_primed && number == 0 && message.payload.is_empty()) {
            let mut nonce = self.iv;
            for (byte, of) in nonce[NONCE_LEN - 8..].iter_mut().zip(number.to_be_bytes()) {
                *byte ^= of;
            }
            (self.note)(Sealed {
                key: self.key,
                nonce,
            });
        }
        self.by.encrypt(message, number)
    }

    fn encrypted_payload_len(&self, length: usize) -> usize {
        self.by.encrypted_payload_len(length)
    }
}

mod tests {
    use std::sync::Mutex;

    use bowline::tls::rustls::ContentType;
    use bowline::tls::rustls::ProtocolVersion;
    use bowline::tls::rustls::crypto::cipher::OutboundChunks;

    use super::*;
    use crate::harness::provider;

    /// Two that have the same key, which the tests of moves must never see.
    #[test]
    fn two_sealers_of_one_key_are_noticed() {
        let seen: Arc<Mutex<String>> = Arc::default();
        let noted = Arc::clone(&seen);
        let note: Note = Arc::new(move |sealed| noted.lock().unwrap().push_str(&sealed.to_line()));
        let provider = recording(&provider(), &note);
        let mut suites = provider.cipher_suites.iter();
        let suite = suites.find_map(|it| it.tls13().filter(|it| it.aead_alg.key_len() == 32));
        let suite = suite.unwrap();
        let mut sealers = [0, 1].map(|_| {
            let (key, iv) = (AeadKey::from([7; 32]), Iv::from([9; NONCE_LEN]));
            suite.aead_alg.encrypter(key, iv)
        });
        let mut seal = |by: usize, number: u64| {
            let message = OutboundPlainMessage {
                typ: ContentType::ApplicationData,
                version: ProtocolVersion::TLSv1_2,
                payload: OutboundChunks::Single(b"data"),
            };
            sealers[by].encrypt(message, number).unwrap();
            doubled(&seen.lock().unwrap()).1.len()
        };
        assert_eq!(seal(0, 0), 0);
        assert_eq!(seal(0, 1), 0);
        assert_eq!(seal(1, 2), 0);
        assert_eq!(seal(1, 3), 0);
        assert_eq!(seal(0, 2), 1, "another has sealed under this number");
    }
}
