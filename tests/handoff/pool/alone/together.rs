//! Several connections in one message, and their answer.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;

use bowline::handoff::channel::Role;
use bowline::handoff::pool::{
    FromWorker, PoolSettings, ToWorker, Undelivered, WorkerRefusal, WorkerSettings,
};

use super::super::raw::{dispatch, hello_of_today, refused};
use super::desk::{Desk, Told};
use super::{Stage, Staged, ms, settings};
use crate::support::socketpair;

/// Workers that know such messages.
fn serving(workers: usize) -> Stage {
    serving_by(settings(workers), workers)
}

fn serving_by(settings: PoolSettings, workers: usize) -> Stage {
    let mut stage = Stage::starting(settings);
    for place in 0..workers {
        stage.hand(place).greet_anew();
    }
    stage.settle();
    stage
}

/// The numbers and labels of the connections in a message of several, and their
/// descriptors.
#[track_caller]
fn several((message, fds): (ToWorker, Vec<OwnedFd>)) -> (Vec<(u64, u32)>, Vec<OwnedFd>) {
    let ToWorker::DispatchAll(all) = message else {
        panic!("{message:?}")
    };
    let all = all.iter().map(|it| (it.id, it.label)).collect();
    (all, fds)
}

#[test]
fn connections_of_one_turn_share_a_message_and_each_is_answered() {
    let mut stage = serving(1);
    stage.dispatch([7, 8, 9]);
    let mut heard = stage.hand(0).heard();
    assert_eq!(heard.len(), 1, "{heard:?}");
    let (all, fds) = several(heard.remove(0));
    assert_eq!(all, [(1, 7), (2, 8), (3, 9)]);
    // In the order of the connections.
    assert_eq!(fds.len(), 3);
    for (client, fd) in stage.clients.iter_mut().zip(fds) {
        client.write_all(b"own").unwrap();
        let mut bytes = [0; 4];
        let count = StdUnixStream::from(fd).read(&mut bytes).unwrap();
        assert_eq!(&bytes[..count], b"own");
    }
    assert_eq!(stage.pool.statistics().in_flight, 3);
    let (ids, live) = (vec![1, 3], 2);
    stage.say(0, FromWorker::AcceptedAll { ids, live });
    stage.refuse(0, 2, WorkerRefusal::Unwanted);
    let statistics = stage.pool.statistics();
    assert_eq!((statistics.sent, statistics.in_flight), (3, 0));
    assert_eq!((statistics.acknowledged, statistics.refused), (2, 1));
    let why = Undelivered::Refused(WorkerRefusal::Unwanted);
    assert_eq!(stage.undelivered(), [(8, why)]);
    // Alone it has a message of the usual form.
    stage.dispatch([5]);
    assert_eq!(stage.hand(0).labels(), [5]);
}

#[test]
fn what_was_not_answered_of_a_message_goes_to_others() {
    let mut stage = serving(2);
    stage.dispatch(0..6);
    let (all, _fds) = several(stage.hand(0).heard().remove(0));
    assert_eq!(all, [(1, 0), (3, 2), (5, 4)]);
    let (ids, live) = (vec![3], 1);
    stage.say(0, FromWorker::AcceptedAll { ids, live });
    drop(stage.hand(1).heard());
    stage.end(0);
    let (all, _fds) = several(stage.hand(1).heard().remove(0));
    assert_eq!(all, [(7, 0), (8, 4)]);
    assert_eq!(stage.pool.statistics().resent, 2);
}

/// A message that the channel does not take: its connections go to another worker, in their
/// order and before what came later, and count as never given.
#[test]
fn what_a_channel_refuses_of_a_turn_goes_to_others_as_if_it_had_never_been_given() {
    let mut settings = settings(2);
    settings.max_attempts = 1;
    let mut stage = serving_by(settings, 2);
    stage.let_wait(0, 1);
    stage.dispatch(0..6);
    let heard = stage.hand(0).heard();
    assert!(heard.is_empty(), "{heard:?}");
    let mut heard = stage.hand(1).heard();
    assert_eq!(heard.len(), 2, "{heard:?}");
    let (others, _fds) = several(heard.pop().unwrap());
    let labels: Vec<_> = others.iter().map(|(_, label)| *label).collect();
    assert_eq!(labels, [0, 2, 4], "what the first was to have");
    let statistics = stage.pool.statistics();
    assert_eq!((statistics.sent, statistics.in_flight), (6, 6));
    assert_eq!((statistics.waiting, statistics.resent), (0, 0));
    assert_eq!(stage.undelivered(), []);
    // It is asked again after a while.
    stage.let_wait(0, 100);
    stage.pass(ms(120));
    stage.dispatch([6, 7]);
    assert_eq!(stage.hand(0).labels(), [6], "by turns again");
}

#[test]
fn long_connections_have_messages_of_their_own() {
    let mut stage = serving(1);
    for length in [10, 12_000, 12_000, 1, 40_000, 1] {
        let mut connection = stage.connection(length);
        connection.read = vec![b'r'; length as usize];
        stage.pool.dispatch(&mut stage.reactor, connection);
    }
    stage.settle();
    let heard = stage.hand(0).heard().into_iter();
    let lengths = heard.map(|(message, fds)| {
        let all = match message {
            ToWorker::Dispatch(one) => vec![one],
            ToWorker::DispatchAll(all) => all,
            other => panic!("{other:?}"),
        };
        assert_eq!(all.len(), fds.len());
        all.iter().map(|it| it.read.len()).collect::<Vec<_>>()
    });
    let wanted = [vec![10, 12_000], vec![12_000, 1], vec![40_000], vec![1]];
    assert_eq!(lengths.collect::<Vec<_>>(), wanted);
}

/// The word that it is to end comes behind what it was given before.
#[test]
fn connections_leave_before_their_worker_is_told_to_end() {
    let mut stage = serving(2);
    for label in [1, 2, 3] {
        let connection = stage.connection(label);
        stage.pool.dispatch(&mut stage.reactor, connection);
    }
    let worker = stage.hand(0).id;
    stage.pool.retire(&mut stage.reactor, worker, ms(700));
    stage.settle();
    let heard = stage.hand(0).heard();
    let is_in_order = matches!(
        &heard[..],
        [
            (ToWorker::DispatchAll(_), fds),
            (ToWorker::Drain { within_ms: 700 }, _)
        ] if fds.len() == 2
    );
    assert!(is_in_order, "{heard:?}");
}

/// It is not known to the pool when the connection is given out.
#[test]
fn connections_for_a_channel_that_has_ended_go_to_others() {
    let mut stage = serving(2);
    for label in [1, 2, 3, 4] {
        let connection = stage.connection(label);
        stage.pool.dispatch(&mut stage.reactor, connection);
    }
    stage.hand(0).exit(0);
    stage.hand(0).hang_up();
    stage.settle();
    let heard = stage.hand(1).heard().into_iter();
    let mut labels: Vec<u32> = heard
        .flat_map(|(message, _)| match message {
            ToWorker::Dispatch(one) => vec![one.label],
            ToWorker::DispatchAll(all) => all.iter().map(|it| it.label).collect(),
            other => panic!("{other:?}"),
        })
        .collect();
    labels.sort_unstable();
    assert_eq!(labels, [1, 2, 3, 4]);
}

/// A pool by hand that sends such messages.
fn desk(settings: WorkerSettings) -> Desk {
    let mut desk = Desk::silent(settings, |_| ());
    desk.pool
        .send(&hello_of_today(Role::DISPATCHER), &[])
        .unwrap();
    desk.settle();
    desk
}

/// Gives it so many in one message.
fn give(desk: &mut Desk, ids: std::ops::RangeInclusive<u64>, fds: &[OwnedFd]) {
    let all = ids.map(|id| {
        let mut one = dispatch(id, b"");
        one.label = id as u32;
        one
    });
    let message = ToWorker::DispatchAll(all.collect());
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    desk.pool.send(&message, &fds).unwrap();
    desk.settle();
}

fn connections(desk: &mut Desk, count: usize) -> Vec<OwnedFd> {
    let pairs = (0..count).map(|_| socketpair());
    let (clients, accepted): (Vec<_>, Vec<_>) = pairs.unzip();
    desk.clients.extend(clients);
    accepted.into_iter().map(OwnedFd::from).collect()
}

#[test]
fn a_worker_answers_a_message_of_several_at_once_and_each_refusal_by_itself() {
    let mut desk = desk(WorkerSettings::default().max_live(Some(2)));
    let mut fds = connections(&mut desk, 4);
    let (pipe, _other) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    fds[1] = pipe;
    give(&mut desk, 1..=4, &fds);
    let (ids, live) = (vec![1, 3], 2);
    let said = [
        refused(2, WorkerRefusal::WrongKind, 1),
        refused(4, WorkerRefusal::Overloaded, 2),
        FromWorker::AcceptedAll { ids, live },
    ];
    assert_eq!(desk.said(), said);
    let told = [
        Told::Admit(1),
        Told::Admit(3),
        Told::Serve(1),
        Told::Serve(3),
    ];
    assert_eq!(desk.told(), told);
    assert_eq!(desk.worker.live(), 2);
}

#[test]
fn a_panic_over_one_of_a_message_leaves_the_others() {
    let mut desk = desk(WorkerSettings::default());
    *desk.service.panics_at.borrow_mut() = Some(Told::Serve(1));
    let fds = connections(&mut desk, 3);
    give(&mut desk, 1..=3, &fds);
    let told = desk.told();
    let served: Vec<_> = told
        .iter()
        .filter(|it| matches!(it, Told::Serve(_)))
        .collect();
    assert_eq!(served, [&Told::Serve(1), &Told::Serve(2), &Told::Serve(3)]);
    assert_eq!(desk.worker.live(), 2);
}

/// What a pool says in a message that does not have as many descriptors as it lists.
#[test]
fn a_connection_without_its_descriptor_is_refused() {
    let mut desk = desk(WorkerSettings::default());
    let fds = connections(&mut desk, 1);
    give(&mut desk, 1..=2, &fds);
    let (ids, live) = (vec![1], 1);
    let said = [
        refused(2, WorkerRefusal::WrongKind, 1),
        FromWorker::AcceptedAll { ids, live },
    ];
    assert_eq!(desk.said(), said);
}
