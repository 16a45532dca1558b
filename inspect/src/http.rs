//! The page and the metrics, over HTTP/1.1.

use std::fmt;
use std::rc::Rc;
use std::time::Duration;

use bowline_protocol::{
    Address, AtDrain, BuildContext, CloseReason, Context, Factory, Protocol, Transport,
    TransportHandle,
};
use bowline_reactor::{DelayedCall, PeriodicCall, Reactor};
use serde_json::json;

use crate::json;
use crate::metrics;
use crate::survey::Survey;
use crate::totals::Totals;

/// How many bytes the head of a request may have.
const LONGEST: usize = 8 * 1_024;
/// How many headers a request may have.
const HEADERS: usize = 64;
/// How long a client may take for its request, and to read the answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often the page is told what has changed.
const INTERVAL: Duration = Duration::from_secs(1);
/// How many descriptors the page lists.
const LISTED: usize = 1_000;
const PAGE: &str = include_str!("page.html");

/// The secret in the path: who knows it may ask.
struct Secret(String);

impl Secret {
    /// Returns what follows the secret in a path. All bytes are compared, so that the time
    /// that this takes reveals nothing.
    fn open<'a>(&self, path: &'a str) -> Option<&'a str> {
        let path = path.strip_prefix('/')?;
        let (secret, rest) = path.split_at_checked(self.0.len())?;
        let pairs = secret.bytes().zip(self.0.bytes());
        let differs = pairs.fold(0, |differs, (a, b)| differs | (a ^ b));
        (differs == 0).then_some(rest)
    }
}

/// The factory for browsers and Prometheus. See
/// [`Inspector::browsers`](crate::Inspector::browsers).
pub struct Browsers(Rc<Secret>);

impl Browsers {
    pub(crate) fn new(secret: &str) -> Self {
        Self(Rc::new(Secret(secret.to_owned())))
    }
}

impl Factory for Browsers {
    type Protocol = Browser;

    fn build_protocol(&mut self, _: &mut BuildContext<'_>, _: &Address) -> Option<Browser> {
        Some(Browser {
            secret: Rc::clone(&self.0),
            head: Vec::new(),
            patience: None,
            events: None,
        })
    }
}

impl fmt::Debug for Browsers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Browsers").finish_non_exhaustive()
    }
}

/// The protocol of one HTTP client: a browser, or Prometheus. It answers one request.
pub struct Browser {
    secret: Rc<Secret>,
    head: Vec<u8>,
    patience: Option<DelayedCall>,
    events: Option<PeriodicCall>,
}

impl fmt::Debug for Browser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Browser").finish_non_exhaustive()
    }
}

impl<T: Transport> Protocol<T> for Browser {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        let handle = cx.transport.handle();
        let call = cx.reactor.call_later(PATIENCE, move |reactor| {
            if let Some(client) = reactor.get(handle) {
                client.abort_connection();
            }
        });
        self.patience = Some(call);
    }

    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        if self.patience.is_none() || self.events.is_some() {
            // It has been answered.
            return;
        }
        let room = LONGEST.saturating_sub(self.head.len());
        self.head.extend_from_slice(&data[..data.len().min(room)]);
        match Asked::parse(&self.head, &self.secret) {
            Ok(None) if data.len() < room => {}
            Ok(None) => answer(
                cx.transport,
                "431 Request Header Fields Too Large",
                TEXT,
                "",
            ),
            Err(status) => answer(cx.transport, status, TEXT, ""),
            Ok(Some(asked)) => self.serve(cx, asked),
        }
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, _: &CloseReason) {
        self.is_patient(cx.reactor);
        if let Some(events) = self.events.take() {
            events.stop(cx.reactor);
        }
    }

    /// Being looked at does not delay the stop of the program.
    fn draining(&mut self, _: &mut Context<'_, T>) -> AtDrain {
        AtDrain::DoNotWait
    }
}

impl Browser {
    fn is_patient(&mut self, reactor: &mut Reactor) {
        if let Some(call) = self.patience.take() {
            // It may be what ends the connection.
            let _ = call.cancel(reactor);
        }
    }

    fn serve<T: Transport>(&mut self, cx: &mut Context<'_, T>, asked: Asked) {
        self.head = Vec::new();
        let handle = cx.transport.handle();
        match asked {
            Asked::Page => answer(cx.transport, "200 OK", HTML, PAGE),
            Asked::Metrics => collect(cx.reactor, move |reactor, found| {
                let text = metrics::text(reactor, &found.totals);
                if let Some(client) = reactor.get(handle) {
                    answer(client, "200 OK", METRICS, &text);
                }
            }),
            Asked::Events => {
                self.is_patient(cx.reactor);
                cx.transport.write(EVENTS.as_bytes());
                // When the connection is in its slot, and has sent the head.
                cx.reactor.defer(move |reactor| tell(reactor, handle));
                let every = cx.reactor.call_every(INTERVAL, move |reactor, _| {
                    tell(reactor, handle);
                });
                self.events = Some(every);
            }
        }
    }
}

/// What a client may ask for.
enum Asked {
    Page,
    Events,
    Metrics,
}

impl Asked {
    /// Parses a request. Returns `None` while the head is incomplete.
    fn parse(head: &[u8], secret: &Secret) -> Result<Option<Self>, &'static str> {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS];
        let mut request = httparse::Request::new(&mut headers);
        match request.parse(head) {
            Ok(httparse::Status::Partial) => return Ok(None),
            Ok(httparse::Status::Complete(_)) => {}
            Err(_) => return Err("400 Bad Request"),
        }
        if request.method != Some("GET") {
            return Err("405 Method Not Allowed");
        }
        let path = request.path.unwrap_or_default();
        match secret.open(path) {
            Some("/") => Ok(Some(Self::Page)),
            Some("/events") => Ok(Some(Self::Events)),
            Some("/metrics") => Ok(Some(Self::Metrics)),
            _ => Err("404 Not Found"),
        }
    }
}

const TEXT: &str = "text/plain; charset=utf-8";
const HTML: &str = "text/html; charset=utf-8";
const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";
const EVENTS: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\
    Cache-Control: no-store\r\nConnection: close\r\n\r\nretry: 500\n\n";

/// Sends an answer, and closes the connection.
fn answer(transport: &mut (impl Transport + ?Sized), status: &str, kind: &str, body: &str) {
    // Nothing from elsewhere is loaded, and no address is passed on.
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\
         Cache-Control: no-store\r\nReferrer-Policy: no-referrer\r\n\
         X-Content-Type-Options: nosniff\r\nContent-Security-Policy: default-src 'none'; \
         script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; \
         frame-ancestors 'none'\r\nConnection: close\r\n\r\n",
        body.len(),
    );
    transport.write_sequence(&[head.as_bytes(), body.as_bytes()]);
    transport.lose_connection_within(PATIENCE);
}

/// Sends a page the current state, unless it has not read the last one.
fn tell(reactor: &mut Reactor, handle: TransportHandle) {
    let is_behind = reactor.get(handle).is_none_or(|it| it.unsent_bytes() > 0);
    if is_behind {
        return;
    }
    collect(reactor, move |reactor, found| {
        let counts = json!({
            "summary": json::summary(reactor),
            "turns": json::turns(reactor)["turns"],
            "totals": found.totals.sums(),
            "listeners": found.totals.listeners(),
            "pools": found.totals.pools(),
            "unlisted": found.unlisted,
        });
        let counts = counts.to_string();
        let counts = counts.strip_suffix('}').unwrap_or_default();
        let pieces = [
            "data: ",
            counts,
            ",\"descriptors\":[",
            &found.listed,
            "]}\n\n",
        ];
        if let Some(client) = reactor.get(handle) {
            client.write_sequence(&pieces.map(str::as_bytes));
        }
    });
}

/// The result of a survey.
#[derive(Default)]
struct Found {
    /// As JSON, with commas between: made in portions too, since it takes as long as all else.
    listed: String,
    count: usize,
    unlisted: u64,
    totals: Totals,
}

/// Describes everything, one portion in each turn.
fn collect(reactor: &mut Reactor, then: impl FnOnce(&mut Reactor, Found) + 'static) {
    // Deferred, when every descriptor is in its slot.
    reactor.defer(move |reactor| {
        let survey = Survey::begin(reactor);
        go_on(reactor, survey, Found::default(), then);
    });
}

fn go_on(
    reactor: &mut Reactor,
    mut survey: Survey,
    mut found: Found,
    then: impl FnOnce(&mut Reactor, Found) + 'static,
) {
    let is_more = survey.take(reactor, |description, descriptor| {
        if let Some(description) = description {
            found.totals.add(description);
        }
        if found.count == LISTED {
            found.unlisted += 1;
            return;
        }
        found.count += 1;
        if !found.listed.is_empty() {
            found.listed.push(',');
        }
        found.listed.push_str(&descriptor().to_string());
    });
    if is_more {
        reactor.call_soon(move |reactor| go_on(reactor, survey, found, then));
    } else {
        found.totals.finish(&reactor.parts());
        then(reactor, found);
    }
}
