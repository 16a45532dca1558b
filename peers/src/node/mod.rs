//! Node's IPC channel between a parent and its child, with handles; and workers of Node's
//! `cluster` module.
//!
//! [`channel`] is the protocol of both ends, for a [`NodePeer`]. A child finds its end with
//! [`take_channel`]. A parent starts a child with [`spawn_node`]. [`cluster_worker`] is a
//! child that serves connections which its primary accepts.
//!
//! A message is a line of JSON. Those that begin with `{"cmd":"NODE_...` are internal to
//! Node. One of them, `NODE_HANDLE`, wraps a message of the program with one descriptor.
//! Its receiver answers whether the descriptor has arrived (`NODE_HANDLE_ACK`) or not
//! (`NODE_HANDLE_NACK`); if not, it is sent again. Until it has arrived, nothing else is
//! sent, so that the order is kept. All of that is done here. The JSON is passed to the
//! peer as text, to be parsed with any library.
//!
//! Node has a second format of messages (`serialization: 'advanced'`), that of V8. It is
//! not supported here.
//!
//! | limit | default | of |
//! |---|---|---|
//! | handles that are sent and not acknowledged | 1 | Node |
//! | how often a handle is sent again | 3 | Node |
//! | bytes of a message that is received | 64 MiB | ours; Node has none |
//! | bytes that wait behind a handle | 16 MiB | ours; Node has none |
//!
//! # What may be sent
//!
//! Sockets and pipes. If Node is sent anything else it may abort, since libuv aborts when
//! it gets a regular file, a memfd or a terminal. So those are refused here; the error
//! returns them. A handle says what Node makes of a socket ([`NodeHandleKind`]); Node does
//! not check.
//!
//! # Examples
//!
//! A child of `child_process.fork` or `spawn` that answers on the sockets it is sent:
//!
//! ```no_run
//! use std::io::Write as _;
//! use std::net::TcpStream;
//!
//! use bowline::{CloseReason, Reactor, Transports, Unix, UnixTransport};
//! use bowline_peers::node::{NodeContext, NodeHandle, NodePeer, channel, take_channel};
//!
//! struct Child;
//!
//! impl<T: UnixTransport> NodePeer<T> for Child {
//!     fn message_received(&mut self, cx: &mut NodeContext<'_, T>, message: &str) {
//!         let answer = format!(r#"{{"heard":{message}}}"#);
//!         cx.send(&answer).expect("it is JSON");
//!     }
//!
//!     fn handle_received(&mut self, _: &mut NodeContext<'_, T>, _: &str, handle: NodeHandle) {
//!         // To be adopted, rather: what is written here could block the loop.
//!         let _ = TcpStream::from(handle.fd).write_all(b"from the child\n");
//!     }
//!
//!     fn connection_lost(&mut self, reactor: &mut Reactor, _: &CloseReason) {
//!         reactor.stop().expect("it runs");
//!     }
//! }
//!
//! let mut reactor = Reactor::new()?;
//! let socket = take_channel()?.ok_or("not started by Node")?;
//! reactor.adopt(Unix, socket, channel(Child))?;
//! reactor.run()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod channel;
mod cluster;
mod framing;
mod handle;
mod outbox;
mod start;

pub use self::channel::{NodeChannel, NodeContext, NodePeer, channel, channel_of};
pub use self::cluster::{ClusterContext, ClusterService, ClusterWorker, cluster_worker};
pub use self::framing::NodeFramer;
pub use self::handle::{NodeHandle, NodeHandleKind, OutgoingHandle};
pub use self::outbox::{NodeSendError, NodeSendErrorKind};
pub use self::start::{spawn_node, take_channel};
