//! A restart under a service manager that has no room for a while: nobody ends before
//! it knows.

use std::os::fd::AsFd;
use std::os::unix::net::{UnixDatagram, UnixListener as StdUnixListener};
use std::rc::Rc;

use bowline::handoff::restart::RestartSettings;
use bowline::handoff::systemd::{Notice, Notifier, Watchdog};

use super::wire::{Hand, commit, done, gives_up, listeners, parted, ready, serving, take, taken};
use super::{Server, Stage, Staged, ms};
use crate::support::row;

/// The limit, unlike any other of the stage's.
const MANAGER: u64 = 20_000;

struct Manager {
    socket: UnixDatagram,
    notifier: Rc<Notifier>,
    path: std::path::PathBuf,
}

impl Manager {
    fn new(stage: &Stage) -> Self {
        let path = stage.path("manager");
        let socket = UnixDatagram::bind(&path).expect("bound");
        socket.set_nonblocking(true).expect("a socket");
        let notifier = Notifier::connect(path.to_str().expect("text")).expect("an address");
        Self {
            socket,
            notifier: Rc::new(notifier),
            path,
        }
    }

    fn settings(&self, stage: &Stage) -> RestartSettings {
        let mut settings = stage.settings();
        settings.notifier = Some(Rc::clone(&self.notifier));
        settings.manager = ms(MANAGER);
        settings
    }

    /// Somebody else's notices, until there is no room for more.
    fn fill(&self) {
        let other = UnixDatagram::unbound().expect("a socket");
        other.set_nonblocking(true).expect("a socket");
        while other.send_to(b"", &self.path).is_ok() {}
    }

    /// What it was told that is not somebody else's.
    fn hears(&self) -> Vec<String> {
        let mut bytes = [0; 256];
        let mut all = Vec::new();
        while let Ok(length) = self.socket.recv(&mut bytes) {
            if length > 0 {
                let text = String::from_utf8_lossy(&bytes[..length]);
                all.push(text.trim_end().to_owned());
            }
        }
        all
    }

    /// Reads until it has heard this many.
    fn hears_at_last(&self, stage: &mut Stage, count: usize) -> Vec<String> {
        let mut all = Vec::new();
        for _ in 0..100 {
            all.extend(self.hears());
            if all.len() >= count {
                break;
            }
            stage.settle();
        }
        all
    }
}

/// A process that serves, and a successor by hand that has everything but the last word.
fn nearly_handed_over(stage: &mut Stage, manager: &Manager) -> (Server, Hand) {
    let server = stage.begin_with(manager.settings(stage), "old", &["web"]);
    assert_eq!(manager.hears(), ["READY=1"]);
    let hand = stage.successor(4_242);
    stage.say_all(&hand, [take(0), taken(0), ready()]);
    manager.fill();
    stage.say(&hand, &serving());
    server.events();
    hand.hears();
    (server, hand)
}

#[test]
fn predecessor_ends_when_the_manager_knows_and_the_successor_has_said_so() {
    let mut stage = Stage::new();
    let manager = Manager::new(&stage);
    let (server, hand) = nearly_handed_over(&mut stage, &manager);
    stage.advance(ms(MANAGER - 1));
    assert_eq!(hand.hears(), [""; 0], "not done");
    assert!(!server.restart.has_handed_over() && server.restart.is_under_way());
    let mut told = manager.hears_at_last(&mut stage, 1);
    assert_eq!(told, ["MAINPID=4242"]);
    stage.settle();
    assert_eq!(hand.hears(), ["done"]);
    assert!(server.restart.has_handed_over());
    assert_eq!(
        server.events(),
        [""; 0],
        "the manager is to know of the successor"
    );
    stage.say(&hand, &parted());
    assert_eq!(server.events(), ["handed over"]);
    assert_eq!(hand.hears(), ["lost"]);
    // Nothing comes of it that would not be the main process's to say.
    stage.reactor.start().expect("not running");
    stage.reactor.stop().expect("running");
    stage.settle();
    told = manager.hears();
    assert_eq!(told, [""; 0]);
}

#[test]
fn restart_goes_on_without_a_manager_that_takes_too_long_and_says_so() {
    let mut stage = Stage::new();
    let manager = Manager::new(&stage);
    let (server, hand) = nearly_handed_over(&mut stage, &manager);
    stage.advance(ms(MANAGER));
    assert_eq!(hand.hears(), ["done"]);
    let error = "cannot tell the service manager: timed out";
    assert_eq!(server.events(), [error]);
    // A successor that does not say that it has parted has its limit, too.
    stage.advance(ms(MANAGER + 999));
    assert_eq!(server.events(), [""; 0]);
    stage.advance(ms(1));
    assert_eq!(server.events(), ["handed over"]);
    // It is said as long as somebody is there to say it.
    assert_eq!(manager.hears_at_last(&mut stage, 1), ["MAINPID=4242"]);
}

#[test]
fn announcement_is_taken_back_when_the_successor_comes_no_further() {
    for dies in [true, false] {
        let _row = row(dies);
        let mut stage = Stage::new();
        let manager = Manager::new(&stage);
        let (server, hand) = nearly_handed_over(&mut stage, &manager);
        if dies {
            drop(hand);
        } else {
            hand.send(&gives_up(), &[]);
        }
        stage.settle();
        assert!(server.restart.is_serving() && !server.restart.is_under_way());
        assert_eq!(manager.hears_at_last(&mut stage, 1), ["READY=1"]);
        stage.advance(ms(2 * MANAGER));
        assert_eq!(
            manager.hears(),
            [""; 0],
            "no MAINPID of one that is no more"
        );
        assert_eq!(server.events().len(), 1);
    }
}

/// A successor that has found a predecessor by hand; `watched` is what that says.
fn taking_over(
    stage: &mut Stage,
    settings: RestartSettings,
    watched: u32,
) -> (Server, Hand, StdUnixListener) {
    let control = stage.predecessor();
    let new = stage.begin_only(settings, "new", &[]);
    let hand = stage.found(&control);
    hand.offer_of(1, watched);
    hand.send(&listeners(0, &[("control", None)]), &[control.as_fd()]);
    stage.settle();
    stage.say(&hand, &commit());
    assert_eq!(hand.hears(), ["take 0", "taken 0", "ready", "serving"]);
    (new, hand, control)
}

#[test]
fn successor_parts_when_the_manager_knows_that_it_is_ready() {
    for is_late in [false, true] {
        let _row = row(is_late);
        let mut stage = Stage::new();
        let manager = Manager::new(&stage);
        let settings = manager.settings(&stage);
        let (new, hand, _control) = taking_over(&mut stage, settings, 0);
        manager.fill();
        stage.say(&hand, &done());
        assert_eq!(new.events(), ["listens", "took over 77 0"], "it serves");
        stage.advance(ms(MANAGER - 1));
        assert_eq!(hand.hears(), [""; 0]);
        if is_late {
            stage.advance(ms(1));
            let error = "cannot tell the service manager: timed out";
            assert_eq!(new.events(), [error]);
            assert_eq!(hand.hears(), ["parted"]);
        }
        assert_eq!(manager.hears_at_last(&mut stage, 1), ["READY=1"]);
        stage.settle();
        assert_eq!(hand.hears(), if is_late { &[][..] } else { &["parted"] });
    }
}

/// The watchdog is for the process that serves, in every generation: a number that
/// names the predecessor, or whom that stood for, is for its heir.
#[test]
fn watchdog_is_for_whoever_serves() {
    for (named, watched, is_for_us) in [
        (77, 0, true),
        (55, 55, true),
        (55, 0, false),
        (55, 77, false),
    ] {
        let _row = row((named, watched));
        let mut stage = Stage::new();
        let manager = Manager::new(&stage);
        let notifier = Rc::clone(&manager.notifier);
        let watchdog = Watchdog::start_for(&mut stage.reactor, notifier, ms(1_000), named);
        let settings = manager.settings(&stage);
        let (_new, hand, _control) = taking_over(&mut stage, settings, watched);
        stage.advance(ms(3_000));
        assert_eq!(manager.hears(), [""; 0]);
        assert!(!watchdog.is_for_us());
        stage.say(&hand, &done());
        assert_eq!(watchdog.is_for_us(), is_for_us, "{named} {watched}");
        stage.advance(ms(1_000));
        let pings = if is_for_us { 3 } else { 0 };
        let mut wanted = vec!["READY=1"];
        wanted.extend(std::iter::repeat_n("WATCHDOG=1", pings));
        assert_eq!(manager.hears(), wanted);
        // Its own successor is told whose heir it is.
        let next = stage.successor(4_242);
        stage.say(&next, &take(0));
        let offer = if is_for_us {
            format!("offer 1 watched {named} [1]")
        } else {
            "offer 1 [1]".into()
        };
        assert_eq!(next.hears()[0], offer);
        stage.say_all(&next, [taken(0), ready(), serving()]);
        manager.hears();
        // It has handed over, and lives on for a while.
        stage.advance(ms(3_000));
        assert_eq!(manager.hears(), [""; 0], "another one is watched");
    }
}

/// One that is watched from the start rests while it is not the main process.
#[test]
fn watchdog_rests_until_its_process_serves() {
    let mut stage = Stage::new();
    let manager = Manager::new(&stage);
    let settings = manager.settings(&stage);
    let watchdog = Watchdog::start(&mut stage.reactor, Rc::clone(&manager.notifier), ms(1_000));
    assert_eq!(
        manager.hears(),
        ["WATCHDOG=1"],
        "nobody has said that it is not"
    );
    let (_new, hand, _control) = taking_over(&mut stage, settings, 0);
    stage.advance(ms(3_000));
    assert_eq!(manager.hears(), [""; 0]);
    stage.say(&hand, &done());
    assert_eq!(manager.hears(), ["READY=1", "WATCHDOG=1"]);
    drop(watchdog);
    manager
        .notifier
        .send(&Notice::new().status("x"))
        .expect("room");
    stage.advance(ms(3_000));
    assert_eq!(manager.hears(), ["STATUS=x"]);
}
