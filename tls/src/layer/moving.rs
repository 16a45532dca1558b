//! Gives a connection to another process, and takes over one from another.

use std::error::Error as StdError;
use std::sync::Arc;

use bowline_transport::endpoint::{Side, Wrap};
use bowline_transport::{LayerState, Stays, Stream};
use rustls::SupportedCipherSuite;
use rustls::crypto::CryptoProvider;
use zeroize::Zeroizing;

use super::*;
use crate::encoding::{Malformed, Reader, Writer};
use crate::envelope::{Envelope, OpenError};
use crate::log;
use crate::server::Passing;
use crate::session::moving::{RestoreError, SESSION_BYTES};

/// The name of the layer.
const NAME: &str = "tls";

/// The format of what follows. Another version of this crate may have another.
const FORMAT: u8 = 1;

/// The length of what a state shows unopened: the format, the side, the version, the suite.
pub(super) const HEADER_BYTES: usize = 6;

/// The layer for a connection that was given to this process. It is made by
/// [`TlsServer::resume`](crate::TlsServer::resume) and
/// [`TlsClient::resume`](crate::TlsClient::resume), and put on that one connection.
///
/// Feature `tls`, or `tls-aws-lc-rs`.
pub struct MovedTls {
    state: Option<TlsState>,
}

impl MovedTls {
    /// Whether a configuration with this provider can take the connection over.
    pub(crate) fn fits(provider: &CryptoProvider, state: &LayerState) -> bool {
        let found = check(provider, state);
        if let Err(error) = &found {
            log::debug!(target: log::TLS, "cannot go on here: {error}");
        }
        found.is_ok()
    }

    pub(crate) fn take(
        provider: &Arc<CryptoProvider>,
        mut state: LayerState,
        is_client: bool,
    ) -> Result<Self, MoveError> {
        check(provider, &state)?;
        let sealed = state.state.split_off(HEADER_BYTES);
        let pipe = state.descriptors.pop().ok_or(MoveError::Malformed)?;
        let opened = Envelope::received(sealed, pipe)?.open(provider)?;
        let (head, mut bytes) = (&state.state, Reader::new(&opened));
        if bytes.take(HEADER_BYTES)? != head || (head[1] == 1) != is_client {
            return Err(MoveError::Malformed);
        }
        let state = TlsState::of_bytes(provider, head, bytes)?;
        Ok(Self { state: Some(state) })
    }

    /// Returns the state of TLS, as it was negotiated with the peer. `None` once it has
    /// been put on a connection.
    pub fn state(&self) -> Option<&TlsState> {
        self.state.as_ref()
    }

    /// Returns the same for connections that pass descriptors; see
    /// [`TlsServer::passing`](crate::TlsServer::passing).
    pub fn passing(self) -> Passing<Self> {
        Passing(self)
    }
}

impl<S: FileDescriptor> Wrap<S> for MovedTls {
    type Transport = Stream<Tls<S>>;

    fn wrap(&mut self, base: S, _: Side) -> Tls<S> {
        let over = || TlsState::new(Stage::Over);
        Tls {
            base,
            state: self.state.take().unwrap_or_else(over),
        }
    }
}

impl fmt::Debug for MovedTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MovedTls")
            .field("state", &self.state)
            .finish()
    }
}

/// Takes over what was given away, as far as `bytes` allow: the header, and the contents of
/// the envelope.
#[cfg(any(test, fuzzing))]
pub(crate) fn state_of_bytes(provider: &Arc<CryptoProvider>, bytes: &[u8]) {
    if let Some((head, rest)) = bytes.split_at_checked(HEADER_BYTES)
        && let Ok(mut state) = TlsState::of_bytes(provider, head, Reader::new(rest))
    {
        state.say(AlertDescription::CloseNotify);
    }
}

/// Returns the header of a state.
fn head(agreed: &Agreed, is_client: bool) -> [u8; HEADER_BYTES] {
    let version = u16::from(agreed.version).to_be_bytes();
    let suite = u16::from(agreed.suite.suite()).to_be_bytes();
    [
        FORMAT,
        is_client.into(),
        version[0],
        version[1],
        suite[0],
        suite[1],
    ]
}

/// Returns the version and the suite that a header names, if the provider has them.
fn suite_of(
    provider: &CryptoProvider,
    head: &[u8],
) -> Result<(ProtocolVersion, SupportedCipherSuite), MoveError> {
    let &[FORMAT, 0 | 1, a, b, c, d, ..] = head else {
        return Err(MoveError::Unfit);
    };
    let version = ProtocolVersion::from(u16::from_be_bytes([a, b]));
    let suite = CipherSuite::from(u16::from_be_bytes([c, d]));
    let mut suites = provider.cipher_suites.iter();
    let found = suites.find(|it| it.suite() == suite && it.version().version == version);
    let found = found.ok_or(MoveError::Unsupported { version, suite })?;
    Ok((version, *found))
}

fn check(provider: &CryptoProvider, state: &LayerState) -> Result<(), MoveError> {
    if state.name != NAME || state.descriptors.len() != 1 {
        return Err(MoveError::Unfit);
    }
    suite_of(provider, &state.state).map(|_| ())
}

impl TlsState {
    /// Returns what is needed to give the connection away, or the reason why it stays.
    fn mover(&self) -> Result<Arc<CryptoProvider>, Stays> {
        match &self.stage {
            Stage::Open(_) => {}
            Stage::Plain | Stage::Over | Stage::Packed { .. } => return Err(Stays::Closing),
            Stage::Leaving { .. } | Stage::Waiting { .. } | Stage::Handshaking { .. } => {
                return Err(Stays::Handshake);
            }
        }
        let Some(provider) = &self.mover else {
            return Err(Stays::NotAllowed);
        };
        if self.seals_no_more || self.has_said_close {
            return Err(Stays::Closing);
        }
        if let Some(rare) = &self.rare {
            if rare.failure.is_some() {
                return Err(Stays::Closing);
            }
            if rare.held.is_some() || !rare.passed.is_empty() {
                return Err(Stays::Descriptors);
            }
        }
        Ok(Arc::clone(provider))
    }

    /// See [`FileDescriptor::pack`]. Afterwards this process has no keys, except what it
    /// could read back from the pipe.
    pub(super) fn pack(&mut self) -> Result<LayerState, Stays> {
        let provider = self.mover()?;
        let Some(agreed) = self.agreed.take() else {
            return Err(Stays::Handshake);
        };
        let Stage::Open(session) = mem::replace(&mut self.stage, Stage::Over) else {
            return Err(Stays::Closing);
        };
        let head = head(&agreed, session.is_client());
        let bytes = self.take_bytes(head, *session, &agreed).map_err(|error| {
            log::warn!(target: log::TLS, "a connection cannot be given away: {error}");
            Stays::System
        })?;
        let given = Envelope::seal(&provider, &bytes).and_then(|envelope| {
            let (sealed, pipe) = envelope.share()?;
            let state = LayerState {
                name: NAME.to_owned(),
                state: [&head[..], &sealed].concat(),
                descriptors: vec![pipe],
            };
            Ok((envelope, state))
        });
        match given {
            Ok((envelope, state)) => {
                *self = Self::new(Stage::Packed { head, envelope });
                self.mover = Some(provider);
                Ok(state)
            }
            Err(error) => {
                log::warn!(target: log::TLS, "a connection cannot be given away now: {error}");
                let mut bytes = Reader::new(&bytes);
                let again = bytes.take(HEADER_BYTES).map_err(MoveError::from);
                let again = again.and_then(|head| Self::of_bytes(&provider, head, bytes));
                *self = again.unwrap_or_else(|_| Self::new(Stage::Over));
                Err(Stays::System)
            }
        }
    }

    /// See [`FileDescriptor::come_back`].
    pub(super) fn come_back(&mut self) -> Result<(), MoveError> {
        if !matches!(self.stage, Stage::Packed { .. }) {
            return Ok(());
        }
        let Stage::Packed { head, envelope } = mem::replace(&mut self.stage, Stage::Over) else {
            return Ok(());
        };
        let Some(provider) = self.mover.take() else {
            return Err(MoveError::Unfit);
        };
        let opened = envelope.open(&provider)?;
        let mut bytes = Reader::new(&opened);
        bytes.take(HEADER_BYTES)?;
        *self = Self::of_bytes(&provider, &head, bytes)?;
        Ok(())
    }

    fn take_bytes(
        &mut self,
        head: [u8; HEADER_BYTES],
        session: Session,
        agreed: &Agreed,
    ) -> Result<Zeroizing<Vec<u8>>, Error> {
        let rare = self.rare.take();
        let plain = rare.as_ref().map(|rare| &rare.plain[rare.delivered..]);
        let plain = plain.unwrap_or_default();
        let certificates = agreed.peer_certificates.iter();
        let certificates: usize = certificates.map(|it| it.len() + 4).sum();
        let buffered = self.incoming.len() + self.outgoing.len() + plain.len();
        let mut out = Writer::with_capacity(2 * SESSION_BYTES + certificates + buffered);
        head.iter().for_each(|byte| out.u8(*byte));
        session.into_bytes(&mut out)?;
        out.u8(self.has_ended.into());
        out.bytes(plain);
        out.bytes(&self.incoming);
        out.bytes(&self.outgoing.to_vec());
        out.u16(agreed.group.map_or(0, u16::from));
        out.optional(agreed.protocol.as_deref());
        out.optional(agreed.server_name.as_ref().map(|name| name.as_bytes()));
        out.u8(agreed.is_resumed.into());
        out.u16(agreed.peer_certificates.len() as u16);
        for certificate in &agreed.peer_certificates {
            out.bytes(certificate);
        }
        if self.incoming.capacity() > 0 {
            memory::give_back(mem::take(&mut self.incoming));
        }
        Ok(out.finish())
    }

    /// Takes what [`take_bytes`](Self::take_bytes) has written, without its header.
    fn of_bytes(
        provider: &Arc<CryptoProvider>,
        head: &[u8],
        mut bytes: Reader<'_>,
    ) -> Result<Self, MoveError> {
        let (version, suite) = suite_of(provider, head)?;
        let session = Session::of_bytes(suite, &mut bytes)?;
        let mut state = Self::new(Stage::Open(Box::new(session)));
        state.has_ended = bytes.flag()?;
        let plain = bytes.bytes()?;
        if !plain.is_empty() {
            state.rare().plain = plain.to_vec();
        }
        let incoming = bytes.bytes()?;
        if !incoming.is_empty() {
            state.keep(incoming, 0);
        }
        state.outgoing.push(bytes.bytes()?.to_vec());
        let group = bytes.u16()?;
        let protocol = bytes.optional()?.map(Into::into);
        let server_name = match bytes.optional()? {
            Some(name) => Some(std::str::from_utf8(name).map_err(|_| Malformed)?.into()),
            None => None,
        };
        let is_resumed = bytes.flag()?;
        let count = bytes.u16()?;
        let mut certificates = Vec::new();
        for _ in 0..count {
            certificates.push(CertificateDer::from(bytes.bytes()?.to_vec()));
        }
        bytes.finish()?;
        state.agreed = Some(Box::new(Agreed {
            version,
            suite,
            group: (group != 0).then(|| NamedGroup::from(group)),
            protocol,
            server_name,
            peer_certificates: certificates.into_boxed_slice(),
            is_resumed,
        }));
        state.mover = Some(Arc::clone(provider));
        Ok(state)
    }

    /// Asks for what is needed to go on where another process has stopped.
    pub(super) fn go_on(&self, link: &mut Link) {
        if !matches!(self.stage, Stage::Open(_)) {
            return;
        }
        if !self.outgoing.is_empty() {
            link.flush_soon();
        }
        if self.has_more() {
            link.read_soon();
        }
    }
}

/// Why this process could not take over a connection that was given to it.
///
/// Feature `tls`, or `tls-aws-lc-rs`.
#[derive(Debug)]
#[non_exhaustive]
pub enum MoveError {
    /// It is the state of another layer, or of another version of this one.
    Unfit,
    /// The configuration does not have this version, or not this cipher suite.
    Unsupported {
        /// The protocol version.
        version: ProtocolVersion,
        /// The cipher suite.
        suite: CipherSuite,
    },
    /// Another process has taken it: the one that had given it away, or another successor.
    Taken,
    /// It is not what was given away.
    Malformed,
    /// The provider of cryptography has failed.
    Provider(Error),
    /// The system has refused something.
    Os(io::Error),
}

impl fmt::Display for MoveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("cannot go on with a TLS connection: ")?;
        match self {
            Self::Unfit => f.write_str("it is the state of something else"),
            Self::Unsupported { version, suite } => {
                write!(f, "no {suite:?} in {version:?} here")
            }
            Self::Taken => f.write_str("another process has it"),
            Self::Malformed => f.write_str("its state makes no sense"),
            Self::Provider(error) => write!(f, "{error}"),
            Self::Os(error) => write!(f, "{error}"),
        }
    }
}

impl StdError for MoveError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            Self::Provider(error) => Some(error),
            Self::Os(error) => Some(error),
            _ => None,
        }
    }
}

impl From<MoveError> for io::Error {
    fn from(error: MoveError) -> Self {
        let kind = match &error {
            MoveError::Taken => io::ErrorKind::NotConnected,
            MoveError::Unfit | MoveError::Malformed => io::ErrorKind::InvalidData,
            MoveError::Unsupported { .. } => io::ErrorKind::Unsupported,
            MoveError::Provider(_) => io::ErrorKind::Other,
            MoveError::Os(error) => error.kind(),
        };
        Self::new(kind, error)
    }
}

impl From<Malformed> for MoveError {
    fn from(_: Malformed) -> Self {
        Self::Malformed
    }
}

impl From<RestoreError> for MoveError {
    fn from(error: RestoreError) -> Self {
        match error {
            RestoreError::Malformed => Self::Malformed,
            RestoreError::Provider(error) => Self::Provider(error),
        }
    }
}

impl From<OpenError> for MoveError {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Taken => Self::Taken,
            OpenError::Malformed => Self::Malformed,
            OpenError::Os(error) => Self::Os(error),
            OpenError::Provider(error) => Self::Provider(error),
        }
    }
}
