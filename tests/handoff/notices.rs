//! What cannot leave now: notices to a manager that is busy, gone, or made anew. Its
//! socket is a real one, with the queue that the kernel gives it (ten notices, as a
//! rule), and is read when a test says so.

use std::cell::RefCell;
use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::rc::Rc;
use std::time::Duration;

use bowline::Reactor;
use bowline::handoff::systemd::{Notice, Notifier, Watchdog};
use bowline::process::describe_socket;
use bowline::testing::ManualClock;

use crate::support::{DEADLINE, DescriptorLedger, row, run_until};
use crate::systemd::Manager;

const fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

/// Where a manager may be.
enum Place {
    Path(tempfile::TempDir),
    Abstract(String),
}

impl Place {
    fn both() -> [Self; 2] {
        // Nobody else has the directory, and so neither its name.
        let directory = tempfile::tempdir().expect("temporary directory");
        let name = format!("bowline-test-{}", directory.path().display());
        [Self::Path(directory), Self::Abstract(name)]
    }

    fn address(&self) -> String {
        match self {
            Self::Path(directory) => directory.path().join("notify").display().to_string(),
            Self::Abstract(name) => format!("@{name}"),
        }
    }

    /// Binds it, over what stands there.
    fn bind(&self) -> Manager {
        let socket = match self {
            Self::Path(_) => {
                let _ = fs::remove_file(self.address());
                UnixDatagram::bind(self.address())
            }
            Self::Abstract(name) => {
                let address = SocketAddr::from_abstract_name(name).expect("a name");
                UnixDatagram::bind_addr(&address)
            }
        };
        let socket = socket.expect("binds");
        socket.set_nonblocking(true).expect("a socket");
        Manager { socket }
    }

    fn notifier(&self) -> Notifier {
        Notifier::connect(&self.address()).expect("an address")
    }

    fn attached(&self, reactor: &mut Reactor) -> Notifier {
        let notifier = self.notifier();
        notifier.attach(reactor).expect("a slot");
        notifier
    }
}

impl Manager {
    /// Fills the queue with notices of somebody else.
    fn fill(&self, place: &Place) {
        let other = place.notifier();
        while other.send(&Notice::new().status("somebody else")).is_ok() {}
    }

    /// The next notice, if there is one, of those that are not somebody else's.
    fn take(&self) -> Option<(String, Vec<OwnedFd>)> {
        loop {
            let (text, descriptors) = self.try_receive()?;
            if text != "STATUS=somebody else\n" {
                return Some((text, descriptors));
            }
        }
    }

    fn texts(&self) -> Vec<String> {
        std::iter::from_fn(|| self.take().map(|(text, _)| text)).collect()
    }
}

fn status(number: usize) -> Notice {
    Notice::new().status(&number.to_string())
}

/// 300 listeners under 300 names, and then that the service is ready: the manager reads
/// a few at a time, and gets all of it, in order.
#[test]
fn notices_wait_for_room_in_order_with_their_descriptors() {
    let _ledger = DescriptorLedger::open();
    for place in Place::both() {
        let _row = row(place.address());
        let manager = place.bind();
        let mut reactor = Reactor::new().expect("epoll");
        let notifier = place.attached(&mut reactor);
        let mut ports = Vec::new();
        for number in 0..300 {
            let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
            ports.push(listener.local_addr().expect("bound"));
            let notice = Notice::new().store(&format!("l{number}")).expect("a name");
            let sent = notifier.send_with(&notice, &[listener.as_fd()]);
            sent.expect("sent or kept");
        }
        notifier.send(&Notice::new().ready()).expect("kept");
        assert!(notifier.waiting() > 200, "the queue is short");
        let mut seen = 0;
        run_until(&mut reactor, |_| {
            // One at a time: each makes room for one more.
            let Some((text, descriptors)) = manager.take() else {
                return false;
            };
            if seen == ports.len() {
                assert_eq!(text, "READY=1\n");
                return true;
            }
            assert_eq!(text, format!("FDSTORE=1\nFDNAME=l{seen}\n"));
            let found = describe_socket(descriptors[0].as_fd()).expect("a socket");
            assert_eq!(found.address, Some(ports[seen].into()));
            seen += 1;
            false
        });
        assert_eq!((notifier.waiting(), manager.take().is_none()), (0, true));
        drop(notifier);
        run_until(&mut reactor, |reactor| reactor.registered() == 0);
    }
}

/// No timer has to be due: the kernel says when there is room.
#[test]
fn room_is_noticed_by_readiness() {
    let _ledger = DescriptorLedger::open();
    for place in Place::both() {
        let _row = row(place.address());
        let manager = place.bind();
        let mut reactor = Reactor::with_clock(ManualClock::new()).expect("epoll");
        let notifier = place.attached(&mut reactor);
        manager.fill(&place);
        notifier.send(&Notice::new().ready()).expect("kept");
        // Waits, and is filled again when there was room: the next edge counts too.
        for _ in 0..3 {
            for _ in 0..5 {
                reactor.turn(Some(Duration::ZERO));
            }
            assert_eq!(notifier.waiting(), 1);
            manager.try_receive().expect("somebody else's");
            manager.fill(&place);
        }
        assert_eq!(manager.texts(), [""; 0]);
        run_until(&mut reactor, |_| notifier.waiting() == 0);
        assert_eq!(manager.texts(), ["READY=1\n"]);
        // Nothing is watched any more, and nothing is due.
        reactor.turn(Some(Duration::ZERO));
        assert_eq!(reactor.delayed_calls().count(), 0);
    }
}

#[test]
fn manager_that_is_made_anew_gets_what_waited() {
    let _ledger = DescriptorLedger::open();
    for place in Place::both() {
        let _row = row(place.address());
        let mut reactor = Reactor::new().expect("epoll");
        let notifier = place.attached(&mut reactor);
        // Before there is one at all.
        notifier.send(&status(0)).expect("kept");
        let manager = place.bind();
        run_until(&mut reactor, |_| notifier.waiting() == 0);
        assert_eq!(manager.texts(), ["STATUS=0\n"]);
        drop(manager);
        for number in 1..20 {
            notifier.send(&status(number)).expect("kept");
            reactor.turn(Some(Duration::ZERO));
        }
        let manager = place.bind();
        let mut got = Vec::new();
        run_until(&mut reactor, |_| {
            got.extend(manager.texts());
            got.len() == 19
        });
        let wanted: Vec<_> = (1..20).map(|number| format!("STATUS={number}\n")).collect();
        assert_eq!(got, wanted);
        // One that goes while it has no room.
        manager.fill(&place);
        notifier.send(&status(20)).expect("kept");
        reactor.turn(Some(Duration::ZERO));
        drop(manager);
        let manager = place.bind();
        run_until(&mut reactor, |_| notifier.waiting() == 0);
        assert_eq!(manager.texts(), ["STATUS=20\n"]);
    }
}

/// The old socket is still open, in a process that hangs: nobody reads there.
#[test]
fn manager_of_the_same_path_is_found_beside_one_that_hangs() {
    let _ledger = DescriptorLedger::open();
    let [place, _] = Place::both();
    let hangs = place.bind();
    let mut reactor = Reactor::new().expect("epoll");
    let notifier = place.attached(&mut reactor);
    hangs.fill(&place);
    notifier.send(&status(1)).expect("kept");
    reactor.turn(Some(Duration::ZERO));
    let manager = place.bind();
    run_until(&mut reactor, |_| notifier.waiting() == 0);
    assert_eq!(manager.texts(), ["STATUS=1\n"]);
    assert_eq!(hangs.texts(), [""; 0]);
}

/// A process that has confined itself does not see the path any more.
#[test]
fn manager_whose_path_is_gone_is_still_reached() {
    let _ledger = DescriptorLedger::open();
    let [place, _] = Place::both();
    let manager = place.bind();
    let notifier = place.notifier();
    notifier.send(&status(1)).expect("room");
    fs::remove_file(place.address()).expect("ours");
    notifier.send(&status(2)).expect("it still reads");
    assert_eq!(manager.texts(), ["STATUS=1\n", "STATUS=2\n"]);
    drop(manager);
    let error = notifier.send(&status(3)).expect_err("nobody");
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
}

#[test]
fn what_waits_is_bounded_and_what_is_too_long_is_refused() {
    let _ledger = DescriptorLedger::open();
    let [place, _] = Place::both();
    let manager = place.bind();
    let mut reactor = Reactor::new().expect("epoll");
    let notifier = place.attached(&mut reactor);
    notifier.set_most_waiting(3);
    manager.fill(&place);
    for number in 0..3 {
        notifier.send(&status(number)).expect("kept");
    }
    let kind = |result: io::Result<()>| result.expect_err("refused").kind();
    assert_eq!(kind(notifier.send(&status(3))), io::ErrorKind::WouldBlock);
    let long = |length| Notice::new().status(&"x".repeat(length - "STATUS=\n".len()));
    assert_eq!(
        kind(notifier.send(&long(4_097))),
        io::ErrorKind::InvalidInput
    );
    let many = [reactor_fd(&manager); 254];
    let with_many = notifier.send_with(&status(4), &many);
    assert_eq!(kind(with_many), io::ErrorKind::InvalidInput);
    assert_eq!(notifier.waiting(), 3);
    let mut got = Vec::new();
    run_until(&mut reactor, |_| {
        got.extend(manager.texts());
        got.len() == 3
    });
    notifier.send(&long(4_096)).expect("room");
    assert_eq!(manager.texts(), [long(4_096).as_str()]);
}

fn reactor_fd(manager: &Manager) -> std::os::fd::BorrowedFd<'_> {
    manager.socket.as_fd()
}

type Results = Rc<RefCell<Vec<(&'static str, Result<(), io::ErrorKind>)>>>;

fn note(
    results: &Results,
    what: &'static str,
) -> impl FnOnce(&mut Reactor, io::Result<()>) + 'static {
    let results = Rc::clone(results);
    move |_, result| {
        let result = result.map_err(|error| error.kind());
        results.borrow_mut().push((what, result));
    }
}

/// The end of the limit is an error, and the notice still leaves when it can.
#[test]
fn that_a_notice_has_left_is_told_or_that_it_took_too_long() {
    let _ledger = DescriptorLedger::open();
    let [place, _] = Place::both();
    let manager = place.bind();
    let clock = ManualClock::new();
    let mut reactor = Reactor::with_clock(clock.clone()).expect("epoll");
    let notifier = place.notifier();
    let results = Results::default();
    let told = |reactor: &mut Reactor, what| {
        let sent = notifier.when_sent(reactor, ms(1_000), note(&results, what));
        sent.expect("attached");
    };
    told(&mut reactor, "nothing was sent");
    assert!(results.borrow().is_empty(), "not inside of the call");
    reactor.turn(Some(Duration::ZERO));
    assert_eq!(results.take(), [("nothing was sent", Ok(()))]);
    manager.fill(&place);
    notifier.send(&status(1)).expect("kept");
    told(&mut reactor, "one");
    notifier.send(&status(2)).expect("kept");
    clock.advance(ms(999));
    reactor.turn(Some(Duration::ZERO));
    assert_eq!(results.take(), []);
    clock.advance(ms(1));
    reactor.turn(Some(Duration::ZERO));
    assert_eq!(results.take(), [("one", Err(io::ErrorKind::TimedOut))]);
    told(&mut reactor, "two");
    // Time in which the loop did not run, and there is room by now.
    assert_eq!(manager.texts(), [""; 0]);
    clock.advance(ms(5_000));
    run_until(&mut reactor, |_| !results.borrow().is_empty());
    assert_eq!(results.take(), [("two", Ok(()))]);
    assert_eq!(manager.texts(), ["STATUS=1\n", "STATUS=2\n"]);
}

#[test]
fn barrier_waits_for_room_until_its_deadline_and_may_use_the_notifier() {
    let _ledger = DescriptorLedger::open();
    let [place, _] = Place::both();
    let manager = place.bind();
    let mut reactor = Reactor::new().expect("epoll");
    let notifier = place.attached(&mut reactor);
    notifier.set_most_waiting(1);
    manager.fill(&place);
    notifier.send(&status(1)).expect("kept");
    let (results, again) = (Results::default(), notifier.clone());
    let noted = note(&results, "passed");
    let barrier = notifier.barrier(&mut reactor, DEADLINE, move |reactor, result| {
        again.send(&status(2)).expect("the barrier owns a copy");
        noted(reactor, result);
    });
    barrier.expect("what the program says does not keep it out");
    let late = notifier.barrier(&mut reactor, ms(10), note(&results, "late"));
    late.expect("kept");
    run_until(&mut reactor, |_| results.borrow().len() == 1);
    assert_eq!(results.take(), [("late", Err(io::ErrorKind::TimedOut))]);
    assert_eq!(notifier.waiting(), 2, "that barrier is not for anybody now");
    let mut got = Vec::new();
    run_until(&mut reactor, |_| {
        // Their descriptors are closed here.
        got.extend(manager.texts());
        !results.borrow().is_empty()
    });
    got.extend(manager.texts());
    assert_eq!(results.take(), [("passed", Ok(()))]);
    assert_eq!(got, ["STATUS=1\n", "BARRIER=1\n", "STATUS=2\n"]);
    drop(notifier);
    run_until(&mut reactor, |reactor| reactor.registered() == 0);
}

/// A watchdog that finds no room has one notice wait, not one for each interval.
#[test]
fn watchdog_of_a_manager_that_is_away_waits_once() {
    let _ledger = DescriptorLedger::open();
    let [place, _] = Place::both();
    let manager = place.bind();
    let clock = ManualClock::new();
    let mut reactor = Reactor::with_clock(clock.clone()).expect("epoll");
    let notifier = Rc::new(place.notifier());
    manager.fill(&place);
    let watchdog = Watchdog::start(&mut reactor, Rc::clone(&notifier), ms(1_000));
    assert!(watchdog.is_for_us());
    for _ in 0..20 {
        clock.advance(ms(500));
        reactor.turn(Some(Duration::ZERO));
    }
    assert_eq!(notifier.waiting(), 1);
    assert_eq!(manager.texts(), [""; 0]);
    run_until(&mut reactor, |_| notifier.waiting() == 0);
    assert_eq!(manager.texts(), ["WATCHDOG=1\n"]);
    clock.advance(ms(500));
    reactor.turn(Some(Duration::ZERO));
    assert_eq!(manager.texts(), ["WATCHDOG=1\n"]);
}

/// A service that stops says so, and waits for a manager that has no room.
#[test]
fn stop_is_announced_and_waits_for_room_for_a_while() {
    let _ledger = DescriptorLedger::open();
    let [place, _] = Place::both();
    for (manager_reads, says_so_itself) in [(true, false), (true, true), (false, false)] {
        let _row = row((manager_reads, says_so_itself));
        let manager = place.bind();
        let clock = ManualClock::new();
        let mut reactor = Reactor::with_clock(clock.clone()).expect("epoll");
        let notifier = place.attached(&mut reactor);
        reactor.start().expect("not running");
        manager.fill(&place);
        let stopping = Notice::new().stopping().status("bye");
        if says_so_itself {
            notifier.send(&stopping).expect("kept");
        }
        reactor.stop().expect("running");
        for _ in 0..10 {
            reactor.turn(Some(Duration::ZERO));
        }
        assert!(reactor.is_running(), "it waits");
        if manager_reads {
            assert_eq!(manager.texts(), [""; 0]);
            run_until(&mut reactor, |reactor| !reactor.is_running());
            let wanted = if says_so_itself {
                stopping.as_str()
            } else {
                "STOPPING=1\n"
            };
            assert_eq!(manager.texts(), [wanted]);
        } else {
            clock.advance(ms(4_999));
            reactor.turn(Some(Duration::ZERO));
            assert!(reactor.is_running());
            clock.advance(ms(1));
            run_until(&mut reactor, |reactor| !reactor.is_running());
        }
    }
    // Nobody is there: nobody is waited for.
    fs::remove_file(place.address()).expect("ours");
    let mut reactor = Reactor::with_clock(ManualClock::new()).expect("epoll");
    let _notifier = place.attached(&mut reactor);
    reactor.start().expect("not running");
    reactor.stop().expect("running");
    run_until(&mut reactor, |reactor| !reactor.is_running());
}

/// What waits when the last copy is dropped is still sent; then nothing is left.
#[test]
fn notices_of_a_notifier_that_was_dropped_still_leave() {
    let _ledger = DescriptorLedger::open();
    let [place, _] = Place::both();
    let manager = place.bind();
    let mut reactor = Reactor::new().expect("epoll");
    let notifier = place.attached(&mut reactor);
    manager.fill(&place);
    notifier.send(&status(1)).expect("kept");
    drop(notifier);
    reactor.turn(Some(Duration::ZERO));
    assert_eq!(reactor.registered(), 1);
    assert_eq!(manager.texts(), [""; 0]);
    run_until(&mut reactor, |reactor| reactor.registered() == 0);
    assert_eq!(manager.texts(), ["STATUS=1\n"]);
}
