//! A pool of worker processes that are passed connections.
//!
//! One process accepts connections and passes each to one of its workers. What was
//! read of a connection already goes with it. The worker serves it as if it had
//! accepted it. The accepting process has a [`Pool`]. Each worker has a [`Worker`],
//! which drives a [`Service`]. A [channel](crate::channel) connects the two.
//!
//! # Whose a connection is
//!
//! The pool keeps its copy of a connection's descriptor until the worker has taken
//! the connection. The worker says so before it touches the connection. It begins to
//! serve when the kernel has that answer, and not before. So this becomes of a
//! connection when one of the two dies:
//!
//! | the connection | if its worker dies | if the pool's process dies |
//! |---|---|---|
//! | is on its way to the worker, or there and unanswered | goes to another worker, untouched | is served by the worker ([or closed](WorkerSettings::orphans)) |
//! | is answered, and the pool has not read the answer | ends with the worker | stays the worker's |
//! | is answered | ends with the worker | stays the worker's, which serves its connections to the end |
//! | waits in the pool | goes to another worker | ends |
//! | is in the listener's queue | goes to another worker | stays there if another process has the listener, else ends |
//!
//! A worker's death loses no connection that it had not answered, and no connection is
//! served twice. There is one exception. A worker may break the protocol, or its
//! channel may fail while both processes live (for lack of memory, say). The pool then
//! kills the worker and gives what it had not answered to others. Nobody knows whether
//! it had begun.
//!
//! # Workers that are slow, full, hung or dead
//!
//! - A worker has at most [`window`](PoolSettings::window) unanswered connections. At
//!   its window it gets no more until it answers.
//! - A worker that has left a connection unanswered for
//!   [`slow_after`](PoolSettings::slow_after) gets no more until it answers.
//! - A worker counts as hung when it has not answered for
//!   [`ack_timeout`](PoolSettings::ack_timeout). It is *recalled*: another worker takes
//!   its place, and what it has not answered goes to others. The pool tells it, and then
//!   takes no more answers ([`refuse_input`]): what the worker could answer before that is
//!   its own, and the rest it can never begin. When it goes on, it serves what it had
//!   taken, and ends. Until then its copies of the others lie in its channel. Who serves
//!   one of these ends it for all copies
//!   ([`is_recalled`](PassedConnection::is_recalled)).
//! - With [`recalls`](PoolSettings::recalls) off, the connections of a hung worker wait
//!   with it. After [`kill_timeout`](PoolSettings::kill_timeout) it is killed, and
//!   everything unanswered goes to others. So does one whose channel is full, since it
//!   cannot be told.
//! - A worker that refuses a connection keeps its place. The connection goes to
//!   another, and never to the same one again. A worker that is short of descriptors
//!   or at its limit gets nothing for [`REFUSAL_PAUSE`].
//! - A dead worker is replaced at once. Only if it died young
//!   ([`stable_after`](PoolSettings::stable_after)), as the one before it in its place
//!   did, is there a wait, which grows from death to death
//!   ([`backoff`](PoolSettings::backoff)). A worker that [drains by
//!   itself](Worker::drain) is replaced when it first refuses a connection for that
//!   reason.
//!
//! [`refuse_input`]: bowline_protocol::UnixTransport::refuse_input
//!
//! # Workers that accept by themselves
//!
//! Passing lets a policy choose, and serves every kind of listener. Where neither is
//! needed, [`Accepting::ByWorkers`] takes the hand-off out of the path. That one setting
//! is the difference: the program listens by [`Pool::acceptor`] as before, and its
//! [`Service`] is given the same connections.
//!
//! Each place in the pool then has a listening socket of its own at the same address
//! ([`ListenerGroup`], `SO_REUSEPORT`), and the kernel gives each new connection to one
//! of them. The pool makes these sockets, and keeps a copy of each. So:
//!
//! - What waits in the queue of a worker that dies is served by the one that replaces it,
//!   or by others if that takes longer than [`slow_after`](PoolSettings::slow_after).
//! - A worker that leaves connections in its queue for so long and says nothing is
//!   relieved of them: the pool accepts them and passes them to others. If it says nothing
//!   for [`ack_timeout`](PoolSettings::ack_timeout), it is hung, as above.
//! - A worker that has as many connections as it [may](WorkerSettings::max_live) accepts
//!   no more, and the pool passes what waits there to others. So it does with a connection
//!   that a service does not [admit](Service::admit).
//! - [`Pool::resize`] adds sockets, and never closes one. Those that are too many get no
//!   new connections, and the pool serves what was on its way to them.
//!
//! A worker that dies takes the connections with it that it has accepted. There is no
//! answer to wait for: nothing is given out twice.
//!
//! [`ListenerGroup`]: bowline_transport::ListenerGroup
//!
//! # When no worker can take a connection
//!
//! The pool's listeners ([`Pool::acceptor`]) are paused, so that connections wait in
//! the kernel. Connections that are dispatched all the same wait in the pool. At most
//! [`queue`](PoolSettings::queue) wait at a time, each for at most
//! [`queue_timeout`](PoolSettings::queue_timeout). If all workers but those that hang
//! have refused a connection, it waits for one of these or for a new worker. It holds
//! up no other.
//!
//! A connection is given up if there is no room for it, if it waits too long, if every
//! worker has refused it, or if it was given out
//! [`max_attempts`](PoolSettings::max_attempts) times. [`Pool::on_undelivered`] gets it
//! then, and may serve it here. Without that handler it is closed.
//!
//! # Restarts
//!
//! A pool whose listeners are [given to a restart](crate::restart::Listeners::pool) hands
//! its connections to the pool of the next process, when that one serves. To the pool that
//! ends, the next one is a worker: what is on its way is kept here until it is answered
//! for there, by the table above. So it is for those in the middle of their life. Their
//! workers take them apart, 64 at a time, and the new pool gives them to its own workers.
//! A connection that the new program does not take goes on in the worker that had it. One
//! with a layer that holds something (TLS, if the worker allows that) moves where the
//! program ([`Program::takes_layers`](crate::restart::Program::takes_layers)) and its
//! workers ([`Service::takes_layers`]) can go on with that. The processes between do not
//! look into it.
//!
//! | a connection that moves | if it dies |
//! |---|---|
//! | its worker | goes on in the new process, if the worker had given it up; else it ends with it |
//! | the old pool | goes on in the new process if it was on its way there, else it ends |
//! | the new pool, before it has answered | goes on in its old worker |
//! | the new pool or worker after that | is theirs, as in the table above |
//!
//! # Stopping
//!
//! [`Pool::stop`] has every worker serve its connections to the end. This happens by
//! itself when the reactor stops. The stop waits for it, at most for
//! [`drain_timeout`](PoolSettings::drain_timeout).
//!
//! # Examples
//!
//! A whole pool, in one process instead of two:
//!
//! ```
//! use std::io;
//! use std::os::unix::net::UnixStream;
//! use std::process::ExitStatus;
//!
//! use bowline::handoff::pool::{
//!     Live, PassedConnection, Pool, PoolSettings, Spawned, Worker, WorkerId,
//!     WorkerSettings,
//! };
//! use bowline::process::ChildProcess;
//! use bowline::{Context, Protocol, Reactor, Tcp, Transport, Transports};
//!
//! /// Serves one connection; `Live` says how long.
//! struct Echo {
//!     _live: Live,
//! }
//!
//! impl<T: Transport> Protocol<T> for Echo {
//!     fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
//!         cx.transport.write(data);
//!     }
//! }
//!
//! fn serve(reactor: &mut Reactor, connection: PassedConnection, live: Live) {
//!     if let Err(error) = connection.adopt(reactor, Tcp, Echo { _live: live }) {
//!         println!("{error}"); // reset before it got here
//!     }
//! }
//!
//! /// Stands in for a process. Usually `spawn_command` makes one.
//! struct NoProcess;
//! impl ChildProcess for NoProcess {
//!     fn pid(&self) -> u32 { std::process::id() }
//!     fn kill(&mut self) -> io::Result<()> { Ok(()) }
//!     fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> { Ok(Some(ExitStatus::default())) }
//! }
//!
//! let mut reactor = Reactor::new()?;
//! let settings = PoolSettings::default().workers(1);
//! let pool = Pool::start(&mut reactor, settings, |reactor: &mut Reactor, _: WorkerId| {
//!     let (ours, theirs) = UnixStream::pair()?;
//!     Worker::start(reactor, theirs, WorkerSettings::default(), serve)?;
//!     Ok(Spawned { channel: ours, process: Box::new(NoProcess) })
//! });
//! let listener = reactor.accept(Tcp::at(([127, 0, 0, 1], 0).into()), pool.acceptor(0))?;
//! # let address = reactor.get(listener).unwrap().address().as_inet().unwrap();
//! # let client = std::thread::spawn(move || {
//! #     use std::io::{Read, Write};
//! #     let mut stream = std::net::TcpStream::connect(address)?;
//! #     stream.write_all(b"hello")?;
//! #     let mut answer = [0; 5];
//! #     stream.read_exact(&mut answer)?;
//! #     io::Result::Ok(answer)
//! # });
//! # // The worker may have answered the client before it tells the pool.
//! # while !client.is_finished() || pool.statistics().in_flight > 0 {
//! #     reactor.turn(Some(std::time::Duration::from_millis(10)));
//! # }
//! # assert_eq!(&client.join().unwrap()?, b"hello");
//! # assert_eq!(pool.statistics().acknowledged, 1);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod closing;
mod connection;
mod crew;
mod dispatcher;
mod heir;
mod messages;
mod policy;
mod process;
mod settings;
mod sharing;
mod state;
mod worker;

use std::fmt;

pub use self::connection::PassedConnection;
pub use self::dispatcher::{Pool, PoolAcceptor, REFUSAL_PAUSE};
pub use self::messages::{AcceptStage, Dispatch, FromWorker, MovedRecord, ToWorker, WorkerRefusal};
pub use self::policy::{Candidate, LeastLoaded, Offer, PoolPolicy, RoundRobin};
pub use self::process::{CHANNEL_NUMBER, Spawn, Spawned, inherited_channel, spawn_command};
pub use self::settings::{
    Accepting, PoolEvent, PoolSettings, PoolStatistics, Undelivered, WorkerStage, WorkerStatistics,
};
pub use self::worker::{Live, Orphans, Service, Worker, WorkerSettings};

/// The name of a worker. No two workers of a pool have the same one, not even if one
/// has replaced the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(pub(crate) u64);

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "worker {}", self.0)
    }
}
