//! The places where a reactor is shown.

use std::error::Error;
use std::fmt;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;

use bowline_protocol::policies::LimitConnections;
use bowline_protocol::{Address, ListenerHandle};
use bowline_reactor::Reactor;
use bowline_transport::{ListenError, Transports, Unix};

use crate::http::Browsers;
use crate::socket::Operators;

/// How many clients each place serves at once. Others are refused.
const MOST_CLIENTS: usize = 16;

/// Shows what is inside a reactor, until the reactor stops.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Inspector;

impl Inspector {
    /// Listens at `place`, which programs take as an option `--inspect PLACE`. A `place`
    /// with a slash in it is the path of a UNIX socket. Any other is an address for
    /// browsers, such as `127.0.0.1:9090` or `[::1]:0`, or a port of the loopback interface
    /// alone, `9090`. Returns the path, or the page's URL.
    ///
    /// # Errors
    ///
    /// [`InspectError`], if `place` is neither, or if it is not possible to listen there.
    pub fn at(reactor: &mut Reactor, place: &str) -> Result<String, InspectError> {
        if place.contains('/') {
            Self::on_socket(reactor, place)?;
            return Ok(place.to_owned());
        }
        let address = match place.parse::<u16>() {
            Ok(port) => SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
            Err(_) => place
                .parse()
                .map_err(|_| InspectError::Place(place.to_owned()))?,
        };
        Ok(Self::on_address(reactor, address)?.url())
    }

    /// Listens on a UNIX socket with mode 0600. Its clients send requests as lines of JSON.
    /// See [the crate's page](crate#the-socket). Clients of other users are refused, except
    /// root.
    ///
    /// # Errors
    ///
    /// Those of listening. It is `AddrInUse` if another process listens at the path. For
    /// programs that are restarted, see [`operators`](Self::operators).
    pub fn on_socket(
        reactor: &mut Reactor,
        path: impl AsRef<Path>,
    ) -> Result<ListenerHandle, InspectError> {
        let there = Unix::at(path.as_ref()).mode(0o600);
        Ok(reactor.listen(there, Self::operators())?)
    }

    /// Listens for browsers and for Prometheus. The page is at [`Page::url`], whose path is
    /// a secret of 128 bits. The endpoint for Prometheus is `metrics`, after the secret.
    ///
    /// What is sent is not encrypted. Use an address of the loopback interface, and a
    /// tunnel from elsewhere.
    ///
    /// # Errors
    ///
    /// Those of listening, and those of reading `/dev/urandom` for the secret.
    pub fn on_address(reactor: &mut Reactor, address: SocketAddr) -> Result<Page, InspectError> {
        Self::with_secret(reactor, address, Self::new_secret()?)
    }

    /// Listens like [`on_address`](Self::on_address), with a secret that the program
    /// provides, so that it stays the same over restarts. It has at least 16 letters and
    /// digits.
    ///
    /// # Errors
    ///
    /// [`InspectError::WeakSecret`], and those of listening.
    pub fn with_secret(
        reactor: &mut Reactor,
        address: SocketAddr,
        secret: String,
    ) -> Result<Page, InspectError> {
        let listener = reactor.listen_tcp(address, Self::browsers(&secret)?)?;
        let address = match reactor.get(listener).map(|it| it.address()) {
            Some(Address::Inet(address)) => address,
            _ => address,
        };
        Ok(Page {
            listener,
            address,
            secret,
        })
    }

    /// Returns the factory for the clients of a UNIX socket, for a program that listens by
    /// itself. A program that is restarted does so: its next process takes over the
    /// listener while this one still serves. Give the factory to `Listeners::listen` with
    /// `Unix::at(path).mode(0o600)`. It serves only UNIX connections, since it checks the
    /// user at the other end.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::io;
    /// use bowline::handoff::restart::{Listeners, Program};
    /// use bowline::inspect::Inspector;
    /// use bowline::{Reactor, Tcp, Unix};
    ///
    /// struct Server {
    ///     /// Of each process the same.
    ///     secret: String,
    /// }
    ///
    /// impl Program for Server {
    ///     fn listen(
    ///         &mut self,
    ///         reactor: &mut Reactor,
    ///         listeners: &mut Listeners<'_>,
    ///     ) -> io::Result<()> {
    ///         let socket = Unix::at("/run/web/inspect").mode(0o600);
    ///         listeners.listen(reactor, "inspect", socket, Inspector::operators())?;
    ///         let page = Tcp::at(([127, 0, 0, 1], 9090).into());
    ///         listeners.listen(reactor, "page", page, Inspector::browsers(&self.secret)?)?;
    ///         // ... and what it serves.
    ///         Ok(())
    ///     }
    /// }
    /// ```
    pub fn operators() -> LimitConnections<Operators> {
        LimitConnections::new(Operators::new()).total(Some(MOST_CLIENTS))
    }

    /// Returns the factory for browsers and Prometheus, for a program that listens by
    /// itself, like [`operators`](Self::operators). The page is at `/SECRET/`. When the
    /// next process serves, the page goes on in the browser if that process has the same
    /// secret. The secret has at least 16 letters and digits.
    ///
    /// # Errors
    ///
    /// [`InspectError::WeakSecret`].
    pub fn browsers(secret: &str) -> Result<LimitConnections<Browsers>, InspectError> {
        if secret.len() < 16 || !secret.bytes().all(|it| it.is_ascii_alphanumeric()) {
            return Err(InspectError::WeakSecret);
        }
        Ok(LimitConnections::new(Browsers::new(secret)).total(Some(MOST_CLIENTS)))
    }

    /// Returns a random secret of 128 bits for [`browsers`](Self::browsers).
    ///
    /// # Errors
    ///
    /// Those of reading `/dev/urandom`.
    pub fn new_secret() -> Result<String, InspectError> {
        secret().map_err(InspectError::Secret)
    }
}

fn secret() -> io::Result<String> {
    let mut bytes = [0; 16];
    io::Read::read_exact(&mut fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The page that an [`Inspector`] serves.
#[derive(Clone)]
#[non_exhaustive]
pub struct Page {
    /// The listener for its browsers.
    pub listener: ListenerHandle,
    address: SocketAddr,
    secret: String,
}

impl Page {
    /// Returns its URL, with the secret.
    pub fn url(&self) -> String {
        format!("http://{}/{}/", self.address, self.secret)
    }

    /// Returns the address at which it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl fmt::Debug for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Page")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

/// Why an [`Inspector`] could not be started.
#[derive(Debug)]
#[non_exhaustive]
pub enum InspectError {
    /// The place is neither a path nor an address.
    Place(String),
    /// It cannot listen there.
    Listen(ListenError),
    /// No random secret could be made.
    Secret(io::Error),
    /// The secret is too short, or contains characters other than letters and digits.
    WeakSecret,
}

impl From<ListenError> for InspectError {
    fn from(error: ListenError) -> Self {
        Self::Listen(error)
    }
}

impl From<InspectError> for io::Error {
    fn from(error: InspectError) -> Self {
        let kind = match &error {
            InspectError::Listen(ListenError { error, .. }) | InspectError::Secret(error) => {
                error.kind()
            }
            InspectError::Place(_) | InspectError::WeakSecret => io::ErrorKind::InvalidInput,
        };
        Self::new(kind, error)
    }
}

impl fmt::Display for InspectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Place(place) => write!(f, "{place:?} is neither a path nor an address"),
            Self::Listen(error) => write!(f, "cannot listen for those who inspect: {error}"),
            Self::Secret(error) => write!(f, "cannot make a secret: {error}"),
            Self::WeakSecret => {
                f.write_str("the secret has to be 16 letters and digits, or more of them")
            }
        }
    }
}

impl Error for InspectError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Listen(error) => Some(error),
            Self::Secret(error) => Some(error),
            Self::Place(_) | Self::WeakSecret => None,
        }
    }
}
