//! Takes the listeners of a running HAProxy, serves what comes to them, and has HAProxy
//! finish what it has begun. Nobody who connects meanwhile is refused.
//!
//! ```text
//! haproxy -db -f haproxy.cfg    # with: stats socket /run/haproxy.sock expose-fd listeners
//! cargo run --example haproxy_takeover -- --stats /run/haproxy.sock --stop PID
//! ```
//!
//! The TCP listeners are served, at the addresses that HAProxy has bound: the answer to any
//! HTTP request is 200. Others are listed and closed. HAProxy is told to stop (`SIGUSR1`)
//! when all are served here, so that for a moment both accept.
//!
//! With `--give PATH` they can be taken from here in the same way, by a HAProxy that is
//! started with `-x PATH`, for example. This program stops accepting then, and ends with
//! its last connection.

#![allow(clippy::print_stdout, clippy::print_stderr)]

mod common;

use std::os::fd::OwnedFd;
use std::rc::Rc;

use bowline::endpoint::UnixListen;
use bowline::framing::{FrameContext, FrameReceiver, Framed, LineFramer};
use bowline::{
    Address, ConnectError, GracefulStop, ListenerHandle, Once, PassedDescriptor, Reactor, Tcp,
    Transport, Transports, Unix, signal,
};
use bowline_peers::haproxy::{
    GivenListener, ListenerName, TakeError, TakenListener, give_listeners, take_listeners,
};

use common::{Arguments, Inspect};

const HELP: &str = "
Takes the listeners of a running HAProxy, and serves what comes to them.

Usage: haproxy_takeover --stats PATH [OPTIONS]

  --stats PATH     its stats socket, with: expose-fd listeners
  --stop PID       the process to be told to stop (SIGUSR1) when they are served here
  --give PATH      gives them to the first who asks there, and stops
  --inspect PLACE  show what is inside: on a UNIX socket (a path),
                   or to browsers (an address)
  --help           prints this
";

/// Answers each request, and keeps the connection for the next.
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
            cx.transport
                .write(b"HTTP/1.1 200 OK\r\nContent-Length: 18\r\n\r\nserved by bowline\n");
            if self.is_last {
                cx.transport.lose_connection();
            }
        }
    }
}

/// What was taken, to be given once more.
struct Listener {
    fd: Rc<OwnedFd>,
    name: ListenerName,
    handle: ListenerHandle,
}

struct Takeover {
    stop: Option<rustix::process::Pid>,
    give: Option<String>,
}

impl Takeover {
    fn taken(self, reactor: &mut Reactor, taken: Result<Vec<TakenListener>, TakeError>) {
        if let Err(error) = taken
            .map_err(Into::into)
            .and_then(|taken| self.begin(reactor, taken))
        {
            eprintln!("not taken: {error}");
            std::process::exit(1);
        }
    }

    fn begin(self, reactor: &mut Reactor, taken: Vec<TakenListener>) -> common::Result {
        let mut listeners = Vec::new();
        for it in taken {
            let address = it.address();
            match address {
                Some(Address::Inet(_)) if it.socket.is_listening => {
                    listeners.push(serve(reactor, it)?);
                }
                _ => println!("closed {address:?}"),
            }
        }
        println!("serving {} listeners", listeners.len());
        if let Some(process) = self.stop {
            // What it has accepted it serves to its end.
            rustix::process::kill_process(process, rustix::process::Signal::USR1)?;
        }
        if let Some(path) = self.give {
            let here: UnixListen = Unix::at(path.as_str()).mode(0o600);
            let mut listeners = Some(listeners);
            let given = move |reactor: &mut Reactor| {
                let listeners = listeners.take().unwrap_or_default();
                listeners.into_iter().map(|it| give(reactor, it)).collect()
            };
            let giver = give_listeners(given);
            reactor.listen(here, Once::new(giver))?;
        }
        Ok(())
    }
}

fn serve(reactor: &mut Reactor, taken: TakenListener) -> common::Result<Listener> {
    let fd = Rc::new(taken.fd.try_clone()?);
    let http = |_: &Address| Framed::new(LineFramer::new(), Http::default());
    let handle = reactor.listen(Tcp::listening(taken.fd), http)?;
    if let Some(listener) = reactor.get(handle) {
        println!("serving {}", listener.address());
    }
    let name = taken.name;
    Ok(Listener { fd, name, handle })
}

/// Stops accepting, and hands the socket on. Whoever connects from here on waits for who
/// has it then. When nobody is served any more, this program ends.
fn give(reactor: &mut Reactor, listener: Listener) -> GivenListener {
    if let Some(listener) = reactor.get(listener.handle) {
        listener.stop_listening();
    }
    println!("given");
    // It may be stopping already.
    let _ = reactor.stop_gracefully(GracefulStop::default());
    GivenListener {
        fd: PassedDescriptor::shared(&listener.fd),
        name: listener.name,
    }
}

fn main() -> common::Result {
    env_logger::init();
    let mut arguments = Arguments::parse(HELP);
    let inspect = Inspect::take(&mut arguments)?;
    let stats: Option<String> = arguments.option("--stats")?;
    let stats = stats.ok_or("--stats PATH, please; try --help")?;
    let stop = arguments.option::<i32>("--stop")?;
    let give = arguments.option("--give")?;
    arguments.finish()?;

    let stop = stop.map(|pid| rustix::process::Pid::from_raw(pid).ok_or("--stop 0"));
    let takeover = Takeover {
        stop: stop.transpose()?,
        give,
    };
    let mut reactor = Reactor::new()?;
    Inspect::show(inspect.as_ref(), &mut reactor)?;
    reactor.on_signals(&[signal::SIGTERM, signal::SIGINT], |reactor, _| {
        // It may be stopping already.
        let _ = reactor.stop();
    })?;
    let taker = take_listeners(move |reactor, taken| takeover.taken(reactor, taken));
    let once = Once::new(taker).on_failure(|_, _, error: &ConnectError| {
        eprintln!("no HAProxy there: {error}");
        std::process::exit(1);
    });
    reactor.connect_unix(stats.as_str(), once)?;
    reactor.run()?;
    Ok(())
}
