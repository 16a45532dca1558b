//! A state that only one process can have: it is encrypted, and its key is in a pipe.
//!
//! Two processes with the keys of one connection would seal different records under the
//! same number, and whoever sees both could read them. So the state of a connection that
//! moves is never in two hands. It is encrypted by a key that is made for it. The key is
//! written into a pipe, and forgotten. Both processes hold the reading end; nobody holds
//! the writing end. The kernel gives the key to the process that reads first, once. Until
//! then, neither has the connection's keys. From then on, the other cannot get them,
//! whatever goes wrong with either.
//!
//! Only ciphertext passes through buffers that nobody wipes, and a pipe is not swapped out.

use std::fmt;
use std::fs::File;
use std::io::{self, PipeReader, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixStream;

use rustls::crypto::CryptoProvider;
use rustls::crypto::cipher::{
    AeadKey, InboundOpaqueMessage, Iv, NONCE_LEN, OutboundChunks, OutboundPlainMessage,
};
use rustls::{CipherSuite, ContentType, Error, ProtocolVersion, Tls13CipherSuite};
use zeroize::{Zeroize as _, Zeroizing};

use crate::config::found_provider;
use crate::encoding::{Malformed, Reader};
use crate::record::MOST_PLAIN;
use crate::tickets::suite_of;

const KEY_BYTES: usize = 32;

/// The reading end of the pipe.
#[derive(Debug)]
pub(crate) struct KeyPipe(PipeReader);

/// What is sealed, and the key to it.
pub(crate) struct Envelope {
    /// The suite, and records behind their lengths.
    sealed: Vec<u8>,
    pipe: KeyPipe,
}

impl fmt::Debug for Envelope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Envelope")
            .field("sealed", &self.sealed.len())
            .finish_non_exhaustive()
    }
}

/// Why an envelope has nothing for us.
#[derive(Debug)]
pub(crate) enum OpenError {
    /// Another process has opened it.
    Taken,
    /// Its contents are not what was put there.
    Malformed,
    Os(io::Error),
    Provider(Error),
}

impl From<Malformed> for OpenError {
    fn from(_: Malformed) -> Self {
        Self::Malformed
    }
}

impl Envelope {
    /// Seals `state`. It can be opened only by reading the pipe, once.
    pub(crate) fn seal(provider: &CryptoProvider, state: &[u8]) -> io::Result<Self> {
        // One that speaks TLS 1.2 only may have none.
        let suite = suite_of(provider).or_else(|| suite_of(&*found_provider()?));
        let suite = suite
            .ok_or_else(|| io::Error::new(io::ErrorKind::Unsupported, "no suite to seal with"))?;
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        let filled = provider.secure_random.fill(&mut *key);
        filled.map_err(|_| io::Error::other("no random bytes"))?;
        let (reader, mut writer) = io::pipe()?;
        writer.write_all(&*key)?;
        let sealed = seal(suite, &key, state).map_err(io::Error::other)?;
        Ok(Self {
            sealed,
            pipe: KeyPipe(reader),
        })
    }

    /// Makes one of what another process has sent.
    pub(crate) fn received(sealed: Vec<u8>, pipe: OwnedFd) -> Result<Self, OpenError> {
        let pipe = KeyPipe::received(pipe).map_err(OpenError::Os)?;
        Ok(Self {
            sealed,
            pipe: pipe.ok_or(OpenError::Malformed)?,
        })
    }

    /// Duplicates it for the other process.
    pub(crate) fn share(&self) -> io::Result<(Vec<u8>, OwnedFd)> {
        Ok((self.sealed.clone(), self.pipe.0.try_clone()?.into()))
    }

    /// Takes its contents, if nobody else has. Never blocks.
    pub(crate) fn open(
        mut self,
        provider: &CryptoProvider,
    ) -> Result<Zeroizing<Vec<u8>>, OpenError> {
        let mut sealed = Reader::new(&self.sealed);
        let id = CipherSuite::from(sealed.u16()?);
        let suite = of_id(provider, id).or_else(|| of_id(&*found_provider()?, id));
        let suite = suite.ok_or(OpenError::Malformed)?;
        let key = self.pipe.take()?;
        let opened = open(suite, &key, sealed);
        self.sealed.zeroize();
        opened
    }
}

impl KeyPipe {
    /// Returns `None` if `fd` is no pipe.
    fn received(fd: OwnedFd) -> io::Result<Option<Self>> {
        let file = File::from(fd);
        if !file.metadata()?.file_type().is_fifo() {
            return Ok(None);
        }
        // One that somebody could still write to must not have us wait for it. std knows
        // the call by the name of a socket, and the kernel of each kind of file.
        let not_waiting = UnixStream::from(OwnedFd::from(file));
        not_waiting.set_nonblocking(true)?;
        Ok(Some(Self(OwnedFd::from(not_waiting).into())))
    }

    fn take(&mut self) -> Result<Zeroizing<[u8; KEY_BYTES]>, OpenError> {
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        // In one read, which the kernel does not part.
        match self.0.read(&mut *key) {
            Ok(KEY_BYTES) => Ok(key),
            Ok(0) => Err(OpenError::Taken),
            Ok(_) => Err(OpenError::Malformed),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(OpenError::Malformed),
            Err(error) => Err(OpenError::Os(error)),
        }
    }
}

fn of_id(provider: &CryptoProvider, id: CipherSuite) -> Option<&'static Tls13CipherSuite> {
    let mut suites = provider.cipher_suites.iter();
    suites.find_map(|it| it.tls13().filter(|it| it.common.suite == id))
}

fn seal(suite: &Tls13CipherSuite, key: &[u8; KEY_BYTES], state: &[u8]) -> Result<Vec<u8>, Error> {
    // No other state is sealed by this key, so its numbers begin anywhere.
    let iv = Iv::from([0; NONCE_LEN]);
    let mut by = suite.aead_alg.encrypter(AeadKey::from(*key), iv);
    let mut sealed = u16::from(suite.common.suite).to_be_bytes().to_vec();
    for (part, number) in state.chunks(MOST_PLAIN).zip(0..) {
        let message = OutboundPlainMessage {
            typ: ContentType::ApplicationData,
            version: ProtocolVersion::TLSv1_2,
            payload: OutboundChunks::Single(part),
        };
        let record = by.encrypt(message, number)?.payload;
        sealed.extend((record.as_ref().len() as u32).to_be_bytes());
        sealed.extend_from_slice(record.as_ref());
    }
    Ok(sealed)
}

fn open(
    suite: &Tls13CipherSuite,
    key: &[u8; KEY_BYTES],
    mut sealed: Reader<'_>,
) -> Result<Zeroizing<Vec<u8>>, OpenError> {
    let iv = Iv::from([0; NONCE_LEN]);
    let mut by = suite.aead_alg.decrypter(AeadKey::from(*key), iv);
    // It does not grow: there is less in it than that.
    let mut state = Zeroizing::new(Vec::with_capacity(sealed.left()));
    let mut number = 0;
    while !sealed.is_at_end() {
        let mut body = Zeroizing::new(sealed.bytes()?.to_vec());
        let record = InboundOpaqueMessage::new(
            ContentType::ApplicationData,
            ProtocolVersion::TLSv1_2,
            &mut body,
        );
        let opened = by.decrypt(record, number).map_err(OpenError::Provider)?;
        state.extend_from_slice(opened.payload);
        number += 1;
    }
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::crypto_provider;

    fn shared(envelope: &Envelope) -> Envelope {
        let (sealed, pipe) = envelope.share().unwrap();
        Envelope::received(sealed, pipe).unwrap()
    }

    #[test]
    fn one_of_two_has_what_is_in_it() {
        let provider = crypto_provider();
        for length in [0, 1, MOST_PLAIN, MOST_PLAIN + 1, 100_000] {
            let state = vec![7; length];
            for is_ours in [false, true] {
                let ours = Envelope::seal(&provider, &state).unwrap();
                let theirs = shared(&ours);
                let (first, second) = match is_ours {
                    true => (ours, theirs),
                    false => (theirs, ours),
                };
                assert!(*first.open(&provider).unwrap() == state);
                assert!(matches!(second.open(&provider), Err(OpenError::Taken)));
            }
        }
    }

    #[test]
    fn it_outlives_whoever_has_not_opened_it() {
        let provider = crypto_provider();
        let ours = Envelope::seal(&provider, b"state").unwrap();
        let theirs = shared(&ours);
        drop(ours);
        assert_eq!(*theirs.open(&provider).unwrap(), b"state");
    }

    #[test]
    fn what_was_changed_is_not_opened() {
        let provider = crypto_provider();
        let length = Envelope::seal(&provider, b"state").unwrap().sealed.len();
        for place in 0..length {
            let mut changed = Envelope::seal(&provider, b"state").unwrap();
            changed.sealed[place] ^= 1;
            assert!(changed.open(&provider).is_err(), "at {place}");
        }
        for cut in 2..length {
            let mut changed = Envelope::seal(&provider, b"state").unwrap();
            changed.sealed.truncate(cut);
            let opened = changed.open(&provider);
            // Nothing at all is the state of nobody.
            assert!(opened.is_err() || *opened.unwrap() == b"", "at {cut}");
        }
    }

    #[test]
    fn a_pipe_without_a_key_is_not_waited_for() {
        let provider = crypto_provider();
        let (reader, writer) = io::pipe().unwrap();
        let (sealed, _) = Envelope::seal(&provider, b"state")
            .unwrap()
            .share()
            .unwrap();
        let envelope = Envelope::received(sealed.clone(), reader.into()).unwrap();
        let opened = envelope.open(&provider);
        assert!(matches!(opened, Err(OpenError::Malformed)), "{opened:?}");
        drop(writer);
        let (socket, _peer) = UnixStream::pair().unwrap();
        assert!(Envelope::received(sealed, socket.into()).is_err());
    }

    #[test]
    fn nothing_of_it_is_shown() {
        let envelope = Envelope::seal(&crypto_provider(), b"a state that is secret").unwrap();
        let found = envelope.sealed.windows(5).any(|part| part == b"state");
        assert!(!found);
    }
}
