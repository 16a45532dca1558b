//! A steady load on the reactor of the demonstration: connections with one
//! request each, over TCP and UNIX sockets, and connections that ask again and
//! again.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline::endpoint::Connect as _;
use bowline::tls::TlsClient;
use bowline::{Address, BuildContext, CloseReason, ConnectError, Context, DelayedCall, Factory};
use bowline::{Protocol, Reactor, Tcp, Transport, Transports, Unix};

/// A request that takes longer has failed.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// What is asked within this time of a restart counts as asked during it.
const DURING: Duration = Duration::from_millis(150);

/// A client that keeps its connection asks this often at the most: it is one of
/// those that are there, not one of those that make the load.
const KEEPER_PAUSE: Duration = Duration::from_millis(2);

/// How long after the last restart the load goes on.
const AFTERWARDS: Duration = Duration::from_millis(300);

pub(crate) struct Plan {
    pub(crate) tcp: SocketAddr,
    pub(crate) unix: PathBuf,
    /// How many connections are made at the least.
    pub(crate) connections: usize,
    /// How many at a time.
    pub(crate) clients: usize,
    /// Whether connections survive a restart.
    pub(crate) keep: bool,
    /// How they are secured, if they are.
    pub(crate) tls: Option<TlsClient>,
}

type SharedLoad = Rc<RefCell<Load>>;

pub(crate) struct Load {
    plan: Plan,
    /// The process that answered first among all that have not been seen before.
    pub(crate) latest: Option<u32>,
    /// Those that keep their connection and have not been answered yet. In a handshake, one
    /// stays where it is.
    pub(crate) unheard: usize,
    seen: BTreeSet<u32>,
    connections: usize,
    requests: usize,
    failures: BTreeMap<String, usize>,
    /// How often a connection was answered by another process than before.
    moved: usize,
    running: usize,
    is_finishing: bool,
    started: Instant,
    last_answer: Instant,
    longest_gap: Duration,
    restarting: Option<Instant>,
    /// In microseconds.
    steady: Vec<u32>,
    during: Vec<u32>,
}

impl Load {
    pub(crate) fn start(reactor: &mut Reactor, plan: Plan) -> SharedLoad {
        let clients = plan.clients.max(4);
        let now = reactor.now();
        let load = Rc::new(RefCell::new(Self {
            plan,
            latest: None,
            unheard: (0..clients).filter(|client| client % 4 == 3).count(),
            seen: BTreeSet::new(),
            connections: 0,
            requests: 0,
            failures: BTreeMap::new(),
            moved: 0,
            running: 0,
            is_finishing: false,
            started: now,
            last_answer: now,
            longest_gap: Duration::ZERO,
            restarting: None,
            steady: Vec::new(),
            during: Vec::new(),
        }));
        for client in 0..clients {
            let kind = match client % 4 {
                0 | 1 => Kind::Tcp,
                2 => Kind::Unix,
                _ => Kind::Keeper,
            };
            connect(reactor, &load, kind);
        }
        load
    }

    /// How many processes have answered.
    pub(crate) fn generations(&self) -> usize {
        self.seen.len()
    }

    pub(crate) fn failures(&self) -> usize {
        self.failures.values().sum()
    }

    /// Notes that a restart begins.
    pub(crate) fn restarting(&mut self, now: Instant) {
        self.restarting = Some(now);
    }

    /// Ends when enough connections were made.
    pub(crate) fn finish(&mut self) {
        self.is_finishing = true;
    }

    fn is_enough(&self) -> bool {
        self.is_finishing && self.connections >= self.plan.connections
    }

    fn failed(&mut self, class: impl Into<String>) {
        *self.failures.entry(class.into()).or_default() += 1;
    }

    fn answered(&mut self, now: Instant, asked: Instant, by: u32) {
        self.requests += 1;
        self.longest_gap = self.longest_gap.max(now - self.last_answer);
        self.last_answer = now;
        if self.seen.insert(by) {
            self.latest = Some(by);
        }
        let took = u32::try_from((now - asked).as_micros()).unwrap_or(u32::MAX);
        let is_during = self
            .restarting
            .is_some_and(|at| asked + ANSWER_WITHIN > at && asked < at + DURING && now >= at);
        if is_during {
            self.during.push(took);
        } else {
            self.steady.push(took);
        }
    }

    /// The table.
    pub(crate) fn report(&self) -> String {
        let mut text = String::new();
        let seconds = (self.last_answer - self.started).as_secs_f64();
        let mut row = |name: &str, value: String| {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{name:<32}{value:>14}");
        };
        row("restarts", self.seen.len().saturating_sub(1).to_string());
        row("connections", self.connections.to_string());
        row("requests", self.requests.to_string());
        row(
            "requests per second",
            format!("{:.0}", self.requests as f64 / seconds),
        );
        row("failures", self.failures().to_string());
        for (class, count) in &self.failures {
            row(&format!("  {class}"), count.to_string());
        }
        row("connections moved", self.moved.to_string());
        row(
            "longest gap between answers",
            milliseconds(self.longest_gap),
        );
        for (name, times) in [("steady", &self.steady), ("during restarts", &self.during)] {
            let mut times = times.clone();
            times.sort_unstable();
            for (part, of) in [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)] {
                let at = (times.len() as f64 * of) as usize;
                let value = times.get(at).copied().unwrap_or(0);
                let value = milliseconds(Duration::from_micros(value.into()));
                row(&format!("latency {name}, {part}"), value);
            }
        }
        text
    }
}

fn milliseconds(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1_000.0)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// One request on each connection.
    Tcp,
    Unix,
    /// One connection for as long as it holds.
    Keeper,
}

fn connect(reactor: &mut Reactor, load: &SharedLoad, kind: Kind) {
    let client = Client {
        load: Rc::clone(load),
        kind,
    };
    let (tcp, unix, tls) = {
        let mut state = load.borrow_mut();
        state.connections += 1;
        state.running += 1;
        let plan = &state.plan;
        (plan.tcp, plan.unix.clone(), plan.tls.clone())
    };
    let result = match (kind, tls) {
        (Kind::Unix, None) => reactor.connect_unix(unix, client),
        (Kind::Unix, Some(tls)) => reactor.connect(Unix::to(unix).layer(tls), client),
        (Kind::Tcp | Kind::Keeper, None) => reactor.connect_tcp(tcp, client),
        (Kind::Tcp | Kind::Keeper, Some(tls)) => reactor.connect(Tcp::to(tcp).layer(tls), client),
    };
    if let Err(error) = result {
        load.borrow_mut().failed(format!("cannot connect: {error}"));
        ended(reactor, load, kind);
    }
}

/// A connection is over: the next one, or the end.
fn ended(reactor: &mut Reactor, load: &SharedLoad, kind: Kind) {
    let (is_enough, is_last) = {
        let mut state = load.borrow_mut();
        state.running -= 1;
        (state.is_enough(), state.running == 0)
    };
    if !is_enough {
        let load = Rc::clone(load);
        reactor.defer(move |reactor| connect(reactor, &load, kind));
    } else if is_last {
        reactor.call_later(AFTERWARDS, |reactor| {
            let _ = reactor.stop();
        });
    }
}

struct Client {
    load: SharedLoad,
    kind: Kind,
}

impl Factory for Client {
    type Protocol = Asking;

    fn build_protocol(&mut self, _: &mut BuildContext<'_>, _: &Address) -> Option<Asking> {
        Some(Asking {
            load: Rc::clone(&self.load),
            kind: self.kind,
            number: 0,
            asked: None,
            late: None,
            answer: Vec::new(),
            by: None,
            is_told: false,
        })
    }

    fn connection_failed(&mut self, cx: &mut BuildContext<'_>, error: &ConnectError) {
        let class = match error.as_os() {
            Some(error) => format!("connect: {}", error.kind()),
            None => format!("connect: {error}"),
        };
        self.load.borrow_mut().failed(class);
        ended(cx.reactor, &self.load, self.kind);
    }
}

/// Asks, and checks the answer.
struct Asking {
    load: SharedLoad,
    kind: Kind,
    /// Of the present request; each is answered with its number, in order.
    number: u64,
    asked: Option<Instant>,
    late: Option<DelayedCall>,
    answer: Vec<u8>,
    /// Who answered last.
    by: Option<u32>,
    /// The server said that it hangs up, or we are done.
    is_told: bool,
}

impl Asking {
    fn ask<T: Transport>(&mut self, cx: &mut Context<'_, T>) {
        self.number += 1;
        self.asked = Some(cx.reactor.now());
        cx.transport.write(format!("{}\n", self.number).as_bytes());
        let (load, handle) = (Rc::clone(&self.load), cx.transport.handle());
        self.late = Some(cx.reactor.call_later(ANSWER_WITHIN, move |reactor| {
            load.borrow_mut().failed("no answer in time");
            if let Some(transport) = reactor.get(handle) {
                transport.abort_connection();
            }
        }));
    }

    fn take_answer<T: Transport>(&mut self, cx: &mut Context<'_, T>) {
        let now = cx.reactor.now();
        if let Some(late) = self.late.take() {
            let _ = late.cancel(cx.reactor);
        }
        let text = String::from_utf8_lossy(&self.answer);
        let mut words = text.split_ascii_whitespace();
        let number = words.next().and_then(|word| word.parse().ok());
        let by = words.next().and_then(|word| word.parse().ok());
        let is_last = words.next() == Some("bye");
        self.answer.clear();
        let (Some(asked), Some(by), true) = (self.asked.take(), by, number == Some(self.number))
        else {
            self.load.borrow_mut().failed("wrong answer");
            self.is_told = true;
            return cx.transport.abort_connection();
        };
        let mut load = self.load.borrow_mut();
        load.answered(now, asked, by);
        match self.by {
            Some(before) => load.moved += usize::from(before != by),
            None if self.kind == Kind::Keeper => load.unheard = load.unheard.saturating_sub(1),
            None => {}
        }
        self.by = Some(by);
        let is_done = load.is_enough() || self.kind != Kind::Keeper;
        if is_last && load.plan.keep && self.kind == Kind::Keeper {
            load.failed("connection did not move");
        }
        drop(load);
        if is_last || is_done {
            self.is_told = true;
            cx.transport.lose_connection();
        } else {
            let handle = cx.transport.handle();
            cx.reactor.call_later(KEEPER_PAUSE, move |reactor| {
                reactor.call_protocol(handle, |asking: &mut Self, cx: &mut Context<'_, T>| {
                    asking.ask(cx)
                });
            });
        }
    }
}

impl<T: Transport> Protocol<T> for Asking {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        self.ask(cx);
    }

    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        self.answer.extend_from_slice(data);
        if self.answer.ends_with(b"\n") {
            self.take_answer(cx);
        }
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, reason: &CloseReason) {
        if let Some(late) = self.late.take() {
            let _ = late.cancel(cx.reactor);
        }
        if !self.is_told {
            let class = match reason {
                CloseReason::Lost(error) => format!("lost: {}", error.kind()),
                CloseReason::Done => "closed without an answer".to_owned(),
                // Counted already.
                CloseReason::Aborted => "".to_owned(),
                other => format!("lost: {other}"),
            };
            if !class.is_empty() {
                self.load.borrow_mut().failed(class);
            }
        }
        ended(cx.reactor, &self.load, self.kind);
    }
}
