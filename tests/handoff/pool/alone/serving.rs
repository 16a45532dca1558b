//! A worker alone: what it takes, when it begins, what it reports.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::time::Duration;

use bowline::Reactor;
use bowline::error::AdoptErrorKind;
use bowline::handoff::pool::{
    Dispatch, FromWorker, Orphans, ToWorker, Worker, WorkerRefusal, WorkerSettings,
};
use rustix::process::{Resource, Rlimit, setrlimit};

use super::super::raw::{dispatch, refused};
use super::desk::{Desk, Keeping, Told};
use super::{Staged, ms};
use crate::support::own_process::{in_own_process, leave_free};
use crate::support::{DescriptorLedger, row, socketpair};

fn limited(max_live: u32) -> WorkerSettings {
    let mut settings = WorkerSettings::default();
    settings.max_live = Some(max_live);
    settings
}

#[test]
fn a_connection_is_served_with_all_that_was_said_of_it() {
    let mut desk = Desk::new(WorkerSettings::default());
    let (mut client, accepted) = socketpair();
    let message = Dispatch {
        id: 12,
        label: 34,
        peer: Some(SocketAddr::from(([192, 0, 2, 1], 80))),
        read: b"read".to_vec(),
        unsent: b"unsent".to_vec(),
        is_recalled: true,
        moved: None,
    };
    desk.pool.send(&message, &[accepted.as_fd()]).unwrap();
    drop(accepted);
    desk.settle();
    assert_eq!(desk.said(), [FromWorker::Accepted { id: 12, live: 1 }]);
    assert_eq!(desk.told(), [Told::Admit(34), Told::Serve(34)]);
    assert_eq!(desk.worker.live(), 1);
    let (connection, live) = desk.service.kept.borrow_mut().remove(0);
    assert_eq!(connection.label, 34);
    assert_eq!(connection.peer, message.peer);
    assert!(connection.is_recalled);
    assert_eq!(
        (connection.read, connection.unsent),
        (message.read, message.unsent)
    );
    StdUnixStream::from(connection.fd)
        .write_all(b"through")
        .unwrap();
    let mut bytes = [0; 7];
    client.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"through");
    assert_eq!(format!("{live:?}"), "Live(1)");
    drop(live);
    assert_eq!(desk.worker.live(), 0);
}

#[test]
fn a_worker_takes_as_many_as_it_may() {
    let mut desk = Desk::new(limited(2));
    desk.send([1, 2, 3]);
    let overloaded = |id| FromWorker::Refused {
        id,
        reason: WorkerRefusal::Overloaded,
        live: 2,
    };
    let accepted = |id, live| FromWorker::Accepted { id, live };
    assert_eq!(desk.said(), [accepted(1, 1), accepted(2, 2), overloaded(3)]);
    assert_eq!(
        desk.told(),
        [
            Told::Admit(1),
            Told::Admit(2),
            Told::Serve(1),
            Told::Serve(2)
        ]
    );
    desk.end_one();
    desk.send([4, 5]);
    assert_eq!(desk.said(), [accepted(4, 2), overloaded(5)]);
    // None at all, if that is said.
    let mut none = {
        drop(desk);
        Desk::new(limited(0))
    };
    none.send([1]);
    let said = none.said();
    assert!(matches!(
        said[..],
        [FromWorker::Refused {
            reason: WorkerRefusal::Overloaded,
            live: 0,
            ..
        }]
    ));
}

#[test]
fn the_service_refuses_with_its_reason() {
    let mut desk = Desk::new(WorkerSettings::default());
    let reason = WorkerRefusal::Unwanted;
    desk.service.refuses.set(Some(reason));
    desk.send([1]);
    let live = 0;
    assert_eq!(desk.said(), [refused(1, reason, live)]);
    assert_eq!(desk.told(), [Told::Admit(1)]);
    // Its copy is closed; so the client sees the end.
    assert_eq!(desk.clients[0].read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn a_descriptor_that_finds_no_number_is_said_to_be_lost() {
    let name = "a_descriptor_that_finds_no_number_is_said_to_be_lost";
    in_own_process(module_path!(), name, || {
        let mut desk = Desk::new(WorkerSettings::default());
        desk.settle();
        let (_client, accepted) = socketpair();
        desk.pool
            .send(&dispatch(1, b""), &[accepted.as_fd()])
            .unwrap();
        leave_free(0);
        desk.settle();
        let (reason, live) = (WorkerRefusal::DescriptorLost, 0);
        assert_eq!(desk.said(), [refused(1, reason, live)]);
        assert_eq!(desk.told(), []);
        let limit = Some(1_000);
        let (current, maximum) = (limit, limit);
        setrlimit(Resource::Nofile, Rlimit { current, maximum }).unwrap();
    });
}

#[test]
fn a_channel_that_is_none_is_given_back() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let file = File::open("/proc/self/comm").unwrap();
    let settings = WorkerSettings::default();
    let started = Worker::start(
        &mut reactor,
        OwnedFd::from(file),
        settings,
        Keeping::default(),
    );
    let error = started.expect_err("it is a file");
    assert!(
        matches!(error.kind, AdoptErrorKind::NotASocket),
        "{error:?}"
    );
}

/// Of those that are promised, each is begun when its own answer has left, and at that
/// moment: the clock stands.
#[test]
fn a_connection_is_begun_when_its_answer_has_left() {
    const ANSWER: u64 = 20;
    let mut desk = Desk::narrow(WorkerSettings::default());
    // The hello of the worker.
    assert_eq!(desk.said(), []);
    for id in 1..=30 {
        desk.send([id]);
    }
    let served = |desk: &Desk| desk.service.kept.borrow().len() as u64;
    let unread = |desk: &Desk| rustix::io::ioctl_fionread(&desk.pool.socket).unwrap();
    let mut read = 0;
    assert!(served(&desk) > 0, "there was room for none");
    assert!(served(&desk) < 30, "there was room for all");
    let printed = format!("{:?}", desk.worker);
    let promised = 30 - served(&desk);
    let expected = format!("Worker {{ live: 30, promised: {promised}, .. }}");
    assert_eq!(printed, expected);
    while served(&desk) < 30 {
        assert_eq!(served(&desk), (read + unread(&desk)) / ANSWER);
        (&desk.pool.socket)
            .read_exact(&mut [0; ANSWER as usize])
            .unwrap();
        read += ANSWER;
        desk.settle();
    }
    assert_eq!(desk.worker.live(), 30);
}

/// A service that panics while it begins to serve one, and while it is told to drain:
/// others are served all the same, and the worker ends.
#[test]
fn a_service_that_panics_costs_one_connection() {
    let mut desk = Desk::new(WorkerSettings::default());
    desk.service.panics_at.replace(Some(Told::Serve(2)));
    desk.send(1..=4);
    let served: Vec<_> = (1..=4).map(Told::Serve).collect();
    assert_eq!(desk.told()[4..], served);
    assert_eq!(desk.reactor.statistics().panics, 1);
    assert_eq!(desk.worker.live(), 3);
    let within = ms(1_000);
    desk.service.panics_at.replace(Some(Told::Draining(within)));
    desk.drain(1_000);
    assert_eq!(desk.reactor.statistics().panics, 2);
    desk.service.kept.borrow_mut().clear();
    desk.jump(ms(10));
    assert_eq!(desk.told(), [Told::Draining(within), Told::Drained]);
}

#[test]
fn what_could_not_be_answered_is_served_or_closed_as_asked() {
    for (orphans, served) in [(Orphans::Serve, 1), (Orphans::Close, 0)] {
        let _row = row(orphans);
        let mut settings = WorkerSettings::default();
        settings.orphans = orphans;
        let mut desk = Desk::blocked(settings);
        desk.send([100]);
        assert_eq!(desk.told(), [Told::Admit(100)]);
        desk.pool.socket.shutdown(Shutdown::Both).unwrap();
        desk.settle();
        assert_eq!(desk.service.kept.borrow().len(), served);
        assert_eq!(desk.worker.live(), served as u32);
        let last = desk.told().pop();
        assert_eq!(last, Some(Told::Draining(Duration::from_secs(30))));
        let end = desk.clients[0].read(&mut [0; 1]);
        assert_eq!(end.is_ok(), orphans == Orphans::Close, "{end:?}");
    }
}

/// The pool lives, and gives to others what it has no answer for: of what it sent before,
/// what was answered by then is served, and nothing else, whatever orphans are to become.
#[test]
fn a_recalled_worker_serves_what_it_has_answered_and_nothing_else() {
    for orphans in [Orphans::Serve, Orphans::Close] {
        let mut settings = WorkerSettings::default();
        settings.orphans = orphans;
        let mut desk = Desk::new(settings);
        desk.send([1]);
        assert_eq!(desk.service.kept.borrow().len(), 1);
        // While it reads nothing, more is sent, it is recalled, and the channel ends.
        let (client, accepted) = socketpair();
        desk.pool
            .send(&dispatch(2, b""), &[accepted.as_fd()])
            .unwrap();
        desk.pool.send(&ToWorker::Recall, &[]).unwrap();
        desk.pool.socket.shutdown(Shutdown::Read).unwrap();
        desk.settle();
        assert_eq!(desk.service.kept.borrow().len(), 1);
        desk.pool.socket.shutdown(Shutdown::Write).unwrap();
        desk.settle();
        assert_eq!(desk.service.kept.borrow().len(), 1, "{orphans:?}");
        assert_eq!(desk.worker.live(), 1, "{orphans:?}");
        drop(accepted);
        let end = (&client).read(&mut [0; 1]);
        assert_eq!(end.unwrap(), 0, "its copy is closed");
        // It goes on with what it has, and ends.
        desk.end_one();
        desk.jump(ms(2_000));
        assert_eq!(desk.told().pop(), Some(Told::Drained));
    }
}

/// The pool has the answer, and so gives it to nobody else.
#[test]
fn what_was_answered_is_served_whatever_is_done_with_orphans() {
    let mut settings = WorkerSettings::default();
    settings.orphans = Orphans::Close;
    let mut desk = Desk::new(settings);
    desk.settle();
    let (client, accepted) = socketpair();
    desk.pool
        .send(&dispatch(1, b""), &[accepted.as_fd()])
        .unwrap();
    desk.pool.socket.shutdown(Shutdown::Write).unwrap();
    desk.settle();
    let said = desk.pool.receive().expect("an answer");
    assert_eq!(said, [FromWorker::Accepted { id: 1, live: 1 }]);
    assert_eq!(desk.service.kept.borrow().len(), 1);
    drop(client);
}

#[test]
fn nothing_is_begun_when_the_reactor_stops() {
    let mut desk = Desk::blocked(WorkerSettings::default());
    desk.send([100]);
    desk.reactor.call_soon(|reactor| reactor.stop().unwrap());
    desk.reactor.run().unwrap();
    assert_eq!(desk.told(), [Told::Admit(100)]);
    assert_eq!(desk.worker.live(), 0);
}

/// What the worker says when, in milliseconds.
#[track_caller]
fn expect_load(desk: &mut Desk, at: u64, live: u32) {
    desk.jump(ms(at) - Duration::from_nanos(1));
    assert_eq!(desk.said(), [], "too soon");
    desk.jump(Duration::from_nanos(1));
    assert_eq!(desk.said(), [FromWorker::Load { live }]);
}

#[test]
fn the_pool_learns_of_ends_soon_and_is_bothered_seldom() {
    let mut desk = Desk::new(WorkerSettings::default());
    desk.send(1..=5);
    assert_eq!(desk.said().len(), 5);
    desk.end_one();
    expect_load(&mut desk, 50, 4);
    // Seen after 50 ms more, then after twice that, and so on.
    desk.jump(ms(50));
    desk.end_one();
    expect_load(&mut desk, 100, 3);
    for wait in [50, 100, 200, 400, 800, 1_000, 1_000] {
        assert_eq!(desk.said(), []);
        desk.jump(ms(wait));
    }
    desk.end_one();
    expect_load(&mut desk, 1_000, 2);
    // One that comes has it look soon again; what it says then needs no report.
    for wait in [50, 100] {
        desk.jump(ms(wait));
    }
    desk.send([6]);
    assert_eq!(desk.said(), [FromWorker::Accepted { id: 6, live: 3 }]);
    desk.jump(ms(200));
    assert_eq!(desk.said(), []);
    desk.end_one();
    expect_load(&mut desk, 100, 2);
    desk.end_one();
    desk.end_one();
    expect_load(&mut desk, 50, 0);
    desk.jump(ms(10_000));
    assert_eq!(desk.said(), []);
    // And from the beginning.
    desk.send([7]);
    assert_eq!(desk.said().len(), 1);
    desk.end_one();
    expect_load(&mut desk, 50, 0);
    assert_eq!(desk.told().last(), Some(&Told::Serve(7)));
}

#[test]
fn without_connections_a_worker_does_not_look_for_ends() {
    let mut desk = Desk::new(WorkerSettings::default());
    desk.send([1]);
    desk.end_one();
    desk.jump(ms(50));
    assert_eq!(desk.said().len(), 2);
    assert_eq!(desk.reactor.next_deadline(), None);
}
