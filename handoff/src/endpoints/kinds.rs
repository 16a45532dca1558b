//! Kinds of endpoint that a program adds.

use std::fmt;
use std::io;
use std::rc::Rc;

use bowline_protocol::{ConnectorHandle, Factory, ListenerHandle, Protocol};
use bowline_reactor::Reactor;
use bowline_transport::{TcpStream, Transports, UnixStream};

use super::{ClientEndpoint, EndpointArguments, EndpointError, ServerEndpoint, client, server};

/// Makes endpoints of one kind out of strings, for factories of the type `F`. (Twisted:
/// `IStreamServerEndpointStringParser`, `IStreamClientEndpointStringParser`.)
///
/// Implement what the kind can do. By default a method returns an error that says that the
/// kind cannot do this.
pub trait EndpointFactory<F> {
    /// Listens where `arguments` say, and serves there with `factory`. Called once for each
    /// string of this kind. Take the arguments, and then call
    /// [`finish`](EndpointArguments::finish).
    ///
    /// # Errors
    ///
    /// The arguments are wrong, or listening failed.
    fn listen(
        &self,
        reactor: &mut Reactor,
        arguments: EndpointArguments,
        factory: F,
    ) -> Result<ListenerHandle, EndpointError> {
        let _ = (reactor, factory);
        Err(arguments.error_at_kind("one cannot listen at this kind of endpoint"))
    }

    /// Connects to where `arguments` say, as [`listen`](Self::listen) listens.
    ///
    /// # Errors
    ///
    /// The arguments are wrong, or connecting failed.
    fn connect(
        &self,
        reactor: &mut Reactor,
        arguments: EndpointArguments,
        factory: F,
    ) -> Result<ConnectorHandle, EndpointError> {
        let _ = (reactor, factory);
        Err(arguments.error_at_kind("one cannot connect to this kind of endpoint"))
    }
}

/// The kinds of endpoint that a program knows: those of this module, and its own. All are
/// served by factories of one type `F`. That is a function, for example, since each closure
/// has a type of its own.
///
/// # Examples
///
/// A kind `local`, which is a port of this machine:
///
/// ```
/// use bowline::endpoint::{
///     EndpointArguments, EndpointError, EndpointFactory, EndpointKinds,
/// };
/// use bowline::{
///     Address, Context, Factory, ListenerHandle, Protocol, Reactor, Tcp, TcpStream,
///     Transport, Transports,
/// };
///
/// struct Local;
///
/// impl<F: Factory<Protocol: Protocol<TcpStream>>> EndpointFactory<F> for Local {
///     fn listen(
///         &self,
///         reactor: &mut Reactor,
///         mut arguments: EndpointArguments,
///         factory: F,
///     ) -> Result<ListenerHandle, EndpointError> {
///         let port: u16 = arguments.require("port")?.parse("port")?;
///         arguments.finish()?;
///         let here = Tcp::at(([127, 0, 0, 1], port).into());
///         Ok(reactor.listen(here, factory).map_err(std::io::Error::from)?)
///     }
/// }
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
/// kinds.add("local", Local);
/// kinds.listen(&mut reactor, "local:0", echo)?;
/// kinds.listen(&mut reactor, "tcp:127.0.0.1:0", echo)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct EndpointKinds<F> {
    own: Vec<(String, Rc<dyn EndpointFactory<F>>)>,
}

impl<F: Factory<Protocol: Protocol<TcpStream> + Protocol<UnixStream>>> EndpointKinds<F> {
    /// Makes a list with the kinds of this module.
    pub fn new() -> Self {
        Self { own: Vec::new() }
    }

    /// Adds a kind, whose strings begin with `kind` and a colon. It replaces a kind of the
    /// same name.
    pub fn add(&mut self, kind: impl Into<String>, factory: impl EndpointFactory<F> + 'static) {
        let kind = kind.into();
        self.own.retain(|(known, _)| *known != kind);
        self.own.push((kind, Rc::new(factory)));
    }

    /// Listens at an endpoint of any of these kinds.
    ///
    /// # Errors
    ///
    /// The string is wrong, or listening failed.
    pub fn listen(
        &self,
        reactor: &mut Reactor,
        endpoint: &str,
        factory: F,
    ) -> Result<ListenerHandle, EndpointError> {
        let arguments = EndpointArguments::parse(endpoint)?;
        match self.find(arguments.kind()) {
            Some(own) => own.listen(reactor, arguments, factory),
            None => {
                let known = self.known(&server::KINDS);
                let endpoint = ServerEndpoint::of(arguments, &known)?;
                Ok(reactor.listen(endpoint, factory)?)
            }
        }
    }

    /// Connects to an endpoint of any of these kinds.
    ///
    /// # Errors
    ///
    /// The string is wrong, or connecting failed.
    pub fn connect(
        &self,
        reactor: &mut Reactor,
        endpoint: &str,
        factory: F,
    ) -> Result<ConnectorHandle, EndpointError> {
        let arguments = EndpointArguments::parse(endpoint)?;
        match self.find(arguments.kind()) {
            Some(own) => own.connect(reactor, arguments, factory),
            None => {
                let known = self.known(&client::KINDS);
                let endpoint = ClientEndpoint::of(arguments, &known)?;
                let connector: io::Result<_> = reactor.connect(endpoint, factory);
                Ok(connector?)
            }
        }
    }

    fn find(&self, kind: &str) -> Option<Rc<dyn EndpointFactory<F>>> {
        let found = self.own.iter().find(|(known, _)| known == kind);
        found.map(|(_, factory)| Rc::clone(factory))
    }

    fn known<'a>(&'a self, built_in: &[&'a str]) -> Vec<&'a str> {
        let own = self.own.iter().map(|(kind, _)| kind.as_str());
        built_in.iter().copied().chain(own).collect()
    }
}

impl<F: Factory<Protocol: Protocol<TcpStream> + Protocol<UnixStream>>> Default
    for EndpointKinds<F>
{
    fn default() -> Self {
        Self::new()
    }
}

impl<F> fmt::Debug for EndpointKinds<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds = self.own.iter().map(|(kind, _)| kind);
        f.debug_list().entries(kinds).finish()
    }
}
