//! The layer that passes descriptors.

use std::any::Any;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;

use bowline_protocol::{
    CloseReason, Credentials, DescriptorLimits, Linger, PassedDescriptor, SendDescriptorError,
    SendDescriptorErrorKind, UnixTransport, UnixTransportHandle, WriteStatus,
};
use bowline_reactor::Handle;

use crate::closer::close_elsewhere;
use crate::descriptor_queue::{DescriptorQueue, UnsentDescriptors};
use crate::file_descriptor::{
    Core, FileDescriptor, Received, ReceivedLimits, Sent, State, flag, pending,
};
use crate::log;
use crate::shared::{Ledger, READ_BYTES, ReadBuffers};
use crate::socket::UnixSocket;
use crate::socket::private::Sealed;
use crate::stream::Stream;
use crate::sys::{self, MAX_DESCRIPTORS};

/// Passes open descriptors beside the bytes of the transport below.
///
/// It overrides [`write_some_data`](FileDescriptor::write_some_data),
/// [`do_read`](FileDescriptor::do_read) and
/// [`is_send_buffer_full`](FileDescriptor::is_send_buffer_full), and delegates
/// the rest. With no descriptor queued it costs one comparison per write. It
/// gives a transport the methods of [`UnixTransport`]. (Twisted:
/// `_SendmsgMixin`.)
#[derive(Debug)]
pub struct SendmsgMixin<B> {
    base: B,
    /// There from the first descriptor queued or limit set on.
    passing: Option<Box<Passing>>,
}

/// A UNIX stream connection, which passes descriptors.
pub type UnixStream = SendmsgMixin<Stream<UnixSocket>>;

/// How often an ended connection is read for descriptors at most, and how many are
/// closed then: about a millisecond's worth. A flooder's socket holds 70,000; whoever
/// leaves more has it closed in another thread, and is told of a reset.
const MOST_UNREAD: usize = 256;
const MOST_UNREAD_DESCRIPTORS: usize = 1_024;

#[derive(Debug)]
struct Passing {
    queue: DescriptorQueue,
    limits: DescriptorLimits,
    /// How many have left.
    left: u64,
    /// How many were closed unsent.
    discarded: usize,
    linger: Linger,
}

impl<B: FileDescriptor> SendmsgMixin<B> {
    /// Puts the layer on `base`, which should be over a UNIX socket.
    pub(crate) fn new(base: B) -> Self {
        Self {
            base,
            passing: None,
        }
    }

    fn passing(&mut self) -> &mut Passing {
        self.passing.get_or_insert_with(|| {
            Box::new(Passing {
                queue: DescriptorQueue::default(),
                limits: DescriptorLimits::default(),
                left: 0,
                discarded: 0,
                linger: Linger::Clear,
            })
        })
    }

    fn limits(&self) -> DescriptorLimits {
        self.passing
            .as_ref()
            .map_or_else(DescriptorLimits::default, |passing| passing.limits)
    }

    pub(crate) fn take_descriptors(&mut self) -> Vec<UnsentDescriptors> {
        let sent = self.base.core().sent;
        self.passing
            .as_mut()
            .map_or_else(Vec::new, |passing| passing.queue.take(sent))
    }

    /// Why a descriptor cannot be queued, if it cannot.
    #[inline]
    fn refusal(&self, more: usize) -> Option<SendDescriptorErrorKind> {
        if self.base.core().has(flag::WRITES_WITH_CARE)
            && let Some(kind) = self.refusal_by_state()
        {
            return Some(kind);
        }
        let (queued, most) = match &self.passing {
            Some(passing) => (passing.queue.len(), passing.limits.queued),
            None => (0, DescriptorLimits::default().queued),
        };
        (queued.saturating_add(more) > most).then_some(SendDescriptorErrorKind::QueueFull)
    }

    fn refusal_by_state(&self) -> Option<SendDescriptorErrorKind> {
        let core = self.base.core();
        match core.state() {
            State::Open => {}
            State::Closing | State::WriteClosing if core.has_producer() => {}
            State::WriteClosing | State::WriteClosed => {
                return Some(SendDescriptorErrorKind::WriteClosed);
            }
            State::Closing | State::Lingering | State::Ending | State::Lost => {
                return Some(SendDescriptorErrorKind::NotConnected);
            }
        }
        core.is_broken()
            .then_some(SendDescriptorErrorKind::NotConnected)
    }

    /// Reads from a socket to which the kernel lets nobody send descriptors,
    /// those that wait from before. Plain reads will do when none can be left.
    #[cold]
    #[inline(never)]
    fn read_refusing(&mut self, buffers: &mut ReadBuffers) -> io::Result<Received> {
        let core = self.base.core_mut();
        let limit = core.read_limit as usize;
        let received = core.socket.receive(buffers, limit).map(Received::from);
        let is_drained = match &received {
            // What carries descriptors is glued to what comes before it
            // (unix(7) does not say so; Linux does).
            Ok(received) => received.bytes < limit && !received.had_ancillary,
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
        };
        if is_drained {
            core.flags |= flag::PLAIN_READS;
        }
        if matches!(&received, Ok(received) if received.had_ancillary) && self.is_wary() {
            self.disarm(buffers);
        }
        received
    }

    /// Whether the peer is not trusted.
    #[inline]
    fn is_wary(&self) -> bool {
        let passing = self.passing.as_ref();
        passing.is_none_or(|passing| passing.linger == Linger::Clear)
    }

    /// Takes the linger setting from what was received, which may have come from
    /// anybody.
    #[inline(never)]
    fn disarm(&mut self, buffers: &mut ReadBuffers) {
        let mut has_socket = false;
        for fd in &buffers.ancillary.descriptors {
            has_socket |= sys::disarm_linger(fd.as_fd());
        }
        if has_socket {
            self.refuse_own_socket(buffers);
        }
    }

    /// Ends the connection if the peer sent it its own socket: that would keep
    /// it open when everybody else has closed it.
    fn refuse_own_socket(&mut self, buffers: &mut ReadBuffers) {
        let descriptors = &mut buffers.ancillary.descriptors;
        if self.has_own_socket(descriptors) {
            let core = self.base.core_mut();
            Ledger::add(&core.shared.ledger.received, descriptors.len());
            core.shared.refuse_received(descriptors.drain(..));
            core.end(CloseReason::OwnSocket);
        }
    }

    /// Whether one of `descriptors` is this transport's own socket. That costs a
    /// system call for each.
    fn has_own_socket(&mut self, descriptors: &[impl AsFd]) -> bool {
        let core = self.base.core_mut();
        let own = match core.cold_ref().and_then(|cold| cold.own_cookie) {
            Some(own) => own,
            None => {
                let source = core.socket.source();
                let Some(own) = source.and_then(|own| sys::cookie(own).ok()) else {
                    return false;
                };
                *core.cold().own_cookie.insert(own)
            }
        };
        descriptors
            .iter()
            .any(|fd| sys::cookie(fd.as_fd()).is_ok_and(|cookie| cookie == own))
    }

    /// Whether one of `descriptors`, which are to be sent, is this transport's own
    /// socket. Looked at only where somebody can have a copy of it.
    fn would_send_itself(&mut self, descriptors: &[PassedDescriptor]) -> bool {
        self.base.core().has_lent.get() && self.has_own_socket(descriptors)
    }

    /// The first of the next message's descriptors that the kernel passes to nobody. Each
    /// is sent by itself, to ourselves; none is found where that cannot be done.
    #[cold]
    fn find_unpassable(&self) -> Option<usize> {
        let queue = &self.passing.as_ref()?.queue;
        let (probe, _other) = StdUnixStream::pair().ok()?;
        probe.set_nonblocking(true).ok()?;
        let mut control = self.base.core().shared.send_control.borrow_mut();
        let (front, back) = queue.first(queue.len().min(MAX_DESCRIPTORS));
        front.iter().chain(back).position(|descriptor| {
            let byte = [IoSlice::new(b"?")];
            let fd = [descriptor.as_fd()];
            sys::send_with_descriptors(probe.as_fd(), &byte, &fd, &mut control.0)
                .is_err_and(|error| error.kind() == io::ErrorKind::InvalidInput)
        })
    }

    /// Sends with descriptors on the first byte.
    #[cold]
    fn write_with_queue(&self, passing: &Passing, data: &[u8]) -> io::Result<Sent> {
        let core = self.base.core();
        let plan = passing
            .queue
            .plan(core.sent, data.len(), passing.limits.per_message);
        let data = &data[..plan.bytes];
        let (front, back) = passing.queue.first(plan.descriptors);
        let Some(one) = front.first().map(AsFd::as_fd) else {
            return self.base.write_some_data(data);
        };
        let mut control = core.shared.send_control.borrow_mut();
        let bytes = if plan.descriptors == 1 {
            core.socket
                .send_with_descriptors(data, &[one], &mut control)?
        } else {
            // On the stack: this is the hot path of those who pass many.
            let mut descriptors = [one; MAX_DESCRIPTORS];
            let (in_front, behind) = descriptors.split_at_mut(front.len());
            for (place, descriptor) in in_front.iter_mut().zip(front) {
                *place = descriptor.as_fd();
            }
            for (place, descriptor) in behind.iter_mut().zip(back) {
                *place = descriptor.as_fd();
            }
            let descriptors = &descriptors[..plan.descriptors];
            core.socket
                .send_with_descriptors(data, descriptors, &mut control)?
        };
        Ok(Sent {
            bytes,
            descriptors: plan.descriptors,
        })
    }
}

impl<B: FileDescriptor> FileDescriptor for SendmsgMixin<B> {
    type Socket = B::Socket;

    #[inline]
    fn core(&self) -> &Core<B::Socket> {
        self.base.core()
    }

    #[inline]
    fn core_mut(&mut self) -> &mut Core<B::Socket> {
        self.base.core_mut()
    }

    #[inline(always)]
    fn write_some_data(&self, data: &[u8]) -> io::Result<Sent> {
        match &self.passing {
            Some(passing) if !passing.queue.is_empty() => self.write_with_queue(passing, data),
            _ => self.base.write_some_data(data),
        }
    }

    fn write_some_pieces(&self, pieces: &[IoSlice<'_>]) -> io::Result<Sent> {
        match &self.passing {
            Some(passing) if !passing.queue.is_empty() => {
                self.write_with_queue(passing, &pieces[0])
            }
            _ => self.base.write_some_pieces(pieces),
        }
    }

    fn data_sent(&mut self, sent: Sent) {
        if let Some(passing) = &mut self.passing {
            passing.queue.sent(sent.descriptors);
            passing.left += sent.descriptors as u64;
        }
        let core = self.base.core_mut();
        Ledger::add(&core.shared.ledger.passed, sent.descriptors);
        core.cold().descriptors_left += sent.descriptors;
        core.flags |= pending::DESCRIPTORS_SENT;
    }

    fn reason_of(&mut self, error: io::Error) -> CloseReason {
        if error.kind() != io::ErrorKind::InvalidInput {
            return CloseReason::Lost(error);
        }
        let Some(position) = self.find_unpassable() else {
            return CloseReason::Lost(error);
        };
        log::warn!(
            target: log::DESCRIPTORS,
            "{}: the kernel does not pass descriptor {position} of {} queued: {error}",
            self.base.core().token,
            self.queued_descriptors(),
        );
        CloseReason::UnpassableDescriptor { position, error }
    }

    #[inline(always)]
    fn do_read(&mut self, buffers: &mut ReadBuffers) -> io::Result<Received> {
        let core = self.base.core_mut();
        if core.has(flag::PLAIN_READS) {
            return self.base.do_read(buffers);
        }
        if core.has(flag::REFUSES_DESCRIPTORS) {
            return self.read_refusing(buffers);
        }
        let limit = core.read_limit as usize;
        let received: Received = core.socket.receive(buffers, limit)?.into();
        if received.had_ancillary && self.is_wary() {
            self.disarm(buffers);
        }
        Ok(received)
    }

    #[inline]
    fn is_send_buffer_full(&self) -> bool {
        let is_queue_full = self
            .passing
            .as_ref()
            .is_some_and(|passing| passing.queue.len() > passing.limits.high);
        is_queue_full || self.base.is_send_buffer_full()
    }

    fn queued_descriptors(&self) -> usize {
        self.passing
            .as_ref()
            .map_or(0, |passing| passing.queue.len())
    }

    fn discard_descriptors(&mut self) -> usize {
        let Some(passing) = &mut self.passing else {
            return 0;
        };
        let queued = passing.queue.take_all();
        let count = queued.len();
        for descriptor in queued {
            // It may have come from another peer.
            if let PassedDescriptor::Owned(fd) = descriptor
                && sys::is_unix(fd.as_fd())
            {
                close_elsewhere(fd);
            }
        }
        passing.discarded += count;
        Ledger::add(&self.base.core().shared.ledger.unsent, count);
        count
    }

    #[cold]
    fn disarm_unread(&mut self) {
        let core = self.base.core_mut();
        let is_trusted = self
            .passing
            .as_ref()
            .is_some_and(|passing| passing.linger == Linger::Keep);
        let Some(source) = core.socket.source() else {
            return;
        };
        if is_trusted || core.has(flag::PLAIN_READS) {
            return;
        }
        // What is closed unread is closed by the kernel, in our call, and can
        // linger: so it is read, once nothing can come after it. (Before Linux
        // 6.16 it can, if the peer is quick enough.)
        let _ = sys::set_pass_rights(source, false);
        let mut buffers = core.shared.take_buffers();
        let (mut reads, mut descriptors) = (0, 0);
        let mut has_more = true;
        while has_more && reads < MOST_UNREAD && descriptors < MOST_UNREAD_DESCRIPTORS {
            let read = core.socket.receive(&mut buffers, READ_BYTES);
            has_more = read.is_ok_and(|taken| taken.bytes > 0);
            let count = buffers.ancillary.descriptors.len();
            reads += 1;
            descriptors += count;
            if count > 0 {
                Ledger::add(&core.shared.ledger.received, count);
                core.shared
                    .refuse_received(buffers.ancillary.descriptors.drain(..));
            }
            buffers.ancillary.clear();
        }
        core.shared.return_buffers(buffers);
        if has_more && let Some(fd) = core.socket.detach() {
            close_elsewhere(fd);
        }
    }

    #[cold]
    fn leave_unread(&mut self) {
        let core = self.base.core_mut();
        if core.has(flag::READ_ENDED | flag::PLAIN_READS) {
            // No descriptor waits, nor can one come.
            return;
        }
        // With nothing unread it is closed here, so that the peer sees the end by the time
        // that it is told; one that sends at this very moment would have to hit the
        // microsecond.
        let has_unread = core
            .socket
            .source()
            .is_some_and(|source| sys::has_waiting(source).unwrap_or(true));
        if has_unread && let Some(fd) = core.socket.detach() {
            close_elsewhere(fd);
        }
    }

    fn received_limits(&self) -> ReceivedLimits {
        let limits = match &self.passing {
            Some(passing) => &passing.limits,
            None => &DescriptorLimits::default(),
        };
        ReceivedLimits {
            per_read: limits.received_per_read,
            in_all: limits.received_in_all,
            unclaimed: limits.unclaimed,
        }
    }

    fn take_unsent_descriptors(&mut self) -> Vec<UnsentDescriptors> {
        self.take_descriptors()
    }

    fn restore_unsent_descriptors(&mut self, descriptors: Vec<UnsentDescriptors>) {
        if !descriptors.is_empty() {
            let sent = self.base.core().sent;
            self.passing().queue.restore(sent, descriptors);
        }
    }

    fn take_settings(&mut self) -> Option<Box<dyn Any>> {
        self.passing.take().map(|passing| passing as Box<dyn Any>)
    }

    fn restore_settings(&mut self, settings: Box<dyn Any>) {
        // Its queue is empty: what was in it comes back on its own.
        self.passing = settings.downcast().ok();
    }
}

impl_transport!(impl<B: FileDescriptor> SendmsgMixin<B>);

impl<B: FileDescriptor> UnixTransport for SendmsgMixin<B> {
    fn send_file_descriptor(&mut self, fd: PassedDescriptor) -> Result<(), SendDescriptorError> {
        let kind = match self.refusal(1) {
            None if self.would_send_itself(std::slice::from_ref(&fd)) => {
                Some(SendDescriptorErrorKind::OwnSocket)
            }
            kind => kind,
        };
        if let Some(kind) = kind {
            return Err(SendDescriptorError {
                kind,
                descriptors: vec![fd],
            });
        }
        self.passing().queue.push(fd);
        let _: WriteStatus = self.bytes_queued();
        Ok(())
    }

    fn write_with_descriptors(
        &mut self,
        data: &[u8],
        descriptors: Vec<PassedDescriptor>,
    ) -> Result<WriteStatus, SendDescriptorError> {
        let core = self.base.core();
        let (sent, start) = (core.sent, core.sent + core.buffer.len() as u64);
        let has_room = core.takes_bytes(data.len());
        let kind = if descriptors.is_empty() {
            return match FileDescriptor::write(self, data) {
                WriteStatus::Refused => Err(SendDescriptorError {
                    kind: self
                        .refusal(0)
                        .unwrap_or(SendDescriptorErrorKind::BufferFull),
                    descriptors,
                }),
                status => Ok(status),
            };
        } else if descriptors.len() > self.limits().per_exact_message.min(MAX_DESCRIPTORS) {
            Some(SendDescriptorErrorKind::TooManyForOneMessage)
        } else if data.is_empty() {
            Some(SendDescriptorErrorKind::NoBytes)
        } else if let Some(kind) = self.refusal(descriptors.len()) {
            Some(kind)
        } else if self.would_send_itself(&descriptors) {
            Some(SendDescriptorErrorKind::OwnSocket)
        } else if !has_room {
            Some(SendDescriptorErrorKind::BufferFull)
        } else if self
            .passing
            .as_ref()
            .is_some_and(|passing| !passing.queue.is_settled(sent, start))
        {
            Some(SendDescriptorErrorKind::DescriptorsWaiting)
        } else {
            None
        };
        if let Some(kind) = kind {
            return Err(SendDescriptorError { kind, descriptors });
        }
        let end = start + data.len() as u64;
        self.passing().queue.push_exact(start, end, descriptors);
        self.core().note_written(data);
        self.core_mut().buffer_bytes(data);
        Ok(self.bytes_queued())
    }

    fn unsent_descriptors(&self) -> usize {
        self.passing
            .as_ref()
            .map_or(0, |passing| passing.queue.len() + passing.discarded)
    }

    fn reclaim_descriptors(&mut self) -> Vec<PassedDescriptor> {
        if self.base.core().state() != State::Lost {
            return Vec::new();
        }
        let groups = self.take_descriptors();
        let reclaimed: Vec<_> = groups
            .into_iter()
            .flat_map(|group| group.descriptors)
            .collect();
        if let Some(passing) = &mut self.passing {
            // They never left, wherever they go now.
            passing.discarded += reclaimed.len();
        }
        reclaimed
    }

    fn descriptors_sent(&self) -> u64 {
        self.passing.as_ref().map_or(0, |passing| passing.left)
    }

    fn descriptor_limits(&self) -> DescriptorLimits {
        self.limits()
    }

    fn set_descriptor_limits(&mut self, limits: DescriptorLimits) {
        let per_message = limits.per_message.clamp(1, MAX_DESCRIPTORS);
        self.passing().limits = DescriptorLimits {
            per_message,
            ..limits
        };
        self.limits_changed();
    }

    fn set_received_linger(&mut self, linger: Linger) {
        self.passing().linger = linger;
    }

    fn set_descriptors_accepted(&mut self, accepted: bool) -> io::Result<()> {
        sys::set_pass_rights(source(self)?, accepted)?;
        let core = self.core_mut();
        core.flags &= !(flag::REFUSES_DESCRIPTORS | flag::PLAIN_READS);
        if !accepted {
            core.flags |= flag::REFUSES_DESCRIPTORS;
        }
        Ok(())
    }

    fn peer_credentials(&self) -> io::Result<Credentials> {
        self.core().socket.peer_credentials()
    }

    fn peer_pidfd(&self) -> io::Result<OwnedFd> {
        sys::peer_pidfd(source(self)?)
    }

    fn unix_handle(&self) -> UnixTransportHandle {
        Handle::new(self.core().token, |facet| {
            facet.downcast_mut::<Self>().map(|transport| transport as _)
        })
    }
}

fn source<B: FileDescriptor>(transport: &SendmsgMixin<B>) -> io::Result<BorrowedFd<'_>> {
    let source = transport.core().socket.source();
    source.ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::fs::File;
    use std::io::{ErrorKind, Read};
    use std::rc::Rc;
    use std::time::Duration;

    use bowline_protocol::{Context, Protocol, Transport};
    use bowline_reactor::Reactor;

    use super::*;
    use crate::Transports;

    /// What was told at the end, and what came back then.
    type Told = Rc<RefCell<Option<(String, usize, Vec<PassedDescriptor>)>>>;

    struct Sends {
        bad: Option<OwnedFd>,
        told: Told,
        is_exact: bool,
    }

    impl Protocol<UnixStream> for Sends {
        fn connection_made(&mut self, cx: &mut Context<'_, UnixStream>) {
            let file = || PassedDescriptor::from(OwnedFd::from(File::open("/dev/null").unwrap()));
            let bad = self.bad.take().unwrap().into();
            let all = vec![file(), file(), bad, file()];
            let _ = Transport::write(cx.transport, b"before");
            if self.is_exact {
                cx.transport.write_with_descriptors(b"m", all).unwrap();
            } else {
                for each in all {
                    cx.transport.send_file_descriptor(each).unwrap();
                }
            }
        }

        fn data_received(&mut self, _: &mut Context<'_, UnixStream>, _: &[u8]) {}

        fn connection_lost(&mut self, cx: &mut Context<'_, UnixStream>, reason: &CloseReason) {
            let CloseReason::UnpassableDescriptor { position, error } = reason else {
                panic!("{reason:?}");
            };
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            let back = cx.transport.reclaim_descriptors();
            *self.told.borrow_mut() = Some((reason.to_string(), *position, back));
        }
    }

    /// The kernel says only that one of a message cannot be passed.
    #[test]
    fn a_descriptor_that_cannot_be_passed_is_named_and_all_come_back() {
        for is_exact in [false, true] {
            let Some(bad) = sys::unpassable() else {
                #[allow(clippy::print_stderr, reason = "a skipped test has to be seen")]
                {
                    eprintln!("SKIPPED: there are no descriptors here that cannot be passed");
                }
                return;
            };
            let mut reactor = Reactor::new().unwrap();
            let (ours, mut theirs) = StdUnixStream::pair().unwrap();
            let told = Told::default();
            let protocol = Sends {
                bad: Some(bad),
                told: Rc::clone(&told),
                is_exact,
            };
            reactor.adopt_unix_stream(ours.into(), protocol).unwrap();
            for _ in 0..20 {
                reactor.turn(Some(Duration::ZERO));
            }
            let (text, position, back) = told.take().expect("it has ended");
            let start = "kernel does not pass descriptor 2 of those queued: ";
            assert!(text.starts_with(start), "{text}");
            assert_eq!((position, back.len()), (2, 4));
            let mut received = Vec::new();
            theirs.read_to_end(&mut received).unwrap();
            // What went before a message has left; loose ones ride with the first byte.
            let expected: &[u8] = if is_exact { b"before" } else { b"" };
            assert_eq!(received, expected);
        }
    }
}
