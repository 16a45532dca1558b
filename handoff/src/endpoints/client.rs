//! Endpoint strings that say where to connect.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use bowline_protocol::{ConnectorHandle, Factory, Protocol, UnixAddress};
use bowline_reactor::Reactor;
use bowline_transport::endpoint::{Connect as _, ConnectWith, TransportFor, Wrap};
use bowline_transport::{
    Tcp, TcpConnect, TcpSocket, TcpStream, Transports, Unix, UnixConnect, UnixSocket, UnixStream,
};

use super::server::{abstract_name, check_path, parse_switch, refuse_lockfile};
use super::{EndpointArgument, EndpointArguments, EndpointError, PORT, unknown_kind};

/// The kinds that are known from the start.
pub(super) const KINDS: [&str; 3] = ["tcp", "unix", "unix-abstract"];

/// Where to connect, made from a string. The [module](super) lists the forms.
///
/// It is displayed as the string that it was made from.
#[derive(Clone, Debug)]
pub struct ClientEndpoint {
    text: String,
    place: Place,
}

#[derive(Clone, Debug)]
enum Place {
    Tcp(TcpConnect),
    Unix(UnixConnect),
}

impl FromStr for ClientEndpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        Self::of(EndpointArguments::parse(text)?, &KINDS)
    }
}

impl fmt::Display for ClientEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl ClientEndpoint {
    pub(super) fn of(
        mut arguments: EndpointArguments,
        known: &[&str],
    ) -> Result<Self, EndpointError> {
        let text = arguments.as_str().to_owned();
        let place = match arguments.kind() {
            "tcp" => Place::Tcp(tcp(&mut arguments)?),
            "unix" => {
                let path = arguments.require("path")?;
                check_path(&path)?;
                refuse_lockfile(&mut arguments)?;
                let address = UnixAddress::Path(path.as_str().into());
                Place::Unix(unix(&mut arguments, address)?)
            }
            "unix-abstract" => {
                let address = abstract_name(&mut arguments)?;
                Place::Unix(unix(&mut arguments, address)?)
            }
            _ => return Err(unknown_kind(&arguments, known)),
        };
        arguments.finish()?;
        Ok(Self { text, place })
    }
}

impl ClientEndpoint {
    /// Puts other layers on the connection, instead of those of its kind. See
    /// [`ServerEndpoint::layer`](super::ServerEndpoint::layer).
    pub fn layer<W>(self, wrap: W) -> LayeredClientEndpoint<W>
    where
        W: Wrap<TcpSocket> + Wrap<UnixSocket>,
    {
        LayeredClientEndpoint {
            endpoint: self,
            wrap,
        }
    }
}

impl TryFrom<EndpointArguments> for ClientEndpoint {
    type Error = EndpointError;

    /// Makes the endpoint of these arguments.
    fn try_from(arguments: EndpointArguments) -> Result<Self, EndpointError> {
        Self::of(arguments, &KINDS)
    }
}

/// A [`ClientEndpoint`] whose connection has other layers. [`ClientEndpoint::layer`] makes
/// it.
#[derive(Clone, Debug)]
pub struct LayeredClientEndpoint<W> {
    endpoint: ClientEndpoint,
    wrap: W,
}

impl<W, F> ConnectWith<F> for LayeredClientEndpoint<W>
where
    W: Wrap<TcpSocket> + Wrap<UnixSocket>,
    F: Factory,
    <W as Wrap<TcpSocket>>::Transport: TransportFor<F::Protocol>,
    <W as Wrap<UnixSocket>>::Transport: TransportFor<F::Protocol>,
{
    type Handle = ConnectorHandle;
    type Error = io::Error;

    fn connect_with(self, reactor: &mut Reactor, factory: F) -> io::Result<ConnectorHandle> {
        match self.endpoint.place {
            Place::Tcp(endpoint) => reactor.connect(endpoint.layer(self.wrap), factory),
            Place::Unix(endpoint) => reactor.connect(endpoint.layer(self.wrap), factory),
        }
    }
}

impl<F: Factory<Protocol: Protocol<TcpStream> + Protocol<UnixStream>>> ConnectWith<F>
    for ClientEndpoint
{
    type Handle = ConnectorHandle;
    type Error = io::Error;

    fn connect_with(self, reactor: &mut Reactor, factory: F) -> io::Result<ConnectorHandle> {
        match self.place {
            Place::Tcp(endpoint) => reactor.connect(endpoint, factory),
            Place::Unix(endpoint) => reactor.connect(endpoint, factory),
        }
    }
}

fn tcp(arguments: &mut EndpointArguments) -> Result<TcpConnect, EndpointError> {
    let host = arguments.require("host")?;
    if host.as_str().is_empty() {
        return Err(host.error("the host is empty"));
    }
    let port: u16 = arguments.require("port")?.parse(PORT)?;
    let mut endpoint = match host.as_str().parse::<IpAddr>() {
        Ok(ip) => Tcp::to(SocketAddr::new(ip, port)),
        Err(_) => Tcp::to_host(host.as_str(), port),
    };
    if let Some(timeout) = timeout(arguments)? {
        endpoint = endpoint.timeout(timeout);
    }
    if let Some(on) = arguments.named("nodelay") {
        endpoint = endpoint.no_delay(parse_switch(&on)?);
    }
    if let Some(on) = arguments.named("keepalive") {
        endpoint = endpoint.keep_alive(parse_switch(&on)?);
    }
    if let Some(bind) = arguments
        .named("bind")
        .or_else(|| arguments.named("bindAddress"))
    {
        endpoint = endpoint.bind_address(parse_bind(&bind)?);
    }
    Ok(endpoint)
}

fn unix(
    arguments: &mut EndpointArguments,
    address: UnixAddress,
) -> Result<UnixConnect, EndpointError> {
    let endpoint = Unix::to(address);
    Ok(match timeout(arguments)? {
        None => endpoint,
        Some(timeout) => endpoint.timeout(timeout),
    })
}

fn timeout(arguments: &mut EndpointArguments) -> Result<Option<Duration>, EndpointError> {
    let Some(timeout) = arguments.named("timeout") else {
        return Ok(None);
    };
    let seconds: f64 = timeout.parse("number of seconds")?;
    match Duration::try_from_secs_f64(seconds) {
        Ok(duration) if !duration.is_zero() => Ok(Some(duration)),
        _ => Err(timeout.error("a timeout is a number of seconds above zero")),
    }
}

/// Parses an address, with or without a port.
fn parse_bind(bind: &EndpointArgument) -> Result<SocketAddr, EndpointError> {
    match bind.as_str().parse::<IpAddr>() {
        Ok(ip) => Ok(SocketAddr::new(ip, 0)),
        Err(_) => bind.parse("IP address, or one with a port"),
    }
}
