//! Reads that bring descriptors or other control messages beside their bytes.

use std::os::fd::AsFd;
use std::rc::Rc;

use bowline_protocol::{AfterTruncation, CloseReason, Context, Protocol, ReceivedDescriptors};
use bowline_reactor::Reactor;

use super::Connection;
use crate::file_descriptor::{FileDescriptor, ReceivedLimits};
use crate::log;
use crate::shared::{Ledger, ReadBuffers, Shared};
use crate::stream::StreamTransport;
use crate::sys::Ancillary;

impl<T, P> Connection<T, P>
where
    T: StreamTransport,
    P: Protocol<T>,
{
    /// Delivers a read that brought something beside its bytes.
    #[inline(never)]
    pub(super) fn deliver_ancillary(
        &mut self,
        reactor: &mut Reactor,
        buffers: &mut ReadBuffers,
        bytes: usize,
        is_truncated: bool,
    ) {
        let limits = self.transport.stream().layer.received_limits();
        let link = &mut self.transport.stream_mut().link;
        let ancillary = &mut buffers.ancillary;
        ancillary.credentials = None;
        ancillary.pidfd = None;
        let count = ancillary.descriptors.len();
        Ledger::add(&link.shared.ledger.received, count);
        link.shared.numbers.expect_descriptors();
        // The last one has the highest number.
        let last = ancillary.descriptors.last();
        let is_reserved = last.is_some_and(|fd| link.shared.numbers.is_reserved(fd.as_fd()));
        let cold = link.cold();
        let unclaimed_before = cold.unclaimed;
        cold.received += count;
        let is_over = count > limits.per_read || cold.received > limits.in_all;
        if is_truncated || is_reserved || is_over || !ancillary.unknown.is_empty() {
            self.refuse_ancillary(reactor, ancillary, &limits, is_truncated, is_reserved);
        }
        let Some(protocol) = &mut self.protocol else {
            return;
        };
        let mut cx = Context::new(&mut self.transport, reactor);
        let data = buffers.data.get(bytes);
        if ancillary.descriptors.is_empty() {
            if cx.transport.stream().link.is_open_for_reading() {
                protocol.data_received(&mut cx, data);
            }
        } else {
            let mut offered = OfferedDescriptors {
                shared: Rc::clone(&cx.transport.stream().link.shared),
                descriptors: ReceivedDescriptors::new(&mut ancillary.descriptors),
            };
            protocol.descriptors_received(&mut cx, &mut offered.descriptors, data);
            let left = offered.close_left();
            self.transport.stream_mut().link.cold().unclaimed += left as u64;
        }
        let unclaimed = self.transport.stream_mut().link.cold().unclaimed;
        if unclaimed != unclaimed_before || unclaimed > limits.unclaimed as u64 {
            self.look_at_unclaimed(unclaimed_before, limits.unclaimed);
        }
    }

    /// Closes descriptors that are not offered to the protocol, and warns of unknown
    /// control messages.
    #[cold]
    fn refuse_ancillary(
        &mut self,
        reactor: &mut Reactor,
        ancillary: &mut Ancillary,
        limits: &ReceivedLimits,
        is_truncated: bool,
        is_reserved: bool,
    ) {
        let link = &mut self.transport.stream_mut().link;
        let count = ancillary.descriptors.len();
        let limit = if count > limits.per_read {
            Some(limits.per_read)
        } else if link.cold().received > limits.in_all {
            Some(limits.in_all)
        } else {
            None
        };
        if is_truncated {
            Ledger::add(&link.shared.ledger.truncations, 1);
        }
        if let Some(limit) = limit {
            link.end(CloseReason::DescriptorLimit { limit });
        }
        if is_truncated || is_reserved || limit.is_some() {
            link.shared.refuse_received(ancillary.descriptors.drain(..));
        }
        let unknown = ancillary.unknown.first().copied();
        ancillary.unknown.clear();
        if let Some(unknown) = unknown {
            self.warn_of_unknown(unknown);
        }
        let Some(protocol) = &mut self.protocol else {
            return;
        };
        if (is_truncated || is_reserved) && limit.is_none() {
            let mut cx = Context::new(&mut self.transport, reactor);
            let what = if is_truncated {
                "were truncated to"
            } else {
                "would have taken the reserve, closed"
            };
            log::warn!(
                target: log::DESCRIPTORS,
                "{}: descriptors from {} {what} {count}",
                cx.transport.stream().link.token,
                cx.transport.peer(),
            );
            match protocol.descriptors_truncated(&mut cx, count) {
                AfterTruncation::LoseConnection => cx
                    .transport
                    .stream_mut()
                    .link
                    .end(CloseReason::DescriptorsTruncated { received: count }),
                AfterTruncation::KeepConnection => {}
            }
        }
    }

    /// Logs one warning per connection. See
    /// [`look_at_unclaimed`](Self::look_at_unclaimed).
    #[cold]
    fn warn_of_unknown(&mut self, (level, kind): (i32, i32)) {
        if !std::mem::replace(
            &mut self.transport.stream_mut().link.cold().has_unknown,
            true,
        ) {
            log::warn!(
                target: log::DESCRIPTORS,
                "{}: unsupported ancillary data: level {level}, type {kind}, received by {} at {} from {}",
                self.transport.stream().link.token,
                self.protocol_name(),
                self.transport.host(),
                self.transport.peer(),
            );
        }
    }

    /// Logs one warning per connection, since a peer could fill the disk otherwise.
    /// Ends the connection above the limit, since each descriptor costs us time.
    #[cold]
    fn look_at_unclaimed(&mut self, before: u64, limit: usize) {
        let link = &mut self.transport.stream_mut().link;
        let now = link.cold().unclaimed;
        if now > limit as u64 {
            link.end(CloseReason::DescriptorLimit { limit });
        }
        if before == 0 && now > 0 {
            log::warn!(
                target: log::DESCRIPTORS,
                "{}: {} does not take descriptors: closed {now} received at {} from {}",
                self.transport.stream().link.token,
                self.protocol_name(),
                self.transport.host(),
                self.transport.peer(),
            );
        }
    }
}

/// Descriptors that a callback may take. The rest are closed as unclaimed, even if it
/// panics.
struct OfferedDescriptors<'a> {
    shared: Rc<Shared>,
    descriptors: ReceivedDescriptors<'a>,
}

impl OfferedDescriptors<'_> {
    /// Closes those that nobody took, and returns how many there were.
    #[inline]
    fn close_left(&mut self) -> usize {
        match self.descriptors.len() {
            0 => 0,
            _ => self.shared.close_received(self.descriptors.by_ref()),
        }
    }
}

impl Drop for OfferedDescriptors<'_> {
    #[inline]
    fn drop(&mut self) {
        self.close_left();
    }
}
