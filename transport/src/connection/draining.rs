//! Connections while the reactor stops gracefully. They go on until their work is done.

use std::time::{Duration, Instant};

use bowline_protocol::{AtDrain, Context, ProducerRef, Protocol};
use bowline_reactor::{DelayedCall, DrainRound, Next, Reactor};

use super::{Connection, Visit};
use crate::file_descriptor::FileDescriptor;
use crate::link::{Flags, Link, State};
use crate::stream::StreamTransport;

/// How often, at the most, a protocol at work is asked whether it still is. Its state may
/// change without a call of its connection, so nothing reports the end of its work.
/// Everything else that keeps a connection from its end is reported when it is over.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// The state of a connection that waits to be idle.
#[derive(Debug)]
pub(crate) struct Draining {
    /// How long it has to be quiet: nothing comes or leaves.
    grace: Duration,
    quiet_since: Instant,
    /// Whether it was not at rest when it was looked at last.
    was_at_work: bool,
    /// How much had been sent at `quiet_since`.
    sent: u64,
    /// When to check whether it was quiet for long enough.
    look: Option<DelayedCall>,
    /// It was, and the socket is read a last time.
    is_last_look: bool,
}

impl Draining {
    pub(super) fn looks_at(&self, call: DelayedCall) -> bool {
        self.look == Some(call)
    }

    pub(super) fn into_look(self) -> Option<DelayedCall> {
        self.look
    }
}

impl<T, P> Connection<T, P>
where
    T: StreamTransport,
    P: Protocol<T>,
{
    pub(super) fn begin_draining(&mut self, reactor: &mut Reactor, round: DrainRound) -> Next {
        let link = &mut self.transport.stream_mut().link;
        let token = link.token;
        let is_outgoing = link.cold_ref().is_some_and(|cold| cold.connector.is_some());
        let own_round = match is_outgoing {
            true => DrainRound::Support,
            false => DrainRound::Work,
        };
        if round < own_round || link.cold().was_told_to_drain {
            return Next::Keep;
        }
        link.cold().was_told_to_drain = true;
        link.set(Flags::DRAINING);
        reactor.await_end(token);
        self.work(reactor, Visit::Extra)
    }

    #[cold]
    pub(super) fn tell_draining(&mut self, reactor: &mut Reactor) {
        let link = &self.transport.stream().link;
        if matches!(
            link.state(),
            State::Closing | State::Lingering | State::Ending | State::Lost
        ) || link.is_broken()
        {
            return;
        }
        let Some(protocol) = &mut self.protocol else {
            return;
        };
        let answer = protocol.draining(&mut Context::new(&mut self.transport, reactor));
        let link = &mut self.transport.stream_mut().link;
        match answer {
            AtDrain::GoOn => {}
            AtDrain::DoNotWait => reactor.await_no_more(link.token),
            AtDrain::LoseWhenIdle => {
                let sent = link.sent;
                link.set(Flags::UNSETTLED);
                link.cold().draining = Some(Draining {
                    grace: reactor.stop_grace(),
                    quiet_since: reactor.now(),
                    was_at_work: false,
                    sent,
                    look: None,
                    is_last_look: false,
                });
            }
        }
    }

    /// Called when it is time to check.
    pub(super) fn look_whether_idle(&mut self, reactor: &Reactor) {
        let is_at_rest = self.has_sent_and_read() && self.is_protocol_idle();
        let link = &mut self.transport.stream_mut().link;
        let Some(draining) = link.cold().draining.as_mut() else {
            return;
        };
        draining.look = None;
        let quiet = reactor
            .now()
            .saturating_duration_since(draining.quiet_since);
        if is_at_rest && quiet >= draining.grace {
            draining.is_last_look = true;
            // Read even if the latch is clear: bytes that arrive now may have no event
            // yet.
            link.set(Flags::READABLE);
        }
    }

    /// Takes a step towards the end. `received` is how many bytes this visit has
    /// brought. Returns true if that leaves something to do.
    #[cold]
    pub(super) fn take_drain_step(
        &mut self,
        reactor: &mut Reactor,
        visit: Visit,
        received: usize,
    ) -> bool {
        let link = &self.transport.stream().link;
        let is_over = matches!(
            link.state(),
            State::Closing | State::Lingering | State::Ending | State::Lost
        );
        if !link.is_draining() || is_over || link.is_broken() {
            return false;
        }
        let is_done = self.has_sent_and_read();
        let is_at_rest = is_done && self.is_protocol_idle();
        let link = &mut self.transport.stream_mut().link;
        let (token, sent) = (link.token, link.sent);
        let never_reads = !link.is_open_for_reading();
        let is_read_out = never_reads || !link.has(Flags::READABLE);
        let Some(draining) = link.cold().draining.as_mut() else {
            return false;
        };
        let was_at_work = std::mem::replace(&mut draining.was_at_work, !is_at_rest);
        if was_at_work || !is_at_rest || received > 0 || draining.sent != sent {
            draining.quiet_since = reactor.now();
            draining.sent = sent;
            draining.is_last_look = false;
        }
        if draining.is_last_look {
            // An extra visit does not read.
            let is_over = is_read_out && (visit != Visit::Extra || never_reads);
            if is_over {
                link.lose_connection();
            }
            return is_over;
        }
        let quiet = reactor
            .now()
            .saturating_duration_since(draining.quiet_since);
        let left = draining.grace.saturating_sub(quiet);
        let wait = match is_at_rest {
            true => left,
            false => left.max(LOOK_EVERY),
        };
        match draining.look {
            // What it waits for brings it here again.
            None if !is_done => {}
            None => draining.look = Some(reactor.notify_later(wait, token)),
            // The timer may be set for a look at work, which is later.
            Some(look) if is_at_rest && draining.grace < LOOK_EVERY => {
                let is_moved = look.reset(reactor, wait);
                debug_assert!(is_moved.is_ok(), "it is forgotten when it has run");
            }
            Some(_) => {}
        }
        false
    }

    /// Whether the connection has nothing left to do, as far as is known, beside the work
    /// of its protocol. Something may still wait in its socket.
    fn has_sent_and_read(&self) -> bool {
        let stream = self.transport.stream();
        // A protocol that writes on after the peer's end decides itself when it is
        // done.
        let waits = Flags::PAUSED | Flags::HELD | Flags::PUSHED_BACK | Flags::READ_ENDED;
        let at_work = Flags::WAITS_FOR_TIMER | Flags::UNFLUSHED | Flags::PENDING;
        stream.buffer.is_empty()
            && stream.link.is_established()
            && !stream.link.has(waits | at_work)
            && stream.layer.queued_descriptors() == 0
            && !has_other_producer(&stream.link)
    }

    fn is_protocol_idle(&self) -> bool {
        self.protocol.as_ref().is_none_or(Protocol::<T>::is_idle)
    }
}

/// Whether there is a producer other than this connection itself.
fn has_other_producer(link: &Link) -> bool {
    let registration = link.cold_ref().and_then(|cold| cold.registration.as_ref());
    registration.is_some_and(|registration| match &registration.producer {
        Some(ProducerRef::Transport(handle)) => handle.token() != link.token,
        _ => true,
    })
}
