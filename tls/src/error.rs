//! Why a connection could not be secured, or did not stay secure, and whose fault it was.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::PathBuf;

use bowline_protocol::{CloseReason, ConnectError};
use rustls::AlertDescription;

/// Why TLS failed, sorted by whose fault it was.
///
/// It is the cause inside the [`CloseReason::Lost`] that a protocol is told, and inside the
/// [`ConnectError::Handshake`] that a connecting factory is told. [`of`](Self::of) and
/// [`of_attempt`](Self::of_attempt) find it there.
///
/// Feature `tls`, or `tls-aws-lc-rs`.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum TlsError {
    /// We do not accept the peer's certificate, or it has presented none.
    Certificate(rustls::Error),
    /// The peer broke the protocol, or offers nothing that we accept. Data that was changed
    /// on its way shows as this too.
    Peer(rustls::Error),
    /// The peer does not speak TLS: the first bytes it sent are no record. An HTTP request
    /// to a TLS port, for example.
    NotTls,
    /// The peer has refused us with this alert. It does not accept our certificate or our
    /// protocol version, for example.
    Refused(AlertDescription),
    /// Our own configuration does not allow what was wanted, or something that it needs was
    /// not available.
    Configuration(rustls::Error),
    /// The peer's stream ended without a `close_notify` alert: somebody may have cut it
    /// off.
    CutOff,
    /// The handshake took longer than it [may](crate::TlsServer::handshake_timeout).
    HandshakeTimedOut,
    /// The keys have sealed as many records as they may, and TLS 1.2 cannot change them.
    KeysUsedUp,
    /// Descriptors arrived with bytes that begin no record.
    MisplacedDescriptors,
}

impl TlsError {
    /// Returns the TLS error in the reason for which a connection was lost, if it has one.
    pub fn of(reason: &CloseReason) -> Option<&Self> {
        match reason {
            CloseReason::Lost(error) => Self::of_io(error),
            _ => None,
        }
    }

    /// Returns the TLS error in the error of an attempt to connect, if it has one.
    pub fn of_attempt(error: &ConnectError) -> Option<&Self> {
        match error {
            ConnectError::Handshake(reason) => Self::of(reason),
            _ => None,
        }
    }

    fn of_io(error: &io::Error) -> Option<&Self> {
        error.get_ref()?.downcast_ref()
    }

    /// Sorts an error of rustls by blame.
    pub(crate) fn of_rustls(error: rustls::Error) -> Self {
        use rustls::Error as E;
        match error {
            E::InvalidCertificate(_) | E::NoCertificatesPresented => Self::Certificate(error),
            E::AlertReceived(alert) => Self::Refused(alert),
            E::InappropriateMessage { .. }
            | E::InappropriateHandshakeMessage { .. }
            | E::InvalidMessage(_)
            | E::InvalidEncryptedClientHello(_)
            | E::DecryptError
            | E::PeerIncompatible(_)
            | E::PeerMisbehaved(_)
            | E::PeerSentOversizedRecord
            | E::NoApplicationProtocol => Self::Peer(error),
            _ => Self::Configuration(error),
        }
    }

    fn kind(&self) -> io::ErrorKind {
        match self {
            Self::Certificate(_) | Self::Refused(_) => io::ErrorKind::PermissionDenied,
            Self::Peer(_) | Self::NotTls | Self::MisplacedDescriptors => io::ErrorKind::InvalidData,
            Self::CutOff => io::ErrorKind::UnexpectedEof,
            Self::HandshakeTimedOut => io::ErrorKind::TimedOut,
            Self::Configuration(_) => io::ErrorKind::InvalidInput,
            Self::KeysUsedUp => io::ErrorKind::Other,
        }
    }
}

impl fmt::Display for TlsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Certificate(error) => write!(f, "TLS: the peer's certificate: {error}"),
            Self::Peer(error) => write!(f, "TLS: the peer broke the protocol: {error}"),
            Self::NotTls => f.write_str("TLS: the peer does not speak TLS"),
            Self::Refused(alert) => write!(f, "TLS: refused by the peer: {alert:?}"),
            Self::Configuration(error) => write!(f, "TLS: our configuration: {error}"),
            Self::CutOff => f.write_str("TLS: the peer's stream was cut off"),
            Self::HandshakeTimedOut => f.write_str("TLS: the handshake took too long"),
            Self::KeysUsedUp => f.write_str("TLS: the keys are used up"),
            Self::MisplacedDescriptors => {
                f.write_str("TLS: descriptors came in the middle of a record")
            }
        }
    }
}

impl Error for TlsError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Certificate(error) | Self::Peer(error) | Self::Configuration(error) => {
                Some(error)
            }
            _ => None,
        }
    }
}

impl From<TlsError> for io::Error {
    fn from(error: TlsError) -> Self {
        Self::new(error.kind(), error)
    }
}

/// Why [`start_tls`](crate::TlsTransport::start_tls) was refused.
///
/// Feature `tls`, or `tls-aws-lc-rs`.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum StartTlsError {
    /// The connection has no TLS layer: its endpoint was given none, such as
    /// [`StartTls`](crate::StartTls).
    NoLayer,
    /// TLS has begun already.
    Begun,
    /// The connection is closing, or is lost.
    NotConnected,
    /// Our own configuration does not allow TLS.
    Configuration(rustls::Error),
}

impl fmt::Display for StartTlsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoLayer => f.write_str("cannot start TLS: the connection has no layer for it"),
            Self::Begun => f.write_str("cannot start TLS: it was started before"),
            Self::NotConnected => f.write_str("cannot start TLS: the connection is over"),
            Self::Configuration(error) => write!(f, "cannot start TLS: {error}"),
        }
    }
}

impl Error for StartTlsError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Configuration(error) => Some(error),
            _ => None,
        }
    }
}

/// Why certificates or roots could not be loaded.
///
/// Feature `tls`, or `tls-aws-lc-rs`.
#[derive(Debug)]
#[non_exhaustive]
pub enum LoadError {
    /// A file could not be read, or does not contain what it should.
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        error: rustls::pki_types::pem::Error,
    },
    /// The file contains no certificate.
    NoCertificate(PathBuf),
    /// What was loaded cannot be used. For example, the key does not belong to the
    /// certificate.
    Unusable(rustls::Error),
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, error } => write!(f, "cannot load {}: {error}", path.display()),
            Self::NoCertificate(path) => {
                write!(f, "cannot load {}: no certificate in it", path.display())
            }
            Self::Unusable(error) => write!(f, "cannot use the certificate: {error}"),
        }
    }
}

impl Error for LoadError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::File { error, .. } => Some(error),
            Self::NoCertificate(_) => None,
            Self::Unusable(error) => Some(error),
        }
    }
}

impl From<rustls::Error> for LoadError {
    fn from(error: rustls::Error) -> Self {
        Self::Unusable(error)
    }
}
