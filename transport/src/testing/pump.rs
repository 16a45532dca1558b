//! Protocols in a reactor of their own, turned by hand.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bowline_protocol::Protocol;
use bowline_reactor::testing::ManualClock;
use bowline_reactor::{Clock, Next, Reactor, Turn};

use super::kernel::SimulatedKernel;
use super::peer::{MemoryPeer, PeerRead};
use super::socket::{MemoryHandle, MemorySocket, MemoryStream};
use super::{MOST_TURNS, run_to_rest};
use crate::stream::StreamTransport;

/// After how many failures in a row [`Pump::exchange`] gives up: where half of all
/// calls fail, that is as good as never.
const MOST_RETRIES: usize = 1_000;

/// Joins protocols by connections in memory, and runs them until they rest.
///
/// It owns a [`SimulatedKernel`], and a [`Reactor`] whose clock stands still until it is
/// [advanced](Self::advance). Nothing waits, and nothing depends on the machine. No
/// socket is made; the only descriptors are the reactor's own two. Callbacks come in the
/// order of real connections and by their rules. None runs before [`run`](Self::run) or
/// [`turn`](Self::turn).
///
/// # Examples
///
/// A protocol, and a test that plays its peer:
///
/// ```
/// use bowline::testing::Pump;
/// use bowline::{Context, Protocol, Transport};
///
/// /// Answers each byte with its capital.
/// struct Shout;
///
/// impl<T: Transport> Protocol<T> for Shout {
///     fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
///         if data.contains(&b'.') {
///             cx.transport.lose_connection();
///         } else {
///             cx.transport.write(&data.to_ascii_uppercase());
///         }
///     }
/// }
///
/// let (mut pump, peer) = Pump::with_peer(Shout)?;
/// assert_eq!(pump.exchange(&peer, b"hello").bytes, b"HELLO");
/// peer.send(b".")?;
/// pump.run();
/// assert!(peer.is_at_end() && pump.is_lost());
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// Two protocols that are joined, and a deadline that takes no time:
///
/// ```
/// use std::time::Duration;
/// use bowline::testing::Pump;
/// use bowline::{Context, Protocol, Transport};
///
/// /// Says hello, and hangs up after a minute.
/// struct Impatient;
///
/// impl<T: Transport> Protocol<T> for Impatient {
///     fn connection_made(&mut self, cx: &mut Context<'_, T>) {
///         cx.transport.write(b"hello");
///         let me = cx.transport.handle();
///         cx.reactor.call_later(Duration::from_secs(60), move |reactor| {
///             if let Some(transport) = reactor.get(me) {
///                 transport.abort_connection();
///             }
///         });
///     }
///
///     fn data_received(&mut self, _: &mut Context<'_, T>, data: &[u8]) {
///         assert_eq!(data, b"hello");
///     }
/// }
///
/// let mut pump = Pump::new(Impatient, Impatient)?;
/// pump.run();
/// assert!(!pump.is_lost());
/// pump.advance(Duration::from_secs(60));
/// assert!(pump.is_lost());
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// Descriptors are real:
///
/// ```
/// use std::{fs::File, os::fd::AsFd};
/// use bowline::testing::Pump;
/// use bowline::{Context, Protocol, UnixTransport, WriteStatus};
///
/// /// Sends back what it was sent, descriptors first.
/// struct Return;
///
/// impl<T: UnixTransport> Protocol<T> for Return {
///     fn file_descriptor_received(
///         &mut self,
///         cx: &mut Context<'_, T>,
///         fd: std::os::fd::OwnedFd,
///     ) -> Result<(), std::os::fd::OwnedFd> {
///         cx.transport.send_file_descriptor(fd.into()).expect("it is open");
///         Ok(())
///     }
///
///     fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
///         cx.transport.write(data);
///     }
/// }
///
/// let (mut pump, peer) = Pump::with_peer(Return)?;
/// let file = File::open("/dev/null")?;
/// peer.send_with_descriptors(b"f", &[file.as_fd()])?;
/// pump.run();
/// let back = peer.take();
/// assert_eq!((back.bytes.as_slice(), back.descriptors.len()), (&b"f"[..], 1));
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// Feature `testing`.
pub struct Pump {
    reactor: Reactor,
    clock: ManualClock,
    kernel: SimulatedKernel,
    transports: Vec<MemoryHandle>,
}

impl Pump {
    /// Joins two protocols.
    ///
    /// # Errors
    ///
    /// `EMFILE` if the reactor cannot be made.
    pub fn new(
        first: impl Protocol<MemoryStream>,
        second: impl Protocol<MemoryStream>,
    ) -> io::Result<Self> {
        let mut pump = Self::with_kernel(SimulatedKernel::new())?;
        pump.join(first, second)?;
        Ok(pump)
    }

    /// Puts a protocol on a connection whose other end is the caller's.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn with_peer(protocol: impl Protocol<MemoryStream>) -> io::Result<(Self, MemoryPeer)> {
        let mut pump = Self::with_kernel(SimulatedKernel::new())?;
        let (_, peer) = pump.connect(protocol)?;
        Ok((pump, peer))
    }

    /// Makes a pump without connections, on a kernel that may have settings or a seed of
    /// its own.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn with_kernel(kernel: SimulatedKernel) -> io::Result<Self> {
        let clock = ManualClock::new();
        let mut reactor = Reactor::with_clock(clock.clone())?;
        reactor.start().expect("it was made just now");
        Ok(Self {
            reactor,
            clock,
            kernel,
            transports: Vec::new(),
        })
    }

    /// Joins two more protocols by a connection of their own.
    ///
    /// # Errors
    ///
    /// Only if there are 2^24 descriptors already.
    pub fn join(
        &mut self,
        first: impl Protocol<MemoryStream>,
        second: impl Protocol<MemoryStream>,
    ) -> io::Result<(MemoryHandle, MemoryHandle)> {
        let (one, other) = self.kernel.pair();
        Ok((self.put(one, first)?, self.put(other, second)?))
    }

    /// Puts one more protocol on a connection whose other end is the caller's.
    ///
    /// # Errors
    ///
    /// As [`join`](Self::join).
    pub fn connect(
        &mut self,
        protocol: impl Protocol<MemoryStream>,
    ) -> io::Result<(MemoryHandle, MemoryPeer)> {
        let (ours, theirs) = self.kernel.pair();
        Ok((self.put(ours, protocol)?, MemoryPeer::new(theirs)))
    }

    /// As [`connect`](Self::connect), for a protocol of TCP transports. It sees these
    /// addresses, its own and that of the peer.
    ///
    /// A connection in memory keeps the settings of a
    /// [`TcpTransport`](bowline_protocol::TcpTransport), and does nothing with them.
    ///
    /// # Errors
    ///
    /// As [`join`](Self::join).
    ///
    /// # Examples
    ///
    /// ```
    /// use bowline::testing::{Pump, SimulatedKernel};
    /// use bowline::{Context, Protocol, TcpTransport};
    ///
    /// /// Says who has connected.
    /// struct WhoAmI;
    ///
    /// impl<T: TcpTransport> Protocol<T> for WhoAmI {
    ///     fn connection_made(&mut self, cx: &mut Context<'_, T>) {
    ///         cx.transport.set_no_delay(true).expect("it is connected");
    ///         let peer = cx.transport.peer().to_string();
    ///         cx.transport.write(peer.as_bytes());
    ///     }
    ///
    ///     fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}
    /// }
    ///
    /// let mut pump = Pump::with_kernel(SimulatedKernel::new())?;
    /// let (host, peer) = (([192, 0, 2, 1], 80).into(), ([192, 0, 2, 7], 4321).into());
    /// let (_, client) = pump.connect_tcp(WhoAmI, host, peer)?;
    /// pump.run();
    /// assert_eq!(client.take().bytes, b"192.0.2.7:4321");
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn connect_tcp(
        &mut self,
        protocol: impl Protocol<MemoryStream>,
        host: SocketAddr,
        peer: SocketAddr,
    ) -> io::Result<(MemoryHandle, MemoryPeer)> {
        let (mut ours, theirs) = self.kernel.pair();
        ours.set_addresses(host.into(), peer.into());
        Ok((self.put(ours, protocol)?, MemoryPeer::new(theirs)))
    }

    fn put(
        &mut self,
        socket: MemorySocket,
        protocol: impl Protocol<MemoryStream>,
    ) -> io::Result<MemoryHandle> {
        let handle = socket.adopt(&mut self.reactor, protocol)?;
        self.transports.push(handle);
        Ok(handle)
    }

    // Running.

    /// Runs until nothing is left to do at the present time.
    ///
    /// # Panics
    ///
    /// After a million turns, since the protocols do not come to rest. If they keep
    /// answering each other, use [`turn`](Self::turn) or [`run_until`](Self::run_until).
    #[track_caller]
    pub fn run(&mut self) {
        run_to_rest(self, Self::turn);
    }

    /// Runs until `is_done`, which is asked before each turn, or until nothing is left
    /// to do. Returns the last answer of `is_done`.
    ///
    /// # Panics
    ///
    /// After a million turns.
    #[track_caller]
    pub fn run_until(&mut self, mut is_done: impl FnMut(&mut Self) -> bool) -> bool {
        for _ in 0..MOST_TURNS {
            if is_done(self) {
                return true;
            }
            if !self.turn() {
                return is_done(self);
            }
        }
        panic!("not done after {MOST_TURNS} turns: {self:?}");
    }

    /// Runs one turn of the reactor. Returns whether there is more to do at the present
    /// time.
    pub fn turn(&mut self) -> bool {
        if self.reactor.turn(Some(Duration::ZERO)) == Turn::Stopped {
            return false;
        }
        let now = self.clock.now();
        let is_due = self
            .reactor
            .next_deadline()
            .is_some_and(|deadline| deadline <= now);
        is_due || !self.reactor.is_idle()
    }

    /// Lets time pass. Runs whatever is to be done now, and then each delayed call on
    /// the way, at its own time.
    ///
    /// # Panics
    ///
    /// As [`run`](Self::run).
    #[track_caller]
    pub fn advance(&mut self, by: Duration) {
        let end = self.clock.now() + by;
        self.run();
        while let Some(deadline) = self.reactor.next_deadline()
            && deadline <= end
        {
            self.pass_to(deadline);
        }
        self.pass_to(end);
    }

    #[track_caller]
    fn pass_to(&mut self, time: Instant) {
        let wait = time.saturating_duration_since(self.clock.now());
        self.clock.advance(wait);
        self.run();
    }

    /// Sends `bytes` from a peer, and runs until the protocol has had them all and
    /// rests. Returns everything that the protocol sent.
    ///
    /// If the kernel refuses a send with an error that passes
    /// ([`passing_errors_percent`](super::KernelSettings::passing_errors_percent)), time
    /// passes until the transport has tried again. Other delayed calls on the way run
    /// too. This ends early if the protocol closes the connection.
    ///
    /// # Panics
    ///
    /// If the protocol stops reading before it has taken everything, or never comes to
    /// rest, or if a send has failed a thousand times in a row.
    #[track_caller]
    pub fn exchange(&mut self, peer: &MemoryPeer, bytes: &[u8]) -> PeerRead {
        let mut answer = PeerRead::default();
        let mut unsent = bytes;
        let mut retries = 0;
        loop {
            let taken = if unsent.is_empty() {
                0
            } else {
                match peer.send(unsent) {
                    Ok(taken) => taken,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                    Err(_) => {
                        unsent = &[];
                        0
                    }
                }
            };
            unsent = &unsent[taken..];
            self.run();
            let read = peer.take();
            let is_quiet = taken == 0 && read.bytes.is_empty();
            answer.bytes.extend(read.bytes);
            answer.descriptors.extend(read.descriptors);
            if !is_quiet {
                retries = 0;
            } else if let Some(due) = self.next_retry() {
                retries += 1;
                assert!(retries < MOST_RETRIES, "sends fail for ever: {self:?}");
                self.advance(due.saturating_duration_since(self.clock.now()));
            } else {
                assert!(
                    unsent.is_empty(),
                    "the protocol does not read: {} of {} bytes were not taken",
                    unsent.len(),
                    bytes.len()
                );
                return answer;
            }
        }
    }

    /// When the first of the transports tries anew what the kernel has refused.
    fn next_retry(&mut self) -> Option<Instant> {
        let mut first = None;
        for index in 0..self.transports.len() {
            let stream = self.nth(index);
            let call = stream.and_then(|it| it.stream().link.cold_ref()?.retry);
            if let Some(due) = call.and_then(|call| call.due(&self.reactor)) {
                first = Some(first.map_or(due, |first: Instant| first.min(due)));
            }
        }
        first
    }

    // What is in it.

    /// The transport of the first protocol, until its connection is lost.
    pub fn first(&mut self) -> Option<&mut MemoryStream> {
        self.nth(0)
    }

    /// The transport of the second protocol, until its connection is lost.
    pub fn second(&mut self) -> Option<&mut MemoryStream> {
        self.nth(1)
    }

    fn nth(&mut self, index: usize) -> Option<&mut MemoryStream> {
        let transport = *self.transports.get(index)?;
        self.get(transport)
    }

    /// A transport, until its connection is lost. Calls of it take effect at once.
    /// Callbacks follow when the pump runs.
    pub fn get(&mut self, transport: MemoryHandle) -> Option<&mut MemoryStream> {
        self.reactor.get(transport.handle())
    }

    /// The names of the transports, in the order in which they were put here.
    pub fn transports(&self) -> &[MemoryHandle] {
        &self.transports
    }

    /// Whether every connection is lost, and its protocol was told so.
    pub fn is_lost(&mut self) -> bool {
        let reactor = &mut self.reactor;
        let mut handles = self.transports.iter();
        handles.all(|transport| !reactor.is_registered(transport.handle().token()))
    }

    /// Ends one side as the death of its process would. Its protocol is dropped and not
    /// told. Its socket closes, and everything unread and unsent is lost.
    pub fn kill(&mut self, transport: MemoryHandle) {
        self.reactor
            .enter(transport.handle().token(), |_, _| Next::Remove);
    }

    /// The reactor. Use it to schedule calls, to stop, or to call protocols
    /// ([`call_protocol`](crate::Transports::call_protocol)).
    pub fn reactor(&mut self) -> &mut Reactor {
        &mut self.reactor
    }

    /// The reactor's clock.
    pub fn clock(&self) -> &ManualClock {
        &self.clock
    }

    /// The kernel. Use it to change settings or to have calls fail.
    pub fn kernel(&self) -> &SimulatedKernel {
        &self.kernel
    }
}

impl fmt::Debug for Pump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pump")
            .field("reactor", &self.reactor)
            .field("kernel", &self.kernel)
            .field("transports", &self.transports)
            .finish_non_exhaustive()
    }
}
