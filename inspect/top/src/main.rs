//! Shows in a terminal what a bowline program holds and does, as `top` does of a machine.
//!
//! A bowline program itself: it connects to the socket of an `Inspector`, again and again
//! if the other program is restarted, and its terminal is a transport too.

#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt::Write;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline_protocol::framing::{FrameContext, FrameReceiver, Framed, LineFramer};
use bowline_protocol::policies::Reconnecting;
use bowline_protocol::{Address, CloseReason, Context, Protocol, Transport, TransportHandle};
use bowline_reactor::Reactor;
use bowline_transport::{Stdio, Transports, terminal_size};
use rustix::termios::{self, OptionalActions, Termios};
use serde_json::Value;

const HELP: &str = "\
Shows what a bowline program holds and does.

Usage: bowline-top PATH [--every SECONDS] [--once]

  PATH             the socket of the program's inspector
  --every SECONDS  how often to look [default: 1]
  --once           look twice, print the second look, and end

Keys: q quits; the list is ordered by k kind, r received, s sent, b buffered, a age.
";

/// What the list is ordered by.
#[derive(Clone, Copy, PartialEq)]
enum Order {
    Kind,
    Received,
    Sent,
    Buffered,
    Age,
}

/// A line of the list.
struct Row {
    token: u64,
    kind: String,
    name: String,
    state: String,
    peer: String,
    age: f64,
    buffered: u64,
    received: u64,
    sent: u64,
    /// Bytes or messages a second.
    rates: [f64; 2],
}

/// What was seen last, and what is shown of it.
struct View {
    order: Order,
    is_once: bool,
    looks: u32,
    summary: Value,
    /// The counts of the look before, and when that was.
    turns: (f64, f64),
    busy: (f64, f64),
    at: Instant,
    before: HashMap<u64, [u64; 2]>,
    rows: Vec<Row>,
    /// What the channels of pools hold together.
    pools: Vec<Value>,
    /// Those of the list that is arriving.
    arriving: Vec<Value>,
    message: String,
    screen: Option<TransportHandle>,
    program: Option<TransportHandle>,
}

type Shared = Rc<RefCell<View>>;
type Cx<'a, T> = FrameContext<'a, T, LineFramer>;

/// Hears what the program answers.
struct Listens(Shared);

impl<T: Transport> FrameReceiver<T, LineFramer> for Listens {
    fn connection_made(&mut self, cx: &mut Cx<'_, T>) {
        self.0.borrow_mut().program = Some(cx.transport.handle());
        ask(cx.transport);
    }

    fn frame_received(&mut self, cx: &mut Cx<'_, T>, line: &[u8]) {
        let view = &mut *self.0.borrow_mut();
        let Ok(value) = serde_json::from_slice::<Value>(line) else {
            view.message = "the program answers something else than JSON".into();
            return;
        };
        if value.get("turns").is_some() {
            view.summary = value;
        } else if let Some(end) = value.get("end") {
            view.looked(end);
            if view.is_once && view.looks == 2 {
                println!("{}", view.text(usize::MAX, usize::MAX).join("\n"));
                // It runs: this is one of its callbacks.
                let _ = cx.reactor.stop();
            } else if !view.is_once {
                view.show(cx.reactor);
            }
        } else if value.get("token").is_some() {
            view.arriving.push(value);
        }
    }

    fn connection_lost(&mut self, cx: &mut Cx<'_, T>, reason: &CloseReason) {
        let view = &mut *self.0.borrow_mut();
        view.program = None;
        view.arriving.clear();
        view.message = format!("the program has gone ({reason}); waiting for it");
        view.show(cx.reactor);
    }
}

fn ask(program: &mut (impl Transport + ?Sized)) {
    program.write(b"{\"get\":\"summary\"}\n{\"get\":\"descriptors\"}\n");
}

/// The terminal.
struct Keys(Shared);

impl<T: Transport> Protocol<T> for Keys {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        self.0.borrow_mut().screen = Some(cx.transport.handle());
        // Another screen, without a cursor.
        cx.transport.write(b"\x1b[?1049h\x1b[?25l");
    }

    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        for key in data {
            let order = match key {
                b'k' => Order::Kind,
                b'r' => Order::Received,
                b's' => Order::Sent,
                b'b' => Order::Buffered,
                b'a' => Order::Age,
                b'q' | 3 => {
                    cx.transport.write(b"\x1b[?25h\x1b[?1049l");
                    cx.transport.lose_connection();
                    return;
                }
                _ => continue,
            };
            self.0.borrow_mut().order = order;
        }
        let view = Rc::clone(&self.0);
        cx.reactor
            .defer(move |reactor| view.borrow_mut().show(reactor));
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, _: &CloseReason) {
        // It may be stopping already.
        let _ = cx.reactor.stop();
    }
}

fn number(value: &Value, path: &str) -> f64 {
    value.pointer(path).and_then(Value::as_f64).unwrap_or(0.0)
}

impl View {
    /// A list is whole. Its last line has what belongs together, added up.
    fn looked(&mut self, end: &Value) {
        let passed = self.at.elapsed().as_secs_f64().max(1e-3);
        self.at = Instant::now();
        self.looks += 1;
        self.message.clear();
        self.turns = (self.turns.1, number(&self.summary, "/turns"));
        self.busy = (self.busy.1, number(&self.summary, "/busy"));
        let arrived = std::mem::take(&mut self.arriving);
        let mut rows: Vec<_> = arrived.iter().map(Row::new).collect();
        for sum in end["listeners"].as_array().into_iter().flatten() {
            let token = sum["token"].as_u64();
            if let Some(row) = rows.iter_mut().find(|row| Some(row.token) == token) {
                row.is_of_all(sum);
            }
        }
        self.pools = end["pools"].as_array().cloned().unwrap_or_default();
        let mut counts = HashMap::new();
        for row in &mut rows {
            let now = [row.received, row.sent];
            if let Some(before) = self.before.get(&row.token) {
                let rate = |way: usize| now[way].saturating_sub(before[way]) as f64 / passed;
                row.rates = [rate(0), rate(1)];
            }
            counts.insert(row.token, now);
        }
        self.before = counts;
        self.rows = rows;
        self.turns.0 = (self.turns.1 - self.turns.0) / passed;
        self.busy.0 = (self.busy.1 - self.busy.0) / passed;
    }

    fn show(&self, reactor: &mut Reactor) {
        let Some(screen) = self.screen else { return };
        let size = terminal_size(io::stdout().as_fd()).ok();
        let (lines, columns) =
            size.map_or((24, 80), |size| (size.rows.max(4), size.columns.max(20)));
        let text = self.text(lines.into(), columns.into());
        if let Some(screen) = reactor.get(screen)
            && screen.unsent_bytes() == 0
        {
            screen.write(format!("\x1b[H{}\x1b[J", text.join("\x1b[K\r\n")).as_bytes());
        }
    }

    /// What is shown, cut to a size.
    fn text(&self, lines: usize, columns: usize) -> Vec<String> {
        let it = &self.summary;
        let time = |path: &str| duration(number(it, path));
        let mut text = vec![
            format!(
                "process {}  {} descriptors  {} timers wait  {} panics  {}",
                number(it, "/pid"),
                number(it, "/registered"),
                number(it, "/timers_pending"),
                number(it, "/panics"),
                self.message,
            ),
            format!(
                "turns {:.0}/s  busy {:.1} %  turn p99 {}, longest {}  callback p99 {}",
                self.turns.0.max(0.0),
                (self.busy.0 * 100.0).clamp(0.0, 100.0),
                time("/turn_times/p99"),
                time("/turn_times/longest"),
                time("/callbacks/ready/p99"),
            ),
        ];
        let slowest = it.pointer("/slowest/0");
        text.push(slowest.map_or_else(String::new, |slow| {
            let name = slow["name"].as_str().unwrap_or_default();
            let callback = slow["callback"].as_str().unwrap_or_default();
            let (took, ago) = (number(slow, "/took"), number(slow, "/ago"));
            let (took, ago) = (duration(took), duration(ago));
            format!("slowest: {took} in {callback} of {name}, {ago} ago")
        }));
        let parts = it["parts"].as_array().into_iter().flatten();
        text.extend(parts.map(|it| part(it, &self.pools)));
        let mut head = String::new();
        let _ = write!(
            head,
            "{:<10} {:<16} {:<12} {:>8} {:>9} {:>9} {:>8} {:>8}  PEER",
            "KIND", "NAME", "STATE", "AGE", "RECV/s", "SENT/s", "RECV", "BUFFER"
        );
        text.push(head);
        let mut rows: Vec<_> = self.rows.iter().collect();
        rows.sort_by(|a, b| match self.order {
            Order::Kind => (&a.kind, &a.name).cmp(&(&b.kind, &b.name)),
            Order::Received => b.rates[0].total_cmp(&a.rates[0]),
            Order::Sent => b.rates[1].total_cmp(&a.rates[1]),
            Order::Buffered => b.buffered.cmp(&a.buffered),
            Order::Age => b.age.total_cmp(&a.age),
        });
        text.extend(rows.iter().map(|row| row.text()));
        text.truncate(lines);
        for line in &mut text {
            *line = line.chars().take(columns).collect();
        }
        text
    }
}

impl Row {
    fn new(value: &Value) -> Self {
        let sections = value["sections"].as_array();
        let fact = |names: &[&str]| {
            let mut sections = sections.into_iter().flatten();
            sections.find_map(|section| {
                let facts = &section["facts"];
                names.iter().find_map(|name| facts.get(name)).cloned()
            })
        };
        let word = |names: &[&str]| match fact(names) {
            Some(Value::String(text)) => printable(&text),
            _ => String::new(),
        };
        let count = |names: &[&str]| fact(names).and_then(|it| it.as_u64()).unwrap_or(0);
        let reading = word(&["reading"]);
        let mut state = word(&["state"]);
        if reading == "paused" || reading == "held" {
            state = reading;
        }
        Self {
            token: value["token"].as_u64().unwrap_or(0),
            kind: printable(value["kind"].as_str().unwrap_or_default()),
            name: word(&["protocol", "factory"]),
            state,
            peer: match word(&["peer"]) {
                peer if peer.is_empty() => word(&["local"]),
                peer => peer,
            },
            age: number(value, "/age"),
            buffered: count(&["buffered_bytes"]),
            received: count(&["received_bytes", "received_messages", "accepted"]),
            sent: count(&["sent_bytes", "sent_messages"]),
            rates: [0.0; 2],
        }
    }

    /// It is a listener: what all of its connections did and hold.
    fn is_of_all(&mut self, sum: &Value) {
        let count = |name: &str| sum[name].as_u64().unwrap_or(0);
        let either = |bytes: &str, messages: &str| match count(bytes) {
            0 => count(messages),
            bytes => bytes,
        };
        self.received = either("received_bytes", "received_messages");
        self.sent = either("sent_bytes", "sent_messages");
        self.buffered = count("buffered_bytes");
        self.peer += &format!("  {}", held(sum));
    }

    fn text(&self) -> String {
        format!(
            "{:<10.10} {:<16.16} {:<12.12} {:>8} {:>9} {:>9} {:>8} {:>8}  {}",
            self.kind,
            self.name,
            self.state,
            duration(self.age),
            size(self.rates[0]),
            size(self.rates[1]),
            size(self.received as f64),
            size(self.buffered as f64),
            self.peer,
        )
    }
}

/// What connections hold together: their states, descriptors, and who has paused them.
fn held(sum: &Value) -> String {
    let mut text = String::new();
    let mut tell = |count: &Value, what: &str| {
        if count.as_u64().is_some_and(|count| count > 0) {
            let comma = if text.is_empty() { "" } else { ", " };
            let _ = write!(text, "{comma}{count} {}", printable(what));
        }
    };
    for (state, count) in sum["states"].as_object().into_iter().flatten() {
        tell(count, state);
    }
    tell(&sum["sent_descriptors"], "descriptors out");
    tell(&sum["received_descriptors"], "descriptors in");
    tell(&sum["queued_descriptors"], "descriptors wait");
    for (by, count) in sum["paused_by"].as_object().into_iter().flatten() {
        tell(count, &format!("paused by the {by}"));
    }
    text
}

/// A pool, a restart, or what the program has told of itself beside its descriptors.
fn part(part: &Value, pools: &[Value]) -> String {
    let mut text = printable(part["name"].as_str().unwrap_or_default()) + ":";
    let of_pool = |it: &&Value| text == "Pool channels:" && it["pool"] == part["facts"]["pool"];
    if let Some(sum) = pools.iter().find(of_pool) {
        let bytes = |name: &str| size(number(sum, name));
        let (sent, received) = (bytes("/sent_bytes"), bytes("/received_bytes"));
        let (waits, held) = (bytes("/buffered_bytes"), held(sum));
        return format!("{text}  {sent} bytes out, {received} in, {waits} wait, {held}");
    }
    for (name, fact) in part["facts"].as_object().into_iter().flatten() {
        let fact = match fact {
            // What is nothing says nothing.
            Value::Bool(false) => continue,
            it if it.as_u64() == Some(0) => continue,
            Value::String(text) => printable(text),
            other => other.to_string(),
        };
        let _ = write!(text, "  {} {fact}", printable(name));
    }
    text
}

/// Names come from the other program: no byte of theirs moves our cursor.
fn printable(text: &str) -> String {
    let shown = text
        .chars()
        .map(|it| if it.is_control() { '?' } else { it });
    shown.collect()
}

fn size(mut number: f64) -> String {
    for unit in ["", "K", "M", "G"] {
        if number < 1000.0 {
            return match unit {
                "" => format!("{number:.0}"),
                _ => format!("{number:.1}{unit}"),
            };
        }
        number /= 1000.0;
    }
    format!("{number:.1}T")
}

fn duration(seconds: f64) -> String {
    match seconds {
        it if it < 1e-3 => format!("{:.0}us", it * 1e6),
        it if it < 1.0 => format!("{:.1}ms", it * 1e3),
        it if it < 120.0 => format!("{it:.1}s"),
        it if it < 7200.0 => format!("{:.0}m", it / 60.0),
        it => format!("{:.1}h", it / 3600.0),
    }
}

/// The terminal as it is to be left.
struct Raw(Termios);

impl Raw {
    fn begin() -> io::Result<Self> {
        let before = termios::tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // There is nobody to tell.
        let _ = termios::tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

struct Arguments {
    path: String,
    every: Duration,
    is_once: bool,
}

fn arguments() -> Result<Arguments, String> {
    let (mut path, mut every, mut is_once) = (None, 1.0, false);
    let mut all = std::env::args().skip(1);
    while let Some(argument) = all.next() {
        match argument.as_str() {
            "--help" | "-h" => {
                print!("{HELP}");
                std::process::exit(0);
            }
            "--once" => is_once = true,
            "--every" => {
                let seconds = all.next().and_then(|it| it.parse().ok());
                let seconds = seconds.filter(|it| (0.05..=3600.0).contains(it));
                every = seconds.ok_or("--every takes seconds, 0.05 to 3600")?;
            }
            it if it.starts_with('-') => return Err(format!("unknown argument {it}; try --help")),
            _ if path.is_some() => return Err("one path, please; try --help".into()),
            _ => path = Some(argument),
        }
    }
    Ok(Arguments {
        path: path.ok_or("which socket? try --help")?,
        every: Duration::from_secs_f64(every),
        is_once,
    })
}

fn run(arguments: Arguments) -> Result<(), Box<dyn std::error::Error>> {
    let mut reactor = Reactor::new()?;
    let view = Rc::new(RefCell::new(View {
        order: Order::Received,
        is_once: arguments.is_once,
        looks: 0,
        summary: Value::Null,
        turns: (0.0, 0.0),
        busy: (0.0, 0.0),
        at: Instant::now(),
        before: HashMap::new(),
        rows: Vec::new(),
        pools: Vec::new(),
        arriving: Vec::new(),
        message: "connecting".into(),
        screen: None,
        program: None,
    }));
    let is_shown = !arguments.is_once && io::stdin().is_terminal();
    let _raw = is_shown.then(Raw::begin).transpose()?;
    if is_shown {
        reactor.adopt(Stdio, (), Keys(Rc::clone(&view)))?;
    }
    let listens = Rc::clone(&view);
    let lines = || LineFramer::with_delimiter(b"\n").with_max_length(1 << 20);
    let factory = move |_: &Address| Framed::new(lines(), Listens(Rc::clone(&listens)));
    reactor.connect_unix(arguments.path.as_str(), Reconnecting::new(factory))?;
    reactor.call_every(arguments.every, move |reactor, _| {
        let program = view.borrow().program;
        if let Some(program) = program.and_then(|it| reactor.get(it)) {
            ask(program);
        }
    });
    reactor.run()?;
    Ok(())
}

fn main() -> ExitCode {
    let result = arguments().map_err(Into::into).and_then(run);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bowline-top: {error}");
            ExitCode::FAILURE
        }
    }
}
