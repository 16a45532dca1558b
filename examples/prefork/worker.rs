//! A worker: takes connections from its channel, and answers HTTP on them.

use std::process;
use std::rc::Rc;

use bowline::Tcp;
use bowline::endpoint::Adopt as _;
use bowline::handoff::pool::inherited_channel;
use bowline::handoff::pool::{Live, PassedConnection, Worker, WorkerSettings};
use bowline::{AfterReadClosed, Context, GracefulStop, Protocol, Reactor, Transport};
use rustix::process::Signal;

use crate::common::{self, STOP_DEADLINE, WorkersTls};

/// Serves what comes through the channel, to its end.
pub(crate) fn run(tls: Option<[String; 2]>) -> common::Result {
    let channel = inherited_channel()?;
    let mut reactor = Reactor::new()?;
    let body = format!("process {}\n", process::id());
    let answer = |header| {
        let length = body.len();
        format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n{header}\r\n{body}").into_bytes()
    };
    let tls = tls.map(|files| WorkersTls::received(&files)).transpose()?;
    let answers = Rc::new(Answers {
        keep: answer(""),
        close: answer("Connection: close\r\n"),
    });
    let serve = move |reactor: &mut Reactor, connection: PassedConnection, live: Live| {
        let http = Http::new(&answers, live);
        let adopted = match &tls {
            Some(tls) => connection
                .adopt(reactor, Tcp.layer(tls.clone()), http)
                .err(),
            None => connection.adopt(reactor, Tcp, http).err(),
        };
        if let Some(error) = adopted {
            // Reset before it got here, most likely.
            log::debug!("cannot serve: {error}");
        }
    };
    Worker::start(&mut reactor, channel, WorkerSettings::default(), serve)?;
    // Ctrl-C goes to all processes of a terminal. It is the acceptor's to
    // decide; SIGTERM to a worker has it finish its work, and be replaced.
    reactor.on_signals(&[Signal::INT.as_raw()], |_, _| {})?;
    reactor.on_signals(&[Signal::TERM.as_raw()], |reactor, _| {
        // An error says that it does not run any more.
        let _ = reactor.stop_gracefully(GracefulStop::new().deadline(STOP_DEADLINE));
    })?;
    reactor.run()?;
    Ok(())
}

/// The answers that keep the connection, and that close it.
struct Answers {
    keep: Vec<u8>,
    close: Vec<u8>,
}

/// One HTTP connection. A shortcut: GET only, and no bodies.
struct Http {
    answers: Rc<Answers>,
    /// The beginning of a request that has not arrived whole.
    partial: Vec<u8>,
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

    /// The rest of a request is waited for.
    fn is_idle(&self) -> bool {
        self.partial.is_empty()
    }
}

impl Http {
    const MAX_HEADERS: usize = 64;
    const MAX_REQUEST: usize = 16 * 1024;

    fn new(answers: &Rc<Answers>, live: Live) -> Self {
        Self {
            answers: Rc::clone(answers),
            partial: Vec::new(),
            _live: live,
        }
    }

    /// Answers every request that is whole; how many bytes those were.
    fn answer<T: Transport>(&self, cx: &mut Context<'_, T>, requests: &[u8]) -> usize {
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
            // Whoever reads that does not send another one here.
            if cx.reactor.is_stopping() || !is_kept_alive(&request) {
                cx.transport.write(&self.answers.close);
                cx.transport.lose_connection();
                return requests.len();
            }
            cx.transport.write(&self.answers.keep);
        }
        used
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
