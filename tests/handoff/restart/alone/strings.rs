//! Listeners whose endpoints are strings.

use std::cell::RefCell;
use std::net::TcpListener as StdTcpListener;

use bowline::TcpStream;
use bowline::endpoint::ServerEndpoint;

use super::*;

#[derive(Clone)]
struct Silent;

impl Protocol<TcpStream> for Silent {
    fn data_received(&mut self, _: &mut Context<'_, TcpStream>, _: &[u8]) {}
}

impl Protocol<UnixStream> for Silent {
    fn data_received(&mut self, _: &mut Context<'_, UnixStream>, _: &[u8]) {}
}

/// What each listener says of itself, in order.
type Addresses = Rc<RefCell<Vec<String>>>;

/// A process that listens at the string, and says where that is. `given` is what
/// systemd or a number would have brought it.
fn begin(
    stage: &mut Stage,
    name: &'static str,
    endpoint: String,
    given: Option<OwnedFd>,
    addresses: &Addresses,
) -> Server {
    let addresses = Rc::clone(addresses);
    let given = Cell::new(given);
    let settings = stage.settings();
    let listen = move |_: &Rc<Scene>, reactor: &mut Reactor, all: &mut Listeners<'_>| {
        if let Some(fd) = given.take() {
            all.inherited().add("socket of systemd", fd);
        }
        let endpoint: ServerEndpoint = endpoint.parse().expect("a form");
        let web = endpoint.listen_among(all, reactor, "web", |_: &Address| Silent)?;
        let address = reactor.get(web).expect("it listens").address().to_string();
        addresses.borrow_mut().push(address);
        Ok(())
    };
    let server = stage.begin_as(settings, name, listen);
    stage.settle();
    server
}

/// E-08: the first process opens it, or is given it under another name; the second has it from
/// the first, whatever its string says.
#[test]
fn listener_of_a_string_is_handed_over_like_any_other() {
    let systemd = "inherited:socket of systemd";
    let forms = [
        (
            "tcp:127.0.0.1:0".to_owned(),
            "tcp:127.0.0.1:0".to_owned(),
            false,
        ),
        (
            "unix:PATH".to_owned(),
            "unix:PATH:mode=600".to_owned(),
            false,
        ),
        (systemd.to_owned(), systemd.to_owned(), true),
        (systemd.to_owned(), "tcp:127.0.0.1:0".to_owned(), true),
        (systemd.to_owned(), "systemd:name=web".to_owned(), true),
    ];
    for (first, second, is_given) in forms {
        let mut stage = Stage::new();
        let path = stage.path("web").display().to_string();
        let form = |text: &str| text.replace("PATH", &path);
        let socket = StdTcpListener::bind("127.0.0.1:0").expect("loopback");
        let given = is_given.then(|| OwnedFd::from(socket));
        let addresses = Addresses::default();
        let old = begin(&mut stage, "old", form(&first), given, &addresses);
        assert_eq!(old.events(), ["listens", "serves"], "{first}");
        let new = begin(&mut stage, "new", form(&second), None, &addresses);
        let told = new.events();
        assert!(told[1].starts_with("took over"), "{second}: {told:?}");
        let addresses = addresses.borrow();
        assert_eq!(addresses[0], addresses[1], "{first}, then {second}");
    }
}

/// What the string names was not inherited.
#[test]
fn string_that_names_nothing_is_an_error_of_the_start() {
    let mut stage = Stage::new();
    let addresses = Addresses::default();
    let form = "inherited:nothing".to_owned();
    let server = begin(&mut stage, "old", form, None, &addresses);
    let told = server.events();
    assert_eq!(told, ["listens", "not started: cannot listen"]);
    assert!(addresses.borrow().is_empty());
}
