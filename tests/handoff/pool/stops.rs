//! A pool stops while a worker hangs: who had connected is served by the others, and the
//! address is free at once.

use std::cell::{Cell, RefCell};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline::handoff::pool::{Accepting, Pool, PoolEvent, PoolSettings, Undelivered};
use bowline::{GracefulStop, ListenerHandle, Reactor, Tcp, Transports};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, waitpid};

use super::clients::Clients;
use super::process::{Script, end, scripted, signal, stop, turn_until_serving};
use crate::support::{DescriptorLedger, run_until_within};

const PATIENCE: Duration = Duration::from_secs(60);
const CLIENTS: u32 = 40;

/// What stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    /// The listener, and the pool goes on.
    Listener,
    Pool,
    /// The pool, and its listener is closed only when all were served.
    PoolFirst,
    /// The program, as a signal has it.
    Reactor,
}

/// When the pool learns that the worker hangs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hangs {
    /// Before it stops: the worker was recalled, and another is in its place.
    Before,
    /// While it stops.
    AtTheStop,
}

/// A pool with a listener, one of whose workers hangs.
struct Scene {
    reactor: Reactor,
    pool: Pool,
    listener: ListenerHandle,
    address: SocketAddr,
    victim: u32,
    ledger: DescriptorLedger,
    _directory: tempfile::TempDir,
}

impl Scene {
    fn new(settings: PoolSettings) -> Self {
        let ledger = DescriptorLedger::open();
        let directory = tempfile::tempdir().unwrap();
        let mut reactor = Reactor::new().unwrap();
        let spawn = scripted(directory.path().join("served"), |_| Script::Serve);
        let pool = Pool::start(&mut reactor, settings, spawn);
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let listener = reactor.accept(Tcp::at(any), pool.acceptor(7)).unwrap();
        let address = reactor.get(listener).unwrap().address();
        let address = address.as_inet().unwrap();
        turn_until_serving(&mut reactor, &pool);
        let victim = pool.statistics().workers[0].pid;
        stop(victim);
        Self {
            reactor,
            pool,
            listener,
            address,
            victim,
            ledger,
            _directory: directory,
        }
    }
}

/// One of three workers hangs, and the rest is as the arguments say.
fn stop_with_one_that_hangs(accepting: Accepting, what: What, hangs: Hangs) {
    let mut settings = PoolSettings::default().workers(3).accepting(accepting);
    settings.ack_timeout = Duration::from_secs(1);
    let Scene {
        mut reactor,
        pool,
        listener,
        address,
        victim,
        ledger,
        _directory,
    } = Scene::new(settings);
    let mut watch = Watch::new(&pool, address, victim, (accepting, what, hangs));
    if hangs == Hangs::Before {
        let clients = watch.clients();
        run_until_within(PATIENCE, &mut reactor, &pool, |_| {
            watch.outside.turn(Some(Duration::from_millis(1)));
            clients.are_done() && pool.statistics().recalls == 1
        });
        assert_eq!(clients.outcome.borrow().failed.len(), 0);
    }
    // The pool sees none of them before it is told to stop.
    let served = watch.clients().outcome;
    watch.await_connections();
    let is_over = Rc::<Cell<bool>>::default();
    let noted = Rc::clone(&is_over);
    let mut see = move || {
        if !noted.get() && watch.is_over() {
            noted.set(true);
            signal(victim, Signal::CONT);
        }
        noted.get()
    };
    if what == What::Reactor {
        let stop = GracefulStop::new().deadline(PATIENCE);
        reactor.call_later(Duration::ZERO, move |reactor| {
            reactor.stop_gracefully(stop).unwrap();
        });
        reactor.call_every(Duration::from_millis(1), move |_, _| {
            see();
        });
        reactor.run().unwrap();
    } else {
        let is_first = what == What::PoolFirst;
        if !is_first {
            let listener = reactor.get(listener).unwrap();
            listener.stop_listening_when_drained();
        }
        if matches!(what, What::Pool | What::PoolFirst) {
            pool.stop(&mut reactor, PATIENCE, |_| {});
        }
        run_until_within(PATIENCE, &mut reactor, &pool, |reactor| {
            if is_first
                && served.borrow().answered.len() == CLIENTS as usize
                && let Some(listener) = reactor.get(listener)
            {
                listener.stop_listening();
                return false;
            }
            see()
        });
        drop(see);
        end(&mut reactor, &pool);
    }
    assert!(is_over.get(), "{pool:?}");
    assert_eq!(reactor.statistics().panics, 0);
    drop((pool, reactor));
    ledger.assert_balanced();
}

/// What is seen from outside.
struct Watch {
    case: String,
    /// The clients are in a reactor of their own, which does not stop.
    outside: Reactor,
    clients: Option<Clients>,
    address: SocketAddr,
    lost: Rc<RefCell<Vec<Undelivered>>>,
}

impl Watch {
    /// The worker that hangs is not to be killed.
    fn new(
        pool: &Pool,
        address: SocketAddr,
        victim: u32,
        (accepting, what, hangs): (Accepting, What, Hangs),
    ) -> Self {
        let case = format!("{accepting:?}, {what:?} stops, {hangs:?}");
        let told = case.clone();
        pool.on_event(move |_, event| {
            if let PoolEvent::Exited { pid, status, .. } = event
                && pid == victim
            {
                let status = status.expect("a child of ours");
                assert!(status.success(), "{told}: it ends with {status}");
            }
        });
        let lost = Rc::<RefCell<Vec<Undelivered>>>::default();
        let noted = Rc::clone(&lost);
        pool.on_undelivered(move |_, _, why| noted.borrow_mut().push(why));
        Self {
            case,
            outside: Reactor::new().unwrap(),
            clients: None,
            address,
            lost,
        }
    }

    /// Has more clients come, which are waited for.
    fn clients(&mut self) -> Clients {
        let addresses = vec![self.address];
        let clients = Clients::start(&mut self.outside, addresses, CLIENTS, CLIENTS as usize);
        self.clients = Some(clients.clone());
        clients
    }

    fn await_connections(&mut self) {
        let clients = self.clients.clone().expect("there are some");
        run_until_within(PATIENCE, &mut self.outside, &self.case, |_| {
            clients.connected() == CLIENTS as usize
        });
    }

    /// Whether all were served, and nobody listens any more.
    fn is_over(&mut self) -> bool {
        let case = &self.case;
        let clients = self.clients.as_ref().expect("there are some");
        if !clients.are_done() {
            self.outside.turn(Some(Duration::ZERO));
            return false;
        }
        let (failed, lost) = (clients.outcome.borrow().failed.len(), self.lost.borrow());
        assert!(failed == 0 && lost.is_empty(), "{case}: {failed}, {lost:?}");
        if TcpStream::connect(self.address).is_ok() {
            return false;
        }
        let again = TcpListener::bind(self.address);
        drop(again.unwrap_or_else(|error| panic!("{case}: {error}")));
        true
    }
}

/// Each way to stop, for a pool whose workers accept: nobody who has connected is reset or
/// left waiting, and the address can be had again while the worker still hangs.
#[test]
fn a_listener_of_a_worker_that_hangs_is_served_and_closed_by_the_pool() {
    for what in [What::Listener, What::Pool, What::PoolFirst, What::Reactor] {
        for hangs in [Hangs::Before, Hangs::AtTheStop] {
            stop_with_one_that_hangs(Accepting::ByWorkers, what, hangs);
        }
    }
}

/// The same where connections are passed: what a worker that hangs has not answered is given
/// to the others, which are not told to end before.
#[test]
fn what_a_worker_has_that_hangs_at_a_stop_is_served_by_the_others() {
    for what in [What::Listener, What::Pool, What::PoolFirst, What::Reactor] {
        for hangs in [Hangs::Before, Hangs::AtTheStop] {
            stop_with_one_that_hangs(Accepting::ByPool, what, hangs);
        }
    }
}

/// Who comes while the listener is being closed, and others have closed theirs already, is at
/// the worker that hangs, and served by the others: our own socket, on which nobody accepts,
/// is gone by then.
#[test]
fn whoever_comes_while_a_listener_is_closed_is_served() {
    let mut settings = PoolSettings::default().workers(3);
    settings.accepting = Accepting::ByWorkers;
    settings.slow_after = Duration::from_secs(1);
    settings.ack_timeout = Duration::from_secs(5);
    let Scene {
        mut reactor,
        pool,
        listener,
        address,
        victim,
        ledger,
        _directory,
    } = Scene::new(settings);
    assert_eq!(listening_at(address), 4, "its own, and one for each worker");
    let listener = reactor.get(listener).unwrap();
    listener.stop_listening_when_drained();
    run_until_within(PATIENCE, &mut reactor, &pool, |_| {
        listening_at(address) <= 2
    });
    let clients = Clients::start(&mut reactor, vec![address], CLIENTS, CLIENTS as usize);
    run_until_within(PATIENCE, &mut reactor, &pool, |_| clients.are_done());
    assert_eq!(clients.outcome.borrow().failed.len(), 0, "{pool:?}");
    run_until_within(PATIENCE, &mut reactor, &pool, |_| {
        listening_at(address) == 0
    });
    signal(victim, Signal::CONT);
    end(&mut reactor, &pool);
    drop((pool, reactor, clients));
    ledger.assert_balanced();
}

/// How many sockets listen at an address of IPv4.
fn listening_at(address: SocketAddr) -> usize {
    let port = format!(":{:04X}", address.port());
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let sockets = table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>());
    sockets
        .filter(|it| it.len() > 3 && it[1].ends_with(&port) && it[3] == "0A")
        .count()
}

/// The reactor stops before its pool: at the deadline, or since it is told to stop at once.
/// What hangs then is killed, also where it was recalled; nobody would be there to do so later.
#[test]
fn a_worker_that_hangs_does_not_outlive_the_stop_of_the_reactor() {
    for accepting in [Accepting::ByPool, Accepting::ByWorkers] {
        for (deadline, is_recalled) in [(0, false), (10, false), (300, false), (60_000, true)] {
            let mut settings = PoolSettings::default().workers(2).accepting(accepting);
            settings.ack_timeout = Duration::from_millis(100);
            let mut scene = Scene::new(settings);
            let (reactor, pool) = (&mut scene.reactor, &scene.pool);
            let mut clients = Vec::new();
            if is_recalled {
                clients.extend((0..20).map(|_| TcpStream::connect(scene.address).unwrap()));
                run_until_within(PATIENCE, reactor, pool, |_| pool.statistics().recalls == 1);
            }
            reactor.call_later(Duration::ZERO, move |reactor| {
                let stop = GracefulStop::new().deadline(Duration::from_millis(deadline));
                reactor.stop_gracefully(stop).unwrap();
            });
            // The longest is cut short.
            reactor.call_later(Duration::from_millis(500), |reactor| {
                reactor.stop_now().unwrap();
            });
            reactor.run().unwrap();
            assert!(has_ended(scene.victim), "{accepting:?}, {deadline} ms");
            drop((scene.pool, scene.reactor, clients));
            scene.ledger.assert_balanced();
        }
    }
}

/// Whether a child that was stopped ends: somebody has killed it.
fn has_ended(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(5) {
        match waitpid(pid, WaitOptions::NOHANG) {
            Ok(None) => std::thread::yield_now(),
            Ok(Some((_, status))) => return status.signaled(),
            // The pool has waited for it.
            Err(error) => return error == Errno::CHILD,
        }
    }
    false
}
