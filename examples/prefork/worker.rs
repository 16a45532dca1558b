//! A worker: takes connections from its channel, and answers HTTP on them.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::process;
use std::rc::Rc;
use std::time::Duration;

use bowline::handoff::pool::inherited_channel;
use bowline::handoff::pool::{Connection, Live, Service, Worker, WorkerSettings};
use bowline::{AfterReadClosed, CloseReason, Context, Protocol, Reactor, TcpStream, Transport};
use bowline::{TransportHandle, Transports};
use rustix::process::Signal;

use crate::common;

/// Serves what comes through the channel, to its end.
pub(crate) fn run() -> common::Result {
    let channel = inherited_channel()?;
    let mut reactor = Reactor::new()?;
    let body = format!("process {}\n", process::id());
    let answer = |header| {
        let length = body.len();
        format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n{header}\r\n{body}").into_bytes()
    };
    let server = Server(Rc::new(Shared {
        open: RefCell::default(),
        keep: answer(""),
        close: answer("Connection: close\r\n"),
    }));
    Worker::start(&mut reactor, channel, WorkerSettings::default(), server)?;
    // Ctrl-C goes to all processes of a terminal. It is the acceptor's to
    // decide; SIGTERM to a worker ends it at once.
    reactor.on_signals(&[Signal::INT.as_raw()], |_, _| {})?;
    reactor.run()?;
    Ok(())
}

/// What serves the connections of one worker.
struct Server(Rc<Shared>);

/// What they share.
struct Shared {
    open: RefCell<BTreeSet<TransportHandle>>,
    /// The answers that keep the connection, and that close it.
    keep: Vec<u8>,
    close: Vec<u8>,
}

impl Service for Server {
    fn serve(&mut self, reactor: &mut Reactor, connection: Connection, live: Live) {
        match connection.adopt_tcp(reactor, Http::new(&self.0, live)) {
            Ok(connection) => {
                self.0.open.borrow_mut().insert(connection);
            }
            // Reset before it got here, most likely.
            Err(error) => log::debug!("cannot serve: {error}"),
        }
    }

    fn draining(&mut self, reactor: &mut Reactor, _: Duration) {
        for &connection in &*self.0.open.borrow() {
            reactor.call_protocol(
                connection,
                |http: &mut Http, cx: &mut Context<'_, TcpStream>| {
                    http.stop(cx);
                },
            );
        }
    }
}

/// One HTTP connection. A shortcut: GET only, and no bodies.
struct Http {
    server: Rc<Shared>,
    /// The beginning of a request that has not arrived whole.
    partial: Vec<u8>,
    has_answered: bool,
    is_last: bool,
    _live: Live,
}

impl<T: Transport> Protocol<T> for Http {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        if self.partial.is_empty() {
            let used = self.answer(cx, data);
            self.partial.extend_from_slice(&data[used..]);
        } else {
            let mut requests = std::mem::take(&mut self.partial);
            requests.extend_from_slice(data);
            let used = self.answer(cx, &requests);
            requests.drain(..used);
            self.partial = requests;
        }
    }

    fn read_connection_lost(&mut self, _: &mut Context<'_, T>) -> AfterReadClosed {
        AfterReadClosed::LoseConnection
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, _: &CloseReason) {
        self.server.open.borrow_mut().remove(&cx.transport.handle());
    }
}

impl Http {
    const MAX_HEADERS: usize = 64;
    const MAX_REQUEST: usize = 16 * 1024;

    fn new(server: &Rc<Shared>, live: Live) -> Self {
        Self {
            server: Rc::clone(server),
            partial: Vec::new(),
            has_answered: false,
            is_last: false,
            _live: live,
        }
    }

    /// Answers every request that is whole; how many bytes those were.
    fn answer<T: Transport>(&mut self, cx: &mut Context<'_, T>, requests: &[u8]) -> usize {
        let mut used = 0;
        while used < requests.len() {
            let mut headers = [httparse::EMPTY_HEADER; Self::MAX_HEADERS];
            let mut request = httparse::Request::new(&mut headers);
            let length = match request.parse(&requests[used..]) {
                Ok(httparse::Status::Complete(length)) => length,
                Ok(httparse::Status::Partial) if requests.len() - used < Self::MAX_REQUEST => break,
                Ok(httparse::Status::Partial) => {
                    return refuse(cx, "431 Request Header Fields Too Large", requests);
                }
                Err(_) => return refuse(cx, "400 Bad Request", requests),
            };
            if request.method != Some("GET") {
                return refuse(cx, "405 Method Not Allowed", requests);
            }
            used += length;
            self.has_answered = true;
            if self.is_last || !is_kept_alive(&request) {
                cx.transport.write(&self.server.close);
                cx.transport.lose_connection();
                return requests.len();
            }
            cx.transport.write(&self.server.keep);
        }
        used
    }

    /// Ends the connection now if it is between requests, else with the answer
    /// to the one that it owes.
    fn stop<T: Transport>(&mut self, cx: &mut Context<'_, T>) {
        if self.has_answered && self.partial.is_empty() {
            cx.transport.lose_connection();
        } else {
            self.is_last = true;
        }
    }
}

fn is_kept_alive(request: &httparse::Request<'_, '_>) -> bool {
    let asks_to_close = |header: &httparse::Header<'_>| {
        header.name.eq_ignore_ascii_case("connection")
            && header.value.eq_ignore_ascii_case(b"close")
    };
    request.version == Some(1) && !request.headers.iter().any(asks_to_close)
}

/// Says no, and closes. All of the input counts as used.
fn refuse<T: Transport>(cx: &mut Context<'_, T>, status: &str, input: &[u8]) -> usize {
    let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    cx.transport.write(answer.as_bytes());
    cx.transport.lose_connection();
    input.len()
}
