//! What the examples share: the command line and addresses.

// Each example uses a part of it.
#![allow(dead_code)]

use std::env;
use std::error::Error;
use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::net::SocketAddr;
use std::process::Command;
use std::str::FromStr;
use std::time::Duration;

use bowline::endpoint::{EndpointArguments, EndpointError, ServerEndpoint};
use bowline::endpoint::{LayeredServerEndpoint, ListenWith};
use bowline::handoff::restart::Listeners;
use bowline::inspect::Inspector;
use bowline::layers::{LayerState, Stream, TcpSocket, UnixSocket};
use bowline::tls::{Certificates, TICKET_KEY_BYTES, TicketKey, Tickets, Tls, TlsEndpoints};
use bowline::tls::{TlsServer, server_config_builder};
use bowline::{Factory, ListenerHandle, Protocol, Reactor, Transports};
use bowline::{Tcp, TcpStream, Unix, UnixStream};

/// How long those wait that stop with their children, or restart.
pub(crate) const STOP_DEADLINE: Duration = Duration::from_secs(5);

/// What `main` returns: any error ends the program with its text.
pub(crate) type Result<T = ()> = std::result::Result<T, Failure>;

/// Any error, shown as its text: `main` prints the debug form.
pub(crate) struct Failure(Box<dyn Error>);

impl<E: Into<Box<dyn Error>>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The command line: `--name VALUE` and `--flag`.
pub(crate) struct Arguments {
    left: Vec<String>,
}

impl Arguments {
    /// Reads the command line; for `--help` prints `help` and exits.
    pub(crate) fn parse(help: &str) -> Self {
        let left: Vec<_> = env::args().skip(1).collect();
        // What stands behind `--` is for somebody else.
        let mut own = left.iter().take_while(|argument| *argument != "--");
        if own.any(|argument| argument == "--help") {
            println!("{}", help.trim());
            std::process::exit(0);
        }
        Self { left }
    }

    /// Takes `--name VALUE`, if it is there.
    pub(crate) fn option<T: FromStr>(&mut self, name: &str) -> Result<Option<T>>
    where
        T::Err: fmt::Display,
    {
        let Some(position) = self.left.iter().position(|argument| argument == name) else {
            return Ok(None);
        };
        self.left.remove(position);
        if position == self.left.len() {
            return Err(format!("{name} needs a value").into());
        }
        let value = self.left.remove(position);
        let parsed = value.parse();
        Ok(Some(
            parsed.map_err(|error| format!("{name} {value}: {error:#}"))?,
        ))
    }

    /// Takes `--tls CERT KEY`, if it is there.
    pub(crate) fn tls_files(&mut self) -> Result<Option<[String; 2]>> {
        let Some(position) = self.left.iter().position(|argument| argument == "--tls") else {
            return Ok(None);
        };
        let Some([_, certificates, key]) = self.left.get(position..position + 3) else {
            return Err("--tls needs CERT and KEY, two PEM files".into());
        };
        let files = [certificates.clone(), key.clone()];
        self.left.drain(position..position + 3);
        Ok(Some(files))
    }

    /// The same, as what is put on an endpoint.
    pub(crate) fn tls(&mut self) -> Result<Option<TlsServer>> {
        match self.tls_files()? {
            Some([certificates, key]) => Ok(Some(TlsServer::from_pem_files(certificates, key)?)),
            None => Ok(None),
        }
    }

    /// Takes `--name`; whether it was there.
    pub(crate) fn flag(&mut self, name: &str) -> bool {
        let before = self.left.len();
        self.left.retain(|argument| argument != name);
        self.left.len() < before
    }

    /// Takes what stands behind `--`.
    pub(crate) fn rest(&mut self) -> Vec<String> {
        match self.left.iter().position(|argument| argument == "--") {
            Some(position) => self.left.split_off(position).split_off(1),
            None => Vec::new(),
        }
    }

    /// Nothing may be left over.
    pub(crate) fn finish(self) -> Result {
        match self.left.first() {
            None => Ok(()),
            Some(argument) => Err(format!("unknown argument {argument}; try --help").into()),
        }
    }
}

/// What the workers of a pool speak TLS with: a certificate with its key, in files, and
/// tickets that are of all of them, so that a client's session goes on at whichever it
/// gets to.
pub(crate) struct WorkersTls {
    files: [String; 2],
    tickets: TicketKey,
    /// Of this process, which only looks whether its workers can go on with a connection.
    look: TlsServer,
}

impl WorkersTls {
    pub(crate) fn new(files: [String; 2]) -> Result<Self> {
        // What is wrong with them is said now, and not by each worker.
        let look = TlsServer::from_pem_files(&files[0], &files[1])?;
        let tickets = TicketKey::generate()?;
        Ok(Self {
            files,
            tickets,
            look,
        })
    }

    /// Whether workers can go on with a connection of the process before.
    #[allow(dead_code, reason = "used where connections move")]
    pub(crate) fn can_resume(&self, state: &LayerState) -> bool {
        self.look.can_resume(state)
    }

    /// Has a worker that is about to start be given it. A secret goes neither through
    /// arguments nor through the environment, which others can read.
    pub(crate) fn give(&self, command: &mut Command) -> io::Result<()> {
        let (reader, mut writer) = io::pipe()?;
        writer.write_all(&self.tickets.to_bytes())?;
        command.arg("--tls").args(&self.files).stdin(reader);
        Ok(())
    }

    /// In the worker: what was given.
    pub(crate) fn received([certificates, key]: &[String; 2]) -> Result<TlsServer> {
        let certificates = Certificates::from_pem_files(certificates, key)?;
        let mut config = server_config_builder()
            .with_no_client_auth()
            .with_cert_resolver(certificates.resolver());
        let mut tickets = [0; TICKET_KEY_BYTES];
        io::stdin().read_exact(&mut tickets)?;
        config.ticketer = Tickets::new(TicketKey::from_bytes(&tickets)).ticketer();
        // Where a connection is given a ticket, it moves when the program is restarted.
        Ok(TlsServer::new(config).may_move(true))
    }
}

/// Where to listen: any endpoint, in the clear or with TLS.
pub(crate) enum Endpoint {
    Plain(ServerEndpoint),
    Secured(LayeredServerEndpoint<TlsServer>),
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> std::result::Result<Self, EndpointError> {
        let arguments = EndpointArguments::parse(text)?;
        match arguments.kind() {
            "tls" => TlsEndpoints::server_endpoint(arguments).map(Self::Secured),
            _ => text.parse().map(Self::Plain),
        }
    }
}

/// What serves every kind of connection that an [`Endpoint`] has.
pub(crate) trait Serves:
    Factory<
    Protocol: Protocol<TcpStream>
                  + Protocol<UnixStream>
                  + Protocol<Stream<Tls<TcpSocket>>>
                  + Protocol<Stream<Tls<UnixSocket>>>,
>
{
}

impl<F> Serves for F where
    F: Factory<
        Protocol: Protocol<TcpStream>
                      + Protocol<UnixStream>
                      + Protocol<Stream<Tls<TcpSocket>>>
                      + Protocol<Stream<Tls<UnixSocket>>>,
    >
{
}

impl Endpoint {
    /// Takes `--listen ENDPOINT`, and `--tls CERT KEY` if it is there: then it is with TLS.
    pub(crate) fn take(arguments: &mut Arguments) -> Result<Option<Self>> {
        let endpoint: Option<Self> = arguments.option("--listen")?;
        let tls = arguments.tls()?;
        if matches!((&endpoint, &tls), (Some(Self::Secured(_)), Some(_))) {
            return Err("either tls: or --tls, please".into());
        }
        Ok(endpoint.map(|endpoint| endpoint.layered(tls.as_ref())))
    }

    /// With this on its connections, if it is there and nothing else is on them.
    pub(crate) fn layered(self, tls: Option<&TlsServer>) -> Self {
        match (self, tls) {
            (Self::Plain(endpoint), Some(tls)) => Self::Secured(endpoint.layer(tls.clone())),
            (other, _) => other,
        }
    }

    pub(crate) fn listen_among<F: Serves>(
        self,
        listeners: &mut Listeners<'_>,
        reactor: &mut Reactor,
        name: &str,
        factory: F,
    ) -> io::Result<ListenerHandle> {
        match self {
            Self::Plain(endpoint) => endpoint.listen_among(listeners, reactor, name, factory),
            Self::Secured(endpoint) => endpoint.listen_among(listeners, reactor, name, factory),
        }
    }
}

impl<F: Serves> ListenWith<F> for Endpoint {
    type Handle = ListenerHandle;
    type Error = io::Error;

    fn listen_with(self, reactor: &mut Reactor, factory: F) -> io::Result<ListenerHandle> {
        match self {
            Self::Plain(endpoint) => reactor.listen(endpoint, factory),
            Self::Secured(endpoint) => reactor.listen(endpoint, factory),
        }
    }
}

/// Where to show what is inside: `--inspect PATH|ADDRESS`, a UNIX socket or a page.
///
/// The page has a secret in its path: a new one each time, or that of the environment
/// (`INSPECT_SECRET`), which other users cannot read. Then it goes on over restarts.
pub(crate) struct Inspect {
    place: String,
}

const INSPECT_SECRET: &str = "INSPECT_SECRET";

impl Inspect {
    /// Takes `--inspect PLACE`, if it is there.
    pub(crate) fn take(arguments: &mut Arguments) -> Result<Option<Self>> {
        let place = arguments.option("--inspect")?;
        Ok(place.map(|place| Self { place }))
    }

    /// Shows it from now on, and says on standard error where.
    pub(crate) fn show(this: Option<&Self>, reactor: &mut Reactor) -> io::Result<()> {
        let Some(Self { place }) = this else {
            return Ok(());
        };
        let place = match (env::var(INSPECT_SECRET), place.parse()) {
            (Ok(secret), Ok(address)) => Inspector::with_secret(reactor, address, secret)?.url(),
            _ => Inspector::at(reactor, place)?,
        };
        Self::say(&place);
        Ok(())
    }

    /// The same for a program that is restarted: the listener goes to the next process.
    pub(crate) fn show_among(
        this: Option<&Self>,
        listeners: &mut Listeners<'_>,
        reactor: &mut Reactor,
    ) -> io::Result<()> {
        let Some(Self { place }) = this else {
            return Ok(());
        };
        if place.contains('/') {
            let socket = Unix::at(place.as_str()).mode(0o600);
            listeners.listen(reactor, "inspect", socket, Inspector::operators())?;
            Self::say(place);
            return Ok(());
        }
        let wrong = |_| io::Error::other(format!("--inspect {place}: neither path nor address"));
        let address: SocketAddr = place.parse().map_err(wrong)?;
        let secret = match env::var(INSPECT_SECRET) {
            Ok(secret) => secret,
            Err(_) => Inspector::new_secret()?,
        };
        let browsers = Inspector::browsers(&secret)?;
        let listener = listeners.listen(reactor, "inspect", Tcp::at(address), browsers)?;
        if let Some(listener) = reactor.get(listener) {
            Self::say(&format!("http://{}/{secret}/", listener.address()));
        }
        Ok(())
    }

    /// Standard output is for others, and its reader may be gone.
    fn say(place: &str) {
        let _ = writeln!(io::stderr(), "look inside at {place}");
    }
}

/// Prints where `listener` listens: the real port, where port 0 was asked for.
/// To be called last, as whoever reads it may send a signal at once.
pub(crate) fn print_address(reactor: &mut Reactor, listener: ListenerHandle) {
    if let Some(listener) = reactor.get(listener) {
        println!("listening on {}", listener.address());
    }
}
