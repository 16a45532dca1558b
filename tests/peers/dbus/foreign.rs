//! A service of another library, sd-bus, that passes descriptors to a client of ours and
//! takes some, on a bus and without one.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use bowline::{AnyConnection as _, CloseReason, Once, Reactor, Transports};
use bowline_peers::dbus::{
    DbusAnswer, DbusHandler, DbusHeader, DbusRole, DbusSettings, connection, zvariant,
};

use super::{Cx, Noter, UnixStream, start_bus};
use crate::programs::{Program, content, memory, say_missing};
use crate::support::{DescriptorLedger, run_until};

/// Asks for a memfd, and gives two, several times and all at once.
struct Client {
    noter: Noter,
    service: Option<&'static str>,
}

const ROUNDS: usize = 3;

impl Client {
    fn header(&self, member: &'static str) -> DbusHeader<'static> {
        let header = DbusHeader::call("/files", member).interface("com.example.Files");
        match self.service {
            Some(service) => header.destination(service),
            None => header,
        }
    }
}

impl DbusHandler<UnixStream> for Client {
    fn ready(&mut self, cx: &mut Cx<'_, '_, Self>) {
        assert!(cx.passes_descriptors());
        for _ in 0..ROUNDS {
            let open = self.header("Open");
            let asked = cx.call_with(&open, "in memory", |client, cx, answer| {
                let DbusAnswer::Return(reply) = answer else {
                    panic!("{answer:?}")
                };
                let its: Vec<_> = cx.descriptors().collect();
                assert_eq!(its.len(), 1);
                let file: zvariant::OwnedFd = reply.body_with_as(its).unwrap();
                client.noter.note(content(file.into()));
            });
            asked.unwrap();
            let (first, second) = (memory("one"), memory("two"));
            let given = (zvariant::Fd::from(&first), zvariant::Fd::from(&second));
            let store = self.header("Store");
            let asked = cx.call_with(&store, &given, |client, cx, answer| {
                let DbusAnswer::Return(reply) = answer else {
                    panic!("{answer:?}")
                };
                client.noter.note(reply.body_as::<String>().unwrap());
                if cx.waiting_calls() == 0 {
                    cx.transport().lose_connection();
                }
            });
            asked.unwrap();
        }
    }

    fn connection_lost(&mut self, _: &mut Reactor, _: &CloseReason) {
        self.noter.note("lost");
    }
}

/// The service, which is there; `None` where the library is missing.
fn start(kind: &str, socket: &Path, reactor: &mut Reactor) -> Option<Program> {
    let library = ["-c", "import ctypes; ctypes.CDLL('libsystemd.so.0')"];
    let found = Command::new("/usr/bin/python3").args(library).output();
    if !found.is_ok_and(|it| it.status.success()) {
        say_missing("libsystemd", "apt-get install libsystemd0 python3");
        return None;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/peers/dbus/sd_bus_service.py");
    let mut command = Command::new("/usr/bin/python3");
    command.args([script.as_os_str(), OsStr::new(kind), socket.as_os_str()]);
    let service = Program::start(&mut command);
    service.wait_for(reactor, "serving");
    Some(service)
}

/// Connects, and has all of it answered.
fn ask(reactor: &mut Reactor, socket: &Path, role: DbusRole, service: Option<&'static str>) {
    let noter = Noter::default();
    let client = Client {
        noter: noter.clone(),
        service,
    };
    let client = connection(role, DbusSettings::default(), client);
    reactor.connect_unix(socket, Once::new(client)).unwrap();
    run_until(reactor, |_| noter.0.borrow().len() == 2 * ROUNDS + 1);
    let answers = ["in memory", "one and two"].repeat(ROUNDS);
    assert_eq!(*noter.0.borrow(), [answers, vec!["lost"]].concat());
}

#[test]
fn service_of_sd_bus_passes_descriptors_to_us_on_a_real_bus() {
    let _ledger = DescriptorLedger::open();
    let folder = tempfile::tempdir().unwrap();
    let mut reactor = Reactor::new().unwrap();
    let Some((daemon, socket)) = start_bus(folder.path(), &mut reactor) else {
        return;
    };
    let Some(service) = start("bus", &socket, &mut reactor) else {
        return;
    };
    let before = [&daemon, &service].map(Program::open_descriptors);
    for _ in 0..2 {
        ask(
            &mut reactor,
            &socket,
            DbusRole::Bus,
            Some("com.example.Systemd"),
        );
        daemon.wait_for_descriptors(&mut reactor, before[0]);
        service.wait_for_descriptors(&mut reactor, before[1]);
    }
}

#[test]
fn service_of_sd_bus_passes_descriptors_to_us_without_a_bus() {
    let _ledger = DescriptorLedger::open();
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("peer");
    let mut reactor = Reactor::new().unwrap();
    let Some(mut service) = start("peer", &socket, &mut reactor) else {
        return;
    };
    ask(&mut reactor, &socket, DbusRole::Client, None);
    let (is_well, said) = service.end(&mut reactor);
    assert!(is_well, "{said}");
}
