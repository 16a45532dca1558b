//! Notices of a connection to the producer of its transport.

use bowline_protocol::{Context, ProducerKind, ProducerRef, Protocol};
use bowline_reactor::{Contained, Reactor};

use super::{ASK_AGAIN_AFTER, Connection};
use crate::link::{Flags, State};
use crate::stream::{Stream, StreamTransport};

/// The method of the producer to call.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Tell {
    Pause,
    Resume,
    Stop,
}

impl<T, P> Connection<T, P>
where
    T: StreamTransport,
    P: Protocol<T>,
{
    /// Resumes a push producer, or asks a pull producer for one portion.
    pub(super) fn resume_producer(&mut self, reactor: &mut Reactor) {
        let written = |stream: &Stream<T::Layer>| stream.link.sent + stream.buffer.len() as u64;
        let before = written(self.transport.stream());
        let link = &self.transport.stream().link;
        let registration = link.cold_ref().and_then(|cold| cold.registration.as_ref());
        let Some((kind, serial)) = registration.map(|it| (it.kind, it.serial)) else {
            return;
        };
        self.tell_producer(reactor, Tell::Resume);
        let after = written(self.transport.stream());
        let Stream { link, buffer, .. } = self.transport.stream_mut();
        let registration = link.cold_ref().and_then(|cold| cold.registration.as_ref());
        let is_same = registration.is_some_and(|registration| registration.serial == serial);
        // A broken connection takes nothing more.
        let is_over = link.is_ended() || link.is_broken();
        if kind == ProducerKind::Pull && is_same && buffer.is_empty() && !is_over {
            if after > before {
                // The bytes went straight to the kernel.
                link.set(Flags::RESUME_PRODUCER);
            } else if link.cold().ask_again.is_none() {
                let call = reactor.notify_later(ASK_AGAIN_AFTER, link.token);
                link.cold().ask_again = Some(call);
            }
        }
    }

    pub(super) fn tell_producer(&mut self, reactor: &mut Reactor, what: Tell) {
        let link = &mut self.transport.stream_mut().link;
        let Some(registration) = &mut link.cold().registration else {
            return;
        };
        let serial = registration.serial;
        let Some(producer) = registration.producer.take() else {
            return;
        };
        // A boxed producer is taken out while it runs, so that it can unregister
        // itself. The others are only names.
        let producer = match producer {
            ProducerRef::Boxed(boxed) => ProducerRef::Boxed(boxed),
            ProducerRef::Protocol => {
                registration.producer = Some(ProducerRef::Protocol);
                ProducerRef::Protocol
            }
            ProducerRef::Transport(handle) => {
                registration.producer = Some(ProducerRef::Transport(handle));
                ProducerRef::Transport(handle)
            }
        };
        let producer = self.call_producer(reactor, producer, what);
        if let Some(registration) = &mut self.transport.stream_mut().link.cold().registration
            && registration.serial == serial
            && registration.producer.is_none()
        {
            registration.producer = Some(producer);
        }
    }

    pub(super) fn call_producer(
        &mut self,
        reactor: &mut Reactor,
        producer: ProducerRef,
        what: Tell,
    ) -> ProducerRef {
        // If it panics, it is dropped.
        let mut producer = Contained::new(producer);
        match &mut *producer {
            ProducerRef::Protocol => {
                if let Some(protocol) = &mut self.protocol {
                    let mut cx = Context::new(&mut self.transport, reactor);
                    match what {
                        Tell::Pause => protocol.pause_producing(&mut cx),
                        Tell::Resume => protocol.resume_producing(&mut cx),
                        Tell::Stop => protocol.stop_producing(&mut cx),
                    }
                }
            }
            ProducerRef::Transport(handle) => {
                let mut cx = Context::new(&mut self.transport, reactor);
                if let Some(transport) = cx.get(*handle) {
                    match what {
                        Tell::Pause => transport.pause_producing(),
                        Tell::Resume => transport.resume_producing(),
                        Tell::Stop => transport.lose_connection(),
                    }
                }
            }
            ProducerRef::Boxed(producer) => {
                let mut cx = Context::new(self.transport.as_dyn(), reactor);
                match what {
                    Tell::Pause => producer.pause_producing(&mut cx),
                    Tell::Resume => producer.resume_producing(&mut cx),
                    Tell::Stop => producer.stop_producing(&mut cx),
                }
            }
        }
        producer.into_inner()
    }

    /// Stops producers that were registered too late. Producers that they register in
    /// turn are left out, since that could go on for ever.
    pub(super) fn stop_rejected(&mut self, reactor: &mut Reactor) {
        let link = &mut self.transport.stream_mut().link;
        if link.cold_ref().is_none() {
            return;
        }
        for _ in 0..link.cold().rejected.len() {
            if let Some(producer) = pop_first(&mut self.transport.stream_mut().link.cold().rejected)
            {
                self.call_producer(reactor, producer, Tell::Stop);
            }
        }
    }

    /// Drops a producer that can produce nothing more, so that a close does not wait
    /// for it. It is a transport that is gone, or this connection when it reads no
    /// more.
    pub(super) fn forget_spent_producer(&mut self, reactor: &mut Reactor) {
        let link = &mut self.transport.stream_mut().link;
        if !link.has_producer() || !matches!(link.state(), State::Closing | State::WriteClosing) {
            return;
        }
        let registration = link.cold().registration.as_ref();
        let Some(ProducerRef::Transport(handle)) =
            registration.and_then(|registration| registration.producer.as_ref())
        else {
            return;
        };
        let producer = handle.token();
        let is_spent = if producer == link.token {
            !link.is_open_for_reading()
        } else {
            !reactor.is_registered(producer)
        };
        if is_spent {
            link.unregister_producer();
        }
    }
}

fn pop_first<T>(list: &mut Vec<T>) -> Option<T> {
    (!list.is_empty()).then(|| list.remove(0))
}
