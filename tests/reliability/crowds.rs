//! Many peers at once, some of which mean harm.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::net::TcpStream as StdTcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline::framing::{FrameContext, FrameReceiver, Framed, LengthPrefixedFramer, Pairing};
use bowline::handoff::pool::{
    Live, PassedConnection, Pool, PoolSettings, Spawned, Worker, WorkerSettings,
};
use bowline::policies::{Handshake, LimitHandshakes};
use bowline::process::{ChildCommand, ChildProcess, CollectOutput, ProcessOutput};
use bowline::testing::ManualClock;
use bowline::time::Clock;
use bowline::{
    Address, BuildContext, CloseReason, Context, DescriptorLimits, Protocol, Reactor,
    ReceivedDescriptors, Tcp, TcpStream, Transport, Transports, Unix, UnixStream, UnixTransport,
};
use tempfile::TempDir;

use crate::capture;
use crate::children::Peer;
use crate::peer::{adopt, file, receive, send};
use crate::support::figures::{Bound, Figures, scaled};
use crate::support::own_process::{
    in_own_process, limit_descriptors, limit_in_flight, resident_bytes,
};
use crate::support::{
    Event, Moved, open_descriptors, run_until, run_until_quiet, run_until_within, settle,
    socketpair,
};

/// How long the flood and what follows may take.
const LONG: Duration = Duration::from_secs(60);

fn paths<const N: usize>() -> (TempDir, [PathBuf; N]) {
    let directory = tempfile::tempdir().unwrap();
    let paths = std::array::from_fn(|number| directory.path().join(number.to_string()));
    (directory, paths)
}

/// Sends back what it gets.
struct Echo;

impl<T: Transport> Protocol<T> for Echo {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.write(data);
    }
}

/// Keeps every descriptor it is sent, for as long as it lives.
#[derive(Default)]
struct Hoarder(Vec<OwnedFd>);

impl Protocol<UnixStream> for Hoarder {
    fn connection_made(&mut self, cx: &mut Context<'_, UnixStream>) {
        cx.transport.set_descriptor_limits(
            DescriptorLimits::default()
                .received_per_read(64)
                .received_in_all(64),
        );
    }

    fn data_received(&mut self, _: &mut Context<'_, UnixStream>, _: &[u8]) {}

    fn descriptors_received(
        &mut self,
        _: &mut Context<'_, UnixStream>,
        descriptors: &mut ReceivedDescriptors<'_>,
        _: &[u8],
    ) {
        self.0.extend(descriptors);
    }
}

/// Turns until `is_done`, which is asked after every turn.
#[track_caller]
fn turn_until(reactor: &mut Reactor, is_done: impl FnMut(&mut Reactor) -> bool) {
    run_until_within(LONG, reactor, &"", is_done);
}

/// Reliability T-9, R-4, R-11: four attackers flood protocols that keep what they
/// get and protocols that want none, beside an honest client.
#[test]
fn floods_of_descriptors_are_cut_and_others_served() {
    let name = "floods_of_descriptors_are_cut_and_others_served";
    in_own_process(module_path!(), name, || {
        let seconds = scaled(1.5, 20.0);
        let (_directory, [wanting, unwanting, honest]) = paths();
        let mut reactor = Reactor::new().unwrap();
        let hoarder = |_: &Address| Hoarder::default();
        reactor.listen_unix(wanting.clone(), hoarder).unwrap();
        reactor
            .listen_unix(unwanting.clone(), |_: &Address| Echo)
            .unwrap();
        reactor
            .listen_unix(honest.clone(), |_: &Address| Echo)
            .unwrap();
        let words = seconds.to_string();
        let attackers: Vec<_> = [&wanting, &unwanting, &wanting, &unwanting]
            .map(|path| Peer::start("flood", &[path.to_str().unwrap(), &words]).numbers_later())
            .into();
        // The pipes to them, and what the loop has, are not what they cause; nor is what
        // the loop makes when it runs: an alarm, a thread that closes.
        let own = open_descriptors().len() + 2;
        turn_until(&mut reactor, |it| it.descriptor_counts().received > 10_000);
        let before = resident_bytes();
        let pings = scaled(300, 5_000);
        let client = Peer::start("echo", &[honest.to_str().unwrap(), &pings.to_string()]);
        let client = client.numbers_later();
        // Each attacker one connection with 64, and a next one that is not looked at while
        // that is being closed; the client one, and the pipes to it.
        let budget = own + 4 * (1 + 64) + 4 + 3;
        let mut most = 0;
        turn_until(&mut reactor, |_| {
            most = most.max(open_descriptors().len());
            client.is_finished() && attackers.iter().all(|it| it.is_finished())
        });
        let grown = resident_bytes().saturating_sub(before) as f64 / 1_048_576.0;
        let (_client, answers) = client.join().unwrap();
        let said: Vec<_> = attackers
            .into_iter()
            .map(|it| it.join().unwrap().1)
            .collect();
        let cut: f64 = said.iter().map(|it| it[0]).sum();
        let slowest = said.iter().map(|it| it[1]).fold(0.0, f64::max);
        let counts = reactor.descriptor_counts();
        Figures::of("T-9")
            .must("attackers cut", cut as usize, Bound::AtLeast, 4)
            .must(
                "descriptors received",
                counts.received as usize,
                Bound::AtLeast,
                10_000,
            )
            .must(
                "open at most, of a budget of 64 a connection",
                most,
                Bound::AtMost,
                budget,
            )
            .must(
                "of the budget for attackers",
                budget - own,
                Bound::Exactly,
                267,
            )
            .must(
                "honest pings answered",
                answers[1] as usize,
                Bound::Exactly,
                pings,
            )
            .measured("growth of memory", grown, "MiB", Bound::Below, 10.0)
            .measured(
                "honest connect and ping, p99",
                answers[0],
                "ms",
                Bound::Below,
                50.0,
            )
            .measured("cut after at most", slowest, "ms", Bound::Below, 1_000.0);
    });
}

/// Takes frames and drops what comes with them.
struct Dropping;

impl FrameReceiver<UnixStream, LengthPrefixedFramer> for Dropping {
    fn frame_received(
        &mut self,
        _: &mut FrameContext<'_, UnixStream, LengthPrefixedFramer>,
        _: &[u8],
    ) {
    }
}

/// Reliability T-10, R-4: a process with 1,024 numbers whose peers park more
/// descriptors than that. Time is the test's: who waits does so until it moves, however
/// fast either side is.
#[test]
fn parked_descriptors_leave_the_reserve_and_accepting_resumes() {
    let name = "parked_descriptors_leave_the_reserve_and_accepting_resumes";
    in_own_process(module_path!(), name, || {
        const LIMIT: usize = 1_024;
        const CLIENTS: usize = 400;
        // Half of them there before any sends, half in the queue when there is no room.
        const PARKING: usize = 200;
        const EACH: usize = 64;
        limit_descriptors(LIMIT as u64);
        let (_directory, [parking, honest]) = paths();
        let clock = ManualClock::new();
        let mut reactor = Reactor::with_clock(Moved(clock.clone())).unwrap();
        let deadline = Duration::from_secs(2);
        let let_in = Rc::new(Cell::new(0));
        let of_parking = Rc::clone(&let_in);
        reactor
            .listen_unix(parking.clone(), move |_: &Address| {
                of_parking.set(of_parking.get() + 1);
                Framed::new(LengthPrefixedFramer::u32(), Dropping)
                    .pairing(Pairing::Exact)
                    .max_descriptors(EACH)
                    .descriptor_deadline(Some(deadline))
            })
            .unwrap();
        let greeted = Rc::new(Cell::new(0));
        let of_greeter = Rc::clone(&greeted);
        reactor
            .listen_unix(honest.clone(), move |_: &Address| {
                Greeter(Rc::clone(&of_greeter))
            })
            .unwrap();
        capture::start();
        let pauses = |path: &Path| {
            let lines = capture::lines("descriptors is left, accepting later");
            let of_path = |line: &&String| line.contains(path.to_str().unwrap());
            lines.iter().filter(of_path).count()
        };
        // The program can still open its files.
        let mut used = BTreeSet::new();
        let mut look = || {
            let reserve = LIMIT - 16..LIMIT;
            used.extend(
                reserve.filter(|fd| Path::new(&format!("/proc/thread-self/fd/{fd}")).is_symlink()),
            );
        };
        let words = [parking.to_str().unwrap(), &(PARKING / 2).to_string()];
        let mut park = Peer::start("park", &[words[0], words[1], &EACH.to_string()]);
        assert_eq!(park.numbers(), [(PARKING / 2) as f64]);
        turn_until(&mut reactor, |_| let_in.get() == PARKING / 2);
        park.tell();
        turn_until(&mut reactor, |reactor| {
            look();
            let counts = reactor.descriptor_counts();
            counts.received as usize == PARKING / 2 * EACH || counts.truncations > 0
        });
        let counts = reactor.descriptor_counts();
        assert_eq!(counts.truncations, 0, "the kernel found no number for some");
        let refused = counts.refused as usize;
        // More at a time than there are numbers left: they wait until descriptors are
        // closed, which is at the deadline of those that sent them.
        let mut client = Peer::start("greet", &[honest.to_str().unwrap(), &CLIENTS.to_string()]);
        turn_until(&mut reactor, |_| {
            look();
            pauses(&honest) > 0
        });
        assert_eq!(client.numbers(), [CLIENTS as f64]);
        clock.advance(deadline - Duration::from_millis(100));
        run_until_quiet(&mut reactor);
        look();
        let before_the_deadline = greeted.get();
        // Those who send descriptors wait as well, and get in when there is room.
        park.tell();
        turn_until(&mut reactor, |_| {
            look();
            pauses(&parking) > 0
        });
        let (client, park) = (client.numbers_later(), park.numbers_later());
        turn_until(&mut reactor, |reactor| {
            look();
            clock.advance(Duration::from_millis(20));
            let counts = reactor.descriptor_counts();
            let are_here = counts.received as usize == PARKING * EACH || counts.truncations > 0;
            client.is_finished() && park.is_finished() && are_here
        });
        let (_client, answers) = client.join().unwrap();
        let (_park, _) = park.join().unwrap();
        let counts = reactor.descriptor_counts();
        Figures::of("T-10")
            .must(
                "descriptors received",
                counts.received as usize,
                Bound::Exactly,
                PARKING * EACH,
            )
            .must("numbers of the reserve used", used.len(), Bound::Exactly, 0)
            .must(
                "clients that were served, of 400",
                answers[0] as usize,
                Bound::Exactly,
                CLIENTS,
            )
            .must(
                "of them after they had waited for the deadline of others",
                CLIENTS - before_the_deadline,
                Bound::AtLeast,
                CLIENTS - PARKING / 2,
            )
            .must(
                "pauses of accepting",
                pauses(&honest) + pauses(&parking),
                Bound::AtLeast,
                2,
            )
            .must(
                "of 6,400 refused for the reserve",
                refused,
                Bound::AtLeast,
                PARKING / 2 * EACH - LIMIT,
            )
            .must(
                "cut off by the kernel",
                counts.truncations as usize,
                Bound::Exactly,
                0,
            )
            .must(
                "panics",
                reactor.statistics().panics as usize,
                Bound::Exactly,
                0,
            );
    });
}

/// Reliability T-10: connections alone, as many as there can be. Who was there before and
/// sends descriptors goes on to, and so does the program.
#[test]
fn crowd_of_connections_leaves_descriptors_to_those_that_were_there() {
    let name = "crowd_of_connections_leaves_descriptors_to_those_that_were_there";
    in_own_process(module_path!(), name, || {
        limit_descriptors(1_024);
        let (_directory, [crowded]) = paths();
        let mut reactor = Reactor::new().unwrap();
        reactor
            .listen_unix(crowded.clone(), |_: &Address| Echo)
            .unwrap();
        let record = crate::support::Record::default();
        let (ours, honest) = socketpair();
        let recorder = crate::support::Recorder::new(&record);
        reactor.adopt_unix_stream(ours.into(), recorder).unwrap();
        let passed = file();
        let mut sent = 0;
        let mut send_some = |reactor: &mut Reactor, count: usize| {
            send(&honest, b"x", &vec![passed.as_fd(); count]).expect("room");
            sent += count;
            turn_until(reactor, |_| {
                let received = record.count(|event| matches!(event, Event::Descriptor));
                received == sent || record.is_lost()
            });
            assert!(!record.is_lost(), "{:?}", record.summary());
        };
        send_some(&mut reactor, 1);
        let _crowd = Peer::start("stall", &[crowded.to_str().unwrap(), "1000"]);
        turn_until(&mut reactor, |it| it.descriptor_counts().open() > 600);
        // All that are let in.
        let mut open = 0;
        while open < reactor.descriptor_counts().open() {
            open = reactor.descriptor_counts().open();
            let began = Instant::now();
            while began.elapsed() < Duration::from_millis(300) {
                reactor.turn(Some(Duration::from_millis(10)));
            }
        }
        for _ in 0..5 {
            send_some(&mut reactor, 10);
        }
        Figures::of("T-10").must(
            "descriptors received beside a crowd of connections",
            sent,
            Bound::Exactly,
            51,
        );
    });
}

/// Reliability T-12, R-1: somebody of the same user keeps the budget of
/// descriptors in flight full for half a minute, while a dispatcher passes accepted
/// connections on. The kernel counts by user, so that who it is does not matter: it is
/// this process. Time is the test's.
#[test]
fn full_budget_in_flight_delays_connections_and_loses_none() {
    let name = "full_budget_in_flight_delays_connections_and_loses_none";
    in_own_process(module_path!(), name, || {
        const CLIENTS: usize = 20;
        let (_directory, [path]) = paths();
        let clock = ManualClock::new();
        let mut reactor = Reactor::with_clock(clock.clone()).unwrap();
        let (to_worker, worker) = adopt(&mut reactor, Echo);
        let acceptor = move |cx: &mut BuildContext<'_>, socket: OwnedFd, _: &Address| {
            let it = cx.reactor.get(to_worker).expect("it is there");
            it.send_file_descriptor(socket.into()).expect("queued");
            it.write(b"c");
        };
        reactor.accept(Unix::at(path.clone()), acceptor).unwrap();
        let hog = Hog::start(65_532, 64);
        let mut clients = Vec::new();
        for _ in 0..CLIENTS {
            clients.push(StdUnixStream::connect(&path).unwrap());
            clients.last_mut().unwrap().write_all(b"hello").unwrap();
        }
        pass(&mut reactor, &clock, Duration::from_secs(30));
        let it = reactor.get(to_worker).expect("it is there");
        let waiting = it.unsent_descriptors();
        let hogged = hog.end();
        let mut served = 0;
        // Waits that went on doubling would be of many seconds by then.
        let recovered = time_until(&mut reactor, &clock, |_| {
            while let Some(message) = receive(&worker, 65_536) {
                for socket in message.descriptors {
                    let mut socket = StdUnixStream::from(socket);
                    let mut word = [0; 5];
                    socket.read_exact(&mut word).unwrap();
                    socket.write_all(&word).unwrap();
                    served += 1;
                }
            }
            served == CLIENTS
        });
        let answered = clients
            .iter_mut()
            .map(|client| client.read(&mut [0; 5]))
            .filter(|read| matches!(read, Ok(5)))
            .count();
        Figures::of("T-12")
            .must("in flight by the hog", hogged, Bound::AtLeast, 60)
            .must(
                "connections that waited",
                waiting,
                Bound::AtLeast,
                CLIENTS - 4,
            )
            .must("connections lost", CLIENTS - answered, Bound::Exactly, 0)
            .must(
                "recovered after, in milliseconds of the loop's time",
                recovered.as_millis() as usize,
                Bound::Below,
                100,
            );
    });
}

/// A worker of a pool that is none: it is in this process, and lives as long as nobody
/// kills it.
struct NoProcess {
    kills: Rc<Cell<usize>>,
}

impl ChildProcess for NoProcess {
    fn pid(&self) -> u32 {
        u32::MAX
    }

    fn kill(&mut self) -> io::Result<()> {
        self.kills.set(self.kills.get() + 1);
        Ok(())
    }

    fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        Ok(None)
    }
}

/// Reliability T-12: nor does it cost the workers of a pool anything that they have not
/// been given what somebody else keeps from leaving: none counts as hung, or is killed with
/// what it serves.
#[test]
fn full_budget_in_flight_is_not_held_against_workers() {
    let name = "full_budget_in_flight_is_not_held_against_workers";
    in_own_process(module_path!(), name, || {
        const BEFORE: usize = 10;
        const CLIENTS: usize = 60;
        let clock = ManualClock::new();
        let mut reactor = Reactor::with_clock(clock.clone()).unwrap();
        let kills = Rc::new(Cell::new(0));
        let of_processes = Rc::clone(&kills);
        let settings = PoolSettings::default().workers(2);
        let pool = Pool::start(&mut reactor, settings, move |reactor: &mut Reactor, _| {
            let (ours, theirs) = socketpair();
            let serve = |reactor: &mut Reactor, connection: PassedConnection, live: Live| {
                let served = connection.adopt(reactor, Tcp, Served { _live: live });
                served.expect("connected");
            };
            Worker::start(reactor, theirs, WorkerSettings::default(), serve)?;
            let kills = Rc::clone(&of_processes);
            Ok(Spawned {
                channel: ours,
                process: Box::new(NoProcess { kills }),
            })
        });
        let any = ([127, 0, 0, 1], 0).into();
        let listener = reactor.accept(Tcp::at(any), pool.acceptor(0)).unwrap();
        let address = reactor.get(listener).unwrap().address();
        let address = address.as_inet().expect("over TCP");
        let mut clients = Vec::new();
        let connect = |clients: &mut Vec<StdTcpStream>, count| {
            for _ in 0..count {
                let mut client = StdTcpStream::connect(address).unwrap();
                client.write_all(b"hello").unwrap();
                client.set_nonblocking(true).unwrap();
                clients.push(client);
            }
        };
        let answered = |clients: &mut Vec<StdTcpStream>| {
            let answers = clients.iter_mut().map(|client| client.read(&mut [0; 5]));
            answers.filter(|read| matches!(read, Ok(5))).count()
        };
        connect(&mut clients, BEFORE);
        let mut served = 0;
        turn_until(&mut reactor, |_| {
            served += answered(&mut clients);
            served == BEFORE
        });
        let hog = Hog::start(65_531, 300);
        connect(&mut clients, CLIENTS);
        turn_until(&mut reactor, |_| pool.statistics().in_flight == CLIENTS);
        pass(&mut reactor, &clock, Duration::from_secs(30));
        let waiting = pool.statistics().in_flight;
        let hangs = pool.statistics().hangs as usize;
        hog.end();
        served = 0;
        let recovered = time_until(&mut reactor, &clock, |_| {
            served += answered(&mut clients);
            served == CLIENTS
        });
        // Those that were there before go on.
        for client in &mut clients {
            client.write_all(b"still").unwrap();
        }
        served = 0;
        turn_until(&mut reactor, |_| {
            served += answered(&mut clients);
            served == BEFORE + CLIENTS
        });
        let undelivered = pool.statistics().undelivered as usize;
        Figures::of("T-12")
            .must(
                "connections of a pool that waited",
                waiting,
                Bound::AtLeast,
                CLIENTS - 4,
            )
            .must("workers that counted as hung", hangs, Bound::Exactly, 0)
            .must("workers killed", kills.get(), Bound::Exactly, 0)
            .must("of a pool, lost", undelivered, Bound::Exactly, 0)
            .must(
                "a pool recovered after, in milliseconds of the loop's time",
                recovered.as_millis() as usize,
                Bound::Below,
                100,
            );
    });
}

/// Echoes, as long as its worker lives.
struct Served {
    _live: Live,
}

impl Protocol<TcpStream> for Served {
    fn data_received(&mut self, cx: &mut Context<'_, TcpStream>, data: &[u8]) {
        cx.transport.write(data);
    }
}

/// Keeps as many descriptors in flight as one user may have, for all of the user's
/// processes.
struct Hog {
    pair: (StdUnixStream, StdUnixStream),
    in_flight: usize,
}

impl Hog {
    /// As one of `user`, who is nobody else and may have so many.
    fn start(user: u32, limit: u64) -> Self {
        let (passed, pair) = (file(), socketpair());
        limit_in_flight(user, limit);
        let mut in_flight = 0;
        while send(&pair.0, b"x", &[passed.as_fd(); 4]).is_ok() {
            in_flight += 4;
        }
        Self { pair, in_flight }
    }

    /// How many they were.
    fn end(self) -> usize {
        drop(self.pair);
        self.in_flight
    }
}

/// In what steps time passes.
const STEP: Duration = Duration::from_millis(10);

/// Lets so much time pass, with turns on the way.
fn pass(reactor: &mut Reactor, clock: &ManualClock, time: Duration) {
    for _ in 0..time.as_millis() / STEP.as_millis() {
        settle(reactor);
        clock.advance(STEP);
    }
    settle(reactor);
}

/// How much of the clock's time passes until `is_done`; all that can happen before does.
fn time_until(
    reactor: &mut Reactor,
    clock: &ManualClock,
    mut is_done: impl FnMut(&mut Reactor) -> bool,
) -> Duration {
    let began = clock.now();
    loop {
        settle(reactor);
        let passed = clock.now() - began;
        if is_done(reactor) {
            return passed;
        }
        assert!(passed < LONG, "nothing more happened");
        clock.advance(STEP);
    }
}

/// Says hello and keeps the connection.
struct Greeter(Rc<Cell<usize>>);

impl Protocol<UnixStream> for Greeter {
    fn connection_made(&mut self, cx: &mut Context<'_, UnixStream>) {
        cx.transport.write(b"!");
        self.0.set(self.0.get() + 1);
    }

    fn data_received(&mut self, _: &mut Context<'_, UnixStream>, _: &[u8]) {}
}

/// Reliability T-13, R-18: the limit goes down under waiting clients, and up.
#[test]
fn listener_survives_a_limit_that_goes_down_and_up() {
    let name = "listener_survives_a_limit_that_goes_down_and_up";
    in_own_process(module_path!(), name, || {
        const CLIENTS: usize = 500;
        let (_directory, [path]) = paths();
        let mut reactor = Reactor::new().unwrap();
        let greeted = Rc::new(Cell::new(0));
        let of_greeter = Rc::clone(&greeted);
        reactor
            .listen_unix(path.clone(), move |_: &Address| {
                Greeter(Rc::clone(&of_greeter))
            })
            .unwrap();
        // The alarm of the retry is a descriptor too.
        reactor.call_later(Duration::from_millis(1), |_| {});
        run_until_quiet(&mut reactor);
        let mut clients = Peer::start("greet", &[path.to_str().unwrap(), &CLIENTS.to_string()]);
        assert_eq!(clients.numbers(), [CLIENTS as f64]);
        let highest = open_descriptors().into_iter().max().unwrap() as u64;
        let fillers: Vec<OwnedFd> = (0..highest as usize + 1 - open_descriptors().len())
            .map(|_| file())
            .collect();
        limit_descriptors(highest + 1);
        let starved = scaled(Duration::from_secs(2), Duration::from_secs(20));
        let (began, turns) = (Instant::now(), reactor.statistics().turns);
        while began.elapsed() < starved {
            reactor.turn(Some(Duration::from_millis(500)));
        }
        let turns = (reactor.statistics().turns - turns) as f64 / began.elapsed().as_secs_f64();
        assert_eq!(greeted.get(), 0, "accepted out of nothing");
        limit_descriptors(1_000);
        let returned = Instant::now();
        turn_until(&mut reactor, |_| greeted.get() > 0);
        let first = returned.elapsed().as_secs_f64() * 1e3;
        let clients = clients.numbers_later();
        turn_until(&mut reactor, |_| clients.is_finished());
        let (_clients, ends) = clients.join().unwrap();
        drop(fillers);
        Figures::of("T-13")
            .must(
                "answered or closed",
                (ends[0] + ends[1]) as usize,
                Bound::Exactly,
                CLIENTS,
            )
            .must("closed of them", ends[1] as usize, Bound::AtMost, 40)
            .measured(
                "turns a second while starved",
                turns,
                "",
                Bound::AtMost,
                20.0,
            )
            .measured("first accept after", first, "ms", Bound::Below, 200.0);
    });
}

/// Reliability T-16, R-28: children started while descriptors arrive have exactly what
/// they are given: under the numbers that were asked for, the files that were meant.
#[test]
fn children_have_exactly_the_descriptors_they_are_given() {
    let name = "children_have_exactly_the_descriptors_they_are_given";
    in_own_process(module_path!(), name, || {
        let spawns = scaled(300, 10_000);
        let (_directory, [path]) = paths();
        let mut reactor = Reactor::new().unwrap();
        reactor
            .listen_unix(path.clone(), |_: &Address| Keeping::default())
            .unwrap();
        let words = [path.to_str().unwrap(), "100000"];
        let flood = Peer::start("flood", &words);
        // What this process was itself started with: std leaves that to its children.
        let inherited = found_by(Command::new("/bin/ls"), |command| command.spawn());
        // From another thread, at any moment of a read; every third by std, which gives
        // nothing, and every third by a reactor.
        let spawner = std::thread::spawn(move || {
            let mut random = bowline::testing::Random::new(16);
            let mut reactor = Reactor::new().unwrap();
            let mut granted = 0;
            let wrong = (0..spawns).filter(|nth| {
                if nth % 3 == 0 {
                    let found = found_by(Command::new("/bin/ls"), |command| command.spawn());
                    return found.keys().ne(inherited.keys());
                }
                let count = random.below(4);
                granted += count;
                // Numbers that this process is using, and such as it is not.
                let numbers = (0..count).map(|nth| (3 + nth * 7 + random.below(7)) as u32);
                let grants: Vec<_> = numbers.map(|number| (file(), number)).collect();
                let found = match nth % 3 {
                    1 => found_with(&grants),
                    _ => found_by_child(&mut reactor, &grants),
                };
                !has_exactly(&grants, found)
            });
            (wrong.count(), granted)
        });
        while !spawner.is_finished() {
            reactor.turn(Some(Duration::from_millis(20)));
        }
        let (wrong, granted) = spawner.join().unwrap();
        let received = reactor.descriptor_counts().received as usize;
        drop(flood);
        Figures::of("T-16")
            .must("children", spawns, Bound::AtLeast, scaled(300, 10_000))
            .must("descriptors granted", granted, Bound::AtLeast, spawns / 2)
            .must(
                "with more, fewer or others than they were given",
                wrong,
                Bound::Exactly,
                0,
            )
            .must(
                "descriptors received meanwhile",
                received,
                Bound::AtLeast,
                spawns,
            );
    });
}

/// The descriptors that a child finds that was given these.
fn found_with(grants: &[(OwnedFd, u32)]) -> BTreeMap<u32, String> {
    let borrowed: Vec<_> = grants.iter().map(|(fd, n)| (fd.as_fd(), *n)).collect();
    found_by(Command::new("/bin/ls"), |command| {
        let command = std::mem::replace(command, Command::new("unused"));
        bowline::process::spawn_with_descriptors(command, &borrowed)
    })
}

/// The same of one that a reactor runs.
fn found_by_child(reactor: &mut Reactor, grants: &[(OwnedFd, u32)]) -> BTreeMap<u32, String> {
    let mut command = Command::new("/bin/ls");
    command.args(["-l", "/proc/self/fd"]);
    let mut command = ChildCommand::new(command).null(0).null(2);
    for (fd, number) in grants {
        command = command.descriptor(*number, fd.as_fd());
    }
    let output = Rc::new(RefCell::new(None));
    let collected = Rc::clone(&output);
    let collect = CollectOutput::new(move |_, it| *collected.borrow_mut() = Some(it));
    let process = reactor.spawn_process(command, collect).unwrap();
    let pid = reactor.get(process).expect("it was started").pid();
    turn_until(reactor, |_| output.borrow().is_some());
    let output: ProcessOutput = output.take().expect("it has ended");
    listed(&output.stdout, pid)
}

/// Whether a child has found these under their numbers, and beside them its standard
/// streams alone.
fn has_exactly(grants: &[(OwnedFd, u32)], mut found: BTreeMap<u32, String>) -> bool {
    let has_streams = (0..3_u32).all(|number| found.remove(&number).is_some());
    let link = |fd: &OwnedFd| {
        let number = std::os::fd::AsRawFd::as_raw_fd(fd);
        let link = std::fs::read_link(format!("/proc/thread-self/fd/{number}")).unwrap();
        link.display().to_string()
    };
    let wanted = grants.iter().map(|(fd, number)| (*number, link(fd)));
    has_streams && found == wanted.collect()
}

/// The descriptors that a child finds open, and of which files.
fn found_by(
    mut command: Command,
    spawn: impl FnOnce(&mut Command) -> io::Result<std::process::Child>,
) -> BTreeMap<u32, String> {
    command
        .args(["-l", "/proc/self/fd"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let child = spawn(&mut command).unwrap();
    let pid = child.id();
    listed(&child.wait_with_output().unwrap().stdout, pid)
}

/// What a child of this number has listed.
fn listed(output: &[u8], pid: u32) -> BTreeMap<u32, String> {
    let own = format!("/proc/{pid}/fd");
    let listed = String::from_utf8_lossy(output);
    let found = listed.lines().filter_map(|line| {
        let (before, link) = line.split_once(" -> ")?;
        let number = before.rsplit(' ').next()?.parse().expect("a number");
        // What it reads them from is its own.
        (link != own).then(|| (number, link.to_owned()))
    });
    found.collect()
}

/// Keeps the last few descriptors, so that there always are some.
#[derive(Default)]
struct Keeping(Vec<OwnedFd>);

impl Protocol<UnixStream> for Keeping {
    fn data_received(&mut self, _: &mut Context<'_, UnixStream>, _: &[u8]) {}

    fn descriptors_received(
        &mut self,
        _: &mut Context<'_, UnixStream>,
        descriptors: &mut ReceivedDescriptors<'_>,
        _: &[u8],
    ) {
        self.0 = descriptors.collect();
    }
}

/// Answers once the word was said.
struct Guarded {
    handshake: Handshake,
    lost: Rc<RefCell<Vec<Duration>>>,
    made: Instant,
    clock: ManualClock,
}

/// Makes them; `lost` has how long each lived, by this clock, that never said it.
fn guarded(
    lost: &Rc<RefCell<Vec<Duration>>>,
    clock: &ManualClock,
) -> impl FnMut(&Address, Handshake) -> Guarded + 'static {
    let (lost, clock) = (Rc::clone(lost), clock.clone());
    move |_, handshake| Guarded {
        handshake,
        lost: Rc::clone(&lost),
        made: clock.now(),
        clock: clock.clone(),
    }
}

impl Protocol<UnixStream> for Guarded {
    fn data_received(&mut self, cx: &mut Context<'_, UnixStream>, data: &[u8]) {
        if data.contains(&b'y') {
            self.handshake.complete(cx.reactor);
            cx.transport.write(b"y");
        }
    }

    fn connection_lost(&mut self, _: &mut Context<'_, UnixStream>, _: &CloseReason) {
        if !self.handshake.is_complete() {
            self.lost.borrow_mut().push(self.clock.now() - self.made);
        }
    }
}

/// Reliability T-19, R-6: peers that never get through their handshake, and say a byte
/// now and then. Time is the test's, so that however long it takes them to come, their
/// deadlines are their own.
#[test]
fn half_open_handshakes_end_at_the_deadline_and_others_are_served() {
    let name = "half_open_handshakes_end_at_the_deadline_and_others_are_served";
    in_own_process(module_path!(), name, || {
        crate::peer::raise_descriptor_limit();
        let half_open = scaled(1_000, 5_000);
        let deadline = Duration::from_secs(20);
        let (_directory, [path]) = paths();
        let clock = ManualClock::new();
        let mut reactor = Reactor::with_clock(Moved(clock.clone())).unwrap();
        let lost = Rc::default();
        // All places are theirs, but one.
        let factory = LimitHandshakes::new(guarded(&lost, &clock))
            .most(half_open + 1)
            .deadline(deadline);
        let count = factory.count();
        reactor.listen_unix(path.clone(), factory).unwrap();
        run_until_quiet(&mut reactor);
        let before = resident_bytes();
        let words = [path.to_str().unwrap(), &half_open.to_string()];
        let attacker = Peer::start("stall", &words).numbers_later();
        // Each at a moment of its own.
        turn_until(&mut reactor, |_| {
            if count.open() < half_open / 2 {
                clock.advance(Duration::from_millis(1));
            }
            attacker.is_finished() && count.open() >= half_open
        });
        let each = resident_bytes().saturating_sub(before) as f64 / half_open as f64 / 1024.0;
        let honest = scaled(500, 2_000);
        let words = [path.to_str().unwrap(), &honest.to_string()];
        let client = Peer::start("echo", &words).numbers_later();
        turn_until(&mut reactor, |_| client.is_finished());
        let (_client, answers) = client.join().unwrap();
        assert_eq!(count.timed_out(), 0, "before the deadline");
        time_until(&mut reactor, &clock, |_| count.open() == 0);
        let lived = lost.borrow();
        let (shortest, longest) = (lived.iter().min(), lived.iter().max());
        let in_deadlines = |it: Option<&Duration>| {
            (it.expect("many").as_secs_f64() / deadline.as_secs_f64() * 100.0) as usize
        };
        // Their places are free: as many again come in at once.
        let words = [path.to_str().unwrap(), &half_open.to_string()];
        let again = Peer::start("stall", &words).numbers_later();
        turn_until(&mut reactor, |_| count.open() >= half_open);
        Figures::of("T-19")
            .must(
                "half-open handshakes",
                half_open,
                Bound::AtLeast,
                scaled(1_000, 5_000),
            )
            .must(
                "ended at the deadline",
                count.timed_out() as usize,
                Bound::Exactly,
                half_open,
            )
            .must(
                "honest handshakes meanwhile",
                answers[1] as usize,
                Bound::Exactly,
                honest,
            )
            .must(
                "let in again when those had ended",
                count.open(),
                Bound::AtLeast,
                half_open,
            )
            .measured(
                "honest connect and answer, p99",
                answers[0],
                "ms",
                Bound::Below,
                100.0,
            )
            .measured("memory of each", each, "KiB", Bound::Below, 4.0)
            .must(
                "the first after, in hundredths of the deadline",
                in_deadlines(shortest),
                Bound::AtLeast,
                100,
            )
            .must(
                "the last after, in hundredths of the deadline",
                in_deadlines(longest),
                Bound::AtMost,
                101,
            );
        drop((attacker, again));
    });
}

/// A full house leaves newcomers waiting instead of turning them away.
#[test]
fn listener_is_paused_while_handshakes_are_at_their_limit() {
    let ledger = crate::support::DescriptorLedger::open();
    {
        let (_directory, [path]) = paths();
        let clock = ManualClock::new();
        let mut reactor = Reactor::with_clock(clock.clone()).unwrap();
        let deadline = Duration::from_secs(10);
        let factory = LimitHandshakes::new(guarded(&Rc::default(), &clock))
            .most(2)
            .deadline(deadline);
        let count = factory.count();
        reactor.listen_unix(path.clone(), factory).unwrap();
        let mut clients: Vec<_> = (0..5)
            .map(|_| StdUnixStream::connect(&path).unwrap())
            .collect();
        let almost = Duration::from_millis(1);
        run_until_quiet(&mut reactor);
        clock.advance(deadline - almost);
        run_until_quiet(&mut reactor);
        assert_eq!((count.open(), count.timed_out()), (2, 0));
        // One gets through: the third has its place.
        clients[0].write_all(b"y").unwrap();
        clients[2].write_all(b"y").unwrap();
        run_until(&mut reactor, |_| count.open() == 2 && answered(&clients[2]));
        // The second never does: its place is free at the deadline.
        clients[4].write_all(b"y").unwrap();
        run_until_quiet(&mut reactor);
        assert!(!answered(&clients[4]), "let in before the deadline");
        clock.advance(almost);
        run_until(&mut reactor, |_| answered(&clients[4]));
        assert_eq!((count.open(), count.timed_out()), (1, 1));
        clock.advance(deadline);
        run_until(&mut reactor, |_| count.open() == 0);
        assert_eq!(count.timed_out(), 2);
    }
    ledger.assert_balanced();
}

/// Who gets through ends the wait for handshakes, and not the pause that the program has
/// asked for meanwhile.
#[test]
fn handshake_that_ends_does_not_open_a_listener_that_is_paused() {
    let ledger = crate::support::DescriptorLedger::open();
    {
        let (_directory, [path]) = paths();
        let mut reactor = Reactor::new().unwrap();
        let clock = ManualClock::new();
        let factory = LimitHandshakes::new(guarded(&Rc::default(), &clock)).most(1);
        let count = factory.count();
        let listener = reactor.listen_unix(path.clone(), factory).unwrap();
        let mut clients: Vec<_> = (0..2)
            .map(|_| StdUnixStream::connect(&path).unwrap())
            .collect();
        run_until_quiet(&mut reactor);
        reactor.get(listener).unwrap().pause_accepting();
        clients[0].write_all(b"y").unwrap();
        clients[1].write_all(b"y").unwrap();
        run_until(&mut reactor, |_| answered(&clients[0]));
        run_until_quiet(&mut reactor);
        assert_eq!(count.open(), 0);
        assert!(!answered(&clients[1]), "nobody else is let in");
        reactor.get(listener).unwrap().resume_accepting();
        run_until(&mut reactor, |_| answered(&clients[1]));
    }
    ledger.assert_balanced();
}

fn answered(client: &StdUnixStream) -> bool {
    client.set_nonblocking(true).unwrap();
    let mut client = client;
    matches!(client.read(&mut [0]), Ok(1))
}
