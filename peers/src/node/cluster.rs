//! Workers of Node's `cluster` module.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use bowline::framing::Framed;
use bowline::{CloseReason, Reactor, UnixTransport, WriteStatus};
use serde::Deserialize;

use super::channel::{NodeChannel, NodeContext, NodePeer, channel, quoted};
use super::framing::NodeFramer;
use super::handle::NodeHandle;
use super::outbox::NodeSendError;

/// Makes the protocol of a worker that a primary has started with `cluster.fork()`, for the
/// socket that [`take_channel`](super::take_channel) returns.
///
/// A primary starts this program instead of Node if its `process.execPath` is this program.
pub fn cluster_worker<S>(service: S) -> Framed<NodeFramer, NodeChannel<ClusterWorker<S>>> {
    channel(ClusterWorker {
        service,
        state: State::default(),
    })
}

/// The callbacks of a cluster worker.
pub trait ClusterService<T: UnixTransport + ?Sized>: 'static {
    /// The primary has been told that the worker is online. Called once, first.
    /// [Listen](ClusterContext::listen) here.
    fn started(&mut self, cx: &mut ClusterContext<'_, '_, T>);

    /// The primary listens for us. `address` is the address of the socket.
    ///
    /// `shared` is a listening socket that all workers have, if we are to accept
    /// connections ourselves (`cluster.SCHED_NONE`). Without it, the primary accepts, and
    /// [`connection_received`](Self::connection_received) is called (round robin, the
    /// default).
    fn listening(
        &mut self,
        cx: &mut ClusterContext<'_, '_, T>,
        address: SocketAddr,
        shared: Option<OwnedFd>,
    ) {
        let _ = (cx, address, shared);
    }

    /// The primary could not listen at `address`. `errno` is the error as libuv has it:
    /// negative.
    fn listen_failed(
        &mut self,
        cx: &mut ClusterContext<'_, '_, T>,
        address: SocketAddr,
        errno: i32,
    ) {
        log::warn!(target: "bowline::peers", "the primary cannot listen on {address}: {errno}");
        let _ = cx;
    }

    /// Whether to take one more connection. Asked before each. If not, the primary gives
    /// the connection to another worker.
    fn is_accepting(&self) -> bool {
        true
    }

    /// The primary has accepted a connection for us, on a socket with this address. It
    /// keeps its copy open until we have said that we take the connection; that was done
    /// already.
    fn connection_received(
        &mut self,
        cx: &mut ClusterContext<'_, '_, T>,
        address: SocketAddr,
        connection: OwnedFd,
    );

    /// A message of the program has arrived.
    fn message_received(&mut self, cx: &mut ClusterContext<'_, '_, T>, message: &str) {
        let _ = (cx, message);
    }

    /// The primary wants the worker to end (`worker.disconnect()`). No more connections
    /// arrive. The channel closes when this returns.
    fn disconnecting(&mut self, cx: &mut ClusterContext<'_, '_, T>) {
        let _ = cx;
    }

    /// The channel has ended. Called once, last. A worker in Node exits then.
    fn connection_lost(&mut self, reactor: &mut Reactor, reason: &CloseReason);
}

/// What a callback of a [`ClusterService`] can use.
#[derive(Debug)]
pub struct ClusterContext<'a, 'b, T: ?Sized> {
    /// The context of the channel.
    pub node: &'a mut NodeContext<'b, T>,
    state: &'a mut State,
}

/// The backlog that Node asks for.
const BACKLOG: i32 = 511;

#[derive(Debug, Default)]
struct State {
    last_question: u64,
    /// Addresses that were asked for, by the number of the request.
    asked: HashMap<u64, SocketAddr>,
    /// The addresses at which the primary listens for us, by their key.
    servers: HashMap<String, SocketAddr>,
    /// The next index of an address. Node uses it to distinguish servers at one address.
    indexes: HashMap<SocketAddr, u32>,
}

impl<T: UnixTransport + ?Sized> ClusterContext<'_, '_, T> {
    /// Asks the primary to listen at this address. Workers that ask for the same address
    /// share one socket, also for port 0.
    pub fn listen(&mut self, address: SocketAddr) {
        let index = self.state.indexes.entry(address).or_default();
        let question = Tcp { address };
        let text =
            format!(r#""act":"queryServer","index":{index},"data":null,{question},"flags":0"#);
        *index += 1;
        let number = self.say(&text);
        self.state.asked.insert(number, address);
    }

    /// Tells the primary to send no more connections for this address.
    pub fn stop_listening(&mut self, address: SocketAddr) {
        let keys = self.state.servers.iter();
        let keys = keys.filter(|(_, at)| **at == address);
        let keys: Vec<_> = keys.map(|(key, _)| key.clone()).collect();
        for key in keys {
            self.state.servers.remove(&key);
            let key = quoted(&key);
            self.say(&format!(r#""act":"close","key":{key}"#));
        }
    }

    /// Sends a message of the program.
    ///
    /// # Errors
    ///
    /// As [`NodeContext::send`].
    pub fn send(&mut self, message: &str) -> Result<WriteStatus, NodeSendError> {
        self.node.send(message)
    }

    /// Sends a message of the `cluster` module. Returns its number.
    fn say(&mut self, text: &str) -> u64 {
        self.state.last_question += 1;
        let number = self.state.last_question;
        let line = format!(r#"{{"cmd":"NODE_CLUSTER",{text},"seq":{number}}}"#);
        if let Err(error) = self.node.send(&line) {
            log::warn!(target: "bowline::peers", "the primary is not told: {error}");
            self.node.transport.abort_connection();
        }
        number
    }
}

/// An address in the form of the module.
struct Tcp {
    address: SocketAddr,
}

impl fmt::Display for Tcp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (ip, port) = (self.address.ip(), self.address.port());
        let version = if self.address.is_ipv6() { 6 } else { 4 };
        write!(
            f,
            r#""address":"{ip}","port":{port},"addressType":{version}"#
        )
    }
}

/// A message of a primary.
#[derive(Deserialize)]
struct Said {
    cmd: String,
    act: Option<String>,
    seq: Option<u64>,
    ack: Option<u64>,
    key: Option<String>,
    errno: Option<i32>,
    sockname: Option<SocketName>,
}

#[derive(Deserialize)]
struct SocketName {
    address: IpAddr,
    port: u16,
}

/// The peer that [`cluster_worker`] puts into its channel.
#[derive(Debug)]
pub struct ClusterWorker<S> {
    service: S,
    state: State,
}

impl<S: 'static> ClusterWorker<S> {
    /// Calls `act` with the service and the context of its callbacks, from
    /// [`NodeChannel::call`].
    pub fn call<T: ?Sized, A>(
        &mut self,
        cx: &mut NodeContext<'_, T>,
        act: impl FnOnce(&mut S, &mut ClusterContext<'_, '_, T>) -> A,
    ) -> A {
        let state = &mut self.state;
        let mut cx = ClusterContext { node: cx, state };
        act(&mut self.service, &mut cx)
    }

    fn said<T>(&mut self, cx: &mut NodeContext<'_, T>, message: &str, handle: Option<OwnedFd>)
    where
        T: UnixTransport + ?Sized,
        S: ClusterService<T>,
    {
        let Ok(said) = serde_json::from_str::<Said>(message) else {
            log::warn!(target: "bowline::peers", "the primary said something else: ignored");
            return;
        };
        if said.cmd != "NODE_CLUSTER" {
            return;
        }
        match (said.act.as_deref(), said.ack) {
            (Some("newconn"), _) => self.connection_received(cx, &said, handle),
            (Some("disconnect"), _) => {
                self.call(cx, |service, cx| service.disconnecting(cx));
                cx.transport.lose_connection();
            }
            (_, Some(question)) => self.answered(cx, question, &said, handle),
            _ => {}
        }
    }

    fn connection_received<T>(
        &mut self,
        cx: &mut NodeContext<'_, T>,
        said: &Said,
        handle: Option<OwnedFd>,
    ) where
        T: UnixTransport + ?Sized,
        S: ClusterService<T>,
    {
        let server = said
            .key
            .as_ref()
            .and_then(|key| self.state.servers.get(key));
        let taken = server
            .copied()
            .zip(handle)
            .filter(|_| self.service.is_accepting());
        let seq = said.seq.unwrap_or_default();
        let is_taken = taken.is_some();
        self.call(cx, |service, cx| {
            cx.say(&format!(r#""ack":{seq},"accepted":{is_taken}"#));
            if let Some((address, connection)) = taken {
                service.connection_received(cx, address, connection);
            }
        });
    }

    fn answered<T>(
        &mut self,
        cx: &mut NodeContext<'_, T>,
        question: u64,
        said: &Said,
        handle: Option<OwnedFd>,
    ) where
        T: UnixTransport + ?Sized,
        S: ClusterService<T>,
    {
        let Some(asked) = self.state.asked.remove(&question) else {
            return;
        };
        let errno = said.errno.unwrap_or_default();
        if errno != 0 {
            return self.call(cx, |service, cx| service.listen_failed(cx, asked, errno));
        }
        let name = said.sockname.as_ref();
        let address = name.map_or(asked, |it| SocketAddr::new(it.address, it.port));
        let shared = handle.map(|fd| listen(fd, asked));
        let shared = match shared.transpose() {
            Ok(shared) => shared,
            Err(errno) => {
                return self.call(cx, |service, cx| service.listen_failed(cx, asked, errno));
            }
        };
        if let Some(key) = &said.key {
            self.state.servers.insert(key.clone(), address);
        }
        self.call(cx, |service, cx| {
            let at = Tcp { address };
            cx.say(&format!(r#""act":"listening","index":0,{at}"#));
            service.listening(cx, address, shared);
        });
    }
}

/// Makes a bound socket listen.
fn listen(fd: OwnedFd, address: SocketAddr) -> Result<OwnedFd, i32> {
    match rustix::net::listen(&fd, BACKLOG) {
        Ok(()) => Ok(fd),
        Err(error) => {
            log::warn!(target: "bowline::peers", "cannot listen on {address}: {error}");
            Err(-error.raw_os_error())
        }
    }
}

impl<T, S> NodePeer<T> for ClusterWorker<S>
where
    T: UnixTransport + ?Sized,
    S: ClusterService<T>,
{
    fn connection_made(&mut self, cx: &mut NodeContext<'_, T>) {
        self.call(cx, |service, cx| {
            cx.say(r#""act":"online""#);
            service.started(cx);
        });
    }

    fn message_received(&mut self, cx: &mut NodeContext<'_, T>, message: &str) {
        self.call(cx, |service, cx| service.message_received(cx, message));
    }

    fn handle_received(&mut self, cx: &mut NodeContext<'_, T>, message: &str, handle: NodeHandle) {
        self.said(cx, message, Some(handle.fd));
    }

    fn internal_received(&mut self, cx: &mut NodeContext<'_, T>, message: &str) {
        self.said(cx, message, None);
    }

    fn connection_lost(&mut self, reactor: &mut Reactor, reason: &CloseReason) {
        self.service.connection_lost(reactor, reason);
    }
}
