//! What one more of something costs: messages and new connections among more and more
//! connections, listeners and timers, for bowline and for the loop by hand.
//!
//! The server and its clients alternate in one process, and only the server's turns are
//! counted: their CPU time, or under callgrind their instructions, which no other work on
//! the machine changes.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, ErrorKind, Read, Write as _};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::drive::{collected, server_turn};
use crate::external;
use crate::peers::{self, Family, Job, Peer, Server, Task, Wait};
use crate::report::{machine, median};
use crate::sys;
use crate::timers::Timed;

const PEERS: [Peer; 2] = [Peer::Limit, Peer::Bowline];
const MESSAGE: usize = 64;
/// How many connections are ready in one turn, and how many come in one.
const AT_ONCE: usize = 64;
/// Connections beside those that come to several listeners.
const BESIDE: usize = 10;
/// Descriptors that neither end of a held connection is.
const BESIDE_ENDS: usize = 300;
/// Rounds before counting begins.
const WARM_UP: usize = 4;

/// What grows, and what is done then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Grown {
    /// Messages among so many connections.
    Messages,
    /// A connection that comes, asks once and goes, beside so many that are open.
    Connections,
    /// The same, over so many listeners.
    Listeners,
    /// Timers that fire, so many of them.
    TimersFired,
    /// One more timer that is cancelled, beside so many.
    TimersBeside,
}

impl Grown {
    pub(crate) const ALL: [Self; 5] = [
        Self::Messages,
        Self::Connections,
        Self::Listeners,
        Self::TimersFired,
        Self::TimersBeside,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Messages => "messages",
            Self::Connections => "connections",
            Self::Listeners => "listeners",
            Self::TimersFired => "timers-fired",
            Self::TimersBeside => "timers-beside",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Messages => "a message, by connections",
            Self::Connections => "a new connection, by connections",
            Self::Listeners => "a new connection, by listeners",
            Self::TimersFired => "a timer that fires, by timers",
            Self::TimersBeside => "one more timer and its cancel, by timers",
        }
    }

    fn sizes(self) -> &'static [usize] {
        match self {
            Self::Messages | Self::Connections => &[10, 1_000, 10_000, 19_000],
            Self::Listeners => &[1, 4, 16, 64],
            Self::TimersFired | Self::TimersBeside => &[1_000, 10_000, 100_000, 1_000_000],
        }
    }

    fn timed(self) -> Option<Timed> {
        match self {
            Self::TimersFired => Some(Timed::Fire),
            Self::TimersBeside => Some(Timed::Pending),
            _ => None,
        }
    }
}

/// The server, and the CPU time that its turns have taken.
struct Bench {
    server: Box<dyn Server>,
    took: Duration,
    is_counting: bool,
}

impl Bench {
    fn new(peer: Peer) -> io::Result<Self> {
        let job = Job {
            task: Task::Echo,
            family: Family::Tcp,
            message: MESSAGE,
        };
        Ok(Self {
            server: peers::build(peer, job, None)?,
            took: Duration::ZERO,
            is_counting: false,
        })
    }

    fn turn(&mut self) -> io::Result<()> {
        if !self.is_counting {
            return self.server.turn(Wait::No);
        }
        let before = sys::own_cpu_time();
        server_turn(&mut *self.server)?;
        self.took += sys::own_cpu_time() - before;
        Ok(())
    }

    /// Has another process hold the clients of so many connections.
    fn held_elsewhere(&mut self, port: u16, count: usize) -> io::Result<Option<Holder>> {
        if count == 0 {
            return Ok(None);
        }
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["hold", &port.to_string(), &count.to_string()]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut holder = Holder(command.spawn()?);
        let output = holder.0.stdout.take().ok_or(ErrorKind::NotFound)?;
        sys::set_nonblocking(output.as_raw_fd())?;
        let mut output = io::BufReader::new(output);
        loop {
            match output.read(&mut [0]) {
                Ok(1) => return Ok(Some(holder)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.turn()?,
                other => panic!("nobody holds {count} connections: {other:?}"),
            }
        }
    }

    /// Takes the answer of each, which has been asked.
    fn answers(&mut self, clients: &[OwnedFd]) -> io::Result<()> {
        for client in clients {
            let mut answer = [0; MESSAGE];
            loop {
                match sys::receive(client.as_raw_fd(), &mut answer) {
                    Ok(MESSAGE) => break,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => self.turn()?,
                    other => panic!("no whole answer: {other:?}"),
                }
            }
        }
        Ok(())
    }
}

/// A process that holds clients, for as long as this is there.
struct Holder(Child);

impl Drop for Holder {
    fn drop(&mut self) {
        // Gone already, or not: either way it is reaped.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// That process: until its input ends.
pub(crate) fn hold(port: u16, count: usize) -> io::Result<()> {
    let clients = (0..count).map(|_| client(2, port));
    let _clients = clients.collect::<io::Result<Vec<_>>>()?;
    io::stdout().write_all(b"R")?;
    io::stdout().flush()?;
    io::copy(&mut io::stdin(), &mut io::sink())?;
    Ok(())
}

/// A listener, and its port.
fn listener() -> io::Result<(OwnedFd, u16)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    sys::set_backlog(listener.as_raw_fd(), 4096)?;
    sys::set_no_delay(listener.as_raw_fd())?;
    sys::set_nonblocking(listener.as_raw_fd())?;
    let port = listener.local_addr()?.port();
    Ok((listener.into(), port))
}

fn client(source: u16, port: u16) -> io::Result<OwnedFd> {
    let client = sys::connect_from(source, port)?;
    sys::set_nonblocking(client.as_raw_fd())?;
    Ok(client)
}

/// The process that is counted: prints the CPU time of one operation, in nanoseconds.
pub(crate) fn grow(peer: Peer, grown: Grown, size: usize, rounds: usize) -> io::Result<f64> {
    let mut bench = Bench::new(peer)?;
    let listeners = match grown {
        Grown::Listeners => size,
        _ => 1,
    };
    let mut ports = Vec::new();
    for _ in 0..listeners {
        let (listener, port) = listener()?;
        bench.server.listen(listener)?;
        ports.push(port);
    }
    let held = match grown {
        Grown::Listeners => BESIDE,
        _ => size,
    };
    // Both ends are descriptors of this process, unless there are too many.
    let limit = sys::raise_descriptor_limit()? as usize;
    let own = held.min(limit.saturating_sub(held + BESIDE_ENDS));
    let _others = bench.held_elsewhere(ports[0], held - own)?;
    let mut clients = Vec::with_capacity(own);
    for number in 0..own {
        clients.push(client(1, ports[0])?);
        // A turn accepts more than come meanwhile, so that no queue overflows.
        if number % 32 == 31 {
            bench.turn()?;
        }
    }
    // When the last one answers, all have been accepted.
    let message = [7; MESSAGE];
    if let Some(last) = clients.last() {
        sys::send(last.as_raw_fd(), &message)?;
        bench.answers(std::slice::from_ref(last))?;
    }
    let mut source = 100;
    for round in 0..WARM_UP + rounds {
        bench.is_counting = round >= WARM_UP;
        if grown == Grown::Messages {
            // Others each time, so that none is in the cache for being few.
            let from = round * AT_ONCE % clients.len();
            clients.rotate_left(from);
            let some = &clients[..AT_ONCE.min(clients.len())];
            for client in some {
                sys::send(client.as_raw_fd(), &message)?;
            }
            bench.answers(some)?;
        } else {
            source = 100 + (source - 99) % 20_000;
            let come = (0..AT_ONCE).map(|at| client(source, ports[at % ports.len()]));
            let come = come.collect::<io::Result<Vec<_>>>()?;
            for client in &come {
                sys::send(client.as_raw_fd(), &message)?;
            }
            bench.answers(&come)?;
            drop(come);
            // Their ends are seen too.
            for _ in 0..2 {
                bench.turn()?;
            }
        }
    }
    let operations = match grown {
        Grown::Messages => rounds * AT_ONCE.min(held),
        _ => rounds * AT_ONCE,
    };
    Ok(bench.took.as_nanos() as f64 / operations as f64)
}

/// How much is done.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    rounds: usize,
    repeats: usize,
    /// Rounds under callgrind, and the most that there is of anything then.
    counted: usize,
    most: usize,
}

impl Effort {
    pub(crate) const FULL: Self = Self {
        rounds: 300,
        repeats: 5,
        counted: 20,
        most: 1_000_000,
    };

    pub(crate) const QUICK: Self = Self {
        rounds: 60,
        repeats: 3,
        counted: 4,
        most: 10_000,
    };
}

/// One point of a curve: the CPU time of each repetition, and the instructions.
struct Point {
    grown: Grown,
    size: usize,
    peer: Peer,
    times: Vec<f64>,
    instructions: Option<f64>,
}

/// All curves.
pub(crate) fn all(effort: Effort) -> io::Result<Curves> {
    let mut points = Vec::new();
    for grown in Grown::ALL {
        for &size in grown.sizes().iter().filter(|size| **size <= effort.most) {
            let mut times = PEERS.map(|_| Vec::new());
            // By turns, since the machine changes.
            for _ in 0..effort.repeats {
                for (peer, times) in PEERS.iter().zip(&mut times) {
                    times.push(time(*peer, grown, size, effort.rounds)?);
                }
            }
            for (peer, times) in PEERS.into_iter().zip(times) {
                let instructions = match grown.timed() {
                    Some(_) => None,
                    None => instructions(peer, grown, size, effort.counted)?,
                };
                println!(
                    "{:44} {size:9} {:8} {:9.0} ns {:9.0} instructions",
                    grown.title(),
                    peer.name(),
                    median(&times).unwrap_or(f64::NAN),
                    instructions.unwrap_or(f64::NAN)
                );
                points.push(Point {
                    grown,
                    size,
                    peer,
                    times,
                    instructions,
                });
            }
        }
    }
    Ok(Curves { points })
}

/// In a process of its own.
fn time(peer: Peer, grown: Grown, size: usize, rounds: usize) -> io::Result<f64> {
    let mut command = external::program(peer)?;
    sys::pin_child(&mut command, 0);
    match grown.timed() {
        Some(timed) => command.args(["time", peer.name(), timed.name(), &size.to_string()]),
        None => command.args(arguments(peer, grown, size, rounds)),
    };
    number(&mut command)
}

fn arguments(peer: Peer, grown: Grown, size: usize, rounds: usize) -> [String; 5] {
    let (size, rounds) = (size.to_string(), rounds.to_string());
    ["grow", peer.name(), grown.name(), &size, &rounds].map(String::from)
}

fn number(command: &mut Command) -> io::Result<f64> {
    let output = command.output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let number = text
        .split_whitespace()
        .next()
        .and_then(|it| it.parse().ok());
    number.ok_or_else(|| {
        let said = String::from_utf8_lossy(&output.stderr);
        io::Error::other(format!("{command:?}: {said}"))
    })
}

/// Of one operation; nothing without valgrind.
fn instructions(peer: Peer, grown: Grown, size: usize, rounds: usize) -> io::Result<Option<f64>> {
    let counted = |rounds| {
        let arguments = arguments(peer, grown, size, rounds);
        collected(peer, "*drive::server_turn*", &arguments)
    };
    let operations = match grown {
        Grown::Messages => rounds * AT_ONCE.min(size),
        _ => rounds * AT_ONCE,
    };
    let all = counted(rounds)?;
    Ok(all.map(|all| all as f64 / operations as f64))
}

/// What was measured.
pub(crate) struct Curves {
    points: Vec<Point>,
}

impl Curves {
    fn sizes(&self, grown: Grown) -> Vec<usize> {
        let of = self.points.iter().filter(|it| it.grown == grown);
        let mut sizes: Vec<_> = of.map(|it| it.size).collect();
        sizes.dedup();
        sizes
    }

    fn point(&self, grown: Grown, size: usize, peer: Peer) -> Option<&Point> {
        let mut points = self.points.iter();
        points.find(|it| (it.grown, it.size, it.peer) == (grown, size, peer))
    }

    /// How much more an operation takes at a size than at the smallest one.
    fn growth(&self, grown: Grown, size: usize, peer: Peer) -> Option<f64> {
        let first = *self.sizes(grown).first()?;
        let at = |size| median(&self.point(grown, size, peer)?.times);
        Some(at(size)? / at(first)?)
    }

    /// The file for the documentation.
    pub(crate) fn markdown(&self, command: &str) -> String {
        let mut text = format!(
            "# What one more costs\n\n{}\n\nMade by `{command}`. Server and clients alternate in \
             one process, on one CPU; given is the CPU time of the server's turns for one operation, \
             the kernel's part included, the\nmedian of {} repetitions by turns; how much more that is \
             than in the first line; and the instructions in user space, which no other work on the \
             machine changes. {AT_ONCE} connections are\nready in a turn, others each time; of 19,000 \
             they are some 700, since another process holds the other clients.\n",
            machine(),
            self.points.first().map_or(0, |it| it.times.len()),
        );
        for grown in Grown::ALL {
            let _ = write!(
                text,
                "\n| {} | by hand | grown | bowline | grown | instructions by hand | bowline |\n\
                 |---|---|---|---|---|---|---|\n",
                grown.title()
            );
            for size in self.sizes(grown) {
                let _ = write!(text, "| {} |", thousands(size));
                for peer in PEERS {
                    let time = self.point(grown, size, peer);
                    let time = time.and_then(|it| median(&it.times)).unwrap_or(f64::NAN);
                    let grew = self.growth(grown, size, peer).unwrap_or(f64::NAN);
                    let _ = write!(text, " {time:.0} ns | {grew:.2} |");
                }
                for peer in PEERS {
                    let count = self.point(grown, size, peer);
                    match count.and_then(|it| it.instructions) {
                        Some(count) => write!(text, " {count:.0} |"),
                        None => write!(text, " - |"),
                    }
                    .expect("a string has room");
                }
                text.push('\n');
            }
        }
        text
    }

    /// Draws each curve: nanoseconds over how many there are.
    pub(crate) fn draw(&self, path: &str) -> Result<(), Box<dyn std::error::Error>> {
        use plotters::prelude::*;
        let area = SVGBackend::new(path, (960, 560)).into_drawing_area();
        area.fill(&WHITE)?;
        let cells = area.split_evenly((2, 3));
        for (grown, cell) in Grown::ALL.into_iter().zip(&cells) {
            let sizes = self.sizes(grown);
            let (Some(&first), Some(&last)) = (sizes.first(), sizes.last()) else {
                continue;
            };
            let of = self.points.iter().filter(|it| it.grown == grown);
            let most = of.filter_map(|it| median(&it.times)).fold(0.0, f64::max);
            let mut chart = ChartBuilder::on(cell)
                .caption(grown.title(), ("sans-serif", 14))
                .margin(8)
                .x_label_area_size(24)
                .y_label_area_size(56)
                .build_cartesian_2d(
                    (first as f64..last as f64).log_scale(),
                    0.0..most * 1.2 + 1.0,
                )?;
            chart
                .configure_mesh()
                .disable_x_mesh()
                .x_label_formatter(&|size| thousands(*size as usize))
                .y_label_formatter(&|time| format!("{time:.0} ns"))
                .draw()?;
            for (peer, color) in PEERS
                .into_iter()
                .zip([RGBColor(120, 120, 120), RGBColor(20, 90, 160)])
            {
                let line: Vec<(f64, f64)> = sizes
                    .iter()
                    .filter_map(|&size| {
                        let point = self.point(grown, size, peer)?;
                        Some((size as f64, median(&point.times)?))
                    })
                    .collect();
                let name = match peer {
                    Peer::Limit => "by hand",
                    _ => "bowline",
                };
                chart
                    .draw_series(LineSeries::new(line, color.stroke_width(2)))?
                    .label(name)
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color));
            }
            chart
                .configure_series_labels()
                .position(SeriesLabelPosition::LowerRight)
                .draw()?;
        }
        area.present()?;
        Ok(())
    }
}

fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Runs all, and writes what was asked for.
pub(crate) fn run(options: &[&str]) -> Result<(), Box<dyn std::error::Error>> {
    let (mut effort, mut file, mut picture) = (Effort::FULL, None, None);
    let mut left = options.iter();
    while let Some(&option) = left.next() {
        if option == "--quick" {
            effort = Effort::QUICK;
            continue;
        }
        let value = left.next().ok_or("the option wants a value")?;
        match option {
            "--write" => file = Some(value),
            "--svg" => picture = Some(value),
            _ => return Err(format!("unknown option {option}").into()),
        }
    }
    if sys::raise_descriptor_limit()? < 19_500 {
        return Err("19,000 connections want a limit of 19,500 open files or more".into());
    }
    let curves = all(effort)?;
    if let Some(file) = file {
        let command = format!("bowline-bench -- growth {}", options.join(" "));
        fs::write(
            file,
            curves.markdown(&format!("cargo run --release -p {command}")),
        )?;
    }
    if let Some(picture) = picture {
        curves.draw(picture)?;
    }
    Ok(())
}
