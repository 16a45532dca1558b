//! To whom a connection is given, and what of it arrives.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::rc::Rc;

use bowline::handoff::pool::{
    Candidate, FromWorker, Offer, PassedConnection, Spawned, ToWorker, Undelivered, WorkerRefusal,
    WorkerStage,
};
use bowline::{Address, Reactor, Transports};
use bowline::{Tcp, Unix};

use super::{Stage, Staged, settings, with};
use crate::support::run_until;

/// Writes through one end of a connection, and reads at the other.
#[track_caller]
fn assert_joined(mut one: &StdUnixStream, other: std::os::fd::OwnedFd) {
    one.write_all(b"through").unwrap();
    let mut other = StdUnixStream::from(other);
    other.set_nonblocking(true).unwrap();
    let mut bytes = [0; 7];
    other.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"through");
}

#[test]
fn workers_are_started_at_once_and_take_connections_when_they_have_said_hello() {
    let mut stage = Stage::starting(settings(3));
    assert_eq!(stage.started(), 3);
    let names: Vec<_> = (0..3)
        .map(|place| stage.hand(place).id.to_string())
        .collect();
    assert_eq!(names, ["worker 1", "worker 2", "worker 3"]);
    let statistics = stage.pool.statistics();
    assert_eq!((statistics.started, statistics.deaths), (3, 0));
    let workers: Vec<_> = statistics
        .workers
        .iter()
        .map(|worker| (worker.id.to_string(), worker.pid, worker.stage))
        .collect();
    let starting = |name: &str, pid| (name.to_owned(), pid, WorkerStage::Starting);
    assert_eq!(
        workers,
        [
            starting("worker 1", 101),
            starting("worker 2", 102),
            starting("worker 3", 103)
        ]
    );
    assert!(!stage.has_room());
    assert_eq!(stage.events(), [""; 0]);
    // They say nothing of themselves: what waits is given when one is there.
    stage.dispatch([7]);
    assert_eq!(stage.pool.statistics().waiting, 1);
    stage.hand(1).greet();
    stage.settle();
    assert_eq!(stage.events(), ["worker 2 ready, 102"]);
    assert_eq!(stage.stage_of(0), WorkerStage::Starting);
    assert_eq!(stage.stage_of(1), WorkerStage::Serving);
    assert_eq!(stage.hand(1).labels(), [7]);
    assert!(stage.has_room());
}

#[test]
fn a_connection_arrives_with_all_that_is_known_of_it() {
    let mut stage = Stage::serving(settings(1));
    let mut connection = stage.connection(9);
    connection.peer = Some(SocketAddr::from(([192, 0, 2, 1], 80)));
    connection.read = b"read".to_vec();
    connection.unsent = b"unsent".to_vec();
    stage.pool.dispatch(&mut stage.reactor, connection);
    stage.settle();
    let mut heard = stage.hand(0).heard();
    let (message, mut fds) = heard.pop().expect("it was given");
    let ToWorker::Dispatch(dispatch) = message else {
        panic!("{message:?}")
    };
    assert_eq!((dispatch.id, dispatch.label), (1, 9));
    assert_eq!(dispatch.peer, Some(SocketAddr::from(([192, 0, 2, 1], 80))));
    assert_eq!(
        (&*dispatch.read, &*dispatch.unsent),
        (&b"read"[..], &b"unsent"[..])
    );
    assert_joined(&stage.clients[0], fds.pop().expect("one"));
    // Until it is answered, the pool has a copy too; then nobody but the worker.
    let mut client = &stage.clients[0];
    assert!(client.read(&mut [0; 1]).is_err());
    stage.accept(0, 1, 1);
    let mut client = &stage.clients[0];
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn connections_go_round_and_each_answer_is_counted() {
    let mut stage = Stage::serving(settings(2));
    stage.dispatch(0..5);
    assert_eq!(stage.hand(0).given(), [(1, 0), (3, 2), (5, 4)]);
    assert_eq!(stage.hand(1).given(), [(2, 1), (4, 3)]);
    let statistics = stage.pool.statistics();
    assert_eq!((statistics.sent, statistics.in_flight), (5, 5));
    assert_eq!((statistics.acknowledged, statistics.refused), (0, 0));

    // In whatever order the answers come.
    stage.accept(0, 3, 17);
    assert_eq!(stage.worker(0).in_flight, 2);
    stage.accept(0, 1, 18);
    stage.refuse(0, 5, WorkerRefusal::Unwanted);
    stage.accept(1, 2, 4);
    let statistics = stage.pool.statistics();
    // The one that was refused went to the other.
    assert_eq!((statistics.sent, statistics.in_flight), (6, 2));
    assert_eq!((statistics.acknowledged, statistics.refused), (3, 1));
    let (first, second) = (stage.worker(0), stage.worker(1));
    assert_eq!((first.in_flight, first.live), (0, 0));
    assert_eq!((first.acknowledged, first.refused), (2, 1));
    assert_eq!((second.in_flight, second.live), (2, 4));
    assert_eq!((second.acknowledged, second.refused), (1, 0));
    stage.say(1, FromWorker::Load { live: 3 });
    assert_eq!(stage.worker(1).live, 3);
    assert_eq!(stage.worker(1).in_flight, 2);
    assert_eq!(stage.hand(1).given(), [(6, 4)]);
}

#[test]
fn an_answer_to_what_was_not_given_changes_nothing() {
    let mut stage = Stage::serving(settings(2));
    stage.dispatch([1, 2]);
    let before = stage.pool.statistics();
    // Given to the other, and to nobody.
    stage.accept(0, 2, 0);
    stage.refuse(0, 99, WorkerRefusal::Unwanted);
    assert_eq!(stage.pool.statistics(), before);
    stage.accept(0, 1, 0);
    stage.accept(1, 2, 0);
    // Once is enough.
    stage.accept(1, 2, 0);
    assert_eq!(stage.pool.statistics().acknowledged, 2);
    assert_eq!(stage.undelivered(), []);
}

#[test]
fn descriptors_that_a_worker_sends_are_closed_and_counted() {
    let mut stage = Stage::serving(settings(1));
    stage.dispatch([1]);
    let answer = FromWorker::Accepted { id: 1, live: 1 };
    let file = std::fs::File::open("/proc/self/comm").unwrap();
    stage.hand(0).say_with(&answer, &[file.as_fd()]);
    stage.settle();
    assert_eq!(stage.reactor.descriptor_counts().unclaimed, 1);
    assert_eq!(stage.pool.statistics().acknowledged, 1);
}

#[test]
fn those_that_wait_go_first_and_in_their_order() {
    let mut stage = Stage::serving(with(1, |it| it.window = 2));
    stage.dispatch(0..6);
    assert_eq!(stage.hand(0).given(), [(1, 0), (2, 1)]);
    assert_eq!(stage.pool.statistics().waiting, 4);
    stage.accept(0, 2, 1);
    assert_eq!(stage.hand(0).given(), [(3, 2)]);
    stage.accept(0, 3, 1);
    stage.accept(0, 1, 1);
    assert_eq!(stage.hand(0).given(), [(4, 3), (5, 4)]);
    stage.dispatch([6]);
    stage.accept(0, 4, 1);
    stage.accept(0, 5, 1);
    assert_eq!(stage.hand(0).given(), [(6, 5), (7, 6)]);
    assert_eq!(stage.pool.statistics().waiting, 0);
}

/// What policies are shown.
type Shown = Rc<RefCell<Vec<(String, Vec<(String, u32, usize, usize)>)>>>;

#[test]
fn a_policy_is_shown_the_connection_and_those_that_can_take_it() {
    let mut settings = settings(3);
    settings.window = 2;
    let shown = Shown::default();
    let seen = Rc::clone(&shown);
    let policy = move |offer: &Offer<'_>, candidates: &[Candidate]| {
        let Offer {
            label, peer, read, ..
        } = *offer;
        let read = String::from_utf8_lossy(read);
        let candidates = candidates.iter().map(|candidate| {
            let name = candidate.worker.to_string();
            (name, candidate.live, candidate.in_flight, candidate.window)
        });
        let offered = format!("{label} {peer:?} {read}");
        seen.borrow_mut().push((offered, candidates.collect()));
        // The third of three, and none where the first is not among them.
        (label != 40).then_some(label as usize % 10)
    };
    let mut stage = Stage::with_policy(settings, policy);
    stage.hand(0).greet();
    stage.hand(2).greet();
    stage.settle();
    stage.dispatch([11]);
    stage.accept(2, 1, 5);
    assert_eq!(stage.hand(2).labels(), [11]);
    let mut connection = stage.connection(10);
    connection.peer = Some(SocketAddr::from(([192, 0, 2, 1], 80)));
    connection.read = b"GET".to_vec();
    stage.pool.dispatch(&mut stage.reactor, connection);
    let (first, third) = ("worker 1".to_owned(), "worker 3".to_owned());
    assert_eq!(
        shown.take(),
        [
            (
                "11 None ".to_owned(),
                vec![(first.clone(), 0, 0, 2), (third.clone(), 0, 0, 2)]
            ),
            (
                "10 Some(192.0.2.1:80) GET".to_owned(),
                vec![(first, 0, 0, 2), (third.clone(), 5, 0, 2)]
            ),
        ]
    );
    stage.dispatch([10]);
    shown.take();
    // The first is at its window.
    stage.dispatch([30]);
    assert_eq!(shown.take()[0].1, [(third, 5, 0, 2)]);
    assert_eq!(stage.hand(2).labels(), [30]);
    // Nobody is chosen, and then one that is not there: they wait, and who comes
    // after them too.
    stage.dispatch([40, 17, 30]);
    assert_eq!(stage.pool.statistics().waiting, 3);
    assert!(!stage.has_room());
    assert_eq!(stage.hand(2).labels(), [0_u32; 0]);
    // Asked again whenever something happens.
    stage.accept(0, 2, 0);
    assert_eq!(stage.hand(0).labels(), [10, 10, 30]);
    assert_eq!(stage.pool.statistics().waiting, 2);
}

#[test]
fn what_nobody_took_comes_back_whole_and_alive() {
    let mut stage = Stage::starting(with(1, |it| it.queue = 0));
    let back = Rc::new(RefCell::new(Vec::new()));
    let kept = Rc::clone(&back);
    stage
        .pool
        .on_undelivered(move |_, connection, why| kept.borrow_mut().push((connection, why)));
    for label in [3, 4] {
        let mut connection = stage.connection(label);
        connection.peer = Some(SocketAddr::from(([192, 0, 2, 1], 80)));
        connection.read = b"read".to_vec();
        connection.unsent = b"unsent".to_vec();
        stage.pool.dispatch(&mut stage.reactor, connection);
    }
    assert_eq!(back.borrow().len(), 0, "inside of the call");
    stage.settle();
    assert_eq!(stage.pool.statistics().undelivered, 2);
    for (label, (connection, why)) in [3, 4].into_iter().zip(back.take()) {
        assert_eq!((connection.label, why), (label, Undelivered::QueueFull));
        assert_eq!(
            connection.peer,
            Some(SocketAddr::from(([192, 0, 2, 1], 80)))
        );
        assert_eq!(
            (&*connection.read, &*connection.unsent),
            (&b"read"[..], &b"unsent"[..])
        );
        assert_joined(&stage.clients[label as usize - 3], connection.fd);
    }
}

#[test]
fn handlers_may_set_others_and_are_kept_otherwise() {
    let mut stage = Stage::starting(with(2, |it| it.queue = 0));
    let told = Rc::new(RefCell::new(Vec::new()));
    let (first, pool) = (Rc::clone(&told), stage.pool.clone());
    stage.pool.on_undelivered(move |_, connection, _| {
        first.borrow_mut().push((1, connection.label));
        if connection.label == 1 {
            let second = Rc::clone(&first);
            pool.on_undelivered(move |_: &mut Reactor, connection: PassedConnection, _| {
                second.borrow_mut().push((2, connection.label));
            });
        }
    });
    stage.dispatch([0, 1, 2, 3]);
    assert_eq!(told.take(), [(1, 0), (1, 1), (2, 2), (2, 3)]);
    let (first, pool) = (Rc::clone(&told), stage.pool.clone());
    stage.pool.on_event(move |_, _| {
        first.borrow_mut().push((1, 0));
        let second = Rc::clone(&first);
        pool.on_event(move |_, _| second.borrow_mut().push((2, 0)));
    });
    stage.greet_all();
    assert_eq!(told.take(), [(1, 0), (2, 0)]);
    // The handlers have the pool.
    stage.pool.on_undelivered(|_, _, _| {});
    stage.pool.on_event(|_, _| {});
}

#[test]
fn without_a_handler_what_nobody_took_is_closed() {
    let mut settings = settings(1);
    settings.queue = 0;
    let _ledger = crate::support::DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let none = |_: &mut Reactor, _| Err::<Spawned, _>(std::io::ErrorKind::NotFound.into());
    let pool = bowline::handoff::pool::Pool::start(&mut reactor, settings, none);
    let (mut client, accepted) = crate::support::socketpair();
    pool.dispatch(&mut reactor, PassedConnection::new(accepted.into()));
    crate::support::settle(&mut reactor);
    assert_eq!(pool.statistics().undelivered, 1);
    client.set_nonblocking(false).unwrap();
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn listeners_wait_while_nobody_has_room_and_label_what_they_accept() {
    let mut stage = Stage::starting(with(1, |it| it.window = 2));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let reactor = &mut stage.reactor;
    let tcp = reactor.accept(Tcp::at(any), stage.pool.acceptor(5));
    let tcp = reactor.get(tcp.unwrap()).unwrap().address();
    let Address::Inet(tcp) = tcp else {
        panic!("{tcp:?}")
    };
    let unix = reactor.accept(Unix::at(&path), stage.pool.acceptor(6));
    unix.unwrap();
    stage.settle();
    assert!(stage.pool.statistics().is_paused);
    let first = std::net::TcpStream::connect(tcp).unwrap();
    let second = StdUnixStream::connect(&path).unwrap();
    stage.pass(super::ms(1_000));
    let statistics = stage.pool.statistics();
    assert_eq!((statistics.waiting, statistics.undelivered), (0, 0));

    stage.greet_all();
    let pool = stage.pool.clone();
    run_until(&mut stage.reactor, |_| pool.statistics().sent == 2);
    stage.settle();
    let mut heard: Vec<_> = stage
        .hand(0)
        .heard()
        .into_iter()
        .map(|(message, _)| match message {
            ToWorker::Dispatch(dispatch) => (dispatch.label, dispatch.peer),
            other => panic!("{other:?}"),
        })
        .collect();
    heard.sort();
    let address = first.local_addr().unwrap();
    assert_eq!(heard, [(5, Some(address)), (6, None)]);
    // At its window again, until it answers.
    assert!(stage.pool.statistics().is_paused);
    let third = std::net::TcpStream::connect(tcp).unwrap();
    stage.settle();
    assert_eq!(stage.pool.statistics().sent, 2);
    stage.accept(0, 1, 1);
    run_until(&mut stage.reactor, |_| pool.statistics().sent == 3);
    stage.settle();
    stage.accept(0, 2, 1);
    stage.settle();
    assert!(!stage.pool.statistics().is_paused);
    drop((first, second, third));
}
