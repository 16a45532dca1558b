//! Sockets that others hold too: what they do with them does not reach our
//! loop.

use std::io::{Read, Write};
use std::net::{TcpListener as StdTcpListener, TcpStream as StdTcpStream};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bowline::{Address, Context, Protocol, Reactor, Transport, Transports};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use crate::support::figures::{Bound, Figures, scaled};
use crate::support::{DescriptorLedger, Record, Recorder, run_until, socketpair};

/// Echoes.
struct Echo;

impl<T: Transport> Protocol<T> for Echo {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.write(data);
    }
}

/// Reliability T-23: a socket that was passed on and closed here stays silent
/// while traffic on it goes on at its new owner.
#[test]
fn a_passed_socket_stays_silent_while_its_new_owner_uses_it() {
    let ledger = DescriptorLedger::open();
    let passes = scaled(500, 10_000);
    let mut reactor = Reactor::new().unwrap();
    let (mut silent, mut told) = (0, 0);
    for _ in 0..passes {
        let (ours, mut far) = socketpair();
        let record = Record::default();
        let handle = reactor
            .adopt_unix_stream(ours.into(), Recorder::new(&record))
            .unwrap();
        far.write_all(b"here").unwrap();
        run_until(&mut reactor, |_| record.data() == b"here");

        // Passed on with `detach`, and ours is closed: only the new one is left.
        let (mut to_owner, from_us) = (None, std::rc::Rc::new(std::cell::RefCell::new(None)));
        let detached = std::rc::Rc::clone(&from_us);
        let handle = reactor.get(handle).unwrap().handle();
        reactor.detach::<Recorder>(handle, move |_, result| {
            *detached.borrow_mut() = result.ok().map(|detached| detached.fd);
        });
        run_until(&mut reactor, |_| {
            to_owner = from_us.borrow_mut().take();
            to_owner.is_some()
        });
        let fd = to_owner.expect("detached");
        let mut owner = StdUnixStream::from(fd.try_clone().unwrap());
        drop(fd);

        let before = reactor.statistics();
        for _ in 0..3 {
            far.write_all(b"there").unwrap();
            reactor.turn(Some(Duration::ZERO));
            let mut bytes = [0; 5];
            owner.read_exact(&mut bytes).unwrap();
            owner.write_all(&bytes).unwrap();
            far.read_exact(&mut bytes).unwrap();
            reactor.turn(Some(Duration::ZERO));
        }
        drop((owner, far));
        reactor.turn(Some(Duration::ZERO));
        let after = reactor.statistics();
        let events = after.events - before.events + after.stale_events - before.stale_events;
        if events == 0 {
            silent += 1;
        }
        told += record.count(|event| matches!(event, crate::support::Event::Lost(_)));
    }
    Figures::of("T-23")
        .must("passes", passes, Bound::AtLeast, 500)
        .must(
            "without an event afterwards",
            silent,
            Bound::Exactly,
            passes,
        )
        .must("protocols told of an end", told, Bound::Exactly, 0);
    drop(reactor);
    ledger.assert_balanced();
}

/// Another holder that cannot make up its mind whether the socket blocks.
struct Toggler {
    stop: Arc<AtomicBool>,
    times: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Toggler {
    fn start(sockets: Vec<std::os::fd::OwnedFd>) -> Self {
        let (stop, times) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&times));
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                for socket in &sockets {
                    let flags = fcntl_getfl(socket).expect("open");
                    fcntl_setfl(socket, flags ^ OFlags::NONBLOCK).expect("open");
                }
                counted.fetch_add(1, Ordering::Relaxed);
                thread::yield_now();
            }
        });
        Self {
            stop,
            times,
            thread,
        }
    }

    fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("no panic");
        self.times.load(Ordering::Relaxed)
    }
}

/// Turns the reactor as fast as it goes; the longest turn.
fn longest_turn(reactor: &mut Reactor, period: Duration, mut also: impl FnMut()) -> Duration {
    let began = Instant::now();
    let mut longest = Duration::ZERO;
    while began.elapsed() < period {
        let turn = Instant::now();
        reactor.turn(Some(Duration::ZERO));
        longest = longest.max(turn.elapsed());
        also();
    }
    longest
}

/// How long a turn may take before it has blocked, whatever the machine does.
const BLOCKED: Duration = Duration::from_secs(2);

/// Reliability T-24: connections whose other holders make them block, and not,
/// and block.
#[test]
fn connections_do_not_block_whatever_their_other_holders_do() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let listener = StdTcpListener::bind(("127.0.0.1", 0)).unwrap();
    let mut tcp = StdTcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    let (ours, mut unix) = socketpair();
    unix.set_nonblocking(false).unwrap();
    let shared = vec![
        accepted.try_clone().unwrap().into(),
        ours.try_clone().unwrap().into(),
    ];
    reactor.adopt_tcp_stream(accepted.into(), Echo).unwrap();
    reactor.adopt_unix_stream(ours.into(), Echo).unwrap();
    let toggler = Toggler::start(shared);
    let toggled = Arc::clone(&toggler.times);
    let rounds = scaled(100, 2_000);
    // Small ones, and such as do not fit: reads and writes that have to wait.
    let client = thread::spawn(move || {
        let mut back = vec![0; 1 << 20];
        // Until the other holder has had its turn, too.
        let busy = |round| round < rounds || toggled.load(Ordering::Relaxed) < 1_000;
        for round in (0_u32..).take_while(|round| busy(*round)) {
            let length = if round % 50 == 0 { 1 << 20 } else { 10 };
            let bytes = vec![round as u8; length];
            let half = length / 2;
            for stream in [&mut tcp as &mut dyn Both, &mut unix] {
                for part in [&bytes[..half], &bytes[half..]] {
                    stream.write_all(part).unwrap();
                    stream.read_exact(&mut back[..part.len()]).unwrap();
                    assert_eq!(part, &back[..part.len()]);
                }
            }
        }
    });
    let mut longest = Duration::ZERO;
    while !client.is_finished() {
        let turn = longest_turn(&mut reactor, Duration::from_millis(5), || {});
        longest = longest.max(turn);
    }
    client.join().expect("everything came back");
    let times = toggler.stop();
    assert!(times >= 1_000, "toggled {times} times");
    Figures::of("T-24")
        .must(
            "turns that blocked, on connections",
            usize::from(longest > BLOCKED),
            Bound::Exactly,
            0,
        )
        .measured(
            "longest turn",
            longest.as_secs_f64() * 1e3,
            "ms",
            Bound::Below,
            20.0,
        );
    drop((reactor, listener));
    ledger.assert_balanced();
}

trait Both: Read + Write {}
impl<S: Read + Write> Both for S {}

/// Reliability T-24: and listeners, which have no call that does not block.
#[test]
fn listeners_do_not_block_whatever_their_other_holders_do() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let listener = StdTcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let shared = vec![listener.try_clone().unwrap().into()];
    reactor
        .adopt_tcp_listener(listener.into(), |_: &Address| Echo)
        .unwrap();
    let toggler = Toggler::start(shared);
    let toggled = Arc::clone(&toggler.times);
    let rounds = scaled(200, 5_000);
    let client = thread::spawn(move || {
        let busy = |round| round < rounds || toggled.load(Ordering::Relaxed) < 1_000;
        for _ in (0_u32..).take_while(|round| busy(*round)) {
            let mut stream = StdTcpStream::connect(address).unwrap();
            stream
                .set_read_timeout(Some(Duration::from_secs(60)))
                .unwrap();
            stream.write_all(b"x").unwrap();
            // Not answered while the loop waits for another connection.
            stream.read_exact(&mut [0]).unwrap();
        }
    });
    let mut longest = Duration::ZERO;
    while !client.is_finished() {
        let turn = longest_turn(&mut reactor, Duration::from_millis(5), || {});
        longest = longest.max(turn);
    }
    client.join().expect("everybody was answered");
    let times = toggler.stop();
    assert!(times >= 1_000, "toggled {times} times");
    Figures::of("T-24")
        .must(
            "turns that blocked, on listeners",
            usize::from(longest > BLOCKED),
            Bound::Exactly,
            0,
        )
        .measured(
            "longest turn, accepting",
            longest.as_secs_f64() * 1e3,
            "ms",
            Bound::Below,
            20.0,
        );
    drop(reactor);
    ledger.assert_balanced();
}
