//! Wayland with programs of libwayland: weston as the compositor of a client of ours, and
//! its clients with a compositor of ours.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;

use bowline::{Address, CloseReason, Once, Reactor, Transports, Unix, UnixTransport};
use bowline_peers::wayland::{
    Argument, DISPLAY, Interface, Signature, WaylandContext, WaylandMessage, WaylandPeer,
    WaylandSendError, WaylandSendErrorKind, client, interfaces, server,
};
use rustix::fs::MemfdFlags;

use crate::programs::{Program, has};
use crate::suite::{Heard, Limit, Message, Rule, Sample, Served, send};
use crate::support::{DescriptorLedger, run_until, settle, socketpair};

/// An interface for the suite.
static TEST: Interface = Interface {
    name: "test",
    requests: &[
        Signature::new("plain", "s"),
        Signature::new("one", "hs"),
        Signature::new("three", "hshh"),
    ],
    events: &[
        Signature::new("plain", "s"),
        Signature::new("one", "hs"),
        Signature::new("three", "hshh"),
    ],
};

/// The object of that interface, which the suite begins with.
const OBJECT: u32 = 2;

struct Teller(Heard);

impl<T: UnixTransport> WaylandPeer<T> for Teller {
    fn connection_made(&mut self, cx: &mut WaylandContext<'_, T>) {
        assert!(cx.register(OBJECT, &TEST));
    }

    fn message_received(
        &mut self,
        _: &mut WaylandContext<'_, T>,
        message: &mut WaylandMessage<'_>,
    ) {
        let (places, text): (&[_], _) = match message.name() {
            "plain" => (&[], message.string(0)),
            "one" => (&[0], message.string(1)),
            _ => (&[0, 2, 3], message.string(1)),
        };
        let shown = format!("{} of {}", &text[..text.len().min(8)], text.len());
        let descriptors: Vec<_> = places
            .iter()
            .map(|place| message.take_descriptor(*place))
            .collect();
        self.0.message(shown, descriptors);
    }
}

/// What a client sends to the object of the suite.
fn message(opcode: u16, text: &str) -> Message {
    let mut bytes = (text.len() as u32 + 1).to_ne_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes.push(0);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    let second = (bytes.len() as u32 + 8) << 16 | u32::from(opcode);
    let head = [OBJECT.to_ne_bytes(), second.to_ne_bytes()].concat();
    let shown = format!("{} of {}", &text[..text.len().min(8)], text.len());
    let descriptors = [0, 1, 3][usize::from(opcode)];
    Message::new([head, bytes].concat(), descriptors, shown)
}

struct Requests;

impl Sample for Requests {
    fn rule(&self) -> Rule {
        Rule::ClaimedOrWaits
    }

    fn serve(&self, reactor: &mut Reactor, heard: &Heard) -> Served {
        let framed = server(Teller(heard.clone()));
        Served::by(|socket| reactor.adopt(Unix, socket, framed).expect("a socket"))
    }

    fn messages(&self) -> Vec<Message> {
        vec![
            message(0, "plain"),
            message(1, "one"),
            message(2, "three"),
            message(0, ""),
            message(1, "last"),
        ]
    }

    fn limits(&self) -> Vec<Limit> {
        let longest = "x".repeat(4_096 - 8 - 4 - 1);
        vec![Limit {
            of: "bytes",
            within: message(1, &longest),
            beyond: message(1, &format!("{longest}x")),
        }]
    }
}

suite!(requests, Requests);

#[test]
fn client_that_breaks_the_rules_is_told_which() {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().expect("a reactor");
        let header = |object: u32, second: u32| [object.to_ne_bytes(), second.to_ne_bytes()];
        let good = message(0, "x").bytes;
        for (bytes, error) in [
            (header(7, 8 << 16).concat(), "invalid object 7"),
            (
                header(OBJECT, 8 << 16 | 3).concat(),
                "invalid method 3, object test@2",
            ),
            (
                header(OBJECT, 8 << 16).concat(),
                "invalid arguments for test@2.plain",
            ),
            (message(1, "x").bytes, "invalid arguments for test@2.one"),
            (header(OBJECT, 4_100 << 16).concat(), "4096 are allowed"),
            (
                [&header(DISPLAY, 12 << 16).concat()[..], &[2, 0, 0, 0]].concat(),
                "invalid new id 2",
            ),
        ] {
            let heard = Heard::default();
            let (ours, peer) = socketpair();
            let teller = server(Teller(heard.clone()));
            let handle = reactor.adopt(Unix, ours.into(), teller).expect("a socket");
            send(&peer, &bytes, &[]);
            send(&peer, &good, &[]);
            settle(&mut reactor);
            let mut answer = [0; 512];
            let count = std::io::Read::read(&mut &peer, &mut answer).expect("an error");
            let answer = String::from_utf8_lossy(&answer[..count]).into_owned();
            assert!(answer.contains(error), "{error}: {answer:?}");
            drop(peer);
            run_until(&mut reactor, |reactor| reactor.get(handle).is_none());
        }
    }
    ledger.assert_balanced();
}

/// What a client of ours has heard.
#[derive(Default)]
struct Seen {
    globals: BTreeMap<String, (u32, u32)>,
    formats: Vec<u32>,
    errors: Vec<String>,
    syncs: u32,
    is_lost: bool,
}

/// A client that makes a pool of shared memory, and a buffer in it.
struct Drawer {
    seen: Rc<RefCell<Seen>>,
    registry: u32,
    /// How many bytes more than there are it says that there are.
    too_many: i32,
}

impl Drawer {
    fn sync<T: UnixTransport>(cx: &mut WaylandContext<'_, T>) {
        let callback = cx.new_id();
        cx.send(DISPLAY, "sync", [Argument::NewId(callback)])
            .expect("as its signature");
    }

    fn draw<T: UnixTransport>(&self, cx: &mut WaylandContext<'_, T>) {
        let (global, _) = self.seen.borrow().globals["wl_shm"];
        let shm = cx
            .bind(self.registry, global, &interfaces::WL_SHM, 1)
            .expect("as its signature");
        let memory = || {
            let memory = rustix::fs::memfd_create("pixels", MemfdFlags::CLOEXEC).expect("made");
            rustix::fs::ftruncate(&memory, 4_096).expect("room");
            memory
        };
        let pool = cx.new_id();
        let arguments = |id, size| {
            [
                Argument::NewId(id),
                Argument::Descriptor(Some(memory().into())),
                Argument::Int(size),
            ]
        };
        // What is not as its signature is not sent, and comes back.
        let error = cx
            .send(
                shm,
                "create_pool",
                [Argument::NewId(pool), Argument::Int(1)],
            )
            .expect_err("too few");
        assert_eq!(error.kind, WaylandSendErrorKind::Arguments);
        let error = cx
            .send(shm, "no_such", arguments(pool, 1))
            .expect_err("no such");
        assert_eq!(error.kind, WaylandSendErrorKind::NoMessage);
        assert_eq!(error.descriptors.len(), 1);
        cx.send(shm, "create_pool", arguments(pool, 4_096))
            .expect("sent");
        let taken = cx
            .send(shm, "create_pool", arguments(pool, 1))
            .expect_err("taken");
        assert_eq!(taken.kind, WaylandSendErrorKind::Arguments);
        let buffer = cx.new_id();
        let part = [0, 16, 16 + self.too_many, 64].map(Argument::Int);
        let mut arguments = vec![Argument::NewId(buffer)];
        arguments.extend(part);
        arguments.push(Argument::Uint(1));
        cx.send(pool, "create_buffer", arguments).expect("sent");
        for object in [buffer, pool] {
            cx.send(object, "destroy", []).expect("sent");
            let gone = cx.send(object, "destroy", []).expect_err("gone");
            assert_eq!(gone.kind, WaylandSendErrorKind::NoObject);
        }
        Self::sync(cx);
    }
}

impl<T: UnixTransport> WaylandPeer<T> for Drawer {
    fn connection_made(&mut self, cx: &mut WaylandContext<'_, T>) {
        self.registry = cx.new_id();
        cx.send(DISPLAY, "get_registry", [Argument::NewId(self.registry)])
            .expect("as its signature");
        Self::sync(cx);
    }

    fn message_received(
        &mut self,
        cx: &mut WaylandContext<'_, T>,
        message: &mut WaylandMessage<'_>,
    ) {
        let mut seen = self.seen.borrow_mut();
        match (message.interface.name, message.name()) {
            ("wl_registry", "global") => {
                let global = (message.uint(0), message.uint(2));
                seen.globals.insert(message.string(1).into_owned(), global);
            }
            ("wl_shm", "format") => seen.formats.push(message.uint(0)),
            ("wl_display", "error") => seen.errors.push(message.string(2).into_owned()),
            ("wl_callback", "done") => {
                seen.syncs += 1;
                let count = seen.syncs;
                drop(seen);
                match count {
                    1 => self.draw(cx),
                    _ => cx.transport.lose_connection(),
                }
            }
            _ => {}
        }
    }

    fn connection_lost(&mut self, _: &mut Reactor, _: &CloseReason) {
        self.seen.borrow_mut().is_lost = true;
    }
}

fn weston(folder: &Path) -> Program {
    let mut command = Command::new("weston");
    command
        .env("XDG_RUNTIME_DIR", folder)
        .args([
            "--backend=headless-backend.so",
            "--use-pixman",
            "--no-config",
        ])
        .args([
            "--shell=fullscreen-shell.so",
            "--socket=wl",
            "--idle-time=0",
        ]);
    Program::start(&mut command)
}

#[test]
fn client_shares_memory_with_weston_which_keeps_no_descriptor() {
    let _ledger = DescriptorLedger::open();
    if !has("weston", "weston") {
        return;
    }
    let directory = tempfile::tempdir().expect("a folder");
    let mut reactor = Reactor::new().expect("a reactor");
    let mut weston = weston(directory.path());
    let socket = directory.path().join("wl");
    weston.wait_for_listener(&mut reactor, &socket);
    let mut before = None;
    for too_many in [0, 0, 0, 0, 0, 10_000] {
        let seen = Rc::new(RefCell::new(Seen::default()));
        let drawer = client(Drawer {
            seen: Rc::clone(&seen),
            registry: 0,
            too_many,
        });
        reactor
            .connect_unix(socket.as_path(), Once::new(drawer))
            .expect("room");
        run_until(&mut reactor, |_| seen.borrow().is_lost);
        let seen = seen.borrow();
        assert!(
            seen.globals.contains_key("wl_compositor"),
            "{:?}",
            seen.globals
        );
        if too_many == 0 {
            assert_eq!(seen.errors, [""; 0]);
            assert_eq!(seen.syncs, 2);
            assert!(seen.formats.contains(&1), "{:?}", seen.formats);
        } else {
            // Its last words.
            assert_eq!(seen.errors.len(), 1);
            assert!(seen.errors[0].contains("invalid"), "{:?}", seen.errors);
        }
        before.get_or_insert_with(|| weston.open_descriptors());
    }
    weston.wait_for_descriptors_at_most(&mut reactor, before.expect("of five"));
}

/// Interfaces that are not among ours, in the way in which a program gives its own.
static WL_SEAT: Interface = Interface {
    name: "wl_seat",
    requests: &[
        Signature::new("get_pointer", "n"),
        Signature::new("get_keyboard", "n").creating(&WL_KEYBOARD),
        Signature::new("get_touch", "n"),
    ],
    events: &[
        Signature::new("capabilities", "u"),
        Signature::new("name", "s"),
    ],
};
static WL_KEYBOARD: Interface = Interface {
    name: "wl_keyboard",
    requests: &[Signature::new("release", "").destroying()],
    events: &[
        Signature::new("keymap", "uhu"),
        Signature::new("enter", "uoa"),
        Signature::new("leave", "uo"),
        Signature::new("key", "uuuu"),
        Signature::new("modifiers", "uuuuu"),
        Signature::new("repeat_info", "ii"),
    ],
};

/// A compositor that has only what is listed.
struct Offer;

static OFFERED: [(&Interface, u32); 2] = [(&interfaces::WL_SHM, 1), (&WL_SEAT, 4)];

impl Offer {
    fn answer<T: UnixTransport>(
        cx: &mut WaylandContext<'_, T>,
        message: &WaylandMessage<'_>,
    ) -> Result<(), WaylandSendError> {
        match message.name() {
            "get_registry" => {
                for (number, (interface, version)) in (5..).zip(OFFERED) {
                    let name = Argument::String(Some(interface.name.as_bytes()));
                    let global = [Argument::Uint(number), name, Argument::Uint(version)];
                    cx.send(message.object(0), "global", global)?;
                }
            }
            "sync" => {
                cx.send(message.object(0), "done", [Argument::Uint(1)])?;
            }
            "bind" => {
                let id = message.object(3);
                let interface = OFFERED[message.uint(0) as usize - 5].0;
                assert!(cx.register(id, interface));
                if interface.name == "wl_shm" {
                    cx.send(id, "format", [Argument::Uint(0x3432_4752)])?;
                } else {
                    // A keyboard.
                    cx.send(id, "capabilities", [Argument::Uint(2)])?;
                    cx.send(id, "name", [Argument::String(Some(b"hands"))])?;
                }
            }
            "get_keyboard" => {
                let keyboard = message.object(0);
                let keymap = rustix::fs::memfd_create("keys", MemfdFlags::CLOEXEC).expect("made");
                rustix::fs::ftruncate(&keymap, 4_096).expect("room");
                let keymap = Argument::Descriptor(Some(keymap.into()));
                cx.send(
                    keyboard,
                    "keymap",
                    [Argument::Uint(1), keymap, Argument::Uint(4_096)],
                )?;
                let repeat = [31, 700].map(Argument::Int);
                cx.send(keyboard, "repeat_info", repeat)?;
            }
            _ => {}
        }
        Ok(())
    }
}

impl<T: UnixTransport> WaylandPeer<T> for Offer {
    fn message_received(
        &mut self,
        cx: &mut WaylandContext<'_, T>,
        message: &mut WaylandMessage<'_>,
    ) {
        Self::answer(cx, message).expect("as its signature");
    }
}

#[test]
fn wayland_info_is_told_what_there_is() {
    let _ledger = DescriptorLedger::open();
    if !has("wayland-info", "wayland-utils") {
        return;
    }
    let directory = tempfile::tempdir().expect("a folder");
    let path = directory.path().join("display");
    let mut reactor = Reactor::new().expect("a reactor");
    let listener = reactor
        .listen_unix(path.as_path(), |_: &Address| server(Offer))
        .expect("it listens");
    let mut command = Command::new("wayland-info");
    command
        .env("WAYLAND_DISPLAY", &path)
        .env("XDG_RUNTIME_DIR", directory.path());
    let mut program = Program::start(&mut command);
    let (is_well, said) = program.end(&mut reactor);
    assert!(is_well, "{said}");
    assert!(said.contains("wl_shm"), "{said}");
    assert!(said.contains("RG24"), "the format that it was told: {said}");
    // It would not have got this far without the keymap in front of it.
    for told in [
        "hands",
        "keyboard repeat rate: 31",
        "keyboard repeat delay: 700",
    ] {
        assert!(said.contains(told), "{told}: {said}");
    }
    reactor.get(listener).expect("it listens").stop_listening();
    settle(&mut reactor);
}
