//! Where what is inside is shown.

use std::error::Error;
use std::fmt;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::Path;

use bowline_protocol::policies::LimitConnections;
use bowline_protocol::{Address, ListenerHandle};
use bowline_reactor::Reactor;
use bowline_transport::{ListenError, Transports, Unix};

use crate::http::Browsers;
use crate::socket::Operators;

/// How many clients each place serves at once. More are turned away.
const MOST_CLIENTS: usize = 16;

/// Shows what is inside a reactor, from now on until that stops.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Inspector;

impl Inspector {
    /// Shows it where `place` says: `path` of a UNIX socket if there is a slash in it, or
    /// else an address such as `127.0.0.1:9090` or `[::1]:0`. That is what programs take as
    /// `--inspect PLACE`. Answers where it is: the path, or the page's URL.
    ///
    /// # Errors
    ///
    /// [`InspectError`], if the place makes no sense or cannot be had.
    pub fn at(reactor: &mut Reactor, place: &str) -> Result<String, InspectError> {
        if place.contains('/') {
            Self::on_socket(reactor, place)?;
            return Ok(place.to_owned());
        }
        let address = place
            .parse()
            .map_err(|_| InspectError::Place(place.to_owned()))?;
        Ok(Self::on_address(reactor, address)?.url())
    }

    /// Listens on a UNIX socket of the mode 0600, whose clients ask by lines of JSON. See
    /// [the crate's page](crate#the-socket). Clients of other users are refused, except
    /// root.
    ///
    /// # Errors
    ///
    /// Those of listening. Where another process listens at the path, that is
    /// `AddrInUse`; for programs that are restarted see [`operators`](Self::operators).
    pub fn on_socket(
        reactor: &mut Reactor,
        path: impl AsRef<Path>,
    ) -> Result<ListenerHandle, InspectError> {
        let there = Unix::at(path.as_ref()).mode(0o600);
        Ok(reactor.listen(there, Self::operators())?)
    }

    /// Listens for browsers and for Prometheus. The page is at [`Page::url`], whose path is
    /// a secret of 128 bits; `metrics` behind it is the endpoint of Prometheus.
    ///
    /// What is sent is not encrypted. Use an address of the loopback interface, and a
    /// tunnel from elsewhere.
    ///
    /// # Errors
    ///
    /// Those of listening, and of finding a secret (getrandom(2), as `/dev/urandom`).
    pub fn on_address(reactor: &mut Reactor, address: SocketAddr) -> Result<Page, InspectError> {
        Self::with_secret(reactor, address, Self::new_secret()?)
    }

    /// As [`on_address`](Self::on_address), with a secret of the program's own, which
    /// stays the same over restarts: at least 16 letters and digits.
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

    /// What serves the clients of a UNIX socket, for a program that listens by itself: one
    /// that is restarted, whose next process takes over the listener while this one still
    /// serves. Give it to `Listeners::listen` with `Unix::at(path).mode(0o600)`. It serves
    /// UNIX connections only, since it asks who is there.
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

    /// What serves browsers and Prometheus, for a program that listens by itself, as
    /// [`operators`](Self::operators). The page is at `/SECRET/`, and goes on in the
    /// browser when the next process serves, if that has the same secret: at least 16
    /// letters and digits.
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

    /// A secret for [`browsers`](Self::browsers), of 128 bits.
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

/// The page of an [`Inspector`].
#[derive(Clone)]
#[non_exhaustive]
pub struct Page {
    /// Who listens for its browsers.
    pub listener: ListenerHandle,
    address: SocketAddr,
    secret: String,
}

impl Page {
    /// Where it is, with the secret.
    pub fn url(&self) -> String {
        format!("http://{}/{}/", self.address, self.secret)
    }

    /// The address.
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

/// Why an [`Inspector`] shows nothing.
#[derive(Debug)]
#[non_exhaustive]
pub enum InspectError {
    /// This is neither a path nor an address.
    Place(String),
    /// It cannot listen there.
    Listen(ListenError),
    /// No secret could be found.
    Secret(io::Error),
    /// The secret is short, or has other characters than letters and digits.
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
