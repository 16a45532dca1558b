//! One HTTP/1.1 connection. Requests are answered in order, and the connection is kept.
//! What has a body is refused: this server takes nothing in.

use std::borrow::Cow;
use std::fs::File;
use std::io::Read;
use std::rc::Rc;
use std::time::Duration;

use bowline::handoff::pool::Live;
use bowline::handoff::restart::{Movable, MoveTicket, Packed};
use bowline::layers::StreamTransport;
use bowline::policies::Timeout;
use bowline::{AfterReadClosed, CloseReason, Context, FileSender, LingeringClose};
use bowline::{Protocol, Transport, TransportState};
use httparse::{EMPTY_HEADER, Request, Status};

const MAX_HEADERS: usize = 64;
const MAX_HEAD: usize = 16 * 1024;
/// How long a request may take to arrive. Bytes do not put it off.
const HEAD_WITHIN: Duration = Duration::from_secs(10);

/// What is found under the target of a request.
pub(crate) type Site = Rc<dyn Fn(&str) -> Response>;

pub(crate) struct Response {
    status: &'static str,
    content_type: &'static str,
    body: Body,
}

pub(crate) enum Body {
    Text(String),
    /// So many bytes of it.
    File(File, u64),
}

impl Response {
    pub(crate) fn ok(content_type: &'static str, body: Body) -> Self {
        let status = "200 OK";
        Self {
            status,
            content_type,
            body,
        }
    }

    pub(crate) fn not_found() -> Self {
        Self::refusal("404 Not Found")
    }

    fn refusal(status: &'static str) -> Self {
        let body = Body::Text(format!("{status}\n"));
        Self {
            status,
            ..Self::ok("text/plain", body)
        }
    }
}

pub(crate) struct Http {
    site: Site,
    /// What has arrived and is not answered: the beginning of a request, or what came
    /// behind one whose file is being sent.
    partial: Vec<u8>,
    patience: Timeout,
    /// A worker counts its connections, and can give them away.
    live: Option<Live>,
    ticket: Option<MoveTicket>,
}

impl Http {
    pub(crate) fn new(site: &Site, live: Option<Live>) -> Self {
        Self {
            site: Rc::clone(site),
            partial: Vec::new(),
            patience: Timeout::new(),
            live,
            ticket: None,
        }
    }

    /// One that another process has begun: this has arrived, and is not answered.
    pub(crate) fn going_on(site: &Site, live: Live, partial: Vec<u8>) -> Self {
        Self {
            partial,
            ..Self::new(site, Some(live))
        }
    }
}

impl<T: StreamTransport> Protocol<T> for Http {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        let me = cx.transport.handle();
        self.ticket = self.live.as_ref().map(|live| live.movable::<T, Self>(me));
        if !self.partial.is_empty() {
            self.data_received(cx, &[]);
        }
    }

    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        let kept = std::mem::take(&mut self.partial);
        let was_waiting = !kept.is_empty();
        let input = match was_waiting {
            true => Cow::Owned([&kept, data].concat()),
            false => Cow::Borrowed(data),
        };
        let used = self.answer(cx, &input);
        self.partial = input[used..].to_vec();
        if used > 0 || !was_waiting || data.is_empty() {
            let waits = !self.partial.is_empty() && !cx.transport.is_reading_paused();
            self.patience.set(cx, waits.then_some(HEAD_WITHIN));
        }
    }

    /// A file was sent: what came meanwhile has its turn.
    fn reading_resumed(&mut self, cx: &mut Context<'_, T>) {
        self.data_received(cx, &[]);
    }

    fn read_connection_lost(&mut self, _: &mut Context<'_, T>) -> AfterReadClosed {
        AfterReadClosed::LoseConnection
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, _: &CloseReason) {
        self.patience.cancel(cx.reactor);
    }

    /// It has not moved after all.
    fn connection_reattached(&mut self, cx: &mut Context<'_, T>) {
        self.patience.reattached(cx);
    }

    /// For a stop: the rest of a request is waited for.
    fn is_idle(&self) -> bool {
        self.partial.is_empty()
    }
}

impl Movable for Http {
    const KIND: &'static str = "http";

    /// While a file is being sent it has a producer, and stays.
    fn pack(&mut self) -> Option<Packed> {
        Some(Packed {
            unread: self.partial.clone(),
            ..Packed::default()
        })
    }

    fn unpack(&mut self, _: Packed) {}
}

impl Http {
    /// Answers every request that is whole; how many bytes those were.
    fn answer<T: Transport>(&self, cx: &mut Context<'_, T>, input: &[u8]) -> usize {
        let mut used = 0;
        while used < input.len() && !cx.transport.is_reading_paused() {
            let mut headers = [EMPTY_HEADER; MAX_HEADERS];
            let mut request = Request::new(&mut headers);
            let is_kept = match request.parse(&input[used..]) {
                Ok(Status::Complete(length)) if length <= MAX_HEAD => {
                    used += length;
                    self.respond(cx, &request)
                }
                Ok(Status::Partial) if input.len() - used < MAX_HEAD => break,
                Ok(_) | Err(httparse::Error::TooManyHeaders) => {
                    refuse(cx, "431 Request Header Fields Too Large")
                }
                Err(_) => refuse(cx, "400 Bad Request"),
            };
            if !is_kept {
                // What comes after the last answer is not read.
                return input.len();
            }
        }
        used
    }

    /// Answers one; whether another may follow.
    fn respond<T: Transport>(&self, cx: &mut Context<'_, T>, request: &Request<'_, '_>) -> bool {
        if values(request, "host").count() != 1 && request.version == Some(1) {
            return refuse(cx, "400 Bad Request");
        }
        // Where a body ends is a matter of dispute between servers: none is skipped.
        let has_body = values(request, "content-length").any(|length| length != b"0");
        if has_body || values(request, "transfer-encoding").next().is_some() {
            return refuse(cx, "413 Content Too Large");
        }
        let is_head = request.method == Some("HEAD");
        if !is_head && request.method != Some("GET") {
            return refuse(cx, "405 Method Not Allowed");
        }
        let response = (self.site)(request.path.unwrap_or_default());
        // Whoever reads `Connection: close` sends the next request elsewhere: to the
        // process that has taken over, when this one stops.
        let is_kept = is_kept_alive(request) && !cx.reactor.is_stopping();
        send(cx, response, is_head, is_kept);
        is_kept
    }
}

fn send<T: Transport>(cx: &mut Context<'_, T>, response: Response, is_head: bool, is_kept: bool) {
    let Response {
        status,
        content_type,
        body,
    } = response;
    let length = match &body {
        Body::Text(text) => text.len() as u64,
        Body::File(_, length) => *length,
    };
    let connection = if is_kept { "" } else { "Connection: close\r\n" };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\n\
         {connection}\r\n"
    );
    match body {
        _ if is_head => {
            cx.transport.write(head.as_bytes());
        }
        Body::Text(text) => {
            cx.transport
                .write_sequence(&[head.as_bytes(), text.as_bytes()]);
        }
        Body::File(file, length) => {
            cx.transport.write(head.as_bytes());
            // The next request waits until the file has left.
            cx.transport.pause_producing();
            // If this fails the connection has ended, and `connection_lost` follows.
            let _ = FileSender::new(file.take(length)).send(cx.transport, move |cx, sent| {
                match sent {
                    Ok(sent) if sent.bytes == length => cx.transport.resume_producing(),
                    // It was cut meanwhile. The client sees an answer that is too short.
                    _ => cx.transport.abort_connection(),
                }
            });
        }
    }
    if !is_kept && cx.transport.state() == TransportState::Connected {
        // It waits for the file.
        cx.transport.lose_connection();
    }
}

/// Says no, and closes.
fn refuse<T: Transport>(cx: &mut Context<'_, T>, status: &'static str) -> bool {
    // What the client still sends would destroy the answer with a reset.
    cx.transport
        .set_lingering_close(Some(LingeringClose::default()));
    send(cx, Response::refusal(status), false, false);
    false
}

fn is_kept_alive(request: &Request<'_, '_>) -> bool {
    let asks_to_close = |value: &[u8]| {
        (value.split(|&byte| byte == b','))
            .any(|token| token.trim_ascii().eq_ignore_ascii_case(b"close"))
    };
    request.version == Some(1) && !values(request, "connection").any(asks_to_close)
}

/// The values of a header, in order.
fn values<'a>(request: &'a Request<'_, '_>, name: &'a str) -> impl Iterator<Item = &'a [u8]> {
    let is_it = move |header: &&httparse::Header<'_>| header.name.eq_ignore_ascii_case(name);
    request
        .headers
        .iter()
        .filter(is_it)
        .map(|header| header.value)
}
