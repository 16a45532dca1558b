//! Pipes, FIFOs and terminals whose other end does not run.

use std::cell::{Cell, RefCell};
use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use bowline::testing::Random;
use bowline::{
    Address, CloseReason, Context, FileSender, Pipe, Protocol, Reactor, Transport, TransportHandle,
    Transports,
};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use crate::children::Peer;
use crate::support::figures::{Bound, Figures, scaled};
use crate::support::own_process::{in_own_process, resident_bytes, thread_time};
use crate::support::{
    DEADLINE, eventually, open_descriptors, run_until_quiet_for, run_until_within,
};

/// How long the whole may take on a busy machine.
const LONG: Duration = Duration::from_secs(120);

/// What a [`FileSender`] has waiting at the most: a portion.
const PORTION: usize = 16_384;

/// After how many bytes they begin anew: a prime number, so that a lost or doubled block
/// shows.
const PERIOD: usize = 65_521;

/// Bytes in which a lost, doubled or moved piece shows.
pub(crate) fn pattern() -> &'static [u8] {
    static PATTERN: OnceLock<Vec<u8>> = OnceLock::new();
    PATTERN.get_or_init(|| {
        let mut random = Random::new(44);
        (0..PERIOD).map(|_| random.any() as u8).collect()
    })
}

/// The pattern, up to some length.
struct Source {
    at: usize,
    end: usize,
}

impl Read for Source {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let piece = &pattern()[self.at % PERIOD..];
        let count = buffer.len().min(piece.len()).min(self.end - self.at);
        buffer[..count].copy_from_slice(&piece[..count]);
        self.at += count;
        Ok(count)
    }
}

/// What came back of what was sent.
#[derive(Default)]
struct Back {
    received: Cell<usize>,
    is_wrong: Cell<bool>,
    lost: RefCell<Option<String>>,
}

/// Sends the pattern, and expects it back.
struct ThereAndBack {
    back: Rc<Back>,
    length: usize,
    /// Whether our end of what is written is one of its own, which can be closed.
    has_two_ends: bool,
}

impl<T: Transport> Protocol<T> for ThereAndBack {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        let source = Source {
            at: 0,
            end: self.length,
        };
        let has_two_ends = self.has_two_ends;
        FileSender::new(source)
            .send(cx.transport, move |cx, _| {
                if has_two_ends {
                    cx.transport.lose_write_connection();
                }
            })
            .unwrap();
    }

    fn data_received(&mut self, cx: &mut Context<'_, T>, mut data: &[u8]) {
        let back = &self.back;
        while !data.is_empty() {
            let expected = &pattern()[back.received.get() % PERIOD..];
            let count = expected.len().min(data.len());
            let is_same = data[..count] == expected[..count];
            back.is_wrong.set(back.is_wrong.get() || !is_same);
            back.received.set(back.received.get() + count);
            data = &data[count..];
        }
        if !self.has_two_ends && back.received.get() >= self.length {
            cx.transport.lose_connection();
        }
    }

    fn connection_lost(&mut self, _: &mut Context<'_, T>, reason: &CloseReason) {
        *self.back.lost.borrow_mut() = Some(reason.to_string());
    }
}

struct Echo;

impl<T: Transport> Protocol<T> for Echo {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.write(data);
    }
}

/// What a child is reached by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Pipes,
    Fifos,
    Terminal,
}

const WAYS: [Way; 3] = [Way::Pipes, Way::Fifos, Way::Terminal];

/// A `cat`, and our connection with it.
struct Cat {
    way: Way,
    child: Child,
    is_stopped: bool,
    handle: TransportHandle,
    back: Rc<Back>,
    length: usize,
}

/// Both ends of a FIFO, the one for reading first.
pub(crate) fn fifo() -> (OwnedFd, OwnedFd) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fifo");
    let owner = Mode::RUSR | Mode::WUSR;
    mknodat(CWD, &path, FileType::Fifo, owner, 0).unwrap();
    let open = |reads: bool, writes: bool| -> OwnedFd {
        let mut options = OpenOptions::new();
        options
            .read(reads)
            .write(writes)
            .open(&path)
            .unwrap()
            .into()
    };
    // With this one there, the others need not wait for each other.
    let _both = open(true, true);
    (open(true, false), open(false, true))
}

/// The side that holds a terminal, and the terminal, which changes no byte.
pub(crate) fn terminal() -> (OwnedFd, OwnedFd) {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let terminal = ioctl_tiocgptpeer(&master, flags).unwrap();
    let mut settings = tcgetattr(&terminal).unwrap();
    settings.make_raw();
    tcsetattr(&terminal, OptionalActions::Now, &settings).unwrap();
    (master, terminal)
}

impl Cat {
    /// One that has not read anything yet, and does not run.
    fn stopped(reactor: &mut Reactor, way: Way, length: usize) -> Self {
        let back: Rc<Back> = Rc::default();
        let protocol = ThereAndBack {
            back: Rc::clone(&back),
            length,
            has_two_ends: way != Way::Terminal,
        };
        let spawn = |input: OwnedFd, output: OwnedFd| {
            let mut command = Command::new("cat");
            let command = command.stdin(input).stdout(output).stderr(Stdio::null());
            command.spawn().unwrap()
        };
        let (child, handle) = match way {
            Way::Terminal => {
                let (master, terminal) = terminal();
                let child = spawn(terminal.try_clone().unwrap(), terminal);
                (child, reactor.adopt(Pipe, master, protocol).unwrap())
            }
            Way::Pipes | Way::Fifos => {
                let ends = || match way {
                    Way::Fifos => fifo(),
                    _ => io::pipe().map(|(r, w)| (r.into(), w.into())).unwrap(),
                };
                let ((input, writing), (reading, output)) = (ends(), ends());
                let child = spawn(input, output);
                let ends = (reading, writing);
                (child, reactor.adopt(Pipe::pair(), ends, protocol).unwrap())
            }
        };
        let mut cat = Self {
            way,
            child,
            is_stopped: false,
            handle,
            back,
            length,
        };
        cat.stop();
        cat.wait_until_it_stands();
        cat
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id().cast_signed()).expect("not zero");
        kill_process(pid, signal).expect("nobody has waited for it");
    }

    fn stop(&mut self) {
        self.signal(Signal::STOP);
        self.is_stopped = true;
    }

    fn wait_until_it_stands(&self) {
        let path = format!("/proc/{}/stat", self.child.id());
        eventually(DEADLINE, || {
            let stat = fs::read_to_string(&path).expect("nobody has waited for it");
            let (_, rest) = stat.rsplit_once(") ").expect("a name before");
            // It may have ended before the signal.
            match rest.starts_with(['T', 'Z']) {
                true => Ok(()),
                false => Err(format!("it goes on: {rest}")),
            }
        });
    }

    fn go_on(&mut self) {
        self.signal(Signal::CONT);
        self.is_stopped = false;
    }

    fn is_lost(&self) -> bool {
        self.back.lost.borrow().is_some()
    }

    fn is_whole(&self) -> bool {
        !self.back.is_wrong.get() && self.back.received.get() == self.length
    }
}

impl Drop for Cat {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How much a connection of a kind sends: terminals are slow.
fn length(way: Way) -> usize {
    match way {
        Way::Terminal => scaled(40_000, 1 << 20),
        Way::Pipes | Way::Fifos => scaled(1 << 20, 16 << 20),
    }
}

/// Reliability T-44: children stop at any moment, with what they were sent unread and
/// what they are to answer unsaid, over pipes, FIFOs and terminals. That costs nothing,
/// nobody else waits for it, and when they go on every byte is there, in order.
#[test]
fn who_does_not_run_is_waited_for_at_no_cost() {
    let name = "who_does_not_run_is_waited_for_at_no_cost";
    in_own_process(module_path!(), name, || {
        let (each, pings) = (scaled(4, 50), scaled(300, 5_000));
        let (observed, stops) = scaled((0.5, 60), (10.0, 4_000));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("streams");
        let mut reactor = Reactor::new().unwrap();
        reactor.listen_unix(&*path, |_: &Address| Echo).unwrap();
        reactor.turn(Some(Duration::ZERO));
        let open = open_descriptors();
        let mut cats: Vec<Cat> = WAYS
            .into_iter()
            .flat_map(|way| (0..each).map(move |_| way))
            .map(|way| Cat::stopped(&mut reactor, way, length(way)))
            .collect();

        // None of them runs.
        run_until_quiet_for(&mut reactor, Duration::from_millis(50));
        let memory = resident_bytes();
        let (events, processor, began) =
            (reactor.statistics().events, thread_time(), Instant::now());
        let mut turns = 0;
        while began.elapsed().as_secs_f64() < observed {
            reactor.turn(Some(Duration::from_millis(250)));
            turns += 1;
        }
        let busy = (thread_time() - processor) as f64 / began.elapsed().as_nanos() as f64 * 100.0;
        let events = reactor.statistics().events - events;
        let unsent = cats.iter().map(|cat| {
            let transport = reactor.get(cat.handle).expect("it waits");
            transport.unsent_bytes()
        });
        let (least, most) = unsent.fold((usize::MAX, 0), |(least, most), it| {
            (least.min(it), most.max(it))
        });

        // Each runs now and then.
        let client = Peer::start("echo", &[path.to_str().unwrap(), &pings.to_string()]);
        let client = client.numbers_later();
        let mut random = Random::new(44);
        let mut stopped = cats.len();
        let mut inside = 0;
        let began = Instant::now();
        while !cats.iter().all(Cat::is_lost) {
            let missing: Vec<_> = cats
                .iter()
                .filter(|it| !it.is_lost())
                .map(|it| it.way)
                .collect();
            assert!(began.elapsed() < LONG, "not through: {missing:?}");
            reactor.turn(Some(Duration::from_millis(1)));
            for _ in 0..scaled(1, 8) {
                let at = random.below(cats.len());
                let cat = &mut cats[at];
                if cat.is_stopped {
                    cat.go_on();
                } else if stopped < stops && !cat.is_lost() {
                    cat.stop();
                    stopped += 1;
                    let received = cat.back.received.get();
                    inside += usize::from(received > 0 && received < cat.length);
                }
            }
        }
        let grown = resident_bytes().saturating_sub(memory) as f64 / 1_048_576.0;
        run_until_within(LONG, &mut reactor, &"the client", |_| client.is_finished());
        let (_client, answers) = client.join().unwrap();
        let broken = cats.iter().filter(|cat| !cat.is_whole()).count();
        let unclean: Vec<_> = cats
            .iter()
            .map(|cat| (cat.way, cat.back.lost.borrow().clone().expect("lost")))
            .filter(|(_, reason)| reason != "closed cleanly")
            .collect();
        assert!(unclean.is_empty(), "{unclean:?}");
        let connections = cats.len();
        drop((cats, _client));
        let left = open_descriptors().difference(&open).count();
        Figures::of("T-44")
            .must(
                "connections with a child that stops",
                connections,
                Bound::Exactly,
                3 * each,
            )
            .must("stops", stopped, Bound::AtLeast, scaled(connections, 2_000))
            .must("of them in the middle", inside, Bound::AtLeast, each)
            .must(
                "connections that lost, doubled or moved a byte",
                broken,
                Bound::Exactly,
                0,
            )
            .must("events while all stand", events as usize, Bound::Exactly, 0)
            .must(
                "bytes that wait for each, at least",
                least,
                Bound::AtLeast,
                1,
            )
            .must(
                "bytes that wait for each, at most",
                most,
                Bound::AtMost,
                PORTION,
            )
            .must(
                "honest pings answered meanwhile",
                answers[1] as usize,
                Bound::Exactly,
                pings,
            )
            .must("descriptors left", left, Bound::Exactly, 0)
            .measured(
                "turns a second while all stand",
                f64::from(turns) / observed,
                "",
                Bound::Below,
                10.0,
            )
            .measured("processor while all stand", busy, "%", Bound::Below, 1.0)
            .measured("growth of memory", grown, "MiB", Bound::Below, 10.0)
            .measured(
                "honest connect and ping, p99",
                answers[0],
                "ms",
                Bound::Below,
                50.0,
            );
    });
}

/// Ends a connection whose child stands: how long that took, and what was told.
fn end(way: Way, end: impl FnOnce(&mut Reactor, &mut Cat)) -> (Duration, String) {
    let mut reactor = Reactor::new().unwrap();
    let mut cat = Cat::stopped(&mut reactor, way, usize::MAX);
    run_until_quiet_for(&mut reactor, Duration::from_millis(20));
    let began = Instant::now();
    end(&mut reactor, &mut cat);
    run_until_within(DEADLINE, &mut reactor, &way, |_| cat.is_lost());
    let took = began.elapsed();
    let reason = cat.back.lost.take().expect("lost");
    run_until_within(DEADLINE, &mut reactor, &way, |it| it.registered() == 0);
    assert_eq!(
        reactor.delayed_calls().count(),
        0,
        "{way:?}: timers are left"
    );
    (took, reason)
}

/// Reliability T-44: who has no time for one that stands is through with it when it says
/// so, and one that is killed where it stands is gone.
#[test]
fn who_does_not_run_keeps_no_connection_open() {
    let name = "who_does_not_run_keeps_no_connection_open";
    in_own_process(module_path!(), name, || {
        let within = Duration::from_millis(100);
        let mut ends = 0;
        for way in WAYS {
            let (_, reason) = end(way, |reactor, cat| {
                reactor.get(cat.handle).unwrap().abort_connection();
            });
            assert_eq!(reason, "aborted by us", "{way:?}");
            let (took, reason) = end(way, |reactor, cat| {
                reactor
                    .get(cat.handle)
                    .unwrap()
                    .lose_connection_within(within);
            });
            assert!(took >= within, "{way:?}: cut after {took:?}");
            assert!(reason.contains("before the deadline"), "{way:?}: {reason}");
            let (_, reason) = end(way, |_, cat| cat.child.kill().unwrap());
            // Of two descriptors one may be seen to end before the other.
            let is_known = ["closed cleanly", "Broken pipe", "broken pipe"];
            let is_known = is_known.iter().any(|it| reason.contains(it));
            assert!(is_known, "{way:?}: {reason}");
            ends += 3;
        }
        Figures::of("T-44").must(
            "ends of connections whose child stood",
            ends,
            Bound::Exactly,
            9,
        );
    });
}
