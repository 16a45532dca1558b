//! The streams of a child. They are connections. Either the process protocol serves
//! them by number, or they have a protocol of their own.

use std::borrow::Cow;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use bowline_protocol::{AtDrain, CloseReason, Context, Protocol, Transport, TransportHandle};
use bowline_reactor::{Handle, Reactor, Token};

use super::process::Attended;
use crate::endpoint::{self, Adopt, AdoptTransport};
use crate::link::{Flags, Link};
use crate::stream::StreamTransport;

/// Our end of a stream, before it becomes a connection.
pub(super) struct Planned {
    /// The numbers that the child has it under. No other stream has these.
    pub(super) numbers: Vec<u32>,
    /// The terminal, if the stream is one. It is kept to change the size.
    pub(super) terminal: Option<OwnedFd>,
    pub(super) install: Install,
}

impl Planned {
    pub(super) fn new(number: u32, install: Install) -> Self {
        Self {
            numbers: vec![number],
            terminal: None,
            install,
        }
    }
}

/// Makes the connection, and tells the process of it.
pub(super) type Install = Box<dyn FnOnce(&mut Reactor, &Rc<Attended>) -> io::Result<OpenStream>>;

/// A connection that is one of a child's streams.
#[derive(Clone, Copy, Debug)]
pub(super) struct OpenStream {
    pub(super) handle: TransportHandle,
    link: Handle<Link>,
}

impl OpenStream {
    fn of<T: StreamTransport>(token: Token) -> Self {
        Self {
            handle: T::transport_named(token),
            link: Handle::new(token, |facet| {
                let transport = facet.downcast_mut::<T>()?;
                Some(&mut transport.stream_mut().link)
            }),
        }
    }

    /// Whether reading it is paused or held here. Somebody may still want its bytes.
    pub(super) fn is_kept_back(&self, reactor: &mut Reactor) -> bool {
        reactor
            .get(self.link)
            .is_some_and(|link| link.is_open_for_reading() && link.has(Flags::PAUSED | Flags::HELD))
    }
}

/// A stream that the process protocol serves by `number`.
pub(super) fn by_number<K: Adopt + 'static>(number: u32, kind: K, source: K::Source) -> Install
where
    K::Source: 'static,
    AdoptTransport<K>: StreamTransport,
{
    Box::new(move |reactor, process| {
        let process = Rc::clone(process);
        let protocol = ByNumber { process, number };
        let token = adopt(reactor, kind, source, protocol)?;
        Ok(OpenStream::of::<AdoptTransport<K>>(token))
    })
}

/// A stream with a protocol of its own.
pub(super) fn with_protocol<K: Adopt + 'static>(
    kind: K,
    source: K::Source,
    protocol: impl Protocol<AdoptTransport<K>>,
) -> Install
where
    K::Source: 'static,
    AdoptTransport<K>: StreamTransport,
{
    Box::new(move |reactor, process| {
        let token = adopt(reactor, kind, source, protocol)?;
        let stream = OpenStream::of::<AdoptTransport<K>>(token);
        if let Some(transport) = reactor.get(stream.handle) {
            let process = Rc::clone(process);
            // This position is never reached, so the call tells of the end, or of a
            // detach.
            let then = move |reactor: &mut Reactor, _| process.stream_is_gone(reactor, token);
            transport.when_sent(u64::MAX, Box::new(then));
        }
        Ok(stream)
    })
}

fn adopt<K: Adopt>(
    reactor: &mut Reactor,
    kind: K,
    source: K::Source,
    protocol: impl Protocol<AdoptTransport<K>>,
) -> io::Result<Token>
where
    AdoptTransport<K>: StreamTransport,
{
    // If that fails, the source is of no use to anybody.
    endpoint::adopt(reactor, kind, source, protocol).map_err(Into::into)
}

/// The protocol of a stream that the process protocol serves.
struct ByNumber {
    process: Rc<Attended>,
    number: u32,
}

impl<T: Transport> Protocol<T> for ByNumber {
    /// Tells the process protocol of the beginning, if nothing has. What it pauses there is
    /// paused before anything is read: the first turn may find the child's output already.
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        let own = Some(cx.transport.as_dyn());
        self.process.tell(cx.reactor, own, |_, _| {});
    }

    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        let number = self.number;
        let own = Some(cx.transport.as_dyn());
        self.process.tell(cx.reactor, own, |protocol, cx| {
            protocol.child_data_received(cx, number, data);
        });
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, reason: &CloseReason) {
        let number = self.number;
        let token = cx.transport.handle().token();
        self.process.forget_stream(token);
        let own = Some(cx.transport.as_dyn());
        if matches!(reason, CloseReason::Panicked(_)) {
            self.process.give_up_streams();
        }
        self.process.tell(cx.reactor, own, |protocol, cx| {
            protocol.child_connection_lost(cx, number, reason);
        });
        self.process.look_whether_over(cx.reactor);
    }

    /// The process protocol is asked, and not its streams.
    fn draining(&mut self, _: &mut Context<'_, T>) -> AtDrain {
        AtDrain::DoNotWait
    }

    fn pause_producing(&mut self, cx: &mut Context<'_, T>) {
        let number = self.number;
        let own = Some(cx.transport.as_dyn());
        self.process.tell(cx.reactor, own, |protocol, cx| {
            protocol.pause_producing(cx, number);
        });
    }

    fn resume_producing(&mut self, cx: &mut Context<'_, T>) {
        let number = self.number;
        let own = Some(cx.transport.as_dyn());
        self.process.tell(cx.reactor, own, |protocol, cx| {
            protocol.resume_producing(cx, number);
        });
    }

    fn stop_producing(&mut self, cx: &mut Context<'_, T>) {
        let number = self.number;
        let own = Some(cx.transport.as_dyn());
        self.process.tell(cx.reactor, own, |protocol, cx| {
            protocol.stop_producing(cx, number);
        });
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        Cow::Owned(format!("{} of process {}", self.number, self.process.pid()))
    }
}
