//! Frames that are almost right, at both ends of a restart, in any order and at any step.

use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener as StdUnixListener;

use bowline::handoff::channel::{Hello, Role};
use bowline::handoff::wire::{Message, encode_frame};
use bowline::testing::Random;

use super::wire::{
    Hand, Said, commit, connections, done, gives_up, go, listeners, live, nothing, number,
    offer_of, parted, prepared, ready, refused, serving, take, taken, takes_back,
};
use super::{Client, Server, Stage, Staged, ms};
use crate::mutated::{Kinds, mutate};
use crate::pool::raw::send_bytes;
use crate::support::figures::{Bound, Figures, scaled};
use crate::support::{settle, socketpair};

/// How many frames are mutated on one channel at the most: the first that is wrong ends it.
const MUTATED: usize = 4;

/// Longer than every limit of a restart.
const LONG: u64 = 60_000;

#[derive(Debug, Default)]
struct Seen {
    mutations: usize,
    /// Of the other end, while it was sent them.
    panics: usize,
    /// Refused as what they are not.
    refusals: usize,
    /// Restarts that came to their end all the same.
    ends: usize,
    /// Processes that did not serve, or were at it still, when all was over.
    stuck: usize,
}

/// Reliability T-21, of restarts: whatever a successor says, the one that serves goes on
/// or has handed over; whatever a predecessor says, the new one has taken over or says
/// that it has not.
#[test]
fn mutated_messages_do_no_harm_at_either_end_of_a_restart() {
    let wanted = scaled(2_000, 50_000);
    let seed = std::env::var("BOWLINE_SEED").map_or(1, |seed| seed.parse().expect("a number"));
    println!("BOWLINE_SEED={seed}");
    let mut random = Random::new(seed);
    let serving = at_the_one_that_serves(&mut random, wanted / 2);
    let new = at_the_one_that_is_new(&mut random, wanted - wanted / 2);
    Figures::of("T-21")
        .must(
            "mutations of what is said at restarts",
            serving.mutations + new.mutations,
            Bound::AtLeast,
            wanted,
        )
        .must(
            "panics at restarts",
            serving.panics + new.panics,
            Bound::Exactly,
            0,
        )
        .must(
            "processes that were left in the middle of one",
            serving.stuck + new.stuck,
            Bound::Exactly,
            0,
        )
        .must(
            "descriptors refused for their kind at restarts",
            new.refusals,
            Bound::AtLeast,
            wanted / 200,
        )
        .must(
            "hand-overs among them",
            serving.ends.min(new.ends),
            Bound::AtLeast,
            wanted / 400,
        );
}

/// Sends what is right.
fn send(hand: &Hand, message: &impl Message, fds: &[BorrowedFd<'_>]) -> bool {
    let mut frame = Vec::new();
    encode_frame(message, fds.len(), &mut frame).expect("it fits");
    send_bytes(&hand.socket, &frame, fds).is_ok()
}

/// Sends what was right; false when the other end is gone, or full.
fn send_mutated(
    random: &mut Random,
    hand: &Hand,
    message: &impl Message,
    fds: &[BorrowedFd<'_>],
) -> bool {
    let mut frame = Vec::new();
    encode_frame(message, fds.len(), &mut frame).expect("it fits");
    mutate(random, &mut frame);
    send_bytes(&hand.socket, &frame, fds).is_ok()
}

fn hello(role: Role) -> Hello {
    Hello {
        versions: 1..=1,
        role,
        pid: 7,
        max_payload: 1 << 20,
    }
}

/// Says hello, seldom not quite; whether that was one mutation.
fn greet(random: &mut Random, hand: &Hand, role: Role) -> usize {
    if random.chance(5) {
        send_mutated(random, hand, &hello(role), &[]);
        return 1;
    }
    send(hand, &hello(role), &[]);
    0
}

/// What a successor says at this step, or something else that it might.
fn of_successor(random: &mut Random, step: usize) -> Said {
    let at = match random.chance(70) {
        true => step,
        false => random.below(9),
    };
    let batch = random.below(3) as u32;
    match at {
        0 => take(random.below(2) as u32),
        1 => taken(batch),
        2 => ready(),
        3 => prepared(1 + batch, &[batch][..random.below(2)]),
        4 => live(1 + batch),
        5 => serving(),
        6 => parted(),
        7 => gives_up(),
        _ => number(0x0200 + random.below(32) as u16, random.any() as u32),
    }
}

/// One that serves, with clients that are to move.
struct Old {
    server: Server,
    clients: Vec<Client>,
    /// Last: nothing is open by then.
    stage: Stage,
}

impl Old {
    fn new() -> Self {
        Self::on(Stage::new())
    }

    /// As a first one, but that nothing of the stage is made anew: to count what is open
    /// waits for other threads, which on a busy machine are many.
    fn anew(self) -> Self {
        let Self {
            server,
            clients,
            mut stage,
        } = self;
        drop((server, clients));
        stage.reactor = bowline::Reactor::with_clock(stage.clock.clone()).expect("epoll");
        Self::on(stage)
    }

    fn on(mut stage: Stage) -> Self {
        let server = stage.begin("old", &["web"]);
        let clients = vec![stage.client("web")];
        Self {
            server,
            clients,
            stage,
        }
    }

    fn turn(&mut self) {
        settle(&mut self.stage.reactor);
    }
}

fn at_the_one_that_serves(random: &mut Random, wanted: usize) -> Seen {
    let mut seen = Seen::default();
    // What the thread has open before its first is gone by then.
    drop(Stage::new());
    let kinds = Kinds::new();
    let mut old = Old::new();
    while seen.mutations < wanted {
        let socket = std::os::unix::net::UnixStream::connect(old.stage.control());
        let hand = Hand::new(socket.expect("it listens"));
        seen.mutations += greet(random, &hand, Role::SUCCESSOR);
        old.turn();
        let depth = random.below(6);
        let right = [
            take(0),
            taken(0),
            ready(),
            prepared(1, &[]),
            live(1),
            serving(),
        ];
        for message in &right[..depth] {
            send(&hand, message, &[]);
            old.turn();
        }
        for step in depth..depth + 1 + random.below(MUTATED) {
            let fds = match random.chance(15) {
                true => kinds.some(random),
                false => Vec::new(),
            };
            seen.mutations += 1;
            let message = of_successor(random, step);
            if !send_mutated(random, &hand, &message, &fds) {
                break;
            }
            if random.chance(70) {
                old.turn();
            }
        }
        old.turn();
        // What it says is well formed, whatever it was told.
        hand.hears();
        drop(hand);
        old.turn();
        if old.server.restart.is_under_way() {
            old.stage.advance(ms(LONG));
        }
        let has_gone = old.server.restart.has_handed_over();
        seen.ends += usize::from(has_gone);
        let serves = old.server.restart.is_serving() && !old.server.restart.is_under_way();
        let goes_on = serves && {
            let mut client = old.stage.waiting("web");
            client.socket.write_all(b"who").expect("room");
            old.turn();
            client.hears().starts_with("old ")
        };
        seen.stuck += usize::from(!has_gone && !goes_on);
        old.server.events();
        // Those that moved are lost with who had them.
        if has_gone || old.clients.iter_mut().any(|it| it.hears() == "lost") {
            seen.panics += old.stage.reactor.statistics().panics as usize;
            old = old.anew();
        }
    }
    seen.panics += old.stage.reactor.statistics().panics as usize;
    seen
}

/// What a predecessor says at this step, or something else that it might.
fn of_predecessor(random: &mut Random, step: usize) -> Said {
    let at = match random.chance(70) {
        true => step,
        false => random.below(9),
    };
    let batch = random.below(3) as u32;
    let file = Some((random.any() % 9, random.any() % 9));
    match at {
        0 => offer_of(1 + batch / 2, 0),
        1 => listeners(batch / 2, &[("control", None), ("web", file)]),
        2 => connections(1, &[("line", random.below(3) as u32), ("other", 0)]),
        3 => go(1 + batch / 2),
        4 => commit(),
        5 => done(),
        6 => refused(random.below(5) as u8),
        7 => takes_back(),
        _ => nothing(0x0210 + random.below(32) as u16),
    }
}

/// A predecessor by hand, and all that it has to give.
struct Estate {
    control: StdUnixListener,
    web: StdUnixListener,
    connection: OwnedFd,
    _client: std::os::unix::net::UnixStream,
    kinds: Kinds,
}

impl Estate {
    fn new(stage: &Stage) -> Self {
        let (connection, client) = socketpair();
        Self {
            control: stage.predecessor(),
            web: StdUnixListener::bind(stage.path("web")).expect("bound"),
            connection: connection.into(),
            _client: client,
            kinds: Kinds::new(),
        }
    }

    /// What belongs to a message of this step, or not quite.
    fn descriptors<'a>(
        &'a self,
        random: &mut Random,
        step: usize,
        baton: &'a OwnedFd,
    ) -> Vec<BorrowedFd<'a>> {
        if random.chance(25) {
            return self.kinds.some(random);
        }
        let mut right = match step {
            0 => vec![baton.as_fd()],
            1 => vec![self.control.as_fd(), self.web.as_fd()],
            2 => vec![self.connection.as_fd(); 2],
            _ => Vec::new(),
        };
        // One of another kind among them.
        if let Some(wrong) = self.kinds.some(random).first()
            && random.chance(30)
            && !right.is_empty()
        {
            let at = random.below(right.len());
            right[at] = *wrong;
        }
        right
    }
}

/// A pipe with the byte that says who serves.
fn baton() -> OwnedFd {
    let (reading, mut writing) = std::io::pipe().expect("a pipe");
    writing.write_all(b"!").expect("room");
    reading.into()
}

fn at_the_one_that_is_new(random: &mut Random, wanted: usize) -> Seen {
    let mut seen = Seen::default();
    let mut stage = Stage::new();
    let estate = Estate::new(&stage);
    while seen.mutations < wanted {
        // Each is a process of its own.
        stage.reactor = bowline::Reactor::with_clock(stage.clock.clone()).expect("epoll");
        let settings = stage.settings();
        // The one before has looked again, maybe.
        while estate.control.accept().is_ok() {}
        let new = stage.begin_only(settings, "new", &["web"]);
        settle(&mut stage.reactor);
        let (socket, _) = estate.control.accept().expect("it looks for one");
        let hand = Hand::new(socket);
        seen.mutations += greet(random, &hand, Role::PREDECESSOR);
        settle(&mut stage.reactor);
        let (depth, baton) = (random.below(6), baton());
        let right = [
            (offer_of(1, 0), vec![baton.as_fd()]),
            (
                listeners(0, &[("control", None), ("web", None)]),
                vec![estate.control.as_fd(), estate.web.as_fd()],
            ),
            (
                connections(1, &[("line", 0)]),
                vec![estate.connection.as_fd()],
            ),
            (go(1), Vec::new()),
            (commit(), Vec::new()),
        ];
        for (message, fds) in &right[..depth.min(right.len())] {
            send(&hand, message, fds);
            settle(&mut stage.reactor);
        }
        for step in depth..depth + 1 + random.below(MUTATED) {
            let fds = estate.descriptors(random, step, &baton);
            let message = of_predecessor(random, step);
            seen.mutations += 1;
            // Where a frame is right, its descriptors are what is looked at.
            let was_sent = match random.chance(30) {
                true => send(&hand, &message, &fds),
                false => send_mutated(random, &hand, &message, &fds),
            };
            if !was_sent {
                break;
            }
            if random.chance(70) {
                settle(&mut stage.reactor);
            }
        }
        settle(&mut stage.reactor);
        let heard = hand.hears();
        seen.refusals += heard.iter().filter(|it| is_refusal(it)).count();
        drop(hand);
        settle(&mut stage.reactor);
        stage.advance(ms(LONG));
        let events = new.events();
        let told = |what: &str| events.iter().any(|event| event.starts_with(what));
        let has_all = new.restart.is_serving() && told("took over");
        seen.ends += usize::from(has_all);
        seen.stuck += usize::from(!has_all && !told("not started"));
        seen.panics += stage.reactor.statistics().panics as usize;
    }
    seen
}

/// That it does not take a connection of those, or any of the listeners.
fn is_refusal(heard: &str) -> bool {
    let refused = heard.strip_prefix("prepared ");
    let refused = refused.and_then(|rest| rest.split_once(" but"));
    refused.is_some_and(|(_, rest)| !rest.is_empty()) || heard == "gives up"
}
