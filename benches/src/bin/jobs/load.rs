//! The generator: HTTP/1.1 over many connections in one thread, and what became of each
//! request. It knows nothing of who serves.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::io::{self, ErrorKind, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};

use crate::sys;

/// An answer that has not come by then never comes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// How often it is looked for answers that do not come.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// How many ticks a stream has, and how far apart they are: 2 s.
pub(crate) const TICKS: u32 = 40;
pub(crate) const TICK_EVERY: Duration = Duration::from_millis(50);
pub(crate) const TICK: &str = "one more tick\n";

const LAST_CHUNK: &[u8] = b"\r\n0\r\n\r\n";

/// What can become of a request, or of a connection, that is not an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Failure {
    /// Nobody listens.
    Refused,
    /// A new connection has ended without a byte of the answer.
    ResetBefore,
    /// It has ended in the middle of the answer.
    ResetAfter,
    /// A connection that had served before has ended under a request, of which nobody can
    /// know whether it was carried out.
    EndedUnderRequest,
    /// A connection that had served before was found closed, and nobody had said that it
    /// would be (`Connection: close`).
    ClosedUntold,
    /// No answer within [`PATIENCE`].
    TimedOut,
    /// Something else than was asked for.
    Wrong,
    /// A stream that was cut.
    StreamLost,
    /// A connection that was held without a request, and was closed.
    IdleLost,
}

impl Failure {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::ResetBefore => "reset before a byte",
            Self::ResetAfter => "reset in the answer",
            Self::EndedUnderRequest => "ended under a request",
            Self::ClosedUntold => "closed untold",
            Self::TimedOut => "timed out",
            Self::Wrong => "wrong answer",
            Self::StreamLost => "streams cut",
            Self::IdleLost => "idle lost",
        }
    }

    /// Whether a request has got no answer by it.
    pub(crate) fn is_of_request(self) -> bool {
        !matches!(self, Self::ClosedUntold | Self::StreamLost | Self::IdleLost)
    }
}

/// What a client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Asks once on each connection, and again at once on the next.
    Fresh,
    /// The same, once: arrivals at a rate are made of these.
    Once,
    /// Asks again and again on one connection, with rests.
    KeepAlive(Duration),
    /// Has an answer that takes 2 s, then the next.
    Stream,
    /// Asks once, and once more at the end.
    Idle,
}

/// How many of each.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Plan {
    pub(crate) fresh: usize,
    /// New connections a second, whatever becomes of those before.
    pub(crate) arrivals: u32,
    pub(crate) kept: usize,
    pub(crate) rest: Duration,
    pub(crate) streams: usize,
    pub(crate) idle: usize,
    /// After so many arrivals there are no more.
    pub(crate) most: u64,
}

/// A failure, with what is known of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Failed {
    pub(crate) what: Failure,
    /// Who had answered on this connection last.
    pub(crate) by: Option<u32>,
}

/// What became of all.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) answers: u64,
    pub(crate) streams: u64,
    pub(crate) arrivals: u64,
    /// How many were answered later than a second.
    pub(crate) late: u64,
    pub(crate) failed: Vec<Failed>,
    /// The longest time without any answer.
    pub(crate) gap: Duration,
    pub(crate) took: Duration,
    /// Who has answered how often.
    pub(crate) by: BTreeMap<u32, u64>,
    /// Where an idle connection is answered at the end by somebody else than at first.
    pub(crate) idle_moved: u64,
}

impl Tally {
    pub(crate) fn count(&self, what: Failure) -> usize {
        self.failed.iter().filter(|it| it.what == what).count()
    }

    /// Requests without an answer.
    pub(crate) fn unanswered(&self) -> usize {
        let failed = self.failed.iter().filter(|it| it.what.is_of_request());
        failed.count()
    }

    pub(crate) fn describe(&self) -> String {
        let mut counts = BTreeMap::<Failure, usize>::new();
        for failed in &self.failed {
            *counts.entry(failed.what).or_default() += 1;
        }
        let counts: Vec<String> = counts
            .iter()
            .map(|(what, count)| format!("{count} {}", what.name()))
            .collect();
        match counts.is_empty() {
            true => "nothing failed".into(),
            false => counts.join(", "),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// There is nothing to do before it is woken.
    Resting,
    Connecting,
    Asked,
    /// It has no part any more, and its place may be taken.
    Over,
}

struct Client {
    kind: Kind,
    state: State,
    socket: Option<TcpStream>,
    /// When the connection or the request was begun.
    since: Instant,
    answers_on_it: u32,
    by: Option<u32>,
    /// The server has said that it closes.
    is_told: bool,
    input: Vec<u8>,
}

impl Client {
    fn new(kind: Kind) -> Self {
        Self {
            kind,
            state: State::Resting,
            socket: None,
            since: Instant::now(),
            answers_on_it: 0,
            by: None,
            is_told: false,
            input: Vec::new(),
        }
    }

    fn drop_socket(&mut self) {
        self.socket = None;
        self.answers_on_it = 0;
        self.by = None;
        self.is_told = false;
        self.input.clear();
    }
}

/// What a whole answer said.
struct Answer {
    by: Option<u32>,
    is_last: bool,
    is_right: bool,
}

pub(crate) struct Load<'a> {
    port: u16,
    poll: Poll,
    plan: Plan,
    clients: Vec<Client>,
    free: Vec<usize>,
    wakes: BinaryHeap<Reverse<(Instant, usize)>>,
    tally: Tally,
    began: Instant,
    last_answer: Instant,
    source: u16,
    stop: &'a AtomicBool,
    is_stopping: bool,
    buffer: Vec<u8>,
}

impl<'a> Load<'a> {
    /// Asks whoever listens at `port` until `stop` is set, and waits for the answers that
    /// are still to come.
    pub(crate) fn run(port: u16, plan: Plan, stop: &'a AtomicBool) -> io::Result<Tally> {
        let now = Instant::now();
        let mut this = Self {
            port,
            poll: Poll::new()?,
            plan,
            clients: Vec::new(),
            free: Vec::new(),
            wakes: BinaryHeap::new(),
            tally: Tally::default(),
            began: now,
            last_answer: now,
            source: 0,
            stop,
            is_stopping: false,
            buffer: vec![0; 65_536],
        };
        let kinds = [
            (plan.fresh, Kind::Fresh),
            (plan.kept, Kind::KeepAlive(plan.rest)),
            (plan.streams, Kind::Stream),
            (plan.idle, Kind::Idle),
        ];
        for (count, kind) in kinds {
            for _ in 0..count {
                let index = this.clients.len();
                this.clients.push(Client::new(kind));
                this.begin(index);
            }
        }
        this.turn_to_the_end()?;
        this.tally.took = this.began.elapsed();
        Ok(this.tally)
    }

    fn turn_to_the_end(&mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(1_024);
        let mut looked = Instant::now();
        loop {
            let now = Instant::now();
            self.arrive(now);
            while let Some(&Reverse((at, index))) = self.wakes.peek() {
                if at > now {
                    break;
                }
                self.wakes.pop();
                self.wake(index);
            }
            if now - looked >= LOOK_EVERY {
                looked = now;
                self.give_up_on_late(now);
            }
            let is_over = self.stop.load(Ordering::Relaxed)
                || (self.plan.most > 0 && self.tally.arrivals >= self.plan.most);
            if is_over && !self.is_stopping {
                self.is_stopping = true;
                self.tally.gap = self.tally.gap.max(now - self.last_answer);
                self.ask_the_idle();
            }
            let is_busy = |it: &Client| matches!(it.state, State::Asked | State::Connecting);
            if self.is_stopping && !self.clients.iter().any(is_busy) {
                return Ok(());
            }
            match self.poll.poll(&mut events, Some(self.wait(now))) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                other => other?,
            }
            for event in &events {
                self.ready(event.token().0, event.is_writable());
            }
        }
    }

    fn wait(&self, now: Instant) -> Duration {
        let mut wait = LOOK_EVERY;
        if let Some(&Reverse((at, _))) = self.wakes.peek() {
            wait = wait.min(at.saturating_duration_since(now));
        }
        if self.plan.arrivals > 0 && !self.is_stopping {
            wait = wait.min(Duration::from_secs(1) / self.plan.arrivals);
        }
        wait
    }

    /// Those whose time has come, whatever has become of the ones before.
    fn arrive(&mut self, now: Instant) {
        if self.is_stopping {
            return;
        }
        let due = (now - self.began).as_secs_f64() * f64::from(self.plan.arrivals);
        let mut due = due as u64;
        if self.plan.most > 0 {
            due = due.min(self.plan.most);
        }
        while self.tally.arrivals < due {
            self.tally.arrivals += 1;
            let index = self.free.pop().unwrap_or_else(|| {
                self.clients.push(Client::new(Kind::Once));
                self.clients.len() - 1
            });
            self.begin(index);
        }
    }

    /// Connects, or asks on the connection that there is.
    fn begin(&mut self, index: usize) {
        if self.clients[index].socket.is_some() {
            return self.ask(index);
        }
        self.source = self.source.wrapping_add(1);
        let client = &mut self.clients[index];
        client.since = Instant::now();
        client.state = State::Connecting;
        let begun = sys::begin_to_connect_from(self.source, self.port).and_then(|fd| {
            let mut socket = TcpStream::from_std(fd.into());
            let interest = Interest::READABLE | Interest::WRITABLE;
            self.poll
                .registry()
                .register(&mut socket, Token(index), interest)?;
            Ok(socket)
        });
        match begun {
            Ok(socket) => client.socket = Some(socket),
            Err(error) => self.failed_to_connect(index, &error),
        }
    }

    fn failed_to_connect(&mut self, index: usize, error: &io::Error) {
        let what = match error.kind() {
            ErrorKind::ConnectionRefused => Failure::Refused,
            ErrorKind::ConnectionReset => Failure::ResetBefore,
            _ => panic!("the generator cannot connect: {error}"),
        };
        self.fail(index, what);
    }

    fn wake(&mut self, index: usize) {
        let client = &self.clients[index];
        if client.state == State::Resting && !self.is_stopping {
            self.begin(index);
        }
    }

    fn ready(&mut self, index: usize, is_writable: bool) {
        let client = &mut self.clients[index];
        let Some(socket) = &client.socket else { return };
        if client.state == State::Connecting {
            match socket.take_error() {
                Ok(Some(error)) | Err(error) => return self.failed_to_connect(index, &error),
                Ok(None) if !is_writable || socket.peer_addr().is_err() => return,
                Ok(None) => return self.ask(index),
            }
        }
        self.read(index);
    }

    fn ask(&mut self, index: usize) {
        let client = &mut self.clients[index];
        let is_reused = client.answers_on_it > 0;
        let request: &[u8] = match client.kind {
            Kind::Fresh | Kind::Once => {
                b"GET / HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n"
            }
            Kind::KeepAlive(_) | Kind::Idle => b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
            Kind::Stream => b"GET /stream HTTP/1.1\r\nHost: here\r\n\r\n",
        };
        let Some(mut socket) = client.socket.as_ref() else {
            return;
        };
        if is_reused {
            client.since = Instant::now();
            // As every client does that keeps connections: it looks first.
            match socket.peek(&mut [0]) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                _ => return self.found_closed(index),
            }
        }
        client.state = State::Asked;
        client.input.clear();
        if socket.write(request).is_err() {
            self.ended(index);
        }
    }

    fn found_closed(&mut self, index: usize) {
        let client = &mut self.clients[index];
        let what = match client.kind {
            Kind::Idle => Some(Failure::IdleLost),
            _ if client.is_told => None,
            _ => Some(Failure::ClosedUntold),
        };
        let by = client.by;
        let is_idle = client.kind == Kind::Idle;
        client.drop_socket();
        client.state = State::Resting;
        if let Some(what) = what {
            self.tally.failed.push(Failed { what, by });
        }
        if is_idle {
            self.clients[index].state = State::Over;
        } else if !self.is_stopping {
            self.begin(index);
        }
    }

    fn read(&mut self, index: usize) {
        loop {
            let client = &mut self.clients[index];
            let Some(socket) = &mut client.socket else {
                return;
            };
            match socket.read(&mut self.buffer) {
                Ok(0) => return self.ended(index),
                Ok(count) if client.state == State::Asked => {
                    client.input.extend_from_slice(&self.buffer[..count]);
                    if let Some(answer) = whole(&client.input, client.kind) {
                        return self.answered(index, &answer);
                    }
                }
                Ok(_) => return self.fail(index, Failure::Wrong),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => return self.ended(index),
            }
        }
    }

    /// The connection has ended.
    fn ended(&mut self, index: usize) {
        let client = &self.clients[index];
        let what = match client.state {
            State::Resting | State::Over => return self.found_closed(index),
            _ if client.kind == Kind::Stream => Failure::StreamLost,
            _ if client.kind == Kind::Idle && client.answers_on_it > 0 => Failure::IdleLost,
            _ if !client.input.is_empty() => Failure::ResetAfter,
            _ if client.answers_on_it > 0 => Failure::EndedUnderRequest,
            _ => Failure::ResetBefore,
        };
        self.fail(index, what);
    }

    fn fail(&mut self, index: usize, what: Failure) {
        let client = &mut self.clients[index];
        let by = client.by;
        client.drop_socket();
        self.tally.failed.push(Failed { what, by });
        // Not at once: where nobody listens that would be a loop.
        self.next(index, Duration::from_millis(10));
    }

    fn answered(&mut self, index: usize, answer: &Answer) {
        let now = Instant::now();
        self.tally.gap = self.tally.gap.max(now - self.last_answer);
        self.last_answer = now;
        let client = &mut self.clients[index];
        if !answer.is_right {
            return self.fail(index, Failure::Wrong);
        }
        self.tally.answers += 1;
        self.tally.late += u64::from(now - client.since > Duration::from_secs(1));
        if let Some(by) = answer.by {
            *self.tally.by.entry(by).or_default() += 1;
        }
        self.tally.streams += u64::from(client.kind == Kind::Stream);
        if client.kind == Kind::Idle && client.answers_on_it > 0 {
            self.tally.idle_moved += u64::from(client.by != answer.by);
        }
        client.answers_on_it += 1;
        client.by = answer.by;
        client.is_told = answer.is_last;
        let rest = match client.kind {
            Kind::KeepAlive(rest) => rest,
            _ => Duration::ZERO,
        };
        let is_once = matches!(client.kind, Kind::Fresh | Kind::Once | Kind::Stream);
        if is_once || answer.is_last {
            if client.kind == Kind::Idle {
                // Told: it would go elsewhere with its next request.
                client.answers_on_it = 0;
            }
            client.drop_socket();
        }
        self.next(index, rest);
    }

    /// What a client does after a request, whatever became of it.
    fn next(&mut self, index: usize, rest: Duration) {
        let client = &mut self.clients[index];
        client.state = State::Resting;
        match client.kind {
            Kind::Once => {
                client.state = State::Over;
                self.free.push(index);
            }
            // It waits for the end. One that is lost is not made anew.
            Kind::Idle if client.socket.is_none() => client.state = State::Over,
            Kind::Idle => {}
            _ if self.is_stopping => {}
            _ if rest.is_zero() => self.begin(index),
            _ => self.wakes.push(Reverse((Instant::now() + rest, index))),
        }
    }

    fn ask_the_idle(&mut self) {
        for index in 0..self.clients.len() {
            let client = &self.clients[index];
            if client.kind == Kind::Idle && client.state == State::Resting {
                self.begin(index);
            }
        }
    }

    fn give_up_on_late(&mut self, now: Instant) {
        for index in 0..self.clients.len() {
            let client = &self.clients[index];
            let is_busy = matches!(client.state, State::Asked | State::Connecting);
            let patience = match client.kind {
                // It is answered for 2 s, and longer where all wait for the processor.
                Kind::Stream => 4 * PATIENCE,
                _ => PATIENCE,
            };
            if is_busy && now - client.since > patience {
                let what = match client.kind {
                    Kind::Stream => Failure::StreamLost,
                    Kind::Idle => Failure::IdleLost,
                    _ => Failure::TimedOut,
                };
                self.fail(index, what);
            }
        }
    }
}

/// Reads an answer, if it is whole.
fn whole(input: &[u8], kind: Kind) -> Option<Answer> {
    let end = input.windows(4).position(|four| four == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&input[..end]).to_ascii_lowercase();
    let body = &input[end + 4..];
    let mut lines = head.split("\r\n");
    let mut answer = Answer {
        by: None,
        is_last: false,
        is_right: lines
            .next()
            .is_some_and(|line| line.starts_with("http/1.1 200")),
    };
    let mut length = None;
    for line in lines {
        match line
            .split_once(':')
            .map(|(name, value)| (name, value.trim()))
        {
            Some(("content-length", value)) => length = value.parse::<usize>().ok(),
            Some(("connection", "close")) => answer.is_last = true,
            _ => {}
        }
    }
    if kind == Kind::Stream && answer.is_right {
        if !input.ends_with(LAST_CHUNK) {
            return None;
        }
        let text = String::from_utf8_lossy(body);
        answer.is_right = text.matches(TICK).count() == TICKS as usize;
        return Some(answer);
    }
    let Some(length) = length else {
        answer.is_right = false;
        return Some(answer);
    };
    let body = body.get(..length)?;
    let by = std::str::from_utf8(body).ok();
    answer.by = by.and_then(|text| text.trim_end().parse().ok());
    answer.is_right &= answer.by.is_some();
    Some(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_when_they_are_whole() {
        let text = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 3\r\n\r\n12\n";
        for end in 0..text.len() {
            assert!(whole(&text[..end], Kind::Fresh).is_none(), "{end} bytes");
        }
        let answer = whole(text, Kind::Fresh).expect("it is whole");
        assert!(answer.is_right && answer.is_last);
        assert_eq!(answer.by, Some(12));
        let text = b"HTTP/1.1 502 Bad\r\nContent-Length: 0\r\n\r\n";
        assert!(!whole(text, Kind::Stream).expect("it is whole").is_right);
    }
}
