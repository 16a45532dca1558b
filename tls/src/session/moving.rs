//! Encodes a session as bytes for another process. Whoever has the bytes has the session.

use rustls::Tls12CipherSuite;

use super::*;
use crate::encoding::{Malformed, Reader, Writer};

/// About how many bytes a session takes, without a partial message.
pub(crate) const SESSION_BYTES: usize = 512;

/// Where in the initialisation vector of TLS 1.2 with AES-GCM the explicit part begins,
/// which is sent with each record (RFC 5288, 3).
const EXPLICIT: usize = 4;

/// Above the record numbers of one sealer. They are limited to 2^24.5 records (RFC 8446,
/// 5.5), counted over all sealers.
const SEALER_SHIFT: u32 = 40;

impl Session {
    /// Encodes all of it. Nothing is left here but what is in `out`.
    ///
    /// It takes the session by value, and a session cannot be cloned: whoever had it cannot
    /// seal any more.
    pub(crate) fn into_bytes(self, out: &mut Writer) -> Result<(), Error> {
        out.u8(self.is_client.into());
        out.u64(self.sealer.next);
        out.u64(self.opener.next);
        match &self.keys {
            Keys::Updated(secrets) => {
                out.bytes(secrets.seal.as_bytes());
                out.bytes(secrets.open.as_bytes());
            }
            Keys::Fixed(Some(keys)) => {
                for one in [&keys.seal, &keys.open] {
                    out.bytes(&one.key);
                    out.bytes(&one.iv);
                }
                out.u64(keys.sealers.into());
            }
            Keys::Fixed(None) => return Err(of_another_kind()),
        }
        out.u8(self.is_refusal_owed.into());
        for left in [
            self.key_updates_left,
            self.warnings_left,
            self.renegotiations_left,
            self.empty_left,
        ] {
            out.u8(left);
        }
        out.bytes(&self.partial);
        Ok(())
    }

    /// Continues a session that another process has had.
    ///
    /// In TLS 1.3, it seals a key update before anything else.
    pub(crate) fn of_bytes(
        suite: SupportedCipherSuite,
        bytes: &mut Reader<'_>,
    ) -> Result<Self, RestoreError> {
        let is_client = bytes.flag()?;
        let (seal_from, open_from) = (bytes.u64()?, bytes.u64()?);
        let (sealer_by, opener_by, keys) = match suite.tls13() {
            Some(suite13) => {
                let mut secret = || Secret::new(bytes.bytes()?).ok_or(Malformed);
                let secrets = Secrets {
                    seal: secret()?,
                    open: secret()?,
                };
                (
                    // Its first record tells of new keys, so any number is one to begin
                    // with.
                    sealer(suite, secrets.seal.keys(suite13)?),
                    opener(suite, secrets.open.keys(suite13)?),
                    Keys::Updated(Box::new(secrets)),
                )
            }
            None => {
                let keys = FixedKeys::of_bytes(bytes)?;
                (
                    primed(suite, keys.sealer(suite)?, seal_from)?,
                    opener(suite, keys.open.parts()?),
                    Keys::Fixed(Some(Box::new(keys))),
                )
            }
        };
        let sealing = Sealer {
            by: sealer_by,
            next: seal_from,
            most: most_sealed(suite),
        };
        let opening = Opener {
            by: opener_by,
            next: open_from,
        };
        let mut session = Self::with(suite, sealing, opening, keys);
        session.is_client = is_client;
        session.is_renewal_due = session.is_13();
        session.is_refusal_owed = bytes.flag()?;
        for left in [
            &mut session.key_updates_left,
            &mut session.warnings_left,
            &mut session.renegotiations_left,
            &mut session.empty_left,
        ] {
            *left = bytes.u8()?;
        }
        session.partial = bytes.bytes()?.to_vec();
        Ok(session)
    }
}

impl FixedKeys {
    fn of_bytes(bytes: &mut Reader<'_>) -> Result<Self, Malformed> {
        let mut one = || {
            Ok(FixedKey {
                key: Zeroizing::new(bytes.bytes()?.to_vec()),
                iv: bytes.bytes()?.try_into().map_err(|_| Malformed)?,
            })
        };
        let (seal, open) = (one()?, one()?);
        let sealers = u32::try_from(bytes.u64()?).map_err(|_| Malformed)?;
        Ok(Self {
            seal,
            open,
            sealers: sealers.checked_add(1).ok_or(Malformed)?,
        })
    }

    /// Makes a sealer whose record numbers no earlier one has used.
    ///
    /// With AES-GCM, each record tells the peer its number. So each sealer has a range of
    /// numbers of its own, in which the number that primes it is also used for the first
    /// time. With ChaCha20, it continues where the last one ended.
    fn sealer(&self, suite: SupportedCipherSuite) -> Result<Box<dyn MessageEncrypter>, Error> {
        let (key, iv) = self.seal.parts()?;
        Ok(sealer(suite, (key, apart(suite, iv, self.sealers - 1))))
    }
}

/// Whether each record tells the peer its number: with AES-GCM.
pub(super) fn tells_numbers(suite: &Tls12CipherSuite) -> bool {
    suite.aead_alg.key_block_shape().fixed_iv_len == EXPLICIT
}

/// Returns the initialisation vector with which the sealer of this number begins.
pub(super) fn apart(suite: SupportedCipherSuite, iv: Iv, sealer: u32) -> Iv {
    let SupportedCipherSuite::Tls12(suite) = suite else {
        return iv;
    };
    let mut bytes = [0; NONCE_LEN];
    bytes.copy_from_slice(iv.as_ref());
    if tells_numbers(suite)
        && let Some(explicit) = bytes[EXPLICIT..].first_chunk_mut()
    {
        let begins = u64::from(sealer) << SEALER_SHIFT;
        *explicit = (u64::from_be_bytes(*explicit) ^ begins).to_be_bytes();
    }
    Iv::from(bytes)
}

/// Why bytes hold no session.
#[derive(Debug)]
pub(crate) enum RestoreError {
    Malformed,
    Provider(Error),
}

impl From<Malformed> for RestoreError {
    fn from(_: Malformed) -> Self {
        Self::Malformed
    }
}

impl From<Error> for RestoreError {
    fn from(error: Error) -> Self {
        Self::Provider(error)
    }
}
