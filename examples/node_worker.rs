//! A worker of Node's `cluster` module: the primary is a Node, the workers are this program.
//!
//! ```text
//! cat >primary.js <<'END'
//! const cluster = require('cluster');
//! process.execPath = 'target/debug/examples/node_worker'; // what workers are
//! cluster.setupPrimary({ exec: 'worker', args: ['--listen', '127.0.0.1:8080'] });
//! cluster.on('listening', (worker, { port }) => console.log(worker.id, 'serves', port));
//! cluster.on('message', (worker, message) => console.log(worker.id, 'says', message));
//! for (let i = 0; i < 2; i++) cluster.fork();
//! END
//! cargo build --example node_worker && node primary.js
//! curl http://127.0.0.1:8080/
//! ```
//!
//! The primary accepts, and passes each connection to a worker in turn. With
//! `cluster.schedulingPolicy = cluster.SCHED_NONE` it shares the listening socket instead,
//! and the workers accept. Either way a worker ends when the primary says so
//! (`worker.disconnect()`) or ends itself, once it has served what it has begun.

#![allow(clippy::print_stdout, clippy::print_stderr)]

mod common;

use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use bowline::framing::{FrameContext, FrameReceiver, Framed, LineFramer};
use bowline::{
    Address, CloseReason, GracefulStop, Protocol, Reactor, Tcp, TcpStream, Transport, Transports,
    Unix, UnixTransport,
};
use bowline_peers::node::{ClusterContext, ClusterService, cluster_worker, take_channel};

use common::{Arguments, Inspect};

const HELP: &str = "
A worker of Node's cluster module, started by cluster.fork().

Usage: node_worker [EXEC] --listen ADDRESS

  --listen ADDRESS  where the primary is asked to listen, for HTTP
  --inspect PLACE   show what is inside: on a UNIX socket (a path),
                    or to browsers (an address)
  --help            prints this
";

/// Answers each request with the number of this process.
#[derive(Default)]
struct Http {
    is_last: bool,
}

impl<T: Transport> FrameReceiver<T, LineFramer> for Http {
    fn frame_received(&mut self, cx: &mut FrameContext<'_, T, LineFramer>, line: &[u8]) {
        if line.eq_ignore_ascii_case(b"connection: close") {
            self.is_last = true;
        } else if line.is_empty() {
            // The end of a request, which has no body.
            let text = format!("served by {}\n", std::process::id());
            let length = text.len();
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{text}");
            cx.transport.write(answer.as_bytes());
            if self.is_last {
                cx.transport.lose_connection();
            }
        }
    }
}

fn http() -> impl Protocol<TcpStream> {
    Framed::new(LineFramer::new(), Http::default())
}

struct Worker {
    listen: SocketAddr,
    served: u64,
}

impl<T: UnixTransport> ClusterService<T> for Worker {
    fn started(&mut self, cx: &mut ClusterContext<'_, '_, T>) {
        cx.listen(self.listen);
    }

    fn listening(
        &mut self,
        cx: &mut ClusterContext<'_, '_, T>,
        address: SocketAddr,
        shared: Option<OwnedFd>,
    ) {
        if let Some(fd) = shared {
            let here = Tcp::listening(fd);
            if let Err(error) = cx.node.reactor.listen(here, |_: &Address| http()) {
                eprintln!("cannot accept on {address}: {error}");
            }
        }
    }

    fn connection_received(
        &mut self,
        cx: &mut ClusterContext<'_, '_, T>,
        _: SocketAddr,
        connection: OwnedFd,
    ) {
        match cx.node.reactor.adopt(Tcp, connection, http()) {
            Ok(_) => self.served += 1,
            Err(error) => eprintln!("not served: {error}"),
        }
    }

    fn message_received(&mut self, cx: &mut ClusterContext<'_, '_, T>, message: &str) {
        // worker.send('how many')
        if message == "\"how many\"" {
            let answer = format!("{{\"served\":{}}}", self.served);
            if let Err(error) = cx.send(&answer) {
                eprintln!("not answered: {error}");
            }
        }
    }

    fn connection_lost(&mut self, reactor: &mut Reactor, _: &CloseReason) {
        // It may be stopping already.
        let _ = reactor.stop_gracefully(GracefulStop::default());
    }
}

fn main() -> common::Result {
    env_logger::init();
    let mut arguments = Arguments::parse(HELP);
    let inspect = Inspect::take(&mut arguments)?;
    let listen = arguments.option("--listen")?;
    let listen = listen.ok_or("--listen ADDRESS, please; try --help")?;
    let channel = take_channel()?.ok_or("not started by a Node; try --help")?;
    let mut reactor = Reactor::new()?;
    Inspect::show(inspect.as_ref(), &mut reactor)?;
    let worker = cluster_worker(Worker { listen, served: 0 });
    reactor.adopt(Unix, channel, worker)?;
    reactor.run()?;
    Ok(())
}
