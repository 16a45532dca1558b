//! Factories, which build protocols, and the listeners and connectors they build for.

use std::borrow::Cow;
use std::cell::RefCell;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use bowline_reactor::{Description, Handle, Reactor};

use crate::address::{Address, Destination};
use crate::error::ConnectError;
use crate::protocol::short_type_name;
use crate::reason::CloseReason;
use crate::transport::Credentials;

/// The name of a listener; see [`Reactor::get`].
pub type ListenerHandle = Handle<dyn Listener>;

/// The name of a connector; see [`Reactor::get`].
pub type ConnectorHandle = Handle<dyn Connector>;

/// Builds the protocol of each connection of a listener or connector. It is also told
/// when the listener or connector begins and ends.
///
/// One trait serves connections of every sort: what it builds is a
/// [`Protocol`](crate::Protocol) for streams, and a
/// [`PacketProtocol`](crate::PacketProtocol) for packets. `listen` and `connect` ask for
/// the right one. So layers around a factory serve both.
///
/// A closure `FnMut(&Address) -> P` is a factory. Write its parameter with the type,
/// `|_: &Address| Echo`. With `|_| Echo` the compiler takes it for a closure over one
/// lifetime, and says that it is "not general enough".
///
/// To share a factory between several listeners, use an `Rc<RefCell<F>>`. It is
/// borrowed only while its callbacks run.
#[diagnostic::on_unimplemented(
    message = "`{Self}` does not build protocols",
    note = "a closure is a factory if its parameter has its type, `|_: &Address| Echo`",
    note = "a receiver of frames becomes a protocol with `Framed::new(framer, receiver)`"
)]
pub trait Factory: 'static {
    /// The protocol that it builds.
    type Protocol: 'static;

    /// Builds the protocol for a connection with `peer`. `None` declines: the
    /// connection is closed and nothing else happens.
    ///
    /// The protocol's `connection_made` is called after this has returned. A panic
    /// costs only this connection.
    fn build_protocol(
        &mut self,
        cx: &mut BuildContext<'_>,
        peer: &Address,
    ) -> Option<Self::Protocol>;

    /// The listener listens, or the connector starts an attempt. For a connector it is
    /// called once for each attempt, before anything else. (Twisted: `doStart`,
    /// `startedConnecting`.)
    fn started(&mut self, cx: &mut BuildContext<'_>) {
        let _ = cx;
    }

    /// The listener has closed, or the connector has given up. Nothing more is called
    /// after this.
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

    /// Adds what the factory says of itself to who
    /// [looks into](bowline_reactor::Reactor::descriptors) the reactor, behind what the
    /// listener or connector says. By default that is nothing. A layer around a factory
    /// adds a section of its own, and then has the inner factory describe itself.
    fn describe(&self, description: &mut Description) {
        let _ = description;
    }

    /// The name of this factory in log lines. By default it is the name of its type; for
    /// a closure, the name of its protocol's type.
    fn log_prefix(&self) -> Cow<'_, str> {
        Cow::Borrowed(short_type_name::<Self>())
    }
}

/// Takes the sockets that a listener accepts, as they are: no transport is put
/// on them, nothing is read, and the reactor does not watch them.
///
/// For programs that accept here and serve elsewhere: they pass each socket to
/// another process. A closure `FnMut(&mut BuildContext, OwnedFd, &Address)` is
/// an acceptor. To share one between several listeners, use an `Rc<RefCell<A>>`.
pub trait Acceptor: 'static {
    /// A connection with `peer` was accepted. `socket` is non-blocking and
    /// close-on-exec. Dropping it ends the connection. A panic costs only this
    /// connection.
    ///
    /// An acceptor that cannot pass sockets on fast enough
    /// [pauses](Listener::pause_accepting) the listener.
    fn accepted(&mut self, cx: &mut BuildContext<'_>, socket: OwnedFd, peer: &Address);

    /// Whether it takes the sockets of a listener at this address. Asked once, before the
    /// listener accepts anything.
    ///
    /// # Errors
    ///
    /// The reason why it does not. There is no listener then, and
    /// `accept` answers with this error.
    fn suits(&self, address: &Address) -> io::Result<()> {
        let _ = address;
        Ok(())
    }

    /// The listener listens.
    fn started(&mut self, cx: &mut BuildContext<'_>) {
        let _ = cx;
    }

    /// The listener has closed. Nothing more is called after this.
    fn stopped(&mut self, cx: &mut BuildContext<'_>) {
        let _ = cx;
    }

    /// Adds what the acceptor says of itself, as [`Factory::describe`].
    fn describe(&self, description: &mut Description) {
        let _ = description;
    }
}

/// Everything a callback of a factory or acceptor can reach: the listener or connector
/// it belongs to, and the reactor.
pub struct BuildContext<'a> {
    /// The listener or connector.
    pub origin: Origin<'a>,
    /// The reactor.
    pub reactor: &'a mut Reactor,
}

/// The listener or connector that a factory builds for.
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
    /// The address where it listens. If port 0 was asked for, this has the real port.
    fn address(&self) -> Address;

    /// Accepts nothing from now on, and closes after the running callback.
    /// Connections that it accepted before stay. (Twisted: `stopListening`.)
    fn stop_listening(&mut self);

    /// Leaves new connections waiting in the kernel's queue.
    fn pause_accepting(&mut self);

    /// The process that has connected. Only inside
    /// [`build_protocol`](Factory::build_protocol), and only over a UNIX socket. One
    /// system call.
    ///
    /// # Errors
    ///
    /// `Unsupported` when no protocol is being built, and over TCP.
    fn peer_credentials(&self) -> io::Result<Credentials> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Sets a last word for the client, in case the running
    /// [`build_protocol`](Factory::build_protocol) answers `None` and so declines it.
    ///
    /// The word is sent, and the end of the stream behind it. For up to one second,
    /// what the client sends is read and dropped, so that the client has time to read
    /// the word. At most 64 declined clients have that time at once; further ones are
    /// closed without a word.
    fn decline_with(&mut self, word: &[u8]) {
        let _ = word;
    }

    /// Accepts again, unless somebody [holds](Self::hold_accepting) it.
    fn resume_accepting(&mut self);

    /// Leaves new connections waiting, independently of
    /// [`pause_accepting`](Self::pause_accepting). For layers around a factory, and for
    /// code that hands listeners over.
    ///
    /// Holds are counted: each has to be [released](Self::release_accepting). Pausing
    /// and resuming does not change them.
    fn hold_accepting(&mut self);

    /// Takes one [hold](Self::hold_accepting) back.
    fn release_accepting(&mut self);

    /// Accepts the clients that wait in the kernel's queue, and then closes. For a
    /// listener that another process has taken over: clients that came before are
    /// served here, and none that comes later waits for us.
    ///
    /// Ends an earlier [pause](Self::pause_accepting), and disregards
    /// [holds](Self::hold_accepting).
    fn stop_listening_when_drained(&mut self);

    /// Whether it still listens: nobody has told it to stop.
    fn is_listening(&self) -> bool;

    /// The socket file that this listener removes when it closes. `None` if there is no
    /// file, if the listener was adopted, or if the file was
    /// [disowned](Self::disown_socket_file).
    ///
    /// The file is removed before the socket is closed, and only if it still stands at
    /// its path: while the socket is open, no other file can have its number. A process
    /// that was forked from the owner leaves the file alone. If it goes on in the
    /// owner's place, it [owns](Self::own_socket_file) the file first.
    fn socket_file(&self) -> Option<SocketFile>;

    /// Does not remove the file any more. Somebody else is to
    /// [own](Self::own_socket_file) it.
    fn disown_socket_file(&mut self);

    /// Makes this listener, which was adopted, remove its file when it closes in this
    /// process, unless another file has taken its place by then. The owner before has
    /// to [disown](Self::disown_socket_file) it.
    ///
    /// # Errors
    ///
    /// The file is not owned then. `InvalidInput` if this listener has no path;
    /// `NotFound` if no file stands there; `AlreadyExists` if it is another file.
    fn own_socket_file(&mut self, file: SocketFile) -> io::Result<()>;

    /// Another descriptor of the same socket. It can be passed to another process while
    /// this listener goes on.
    ///
    /// # Errors
    ///
    /// Those of fcntl(2), such as `EMFILE`; `NotConnected` once closed.
    fn duplicate(&self) -> io::Result<OwnedFd>;

    /// Promises that no other process holds this listener now or later.
    ///
    /// A listener that was adopted or [duplicated](Self::duplicate) may be held by
    /// others too. They can make it block, and accept4(2) cannot be told not to. So
    /// each accept4(2) is preceded by a poll(2), which is some 2 % of the cost of a
    /// connection that comes and goes. If the promise is not kept, another holder can
    /// block the loop until a client comes.
    fn assume_sole_holder(&mut self);

    /// Has a [graceful stop](bowline_reactor::Reactor::stop_gracefully) accept whoever
    /// waits in the queue of this listener, though other processes may hold it.
    ///
    /// The queue of a listener that was adopted or [duplicated](Self::duplicate) is left
    /// to the others. This is for who knows that none of them accepts: clients in a queue
    /// that nobody serves are reset. A listener that does not accept at the time, since it
    /// is paused or held, leaves its queue in any case.
    fn serve_queue_at_stop(&mut self);

    /// This listener's name.
    fn handle(&self) -> ListenerHandle;
}

/// Identifies the file that a UNIX listener made. The path alone does not: another file
/// may stand there by now.
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
/// It stays registered, and can connect again, for as long as there is an attempt or a
/// connection, or its factory's callback asks for another attempt, now or later.
pub trait Connector: 'static {
    /// The destination, as it was asked for.
    fn destination(&self) -> Destination;

    /// The present state.
    fn state(&self) -> ConnectorState;

    /// Starts another attempt, after the running callback. It has to be
    /// [disconnected](ConnectorState::Disconnected), or to
    /// [wait](ConnectorState::Waiting), which ends the wait. Otherwise nothing happens.
    fn connect(&mut self);

    /// Starts another attempt once `delay` has passed. Meanwhile it
    /// [waits](ConnectorState::Waiting). Replaces an earlier request. Nothing happens
    /// where [`connect`](Self::connect) would do nothing.
    fn connect_after(&mut self, delay: Duration);

    /// Gives up. An attempt that runs ends:
    /// [`connection_failed`](Factory::connection_failed) follows with
    /// [`ConnectError::Cancelled`]. A wait for the next attempt ends, and
    /// [`stopped`](Factory::stopped) follows. A connection stays.
    fn stop_connecting(&mut self);

    /// Whether the last request to it was to [give up](Self::stop_connecting).
    ///
    /// That may have been in [`connection_failed`](Factory::connection_failed) or
    /// [`connection_lost`](Factory::connection_lost), when nothing ran that could be
    /// given up. A layer that connects again by itself asks this, and ends then.
    fn was_told_to_stop(&self) -> bool;

    /// This connector's name.
    fn handle(&self) -> ConnectorHandle;
}

/// The state of a connector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectorState {
    /// No attempt, no connection.
    Disconnected,
    /// The next attempt comes after a delay.
    Waiting,
    /// An attempt runs. It takes until [`connection_made`](crate::Protocol::connection_made):
    /// the handshakes of layers are part of it.
    Connecting,
    /// There is a connection.
    Connected,
}

impl<P: 'static, F: FnMut(&Address) -> P + 'static> Factory for F {
    type Protocol = P;

    fn build_protocol(&mut self, _: &mut BuildContext<'_>, peer: &Address) -> Option<P> {
        Some(self(peer))
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        Cow::Borrowed(short_type_name::<P>())
    }
}

impl<F: Factory> Factory for Rc<RefCell<F>> {
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

    fn describe(&self, description: &mut Description) {
        // One of its own callbacks may be looking.
        if let Ok(factory) = self.try_borrow() {
            factory.describe(description);
        }
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

    fn suits(&self, address: &Address) -> io::Result<()> {
        self.borrow().suits(address)
    }

    fn started(&mut self, cx: &mut BuildContext<'_>) {
        self.borrow_mut().started(cx);
    }

    fn stopped(&mut self, cx: &mut BuildContext<'_>) {
        self.borrow_mut().stopped(cx);
    }

    fn describe(&self, description: &mut Description) {
        // One of its own callbacks may be looking.
        if let Ok(acceptor) = self.try_borrow() {
            acceptor.describe(description);
        }
    }
}
