//! What a program is started with, and what it is told of that.

use std::error::Error;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixDatagram, UnixListener as StdUnixListener};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::rc::Rc;
use std::time::Duration;

use bowline::handoff::restart::{
    Listeners, Program, Refusal, Restart, RestartError, RestartSettings,
};
use bowline::handoff::systemd::Notifier;
use bowline::process::describe_socket;
use bowline::{Acceptor, Address, BuildContext, Reactor};
use bowline::{Tcp, Unix};
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};

use super::{Line, Scene, Stage, Staged, file, ms, wire};
use crate::support::{Recorder, row};

#[test]
fn defaults_are_as_documented() {
    let settings = RestartSettings::new("somewhere");
    assert_eq!(settings.directory.to_str(), Some("somewhere"));
    assert_eq!(settings.format, 0);
    assert_eq!(settings.answer, Duration::from_secs(10));
    assert_eq!(settings.search, Duration::from_secs(10));
    assert_eq!(settings.manager, Duration::from_secs(30));
    assert_eq!(settings.start, Duration::from_secs(30));
    assert_eq!(settings.ready, Duration::from_secs(60));
    assert_eq!(settings.drain, Duration::from_secs(30));
    assert!(settings.inherited.is_empty() && settings.notifier.is_none());
}

#[test]
fn errors_say_what_happened_with_its_reason() {
    let os = || io::Error::from(io::ErrorKind::AddrInUse);
    let why = os().to_string();
    let refused = RestartError::Refused;
    let vain = |looks, last| RestartError::LookedInVain {
        looks,
        last: Box::new(last),
    };
    let gone = RestartError::Lost.to_string();
    let busy = refused(Refusal::Busy).to_string();
    for (error, text, source) in [
        (
            RestartError::Busy,
            "another successor is being served",
            None,
        ),
        (
            RestartError::NotServing,
            "this process does not serve",
            None,
        ),
        (
            RestartError::Spawn(os()),
            "cannot start the successor",
            Some(&why),
        ),
        (
            RestartError::Exited(ExitStatus::from_raw(3 << 8)),
            "successor ended before it took over: exit status: 3",
            None,
        ),
        (
            RestartError::TimedOut,
            "the other process took too long",
            None,
        ),
        (RestartError::Lost, "the other process is gone", None),
        (RestartError::GaveUp, "the other process gave up", None),
        (
            refused(Refusal::Busy),
            "predecessor serves another successor",
            None,
        ),
        (
            refused(Refusal::Format),
            "predecessor is of another format",
            None,
        ),
        (
            refused(Refusal::NotServing),
            "predecessor does not serve",
            None,
        ),
        (RestartError::Listen(os()), "cannot listen", Some(&why)),
        (
            RestartError::Control(os()),
            "cannot have the control socket",
            Some(&why),
        ),
        (
            vain(1, RestartError::Lost),
            "looked for a predecessor once",
            Some(&gone),
        ),
        (
            vain(29, refused(Refusal::Busy)),
            "looked for a predecessor 29 times",
            Some(&busy),
        ),
    ] {
        let cause = source.map(|cause| format!(": {cause}"));
        assert_eq!(
            error.to_string(),
            format!("{text}{}", cause.unwrap_or_default())
        );
        let said = error.source().map(ToString::to_string);
        assert_eq!(said.as_ref(), source, "{text}");
    }
}

#[test]
fn cold_start_listens_and_serves() {
    let mut stage = Stage::new();
    let settings = stage.settings();
    let server = stage.begin_only(settings, "old", &["web"]);
    assert_eq!(
        server.events(),
        [""; 0],
        "nothing is called before begin returns"
    );
    assert!(!server.restart.is_serving() && !server.restart.has_handed_over());
    let printed = format!("{:?}", server.restart);
    assert_eq!(
        printed,
        "Restart { role: Starting, is_under_way: false, .. }"
    );
    stage.settle();
    assert_eq!(server.events(), ["listens", "serves"]);
    assert!(server.restart.is_serving() && !server.restart.has_handed_over());
    assert!(!server.restart.is_under_way());
    assert_eq!(server.restart.connections_moved(), 0);
    let mut client = stage.client("web");
    assert_eq!(stage.ask(&mut client, "who"), "old 0");
    // Others may not ask for the listeners.
    let mode = fs::metadata(stage.control()).expect("bound").mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn control_socket_that_nobody_listens_on_is_replaced() {
    let mut stage = Stage::new();
    drop(stage.predecessor());
    assert!(stage.control().exists());
    let server = stage.begin("old", &["web"]);
    assert_eq!(server.events(), ["listens", "serves"]);
    let hand = stage.successor(1);
    stage.say(&hand, &wire::take(0));
    assert_eq!(
        hand.hears(),
        ["offer 1 [1]", "listeners 0: control+ web+ [2]"]
    );
}

#[test]
fn control_path_that_is_something_else_keeps_the_program_from_starting() {
    let mut stage = Stage::new();
    drop(stage.predecessor());
    fs::remove_file(stage.control()).expect("ours");
    let other = UnixDatagram::bind(stage.control()).expect("bound");
    let server = stage.begin("old", &["web"]);
    assert_eq!(
        server.events(),
        ["not started: cannot have the control socket"]
    );
    assert!(!server.restart.is_serving());
    drop(other);
}

/// Neither finds the other. The loser looks again, and finds it.
#[test]
fn of_two_that_start_cold_one_takes_over_from_the_other() {
    let mut stage = Stage::new();
    let settings = [stage.settings(), stage.settings()];
    let [one, other] = settings.map(|settings| stage.begin_only(settings, "cold", &["web"]));
    stage.settle();
    let (winner, loser) = match one.restart.is_serving() {
        true => (one, other),
        false => (other, one),
    };
    assert_eq!(winner.events(), ["listens", "serves"]);
    assert_eq!(loser.events(), [""; 0]);
    let mut client = stage.client("web");
    assert_eq!(stage.ask(&mut client, "who"), "cold 0");
    stage.advance(ms(1));
    let moved = "moved line 0 unread 0 unsent 0 [] held 0";
    let took_over = format!("took over {} 1", std::process::id());
    assert_eq!(loser.events(), ["listens", moved, &*took_over]);
    assert_eq!(stage.ask(&mut client, "who"), "cold 0", "the other's");
    let told = winner.events();
    assert!(told.contains(&"handed over".to_owned()), "{told:?}");
    assert_eq!([winner.restart.looks(), loser.restart.looks()], [1, 2]);
    assert!(loser.restart.is_serving() && !winner.restart.is_serving());
}

/// Whoever has the place cannot listen, and the other serves in its stead.
#[test]
fn of_two_that_start_cold_the_one_that_can_listen_serves() {
    for is_first in [true, false] {
        let _row = row(is_first);
        let mut stage = Stage::new();
        let cannot = |_: &Rc<Scene>, _: &mut Reactor, _: &mut Listeners<'_>| {
            Err(io::ErrorKind::PermissionDenied.into())
        };
        let can = |stage: &mut Stage| {
            let settings = stage.settings();
            stage.begin_only(settings, "new", &["web"])
        };
        let mut able = (!is_first).then(|| can(&mut stage));
        let settings = stage.settings();
        let unable = stage.begin_as(settings, "old", cannot);
        let able = able.take().unwrap_or_else(|| can(&mut stage));
        stage.settle();
        stage.advance(ms(1));
        assert_eq!(unable.events(), ["listens", "not started: cannot listen"]);
        // Where it had the place first, the other has tried to take over.
        assert_eq!(able.events()[..2], ["listens", "serves"]);
        assert!(able.restart.is_serving());
        let mut client = stage.client("web");
        assert_eq!(stage.ask(&mut client, "who"), "new 0");
    }
}

/// The place is taken, and nobody there hands over: it is bound and not listened on.
#[test]
fn one_that_finds_the_place_taken_for_too_long_gives_up() {
    let mut stage = Stage::new();
    drop(stage.predecessor());
    fs::remove_file(stage.control()).expect("ours");
    let bound = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    );
    let bound = bound.expect("a socket");
    let name = SocketAddrUnix::new(stage.control()).expect("short");
    rustix::net::bind(&bound, &name).expect("free");
    let mut settings = stage.settings();
    settings.search = ms(5);
    let server = stage.begin_with(settings, "new", &["web"]);
    stage.advance(ms(4));
    assert_eq!(server.events(), [""; 0]);
    stage.advance(ms(1));
    let told = "not started: looked for a predecessor 4 times";
    assert_eq!(server.events(), [told]);
    assert!(stage.control().exists(), "it is somebody's");
    // Had it gone in time, the place would have been free.
    let server = stage.begin("new", &["web"]);
    assert_eq!(server.events(), [""; 0]);
    drop(bound);
    stage.advance(ms(1));
    assert_eq!(server.events(), ["listens", "serves"]);
}

#[test]
fn program_that_cannot_listen_leaves_nothing_behind() {
    for panics in [false, true] {
        let _row = row(panics);
        let mut stage = Stage::new();
        let path = stage.path("web");
        let settings = stage.settings();
        let server = stage.begin_as(settings, "old", move |scene, reactor, listeners| {
            let lines = Line::factory(scene, listeners.restart());
            listeners.listen(reactor, "web", Unix::at(path.clone()), lines)?;
            if panics {
                std::panic::resume_unwind(Box::new("on purpose"));
            }
            Err(io::ErrorKind::AddrInUse.into())
        });
        stage.settle();
        assert_eq!(server.events(), ["listens", "not started: cannot listen"]);
        assert!(!server.restart.is_serving());
        assert!(!stage.is_listening("web"));
        assert!(!stage.path("web").exists() && !stage.control().exists());
    }
}

/// One that overrides nothing.
struct Plain;

impl Program for Plain {
    fn listen(&mut self, _: &mut Reactor, _: &mut Listeners<'_>) -> io::Result<()> {
        Ok(())
    }
}

/// As [`Plain`], but it cannot listen.
struct Hopeless;

impl Program for Hopeless {
    fn listen(&mut self, _: &mut Reactor, _: &mut Listeners<'_>) -> io::Result<()> {
        Err(io::ErrorKind::AddrInUse.into())
    }
}

#[test]
fn reactor_fails_by_default_when_the_program_cannot_start() {
    let mut stage = Stage::new();
    let settings = stage.settings();
    Restart::begin(&mut stage.reactor, settings, Hopeless).expect("ours");
    let error = stage.reactor.run().expect_err("it cannot listen");
    assert_eq!(
        error.to_string(),
        "cannot go on: cannot listen: address in use"
    );
    assert_eq!(io::Error::from(error).kind(), io::ErrorKind::AddrInUse);
    assert!(!stage.reactor.is_running());
}

#[test]
fn by_default_no_connection_is_taken_and_the_reactor_stops_when_all_is_handed_over() {
    let mut stage = Stage::new();
    let settings = stage.settings();
    let old = stage.begin("old", &["web"]);
    let mut client = stage.client("web");
    let new = Restart::begin(&mut stage.reactor, settings, Plain).expect("ours");
    stage.settle();
    assert!(new.is_serving() && old.restart.has_handed_over());
    assert_eq!(new.connections_moved(), 0);
    assert_eq!(stage.ask(&mut client, "who"), "old 0");
    stage.reactor.start().expect("not running");
    let hand = stage.successor(1);
    for message in [
        wire::take(0),
        wire::taken(0),
        wire::ready(),
        wire::serving(),
    ] {
        hand.send(&message, &[]);
        assert!(stage.reactor.is_running());
        stage.settle();
    }
    assert!(new.has_handed_over() && !new.is_serving());
    // A client that is quiet may be about to ask.
    assert!(stage.reactor.is_running());
    assert_eq!(stage.ask(&mut client, "who"), "old 0");
    stage.advance(Duration::from_millis(600));
    assert!(!stage.reactor.is_running());
}

#[test]
fn directory_has_to_be_ours_and_ours_alone() {
    let mut stage = Stage::new();
    let mut begin = |path: std::path::PathBuf| {
        let settings = RestartSettings::new(&path);
        let begun = Restart::begin(&mut stage.reactor, settings, Plain);
        begun.map(|_| ()).map_err(|error| {
            let said = error.to_string();
            assert!(said.starts_with(path.to_str().expect("text")), "{said}");
            error.kind()
        })
    };
    let inside = stage.directory.path();
    let denied = Err(io::ErrorKind::PermissionDenied);
    let new = inside.join("new");
    assert_eq!(begin(new.clone()), Ok(()));
    assert_eq!(fs::metadata(&new).expect("made").mode() & 0o777, 0o700);
    // Once more, since it is there.
    assert_eq!(begin(new.clone()), Ok(()));
    for mode in [0o701, 0o710, 0o704, 0o740, 0o702, 0o720] {
        let _row = row(mode);
        let open = inside.join(format!("{mode:o}"));
        fs::create_dir(&open).expect("ours");
        fs::set_permissions(&open, fs::Permissions::from_mode(mode)).expect("ours");
        assert_eq!(begin(open), denied, "{mode:o}");
    }
    let file = inside.join("file");
    fs::write(&file, "").expect("ours");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o700)).expect("ours");
    assert_eq!(begin(file), denied);
    let link = inside.join("link");
    symlink(&new, &link).expect("ours");
    assert_eq!(begin(link), denied);
    assert_eq!(begin(inside.join("no/such")), Err(io::ErrorKind::NotFound));
    // Why it could not be made, not that it is not there.
    let never = begin("/sys/kernel/bowline".into());
    assert_ne!(never, Ok(()));
    assert_ne!(never, Err(io::ErrorKind::NotFound));
    if rustix::process::geteuid().is_root() {
        let foreign = inside.join("foreign");
        fs::create_dir(&foreign).expect("ours");
        fs::set_permissions(&foreign, fs::Permissions::from_mode(0o700)).expect("ours");
        std::os::unix::fs::chown(&foreign, Some(1), None).expect("the superuser may");
        assert_eq!(begin(foreign), denied);
    }
}

/// Keeps what it accepts.
struct Keeps(Rc<std::cell::RefCell<Vec<OwnedFd>>>);

impl Acceptor for Keeps {
    fn accepted(&mut self, _: &mut BuildContext<'_>, socket: OwnedFd, _: &Address) {
        self.0.borrow_mut().push(socket);
    }
}

#[test]
fn each_way_to_listen_binds_and_then_adopts_by_name() {
    let mut stage = Stage::new();
    let accepted = Rc::default();
    let any = ([127, 0, 0, 1], 0).into();
    let mut found = Vec::new();
    let mut servers = Vec::new();
    for name in ["old", "new"] {
        let (path, local) = (stage.path("web"), stage.path("local"));
        let addresses = Rc::new(std::cell::RefCell::new(Vec::new()));
        let (keeps, seen) = (Rc::clone(&accepted), Rc::clone(&addresses));
        let settings = stage.settings();
        let server = stage.begin_as(settings, name, move |scene, reactor, listeners| {
            let lines = Line::factory(scene, listeners.restart());
            let recorder = |_: &Address| Recorder::default();
            assert_eq!(
                listeners.inherited().len(),
                if name == "old" { 0 } else { 4 }
            );
            let printed = format!("{listeners:?}");
            assert!(printed.starts_with("Listeners { inherited: {"), "{printed}");
            let handles = [
                listeners.listen(reactor, "web", Unix::at(path.clone()), lines)?,
                listeners.listen(reactor, "tcp", Tcp::at(any), recorder)?,
                listeners.accept(reactor, "pool", Tcp::at(any), Keeps(Rc::clone(&keeps)))?,
                listeners.accept(
                    reactor,
                    "local",
                    Unix::at(local.clone()),
                    Keeps(Rc::clone(&keeps)),
                )?,
            ];
            // Each name once, and that of the control socket never.
            for taken in ["web", "tcp", "pool", "local", "control"] {
                let kinds = [
                    listeners.listen(reactor, taken, Tcp::at(any), recorder),
                    listeners.accept(reactor, taken, Tcp::at(any), Keeps(Rc::clone(&keeps))),
                    listeners.listen(reactor, taken, Unix::at("/nowhere"), recorder),
                    listeners.accept(
                        reactor,
                        taken,
                        Unix::at("/nowhere"),
                        Keeps(Rc::clone(&keeps)),
                    ),
                ]
                .map(|result| result.map_err(|error| error.kind()));
                assert_eq!(kinds, [Err(io::ErrorKind::AlreadyExists); 4], "{taken}");
            }
            for handle in handles {
                let listener = reactor.get(handle).expect("it listens");
                seen.borrow_mut().push(listener.address());
            }
            Ok(())
        });
        stage.settle();
        assert!(server.restart.is_serving());
        found.push(addresses.take());
        servers.push(server);
    }
    assert_eq!(found[0].len(), 4);
    assert_eq!(found[0], found[1], "the same sockets");
    let Address::Inet(pool) = &found[1][2] else {
        panic!("{found:?}")
    };
    let client = std::net::TcpStream::connect(pool).expect("it listens");
    stage.settle();
    let local = client.local_addr().expect("an address");
    let fds = accepted.take();
    assert_eq!(fds.len(), 1);
    let socket = std::net::TcpStream::from(fds.into_iter().next().expect("one"));
    assert_eq!(socket.peer_addr().expect("connected"), local);
}

#[test]
fn descriptors_from_elsewhere_are_claimed_by_name() {
    let mut stage = Stage::new();
    let listener = StdUnixListener::bind(stage.path("web")).expect("bound");
    listener.set_nonblocking(true).expect("a socket");
    let mut settings = stage.settings();
    settings.inherited.add("web", listener.into());
    settings.inherited.add("store", file());
    let path = stage.path("web");
    let server = stage.begin_as(settings, "old", move |scene, reactor, listeners| {
        assert!(listeners.inherited().claim("store").is_some());
        let lines = Line::factory(scene, listeners.restart());
        let handle = listeners.listen(reactor, "web", Unix::at(path.clone()), lines)?;
        // It was made by somebody else.
        assert!(
            reactor
                .get(handle)
                .expect("it listens")
                .socket_file()
                .is_none()
        );
        assert!(listeners.inherited().is_empty());
        Ok(())
    });
    stage.settle();
    assert_eq!(server.events(), ["listens", "serves"]);
    let mut client = stage.client("web");
    assert_eq!(stage.ask(&mut client, "who"), "old 0");
}

/// A successor has those of its predecessor first, and its own beside them.
#[test]
fn successor_claims_what_it_was_given_from_elsewhere_too() {
    let mut stage = Stage::new();
    let _old = stage.begin("old", &["web"]);
    let mut settings = stage.settings();
    settings.inherited.add("store", file());
    let names = Rc::new(std::cell::RefCell::new(Vec::new()));
    let seen = Rc::clone(&names);
    let new = stage.begin_as(settings, "new", move |_, _, listeners| {
        let all = listeners.inherited().names().map(str::to_owned);
        seen.borrow_mut().extend(all);
        let web = listeners.inherited().claim("web").expect("inherited");
        assert!(describe_socket(web.as_fd()).expect("a socket").is_listening);
        Ok(())
    });
    stage.settle();
    assert!(new.restart.is_serving());
    assert_eq!(names.take(), ["web", "store"]);
}

#[test]
fn service_manager_is_told_each_step() {
    let mut stage = Stage::new();
    let manager = UnixDatagram::bind(stage.path("manager")).expect("bound");
    manager.set_nonblocking(true).expect("a socket");
    let told = || {
        let mut bytes = [0; 256];
        let mut all = Vec::new();
        while let Ok(length) = manager.recv(&mut bytes) {
            all.push(String::from_utf8_lossy(&bytes[..length]).into_owned());
        }
        all
    };
    let mut settings = stage.settings();
    let address = stage.path("manager");
    let notifier = Notifier::connect(address.to_str().expect("text")).expect("it is there");
    settings.notifier = Some(Rc::new(notifier));
    let server = stage.begin_with(settings, "old", &["web"]);
    assert_eq!(told(), ["READY=1\n"]);
    // One that nobody has started here.
    let hand = stage.successor(4_242);
    stage.say(&hand, &wire::take(0));
    stage.hang_up(hand);
    assert_eq!(told(), ["READY=1\n"], "it is ready again");
    let hand = stage.successor(4_242);
    stage.say_all(&hand, [wire::take(0), wire::taken(0), wire::ready()]);
    assert_eq!(told(), [""; 0]);
    stage.say(&hand, &wire::serving());
    assert_eq!(told(), ["MAINPID=4242\n"]);
    assert!(server.restart.has_handed_over());
}

#[test]
fn what_is_left_is_cut_when_the_time_to_drain_is_over() {
    let mut stage = Stage::new();
    let server = stage.begin("old", &["web"]);
    stage.reactor.start().expect("not running");
    let hand = stage.successor(1);
    stage.say_all(
        &hand,
        [
            wire::take(0),
            wire::taken(0),
            wire::ready(),
            wire::serving(),
        ],
    );
    assert_eq!(server.events().last().expect("told"), "handed over");
    stage.advance(ms(6_999));
    assert!(stage.reactor.is_running());
    stage.advance(ms(1));
    assert!(!stage.reactor.is_running());
}
