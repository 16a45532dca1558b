//! A callback-driven, single-threaded reactor that passes open file descriptors
//! between processes as ordinarily as it writes bytes.
//!
//! You write a [`Protocol`]: what happens when a connection is made, when bytes
//! or descriptors arrive, and when it is lost. A [`Factory`] builds one for each
//! connection. The [`Reactor`] owns the connections and calls their protocols,
//! one callback at a time. There are no futures, and your code needs no locks: it
//! runs in one thread. State
//! that connections share lives in an `Rc<RefCell<_>>`, which is never borrowed
//! twice because [callbacks never nest](#callbacks-never-nest).
//!
//! ```
//! use bowline::{Address, Context, Protocol, Reactor, Transport, Transports};
//!
//! struct Echo;
//!
//! impl<T: Transport> Protocol<T> for Echo {
//!     fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
//!         cx.transport.write(data);
//!     }
//! }
//!
//! let mut reactor = Reactor::new()?;
//! reactor.listen_tcp(([127, 0, 0, 1], 0).into(), |_: &Address| Echo)?;
//! # reactor.call_soon(|reactor| reactor.stop().expect("it runs"));
//! reactor.run()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The [guide] leads from this program to passing a live connection to another
//! process; who knows Twisted may begin at [its last chapter](guide::twisted).
//!
//! # By task
//!
//! | To | use |
//! |---|---|
//! | run and stop the loop | [`Reactor::run`], [`Reactor::stop_on_signals`], [`Reactor::stop_gracefully`], [`Reactor::stop`] |
//! | listen | [`listen`](Transports::listen), at [`Tcp::at`] or [`Unix::at`] |
//! | accept sockets without serving them here | [`Acceptor`], [`accept`](Transports::accept) |
//! | connect | [`connect`](Transports::connect), to [`Tcp::to`] or [`Unix::to`] |
//! | connect to a host by its name | [`Tcp::to_host`] |
//! | find the addresses of a host | [`resolve`](Transports::resolve), [`Resolver`] |
//! | react to a connection | [`Protocol`], built by a [`Factory`] |
//! | write, close, half-close | [`Transport`], in every callback's [`Context`] |
//! | act on another connection | its [`TransportHandle`] and [`Context::get`] |
//! | call another connection's protocol | [`call_protocol`](Transports::call_protocol) |
//! | do something later | [`Reactor::call_later`], [`DelayedCall`] |
//! | do something at intervals | [`Reactor::call_every`], [`PeriodicCall`] |
//! | keep a fast source from a slow sink | [`Producer`], [`Transport::register_producer`], [`Watermarks`] |
//! | send a file | [`FileSender`] |
//! | pass a descriptor | [`UnixTransport::send_file_descriptor`] |
//! | pass descriptors with one message exactly | [`UnixTransport::write_with_descriptors`] |
//! | receive descriptors | [`Protocol::file_descriptor_received`], [`Protocol::descriptors_received`] |
//! | cut the stream into messages | [`framing`] |
//! | connect again after a failure or loss | [`policies::Reconnecting`], [`Connector::connect_after`] |
//! | limit time, connections or bytes per second; log traffic | [`policies`] |
//! | bound what a hostile peer can cause | [`DescriptorLimits`], [`set_descriptor_reserve`](Transports::set_descriptor_reserve), [`policies::LimitHandshakes`] |
//! | use a socket from somewhere else | [`adopt`](Transports::adopt), [`Tcp::listening`], [`Unix::listening`] |
//! | start a program with sockets under agreed numbers | [`spawn_with_descriptors`], [`take_granted`] |
//! | start a program with sockets as systemd does | [`spawn_with_listen_fds`] |
//! | make a listener only to give it away | [`Listen::bind`](endpoint::Listen::bind) |
//! | give a connection away | [`detach`](Transports::detach), [`detach_listener`](Transports::detach_listener) |
//! | serve with several processes | [`handoff::pool`] |
//! | be replaced by a new process without losing a connection | [`handoff::restart`] |
//! | take sockets from systemd, and tell it how we are | [`handoff::systemd`] |
//! | know the peer | [`Transport::peer`], [`UnixTransport::peer_credentials`] |
//! | call from another thread | [`RemoteHandle::call_from_thread`] |
//! | do work that blocks | [`Reactor::call_in_thread`], [`ThreadPool`] |
//! | handle signals | [`Reactor::on_signals`] |
//! | run inside another loop | [`Reactor::turn`] |
//! | drive something else that epoll watches | [`Descriptor`], [`Reactor::register`] |
//! | bound what one turn does | [`Limits`], [`TransportBudgets`] |
//! | see what became of descriptors | [`descriptor_counts`](Transports::descriptor_counts) |
//!
//! # Callbacks never nest
//!
//! No callback is ever called from inside another. What a callback asks of its
//! own connection or of others (write, pause, close) takes effect on their state
//! at once; the callbacks that follow from it are made after it has returned,
//! in order, within the same turn of the loop as far as the turn's
//! [budget](Limits) reaches. So the stack does not grow, the order of callbacks
//! does not depend on who called whom, and a `RefCell` borrowed only inside
//! callbacks is never borrowed twice. Since a pause cannot arrive inside
//! [`write`](Transport::write), `write` answers whether to go on.
//!
//! # Features
//!
//! None is on by default; without any, the packages below this one are `mio`,
//! `libc`, `slab` and `log`, and what those need.
//!
//! - `signals`: [`Reactor::on_signals`] and [`Reactor::stop_on_signals`], through
//!   `signal-hook`.
//! - `testing`: the module `testing`, for tests of your own protocols.
//!
//! # Logging
//!
//! Through the `log` crate, under the targets `bowline::reactor`,
//! `bowline::timers`, `bowline::transport` and `bowline::descriptors`. `error`
//! is for failures of callbacks and of the loop, `warn` for something dropped or
//! closed that you would miss, `debug` for life cycles, `trace` for readiness.
//! Bytes that were sent or received are never logged, unless asked for with a
//! [`policies::TrafficLog`], under `bowline::traffic`.

#![forbid(unsafe_code)]

pub mod guide;

// The loop.
pub use bowline_reactor::{
    Clock, DelayedCall, DelayedCallError, GracefulStop, Handle, Hold, Limits, PeriodicCall,
    PeriodicEnd, Phase, Reactor, ReactorError, RemoteError, RemoteHandle, RunError, Sleep,
    Statistics, SystemClock, SystemEvent, TriggerError, TriggerId, Turn, Vacancy,
};

// Threads for work that blocks.
pub use bowline_reactor::{
    AtShutdown, ThreadCall, ThreadCallError, ThreadPool, ThreadPoolCounts, ThreadPoolOptions,
};

// Signals.
#[cfg(feature = "signals")]
pub use bowline_reactor::{SignalHandler, signal};

// Descriptors of one's own.
pub use bowline_reactor::{
    Contained, Descriptor, DrainRound, Interest, Next, Panic, Readiness, Token, catch_panic,
};

// What users implement, and what their callbacks are given.
pub use bowline_protocol::{
    Acceptor, AfterReadClosed, AfterTruncation, AnyContext, AtDrain, BuildContext, CloseReason,
    ConnectError, Context, Factory, FailedAttempt, FileSendError, FileSendErrorKind, FileSender,
    FileSent, LookupError, Origin, Part, Producer, ProducerKind, ProducerRef, Protocol,
    RegisterProducerError, SocketFile,
};

// Connections, listeners and connectors, as callbacks see them.
pub use bowline_protocol::{
    Address, Connector, ConnectorHandle, ConnectorState, Credentials, Destination, LingeringClose,
    Listener, ListenerHandle, TcpTransport, Transport, TransportHandle, TransportState,
    UnixAddress, UnixTransport, UnixTransportHandle, Watermarks, WriteStatus,
};

// Passed descriptors.
pub use bowline_protocol::{
    DescriptorLimits, Linger, PassedDescriptor, ReceivedDescriptors, SendDescriptorError,
    SendDescriptorErrorKind,
};
pub use bowline_transport::{
    DescriptorCounts, UnsentDescriptors, close_received, descriptors_closing,
};

// Messages in the stream.
#[doc(inline)]
pub use bowline_protocol::framing;

// Time limits, limits of connections and bytes, connecting again.
#[doc(inline)]
pub use bowline_protocol::policies;

// Listening, connecting, adopting, detaching.
pub use bowline_transport::{
    AdoptError, AdoptErrorKind, CallError, DetachError, Detached, ListenError, ListenStep,
    ReattachError, StaleSocket, StreamTransport, Tcp, TcpStream, TransportBudgets, Transports,
    Unix, UnixStream, Unsent,
};

/// Where and how to listen, connect and adopt, and how a kind of connection of one's own
/// says so.
#[doc(inline)]
pub use bowline_transport::endpoint;

// Descriptors that processes are started with, and what belongs to it.
pub use bowline_transport::{
    SocketDescription, describe_socket, effective_user, exit_descriptor, is_passing_shortage,
    monotonic_microseconds, own_pidfd_inode, remove_environment, send_datagram,
    spawn_with_descriptors, spawn_with_listen_fds, take_granted, take_inherited,
};

// Host names.
pub use bowline_transport::{Answer, Lookup, Resolver, SystemResolver};

// What transports are made of.
pub use bowline_transport::{
    DescriptorSocket, FileDescriptor, Link, OverTcp, PassDescriptors, Plain, ReadBuffers, Received,
    ReceivedLimits, Remains, SendmsgMixin, Socket, Stream, TcpConnect, TcpListen, TcpListener,
    TcpSocket, UnixConnect, UnixListen, UnixListener, UnixSocket,
};

/// Worker pools, restarts that lose nothing, and the interfaces of systemd.
#[doc(inline)]
pub use bowline_handoff as handoff;

/// Connections in memory and time that stands still, for the tests of your
/// protocols; feature `testing`.
///
/// [`Pump`](testing::Pump) is where to begin.
#[cfg(feature = "testing")]
pub mod testing {
    pub use bowline_reactor::testing::{ManualClock, ProcessDied, ReadinessSource};
    pub use bowline_transport::testing::{
        Delivery, KernelSettings, Memory, MemoryConnect, MemoryDatagramSender, MemoryDatagrams,
        MemoryHandle, MemoryListen, MemoryListener, MemoryPeer, MemorySocket, MemoryStream,
        PeerRead, Points, ProcessId, Pump, Random, SimulatedKernel, Simulation, SocketId,
    };
}

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
