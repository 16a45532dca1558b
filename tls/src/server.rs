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
use crate::role::Role;
use crate::secret::keeping;

/// TLS with us as the server: what is put on the connections of an endpoint.
///
/// It goes where layers go, and is cheap to clone:
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
/// The protocol is the same as without. It is told of its connection once the peer is
/// known (`connection_made`), and of one whose handshake fails by `connection_lost` alone,
/// for the reason that [`TlsError`](crate::TlsError) sorts by blame.
/// [`LimitHandshakes`](bowline_protocol::policies::LimitHandshakes) limits how many are at
/// it: its `Handshake` is completed in `connection_made`.
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
    /// With a configuration of rustls, which
    /// [`server_config_builder`](crate::server_config_builder) begins.
    ///
    /// Three of its settings are ours: early data (`max_early_data_size`) and data before
    /// the client's last word (`send_half_rtt_data`) are off, since a protocol could not
    /// tell that it can be sent twice or to whom; and the secrets are given out
    /// (`enable_secret_extraction`), to the layer, which seals and opens records itself.
    pub fn new(config: ServerConfig) -> Self {
        Self {
            shared: Rc::new(Shared {
                config: RefCell::new(Arc::new(made_fit(config))),
                handshake_timeout: Cell::new(HANDSHAKE_TIMEOUT),
                may_move: Cell::new(false),
            }),
        }
    }

    /// With these certificates, which can be replaced later, and nothing else: no client
    /// certificates are asked for, and no protocol is agreed on.
    ///
    /// # Panics
    ///
    /// Without a provider of cryptography: with neither of the features `ring` and
    /// `aws-lc-rs`, and none that the process has installed.
    pub fn with_certificates(certificates: &Certificates) -> Self {
        let builder = server_config_builder().with_no_client_auth();
        Self::new(builder.with_cert_resolver(certificates.resolver()))
    }

    /// With the certificate chain in one PEM file, ours first, and its key in another.
    ///
    /// # Errors
    ///
    /// One of them cannot be loaded, or they do not belong together.
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

    /// Sets how long a handshake may take; default 30 s. A connection that needs longer
    /// ends with [`HandshakeTimedOut`](crate::TlsError::HandshakeTimedOut).
    #[must_use]
    pub fn handshake_timeout(self, timeout: Duration) -> Self {
        self.shared.handshake_timeout.set(timeout);
        self
    }

    /// Whether established connections may be given to another process, the successor in a
    /// restart say; off by default. [`resume`](Self::resume) goes on with them there.
    ///
    /// What is given is all that a connection is, its keys above all: whoever has it can
    /// read and write in our place. It is encrypted, and the key to that can be had once,
    /// by one process ([`Detached::pack`](bowline_transport::Detached::pack)). The other
    /// process has to be ours: a restart asks the kernel which one it is, and of which
    /// user. TLS 1.3 goes on with new keys there.
    ///
    /// A process whose connections may move keeps the keys of TLS 1.2 in its memory for
    /// that. What moved in from a process is in that one's memory no more, as far as
    /// libraries wipe what they free.
    #[must_use]
    pub fn may_move(self, may_move: bool) -> Self {
        self.shared.may_move.set(may_move);
        self
    }

    /// Whether a connection that was given to this process can be gone on with here: its
    /// layer is one of TLS, and its version and suite are in our configuration. Nothing is
    /// taken yet, and nothing has changed.
    pub fn can_resume(&self, state: &LayerState) -> bool {
        MovedTls::fits(self.config().crypto_provider(), state)
    }

    /// Takes a connection that was given to this process, and no other has: what is put on
    /// its socket, as the layer. It stays one that may move.
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
    /// It is not one that [can be resumed](Self::can_resume), or another process has it.
    pub fn resume(&self, state: LayerState) -> Result<MovedTls, MoveError> {
        MovedTls::take(self.config().crypto_provider(), state, false)
    }

    /// What it takes to move connections, if they may.
    pub(crate) fn mover(&self) -> Option<Arc<CryptoProvider>> {
        let may_move = self.shared.may_move.get();
        may_move.then(|| Arc::clone(self.config().crypto_provider()))
    }

    /// Has connections that are accepted from now on served with another configuration.
    /// All clones do so.
    pub fn set_config(&self, config: ServerConfig) {
        *self.shared.config.borrow_mut() = Arc::new(made_fit(config));
    }

    /// The configuration that connections are served with, to make another of it.
    pub fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.shared.config.borrow())
    }

    /// The same for connections that pass descriptors: with
    /// [`SendmsgMixin`] on top. Their descriptors pass beside, as they do without TLS; each
    /// belongs to the record that has the byte it was queued with. TLS does not protect
    /// them: who can change the stream can change which descriptors come with it.
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
        Tls::new(socket, Role::Server(self.clone()))
    }
}

/// TLS on a connection that passes descriptors; made by
/// [`TlsServer::passing`], [`TlsClient::passing`](crate::TlsClient::passing) and
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
