//! Load that stays: connections held, and a mix of everything for a while.

use std::cell::{Cell, RefCell};
use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream as StdTcp};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnix;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline::UnixTransport;
use bowline::endpoint::Adopt as _;
use bowline::handoff::restart::{
    Listeners, Movable, MoveTicket, Moved, Packed, Program, Restart, RestartError, RestartSettings,
};
use bowline::layers::StreamTransport;
use bowline::process::describe_socket;
use bowline::testing::Random;
use bowline::{Address, Context, PassedDescriptor, Protocol, Reactor, Transport, Transports};
use bowline::{AfterReadClosed, ReceivedDescriptors, Tcp, TcpStream, Turn, Unix, UnixStream};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::peers::{Farewell, Peer};
use crate::support::faults::{Faults, with_faults};
use crate::support::figures::{Bound, Figures, is_full, scaled};
use crate::support::open_descriptors;
use crate::support::own_process::in_own_process;

/// Echoes, and counts who is there.
struct Echo(Rc<Cell<usize>>);

impl<T: Transport> Protocol<T> for Echo {
    fn connection_made(&mut self, _: &mut Context<'_, T>) {
        self.0.set(self.0.get() + 1);
    }

    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.write(data);
    }

    fn connection_lost(&mut self, _: &mut Context<'_, T>, _: &bowline::CloseReason) {
        self.0.set(self.0.get() - 1);
    }
}

/// What the programs of the soak share, each of which takes over from the one before.
struct World {
    folder: PathBuf,
    address: Cell<Option<SocketAddr>>,
    open: Rc<Cell<usize>>,
    moved: Cell<usize>,
    /// Of those that wanted to take over.
    failed: Cell<usize>,
}

impl World {
    fn path(&self) -> PathBuf {
        self.folder.join("socket")
    }
}

type SharedRestart = Rc<RefCell<Option<Restart>>>;

/// One program of the soak.
#[derive(Clone)]
struct Soaked {
    world: Rc<World>,
    /// `None` before it has begun, and once it is over: the restart owns this.
    restart: SharedRestart,
}

impl Soaked {
    /// Begins one, which takes over if there is another.
    fn begin(world: &Rc<World>) -> (Reactor, SharedRestart) {
        let mut reactor = Reactor::new().unwrap();
        let program = Self {
            world: Rc::clone(world),
            restart: Rc::default(),
        };
        let shared = Rc::clone(&program.restart);
        let settings = RestartSettings::new(world.folder.join("control"));
        let restart = Restart::begin(&mut reactor, settings, program).unwrap();
        shared.replace(Some(restart));
        reactor.start().unwrap();
        (reactor, shared)
    }

    fn client(&self) -> Return {
        Return {
            program: self.clone(),
            present: None,
            ticket: None,
            unread: Vec::new(),
            is_half_closed: false,
        }
    }
}

impl Program for Soaked {
    fn listen(&mut self, reactor: &mut Reactor, listeners: &mut Listeners<'_>) -> io::Result<()> {
        let (program, other) = (self.clone(), self.clone());
        let any = ([127, 0, 0, 1], 0).into();
        let tcp = listeners.listen(reactor, "tcp", Tcp::at(any), move |_: &Address| {
            program.client()
        })?;
        let address = reactor.get(tcp).and_then(|it| it.address().as_inet());
        self.world.address.set(address);
        let path = self.world.path();
        listeners.listen(reactor, "unix", Unix::at(path), move |_: &Address| {
            other.client()
        })?;
        Ok(())
    }

    fn not_started(&mut self, _: &mut Reactor, _: &RestartError) {
        self.world.failed.set(self.world.failed.get() + 1);
    }

    fn takes(&self, kind: &str) -> bool {
        kind == "return"
    }

    fn connection_moved(&mut self, reactor: &mut Reactor, moved: Moved) {
        self.world.moved.set(self.world.moved.get() + 1);
        let mut client = self.client();
        client.unread = moved.packed.unread;
        let socket = describe_socket(moved.fd.as_fd()).expect("a socket");
        // An error is that of a client which has gone; nobody goes unsatisfied.
        let _ = match socket.address {
            Some(Address::Inet(_)) => reactor
                .adopt(Tcp.with_unsent(moved.unsent), moved.fd, client)
                .map(|_| ()),
            _ => reactor
                .adopt(Unix.with_unsent(moved.unsent), moved.fd, client)
                .map(|_| ()),
        };
    }
}

/// Counts a connection as long as it is there, in whichever program.
struct Present(Rc<Cell<usize>>);

impl Drop for Present {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// Sends back bytes, with the descriptors that came with them.
struct Return {
    program: Soaked,
    present: Option<Present>,
    ticket: Option<MoveTicket>,
    /// For the transport, from the program before.
    unread: Vec<u8>,
    is_half_closed: bool,
}

impl Return {
    fn begin<T: StreamTransport>(&mut self, cx: &mut Context<'_, T>)
    where
        Self: Protocol<T>,
    {
        let open = &self.program.world.open;
        open.set(open.get() + 1);
        self.present = Some(Present(Rc::clone(open)));
        cx.transport.push_back(std::mem::take(&mut self.unread));
        if let Some(restart) = &*self.program.restart.borrow() {
            self.ticket = Some(restart.movable::<T, Self>(cx.transport.handle()));
        }
    }
}

impl Movable for Return {
    const KIND: &'static str = "return";

    fn pack(&mut self) -> Option<Packed> {
        (!self.is_half_closed).then(Packed::default)
    }

    fn unpack(&mut self, _: Packed) {}
}

impl Protocol<TcpStream> for Return {
    fn connection_made(&mut self, cx: &mut Context<'_, TcpStream>) {
        self.begin(cx);
    }

    fn data_received(&mut self, cx: &mut Context<'_, TcpStream>, data: &[u8]) {
        cx.transport.write(data);
    }

    fn read_connection_lost(&mut self, _: &mut Context<'_, TcpStream>) -> AfterReadClosed {
        self.is_half_closed = true;
        AfterReadClosed::LoseConnection
    }
}

impl Protocol<UnixStream> for Return {
    fn connection_made(&mut self, cx: &mut Context<'_, UnixStream>) {
        self.begin(cx);
    }

    fn data_received(&mut self, cx: &mut Context<'_, UnixStream>, data: &[u8]) {
        cx.transport.write(data);
    }

    fn descriptors_received(
        &mut self,
        cx: &mut Context<'_, UnixStream>,
        descriptors: &mut ReceivedDescriptors<'_>,
        data: &[u8],
    ) {
        let back = descriptors.map(PassedDescriptor::from).collect();
        // Refused where the connection is ending.
        let _ = cx.transport.write_with_descriptors(data, back);
    }

    fn read_connection_lost(&mut self, _: &mut Context<'_, UnixStream>) -> AfterReadClosed {
        self.is_half_closed = true;
        AfterReadClosed::LoseConnection
    }
}

/// The programs that there are: the last one serves, or is about to.
struct Programs {
    world: Rc<World>,
    running: Vec<(Reactor, SharedRestart)>,
    restarts: usize,
    panics: u64,
}

impl Programs {
    fn begin(folder: &Path) -> Self {
        let world = Rc::new(World {
            folder: folder.to_owned(),
            address: Cell::default(),
            open: Rc::default(),
            moved: Cell::default(),
            failed: Cell::default(),
        });
        Self {
            running: vec![Soaked::begin(&world)],
            world,
            restarts: 0,
            panics: 0,
        }
    }

    /// Has another one take over, if none is at it.
    fn restart(&mut self) {
        if self.running.len() == 1 {
            self.restarts += 1;
            self.running.push(Soaked::begin(&self.world));
        }
    }

    fn turn(&mut self, faults: Option<&Faults>) {
        let wait = match self.running.len() {
            1 => Duration::from_millis(10),
            _ => Duration::from_millis(1),
        };
        let panics = &mut self.panics;
        self.running.retain_mut(|(reactor, restart)| {
            let mut turn = || reactor.turn(Some(wait));
            let turned = match faults {
                Some(faults) => faults.during(turn),
                None => turn(),
            };
            let has_ended = turned == Turn::Stopped;
            if has_ended {
                // Or neither it nor its program would be freed.
                restart.take();
            }
            *panics += u64::from(has_ended) * reactor.statistics().panics;
            !has_ended
        });
    }

    /// Waits until one is left, which serves.
    fn settle(&mut self) {
        let began = Instant::now();
        while !self.is_settled() {
            self.turn(None);
            assert!(began.elapsed() < Duration::from_secs(60), "nobody serves");
        }
    }

    fn is_settled(&self) -> bool {
        let serves = |it: &SharedRestart| it.borrow().as_ref().is_some_and(Restart::is_serving);
        matches!(&*self.running, [(_, restart)] if serves(restart))
    }

    /// How many parts of programs there are in memory. Each has hold of what all share.
    fn held(&self) -> usize {
        Rc::strong_count(&self.world)
    }

    fn registered(&self) -> usize {
        self.running.iter().map(|(it, _)| it.registered()).sum()
    }
}

/// Memory that this process has in use, in bytes.
fn resident() -> usize {
    resident_as("VmRSS:")
}

/// What a line of proc_pid_status(5) says of this process's memory, in bytes:
/// `VmRSS:` is the sum of `RssAnon:`, `RssFile:` and `RssShmem:`.
fn resident_as(line: &str) -> usize {
    let status = fs::read_to_string("/proc/self/status").expect("Linux has it");
    let line = status.lines().find_map(|it| it.strip_prefix(line));
    let kib = line.and_then(|line| line.split_whitespace().next());
    kib.and_then(|kib| kib.parse::<usize>().ok())
        .expect("a number")
        * 1024
}

/// What this process has used of a processor.
fn processor_time() -> Duration {
    let stat = fs::read_to_string("/proc/self/stat").expect("Linux has it");
    // Behind the name, which may have spaces in it; in hundredths of a second.
    let (_, fields) = stat.rsplit_once(')').expect("a name");
    let ticks = fields.split_whitespace().skip(11).take(2);
    let ticks = ticks.map(|field| field.parse::<u64>().expect("a number"));
    Duration::from_millis(ticks.sum::<u64>() * 10)
}

/// How long the soak is: as many seconds as [`SOAK`] says, or as the form of the
/// run.
fn soak_length() -> Duration {
    let asked = std::env::var(SOAK).ok();
    let asked = asked.map(|seconds| seconds.parse().expect("a number of seconds"));
    Duration::from_secs(asked.unwrap_or_else(|| scaled(10, 1_200)))
}

/// What says how many seconds the soak lasts: eight hours are 28800.
const SOAK: &str = "BOWLINE_SOAK";

/// What the mean number of open descriptors that are no client's may differ by: those
/// that wait to be sent back, of the clients that there are by chance. A leak for every
/// hundredth of some thousand clients is more.
const MORE_OPEN: f64 = 10.0;

/// What the memory of a soak may grow by from a quarter of it to its end, in bytes, on
/// whatever machine, and as much again for each hour: one buffer lost for every fifth
/// client is 3 MiB in ten seconds.
const MORE_MEMORY: f64 = 2.0 * 1048576.0;

/// How often memory is looked at. At any one moment there is 0.5 MiB more or less, by
/// the clients that there are by chance, so that only many samples show a slope of 1 MiB
/// an hour in less than one.
const SAMPLE_EVERY: Duration = Duration::from_millis(100);

/// A line through samples, by least squares. Samples are not kept, since what keeps them
/// would grow with the memory that they are samples of.
#[derive(Default)]
struct Trend {
    count: f64,
    /// Of the samples so far: the means of time and value.
    at: f64,
    value: f64,
    /// Sums of squares and products, as differences from the means.
    at_at: f64,
    at_value: f64,
    value_value: f64,
}

impl Trend {
    fn add(&mut self, at: Duration, value: f64) {
        self.count += 1.0;
        let (at_off, value_off) = (at.as_secs_f64() - self.at, value - self.value);
        self.at += at_off / self.count;
        self.value += value_off / self.count;
        // One difference from the mean before, one from the mean after: so sums of
        // differences are kept up to date without any sample.
        let (at_left, value_left) = (at.as_secs_f64() - self.at, value - self.value);
        self.at_at += at_off * at_left;
        self.at_value += at_off * value_left;
        self.value_value += value_off * value_left;
    }

    /// The slope for each second, and its standard error, as if all samples were
    /// independent.
    fn slope(&self) -> (f64, f64) {
        let slope = self.at_value / self.at_at;
        let rest = self.value_value - slope * self.at_value;
        (slope, (rest / (self.count - 2.0) / self.at_at).sqrt())
    }
}

/// A line of a known slope, with values that alternate around it.
#[test]
fn slope_is_that_of_the_line_and_known_as_well_as_the_samples_are() {
    let mut trend = Trend::default();
    for second in 0..1_000_u32 {
        let off = if second % 2 == 0 { 10.0 } else { -10.0 };
        trend.add(
            Duration::from_secs(300 + u64::from(second)),
            5e6 + 3.0 * f64::from(second) + off,
        );
    }
    let (slope, error) = trend.slope();
    assert!((slope - 3.0).abs() < 1e-3, "{slope}");
    // 10 for each sample, over the root of the sum of squares of time.
    let expected = 10.0 / (1_000_f64.powi(3) / 12.0).sqrt();
    assert!(
        (error / expected - 1.0).abs() < 0.01,
        "{error}, not {expected}"
    );
}

/// What is to happen in a soak, however short.
const LEAST_RESTARTS: usize = 5;
const LEAST_MOVED: usize = 20;
const LEAST_FAULTS: usize = 100;

/// How long a busy machine may take for what is left to be done.
const PATIENCE: Duration = Duration::from_secs(120);

/// Reliability T-36: clients come and go, echo, pass descriptors and leave
/// badly, while calls fail by chance; memory and descriptors stay what they are,
/// and no byte is wrong. Every minute, in the short form more often, another program
/// takes over, in the same process, with the connections that there are.
#[test]
fn long_mixed_load_with_faults_leaks_nothing() {
    with_faults(
        module_path!(),
        "long_mixed_load_with_faults_leaks_nothing",
        |faults| {
            let folder = tempfile::tempdir().unwrap();
            let mut programs = Programs::begin(folder.path());
            programs.settle();
            // One that has taken over may have more than a first one.
            programs.restart();
            programs.settle();
            let world = Rc::clone(&programs.world);
            let address = world.address.get().expect("it is TCP");
            let path = world.path();
            let length = soak_length();
            // What the loop has for itself, its alarm among it: the rest are clients'.
            let reactor = &mut programs.running[0].0;
            reactor.call_later(Duration::from_millis(1), |_| {});
            let timers = reactor.statistics().timers;
            while programs.running[0].0.statistics().timers == timers {
                programs.turn(None);
            }
            let (own, own_registered) = (open_descriptors().len(), programs.registered());
            let own_held = programs.held();
            let every = (length / 6).min(Duration::from_secs(60));
            let mut next = every;
            let warm = length / 4;
            let mut random = Random::new(36);
            let mut peers: Vec<Peer> = Vec::new();
            let started = Instant::now();
            let (mut clients, mut satisfied) = (0, 0);
            let (mut memory, mut next_sample) = (Trend::default(), warm);
            // A part of it: should it grow, this says where to look.
            let mut file = Trend::default();
            // Of each quarter of the time: samples, and descriptors open in all.
            let mut quarters = [(0_usize, 0_usize); 4];
            let mut turns = 0_u64;
            // On a slow machine longer: there is to be something of everything.
            let has_seen_enough = |programs: &Programs| {
                let faults = faults.fired() as usize;
                programs.restarts >= LEAST_RESTARTS
                    && programs.world.moved.get() >= LEAST_MOVED
                    && faults >= LEAST_FAULTS
            };
            while started.elapsed() < length || !has_seen_enough(&programs) {
                assert!(
                    started.elapsed() < length + PATIENCE,
                    "it makes no progress"
                );
                while peers.len() < 40 {
                    clients += 1;
                    peers.push(client(&mut random, address, &path));
                }
                faults.storm(random.below(30) as u32, random.any() as u32);
                programs.turn(Some(faults));
                satisfied += step(&mut peers);
                if started.elapsed() > next {
                    programs.restart();
                    next += every;
                }
                turns += 1;
                // While a program takes over, both have some.
                if turns.is_multiple_of(16) && programs.is_settled() {
                    let quarter = started.elapsed().as_secs_f64() / length.as_secs_f64() * 4.0;
                    let (samples, sum) = &mut quarters[(quarter as usize).min(3)];
                    *samples += 1;
                    let of_clients: usize = peers.iter().map(Peer::open).sum();
                    let known = own + of_clients + world.open.get();
                    *sum += open_descriptors().len().saturating_sub(known);
                }
                if started.elapsed() > next_sample && programs.is_settled() {
                    memory.add(started.elapsed(), resident() as f64);
                    file.add(started.elapsed(), resident_as("RssFile:") as f64);
                    next_sample = started.elapsed() + SAMPLE_EVERY;
                }
            }
            let (slope, error) = memory.slope();
            let grown = slope * (started.elapsed() - warm).as_secs_f64();
            // What is open beside theirs does not grow either.
            let mean = |(samples, sum): (usize, usize)| sum as f64 / samples.max(1) as f64;
            let more_open = mean(quarters[3]) - mean(quarters[1]);
            // Those that are there get what they asked for too, in calmer weather.
            let ended = Instant::now();
            while (world.open.get() > 0 || !peers.is_empty()) && ended.elapsed() < PATIENCE {
                programs.turn(None);
                satisfied += step(&mut peers);
            }
            programs.settle();
            assert_eq!(peers.len(), 0, "clients that got no answer and no end");
            assert_eq!(world.open.get(), 0, "connections that nobody is at");
            let descriptors = open_descriptors().len().saturating_sub(own);
            assert_eq!(programs.registered(), own_registered);
            assert_eq!(programs.held(), own_held, "parts of programs that are over");
            let panics = programs.panics + programs.running[0].0.statistics().panics;
            assert_eq!((panics, world.failed.get()), (0, 0));
            let figures = Figures::of("T-36")
                .must("seconds", length.as_secs() as usize, Bound::AtLeast, 10)
                .must("clients", clients, Bound::AtLeast, 100)
                .must(
                    "of them with all they asked for",
                    satisfied,
                    Bound::Exactly,
                    clients,
                )
                .must(
                    "faults",
                    faults.fired() as usize,
                    Bound::AtLeast,
                    LEAST_FAULTS,
                )
                .must(
                    "restarts",
                    programs.restarts,
                    Bound::AtLeast,
                    LEAST_RESTARTS,
                )
                .must(
                    "connections that moved",
                    world.moved.get(),
                    Bound::AtLeast,
                    LEAST_MOVED,
                )
                .must(
                    "descriptors left that were not there at the start",
                    descriptors,
                    Bound::Exactly,
                    0,
                )
                .measured(
                    "descriptors that are no client's in the last quarter, more than in the second",
                    more_open,
                    "",
                    Bound::Below,
                    MORE_OPEN,
                )
                .measured(
                    "memory grown since the first quarter",
                    grown / 1048576.0,
                    "MiB",
                    Bound::Below,
                    1.0,
                );
            assert!(more_open < MORE_OPEN, "{more_open} more are open");
            let allowed = MORE_MEMORY * (1.0 + length.as_secs_f64() / 3600.0);
            assert!(grown < allowed, "{grown} more bytes are in use");
            if is_full() {
                let per_hour = |slope: f64| slope * 3600.0 / 1048576.0;
                let grows = per_hour(slope);
                figures
                    .measured("memory grown per hour", grows, "MiB", Bound::Below, 1.0)
                    .remark(&format!(
                        "by a line through {} samples of memory, whose slope is known to {:.2} MiB an hour; \
                         of it pages of the program's file {:.2}",
                        memory.count,
                        per_hour(error),
                        per_hour(file.slope().0)
                    ));
            }
        },
    );
}

/// Has all peers do what they can, and forgets those that are done: how many of these
/// have all that they asked for.
fn step(peers: &mut Vec<Peer>) -> usize {
    let mut satisfied = 0;
    peers.iter_mut().for_each(Peer::step);
    peers.retain(|peer| {
        assert!(peer.is_unharmed(), "other bytes came back");
        if peer.is_done() {
            assert!(peer.is_satisfied(), "cut short: {:?}", peer.end);
            satisfied += 1;
        }
        !peer.is_done()
    });
    satisfied
}

fn client(random: &mut Random, address: SocketAddr, path: &Path) -> Peer {
    let file = || OwnedFd::from(fs::File::open("/dev/null").expect("there"));
    let peer = match random.below(4) {
        0 => Peer::tcp(address).echoes(random.below(2_000)),
        1 => Peer::tcp(address).echoes(random.below(150_000)),
        2 => Peer::unix(path).echoes(random.below(50_000)),
        _ => Peer::unix(path).passes((0..random.below(5)).map(|_| vec![file(), file()]).collect()),
    };
    // Some leave with bytes unread.
    match random.below(4) {
        0 => peer.then(Farewell::Close),
        _ => peer,
    }
}

/// Set in the processes that hold the other ends: how many of each kind, and
/// where.
const HOLD: &str = "BOWLINE_TEST_HOLD";

/// The other ends; it says when they are there, then uses one in a hundred each
/// time it is told a line, and ends with its input.
#[test]
fn holds_the_other_ends() {
    let Ok(what) = std::env::var(HOLD) else {
        return;
    };
    raise_limit();
    let mut words = what.split(' ');
    let mut next = || words.next().expect("four words");
    let (tcp, unix): (usize, usize) = (next().parse().unwrap(), next().parse().unwrap());
    let address: SocketAddr = next().parse().unwrap();
    let path = next().to_owned();
    let mut streams: Vec<Box<dyn Both>> = Vec::new();
    for _ in 0..tcp {
        streams.push(Box::new(StdTcp::connect(address).expect("it listens")));
    }
    for _ in 0..unix {
        streams.push(Box::new(StdUnix::connect(&path).expect("it listens")));
    }
    let mut at = 0;
    let say = |word: &str| {
        let mut out = io::stdout();
        writeln!(out, "\n{word}")
            .and_then(|()| out.flush())
            .expect("a pipe");
    };
    say("there");
    for _ in io::stdin().lines() {
        for _ in 0..streams.len() / 100 {
            at = (at + 101) % streams.len();
            let stream = &mut streams[at];
            stream.write_all(b"alive?").expect("alive");
            let mut answer = [0; 6];
            stream.read_exact(&mut answer).expect("alive");
            assert_eq!(&answer, b"alive?");
        }
        say("used");
    }
}

trait Both: Read + Write {}
impl<S: Read + Write> Both for S {}

fn raise_limit() {
    let hard = getrlimit(Resource::Nofile).maximum;
    let limits = Rlimit {
        current: hard,
        maximum: hard,
    };
    setrlimit(Resource::Nofile, limits).expect("up to the hard limit");
}

/// Reliability T-39: thousands of connections in one process, of which one in a
/// hundred has something to say.
#[test]
fn thousands_of_connections_are_held_at_little_cost() {
    in_own_process(
        module_path!(),
        "thousands_of_connections_are_held_at_little_cost",
        || {
            raise_limit();
            let (tcp, unix) = scaled((1_500, 400), (15_000, 4_000));
            let length = scaled(Duration::from_secs(3), Duration::from_secs(600));
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("socket");
            let mut reactor = Reactor::new().unwrap();
            let open = Rc::new(Cell::new(0));
            let of = Rc::clone(&open);
            let listener = reactor
                .listen_tcp(([127, 0, 0, 1], 0).into(), move |_: &Address| {
                    Echo(Rc::clone(&of))
                })
                .unwrap();
            let Address::Inet(address) = reactor.get(listener).unwrap().address() else {
                panic!("it is TCP");
            };
            let of = Rc::clone(&open);
            reactor
                .listen_unix(&*path, move |_: &Address| Echo(Rc::clone(&of)))
                .unwrap();
            reactor.turn(Some(Duration::ZERO));
            let before = resident();
            let mut holder = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "load::holds_the_other_ends", "--nocapture"])
                .env(HOLD, format!("{tcp} {unix} {address} {}", path.display()))
                .stdin(std::process::Stdio::piped())
                .stdout(std::process::Stdio::piped())
                .spawn()
                .unwrap();
            let mut input = holder.stdin.take().unwrap();
            let mut output = holder.stdout.take().unwrap();
            rustix::fs::fcntl_setfl(output.as_fd(), rustix::fs::OFlags::NONBLOCK).unwrap();
            let mut said = String::new();
            let mut hear = move |words: usize, word: &str| {
                let mut bytes = [0; 4096];
                if let Ok(count) = output.read(&mut bytes) {
                    said.push_str(&String::from_utf8_lossy(&bytes[..count]));
                }
                said.matches(word).count() >= words
            };
            let began = Instant::now();
            while open.get() < tcp + unix || !hear(1, "there") {
                reactor.turn(Some(Duration::from_millis(20)));
                assert!(
                    began.elapsed() < Duration::from_secs(120),
                    "{} are open",
                    open.get()
                );
            }
            let held = open.get();
            let each = (resident() - before) as f64 / held as f64;
            // One in a hundred every second; what else is idle.
            let (cpu, started) = (processor_time(), Instant::now());
            let mut rounds = 0;
            while started.elapsed() < length {
                rounds += 1;
                input.write_all(b"go\n").unwrap();
                let next = started + Duration::from_secs(rounds);
                let mut is_heard = false;
                while !is_heard || Instant::now() < next {
                    let left = next.saturating_duration_since(Instant::now());
                    reactor.turn(Some(
                        left.clamp(Duration::from_millis(1), Duration::from_millis(100)),
                    ));
                    is_heard = is_heard || hear(rounds as usize, "used");
                    let elapsed = started.elapsed();
                    assert!(elapsed < length + Duration::from_secs(60), "no answer");
                }
            }
            let busy = (processor_time() - cpu).as_secs_f64() / started.elapsed().as_secs_f64();
            assert_eq!(open.get(), held, "all are alive");
            drop(input);
            let told = Instant::now();
            while holder.try_wait().unwrap().is_none() {
                reactor.turn(Some(Duration::from_millis(10)));
                assert!(told.elapsed() < PATIENCE, "the other ends do not end");
            }
            let each = each.max(0.0) / 1024.0;
            Figures::of("T-39")
                .must("connections held", held, Bound::Exactly, tcp + unix)
                .measured("memory each", each, "KiB", Bound::Below, 8.0)
                .measured(
                    "processor in use at 1 % activity",
                    busy * 100.0,
                    "%",
                    Bound::Below,
                    5.0,
                );
            assert!(each < 8.0, "{each} KiB for each connection");
            // A loop that spins has all of a processor, or half of one that is shared.
            assert!(busy < 0.25, "{} % of a processor", busy * 100.0);
        },
    );
}

/// A program that has handed over is freed in a process that goes on.
#[test]
fn programs_that_have_handed_over_are_freed() {
    let folder = tempfile::tempdir().unwrap();
    let mut programs = Programs::begin(folder.path());
    programs.settle();
    let of_one = programs.held();
    for _ in 0..3 {
        programs.restart();
        programs.settle();
    }
    assert_eq!(programs.held(), of_one, "parts of programs");
}
