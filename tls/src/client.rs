//! TLS as the client of a connection.

use std::fmt;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bowline_transport::endpoint::{Side, Wrap};
use bowline_transport::{FileDescriptor, LayerState, Stream};
use rustls::ClientConfig;
use rustls::client::UnbufferedClientConnection;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{InvalidDnsNameError, ServerName};

use crate::config::HANDSHAKE_TIMEOUT;
use crate::handshake::Handshake;
use crate::layer::{MoveError, MovedTls, Tls};
use crate::role::TlsRole;
use crate::secret::keeping;
use crate::server::Passing;

/// The TLS client: it is put on the connections that an endpoint makes.
///
/// ```
/// # use bowline::Reactor;
/// use bowline::endpoint::Connect as _;
/// use bowline::tls::{TlsClient, rustls};
/// use bowline::{Tcp, Transports};
///
/// # fn connect<F>(
/// #     reactor: &mut Reactor,
/// #     config: rustls::ClientConfig,
/// #     factory: F,
/// # ) -> Result<(), Box<dyn std::error::Error>>
/// # where
/// #     F: bowline::Factory<
/// #         Protocol: bowline::Protocol<bowline::layers::Stream<bowline::tls::Tls<bowline::layers::TcpSocket>>>,
/// #     >,
/// # {
/// let tls = TlsClient::new(config, "example.org")?;
/// let there = Tcp::to_host("example.org", 443).layer(tls);
/// reactor.connect(there, factory)?;
/// # Ok(())
/// # }
/// ```
///
/// A handshake that fails is a failed attempt to connect. The connector's time limit
/// includes the handshake. Session tickets from the server are kept in the configuration.
/// So clones of one client share them, and so do those that [`to`](Self::to) makes of it.
///
/// Feature `tls`, or `tls-aws-lc-rs`.
#[derive(Clone)]
pub struct TlsClient {
    shared: Rc<Shared>,
}

#[derive(Clone)]
struct Shared {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    handshake_timeout: Duration,
    may_move: bool,
}

impl TlsClient {
    /// Makes a client with a rustls configuration, which
    /// [`client_config_builder`](crate::client_config_builder) begins. `name` is the name
    /// that the server's certificate must have: a host name or an IP address.
    ///
    /// Two of its settings are replaced. Early data (`enable_early_data`) is off, since the
    /// network can send it twice. The secrets are given out (`enable_secret_extraction`),
    /// because the layer seals and opens records itself.
    ///
    /// # Errors
    ///
    /// `name` is neither a host name nor an IP address.
    pub fn new(mut config: ClientConfig, name: &str) -> Result<Self, InvalidDnsNameError> {
        config.enable_secret_extraction = true;
        config.enable_early_data = false;
        config.key_log = keeping(config.key_log);
        Ok(Self {
            shared: Rc::new(Shared {
                config: Arc::new(config),
                name: ServerName::try_from(name)?.to_owned(),
                handshake_timeout: HANDSHAKE_TIMEOUT,
                may_move: false,
            }),
        })
    }

    /// Returns the same client for another server.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn to(&self, name: &str) -> Result<Self, InvalidDnsNameError> {
        let name = ServerName::try_from(name)?.to_owned();
        let shared = Shared {
            name,
            ..(*self.shared).clone()
        };
        Ok(Self {
            shared: Rc::new(shared),
        })
    }

    /// Sets how long a handshake may take; default 30 s. The connector's time limit applies
    /// as well.
    #[must_use]
    pub fn handshake_timeout(self, timeout: Duration) -> Self {
        let shared = Shared {
            handshake_timeout: timeout,
            ..(*self.shared).clone()
        };
        Self {
            shared: Rc::new(shared),
        }
    }

    /// Sets whether established connections may move to another process; see
    /// [`TlsServer::may_move`](crate::TlsServer::may_move).
    #[must_use]
    pub fn may_move(self, may_move: bool) -> Self {
        let shared = Shared {
            may_move,
            ..(*self.shared).clone()
        };
        Self {
            shared: Rc::new(shared),
        }
    }

    /// Whether a connection that was given to this process can go on here; see
    /// [`TlsServer::can_resume`](crate::TlsServer::can_resume).
    pub fn can_resume(&self, state: &LayerState) -> bool {
        MovedTls::fits(self.shared.config.crypto_provider(), state)
    }

    /// Takes over a connection that was given to this process; see
    /// [`TlsServer::resume`](crate::TlsServer::resume). Session tickets that the server
    /// sends from now on are not kept.
    ///
    /// # Errors
    ///
    /// As [`TlsServer::resume`](crate::TlsServer::resume).
    pub fn resume(&self, state: LayerState) -> Result<MovedTls, MoveError> {
        MovedTls::take(self.shared.config.crypto_provider(), state, true)
    }

    /// Returns what is needed to move connections, if they may move.
    pub(crate) fn mover(&self) -> Option<Arc<CryptoProvider>> {
        let provider = self.shared.config.crypto_provider();
        self.shared.may_move.then(|| Arc::clone(provider))
    }

    /// Returns the same for connections that pass descriptors; see
    /// [`TlsServer::passing`](crate::TlsServer::passing).
    pub fn passing(&self) -> Passing<Self> {
        Passing(self.clone())
    }

    pub(crate) fn timeout(&self) -> Duration {
        self.shared.handshake_timeout
    }

    pub(crate) fn begin(&self) -> Result<Handshake, rustls::Error> {
        let Shared { config, name, .. } = &*self.shared;
        let said = name.to_str().into();
        let connection = UnbufferedClientConnection::new(Arc::clone(config), name.clone())?;
        Ok(Handshake::client(connection, said))
    }
}

impl fmt::Debug for TlsClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsClient")
            .field("name", &self.shared.name)
            .field("handshake_timeout", &self.timeout())
            .finish_non_exhaustive()
    }
}

impl<S: FileDescriptor> Wrap<S> for TlsClient {
    type Transport = Stream<Tls<S>>;

    fn wrap(&mut self, socket: S, _: Side) -> Tls<S> {
        Tls::new(socket, TlsRole::Client(self.clone()))
    }
}
