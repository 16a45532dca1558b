//! A pool of worker processes that are passed connections.
//!
//! One process accepts, and passes every connection, with what was read of it
//! already, to one of its workers, which serves it as if it had accepted it
//! itself. In the accepting process that is a [`Pool`]; in each worker a
//! [`Worker`], which drives a [`Service`]. Between them is a
//! [channel](crate::channel).
//!
//! # Whose a connection is
//!
//! The pool keeps its copy of a connection's descriptor until the worker has
//! said that it takes it. The worker says so before it touches the connection,
//! and begins to serve it only when the kernel has that answer. From this
//! follows, whoever dies when:
//!
//! | at the time of death | a worker | the pool's process |
//! |---|---|---|
//! | on its way to the worker, or there and unanswered | goes to another worker, untouched | the worker serves it ([or closes it](WorkerSettings::orphans)) |
//! | answered, and the answer not read | ends with the worker | stays the worker's |
//! | answered | ends with the worker | stays the worker's, which goes on to the end of its connections |
//! | waiting in the pool | goes to another worker | ends |
//! | in the listener's queue | goes to another worker | stays there if somebody else has the listener, ends otherwise |
//!
//! No connection that was not answered is lost by the death of a worker, and
//! none is served twice. What a worker that breaks the protocol was given, or one
//! whose channel fails while both live (for lack of memory, say), is given to others
//! after it was killed; whether it had begun is not known then.
//!
//! # Workers that are slow, full, hung or dead
//!
//! - At most [`window`](PoolSettings::window) connections per worker are
//!   unanswered; a worker at its window gets no more until it answers.
//! - A worker that has not answered for [`ack_timeout`](PoolSettings::ack_timeout)
//!   counts as hung: it gets no more until it answers. What it has been given
//!   waits with it, since it may have begun to serve; after
//!   [`kill_timeout`](PoolSettings::kill_timeout) it is killed, and everything
//!   unanswered goes to others.
//! - A worker that refuses a connection keeps its place; the connection goes
//!   to another, and never to the same again. Short of descriptors or at its
//!   limit, the worker gets nothing for [`REFUSAL_PAUSE`].
//! - A dead worker is replaced after a wait that grows from death to death
//!   ([`backoff`](PoolSettings::backoff)). One that [drains by
//!   itself](Worker::drain) is replaced as soon as it refuses a connection for
//!   that.
//!
//! # When nobody can take one
//!
//! Listeners of the pool ([`Pool::acceptor`]) are paused, so that connections
//! wait in the kernel. What is dispatched all the same waits here, at most
//! [`queue`](PoolSettings::queue) at a time and each at most
//! [`queue_timeout`](PoolSettings::queue_timeout) long; one that waits since all
//! workers have refused it but those that hang, or are to come, holds up no other.
//! What finds no room, waits too long, was refused by every worker or given out
//! [`max_attempts`](PoolSettings::max_attempts) times is given to
//! [`Pool::on_undelivered`], which may serve it here, and is closed without one.
//!
//! # Stopping
//!
//! [`Pool::stop`] has every worker serve to the end what it has. When the
//! reactor stops, that happens by itself, and the stop waits for it at most
//! [`drain_timeout`](PoolSettings::drain_timeout).
//!
//! # Examples
//!
//! The whole of it, in one process instead of two:
//!
//! ```
//! use std::io;
//! use std::os::unix::net::UnixStream;
//! use std::process::ExitStatus;
//!
//! use bowline_transport::ChildProcess;
//! use bowline_handoff::pool::{
//!     PassedConnection, Live, Pool, PoolSettings, Spawned, Worker, WorkerId,
//!     WorkerSettings,
//! };
//! use bowline_protocol::{Context, Protocol, Transport};
//! use bowline_reactor::Reactor;
//! use bowline_transport::{Tcp, Transports};
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
//! /// Stands for a process; usually `spawn_command` makes one.
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
//! # while !client.is_finished() {
//! #     reactor.turn(Some(std::time::Duration::from_millis(10)));
//! # }
//! # assert_eq!(&client.join().unwrap()?, b"hello");
//! # assert_eq!(pool.statistics().acknowledged, 1);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod connection;
mod crew;
mod dispatcher;
mod messages;
mod policy;
mod process;
mod settings;
mod state;
mod worker;

use std::fmt;

pub use self::connection::PassedConnection;
pub use self::dispatcher::{Pool, PoolAcceptor, REFUSAL_PAUSE};
pub use self::messages::{Dispatch, FromWorker, ToWorker, WorkerRefusal};
pub use self::policy::{Candidate, LeastLoaded, Offer, PoolPolicy, RoundRobin};
pub use self::process::{CHANNEL_NUMBER, Spawn, Spawned, inherited_channel, spawn_command};
pub use self::settings::{
    PoolEvent, PoolSettings, PoolStatistics, Undelivered, WorkerStage, WorkerStatistics,
};
pub use self::worker::{Live, Orphans, Service, Worker, WorkerSettings};

/// The name of a worker: no two of one pool have the same, also when one has
/// replaced the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(pub(crate) u64);

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "worker {}", self.0)
    }
}
