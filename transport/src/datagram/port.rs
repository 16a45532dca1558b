//! A datagram socket as its protocol sees it. Nothing here calls user code.

use std::io;
use std::iter;
use std::mem;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use bowline_protocol::{
    Address, AddressRef, CloseReason, DatagramCounts, DatagramHandle, DatagramProtocol,
    DatagramTransport, Linger, PassedDescriptor, QueueLimits, SendDescriptorError,
    SendDescriptorErrorKind, SendRefusal, SendStatus, TransportState, WriteObserver,
};
use bowline_reactor::{Handle, Reactor, Section, Token};

use super::queue::SendQueue;
use super::socket::{AfterSendError, DatagramSocket, Outgoing, name_ref};
use crate::closer::close_elsewhere;
use crate::file_descriptor::not_connected;
use crate::kinds::address_ref;
use crate::log;
use crate::shared::{Ledger, Shared};
use crate::sys::{self, MAX_DESCRIPTORS, NameRef};

/// The part of the queue that may wait for one peer that does not read, as a divisor.
const SHARES: usize = 8;

/// A datagram socket of the kind `S`, as a transport.
///
/// It has the methods of [`DatagramTransport`], and those that its kind adds.
#[derive(Debug)]
pub struct Port<S> {
    pub(crate) socket: S,
    pub(super) shared: Rc<Shared>,
    pub(super) token: Token,
    /// `Some` while something waits to be sent.
    queue: Option<Box<SendQueue>>,
    limits: QueueLimits,
    pub(super) counts: DatagramCounts,
    pub(super) bytes_sent: u64,
    pub(super) state: PortState,
    /// The reason of the end. `None` means [`CloseReason::Done`].
    pub(super) reason: Option<CloseReason>,
    /// Latched readiness: a receive may succeed.
    pub(super) is_readable: bool,
    /// Latched readiness: a send may succeed.
    pub(super) is_writable: bool,
    pub(super) watches_writing: bool,
    is_paused: bool,
    /// How many hold reading.
    pub(super) holds: u32,
    /// Whether the protocol was told that there is no room, and not yet that there is
    /// room again.
    pub(super) owes_room: bool,
    /// Whether sends wait for a timer.
    pub(super) waits_for_timer: bool,
    /// The limit of `stop_listening_within`, until it is scheduled.
    pub(super) stop_within: Option<Duration>,
    /// How many datagrams, bytes and descriptors were dropped at the end.
    dropped: (usize, usize, usize),
    /// Whether the first datagram has been tried again already.
    has_tried_again: bool,
    pub(super) linger: Linger,
    pub(super) warned: Warned,
    /// Whether the open port takes no more datagrams.
    is_send_closed: bool,
    pub(super) ends: Ends,
    /// Whether it was detached before, so that its beginning was told already.
    pub(super) is_reattached: bool,
    /// Who is told of everything that is sent.
    pub(super) observer: Option<Rc<dyn WriteObserver>>,
}

/// The warnings that were logged already. Each comes once per socket, since peers could
/// fill the disk otherwise.
#[derive(Debug, Default)]
pub(super) struct Warned {
    refused: bool,
    pub(super) failed: bool,
    pub(super) unclaimed: bool,
    pub(super) lost: bool,
    pub(super) unknown: bool,
}

/// The state of the two directions of a connection.
#[derive(Debug, Default)]
pub(super) struct Ends {
    /// The connector that made the connection.
    pub(super) connector: Option<Token>,
    pub(super) read: ReadEnd,
    pub(super) write: WriteEnd,
    /// The reason why nothing can be sent any more.
    pub(super) broken: Option<CloseReason>,
    pub(super) was_told_broken: bool,
}

/// The settings and state of a port that was taken apart.
#[derive(Debug)]
pub(super) struct KeptPort {
    limits: QueueLimits,
    counts: DatagramCounts,
    bytes_sent: u64,
    is_stopping: bool,
    is_paused: bool,
    holds: u32,
    owes_room: bool,
    linger: Linger,
    is_send_closed: bool,
    ends: Ends,
    observer: Option<Rc<dyn WriteObserver>>,
}

impl KeptPort {
    /// Whether both directions were open.
    pub(super) fn is_whole(&self) -> bool {
        let is_open = self.ends.read == ReadEnd::Open && self.ends.write == WriteEnd::Open;
        is_open && self.ends.broken.is_none() && !self.is_stopping
    }
}

/// The end of the peer's direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum ReadEnd {
    #[default]
    Open,
    /// It has arrived, behind packets that are not delivered yet.
    Arrived,
    Told,
}

/// The end of our direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum WriteEnd {
    #[default]
    Open,
    /// It closes once everything was sent.
    Closing,
    Closed,
}

/// How far a port is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PortState {
    Open,
    /// It closes once everything was sent.
    Stopping,
    /// It is over. The protocol is yet to be told.
    Ending,
    /// The socket is closed.
    Closed,
}

impl<S: DatagramSocket> Port<S> {
    /// Says what waits to be sent.
    pub(super) fn tell_queue(&self, section: &mut Section) {
        if let Some(queue) = &self.queue {
            section
                .set("queued_messages", queue.len())
                .set("buffered_bytes", queue.unsent_bytes())
                .set("queued_descriptors", queue.descriptors());
        }
    }

    /// Has the reactor drive a socket with a protocol. The endpoint of a kind calls
    /// this. `started` follows after the running callback.
    ///
    /// # Errors
    ///
    /// The reactor is full (2^24 descriptors), or epoll_ctl(2) failed. The socket comes
    /// back.
    pub fn open(
        reactor: &mut Reactor,
        socket: S,
        protocol: impl DatagramProtocol<Self>,
    ) -> Result<Handle<Self>, (io::Error, S)> {
        let token = super::install(reactor, socket, protocol)?;
        Ok(Handle::new(token, |facet| facet.downcast_mut()))
    }

    pub(super) fn new(socket: S, shared: Rc<Shared>, token: Token) -> Self {
        Self {
            socket,
            shared,
            token,
            queue: None,
            limits: QueueLimits::default(),
            counts: DatagramCounts::default(),
            bytes_sent: 0,
            state: PortState::Open,
            reason: None,
            is_readable: false,
            is_writable: true,
            watches_writing: false,
            is_paused: false,
            holds: 0,
            owes_room: false,
            waits_for_timer: false,
            stop_within: None,
            dropped: (0, 0, 0),
            has_tried_again: false,
            linger: Linger::Clear,
            warned: Warned::default(),
            is_send_closed: false,
            ends: Ends::default(),
            is_reattached: false,
            observer: None,
        }
    }

    /// Whether datagrams may be delivered.
    #[inline]
    pub(super) fn is_receiving(&self) -> bool {
        self.state == PortState::Open && !self.is_paused && self.holds == 0
    }

    /// Whether nothing more is delivered.
    pub(super) fn is_deaf(&self) -> bool {
        self.state != PortState::Open
    }

    /// Whether a send may succeed, and something waits for it.
    #[inline]
    pub(super) fn may_send(&self) -> bool {
        self.is_writable
            && !self.waits_for_timer
            && self
                .queue
                .as_deref()
                .is_some_and(SendQueue::has_any_in_line)
            && !matches!(self.state, PortState::Ending | PortState::Closed)
    }

    #[inline]
    pub(super) fn has_unsent(&self) -> bool {
        self.queue.is_some()
    }

    /// Whether datagrams wait for peers that have no room.
    pub(super) fn has_held(&self) -> bool {
        self.queue.as_ref().is_some_and(|queue| queue.has_held())
    }

    /// Ends the port for `reason`, unless there is a reason already.
    pub(super) fn end(&mut self, reason: CloseReason) {
        if matches!(self.state, PortState::Ending | PortState::Closed) {
            return;
        }
        self.state = PortState::Ending;
        self.reason = Some(reason);
    }

    /// Records that nothing more can be sent, and drops the queue. Packets that the
    /// peer has sent before are delivered. Then the connection ends for the first such
    /// error.
    #[cold]
    pub(super) fn break_off(&mut self, error: io::Error) {
        self.is_send_closed = true;
        self.drop_queue();
        // Read even if the latch is clear: everything that has arrived is delivered.
        self.is_readable = true;
        if self.ends.broken.is_none() {
            self.ends.broken = Some(CloseReason::Lost(error));
        }
    }

    /// Ends a broken connection that has nothing left to receive. If the peer is still
    /// there, its end may never come, since it may wait for us.
    pub(super) fn end_if_read_out(&mut self) {
        let is_of_peer = |error: &io::Error| {
            matches!(
                error.kind(),
                io::ErrorKind::BrokenPipe
                    | io::ErrorKind::ConnectionReset
                    | io::ErrorKind::NotConnected
            )
        };
        if let Some(CloseReason::Lost(error)) = &self.ends.broken
            && !is_of_peer(error)
            && let Some(reason) = self.ends.broken.take()
        {
            self.end(reason);
        }
    }

    /// Takes no more packets. Our side closes once everything was sent.
    pub(super) fn close_writing(&mut self) {
        if self.state == PortState::Open && self.ends.write == WriteEnd::Open {
            self.is_send_closed = true;
            self.ends.write = WriteEnd::Closing;
        }
    }

    fn drop_queue(&mut self) {
        if let Some(mut queue) = self.queue.take() {
            self.dropped = (queue.len(), queue.unsent_bytes(), queue.descriptors());
            self.close_unsent(queue.take_all());
        }
    }

    /// Records which connector has made the connection.
    pub(crate) fn made_by(&mut self, connector: Option<Token>) {
        self.ends.connector = connector;
    }

    /// Records which listener has accepted the connection.
    #[cfg(feature = "inspect")]
    pub(crate) fn came_from(&self, tally: &crate::Tally) {
        self.shared.kinds.came(self.token, tally);
    }

    /// Queues a packet that was taken out before, whatever the limits are.
    pub(super) fn requeue(&mut self, data: &[u8], descriptors: Vec<PassedDescriptor>) {
        let shared = &self.shared;
        let queue = self.queue.get_or_insert_with(|| shared.take_send_queue());
        queue.push(&[data], &[], descriptors);
    }

    /// Takes the settings and the state.
    pub(super) fn keep(&mut self) -> KeptPort {
        KeptPort {
            limits: self.limits,
            counts: self.counts,
            bytes_sent: self.bytes_sent,
            is_stopping: self.state == PortState::Stopping,
            is_paused: self.is_paused,
            holds: self.holds,
            owes_room: self.owes_room,
            linger: self.linger,
            is_send_closed: self.is_send_closed,
            ends: mem::take(&mut self.ends),
            observer: self.observer.take(),
        }
    }

    /// Puts the settings and the state back.
    pub(super) fn restore(&mut self, kept: KeptPort) {
        self.is_reattached = true;
        self.is_readable = true;
        self.limits = kept.limits;
        self.counts = kept.counts;
        self.bytes_sent = kept.bytes_sent;
        if kept.is_stopping {
            self.state = PortState::Stopping;
        }
        self.is_paused = kept.is_paused;
        self.holds = kept.holds;
        self.owes_room = kept.owes_room;
        self.linger = kept.linger;
        self.is_send_closed = kept.is_send_closed;
        self.ends = Ends {
            connector: None,
            ..kept.ends
        };
        self.observer = kept.observer;
    }

    pub(super) fn is_paused(&self) -> bool {
        self.is_paused
    }

    /// How far it reads, in words.
    pub(super) fn reading(&self) -> &'static str {
        match (self.is_paused, self.holds) {
            (true, _) => "paused",
            (false, 0) => "on",
            (false, _) => "held",
        }
    }

    /// Takes out the queue, in order.
    pub(super) fn take_unsent(&mut self) -> Vec<super::queue::TakenOut> {
        self.try_again();
        let queue = self.queue.as_mut();
        let all = queue.map_or_else(Vec::new, |queue| {
            iter::from_fn(|| queue.take_out()).collect()
        });
        self.put_queue_away();
        all
    }

    /// Called when it is time to try again.
    pub(super) fn try_again(&mut self) {
        self.waits_for_timer = false;
        self.is_writable = true;
        if let Some(queue) = &mut self.queue {
            queue.release();
        }
    }

    // Sending.

    /// Queues a datagram.
    #[inline]
    pub(super) fn queue_datagram(
        &mut self,
        parts: &[&[u8]],
        to: Option<AddressRef<'_>>,
        descriptors: Vec<PassedDescriptor>,
    ) -> Result<SendStatus, (SendRefusal, Vec<PassedDescriptor>)> {
        let length = parts.iter().map(|part| part.len()).sum();
        let (encoded, inet4);
        let name: &[u8] = match to {
            None => &[],
            Some(AddressRef::Inet(SocketAddr::V4(address))) => {
                inet4 = sys::inet4_name(&address);
                &inet4
            }
            Some(to) => match name_ref(to).encode() {
                Ok(name) => {
                    encoded = name;
                    encoded.as_bytes()
                }
                Err(_) => return Err((self.refuse(SendRefusal::BadAddress), descriptors)),
            },
        };
        if let Some(refusal) = self.refusal(length, to, name) {
            return Err((self.refuse(refusal), descriptors));
        }
        let queue = self
            .queue
            .get_or_insert_with(|| self.shared.take_send_queue());
        queue.push(parts, name, descriptors);
        if let Some(observer) = &self.observer {
            observer.written(&parts.concat());
        }
        match self.is_full() {
            false => Ok(SendStatus::Ready),
            true => {
                self.owes_room = true;
                Ok(SendStatus::Full)
            }
        }
    }

    /// The reason why a datagram is not taken, if there is one.
    #[inline]
    fn refusal(
        &mut self,
        length: usize,
        to: Option<AddressRef<'_>>,
        name: &[u8],
    ) -> Option<SendRefusal> {
        if self.state != PortState::Open || self.is_send_closed {
            return Some(SendRefusal::Closed);
        }
        if let Some(refusal) = self.socket.refuses(length, to) {
            return Some(refusal);
        }
        let queue = self.queue.as_ref()?;
        let most = self.limits.most.max(1);
        let is_full = queue.len() >= most
            || queue.unsent_bytes().saturating_add(length) > self.limits.most_bytes
            || queue.has_held() && queue.held_for(name) >= (most / SHARES).max(1);
        if is_full {
            self.owes_room = true;
        }
        is_full.then_some(SendRefusal::QueueFull)
    }

    #[cold]
    fn refuse(&mut self, refusal: SendRefusal) -> SendRefusal {
        self.counts.refused += 1;
        if refusal != SendRefusal::Closed && !mem::replace(&mut self.warned.refused, true) {
            log::warn!(
                target: log::TRANSPORT,
                "{} {} {}: a datagram was refused: {refusal}",
                self.token,
                self.socket.kind(),
                self.socket.host(),
            );
        }
        refusal
    }

    #[inline]
    pub(super) fn is_full(&self) -> bool {
        self.queue.as_ref().is_some_and(|queue| {
            queue.len() >= self.limits.full.max(1)
                || queue.unsent_bytes() >= self.limits.full_bytes.max(1)
        })
    }

    /// Whether there is room again, and the protocol waits for it.
    #[inline]
    pub(super) fn has_room_again(&self) -> bool {
        self.owes_room
            && self.state == PortState::Open
            && self.queue.as_ref().is_none_or(|queue| {
                queue.len() < self.limits.full.max(1).div_ceil(2)
                    && queue.unsent_bytes() < self.limits.full_bytes.max(1).div_ceil(2)
            })
    }

    /// Sends by one call. If the first datagram fails, returns the error; it is still
    /// the first one then.
    #[inline]
    pub(super) fn flush(&mut self) -> Result<(), io::Error> {
        let Some(queue) = &mut self.queue else {
            return Ok(());
        };
        let outgoing = Outgoing {
            queue,
            shared: &self.shared,
        };
        match self.socket.send(&outgoing) {
            Ok(count) => {
                let (bytes, descriptors) = (queue.unsent_bytes(), queue.descriptors());
                queue.sent(count);
                self.bytes_sent += (bytes - queue.unsent_bytes()) as u64;
                self.counts.sent += count as u64;
                self.has_tried_again = false;
                if descriptors > 0 {
                    let left = descriptors - queue.descriptors();
                    Ledger::add(&self.shared.ledger.passed, left);
                }
                self.put_queue_away();
                Ok(())
            }
            Err(error) => self.flush_failed(error),
        }
    }

    #[cold]
    fn flush_failed(&mut self, error: io::Error) -> Result<(), io::Error> {
        let first = self.queue.as_ref().and_then(|queue| queue.in_line().next());
        let to = first.and_then(|first| match first.name {
            [] => None,
            name => Some(address_ref(NameRef::decode(name))),
        });
        match self.socket.after(&error, to) {
            AfterSendError::WaitForRoom => self.is_writable = false,
            AfterSendError::WaitForPeer => {
                if let Some(queue) = &mut self.queue {
                    queue.hold_first();
                }
            }
            AfterSendError::WaitForTime => self.waits_for_timer = true,
            // It is tried again only once. A second error concerns this datagram after
            // all.
            AfterSendError::TryAgain if !self.has_tried_again => self.has_tried_again = true,
            AfterSendError::TryAgain | AfterSendError::Fail => {
                self.has_tried_again = false;
                return Err(error);
            }
            AfterSendError::Broken => {
                self.break_off(error);
                return Ok(());
            }
        }
        match self.has_tried_again {
            true => Err(error),
            false => Ok(()),
        }
    }

    /// Whether the last error concerns an earlier datagram.
    pub(super) fn is_to_be_tried_again(&self) -> bool {
        self.has_tried_again
    }

    /// Takes out the first datagram, which cannot be sent.
    pub(super) fn take_failed(&mut self) -> Option<super::queue::TakenOut> {
        let taken = self.queue.as_mut()?.take_out();
        self.put_queue_away();
        self.counts.failed += 1;
        taken
    }

    #[inline]
    fn put_queue_away(&mut self) {
        if self.queue.as_ref().is_some_and(|queue| queue.is_empty())
            && let Some(queue) = self.queue.take()
        {
            self.shared.return_send_queue(queue);
        }
    }

    /// Closes unsent descriptors.
    pub(super) fn close_unsent(&self, descriptors: Vec<PassedDescriptor>) {
        Ledger::add(&self.shared.ledger.unsent, descriptors.len());
        for descriptor in descriptors {
            // It may have come from another peer.
            if let PassedDescriptor::Owned(fd) = descriptor
                && sys::is_unix(fd.as_fd())
            {
                close_elsewhere(fd);
            }
        }
    }

    /// Closes the socket, and drops the queue.
    pub(super) fn close(&mut self, reactor: &mut Reactor) {
        self.state = PortState::Closed;
        self.drop_queue();
        if self.socket.is_open() {
            // If others hold the socket too, epoll would go on to report it.
            self.socket.unwatch(reactor);
            self.socket.close();
            self.is_closed_now();
        }
    }

    /// Counts that the socket was closed or detached.
    pub(super) fn is_closed_now(&self) {
        Ledger::add(&self.shared.ledger.closed, 1);
        #[cfg(feature = "inspect")]
        self.shared.kinds.left(
            self.token,
            crate::kind_counts::Done {
                connections: 1,
                sent_messages: self.counts.sent,
                received_messages: self.counts.received,
                ..Default::default()
            },
        );
    }

    /// Makes a handle of this port as a `T`.
    pub(crate) fn named<T: ?Sized>(
        &self,
        view: fn(&mut dyn std::any::Any) -> Option<&mut T>,
    ) -> Handle<T> {
        Handle::new(self.token, view)
    }

    pub(crate) fn open_socket(&self) -> io::Result<BorrowedFd<'_>> {
        self.socket.source().ok_or_else(not_connected)
    }

    /// Queues a datagram with descriptors. It is for kinds that pass some.
    pub(crate) fn queue_with_descriptors(
        &mut self,
        data: &[u8],
        to: Option<AddressRef<'_>>,
        descriptors: Vec<PassedDescriptor>,
    ) -> Result<SendStatus, SendDescriptorError> {
        if descriptors.len() > MAX_DESCRIPTORS {
            return Err(SendDescriptorError {
                kind: SendDescriptorErrorKind::TooManyForOneMessage,
                descriptors,
            });
        }
        self.queue_datagram(&[data], to, descriptors)
            .map_err(|(refusal, descriptors)| SendDescriptorError {
                kind: SendDescriptorErrorKind::Datagram(refusal),
                descriptors,
            })
    }

    pub(crate) fn unsent_descriptor_count(&self) -> usize {
        let waiting = self.queue.as_ref().map_or(0, |queue| queue.descriptors());
        waiting + self.dropped.2
    }

    pub(crate) fn set_linger(&mut self, linger: Linger) {
        self.linger = linger;
    }
}

pub(super) fn status(
    result: Result<SendStatus, (SendRefusal, Vec<PassedDescriptor>)>,
) -> SendStatus {
    result.unwrap_or_else(|(refusal, _)| SendStatus::Refused(refusal))
}

impl<S: DatagramSocket> DatagramTransport for Port<S> {
    #[inline]
    fn send(&mut self, data: &[u8]) -> SendStatus {
        status(self.queue_datagram(&[data], None, Vec::new()))
    }

    #[inline]
    fn send_to(&mut self, data: &[u8], to: AddressRef<'_>) -> SendStatus {
        status(self.queue_datagram(&[data], Some(to), Vec::new()))
    }

    fn send_sequence(&mut self, parts: &[&[u8]], to: Option<AddressRef<'_>>) -> SendStatus {
        status(self.queue_datagram(parts, to, Vec::new()))
    }

    fn unsent_datagrams(&self) -> usize {
        self.queue.as_ref().map_or(0, |queue| queue.len()) + self.dropped.0
    }

    fn unsent_bytes(&self) -> usize {
        let waiting = self.queue.as_ref().map_or(0, |queue| queue.unsent_bytes());
        waiting + self.dropped.1
    }

    fn is_send_buffer_full(&self) -> bool {
        self.is_full()
    }

    fn queue_limits(&self) -> QueueLimits {
        self.limits
    }

    fn set_queue_limits(&mut self, limits: QueueLimits) {
        self.limits = limits;
    }

    fn pause_producing(&mut self) {
        self.is_paused = true;
    }

    fn resume_producing(&mut self) {
        self.is_paused = false;
    }

    fn is_reading_paused(&self) -> bool {
        self.is_paused
    }

    fn stop_listening(&mut self) {
        if self.state == PortState::Open {
            self.state = PortState::Stopping;
        }
    }

    fn stop_listening_within(&mut self, deadline: Duration) {
        self.stop_listening();
        if self.state == PortState::Stopping {
            self.stop_within = Some(deadline);
        }
    }

    fn abort(&mut self) {
        self.end(CloseReason::Aborted);
    }

    fn state(&self) -> TransportState {
        match self.state {
            PortState::Open => TransportState::Connected,
            PortState::Stopping => TransportState::Closing,
            PortState::Ending | PortState::Closed => TransportState::Lost,
        }
    }

    fn host(&self) -> Address {
        self.socket.host()
    }

    fn peer(&self) -> Option<Address> {
        self.socket.peer()
    }

    fn connect(&mut self, peer: AddressRef<'_>) -> io::Result<()> {
        match self.state {
            PortState::Open => self.socket.connect(peer),
            _ => Err(not_connected()),
        }
    }

    fn counts(&self) -> DatagramCounts {
        self.counts
    }

    fn dropped_by_kernel(&self) -> io::Result<u32> {
        self.socket.dropped()
    }

    fn duplicate(&self) -> io::Result<OwnedFd> {
        self.socket.duplicate()
    }

    fn socket_descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.socket.source()
    }

    fn handle(&self) -> DatagramHandle {
        self.named(|facet| facet.downcast_mut::<Self>().map(|port| port as _))
    }

    fn as_dyn(&mut self) -> &mut dyn DatagramTransport {
        self
    }
}
