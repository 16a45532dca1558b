//! Both ends of a channel.

use std::collections::HashMap;
use std::fmt;

use bowline::framing::{
    FrameContext, FrameEncoder as _, FrameReceiver, Framed, FramingError, Pairing, Unclaimed,
};
use bowline::{AfterTruncation, CloseReason, Context, Reactor, UnixTransport, WriteStatus};

use super::framing::{Line, NodeFramer};
use super::handle::{NodeHandle, NodeHandleKind, OutgoingHandle};
use super::outbox::{AfterRefusal, NodeSendError, Outbox};

/// Makes a protocol that talks to a Node process, for [`adopt`] on a UNIX stream.
///
/// [`adopt`]: bowline::Transports::adopt
pub fn channel<P>(peer: P) -> Framed<NodeFramer, NodeChannel<P>> {
    channel_of(NodeFramer::new(), peer)
}

/// Makes the protocol of a channel as [`channel`] does, with a framer that has another
/// [limit](NodeFramer::with_max_length).
pub fn channel_of<P>(framer: NodeFramer, peer: P) -> Framed<NodeFramer, NodeChannel<P>> {
    let channel = NodeChannel {
        peer,
        outbox: Outbox::default(),
        sockets: Sockets::default(),
    };
    // A descriptor comes with its own line. One more shifts nothing, in Node neither.
    Framed::new(framer, channel).pairing(Pairing::Claimed(Unclaimed::Close))
}

/// The callbacks of one end of a channel. Everything that [`Protocol`](bowline::Protocol)
/// promises holds for them.
pub trait NodePeer<T: UnixTransport + ?Sized>: 'static {
    /// The channel is open. Called once, first.
    fn connection_made(&mut self, cx: &mut NodeContext<'_, T>) {
        let _ = cx;
    }

    /// A message of the program has arrived, as JSON: the argument of `process.send` or
    /// `subprocess.send`. It was not checked to be valid JSON.
    fn message_received(&mut self, cx: &mut NodeContext<'_, T>, message: &str);

    /// A message has arrived with a handle. The handle has been acknowledged.
    ///
    /// By default both are dropped, which closes the handle.
    fn handle_received(&mut self, cx: &mut NodeContext<'_, T>, message: &str, handle: NodeHandle) {
        let _ = (cx, message);
        drop(handle);
    }

    /// An internal message of Node has arrived that is not about handles, as JSON: its
    /// `cmd` begins with `NODE_`. Ignored by default.
    fn internal_received(&mut self, cx: &mut NodeContext<'_, T>, message: &str) {
        let _ = (cx, message);
    }

    /// The peer has refused a handle of ours for the fourth time. The handle and its
    /// message are dropped, as in Node. What was sent after it follows.
    fn handle_refused(&mut self, cx: &mut NodeContext<'_, T>) {
        let _ = cx;
    }

    /// The channel has ended. Called once, last. What was not acknowledged may not have
    /// arrived.
    fn connection_lost(&mut self, reactor: &mut Reactor, reason: &CloseReason) {
        let _ = (reactor, reason);
    }
}

/// What a callback of a [`NodePeer`] can use.
#[derive(Debug)]
pub struct NodeContext<'a, T: ?Sized> {
    /// The channel's transport. What is written to it directly overtakes what waits.
    pub transport: &'a mut T,
    /// The reactor.
    pub reactor: &'a mut Reactor,
    pub(super) outbox: &'a mut Outbox,
    sockets: &'a mut Sockets,
}

impl<T: UnixTransport + ?Sized> NodeContext<'_, T> {
    /// Sends a message, which is JSON in one line. While a handle is not acknowledged, the
    /// message waits.
    ///
    /// # Errors
    ///
    /// It is not JSON in one line, or too much waits. Nothing is sent.
    pub fn send(&mut self, message: &str) -> Result<WriteStatus, NodeSendError> {
        let sent = self.outbox.send(self.transport, message);
        sent.map_err(|kind| NodeSendError { kind, handle: None })
    }

    /// Sends a message with a handle. The message waits for the previous handle. The
    /// descriptor stays open here until the peer has acknowledged it.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send). Also if a Node process could not handle the descriptor, or
    /// if the transport refuses it. Nothing is sent, and the error returns the handle.
    pub fn send_handle(
        &mut self,
        message: &str,
        handle: OutgoingHandle,
    ) -> Result<WriteStatus, NodeSendError> {
        self.outbox.send_handle(self.transport, message, handle)
    }

    /// Returns how many messages wait for the peer to acknowledge a handle, including the
    /// message with the handle.
    pub fn waiting(&self) -> usize {
        self.outbox.waiting()
    }

    /// Tells the parent that a connection that came with this [key](NodeHandle::key) has
    /// closed. When it closes its server, the parent waits for the last connection of the
    /// key.
    pub fn socket_closed(&mut self, key: &str) {
        if self.sockets.closed(key) {
            let answer = all_closed(key);
            say(self.transport, &answer);
        }
    }
}

/// The receiver that [`channel`] puts into its [`Framed`].
pub struct NodeChannel<P> {
    peer: P,
    outbox: Outbox,
    sockets: Sockets,
}

type Cx<'a, T> = FrameContext<'a, T, NodeFramer>;

impl<P: 'static> NodeChannel<P> {
    /// Returns the peer.
    pub fn peer(&self) -> &P {
        &self.peer
    }

    /// Returns the peer.
    pub fn peer_mut(&mut self) -> &mut P {
        &mut self.peer
    }

    /// Sets how many bytes of messages may wait behind a handle that is not acknowledged;
    /// default 16 MiB.
    pub fn set_max_queued(&mut self, bytes: usize) {
        self.outbox.max_queued = bytes;
    }

    /// Calls `act` with the peer and the context of its callbacks. A timer gets here with
    /// [`call_protocol`](bowline::Transports::call_protocol), for the type
    /// `NodeChannel<P>`.
    pub fn call<T, A>(
        &mut self,
        cx: &mut Context<'_, T>,
        act: impl FnOnce(&mut P, &mut NodeContext<'_, T>) -> A,
    ) -> A
    where
        T: UnixTransport + ?Sized,
    {
        self.with(cx.transport, cx.reactor, act)
    }

    fn with<T: ?Sized, A>(
        &mut self,
        transport: &mut T,
        reactor: &mut Reactor,
        act: impl FnOnce(&mut P, &mut NodeContext<'_, T>) -> A,
    ) -> A {
        let mut cx = NodeContext {
            transport,
            reactor,
            outbox: &mut self.outbox,
            sockets: &mut self.sockets,
        };
        act(&mut self.peer, &mut cx)
    }

    fn handle_received<T>(&mut self, cx: &mut Cx<'_, T>, line: &Line<'_>)
    where
        T: UnixTransport + ?Sized,
        P: NodePeer<T>,
    {
        let Line::Handle {
            kind,
            key,
            datagrams,
            message,
        } = line
        else {
            return;
        };
        // Past all that waits: each side may wait for the other's.
        let Some(fd) = cx.framing.descriptors().next() else {
            return say(cx.transport, r#"{"cmd":"NODE_HANDLE_NACK"}"#);
        };
        say(cx.transport, r#"{"cmd":"NODE_HANDLE_ACK"}"#);
        let key = key.as_deref().map(str::to_owned);
        if let Some(key) = &key {
            self.sockets.opened(key);
        }
        let kind = NodeHandleKind::of(kind, datagrams.as_deref());
        let handle = NodeHandle { kind, fd, key };
        self.with(cx.transport, cx.reactor, |peer, cx| {
            peer.handle_received(cx, message, handle);
        });
    }

    fn internal_received<T>(&mut self, cx: &mut Cx<'_, T>, line: &str)
    where
        T: UnixTransport + ?Sized,
        P: NodePeer<T>,
    {
        match self.sockets.asked(line) {
            Some(Asked::Answer(answer)) => say(cx.transport, &answer),
            Some(Asked::Later) => {}
            None => self.with(cx.transport, cx.reactor, |peer, cx| {
                peer.internal_received(cx, line);
            }),
        }
    }
}

impl<T, P> FrameReceiver<T, NodeFramer> for NodeChannel<P>
where
    T: UnixTransport + ?Sized,
    P: NodePeer<T>,
{
    fn connection_made(&mut self, cx: &mut Cx<'_, T>) {
        self.with(cx.transport, cx.reactor, |peer, cx| {
            peer.connection_made(cx)
        });
    }

    fn frame_received(&mut self, cx: &mut Cx<'_, T>, frame: &[u8]) {
        let what = "message that is no UTF-8";
        let line = str::from_utf8(frame).map_err(|_| FramingError::Malformed { what });
        let (text, line) = match line.and_then(|text| Ok((text, Line::of(text)?))) {
            Ok(read) => read,
            Err(error) => {
                log::warn!(target: "bowline::peers", "{}: {error}", cx.transport.peer());
                return cx.transport.abort_connection();
            }
        };
        match line {
            Line::Message => self.with(cx.transport, cx.reactor, |peer, cx| {
                peer.message_received(cx, text);
            }),
            Line::Handle { .. } => self.handle_received(cx, &line),
            Line::Acknowledged => self.outbox.acknowledged(cx.transport),
            Line::Refused => {
                if let AfterRefusal::GivenUp = self.outbox.refused(cx.transport) {
                    self.with(cx.transport, cx.reactor, |peer, cx| peer.handle_refused(cx));
                }
            }
            Line::Internal => self.internal_received(cx, text),
        }
    }

    fn descriptors_truncated(&mut self, _: &mut Cx<'_, T>, _: usize) -> AfterTruncation {
        // It is sent again.
        AfterTruncation::KeepConnection
    }

    fn connection_lost(&mut self, cx: &mut Cx<'_, T>, reason: &CloseReason) {
        self.peer.connection_lost(cx.reactor, reason);
    }
}

/// Sends an internal message of Node, at once.
fn say(transport: &mut (impl UnixTransport + ?Sized), line: &str) {
    let sent = NodeFramer::new().send_to(transport, &(), line.as_bytes());
    sent.expect("there is no line feed in it");
}

impl<P: fmt::Debug> fmt::Debug for NodeChannel<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeChannel")
            .field("peer", &self.peer)
            .field("waiting", &self.outbox.waiting())
            .finish_non_exhaustive()
    }
}

/// The open connections that were received with a key.
#[derive(Debug, Default)]
struct Sockets {
    open: HashMap<String, u32>,
    /// Keys whose parent wants to be told when the last connection closes.
    awaited: Vec<String>,
}

/// The answer to a question about connections.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    Answer(String),
    Later,
}

/// A question of a parent about connections.
#[derive(serde::Deserialize)]
struct Question {
    cmd: String,
    key: String,
}

impl Sockets {
    fn opened(&mut self, key: &str) {
        *self.open.entry(key.to_owned()).or_default() += 1;
    }

    /// Returns whether the parent has to be told.
    fn closed(&mut self, key: &str) -> bool {
        if let Some(count) = self.open.get_mut(key) {
            *count -= 1;
            if *count > 0 {
                return false;
            }
            self.open.remove(key);
        }
        match self.awaited.iter().position(|awaited| awaited == key) {
            Some(place) => {
                self.awaited.swap_remove(place);
                true
            }
            None => false,
        }
    }

    /// Answers a line, if it is such a question.
    fn asked(&mut self, line: &str) -> Option<Asked> {
        let Question { cmd, key } = serde_json::from_str(line).ok()?;
        let count = self.open.get(&key).copied().unwrap_or(0);
        match (&*cmd, count) {
            ("NODE_SOCKET_NOTIFY_CLOSE", 0) => Some(Asked::Answer(all_closed(&key))),
            ("NODE_SOCKET_NOTIFY_CLOSE", _) => {
                self.awaited.push(key);
                Some(Asked::Later)
            }
            ("NODE_SOCKET_GET_COUNT", _) => {
                let key = quoted(&key);
                Some(Asked::Answer(format!(
                    r#"{{"cmd":"NODE_SOCKET_COUNT","key":{key},"count":{count}}}"#
                )))
            }
            _ => None,
        }
    }
}

fn all_closed(key: &str) -> String {
    let key = quoted(key);
    format!(r#"{{"cmd":"NODE_SOCKET_ALL_CLOSED","key":{key}}}"#)
}

pub(super) fn quoted(text: &str) -> String {
    serde_json::to_string(text).expect("text is JSON")
}
