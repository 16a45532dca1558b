//! TLS in endpoints that are strings.

use std::fmt;

use bowline_handoff::endpoints::{
    ClientEndpoint, EndpointArguments, EndpointError, EndpointFactory, LayeredClientEndpoint,
    LayeredServerEndpoint, ServerEndpoint,
};
use bowline_protocol::{ConnectorHandle, Factory, ListenerHandle, Protocol};
use bowline_reactor::Reactor;
use bowline_transport::{Stream, TcpSocket, Transports, UnixSocket};

use crate::client::TlsClient;
use crate::error::LoadError;
use crate::layer::Tls;
use crate::server::TlsServer;

/// The `tls` kind of endpoint strings: TLS over TCP. Feature `endpoints`, which is on in
/// the facade.
///
/// | To listen | |
/// |---|---|
/// | `tls:8443:cert=FILE:key=FILE`, `tls:HOST:8443:cert=FILE:key=FILE` | as `tcp`, with its arguments; the certificate chain and its key are in PEM files (`certKey` and `privateKey`, as Twisted has it, are the same) |
///
/// | To connect | |
/// |---|---|
/// | `tls:HOST:PORT` | as `tcp`, with its arguments; `name=`, if the server's certificate is of another name than `HOST` |
///
/// A string to listen says all that is needed. To connect, the program has to say whom it
/// trusts ([`client`](Self::client)). [`ServerEndpoint::layer`] puts TLS on any other kind
/// of endpoint.
///
/// Feature `tls`, or `tls-aws-lc-rs`.
///
/// # Examples
///
/// ```
/// use bowline::endpoint::EndpointKinds;
/// use bowline::tls::TlsEndpoints;
/// use bowline::{Address, Context, Protocol, Reactor, Transport};
///
/// struct Echo;
///
/// impl<T: Transport> Protocol<T> for Echo {
///     fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
///         cx.transport.write(data);
///     }
/// }
///
/// fn echo(_: &Address) -> Echo {
///     Echo
/// }
///
/// let mut reactor = Reactor::new()?;
/// let mut kinds = EndpointKinds::new();
/// kinds.add("tls", TlsEndpoints::new());
/// kinds.listen(&mut reactor, "tcp:127.0.0.1:0", echo)?;
/// let error = kinds.listen(&mut reactor, "tls:8443:key=server.key", echo).unwrap_err();
/// assert_eq!(error.to_string(), "cert is missing, at column 24");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Default)]
pub struct TlsEndpoints {
    client: Option<TlsClient>,
}

impl TlsEndpoints {
    /// Makes one that can only listen.
    pub fn new() -> Self {
        Self::default()
    }

    /// Enables connecting, with the configuration of `client`. The name that it was made
    /// for is not used: each string has its own.
    #[must_use]
    pub fn client(mut self, client: TlsClient) -> Self {
        self.client = Some(client);
        self
    }

    /// Parses the arguments of a string to listen. Use it with
    /// [`listen_among`](LayeredServerEndpoint::listen_among), for example.
    ///
    /// # Errors
    ///
    /// The string is wrong, or its files cannot be loaded.
    pub fn server_endpoint(
        mut arguments: EndpointArguments,
    ) -> Result<LayeredServerEndpoint<TlsServer>, EndpointError> {
        let either = |arguments: &mut EndpointArguments, name: &str, other: &str| {
            let found = arguments.named(name).or_else(|| arguments.named(other));
            found.ok_or_else(|| arguments.error_at_end(format!("{name} is missing")))
        };
        let certificates = either(&mut arguments, "cert", "certKey")?;
        let key = either(&mut arguments, "key", "privateKey")?;
        arguments.set_kind("tcp");
        let endpoint = ServerEndpoint::try_from(arguments)?;
        let server = TlsServer::from_pem_files(certificates.as_str(), key.as_str());
        let server = server.map_err(|error| match &error {
            LoadError::File { path, .. } if path.as_os_str() == key.as_str() => {
                key.error(error.to_string())
            }
            _ => certificates.error(error.to_string()),
        })?;
        Ok(endpoint.layer(server))
    }

    /// Parses the arguments of a string to connect.
    ///
    /// # Errors
    ///
    /// The string is wrong.
    pub fn client_endpoint(
        &self,
        mut arguments: EndpointArguments,
    ) -> Result<LayeredClientEndpoint<TlsClient>, EndpointError> {
        let Some(client) = &self.client else {
            let what = "this program has said of no certificates that it trusts them";
            return Err(arguments.error_at_kind(what));
        };
        let name = arguments.named("name");
        let host = arguments.require("host")?;
        let client = client.to(name.as_ref().unwrap_or(&host).as_str());
        let client = client.map_err(|_| {
            let of = name.as_ref().unwrap_or(&host);
            of.error(format!(
                "{:?} is no name that a certificate has",
                of.as_str()
            ))
        })?;
        arguments.set_kind("tcp");
        arguments.put_back("host", host);
        Ok(ClientEndpoint::try_from(arguments)?.layer(client))
    }
}

impl<F> EndpointFactory<F> for TlsEndpoints
where
    F: Factory<Protocol: Protocol<Stream<Tls<TcpSocket>>> + Protocol<Stream<Tls<UnixSocket>>>>,
{
    fn listen(
        &self,
        reactor: &mut Reactor,
        arguments: EndpointArguments,
        factory: F,
    ) -> Result<ListenerHandle, EndpointError> {
        let endpoint = Self::server_endpoint(arguments)?;
        Ok(reactor.listen(endpoint, factory)?)
    }

    fn connect(
        &self,
        reactor: &mut Reactor,
        arguments: EndpointArguments,
        factory: F,
    ) -> Result<ConnectorHandle, EndpointError> {
        let endpoint = self.client_endpoint(arguments)?;
        Ok(reactor.connect(endpoint, factory)?)
    }
}

impl fmt::Debug for TlsEndpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsEndpoints")
            .field("client", &self.client)
            .finish()
    }
}
