//! The smallest server: what comes in goes out again. One protocol type serves
//! TCP and UNIX sockets.
//!
//! ```text
//! cargo run --example echo -- --listen tcp:127.0.0.1:7000
//! cargo run --example echo -- --listen unix:/tmp/echo.sock
//! ```
//!
//! In another terminal, type something into
//!
//! ```text
//! nc 127.0.0.1 7000
//! nc -U /tmp/echo.sock
//! ```
//!
//! A client that sends and does not read is not read from any more once 64 KiB
//! wait for it: the connection is the producer of its own answers. Ctrl-C stops
//! the server once its clients are quiet, and a second one at once.

#![allow(clippy::print_stdout)]

mod common;

use bowline::{Address, AfterReadClosed, Context, ProducerKind, Protocol, Reactor};
use bowline::{Transport, Transports};

use crate::common::{Arguments, Endpoint, Inspect};

const HELP: &str = "
Sends back what it receives, over TCP or a UNIX socket.

Usage: echo --listen ENDPOINT [--tls CERT KEY]

  --listen ENDPOINT   where: tcp:127.0.0.1:7000, unix:/run/echo.sock, systemd:name=echo,
                      tls:8443:cert=FILE:key=FILE
  --tls CERT KEY      with TLS, whatever the endpoint: two PEM files
  --inspect PLACE     show what is inside: on a UNIX socket (a path),
                      or to browsers (an address)
";

/// One connection.
struct Echo;

impl<T: Transport> Protocol<T> for Echo {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        let me = cx.transport.handle();
        cx.transport
            .register_producer(me.into(), ProducerKind::Push)
            .expect("it is the first one, and the connection is there");
    }

    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.write(data);
    }

    fn read_connection_lost(&mut self, cx: &mut Context<'_, T>) -> AfterReadClosed {
        // Nothing more is produced; what is buffered still goes out.
        cx.transport.unregister_producer();
        AfterReadClosed::LoseConnection
    }
}

fn main() -> common::Result {
    env_logger::init();
    let mut arguments = Arguments::parse(HELP);
    let inspect = Inspect::take(&mut arguments)?;
    let endpoint = Endpoint::take(&mut arguments)?;
    arguments.finish()?;
    let endpoint = endpoint.ok_or("--listen ENDPOINT, please; try --help")?;

    let mut reactor = Reactor::new()?;
    Inspect::show(inspect.as_ref(), &mut reactor)?;
    let listener = reactor.listen(endpoint, |_: &Address| Echo)?;
    reactor.stop_on_signals()?;
    common::print_address(&mut reactor, listener);
    reactor.run()?;
    Ok(())
}
