//! HAProxy's two ways to pass sockets: listeners to a successor (`_getsocks`), and single
//! connections (`sockpair@`).
//!
//! # Listeners: `_getsocks`
//!
//! The process that wants the listeners connects to the stats socket of the process that
//! has them; that has to be configured with `expose-fd listeners`. It sends the line
//! `_getsocks`. It receives their number, and then batches: a record for each listener,
//! with all descriptors of the batch on its first byte. It acknowledges each batch.
//!
//! [`take_listeners`] is the protocol of the process that takes, [`give_listeners`] that of
//! the process that gives. HAProxy takes listeners from us with the option `-x PATH`. In
//! both cases both processes have the listeners afterwards. HAProxy goes on accepting until
//! it is told to stop (`SIGUSR1`).
//!
//! | limit | default | of |
//! |---|---|---|
//! | listeners of a batch that is sent | 252 | `MAX_SEND_FD` |
//! | listeners in all | 65,536 | ours; HAProxy has none |
//! | how long an answer may take | 1 s | HAProxy's |
//! | bytes of the line of a request | 16,384 | `tune.bufsize` |
//!
//! # Connections: `sockpair@`
//!
//! Two processes share a connected pair of sockets. Each message on it is two bytes, with
//! one end of a connection. HAProxy accepts connections with `bind sockpair@N`, and opens
//! them with `server NAME sockpair@N`, where N is an inherited descriptor.
//! [`take_connections`] is the protocol that accepts; [`give_connection`] opens one. Each
//! end can do both.
//!
//! A message has exactly one descriptor. HAProxy aborts if there are two.
//!
//! # Examples
//!
//! Takes the listeners of a HAProxy, and accepts connections on them:
//!
//! ```no_run
//! use bowline::{
//!     Address, ConnectError, Context, Once, Protocol, Reactor, Tcp, Transport, Transports,
//! };
//! use bowline_peers::haproxy::{TakeError, TakenListener, take_listeners};
//!
//! struct Hello;
//!
//! impl<T: Transport> Protocol<T> for Hello {
//!     fn connection_made(&mut self, cx: &mut Context<'_, T>) {
//!         cx.transport.write(b"served by bowline\n");
//!         cx.transport.lose_connection();
//!     }
//!
//!     fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}
//! }
//!
//! fn serve(reactor: &mut Reactor, taken: Result<Vec<TakenListener>, TakeError>) {
//!     let taken = taken.expect("a HAProxy that exposes its listeners");
//!     for listener in taken {
//!         if let Some(Address::Inet(_)) = listener.address() {
//!             let here = Tcp::listening(listener.fd);
//!             let served = reactor.listen(here, |_: &Address| Hello);
//!             served.expect("a TCP listener");
//!         }
//!     }
//! }
//!
//! let mut reactor = Reactor::new()?;
//! let take = Once::new(take_listeners(serve)).on_failure(|cx, _, error: &ConnectError| {
//!     eprintln!("no HAProxy there: {error}");
//!     cx.reactor.stop().expect("it runs");
//! });
//! reactor.connect_unix("/run/haproxy/admin.sock", take)?;
//! reactor.run()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod framing;
mod give;
mod sockpair;
mod take;

pub use self::framing::{GetsocksFramer, GetsocksPart, ListenerName};
pub use self::give::{GivenListener, Giver, give_listeners};
pub use self::sockpair::{ConnectionTaker, SockpairFramer, give_connection, take_connections};
pub use self::take::{TakeError, TakenListener, Taker, take_listeners};
