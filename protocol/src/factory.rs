//! What builds protocols, and what it is built for.

use std::borrow::Cow;
use std::cell::RefCell;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use bowline_reactor::{Handle, Reactor};

use crate::address::{Address, Destination};
use crate::error::ConnectError;
use crate::protocol::{Protocol, short_type_name};
use crate::reason::CloseReason;
use crate::transport::{Credentials, Transport};

/// The name of a listener; see [`Reactor::get`].
pub type ListenerHandle = Handle<dyn Listener>;

/// The name of a connector; see [`Reactor::get`].
pub type ConnectorHandle = Handle<dyn Connector>;

/// Builds the protocol of each connection of a listener or connector, and is
/// told of their lives.
///
/// A closure `FnMut(&Address) -> P` is a factory. Write its parameter with the type,
/// `|_: &Address| Echo`. With `|_| Echo` the compiler takes it for a closure over one
/// lifetime, and says that it is "not general enough".
///
/// A factory that several listeners share is an `Rc<RefCell<F>>`. It is borrowed for
/// the time of its callbacks only.
#[diagnostic::on_unimplemented(
    message = "`{Self}` does not build protocols over `{T}`",
    note = "a closure is a factory if its parameter has its type, `|_: &Address| Echo`, and \
            what it answers is a protocol over `{T}`",
    note = "a receiver of frames becomes a protocol with `Framed::new(framer, receiver)`"
)]
pub trait Factory<T: Transport>: 'static {
    /// What it builds.
    type Protocol: Protocol<T>;

    /// Builds the protocol for a connection with `peer`. `None` declines: the
    /// connection is closed and nothing else happens.
    ///
    /// The protocol's `connection_made` follows after this callback. A panic
    /// costs this connection only.
    fn build_protocol(
        &mut self,
        cx: &mut BuildContext<'_>,
        peer: &Address,
    ) -> Option<Self::Protocol>;

    /// The listener listens, or the connector starts an attempt. For a
    /// connector: once for each attempt, before anything else. (Twisted:
    /// `doStart`, `startedConnecting`.)
    fn started(&mut self, cx: &mut BuildContext<'_>) {
        let _ = cx;
    }

    /// The listener has closed, or the connector is given up: after this
    /// nothing more is called.
    fn stopped(&mut self, cx: &mut BuildContext<'_>) {
        let _ = cx;
    }

    /// The connector's attempt failed. It may
    /// [`connect`](Connector::connect) again, at once or
    /// [later](Connector::connect_after).
    fn connection_failed(&mut self, cx: &mut BuildContext<'_>, error: &ConnectError) {
        let _ = (cx, error);
    }

    /// The connector's connection has ended, and its protocol has been told. It
    /// may [`connect`](Connector::connect) again, at once or
    /// [later](Connector::connect_after).
    fn connection_lost(&mut self, cx: &mut BuildContext<'_>, reason: &CloseReason) {
        let _ = (cx, reason);
    }

    /// What log lines call this factory; the name of its type by default, and of
    /// a closure that of its protocol's.
    fn log_prefix(&self) -> Cow<'_, str> {
        Cow::Borrowed(short_type_name::<Self>())
    }
}

/// Takes the sockets that a listener accepts, as they are: no transport is put
/// on them, nothing is read, and the reactor does not watch them.
///
/// For programs that accept here and serve elsewhere: they pass each socket to
/// another process. A closure `FnMut(&mut BuildContext, OwnedFd, &Address)` is
/// an acceptor; one that several listeners share is an `Rc<RefCell<A>>`.
pub trait Acceptor: 'static {
    /// A connection of `peer` was accepted: `socket` is non-blocking and
    /// close-on-exec, and the connection ends when it is dropped. A panic costs
    /// this connection only.
    ///
    /// An acceptor that cannot get rid of them fast enough
    /// [pauses](Listener::pause_accepting) the listener.
    fn accepted(&mut self, cx: &mut BuildContext<'_>, socket: OwnedFd, peer: &Address);

    /// The listener listens.
    fn started(&mut self, cx: &mut BuildContext<'_>) {
        let _ = cx;
    }

    /// The listener has closed: after this nothing more is called.
    fn stopped(&mut self, cx: &mut BuildContext<'_>) {
        let _ = cx;
    }
}

/// What a factory's or acceptor's callback can reach: the listener or connector
/// it belongs to, and the reactor.
pub struct BuildContext<'a> {
    /// Who asks.
    pub origin: Origin<'a>,
    /// The reactor.
    pub reactor: &'a mut Reactor,
}

/// Whom a factory builds for.
pub enum Origin<'a> {
    /// A listener, for an accepted connection.
    Listener(&'a mut dyn Listener),
    /// A connector, for an outgoing one.
    Connector(&'a mut dyn Connector),
}

impl BuildContext<'_> {
    /// The listener, for an accepted connection.
    pub fn listener(&mut self) -> Option<&mut dyn Listener> {
        match &mut self.origin {
            Origin::Listener(listener) => Some(&mut **listener),
            Origin::Connector(_) => None,
        }
    }

    /// The connector, for an outgoing connection.
    pub fn connector(&mut self) -> Option<&mut dyn Connector> {
        match &mut self.origin {
            Origin::Listener(_) => None,
            Origin::Connector(connector) => Some(&mut **connector),
        }
    }
}

impl fmt::Debug for BuildContext<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("BuildContext");
        match &self.origin {
            Origin::Listener(listener) => debug.field("listener", &listener.address()),
            Origin::Connector(connector) => debug.field("connector", &connector.destination()),
        };
        debug.finish_non_exhaustive()
    }
}

impl fmt::Debug for Origin<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Listener(listener) => f
                .debug_tuple("Listener")
                .field(&listener.address())
                .finish(),
            Self::Connector(connector) => f
                .debug_tuple("Connector")
                .field(&connector.destination())
                .finish(),
        }
    }
}

/// A socket that accepts connections.
pub trait Listener: 'static {
    /// Where it listens: the real port, where port 0 was asked for.
    fn address(&self) -> Address;

    /// Accepts nothing from now on, and closes after the running callback. What
    /// it accepted before stays. (Twisted: `stopListening`.)
    fn stop_listening(&mut self);

    /// Leaves new connections waiting in the kernel's queue.
    fn pause_accepting(&mut self);

    /// Whose process has connected, while a protocol is built for it
    /// ([`build_protocol`](Factory::build_protocol)): of a UNIX socket, one system
    /// call.
    ///
    /// # Errors
    ///
    /// `Unsupported` where no protocol is being built, and where this is not known:
    /// over TCP.
    fn peer_credentials(&self) -> io::Result<Credentials> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Says a word to the client that is declined next, if the running
    /// [`build_protocol`](Factory::build_protocol) answers `None`: it is sent, with
    /// the end behind it. What the client sends is read and dropped for a second at
    /// the most, so that it has the time to read. Of those who are declined while 64
    /// have that time the connection is closed at once, without a word.
    fn decline_with(&mut self, word: &[u8]) {
        let _ = word;
    }

    /// Accepts again, unless somebody [holds](Self::hold_accepting) it.
    fn resume_accepting(&mut self);

    /// Leaves new connections waiting, beside [`pause_accepting`](Self::pause_accepting)
    /// and for a reason of one's own: for layers around a factory, and for whoever
    /// hands listeners over. It lasts until
    /// [released](Self::release_accepting) as often as it was held, whatever the
    /// program pauses and resumes meanwhile.
    fn hold_accepting(&mut self);

    /// Takes one [hold](Self::hold_accepting) back.
    fn release_accepting(&mut self);

    /// Accepts what waits in the kernel's queue, and then closes. To be asked of
    /// a listener that another process has taken over: what came before is
    /// served here, and nothing that comes later waits for us.
    ///
    /// Ends an earlier [pause](Self::pause_accepting), and disregards
    /// [holds](Self::hold_accepting).
    fn stop_listening_when_drained(&mut self);

    /// Whether it was not told to stop.
    fn is_listening(&self) -> bool;

    /// The file that is removed when this listener closes, while it is ours;
    /// `None` for listeners without one, and for those that were adopted.
    ///
    /// It is removed before the socket is closed, if it still stands at its path: a
    /// socket that is open has its file's number to itself. A process that was forked
    /// from the one that made it or [owned](Self::own_socket_file) it last leaves it
    /// alone; one that goes on in its place owns it first.
    fn socket_file(&self) -> Option<SocketFile>;

    /// Leaves the file where it is from now on, for somebody else who
    /// [owns](Self::own_socket_file) it.
    fn disown_socket_file(&mut self);

    /// Has the file of an adopted listener removed when this listener closes, in this
    /// process, unless another has taken its place by then. Its owner before has to
    /// [disown](Self::disown_socket_file) it.
    ///
    /// # Errors
    ///
    /// `InvalidInput` where this listener has no path; `NotFound` and
    /// `AlreadyExists` where another file stands there, or none: it is not
    /// owned then.
    fn own_socket_file(&mut self, file: SocketFile) -> io::Result<()>;

    /// Another descriptor of the same socket, to be passed to another process
    /// while this one goes on.
    ///
    /// # Errors
    ///
    /// Those of fcntl(2): `EMFILE`; `NotConnected` once closed.
    fn duplicate(&self) -> io::Result<OwnedFd>;

    /// Says that no other process holds this listener, nor will.
    ///
    /// One that was adopted or [duplicated](Self::duplicate) is taken to be held by
    /// others too. They may make it block, and accept4(2) cannot be told not to; so
    /// each one is preceded by a poll(2), some 2 % of what a connection costs that
    /// comes and goes. Where this is said and not true, another holder can block
    /// the loop until a client comes.
    fn assume_sole_holder(&mut self);

    /// This listener's name.
    fn handle(&self) -> ListenerHandle;
}

/// Which file a UNIX listener made: its path may have come to lead to
/// another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SocketFile {
    /// The device of its file system.
    pub device: u64,
    /// Its number there.
    pub inode: u64,
}

/// An outgoing connection: one attempt at a time, and the connection that
/// comes of it.
///
/// It stays registered, so that it can connect again, for as long as there is
/// an attempt or a connection, or its factory's callback asks for another, now
/// or later.
pub trait Connector: 'static {
    /// Where it connects to, as it was asked.
    fn destination(&self) -> Destination;

    /// Where it stands.
    fn state(&self) -> ConnectorState;

    /// Starts another attempt, after the running callback. Nothing happens
    /// unless it is [disconnected](ConnectorState::Disconnected) or
    /// [waits](ConnectorState::Waiting), whose wait is over then.
    fn connect(&mut self);

    /// Starts another attempt once `delay` has passed; meanwhile it [waits](ConnectorState::Waiting). Replaces
    /// what was asked before. Nothing happens where [`connect`](Self::connect)
    /// would do nothing.
    fn connect_after(&mut self, delay: Duration);

    /// Gives up: for the attempt that runs,
    /// [`connection_failed`](Factory::connection_failed) follows with
    /// [`ConnectError::Cancelled`]; the wait for the next one ends, and
    /// [`stopped`](Factory::stopped) follows. A connection stays.
    fn stop_connecting(&mut self);

    /// Whether the last thing that was asked of it is to
    /// [give up](Self::stop_connecting), in
    /// [`connection_failed`](Factory::connection_failed) or
    /// [`connection_lost`](Factory::connection_lost) too, where nothing runs that
    /// could be given up. For layers that connect again by themselves, which it
    /// ends.
    fn was_told_to_stop(&self) -> bool;

    /// This connector's name.
    fn handle(&self) -> ConnectorHandle;
}

/// Where a connector stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectorState {
    /// No attempt, no connection.
    Disconnected,
    /// The next attempt is to come after a delay.
    Waiting,
    /// An attempt runs.
    Connecting,
    /// Its connection is there.
    Connected,
}

impl<T, P, F> Factory<T> for F
where
    T: Transport,
    P: Protocol<T>,
    F: FnMut(&Address) -> P + 'static,
{
    type Protocol = P;

    fn build_protocol(&mut self, _: &mut BuildContext<'_>, peer: &Address) -> Option<P> {
        Some(self(peer))
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        Cow::Borrowed(short_type_name::<P>())
    }
}

impl<T: Transport, F: Factory<T>> Factory<T> for Rc<RefCell<F>> {
    type Protocol = F::Protocol;

    fn build_protocol(
        &mut self,
        cx: &mut BuildContext<'_>,
        peer: &Address,
    ) -> Option<Self::Protocol> {
        self.borrow_mut().build_protocol(cx, peer)
    }

    fn started(&mut self, cx: &mut BuildContext<'_>) {
        self.borrow_mut().started(cx);
    }

    fn stopped(&mut self, cx: &mut BuildContext<'_>) {
        self.borrow_mut().stopped(cx);
    }

    fn connection_failed(&mut self, cx: &mut BuildContext<'_>, error: &ConnectError) {
        self.borrow_mut().connection_failed(cx, error);
    }

    fn connection_lost(&mut self, cx: &mut BuildContext<'_>, reason: &CloseReason) {
        self.borrow_mut().connection_lost(cx, reason);
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        Cow::Owned(self.borrow().log_prefix().into_owned())
    }
}

impl<A> Acceptor for A
where
    A: FnMut(&mut BuildContext<'_>, OwnedFd, &Address) + 'static,
{
    fn accepted(&mut self, cx: &mut BuildContext<'_>, socket: OwnedFd, peer: &Address) {
        self(cx, socket, peer);
    }
}

impl<A: Acceptor> Acceptor for Rc<RefCell<A>> {
    fn accepted(&mut self, cx: &mut BuildContext<'_>, socket: OwnedFd, peer: &Address) {
        self.borrow_mut().accepted(cx, socket, peer);
    }

    fn started(&mut self, cx: &mut BuildContext<'_>) {
        self.borrow_mut().started(cx);
    }

    fn stopped(&mut self, cx: &mut BuildContext<'_>) {
        self.borrow_mut().stopped(cx);
    }
}
