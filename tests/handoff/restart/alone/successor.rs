//! The process that takes over, from predecessors by hand.

use std::cell::RefCell;
use std::fs;
use std::io::{PipeReader, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::rc::Rc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use bowline::Reactor;
use bowline::handoff::channel::Role;
use bowline::handoff::restart::{Listeners, Program, Restart, RestartError};

use super::wire::{
    Hand, NONSENSE, commit, connections, done, go, listeners, nothing, offer, offer_of, ready,
    refused, take, takes, takes_back,
};
use super::{Client, Server, Stage, Staged, file, ms};
use crate::pool::raw::{tcp_pair, wrong_kinds};
use crate::support::figures::{Bound, Figures};
use crate::support::{DEADLINE, socketpair};

const LATE: &str = "not started: the other process took too long";
const GAVE_UP: &str = "not started: the other process gave up";
const CANNOT: &str = "not started: cannot listen";

/// A predecessor that listens on `web`, and a successor that has found it.
struct Pair {
    new: Server,
    hand: Hand,
    /// The predecessor's hold on what says who serves.
    baton: RefCell<Option<PipeReader>>,
    control: StdUnixListener,
    web: StdUnixListener,
}

impl Pair {
    fn new(stage: &mut Stage) -> Self {
        let control = stage.predecessor();
        let web = StdUnixListener::bind(stage.path("web")).expect("bound");
        let settings = stage.settings();
        let new = stage.begin_only(settings, "new", &["web"]);
        let hand = stage.found(&control);
        assert_eq!(hand.hears(), ["take 0"]);
        Self {
            new,
            hand,
            baton: RefCell::default(),
            control,
            web,
        }
    }

    fn offer(&self) {
        self.baton.replace(Some(self.hand.offer(1)));
    }

    /// The predecessor takes what says who serves; false if the successor has.
    fn takes_baton(&self) -> bool {
        takes(self.baton.take().expect("it was offered"))
    }

    /// Sends both listeners, with the files at these paths as theirs.
    fn send_listeners(&self, stage: &Stage) {
        let identity = |path| {
            let file = fs::metadata(path).expect("bound");
            Some((file.dev(), file.ino()))
        };
        let all = [
            ("web", identity(stage.path("web"))),
            ("control", identity(stage.control())),
        ];
        let fds = [self.web.as_fd(), self.control.as_fd()];
        self.hand.send(&listeners(0, &all), &fds);
    }

    /// Goes so many steps of: it is offered listeners, gets them and is ready, is to
    /// serve, and alone.
    fn go_to(&self, stage: &mut Stage, steps: usize) {
        for step in 0..steps {
            match step {
                0 => self.offer(),
                1 => self.send_listeners(stage),
                2 => self.hand.send(&commit(), &[]),
                _ => self.hand.send(&done(), &[]),
            }
            stage.settle();
        }
    }

    fn is_accepting(&self, stage: &mut Stage, client: &mut Client) -> bool {
        !stage.ask(client, "who").is_empty()
    }
}

/// A client, and its connection.
fn socketpair_client() -> (Client, std::os::unix::net::UnixStream) {
    let (client, theirs) = socketpair();
    (Client { socket: client }, theirs)
}

/// A successor that has found a predecessor which listens on nothing but its control
/// socket, and is ready.
pub(super) fn make_ready(stage: &mut Stage, hand: &Hand, control: &StdUnixListener) {
    hand.offer(1);
    hand.send(&listeners(0, &[("control", None)]), &[control.as_fd()]);
    stage.settle();
    assert_eq!(hand.hears(), ["take 0", "taken 0", "ready"]);
}

#[test]
fn everything_is_taken_over_step_by_step() {
    let mut stage = Stage::new();
    let pair = Pair::new(&mut stage);
    assert_eq!(pair.new.events(), [""; 0]);
    pair.go_to(&mut stage, 2);
    assert_eq!(pair.hand.hears(), ["taken 0", "ready"]);
    assert_eq!(pair.new.events(), ["listens"]);
    assert!(!pair.new.restart.is_serving());
    let mut client = stage.waiting("web");
    assert!(!pair.is_accepting(&mut stage, &mut client));
    pair.hand.send(&commit(), &[]);
    stage.settle();
    assert_eq!(pair.hand.hears(), ["serving"]);
    assert_eq!(client.hears(), "new 0");
    assert_eq!(pair.new.events(), [""; 0]);
    assert!(!pair.new.restart.is_serving(), "not alone");
    pair.hand.send(&done(), &[]);
    stage.settle();
    assert_eq!(pair.new.events(), ["took over 77 0"]);
    assert!(pair.new.restart.is_serving());
    assert_eq!(pair.hand.hears(), ["parted"]);
    // What comes now is too late.
    pair.hand.send(&takes_back(), &[]);
    stage.settle();
    assert_eq!(pair.new.events(), [""; 0]);
    // It is one that can be replaced.
    drop((pair.hand, pair.control, pair.web));
    stage.advance(ms(100_000));
    let hand = stage.successor(1);
    hand.send(&take(0), &[]);
    stage.settle();
    assert_eq!(
        hand.hears(),
        ["offer 1 [1]", "listeners 0: control+ web+ [2]"]
    );
    drop(hand);
    // And whose the files are.
    drop(pair.new);
    drop(stage.reactor);
    let directory = stage.directory.path();
    assert!(!directory.join("web").exists() && !directory.join("control/control").exists());
}

/// It was reset: to the listener, which was adopted, its queue seemed to be another's.
#[test]
fn who_waits_when_one_stops_that_took_over_is_served() {
    let mut stage = Stage::new();
    stage.reactor.start().expect("it does not run");
    let pair = Pair::new(&mut stage);
    pair.go_to(&mut stage, 4);
    drop((pair.hand, pair.control, pair.web));
    stage.settle();
    let mut client = stage.waiting("web");
    client.socket.write_all(b"who").expect("room");
    let how = bowline::GracefulStop::new();
    stage.reactor.stop_gracefully(how).expect("it runs");
    stage.settle();
    assert_eq!(client.hears(), "new 0");
    stage.advance(ms(1_000));
    assert!(!stage.reactor.is_running());
}

#[test]
fn files_are_left_to_a_predecessor_that_goes_on() {
    let mut stage = Stage::new();
    let pair = Pair::new(&mut stage);
    pair.go_to(&mut stage, 3);
    let mut client = stage.client("web");
    assert!(pair.is_accepting(&mut stage, &mut client));
    pair.hand.send(&takes_back(), &[]);
    stage.settle();
    assert_eq!(pair.hand.hears().last().expect("a word"), "lost");
    assert_eq!(pair.new.events(), ["listens", GAVE_UP]);
    assert!(stage.path("web").exists() && stage.control().exists());
    // It accepts nothing more.
    let mut client = stage.waiting("web");
    assert!(!pair.is_accepting(&mut stage, &mut client));
    drop((pair.control, pair.web));
    assert_eq!(client.hears(), "lost");
}

#[test]
fn listeners_without_files_are_taken_over_without() {
    let mut stage = Stage::new();
    let listener = stage.predecessor();
    let new = stage.begin("new", &[]);
    let hand = stage.found(&listener);
    make_ready(&mut stage, &hand, &listener);
    for message in [commit(), done()] {
        hand.send(&message, &[]);
        stage.settle();
    }
    assert_eq!(new.events(), ["listens", "took over 77 0"]);
    drop(new);
    drop(stage.reactor);
    assert!(stage.directory.path().join("control/control").exists());
}

#[test]
fn each_step_has_its_own_limit() {
    for steps in 0..3 {
        let mut stage = Stage::new();
        let pair = Pair::new(&mut stage);
        pair.go_to(&mut stage, steps);
        pair.hand.hears();
        pair.new.events();
        stage.advance(ms(999));
        assert_eq!(pair.hand.hears(), [""; 0], "{steps}");
        stage.advance(ms(1));
        assert_eq!(pair.hand.hears(), ["gives up", "lost"], "{steps}");
        assert_eq!(pair.new.events(), [LATE], "{steps}");
        drop((pair.control, pair.web));
        assert!(!stage.is_listening("web"), "{steps}");
    }
    // While it serves, it serves.
    let mut stage = Stage::new();
    let pair = Pair::new(&mut stage);
    pair.go_to(&mut stage, 3);
    pair.hand.hears();
    stage.advance(ms(100_000));
    assert_eq!(pair.hand.hears(), [""; 0]);
    assert_eq!(pair.new.events(), ["listens"]);
}

#[test]
fn predecessor_that_is_just_in_time_at_each_step_is_taken_over_from() {
    let mut stage = Stage::new();
    let pair = Pair::new(&mut stage);
    let (_client, theirs) = socketpair();
    stage.advance(ms(999));
    pair.hand.offer(1);
    stage.settle();
    stage.advance(ms(999));
    pair.send_listeners(&stage);
    stage.settle();
    stage.advance(ms(999));
    pair.hand
        .send(&connections(1, &[("line", 0)]), &[theirs.as_fd()]);
    stage.settle();
    for message in [go(1), commit()] {
        stage.advance(ms(999));
        pair.hand.send(&message, &[]);
        stage.settle();
    }
    pair.hand.send(&done(), &[]);
    stage.settle();
    assert!(pair.new.restart.is_serving());
}

/// How many kinds of descriptors no connection has.
const WRONG: usize = 7;

/// The predecessor keeps what it can take back; by the time that the program found out it
/// would have let go. Reliability T-21.
#[test]
fn what_no_connection_has_is_refused() {
    for at in 0..WRONG {
        let mut stage = Stage::new();
        let (kind, wrong) = wrong_kinds().swap_remove(at);
        let pair = Pair::new(&mut stage);
        let (_client, theirs) = socketpair();
        pair.go_to(&mut stage, 2);
        pair.hand.hears();
        let both = [wrong.as_fd(), theirs.as_fd()];
        pair.hand
            .send(&connections(1, &[("line", 0), ("line", 0)]), &both);
        stage.settle();
        // A transport can be on either of these.
        let heard = match kind {
            "file" | "pipe" => "prepared 1 but",
            _ => "prepared 1 but 0",
        };
        assert_eq!(pair.hand.hears(), [heard], "{kind}");
    }
    Figures::of("T-21").must(
        "kinds of descriptors that a successor was sent for connections",
        WRONG,
        Bound::AtLeast,
        7,
    );
}

/// What says who serves is looked at without waiting for it, whatever it is: a socket
/// that nothing comes on would keep the loop for ever. Reliability T-21.
#[test]
fn what_cannot_say_who_serves_ends_the_take_over() {
    for at in 0..WRONG + 2 {
        let mut stage = Stage::new();
        let mut wrong = wrong_kinds();
        let (reader, writer) = std::io::pipe().expect("a pipe");
        let (_client, accepted) = tcp_pair();
        // Ends a loop that waits for the byte after all.
        let (is_over, over) = mpsc::channel::<()>();
        let waits = std::thread::spawn(move || {
            let late = over.recv_timeout(DEADLINE) == Err(RecvTimeoutError::Timeout);
            drop(writer);
            late
        });
        wrong.push(("pipe without its byte", reader.into()));
        wrong.push(("connection", accepted));
        let (kind, wrong) = wrong.swap_remove(at);
        let pair = Pair::new(&mut stage);
        pair.hand.send(&offer_of(1, 0), &[wrong.as_fd()]);
        pair.send_listeners(&stage);
        stage.settle();
        match kind {
            "pipe" | "pipe without its byte" => {
                assert_eq!(pair.hand.hears(), ["taken 0", "ready"], "{kind}");
                pair.hand.send(&nothing(NONSENSE), &[]);
                stage.settle();
                assert_eq!(pair.new.events(), ["listens", GAVE_UP], "{kind}");
            }
            _ => {
                assert_eq!(pair.hand.hears(), ["gives up", "lost"], "{kind}");
                assert_eq!(pair.new.events(), [GAVE_UP], "{kind}");
            }
        }
        assert!(!pair.new.restart.is_serving());
        drop(is_over);
        assert!(!waits.join().expect("a thread"), "{kind}: was waited for");
    }
}

#[test]
fn predecessor_that_never_greets_has_the_time_of_an_answer() {
    let mut stage = Stage::new();
    let control = stage.predecessor();
    let new = stage.begin("new", &["web"]);
    let _silent = control.accept().expect("it looks for one");
    stage.settle();
    stage.advance(ms(999));
    assert_eq!(new.events(), [""; 0]);
    stage.advance(ms(1));
    assert_eq!(new.events(), [LATE]);
}

#[test]
fn predecessor_that_does_not_even_accept_has_the_time_of_an_answer() {
    let mut stage = Stage::new();
    let control = stage.predecessor();
    // Room for one.
    rustix::net::listen(&control, 0).expect("a socket");
    let _first = std::os::unix::net::UnixStream::connect(stage.control()).expect("room");
    let new = stage.begin("new", &["web"]);
    stage.advance(ms(999));
    assert_eq!(new.events(), [""; 0]);
    stage.advance(ms(1));
    let control = "not started: cannot have the control socket";
    assert_eq!(new.events(), [control]);
}

/// That of another format is for good.
#[test]
fn refusal_is_told_with_its_reason() {
    for (why, told) in [
        (1, None),
        (2, Some("not started: predecessor is of another format")),
        (3, None),
    ] {
        let mut stage = Stage::new();
        let pair = Pair::new(&mut stage);
        pair.hand.send(&refused(why), &[]);
        stage.settle();
        let heard = pair.hand.hears();
        match told {
            Some(_) => assert_eq!(heard, [""; 0], "it is for the other to hang up"),
            None => assert_eq!(heard, ["lost"]),
        }
        assert_eq!(pair.new.events(), told.as_slice());
        drop(pair.hand);
        stage.settle();
        assert_eq!(pair.new.events(), [""; 0]);
    }
}

/// Refused by one that serves another, that has handed over, or that does not serve yet:
/// whoever serves then is found when it looks again.
#[test]
fn one_that_was_refused_looks_again() {
    for why in [1, 3] {
        let mut stage = Stage::new();
        let pair = Pair::new(&mut stage);
        for pause in [1, 2, 4, 8] {
            assert_eq!(pair.new.events(), [""; 0]);
            let next;
            let hand = match pause {
                1 => &pair.hand,
                _ => {
                    next = stage.found(&pair.control);
                    assert_eq!(next.hears(), ["take 0"]);
                    &next
                }
            };
            hand.send(&refused(why), &[]);
            stage.settle();
            stage.advance(ms(pause) - Duration::from_micros(1));
            assert!(pair.control.accept().is_err(), "after {pause} ms");
            stage.advance(Duration::from_micros(1));
        }
        let pair = Pair {
            hand: stage.found(&pair.control),
            ..pair
        };
        pair.go_to(&mut stage, 4);
        let events = pair.new.events();
        assert_eq!(events, ["listens", "took over 77 0"], "{why}");
        assert_eq!(pair.new.restart.looks(), 5);
    }
}

/// As long as it is to look, and says then what came of it.
#[test]
fn one_that_is_refused_for_too_long_gives_up() {
    for (why, said) in [
        (1, "predecessor serves another successor"),
        (3, "predecessor does not serve"),
    ] {
        for (search, looks) in [(0, 1), (5, 4)] {
            let mut stage = Stage::new();
            let control = stage.predecessor();
            let mut settings = stage.settings();
            settings.search = ms(search);
            let told = Rc::new(RefCell::new(String::new()));
            let hears = Rc::clone(&told);
            let program = Teller(move |error| *hears.borrow_mut() = error);
            let restart = Restart::begin(&mut stage.reactor, settings, program).expect("ours");
            for look in 1..=looks {
                assert_eq!(*told.borrow(), "");
                let hand = stage.found(&control);
                hand.send(&refused(why), &[]);
                stage.settle();
                assert_eq!(restart.looks(), look);
                stage.advance(ms(2));
            }
            let times = match looks {
                1 => "once".to_owned(),
                looks => format!("{looks} times"),
            };
            let wanted = format!("looked for a predecessor {times}: {said}");
            assert_eq!(*told.borrow(), wanted);
            stage.advance(ms(100_000));
            assert!(control.accept().is_err(), "that was all");
            assert_eq!(restart.looks(), looks);
        }
    }
}

/// Says why it was not started.
struct Teller<F>(F);

impl<F: FnMut(String) + 'static> Program for Teller<F> {
    fn listen(&mut self, _: &mut Reactor, _: &mut Listeners<'_>) -> std::io::Result<()> {
        Ok(())
    }

    fn not_started(&mut self, _: &mut Reactor, error: &RestartError) {
        (self.0)(error.to_string());
    }
}

#[test]
fn successor_says_its_format() {
    let mut stage = Stage::new();
    let control = stage.predecessor();
    let mut settings = stage.settings();
    settings.format = 0x0102_0304;
    let _new = stage.begin_only(settings, "new", &["web"]);
    let hand = stage.found(&control);
    assert_eq!(hand.hears(), [format!("take {}", 0x0102_0304)]);
}

#[test]
fn whoever_has_everything_serves_when_the_predecessor_dies() {
    for steps in [2, 3] {
        let mut stage = Stage::new();
        let pair = Pair::new(&mut stage);
        pair.go_to(&mut stage, steps);
        drop((pair.hand, pair.control, pair.web));
        stage.settle();
        assert_eq!(pair.new.events(), ["listens", "took over 77 0"], "{steps}");
        assert!(pair.new.restart.is_serving());
        let mut client = stage.client("web");
        assert_eq!(stage.ask(&mut client, "who"), "new 0");
    }
}

/// It finds nobody when it looks again, and starts cold.
#[test]
fn whoever_has_not_everything_starts_cold_when_the_predecessor_dies() {
    for (steps, batches) in [(0, 1), (1, 1), (1, 2)] {
        let mut stage = Stage::new();
        let pair = Pair::new(&mut stage);
        if steps == 1 {
            pair.baton.replace(Some(pair.hand.offer(batches)));
        }
        if batches == 2 {
            let half = listeners(0, &[("web", None)]);
            pair.hand.send(&half, &[pair.web.as_fd()]);
        }
        stage.settle();
        drop((pair.hand, pair.control, pair.web));
        stage.settle();
        assert_eq!(pair.new.events(), [""; 0], "{steps}");
        assert!(!stage.is_listening("web"), "what had come is closed");
        stage.advance(ms(1));
        assert_eq!(pair.new.events(), ["listens", "serves"], "{steps}");
        assert_eq!(pair.new.restart.looks(), 2);
        let mut client = stage.client("web");
        assert_eq!(stage.ask(&mut client, "who"), "new 0");
    }
}

/// It dies while the successor adopts.
#[test]
fn predecessor_that_dies_with_its_last_word_is_taken_over_from() {
    let mut stage = Stage::new();
    let pair = Pair::new(&mut stage);
    pair.hand.offer(1);
    pair.send_listeners(&stage);
    drop((pair.hand, pair.control, pair.web));
    stage.settle();
    assert_eq!(pair.new.events(), ["listens", "took over 77 0"]);
    let mut client = stage.client("web");
    assert_eq!(stage.ask(&mut client, "who"), "new 0");
}

#[test]
fn predecessor_that_takes_back_at_any_step_goes_on() {
    for steps in 0..4 {
        let mut stage = Stage::new();
        let pair = Pair::new(&mut stage);
        pair.go_to(&mut stage, steps);
        pair.hand.hears();
        pair.new.events();
        pair.hand.send(&takes_back(), &[]);
        stage.settle();
        assert_eq!(pair.new.events(), [GAVE_UP], "{steps}");
        assert_eq!(pair.hand.hears(), ["gives up", "lost"], "{steps}");
        assert!(!pair.new.restart.is_serving());
        drop((pair.control, pair.web));
        assert!(!stage.is_listening("web"), "{steps}");
    }
}

#[test]
fn what_has_no_business_at_a_step_ends_the_take_over() {
    let none: &[(&str, u32)] = &[];
    for (steps, message) in [
        (0, done()),
        (0, commit()),
        (0, go(1)),
        (0, listeners(0, &[])),
        (0, connections(1, none)),
        (1, offer(1)),
        (1, listeners(1, &[])),
        (1, connections(1, none)),
        (2, done()),
        (2, offer(1)),
        (2, go(1)),
        (3, commit()),
        (3, go(1)),
        (3, listeners(0, &[])),
    ] {
        let mut stage = Stage::new();
        let pair = Pair::new(&mut stage);
        pair.go_to(&mut stage, steps);
        pair.hand.hears();
        pair.new.events();
        pair.hand.send(&message, &[]);
        stage.settle();
        assert_eq!(pair.hand.hears(), ["gives up", "lost"], "{steps}");
        assert_eq!(pair.new.events(), [GAVE_UP], "{steps}");
    }
}

/// What cannot be understood breaks the channel: nobody has died of it.
#[test]
fn channel_that_breaks_is_no_death_of_the_predecessor() {
    for (steps, message) in [(0, ready()), (0, nothing(NONSENSE)), (1, nothing(NONSENSE))] {
        let mut stage = Stage::new();
        let pair = Pair::new(&mut stage);
        pair.go_to(&mut stage, steps);
        pair.hand.hears();
        pair.new.events();
        pair.hand.send(&message, &[]);
        stage.settle();
        assert_eq!(pair.hand.hears(), ["lost"]);
        assert_eq!(pair.new.events(), [GAVE_UP], "{steps}");
        assert!(!pair.new.restart.is_serving());
        assert!(steps == 0 || pair.takes_baton(), "it is the predecessor's");
        drop((pair.control, pair.web));
        assert!(!stage.is_listening("web"), "{steps}");
    }
}

/// It has everything, and whoever has come since is served here. Nobody was left where the
/// predecessor had gone with its last word, which it did not hear.
#[test]
fn one_that_has_everything_serves_when_its_channel_breaks() {
    for steps in [2, 3] {
        let mut stage = Stage::new();
        let pair = Pair::new(&mut stage);
        pair.go_to(&mut stage, steps);
        let mut client = stage.waiting("web");
        assert_eq!(pair.is_accepting(&mut stage, &mut client), steps == 3);
        let (mut moving, theirs) = socketpair_client();
        pair.hand
            .send(&connections(1, &[("line", 0)]), &[theirs.as_fd()]);
        drop(theirs);
        stage.settle();
        pair.new.events();
        pair.hand.send(&nothing(NONSENSE), &[]);
        stage.settle();
        assert_eq!(pair.new.events(), ["took over 77 0"], "{steps}");
        assert!(pair.new.restart.is_serving());
        assert!(!pair.takes_baton(), "the predecessor is not to go on");
        assert_eq!(moving.hears(), "lost", "it is the predecessor's");
        drop((pair.hand, pair.control, pair.web));
        assert_eq!(client.hears(), if steps == 2 { "new 0" } else { "" });
        assert_eq!(stage.ask(&mut client, "who"), "new 0");
    }
}

/// The end of its channel may be its death, or not.
#[test]
fn predecessor_that_lives_goes_on_when_its_channel_breaks() {
    for (steps, breaks_here) in [(2, false), (3, false), (3, true)] {
        let mut stage = Stage::new();
        let pair = Pair::new(&mut stage);
        pair.go_to(&mut stage, steps);
        let (mut moving, theirs) = socketpair_client();
        pair.hand
            .send(&connections(1, &[("line", 0)]), &[theirs.as_fd()]);
        drop(theirs);
        stage.settle();
        assert!(pair.takes_baton());
        pair.new.events();
        if breaks_here {
            pair.hand.send(&nothing(NONSENSE), &[]);
        }
        drop(pair.hand);
        stage.settle();
        assert_eq!(pair.new.events(), [GAVE_UP], "{steps}");
        assert!(!pair.new.restart.is_serving());
        assert_eq!(moving.hears(), "lost", "{steps}");
        let mut client = stage.waiting("web");
        assert_eq!(stage.ask(&mut client, "who"), "", "nobody is accepted here");
        // The files are the predecessor's, too.
        assert!(stage.path("web").exists() && stage.control().exists());
    }
}

#[test]
fn listeners_in_several_messages_are_acknowledged_one_by_one() {
    let mut stage = Stage::new();
    let pair = Pair::new(&mut stage);
    pair.hand.offer(2);
    let first = listeners(0, &[("web", None)]);
    pair.hand.send(&first, &[pair.web.as_fd()]);
    stage.settle();
    assert_eq!(pair.hand.hears(), ["taken 0"]);
    assert_eq!(pair.new.events(), [""; 0]);
    let second = listeners(1, &[("control", None)]);
    pair.hand.send(&second, &[pair.control.as_fd()]);
    stage.settle();
    assert_eq!(pair.hand.hears(), ["taken 1", "ready"]);
    assert_eq!(pair.new.events(), ["listens"]);
}

#[test]
fn listeners_that_were_received_in_vain_are_closed() {
    let mut stage = Stage::new();
    let control = stage.predecessor();
    let web = StdUnixListener::bind(stage.path("web")).expect("bound");
    let other = StdUnixListener::bind(stage.path("other")).expect("bound");
    let mut settings = stage.settings();
    settings.inherited.add("other", other.into());
    let new = stage.begin_only(settings, "new", &["web"]);
    let hand = stage.found(&control);
    hand.offer(2);
    let half = listeners(0, &[("web", None)]);
    hand.send(&half, &[web.as_fd()]);
    stage.settle();
    hand.send(&takes_back(), &[]);
    drop(web);
    stage.settle();
    assert_eq!(new.events(), [GAVE_UP]);
    assert!(!stage.is_listening("web") && !stage.is_listening("other"));
}

#[test]
fn listeners_that_do_not_match_their_names_end_the_take_over() {
    let (one, both) = (&[("web", None)], &[("web", None), ("control", None)]);
    for names in [one.as_slice(), both.as_slice()] {
        let mut stage = Stage::new();
        let pair = Pair::new(&mut stage);
        let all = [pair.web.as_fd(), pair.control.as_fd(), pair.web.as_fd()];
        let fds: &[BorrowedFd<'_>] = match names.len() {
            1 => &all[..2],
            _ => &all[..1],
        };
        pair.hand.offer(1);
        pair.hand.send(&listeners(0, names), fds);
        stage.settle();
        assert_eq!(pair.hand.hears(), ["gives up", "lost"]);
        assert_eq!(pair.new.events(), [GAVE_UP]);
    }
}

#[test]
fn successor_without_a_control_socket_does_not_start() {
    for name in ["web", "control"] {
        let mut stage = Stage::new();
        let no_socket = file();
        let pair = Pair::new(&mut stage);
        pair.hand.offer(1);
        pair.hand
            .send(&listeners(0, &[(name, None)]), &[no_socket.as_fd()]);
        stage.settle();
        assert_eq!(pair.hand.hears(), ["taken 0", "gives up", "lost"], "{name}");
        assert_eq!(pair.new.events(), [CANNOT], "{name}");
    }
    // Nor with none at all.
    let mut stage = Stage::new();
    let pair = Pair::new(&mut stage);
    pair.hand.offer(0);
    stage.settle();
    assert_eq!(pair.hand.hears(), ["gives up", "lost"]);
    assert_eq!(pair.new.events(), [CANNOT]);
}

#[test]
fn successor_that_cannot_listen_gives_everything_back() {
    let mut stage = Stage::new();
    let control = stage.predecessor();
    let settings = stage.settings();
    let new = stage.begin_as(settings, "new", |_, _, _| {
        Err(std::io::ErrorKind::AddrInUse.into())
    });
    let hand = stage.found(&control);
    hand.offer(1);
    hand.send(&listeners(0, &[("control", None)]), &[control.as_fd()]);
    stage.settle();
    assert_eq!(hand.hears(), ["take 0", "taken 0", "gives up", "lost"]);
    assert_eq!(new.events(), ["listens", CANNOT]);
    drop(control);
    assert!(stage.control().exists(), "it is the predecessor's");
    // That is all there is to say.
    drop(hand);
    stage.advance(ms(100_000));
    assert_eq!(new.events(), [""; 0]);
}

#[test]
fn connections_are_served_when_they_are_its_own() {
    let mut stage = Stage::new();
    let pair = Pair::new(&mut stage);
    pair.go_to(&mut stage, 2);
    pair.hand.hears();
    pair.new.events();
    let pairs: Vec<_> = (0..3).map(|_| socketpair()).collect();
    let held = file();
    let mut clients = Vec::new();
    let mut theirs = Vec::new();
    for (client, other) in pairs {
        clients.push(Client { socket: client });
        theirs.push(other);
    }
    let fds = [
        theirs[0].as_fd(),
        held.as_fd(),
        theirs[1].as_fd(),
        held.as_fd(),
        theirs[2].as_fd(),
    ];
    let all = [("line", 1), ("other", 1), ("line", 0)];
    pair.hand.send(&connections(4, &all), &fds);
    drop(theirs);
    stage.settle();
    assert_eq!(pair.hand.hears(), ["prepared 4 but 1"]);
    assert_eq!(clients[1].hears(), "lost", "nobody wants it");
    assert_eq!(stage.ask(&mut clients[0], "who"), "");
    assert_eq!(pair.new.events(), [""; 0]);
    pair.hand.send(&go(4), &[]);
    stage.settle();
    assert_eq!(pair.hand.hears(), ["live 4"]);
    let moved = |held| format!("moved line 5 unread 0 unsent 0 [] held {held}");
    assert_eq!(pair.new.events(), [moved(1), moved(0)]);
    assert_eq!(clients[0].hears(), "new 0");
    assert_eq!(stage.ask(&mut clients[2], "who"), "new 1");
    assert_eq!(pair.new.restart.connections_moved(), 2);
    for message in [commit(), done()] {
        pair.hand.send(&message, &[]);
        stage.settle();
    }
    assert_eq!(pair.new.events(), ["took over 77 2"]);
}

/// One connection, prepared.
fn prepared_one(stage: &mut Stage, pair: &Pair) -> Client {
    pair.go_to(stage, 2);
    pair.hand.hears();
    pair.new.events();
    let (client, theirs) = socketpair();
    pair.hand
        .send(&connections(1, &[("line", 0)]), &[theirs.as_fd()]);
    drop(theirs);
    stage.settle();
    assert_eq!(pair.hand.hears(), ["prepared 1 but"]);
    Client { socket: client }
}

#[test]
fn connections_that_were_prepared_are_served_when_the_predecessor_dies() {
    let mut stage = Stage::new();
    let pair = Pair::new(&mut stage);
    let mut client = prepared_one(&mut stage, &pair);
    drop(pair.hand);
    stage.settle();
    let moved = "moved line 5 unread 0 unsent 0 [] held 0";
    let events = pair.new.events();
    assert_eq!(events.len(), 2, "{events:?}");
    assert!(events.contains(&moved.to_owned()), "{events:?}");
    assert!(events.contains(&"took over 77 1".to_owned()), "{events:?}");
    assert_eq!(stage.ask(&mut client, "who"), "new 0");
}

#[test]
fn connections_that_were_taken_back_are_not_served() {
    for is_told_later in [false, true] {
        let mut stage = Stage::new();
        let pair = Pair::new(&mut stage);
        let mut client = prepared_one(&mut stage, &pair);
        pair.hand.send(&takes_back(), &[]);
        if is_told_later {
            // Together with the one before.
            pair.hand.send(&go(1), &[]);
        }
        stage.settle();
        assert_eq!(pair.hand.hears(), ["gives up", "lost"]);
        assert_eq!(pair.new.events(), [GAVE_UP]);
        assert_eq!(pair.new.restart.connections_moved(), 0);
        assert_eq!(client.hears(), "lost");
    }
}

/// Its word has left before, so the predecessor has let go of them.
#[test]
fn connections_that_it_has_said_to_serve_are_served_whatever_comes() {
    let mut stage = Stage::new();
    let pair = Pair::new(&mut stage);
    let mut client = prepared_one(&mut stage, &pair);
    pair.hand.send(&go(1), &[]);
    pair.hand.send(&takes_back(), &[]);
    stage.settle();
    assert_eq!(pair.hand.hears(), ["live 1", "gives up", "lost"]);
    let events = pair.new.events();
    assert!(events.contains(&GAVE_UP.to_owned()), "{events:?}");
    assert_eq!(pair.new.restart.connections_moved(), 1);
    assert_eq!(stage.ask(&mut client, "who"), "new 0");
}

/// Were they served before, and we died, the predecessor would take them back.
#[test]
fn connections_are_not_served_before_the_word_has_left() {
    for ends in ["read", "taken back", "dead"] {
        let mut stage = Stage::new();
        let pair = Pair::new(&mut stage);
        pair.go_to(&mut stage, 2);
        pair.hand.hears();
        pair.new.events();
        // The answer to this is more than the socket takes: each of them is refused,
        // since it has no descriptor.
        let many = vec![("", 0); 100_000];
        pair.hand
            .send_long(&connections(1, &many), || stage.settle());
        let (client, theirs) = socketpair();
        let mut client = Client { socket: client };
        pair.hand
            .send(&connections(2, &[("line", 0)]), &[theirs.as_fd()]);
        pair.hand.send(&go(2), &[]);
        drop(theirs);
        stage.settle();
        assert_eq!(stage.ask(&mut client, "who"), "", "{ends}");
        assert_eq!(pair.new.events(), [""; 0], "{ends}");
        assert!(stage.reactor.is_idle(), "it waits, and does not ask");
        match ends {
            "read" => {
                for _ in 0..20 {
                    pair.hand.hears();
                    stage.settle();
                }
                assert_eq!(client.hears(), "new 0");
            }
            "taken back" => {
                pair.hand.send(&takes_back(), &[]);
                stage.settle();
                // The farewell has its limit.
                stage.advance(ms(999));
                assert_eq!(client.hears(), "");
                stage.advance(ms(1));
                assert_eq!(client.hears(), "lost");
                assert_eq!(pair.new.events(), [GAVE_UP]);
            }
            _ => {
                drop(pair.hand);
                stage.settle();
                assert_eq!(client.hears(), "new 0");
            }
        }
    }
}

#[test]
fn predecessor_that_ends_while_it_is_greeted_is_looked_for_again() {
    let mut stage = Stage::new();
    let control = stage.predecessor();
    let mut settings = stage.settings();
    settings.search = ms(7);
    let new = stage.begin_with(settings, "new", &["web"]);
    for pause in [1, 2, 4] {
        drop(control.accept().expect("it looks for one"));
        stage.settle();
        assert_eq!(new.events(), [""; 0]);
        stage.advance(ms(pause) - Duration::from_micros(1));
        assert!(control.accept().is_err());
        stage.advance(Duration::from_micros(1));
    }
    drop(control.accept().expect("it looks for one"));
    stage.settle();
    assert_eq!(
        new.events(),
        ["not started: looked for a predecessor 4 times"]
    );
    stage.advance(ms(1_000));
    assert!(control.accept().is_err(), "four times are enough");
}

/// It ended the search: a frame that breaks off is an error of the channel, too.
#[test]
fn predecessor_that_ends_inside_of_its_greeting_is_looked_for_again() {
    let mut stage = Stage::new();
    let control = stage.predecessor();
    let new = stage.begin("new", &["web"]);
    let (mut socket, _) = control.accept().expect("it looks for one");
    // The length of a frame is four bytes.
    socket.write_all(&[0, 0]).expect("room");
    drop((socket, control));
    stage.settle();
    assert_eq!(new.events(), [""; 0]);
    stage.advance(ms(1));
    assert_eq!(new.events(), ["listens", "serves"]);
}

#[test]
fn predecessor_that_has_ended_is_not_waited_for() {
    let mut stage = Stage::new();
    let control = stage.predecessor();
    let new = stage.begin("new", &["web"]);
    drop(control.accept().expect("it looks for one"));
    drop(control);
    stage.settle();
    stage.advance(ms(1));
    assert_eq!(new.events(), ["listens", "serves"]);
}

#[test]
fn somebody_else_at_the_control_path_is_not_looked_for_again() {
    let mut stage = Stage::new();
    let control = stage.predecessor();
    let new = stage.begin("new", &["web"]);
    let (socket, _) = control.accept().expect("it looks for one");
    let hand = Hand::new(socket);
    hand.greet(Role::SUCCESSOR, 1, 1 << 20);
    stage.settle();
    assert_eq!(new.events(), [GAVE_UP]);
    stage.advance(ms(1_000));
    assert!(control.accept().is_err());
}
