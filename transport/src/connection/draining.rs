//! What a connection does while the reactor stops gracefully: it goes on until
//! its work is done.

use std::time::{Duration, Instant};

use bowline_protocol::{AtDrain, Context, ProducerRef, Protocol, Transport};
use bowline_reactor::{DelayedCall, DrainRound, Next, Reactor};

use super::{Connection, Visit};
use crate::file_descriptor::{Core, FileDescriptor, State, flag, pending};

/// How a connection waits for its own end.
#[derive(Debug)]
pub(crate) struct Draining {
    /// For how long nothing may come or go.
    grace: Duration,
    quiet_since: Instant,
    /// How much had been sent by then.
    sent: u64,
    /// When to look whether it has been quiet for long enough.
    look: Option<DelayedCall>,
    /// It was, and the socket is read once more.
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

impl<F, P> Connection<F, P>
where
    F: FileDescriptor + Transport,
    P: Protocol<F>,
{
    pub(super) fn begin_draining(&mut self, reactor: &mut Reactor, round: DrainRound) -> Next {
        let core = self.transport.core_mut();
        let token = core.token;
        let is_outgoing = core.cold_ref().is_some_and(|cold| cold.connector.is_some());
        let own_round = match is_outgoing {
            true => DrainRound::Support,
            false => DrainRound::Work,
        };
        if round < own_round || core.cold().was_told_to_drain {
            return Next::Keep;
        }
        core.cold().was_told_to_drain = true;
        core.flags |= pending::DRAINING;
        reactor.await_end(token);
        self.work(reactor, Visit::Extra)
    }

    #[cold]
    pub(super) fn tell_draining(&mut self, reactor: &mut Reactor) {
        let core = self.transport.core();
        if matches!(
            core.state(),
            State::Closing | State::Lingering | State::Ending | State::Lost
        ) || core.is_broken()
        {
            return;
        }
        let Some(protocol) = &mut self.protocol else {
            return;
        };
        let answer = protocol.draining(&mut Context::new(&mut self.transport, reactor));
        let core = self.transport.core_mut();
        match answer {
            AtDrain::GoOn => {}
            AtDrain::DoNotWait => reactor.await_no_more(core.token),
            AtDrain::LoseWhenIdle => {
                let sent = core.sent;
                core.flags |= flag::DRAINING | flag::UNSETTLED;
                core.cold().draining = Some(Draining {
                    grace: reactor.stop_grace(),
                    quiet_since: reactor.now(),
                    sent,
                    look: None,
                    is_last_look: false,
                });
            }
        }
    }

    /// The time for a look has come.
    pub(super) fn look_whether_idle(&mut self, reactor: &Reactor) {
        let is_at_rest = self.is_at_rest();
        let core = self.transport.core_mut();
        let Some(draining) = core.cold().draining.as_mut() else {
            return;
        };
        draining.look = None;
        let quiet = reactor
            .now()
            .saturating_duration_since(draining.quiet_since);
        if is_at_rest && quiet >= draining.grace {
            draining.is_last_look = true;
            // Whatever the latch says: what comes now may have no event yet.
            core.flags |= flag::READABLE;
        }
    }

    /// Takes a step towards the end; `received` is what this visit has brought.
    /// True if something is to be done on that account.
    #[cold]
    pub(super) fn take_drain_step(
        &mut self,
        reactor: &mut Reactor,
        visit: Visit,
        received: usize,
    ) -> bool {
        let core = self.transport.core();
        let is_over = matches!(
            core.state(),
            State::Closing | State::Lingering | State::Ending | State::Lost
        );
        if !core.has(flag::DRAINING) || is_over || core.is_broken() {
            return false;
        }
        let is_at_rest = self.is_at_rest();
        let core = self.transport.core_mut();
        let (token, sent) = (core.token, core.sent);
        let is_read_out = !core.has(flag::READABLE);
        let Some(draining) = core.cold().draining.as_mut() else {
            return false;
        };
        if !is_at_rest || received > 0 || draining.sent != sent {
            draining.quiet_since = reactor.now();
            draining.sent = sent;
            draining.is_last_look = false;
        }
        if draining.is_last_look {
            // An extra visit does not read.
            let is_over = is_read_out && visit != Visit::Extra;
            if is_over {
                core.lose_connection();
            }
            return is_over;
        }
        if draining.look.is_none() {
            let quiet = reactor
                .now()
                .saturating_duration_since(draining.quiet_since);
            let left = draining.grace.saturating_sub(quiet);
            draining.look = Some(reactor.notify_later(left, token));
        }
        false
    }

    /// Whether nothing is known of that this connection has yet to do, but for
    /// what may wait in its socket.
    fn is_at_rest(&self) -> bool {
        let core = self.transport.core();
        // Who writes on after the peer's end says when it is done.
        let waits = flag::PAUSED | flag::HELD | flag::PUSHED_BACK | flag::READ_ENDED;
        core.buffer.is_empty()
            && !core.has(waits | flag::WAITS_FOR_TIMER | pending::ANY)
            && self.transport.queued_descriptors() == 0
            && !has_other_producer(core)
            && self.protocol.as_ref().is_none_or(Protocol::<F>::is_idle)
    }
}

/// Whether something may still produce that is not what is read here itself.
fn has_other_producer<S>(core: &Core<S>) -> bool
where
    S: crate::Socket,
{
    let registration = core.cold_ref().and_then(|cold| cold.registration.as_ref());
    registration.is_some_and(|registration| match &registration.producer {
        Some(ProducerRef::Transport(handle)) => handle.token() != core.token,
        _ => true,
    })
}
