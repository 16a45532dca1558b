//! Forwards connections from one address to another, TCP or UNIX on either
//! side. The name of a host is looked up for each of them, off the loop.
//!
//! Each side is the producer of the other, so that whoever reads slowly slows
//! down whoever writes, in both directions and without a buffer that grows. One
//! side that has finished sending can go on receiving (half-close).
//!
//! ```text
//! cargo run --example echo -- --listen unix:/tmp/echo.sock
//! cargo run --example proxy -- --listen tcp:127.0.0.1:7001 --to unix:/tmp/echo.sock
//! ```
//!
//! In another terminal, type something into
//!
//! ```text
//! nc 127.0.0.1 7001
//! ```

#![allow(clippy::print_stdout)]

mod common;

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use bowline::endpoint::ClientEndpoint;
use bowline::{Address, AfterReadClosed, BuildContext, CloseReason, ConnectError, ConnectorHandle};
use bowline::{Context, Factory, LingeringClose, ProducerKind, Protocol, Reactor, Remains};
use bowline::{Transport, TransportHandle, Transports};

use crate::common::{Arguments, Endpoint, Inspect};

const HELP: &str = "
Forwards connections.

Usage: proxy --listen ENDPOINT [--tls CERT KEY] --to ENDPOINT

  --listen ENDPOINT   where: tcp:127.0.0.1:7001, unix:/run/proxy.sock, systemd:name=proxy
  --tls CERT KEY      with TLS, which ends here, whatever the endpoint: two PEM files
  --to ENDPOINT       to where: tcp:example.com:80, unix:/run/server.sock
  --inspect PLACE     show what is inside: on a UNIX socket (a path),
                      or to browsers (an address)
";

/// How long a server has to take the rest of the request of a client that has gone.
const REST_WITHIN: Duration = Duration::from_secs(30);

/// One side of a forwarded connection.
struct Side {
    /// The other side, once it is there.
    other: Rc<Cell<Option<TransportHandle>>>,
    role: Role,
    /// Whether our peer's end was passed on, behind all that it sent.
    is_passed_on: bool,
}

enum Role {
    /// Was accepted, and has a connection made to this address.
    Front(ClientEndpoint, Option<ConnectorHandle>),
    /// Is that connection, and makes itself known to the front here.
    Back(Rc<Cell<Option<TransportHandle>>>),
}

impl<T: Transport> Protocol<T> for Side {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        let me = cx.transport.handle();
        match &mut self.role {
            Role::Front(to, connector) => {
                // A client may still be sending when the server has said all: a reset
                // would destroy what is on its way to it.
                cx.transport
                    .set_lingering_close(Some(LingeringClose::default()));
                // There is nowhere to put anything yet.
                cx.transport.pause_producing();
                let back = Rc::clone(&self.other);
                match cx.reactor.connect(to.clone(), Dial { front: me, back }) {
                    Ok(attempt) => *connector = Some(attempt),
                    Err(error) => {
                        log::warn!("cannot connect: {error}");
                        cx.transport.abort_connection();
                    }
                }
            }
            Role::Back(known_to_front) => {
                known_to_front.set(Some(me));
                if let Some(handle) = self.other.get()
                    && let Some(front) = cx.reactor.get(handle)
                {
                    // Refused only by a side that is ending, which both are told.
                    let _ = front.register_producer(me.into(), ProducerKind::Push);
                    front.resume_producing();
                    let _ = cx
                        .transport
                        .register_producer(handle.into(), ProducerKind::Push);
                } else {
                    cx.transport.abort_connection();
                }
            }
        }
    }

    /// How much is buffered on the other side takes care of itself: it pauses
    /// its producer, us.
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        if let Some(other) = self.other.get().and_then(|other| cx.get(other)) {
            other.write(data);
        }
    }

    /// Our peer has sent everything: the other side's is told so.
    fn read_connection_lost(&mut self, cx: &mut Context<'_, T>) -> AfterReadClosed {
        self.is_passed_on = true;
        if let Some(other) = self.other.get().and_then(|other| cx.get(other)) {
            other.unregister_producer();
            other.lose_write_connection();
        }
        AfterReadClosed::KeepWriting
    }

    /// Our peer is gone, and what it sent waits for the other side to take it. A client
    /// has the last words of its server at its own pace. A server gets no more of a
    /// request that will never be complete; for the rest of one that is, it has a while.
    fn connection_broken(&mut self, cx: &mut Context<'_, T>, remains: Remains) {
        if matches!(self.role, Role::Back(_)) {
            return;
        }
        if remains == Remains::Pieces {
            return cx.transport.lose_connection();
        }
        let me = cx.transport.handle();
        cx.reactor.call_later(REST_WITHIN, move |reactor| {
            if let Some(front) = reactor.get(me) {
                front.lose_connection();
            }
        });
    }

    /// What a server has sent is passed on to its end, whatever became of the
    /// connection: one that answers early closes before it has read everything. A
    /// client that broke off takes its connection to the server with it, unless its
    /// request is complete: then the server has a while to take the rest.
    fn connection_lost(&mut self, cx: &mut Context<'_, T>, reason: &CloseReason) {
        if let Role::Front(_, Some(connector)) = self.role
            && let Some(connector) = cx.reactor.get(connector)
        {
            connector.stop_connecting();
        }
        if let Some(other) = self.other.get().and_then(|other| cx.get(other)) {
            other.unregister_producer();
            if reason.is_clean() || matches!(self.role, Role::Back(_)) {
                other.lose_connection();
            } else if self.is_passed_on {
                other.lose_connection_within(REST_WITHIN);
            } else {
                other.abort_connection();
            }
        }
    }
}

/// Builds the back, or gives up the front.
struct Dial {
    front: TransportHandle,
    back: Rc<Cell<Option<TransportHandle>>>,
}

impl Factory for Dial {
    type Protocol = Side;

    fn build_protocol(&mut self, _: &mut BuildContext<'_>, _: &Address) -> Option<Side> {
        Some(Side {
            other: Rc::new(Cell::new(Some(self.front))),
            role: Role::Back(Rc::clone(&self.back)),
            is_passed_on: false,
        })
    }

    fn connection_failed(&mut self, cx: &mut BuildContext<'_>, error: &ConnectError) {
        log::warn!("{error}");
        if let Some(front) = cx.reactor.get(self.front) {
            front.abort_connection();
        }
    }
}

fn main() -> common::Result {
    env_logger::init();
    let mut arguments = Arguments::parse(HELP);
    let inspect = Inspect::take(&mut arguments)?;
    let listen = Endpoint::take(&mut arguments)?;
    let to = arguments.option::<ClientEndpoint>("--to")?;
    arguments.finish()?;
    let (Some(listen), Some(to)) = (listen, to) else {
        return Err("--listen and --to, please; try --help".into());
    };

    let mut reactor = Reactor::new()?;
    Inspect::show(inspect.as_ref(), &mut reactor)?;
    let listener = reactor.listen(listen, move |_: &Address| Side {
        other: Rc::default(),
        role: Role::Front(to.clone(), None),
        is_passed_on: false,
    })?;
    // Waits for the clients until they or the servers close: each side has the
    // other for a producer, which may have more.
    reactor.stop_on_signals()?;
    common::print_address(&mut reactor, listener);
    reactor.run()?;
    Ok(())
}
