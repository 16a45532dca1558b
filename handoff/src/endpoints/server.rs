//! Endpoint strings that say where to listen.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::str::FromStr;

use bowline_protocol::{Acceptor, Address, Factory, ListenerHandle, Protocol, UnixAddress};
use bowline_reactor::Reactor;
use bowline_transport::endpoint::{Listen as _, ListenWith, TransportFor, Wrap};
use bowline_transport::{
    Tcp, TcpListen, TcpSocket, TcpStream, Transports, Unix, UnixListen, UnixSocket, UnixStream,
    describe_socket, take_granted,
};

use super::{EndpointArgument, EndpointArguments, EndpointError, PORT, unknown_kind};
use crate::inherited::Inherited;
use crate::pool::Pool;
use crate::restart::Listeners;
use crate::systemd::announced_here;

/// The kinds that are known from the start.
pub(super) const KINDS: [&str; 7] = [
    "tcp",
    "tcp6",
    "unix",
    "unix-abstract",
    "systemd",
    "fd",
    "inherited",
];

/// Where to listen, made from a string. The [module](super) lists the forms.
///
/// It is displayed as the string that it was made from.
#[derive(Debug)]
pub struct ServerEndpoint {
    text: String,
    place: Place,
}

#[derive(Debug)]
enum Place {
    Tcp(TcpListen),
    Unix(UnixListen),
    /// A descriptor that this process was started with.
    Number(u32),
    Systemd(Chosen, Option<Domain>),
    Inherited(String),
    /// A listening socket that was claimed.
    Claimed(OwnedFd),
}

/// The transports that layers make of both kinds of socket.
type OnTcp<W> = <W as Wrap<TcpSocket>>::Transport;
type OnUnix<W> = <W as Wrap<UnixSocket>>::Transport;

/// An endpoint whose kind is known, with its socket if it has one.
enum Found {
    Tcp(TcpListen),
    Unix(UnixListen),
    ListeningTcp(OwnedFd),
    ListeningUnix(OwnedFd),
}

/// The same, among other listeners that have names.
enum Among {
    Tcp(TcpListen),
    Unix(UnixListen),
}

/// Which of systemd's sockets to take.
#[derive(Debug)]
enum Chosen {
    Name(String),
    Index(u32),
}

/// A socket(2) domain, as systemd strings name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Domain {
    Inet,
    Inet6,
    Unix,
}

impl FromStr for ServerEndpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        Self::of(EndpointArguments::parse(text)?, &KINDS)
    }
}

impl fmt::Display for ServerEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl ServerEndpoint {
    pub(super) fn of(
        mut arguments: EndpointArguments,
        known: &[&str],
    ) -> Result<Self, EndpointError> {
        let text = arguments.as_str().to_owned();
        let place = match arguments.kind() {
            "tcp" => Place::Tcp(tcp(&mut arguments, Ipv4Addr::UNSPECIFIED.into())?),
            "tcp6" => {
                let endpoint = tcp(&mut arguments, Ipv6Addr::UNSPECIFIED.into())?;
                Place::Tcp(endpoint.v6_only(true))
            }
            "unix" => {
                let path = arguments.require("path")?;
                check_path(&path)?;
                let mut endpoint = Unix::at(UnixAddress::Path(path.as_str().into()));
                if let Some(mode) = arguments.named("mode") {
                    endpoint = endpoint.mode(parse_mode(&mode)?);
                }
                refuse_lockfile(&mut arguments)?;
                Place::Unix(with_backlog(endpoint, &mut arguments, UnixListen::backlog)?)
            }
            "unix-abstract" => {
                let endpoint = Unix::at(abstract_name(&mut arguments)?);
                Place::Unix(with_backlog(endpoint, &mut arguments, UnixListen::backlog)?)
            }
            "fd" => {
                let number = arguments.require("number")?;
                Place::Number(number.parse("descriptor number")?)
            }
            "systemd" => systemd(&mut arguments)?,
            "inherited" => {
                let name = arguments.require("name")?;
                Place::Inherited(name.as_str().to_owned())
            }
            "stdio" => {
                let what = "stdio is no listener; adopt it with Stdio";
                return Err(arguments.error_at_kind(what));
            }
            _ => return Err(unknown_kind(&arguments, known)),
        };
        arguments.finish()?;
        Ok(Self { text, place })
    }

    /// Takes the socket of `inherited:NAME` or `systemd:name=NAME` out of what this process
    /// was given. Any other endpoint stays as it is. So does `systemd:` if there is no such
    /// name; then it is looked up in the environment when it is used.
    ///
    /// # Errors
    ///
    /// `NotFound` if there is no `inherited:` socket of this name. `InvalidInput` if the
    /// socket is of another domain than the string says; then it stays unclaimed.
    pub fn claim(mut self, inherited: &mut Inherited) -> io::Result<Self> {
        let (name, domain, has_to_be) = match &self.place {
            Place::Inherited(name) => (name, None, true),
            Place::Systemd(Chosen::Name(name), domain) => (name, *domain, false),
            _ => return Ok(self),
        };
        match inherited.claim(name) {
            Some(fd) => {
                if let Err(error) = check_domain(&fd, domain) {
                    inherited.add(name, fd);
                    return Err(error);
                }
                self.place = Place::Claimed(fd);
            }
            None if has_to_be => {
                let text = format!("nothing was inherited by the name {name:?}");
                return Err(io::Error::new(io::ErrorKind::NotFound, text));
            }
            None => {}
        }
        Ok(self)
    }

    /// Puts other layers on each accepted connection, instead of those of its kind, such as
    /// TLS. They are the same for TCP and for UNIX sockets.
    ///
    /// ```
    /// use bowline::endpoint::ServerEndpoint;
    /// use bowline::tls::TlsServer;
    /// use bowline::{Address, Context, Protocol, Reactor, Transport, Transports};
    /// # struct Echo;
    /// # impl<T: Transport> Protocol<T> for Echo {
    /// #     fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
    /// #         cx.transport.write(data);
    /// #     }
    /// # }
    ///
    /// fn serve(reactor: &mut Reactor, text: &str) -> Result<(), Box<dyn std::error::Error>> {
    ///     let endpoint: ServerEndpoint = text.parse()?;
    ///     let tls = TlsServer::from_pem_files("server.crt", "server.key")?;
    ///     reactor.listen(endpoint.layer(tls), |_: &Address| Echo)?;
    ///     Ok(())
    /// }
    /// # let _ = serve;
    /// ```
    pub fn layer<W>(self, wrap: W) -> LayeredServerEndpoint<W>
    where
        W: Wrap<TcpSocket> + Wrap<UnixSocket>,
    {
        LayeredServerEndpoint {
            endpoint: self,
            wrap,
        }
    }

    /// Listens as part of a program that can be replaced. See [`Listeners::listen`], also
    /// for `name`. A predecessor's listener of that name is preferred, whatever the string
    /// says of systemd or of a number: that was for the first process.
    ///
    /// # Errors
    ///
    /// As [`Listeners::listen`], and as listening at this endpoint.
    pub fn listen_among(
        self,
        listeners: &mut Listeners<'_>,
        reactor: &mut Reactor,
        name: &str,
        factory: impl Factory<Protocol: Protocol<TcpStream> + Protocol<UnixStream>>,
    ) -> io::Result<ListenerHandle> {
        match self.among(listeners, name)? {
            Among::Tcp(endpoint) => listeners.listen(reactor, name, endpoint, factory),
            Among::Unix(endpoint) => listeners.listen(reactor, name, endpoint, factory),
        }
    }

    /// As [`listen_among`](Self::listen_among), for an acceptor, such as that of a worker
    /// pool. See [`Listeners::accept`].
    ///
    /// # Errors
    ///
    /// As [`Listeners::accept`], and as listening at this endpoint.
    pub fn accept_among(
        self,
        listeners: &mut Listeners<'_>,
        reactor: &mut Reactor,
        name: &str,
        acceptor: impl Acceptor,
    ) -> io::Result<ListenerHandle> {
        match self.among(listeners, name)? {
            Among::Tcp(endpoint) => listeners.accept(reactor, name, endpoint, acceptor),
            Among::Unix(endpoint) => listeners.accept(reactor, name, endpoint, acceptor),
        }
    }

    /// As [`listen_among`](Self::listen_among), for a worker pool. Its connections move to
    /// the workers of a successor. See [`Listeners::pool`].
    ///
    /// # Errors
    ///
    /// As [`Listeners::pool`], and as listening at this endpoint.
    pub fn pool_among(
        self,
        listeners: &mut Listeners<'_>,
        reactor: &mut Reactor,
        name: &str,
        pool: &Pool,
        label: u32,
    ) -> io::Result<ListenerHandle> {
        match self.among(listeners, name)? {
            Among::Tcp(endpoint) => listeners.pool(reactor, name, endpoint, pool, label),
            Among::Unix(endpoint) => listeners.pool(reactor, name, endpoint, pool, label),
        }
    }

    /// Returns where to listen under this name. A socket that exists already has to be
    /// claimed by its name.
    fn among(self, listeners: &mut Listeners<'_>, name: &str) -> io::Result<Among> {
        let fd = match self.place {
            Place::Tcp(endpoint) => return Ok(Among::Tcp(endpoint)),
            Place::Unix(endpoint) => return Ok(Among::Unix(endpoint)),
            given => {
                let inherited = listeners.inherited();
                let is_there = inherited.names().any(|known| known == name);
                let given = Self {
                    place: given,
                    ..self
                };
                match is_there.then(|| inherited.claim(name)).flatten() {
                    Some(fd) => fd,
                    None => given.claim(inherited)?.socket()?,
                }
            }
        };
        let address = listening_address(&fd)?;
        // It is claimed again at its own address.
        listeners.inherited().add(name, fd);
        match address {
            Address::Unix(_) => Ok(Among::Unix(Unix::at(UnixAddress::Unnamed))),
            Address::Inet(address) => Ok(Among::Tcp(Tcp::at(address))),
            _ => Err(no_listener()),
        }
    }

    /// Listens, and gives every accepted socket to `acceptor`, such as that of a worker
    /// pool. See [`Transports::accept`].
    ///
    /// # Errors
    ///
    /// As listening at this endpoint.
    pub fn accept(
        self,
        reactor: &mut Reactor,
        acceptor: impl Acceptor,
    ) -> io::Result<ListenerHandle> {
        Ok(match self.found()? {
            Found::Tcp(endpoint) => reactor.accept(endpoint, acceptor)?,
            Found::Unix(endpoint) => reactor.accept(endpoint, acceptor)?,
            Found::ListeningTcp(fd) => reactor.accept(Tcp::listening(fd), acceptor)?,
            Found::ListeningUnix(fd) => reactor.accept(Unix::listening(fd), acceptor)?,
        })
    }

    /// Returns where to listen, once the kind is known.
    fn found(self) -> io::Result<Found> {
        let fd = match self.place {
            Place::Tcp(endpoint) => return Ok(Found::Tcp(endpoint)),
            Place::Unix(endpoint) => return Ok(Found::Unix(endpoint)),
            _ => self.socket()?,
        };
        match listening_address(&fd)? {
            Address::Inet(_) => Ok(Found::ListeningTcp(fd)),
            Address::Unix(_) => Ok(Found::ListeningUnix(fd)),
            _ => Err(no_listener()),
        }
    }

    /// Returns the socket of an endpoint that has one already.
    fn socket(self) -> io::Result<OwnedFd> {
        match self.place {
            Place::Claimed(fd) => Ok(fd),
            Place::Number(number) => take_granted(number),
            Place::Systemd(chosen, domain) => {
                let fd = granted_by_systemd(&chosen)?;
                check_domain(&fd, domain)?;
                Ok(fd)
            }
            Place::Inherited(name) => {
                let text = format!("inherited:{name} was not claimed");
                Err(io::Error::new(io::ErrorKind::NotFound, text))
            }
            Place::Tcp(_) | Place::Unix(_) => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

impl<F: Factory<Protocol: Protocol<TcpStream> + Protocol<UnixStream>>> ListenWith<F>
    for ServerEndpoint
{
    type Handle = ListenerHandle;
    type Error = io::Error;

    fn listen_with(self, reactor: &mut Reactor, factory: F) -> io::Result<ListenerHandle> {
        Ok(match self.found()? {
            Found::Tcp(endpoint) => reactor.listen(endpoint, factory)?,
            Found::Unix(endpoint) => reactor.listen(endpoint, factory)?,
            Found::ListeningTcp(fd) => reactor.listen(Tcp::listening(fd), factory)?,
            Found::ListeningUnix(fd) => reactor.listen(Unix::listening(fd), factory)?,
        })
    }
}

impl TryFrom<EndpointArguments> for ServerEndpoint {
    type Error = EndpointError;

    /// Makes the endpoint of these arguments. A kind of a program's own that is based on
    /// another kind first [changes](EndpointArguments::set_kind) them.
    fn try_from(arguments: EndpointArguments) -> Result<Self, EndpointError> {
        Self::of(arguments, &KINDS)
    }
}

/// A [`ServerEndpoint`] whose connections have other layers. [`ServerEndpoint::layer`]
/// makes it.
#[derive(Debug)]
pub struct LayeredServerEndpoint<W> {
    endpoint: ServerEndpoint,
    wrap: W,
}

impl<W: Wrap<TcpSocket> + Wrap<UnixSocket>> LayeredServerEndpoint<W> {
    /// Takes its socket out of what this process was given; see [`ServerEndpoint::claim`].
    ///
    /// # Errors
    ///
    /// As [`ServerEndpoint::claim`].
    pub fn claim(self, inherited: &mut Inherited) -> io::Result<Self> {
        Ok(Self {
            endpoint: self.endpoint.claim(inherited)?,
            wrap: self.wrap,
        })
    }

    /// Listens as part of a program that can be replaced; see
    /// [`ServerEndpoint::listen_among`].
    ///
    /// # Errors
    ///
    /// As [`ServerEndpoint::listen_among`].
    pub fn listen_among<F: Factory>(
        self,
        listeners: &mut Listeners<'_>,
        reactor: &mut Reactor,
        name: &str,
        factory: F,
    ) -> io::Result<ListenerHandle>
    where
        OnTcp<W>: TransportFor<F::Protocol>,
        OnUnix<W>: TransportFor<F::Protocol>,
    {
        let wrap = self.wrap;
        match self.endpoint.among(listeners, name)? {
            Among::Tcp(it) => listeners.listen(reactor, name, it.layer(wrap), factory),
            Among::Unix(it) => listeners.listen(reactor, name, it.layer(wrap), factory),
        }
    }
}

impl<W, F> ListenWith<F> for LayeredServerEndpoint<W>
where
    W: Wrap<TcpSocket> + Wrap<UnixSocket>,
    F: Factory,
    OnTcp<W>: TransportFor<F::Protocol>,
    OnUnix<W>: TransportFor<F::Protocol>,
{
    type Handle = ListenerHandle;
    type Error = io::Error;

    fn listen_with(self, reactor: &mut Reactor, factory: F) -> io::Result<ListenerHandle> {
        let wrap = self.wrap;
        Ok(match self.endpoint.found()? {
            Found::Tcp(it) => reactor.listen(it.layer(wrap), factory)?,
            Found::Unix(it) => reactor.listen(it.layer(wrap), factory)?,
            Found::ListeningTcp(fd) => reactor.listen(Tcp::listening(fd).layer(wrap), factory)?,
            Found::ListeningUnix(fd) => reactor.listen(Unix::listening(fd).layer(wrap), factory)?,
        })
    }
}

/// Returns the address at which it listens, if it does.
fn listening_address(fd: &OwnedFd) -> io::Result<Address> {
    let found = describe_socket(fd.as_fd())?;
    match found.address {
        Some(address) if found.is_stream && found.is_listening => Ok(address),
        _ => Err(no_listener()),
    }
}

fn no_listener() -> io::Error {
    let text = "the descriptor is no listening TCP or UNIX socket";
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

/// Returns the first of systemd's sockets that fits and was not taken.
fn granted_by_systemd(chosen: &Chosen) -> io::Result<OwnedFd> {
    let announced = announced_here().map_err(io::Error::other)?;
    let count = announced.len();
    let fits = |index: usize, name: &str| match chosen {
        Chosen::Name(wanted) => name == wanted,
        Chosen::Index(wanted) => index == *wanted as usize,
    };
    for (index, one) in announced.into_iter().enumerate() {
        if !fits(index, &one.name) {
            continue;
        }
        match take_granted(one.number) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            result => return result,
        }
    }
    let wanted = match chosen {
        Chosen::Name(name) => format!("named {name:?}"),
        Chosen::Index(index) => format!("number {index}"),
    };
    let text = format!("systemd has passed no socket {wanted} that is not taken, of {count}");
    Err(io::Error::new(io::ErrorKind::NotFound, text))
}

fn check_domain(fd: &OwnedFd, wanted: Option<Domain>) -> io::Result<()> {
    let found = match listening_address(fd)? {
        Address::Inet(SocketAddr::V4(_)) => Domain::Inet,
        Address::Inet(SocketAddr::V6(_)) => Domain::Inet6,
        _ => Domain::Unix,
    };
    if wanted.is_none_or(|wanted| wanted == found) {
        return Ok(());
    }
    let text = "the socket of systemd is of another domain";
    Err(io::Error::new(io::ErrorKind::InvalidInput, text))
}

fn tcp(arguments: &mut EndpointArguments, any: IpAddr) -> Result<TcpListen, EndpointError> {
    let host = match arguments
        .named("host")
        .or_else(|| arguments.named("interface"))
    {
        None if arguments.positional_left() > 1 => arguments.positional(),
        named => named,
    };
    let port: u16 = arguments.require("port")?.parse(PORT)?;
    let ip = match host {
        None => any,
        Some(host) if host.as_str().is_empty() => any,
        Some(host) => host.parse("IP address")?,
    };
    let mut endpoint = Tcp::at(SocketAddr::new(ip, port));
    if let Some(reuse) = arguments.named("reuseport") {
        endpoint = endpoint.reuse_port(parse_switch(&reuse)?);
    }
    if let Some(on) = arguments.named("nodelay") {
        endpoint = endpoint.no_delay(parse_switch(&on)?);
    }
    if let Some(on) = arguments.named("keepalive") {
        endpoint = endpoint.keep_alive(parse_switch(&on)?);
    }
    with_backlog(endpoint, arguments, TcpListen::backlog)
}

fn systemd(arguments: &mut EndpointArguments) -> Result<Place, EndpointError> {
    let domain = match arguments.named("domain") {
        None => None,
        Some(domain) => Some(match domain.as_str() {
            "INET" => Domain::Inet,
            "INET6" => Domain::Inet6,
            "UNIX" => Domain::Unix,
            _ => return Err(domain.error("domain is INET, INET6 or UNIX")),
        }),
    };
    let index = arguments.named("index");
    let name = arguments.take("name");
    let chosen = match (name, index) {
        (Some(name), None) => Chosen::Name(name.as_str().to_owned()),
        (None, Some(index)) => Chosen::Index(index.parse("index")?),
        (Some(_), Some(index)) => return Err(index.error("either name or index, not both")),
        (None, None) => return Err(arguments.error_at_end("name is missing, or index")),
    };
    Ok(Place::Systemd(chosen, domain))
}

fn with_backlog<E>(
    endpoint: E,
    arguments: &mut EndpointArguments,
    set: impl FnOnce(E, u32) -> E,
) -> Result<E, EndpointError> {
    match arguments.named("backlog") {
        None => Ok(endpoint),
        Some(backlog) => Ok(set(endpoint, backlog.parse("backlog")?)),
    }
}

fn parse_mode(mode: &EndpointArgument) -> Result<u32, EndpointError> {
    match u32::from_str_radix(mode.as_str(), 8) {
        Ok(bits) if bits <= 0o7777 => Ok(bits),
        _ => Err(mode.error(format!("{:?} is no mode in octal", mode.as_str()))),
    }
}

pub(super) fn parse_switch(switch: &EndpointArgument) -> Result<bool, EndpointError> {
    match switch.as_str() {
        "0" => Ok(false),
        "1" => Ok(true),
        _ => Err(switch.error("it is 0 or 1")),
    }
}

/// The kernel's limit, without the NUL at the end.
const LONGEST_PATH: usize = 107;

pub(super) fn check_path(path: &EndpointArgument) -> Result<(), EndpointError> {
    match path.as_str().len() {
        0 => Err(path.error("the path is empty")),
        length if length > LONGEST_PATH => {
            Err(path.error(format!("the path is longer than {LONGEST_PATH} bytes")))
        }
        _ => Ok(()),
    }
}

pub(super) fn abstract_name(
    arguments: &mut EndpointArguments,
) -> Result<UnixAddress, EndpointError> {
    let name = arguments.require("name")?;
    check_path(&name)?;
    Ok(UnixAddress::Abstract(name.as_str().into()))
}

/// Refuses the lock file of Twisted, which has one beside the socket, and an option for it.
pub(super) fn refuse_lockfile(arguments: &mut EndpointArguments) -> Result<(), EndpointError> {
    match arguments.named("lockfile") {
        None => Ok(()),
        Some(lockfile) => {
            Err(lockfile.error("there are no lock files: one owner is assured without"))
        }
    }
}
