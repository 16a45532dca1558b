//! TLS as the server of a connection.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bowline_transport::endpoint::{Side, Wrap};
use bowline_transport::{FileDescriptor, LayerState, PassDescriptors, SendmsgMixin, Stream};
use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::server::UnbufferedServerConnection;

use crate::certificates::Certificates;
use crate::config::{HANDSHAKE_TIMEOUT, server_config_builder};
use crate::error::LoadError;
use crate::handshake::{Handshake, NotesName};
use crate::layer::{MoveError, MovedTls, Tls};
use crate::role::TlsRole;
use crate::secret::keeping;

/// The TLS server: it is put on the connections of an endpoint.
///
/// It is used like any other layer, and is cheap to clone:
///
/// ```
/// # use bowline::{Address, Context, Protocol, Transport};
/// # use bowline::Reactor;
/// use bowline::endpoint::Listen as _;
/// use bowline::tls::TlsServer;
/// use bowline::{Tcp, Transports};
/// # struct Echo;
/// # impl<T: Transport> Protocol<T> for Echo {
/// #     fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
/// #         cx.transport.write(data);
/// #     }
/// # }
///
/// fn serve(reactor: &mut Reactor) -> Result<(), Box<dyn std::error::Error>> {
///     let tls = TlsServer::from_pem_files("server.crt", "server.key")?;
///     let here = Tcp::at(([127, 0, 0, 1], 8443).into()).layer(tls);
///     reactor.listen(here, |_: &Address| Echo)?;
///     Ok(())
/// }
/// # let _ = serve;
/// ```
///
/// The protocol is the same as without TLS. Its `connection_made` is called once the
/// handshake is done and the peer is known. If the handshake fails, only `connection_lost`
/// is called; the reason carries a [`TlsError`](crate::TlsError).
/// [`LimitHandshakes`](bowline_protocol::policies::LimitHandshakes) limits how many
/// handshakes run at a time: its `Handshake` is completed in `connection_made`.
///
/// Feature `tls`, or `tls-aws-lc-rs`.
#[derive(Clone)]
pub struct TlsServer {
    shared: Rc<Shared>,
}

struct Shared {
    config: RefCell<Arc<ServerConfig>>,
    handshake_timeout: Cell<Duration>,
    may_move: Cell<bool>,
}

impl TlsServer {
    /// Makes a server with a rustls configuration, which
    /// [`server_config_builder`](crate::server_config_builder) begins.
    ///
    /// Three of its settings are replaced. Early data (`max_early_data_size`) is off, since
    /// a protocol could not tell that it may be sent twice. Data before the client's last
    /// handshake message (`send_half_rtt_data`) is off, since a protocol could not tell to
    /// whom it is sent. The secrets are given out (`enable_secret_extraction`), because the
    /// layer seals and opens records itself.
    pub fn new(config: ServerConfig) -> Self {
        Self {
            shared: Rc::new(Shared {
                config: RefCell::new(Arc::new(made_fit(config))),
                handshake_timeout: Cell::new(HANDSHAKE_TIMEOUT),
                may_move: Cell::new(false),
            }),
        }
    }

    /// Makes a server with these certificates, which can be replaced later. It asks for no
    /// client certificate and negotiates no application protocol (ALPN).
    ///
    /// # Panics
    ///
    /// As [`crypto_provider`](crate::crypto_provider): the process has installed no
    /// provider of cryptography, and neither feature `ring` nor `aws-lc-rs` is on.
    pub fn with_certificates(certificates: &Certificates) -> Self {
        let builder = server_config_builder().with_no_client_auth();
        Self::new(builder.with_cert_resolver(certificates.resolver()))
    }

    /// Makes a server from two PEM files: the certificate chain, which begins with the
    /// server's own certificate, and the private key.
    ///
    /// # Errors
    ///
    /// A file cannot be loaded, or the key does not belong to the certificate.
    ///
    /// # Panics
    ///
    /// As [`with_certificates`](Self::with_certificates).
    pub fn from_pem_files(
        certificates: impl AsRef<Path>,
        key: impl AsRef<Path>,
    ) -> Result<Self, LoadError> {
        let certificates = Certificates::from_pem_files(certificates, key)?;
        Ok(Self::with_certificates(&certificates))
    }

    /// Sets how long a handshake may take; default 30 s. A connection that takes longer is
    /// lost with [`HandshakeTimedOut`](crate::TlsError::HandshakeTimedOut).
    #[must_use]
    pub fn handshake_timeout(self, timeout: Duration) -> Self {
        self.shared.handshake_timeout.set(timeout);
        self
    }

    /// Sets whether established connections may move to another process, for example to the
    /// successor in a restart; off by default. There, [`resume`](Self::resume) takes them
    /// over.
    ///
    /// What moves is the whole state of a connection, its keys above all. Whoever has it
    /// can read and write in our place. It is encrypted, and only one process can get the
    /// key to it, once ([`Detached::pack`](bowline_transport::Detached::pack)). The other
    /// process must be ours: a restart asks the kernel which process it is, and which user
    /// runs it. With TLS 1.3 the connection goes on with new keys there.
    ///
    /// To be able to move a TLS 1.2 connection, a process keeps its keys in memory. After a
    /// move, the process that gave it away no longer has the keys in memory, as far as
    /// libraries wipe what they free.
    #[must_use]
    pub fn may_move(self, may_move: bool) -> Self {
        self.shared.may_move.set(may_move);
        self
    }

    /// Whether a connection that was given to this process can go on here. Its layer has to
    /// be TLS, and its version and cipher suite have to be in our configuration. Takes
    /// nothing, and changes nothing.
    pub fn can_resume(&self, state: &LayerState) -> bool {
        MovedTls::fits(self.config().crypto_provider(), state)
    }

    /// Takes over a connection that was given to this process, if no other process has.
    /// Returns the layer to put on its socket. The connection may move again.
    ///
    /// ```no_run
    /// use bowline::Reactor;
    /// use bowline::endpoint::Adopt as _;
    /// use bowline::handoff::restart::Moved;
    /// use bowline::tls::{MoveError, TlsServer};
    /// use bowline::{Tcp, Transports};
    /// # use bowline::{Protocol, TcpStream, Transport};
    ///
    /// fn go_on<P>(
    ///     reactor: &mut Reactor,
    ///     tls: &TlsServer,
    ///     mut moved: Moved,
    ///     protocol: P,
    /// ) -> Result<(), Box<dyn std::error::Error>>
    /// where
    ///     P: Protocol<bowline::layers::Stream<bowline::tls::Tls<bowline::layers::TcpSocket>>>,
    /// {
    ///     let state = moved.layers.pop().ok_or("it was in the clear")?;
    ///     let kind = Tcp.layer(tls.resume(state)?).with_unsent(moved.unsent);
    ///     reactor.adopt(kind, moved.fd, protocol)?;
    ///     Ok(())
    /// }
    /// ```
    ///
    /// # Errors
    ///
    /// The connection [cannot go on here](Self::can_resume), or another process has taken
    /// it.
    pub fn resume(&self, state: LayerState) -> Result<MovedTls, MoveError> {
        MovedTls::take(self.config().crypto_provider(), state, false)
    }

    /// Returns what is needed to move connections, if they may move.
    pub(crate) fn mover(&self) -> Option<Arc<CryptoProvider>> {
        let may_move = self.shared.may_move.get();
        may_move.then(|| Arc::clone(self.config().crypto_provider()))
    }

    /// Replaces the configuration for connections that are accepted from now on, also of
    /// all clones.
    pub fn set_config(&self, config: ServerConfig) {
        *self.shared.config.borrow_mut() = Arc::new(made_fit(config));
    }

    /// Returns the current configuration, for example to derive another from it.
    pub fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.shared.config.borrow())
    }

    /// Returns the same for connections that pass descriptors, with [`SendmsgMixin`] on
    /// top. The descriptors travel beside the records, as they do without TLS. Each belongs
    /// to the record that has the byte it was queued with. TLS does not protect them:
    /// whoever can change the stream can change which descriptors come with it.
    pub fn passing(&self) -> Passing<Self> {
        Passing(self.clone())
    }

    pub(crate) fn timeout(&self) -> Duration {
        self.shared.handshake_timeout.get()
    }

    pub(crate) fn begin(&self) -> Result<Handshake, rustls::Error> {
        Ok(Handshake::server(UnbufferedServerConnection::new(
            self.config(),
        )?))
    }
}

fn made_fit(mut config: ServerConfig) -> ServerConfig {
    config.enable_secret_extraction = true;
    config.max_early_data_size = 0;
    config.send_half_rtt_data = false;
    config.cert_resolver = Arc::new(NotesName(config.cert_resolver));
    config.key_log = keeping(config.key_log);
    config
}

impl fmt::Debug for TlsServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsServer")
            .field("handshake_timeout", &self.timeout())
            .finish_non_exhaustive()
    }
}

impl<S: FileDescriptor> Wrap<S> for TlsServer {
    type Transport = Stream<Tls<S>>;

    fn wrap(&mut self, socket: S, _: Side) -> Tls<S> {
        Tls::new(socket, TlsRole::Server(self.clone()))
    }
}

/// TLS on a connection that passes descriptors. It is made by [`TlsServer::passing`],
/// [`TlsClient::passing`](crate::TlsClient::passing) and
/// [`StartTls::passing`](crate::StartTls::passing).
///
/// Feature `tls`, or `tls-aws-lc-rs`.
#[derive(Clone, Debug)]
pub struct Passing<L>(pub(crate) L);

impl<S, L, B> Wrap<S> for Passing<L>
where
    S: PassDescriptors,
    L: Wrap<S, Transport = Stream<B>>,
    B: PassDescriptors,
{
    type Transport = Stream<SendmsgMixin<B>>;

    fn wrap(&mut self, socket: S, side: Side) -> SendmsgMixin<B> {
        SendmsgMixin::new(self.0.wrap(socket, side))
    }
}
