//! A callback-driven, single-threaded reactor that passes open file descriptors
//! between processes as ordinarily as it writes bytes.
//!
//! You write a [`Protocol`]: what happens when a connection is made, when bytes or
//! descriptors arrive, and when it is lost. A [`Factory`] builds one for each
//! connection. The [`Reactor`] owns the connections and calls their protocols, one
//! callback at a time. There are no futures. Your code runs in one thread, and needs no
//! locks. Connections share state in an `Rc<RefCell<_>>`. It is never borrowed twice,
//! because [callbacks never nest](#callbacks-never-nest).
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
//! The [guide] leads from this program to a service that is replaced under load. If you
//! know Twisted, begin at [its chapter](guide::twisted). [Choosing](guide::choosing) says
//! when to take something else, and [words](guide::words) what the words mean.
//!
//! # By task
//!
//! These are the names to begin with. The guide has [all of them](guide::tasks).
//!
//! | To | begin with |
//! |---|---|
//! | run the loop, and stop it well | [`Reactor`], `Reactor::stop_on_signals` (feature `signals`), [`GracefulStop`] |
//! | say what a connection does | [`Protocol`], [`Factory`], [`Context`], [`Transport`] |
//! | listen, connect, adopt | [`Transports`], with [`Tcp`], [`Unix`], [`Pipe`], [`Stdio`] |
//! | listen where a string says | [`endpoint::ServerEndpoint`], [`endpoint::ClientEndpoint`] |
//! | act on another connection | [`TransportHandle`] |
//! | cut the stream into messages | [`framing`] |
//! | know why a connection ended | [`CloseReason`] |
//! | do something later, or again and again | [`Reactor::call_later`], [`Reactor::call_every`] |
//! | do work that blocks | [`Reactor::call_in_thread`], [`RemoteHandle`] |
//! | keep a fast source from a slow sink | [`Producer`], [`Watermarks`], [`FileSender`] |
//! | limit time, connections, bytes | [`policies`] |
//! | pass descriptors | [`UnixTransport`] |
//! | send datagrams and packets | [`DatagramProtocol`], [`Udp`], [`UnixDatagram`], [`PacketProtocol`], [`UnixSeqpacket`] |
//! | run child processes | [`process`] |
//! | serve with several processes | [`handoff::pool`] |
//! | be replaced without losing a connection | [`handoff::restart`] |
//! | be a service of systemd | [`handoff::systemd`] |
//! | encrypt | `tls` (feature `tls`) |
//! | test your protocols in memory | `testing` (feature `testing`) |
//! | look inside a running program | `inspect` (feature `inspect`) |
//! | drive a descriptor of your own | [`descriptor`] |
//! | write a layer, or a kind of connection | [`layers`] |
//!
//! # Callbacks never nest
//!
//! No callback is ever called from inside another. A callback may write to, pause or
//! close its own connection and others. Their state changes at once. The callbacks that
//! follow from it are called once the running one has returned, in order and in the
//! same turn of the loop. If the turn's [budget](Limits) is spent, they are called in
//! the next turn.
//!
//! So the stack does not grow. The order of callbacks does not depend on who called
//! whom. A `RefCell` that is borrowed only inside callbacks is never borrowed twice. And
//! since a pause cannot arrive inside [`write`](Transport::write), `write` answers
//! whether to go on.
//!
//! # Features
//!
//! None is on by default. Without any, bowline depends on `mio`, `libc`, `slab` and
//! `log`, and on what those need.
//!
//! - `inspect`: the module `inspect`, a look inside a running program: a socket, a page,
//!   metrics. The loop measures its callbacks then.
//! - `signals`: `Reactor::stop_on_signals` and `Reactor::on_signals`.
//! - `testing`: the module `testing`. Switch it on under `[dev-dependencies]`.
//! - `tls`, `tls-aws-lc-rs`: the module `tls`, by `rustls`, with the cryptography of
//!   `ring` or of `aws-lc-rs`. In addition, `tls-webpki-roots` has Mozilla's roots, and
//!   `tls-platform-verifier` has those that the system trusts.
//!
//! # Logging
//!
//! bowline logs through the `log` crate, under the targets `bowline::reactor`,
//! `bowline::timers`, `bowline::transport`, `bowline::descriptors` and
//! `bowline::handoff`:
//!
//! - `error`: a callback or the loop has failed;
//! - `warn`: something was dropped or closed that you would miss;
//! - `debug`: life cycles;
//! - `trace`: readiness.
//!
//! Bytes that were sent or received are never logged, unless you ask for it with a
//! [`policies::TrafficLog`]. It logs under `bowline::traffic`.

#![forbid(unsafe_code)]

pub mod guide;

// The loop.
pub use bowline_reactor::{
    DelayedCall, GracefulStop, Handle, Limits, PeriodicCall, Reactor, RemoteHandle, Turn,
};

// What users implement, and what their callbacks are given.
pub use bowline_protocol::{
    Acceptor, AfterReadClosed, AfterTruncation, AnyContext, AtDrain, BuildContext, CloseReason,
    ConnectError, Context, Factory, FileSender, FileSent, Once, Origin, Part, Producer,
    ProducerKind, ProducerRef, Protocol, Remains,
};

// Connections, listeners and connectors, as callbacks see them.
pub use bowline_protocol::{
    Address, AnyConnection, ConnectionHandle, Connector, ConnectorHandle, ConnectorState,
    Credentials, Destination, FileAddress, LingeringClose, Listener, ListenerHandle, SocketFile,
    TcpTransport, Transport, TransportHandle, TransportState, UnixAddress, UnixTransport,
    UnixTransportHandle, Watermarks, WhenSent, WriteObserver, WriteStatus,
};

// Datagrams.
pub use bowline_protocol::{
    AddressRef, Datagram, DatagramHandle, DatagramProtocol, DatagramTransport, MulticastInterface,
    QueueLimits, SendStatus, UdpHandle, UdpTransport, UnixAddressRef, UnixDatagramHandle,
    UnixDatagramTransport, UnsentDatagram,
};
pub use bowline_transport::{Udp, UdpPort, UnixDatagram, UnixDatagramPort};

// Packets over a connection.
pub use bowline_protocol::{Packet, PacketHandle, PacketProtocol, PacketTransport, UnsentPacket};
pub use bowline_transport::{UnixSeqpacket, UnixSeqpacketPort};

// Passed descriptors.
pub use bowline_protocol::{DescriptorLimits, Linger, PassedDescriptor, ReceivedDescriptors};

// Listening, connecting, adopting, detaching.
pub use bowline_transport::{
    Detached, Pipe, PipeStream, StaleSocket, Stdio, Tcp, TcpStream, TransportBudgets, Transports,
    Unix, UnixStream, Unsent, UnsentDescriptors,
};

// Signals.
#[cfg(feature = "signals")]
pub use bowline_reactor::SignalHandler;
pub use bowline_reactor::signal;

/// Errors. [`ConnectError`] is at the root instead, since callbacks receive it.
pub mod error {
    pub use bowline_protocol::{
        FailedAttempt, FileSendError, FileSendErrorKind, LookupError, NotSent,
        RegisterProducerError, SendDescriptorError, SendDescriptorErrorKind, SendRefusal,
    };
    pub use bowline_reactor::{
        DelayedCallError, ReactorError, RemoteError, RunError, ThreadCallError, TriggerError,
    };
    pub use bowline_transport::{
        AdoptError, AdoptErrorKind, CallError, DetachError, ListenError, ListenStep, ReattachError,
    };
}

/// Clocks, and more about calls in the future.
///
/// Begin with [`Reactor::call_later`] and [`Reactor::call_every`].
pub mod time {
    pub use bowline_reactor::{Clock, PeriodicEnd, Sleep, SystemClock};
}

/// The start and the end of a reactor: what runs at each, and what a stop waits for.
///
/// Begin with [`Reactor::add_trigger`], [`Reactor::hold`] and
/// [`Reactor::stop_gracefully`].
pub mod lifecycle {
    pub use bowline_reactor::{DrainRound, Hold, Phase, SystemEvent, TriggerId};
}

/// Threads for work that blocks.
///
/// Begin with [`Reactor::call_in_thread`].
pub mod threads {
    pub use bowline_reactor::{
        AtShutdown, ThreadCall, ThreadPool, ThreadPoolCounts, ThreadPoolSettings,
    };
}

/// Host names, and the resolvers that find their addresses.
///
/// [`Transports::resolve`] asks for addresses; [`Transports::set_resolver`] sets another
/// [`Resolver`](resolve::Resolver).
pub mod resolve {
    pub use bowline_transport::{Answer, Lookup, Resolver, SystemResolver};
}

/// Descriptors of your own, driven by the reactor. They may be anything that epoll can
/// watch.
///
/// Implement [`Descriptor`](descriptor::Descriptor), and hand it to
/// [`Reactor::register`]. If you only want a call when something is readable, use
/// [`Reactor::call_when_readable`]. A counter and sealed memory are here too, since
/// both live behind a descriptor.
pub mod descriptor {
    pub use bowline_reactor::{
        Contained, Description, Descriptor, Descriptors, Fact, Interest, Next, Panic, ReadableCall,
        Readiness, Registered, Section, Token, Vacancy, catch_panic,
    };
    pub use bowline_transport::{
        DescriptorKind, DescriptorsOfKind, EventCounter, SealedMemory, SealedMemoryError,
        SealedMemoryErrorKind, WrongDescriptor, is_hung_up, is_same_open_file,
    };
}

/// How a kind of connection listens, connects and is adopted. These are the settings of
/// kinds such as [`Tcp`] and [`Unix`], and the traits that a kind of your own
/// implements.
pub mod endpoint {
    pub use bowline_handoff::endpoints::{
        ClientEndpoint, EndpointArgument, EndpointArguments, EndpointError, EndpointFactory,
        EndpointKinds, LayeredClientEndpoint, LayeredServerEndpoint, ServerEndpoint, quote,
    };
    pub use bowline_transport::endpoint::{
        Accepted, Adopt, AdoptTransport, AdoptWith, Carried, Carrying, Connect, ConnectTransport,
        ConnectWith, ConnectionSocket, Dial, HostToTry, JustAccepted, LayerOf, Layered, Lingering,
        Listen, ListenAt, ListenTransport, ListenWith, ListeningSocket, On, Side, SocketTransport,
        TransportFor, Wrap,
    };
    pub use bowline_transport::{
        ListenerGroup, OverTcp, PipePair, PipeWay, Plain, TcpConnect, TcpListen, TcpListener,
        UdpConnect, UdpEndpoint, UdpListen, UnixConnect, UnixDatagramConnect, UnixDatagramEndpoint,
        UnixDatagramListen, UnixListen, UnixListener, UnixSeqpacketConnect, UnixSeqpacketListen,
        UnixSeqpacketListener,
    };
}

/// The parts that transports are made of. You need them for a layer of your own that
/// changes the bytes, or for a socket of your own. Protocols do not need them.
///
/// A [`Stream`](layers::Stream) is a transport over a
/// [`FileDescriptor`](layers::FileDescriptor), which is a [`Socket`](layers::Socket) or
/// layers on one. A [`Port`](layers::Port) is a transport of datagrams, over a
/// [`DatagramSocket`](layers::DatagramSocket).
pub mod layers {
    pub use bowline_transport::{
        AfterSendError, Arrivals, DatagramSocket, DescriptorSocket, FileDescriptor, LayerState,
        Link, Outgoing, OutgoingDatagram, PacketSocket, PassDescriptors, PipeEnds, Port,
        ReadBuffers, Received, ReceivedLimits, SendmsgMixin, Socket, Stays, Stream,
        StreamTransport, TcpSocket, UdpSocket, UnixDatagramSocket, UnixSeqpacketSocket, UnixSocket,
    };
}

/// Processes: children with their streams, programs that are started with descriptors,
/// and what can be asked about both.
///
/// Begin with [`Transports::spawn_process`], a [`ChildCommand`](process::ChildCommand)
/// and a [`ProcessProtocol`](process::ProcessProtocol). If you only want to give
/// descriptors to a program, begin with
/// [`spawn_with_descriptors`](process::spawn_with_descriptors) and
/// [`take_granted`](process::take_granted).
pub mod process {
    pub use bowline_protocol::{
        ProcessContext, ProcessHandle, ProcessProtocol, ProcessStatus, ProcessTransport,
        SignalError, TerminalSize,
    };
    pub use bowline_transport::{
        ChildCommand, ChildProcess, ChildWatch, CollectOutput, Pidfd, ProcessOutput,
        ProcessSettings, RunningChild, SocketDescription, SpawnError, SpawnStep, close_all,
        close_received, describe_socket, descriptors_closing, effective_user, exit_descriptor,
        is_passing_shortage, is_stream_connection, monotonic_microseconds, own_pidfd_inode,
        remove_environment, send_datagram, set_terminal_size, spawn_with_descriptors,
        spawn_with_listen_fds, take_granted, take_inherited, terminal_size,
    };
}

/// A look inside a running reactor: a socket, a page, metrics. (Feature `inspect`.)
///
/// Begin with [`Inspector`](inspect::Inspector). What is registered, and what it says of
/// itself, can be asked without the feature, through [`Reactor::descriptors`].
#[cfg(feature = "inspect")]
#[doc(inline)]
pub use bowline_inspect as inspect;

/// The counts of a reactor.
///
/// [`Reactor::statistics`] and [`Transports::descriptor_counts`] return them.
/// [`DatagramTransport::counts`] returns those of one datagram socket.
pub mod statistics {
    pub use bowline_protocol::{DatagramCounts, Offload};
    pub use bowline_reactor::Statistics;
    pub use bowline_transport::DescriptorCounts;
}

// Messages in the stream.
#[doc(inline)]
pub use bowline_protocol::framing;

// Time limits, limits of connections and bytes, connecting again.
#[doc(inline)]
pub use bowline_protocol::policies;

/// Worker pools, restarts that lose nothing, and the interfaces of systemd.
#[doc(inline)]
pub use bowline_handoff as handoff;

/// TLS over every kind of stream, by rustls. Feature `tls`, with the cryptography of ring,
/// or `tls-aws-lc-rs`.
///
/// Begin with [`TlsServer`](tls::TlsServer) and [`TlsClient`](tls::TlsClient).
#[cfg(any(feature = "tls", feature = "tls-aws-lc-rs"))]
#[doc(inline)]
pub use bowline_tls as tls;

/// Connections in memory and time that stands still, for the tests of your
/// protocols. Feature `testing`.
///
/// Begin with [`Pump`](testing::Pump).
#[cfg(feature = "testing")]
pub mod testing {
    pub use bowline_reactor::testing::{ManualClock, ProcessDied, ReadinessSource};
    pub use bowline_transport::testing::{
        ChildPipe, DatagramRead, Delivery, FifoMode, KernelSettings, Memory, MemoryConnect,
        MemoryDatagramEndpoint, MemoryDatagramKind, MemoryDatagramPeer, MemoryDatagramSender,
        MemoryDatagramSocket, MemoryDatagrams, MemoryHandle, MemoryListen, MemoryListener,
        MemoryPacketConnect, MemoryPacketListen, MemoryPacketListener, MemoryPacketPeer,
        MemoryPacketPort, MemoryPacketSocket, MemoryPackets, MemoryPeer, MemoryPipe, MemoryProcess,
        MemorySocket, MemoryStream, MemoryUdp, MemoryUdpPort, MemoryUnixDatagram,
        MemoryUnixDatagramPort, PacketRead, PeerRead, Points, ProcessId, Pump, Random,
        SimulatedKernel, Simulation, SocketId,
    };
}

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
