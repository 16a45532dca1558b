//! A service of one method, `Take(ah) -> u`, which tells how many descriptors it was given.

use std::fs;
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use bowline::process::close_all;
use bowline::{
    Address, CloseReason, Linger, Once, Reactor, Transports as _, Unix, UnixStream,
    UnixTransport as _,
};
use bowline_peers::dbus::{
    ByteOrder, DbusCaller, DbusContext, DbusHandler, DbusHeader, DbusMessage, DbusRole,
    DbusSettings, connection, zvariant,
};

use crate::generator::{Wire, borrowed, files, word};
use crate::peer::{Peer, Process, wait_for};
use crate::{Outcome, Session, Work};

pub(crate) const PEERS: &[Peer] = &[
    Peer::rust("bowline"),
    Peer::rust("bowline, trusting"),
    Peer::rust("bowline, zvariant"),
    Peer::rust("zbus"),
    Peer {
        name: "sd-bus",
        source: Some(("with_sd_bus.c", "libsystemd-dev", "libsystemd")),
    },
    Peer {
        name: "libdbus",
        source: Some(("with_libdbus.c", "libdbus-1-dev", "dbus-1")),
    },
];

const fn work(
    name: &'static str,
    kind: &'static str,
    descriptors: usize,
    at_once: usize,
    times: usize,
) -> Work {
    Work {
        name,
        kind,
        times,
        messages: at_once,
        connect,
        detail: (descriptors, at_once),
    }
}

pub(crate) const WORKS: &[Work] = &[
    work(
        "peer to peer, 0 descriptors, 1 call at once",
        "dbus-peer",
        0,
        1,
        4_000,
    ),
    work(
        "peer to peer, 1 descriptor, 1 call at once",
        "dbus-peer",
        1,
        1,
        4_000,
    ),
    work(
        "peer to peer, 16 descriptors, 1 call at once",
        "dbus-peer",
        16,
        1,
        2_000,
    ),
    work(
        "peer to peer, 0 descriptors, 16 calls at once",
        "dbus-peer",
        0,
        16,
        600,
    ),
    work(
        "peer to peer, 1 descriptor, 16 calls at once",
        "dbus-peer",
        1,
        16,
        600,
    ),
    work(
        "peer to peer, 16 descriptors, 16 calls at once",
        "dbus-peer",
        16,
        16,
        200,
    ),
    work(
        "dbus-daemon, 0 descriptors, 1 call at once",
        "dbus-bus",
        0,
        1,
        2_000,
    ),
    work(
        "dbus-daemon, 1 descriptor, 1 call at once",
        "dbus-bus",
        1,
        1,
        2_000,
    ),
    work(
        "dbus-daemon, 16 descriptors, 1 call at once",
        "dbus-bus",
        16,
        1,
        1_000,
    ),
    work(
        "dbus-daemon, 0 descriptors, 16 calls at once",
        "dbus-bus",
        0,
        16,
        300,
    ),
    work(
        "dbus-daemon, 1 descriptor, 16 calls at once",
        "dbus-bus",
        1,
        16,
        300,
    ),
    work(
        "dbus-daemon, 16 descriptors, 4 calls at once",
        "dbus-bus",
        16,
        4,
        300,
    ),
];

const PATH: &str = "/bench";
const INTERFACE: &str = "com.example.Bench";
const BUS: &str = "org.freedesktop.DBus";

pub(crate) fn serve(peer: &str, kind: &str, socket: &Path, name: &str) -> Outcome {
    match peer {
        "zbus" => with_zbus(kind, socket, name),
        "bowline" => with_bowline(kind, socket, name, Way::Bytes(Linger::Clear)),
        "bowline, trusting" => with_bowline(kind, socket, name, Way::Bytes(Linger::Keep)),
        _ => with_bowline(kind, socket, name, Way::Zvariant),
    }
}

/// How a service reads what it is called with.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// As it is, from a peer that is trusted or not.
    Bytes(Linger),
    Zvariant,
}

struct Service {
    name: String,
    way: Way,
}

type Cx<'c, 'f> = DbusContext<'c, 'f, UnixStream, Service>;

impl DbusHandler<UnixStream> for Service {
    fn ready(&mut self, cx: &mut Cx<'_, '_>) {
        if let Way::Bytes(linger) = self.way {
            cx.transport().set_received_linger(linger);
        }
        if !cx.unique_name().is_empty() {
            let header = DbusHeader::call("/org/freedesktop/DBus", "RequestName")
                .interface(BUS)
                .destination(BUS);
            cx.call_with(&header, &(&self.name, 4_u32), |_, _, _| {})
                .expect("well-formed");
        }
    }

    fn call_received(&mut self, cx: &mut Cx<'_, '_>, call: &DbusMessage<'_>) {
        let caller = DbusCaller::of(call);
        let sent = if self.way == Way::Zvariant {
            let given: Vec<zvariant::OwnedFd> =
                call.body_with_as(cx.descriptors()).expect("of this type");
            cx.reply_with(&caller, &(given.len() as u32))
        } else {
            let descriptors = cx.descriptors();
            let count = descriptors.len() as u32;
            close_all(descriptors);
            cx.reply(&caller, "u", &count.to_ne_bytes(), Vec::new())
        };
        sent.expect("a reply");
    }

    fn connection_lost(&mut self, reactor: &mut Reactor, _: &CloseReason) {
        let _ = reactor.stop();
    }
}

fn with_bowline(kind: &str, socket: &Path, name: &str, way: Way) -> Outcome {
    let mut reactor = Reactor::new()?;
    let name = name.to_owned();
    let settings = DbusSettings::default;
    if kind == "dbus-bus" {
        let service = Service { name, way };
        let protocol = connection(DbusRole::Bus, settings(), service);
        reactor.connect_unix(socket, Once::new(protocol))?;
    } else {
        reactor.listen(Unix::at(socket), move |_: &Address| {
            let name = name.clone();
            connection(DbusRole::Service, settings(), Service { name, way })
        })?;
    }
    reactor.run()?;
    Ok(())
}

struct Bench;

#[zbus::interface(name = "com.example.Bench", spawn = false)]
impl Bench {
    fn take(&self, given: Vec<zbus::zvariant::OwnedFd>) -> u32 {
        given.len() as u32
    }
}

fn with_zbus(kind: &str, socket: &Path, name: &str) -> Outcome {
    use zbus::connection::Builder;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let listener = match kind {
        "dbus-bus" => None,
        _ => Some(UnixListener::bind(socket)?),
    };
    runtime.block_on(async move {
        let builder = match listener {
            Some(listener) => {
                let stream = listener.accept()?.0;
                stream.set_nonblocking(true)?;
                let stream = tokio::net::UnixStream::from_std(stream)?;
                Builder::unix_stream(stream)
                    .server(zbus::Guid::generate())?
                    .p2p()
            }
            None => {
                let address = format!("unix:path={}", socket.display());
                Builder::address(&*address)?.name(name.to_owned())?
            }
        };
        let connection = builder.serve_at(PATH, Bench)?.build().await?;
        std::future::pending::<()>().await;
        drop(connection);
        Ok(())
    })
}

/// A bus of our own.
pub(crate) struct Bus {
    daemon: Child,
    pub(crate) socket: PathBuf,
}

impl Bus {
    pub(crate) fn start(scratch: &Path) -> Outcome<Self> {
        let socket = scratch.join("bus");
        let config = scratch.join("bus.conf");
        let text = format!(
            "<busconfig><type>session</type><listen>unix:path={}</listen><auth>EXTERNAL</auth>\
             <policy context=\"default\"><allow send_destination=\"*\" eavesdrop=\"true\"/>\
             <allow eavesdrop=\"true\"/><allow own=\"*\"/><allow user=\"*\"/></policy></busconfig>",
            socket.display()
        );
        fs::write(&config, text)?;
        let daemon = Command::new("dbus-daemon")
            .arg("--nofork")
            .arg(format!("--config-file={}", config.display()))
            .spawn()?;
        let bus = Self { daemon, socket };
        wait_for(|| std::os::unix::net::UnixStream::connect(&bus.socket).ok())?;
        Ok(bus)
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        let _ = fs::remove_file(&self.socket);
    }
}

/// Calls, so many at once, and waits for the answers to all.
struct Calls {
    wire: Wire,
    /// The calls behind each other.
    calls: Vec<u8>,
    at_once: usize,
    files: Vec<OwnedFd>,
}

fn length(bytes: &[u8]) -> Option<usize> {
    let (body, fields) = (word(bytes, 4)?, word(bytes, 12)?);
    Some(16 + fields.next_multiple_of(8) as usize + body as usize)
}

fn connect(process: &Process, work: &Work) -> Outcome<Box<dyn Session>> {
    let (descriptors, at_once) = work.detail;
    let mut wire = Wire::connect(process)?;
    let is_bus = work.kind == "dbus-bus";
    authenticate(&mut wire, is_bus)?;
    let mut header = DbusHeader::call(PATH, "Take")
        .interface(INTERFACE)
        .signature("ah");
    if is_bus {
        say_hello(&mut wire, &process.name)?;
        header = header.destination(&process.name);
    }
    let mut body = (4 * descriptors as u32).to_ne_bytes().to_vec();
    body.extend((0..descriptors as u32).flat_map(u32::to_ne_bytes));
    let (mut calls, mut call) = (Vec::new(), Vec::new());
    // A bus wants each that waits to have a number of its own.
    for number in 0..at_once as u32 {
        let serial = NonZeroU32::MIN.saturating_add(number);
        header.encode(
            ByteOrder::NATIVE,
            serial,
            body.len(),
            descriptors,
            &mut call,
        )?;
        calls.extend_from_slice(&call);
        calls.extend_from_slice(&body);
    }
    Ok(Box::new(Calls {
        wire,
        calls,
        at_once,
        files: files(descriptors)?,
    }))
}

fn authenticate(wire: &mut Wire, is_bus: bool) -> Outcome {
    let user = rustix::process::geteuid().as_raw().to_string();
    let user: String = user.bytes().map(|digit| format!("{digit:02x}")).collect();
    let line = |bytes: &[u8]| Some(bytes.windows(2).position(|it| it == b"\r\n")? + 2);
    for (say, answer) in [
        (format!("\0AUTH EXTERNAL {user}\r\n"), "OK "),
        ("NEGOTIATE_UNIX_FD\r\n".into(), "AGREE_UNIX_FD"),
    ] {
        wire.send(say.as_bytes(), &[])?;
        let said = wire.next(line)?;
        if !said.starts_with(answer.as_bytes()) {
            return Err(format!("{}", said.escape_ascii()).into());
        }
    }
    wire.send(b"BEGIN\r\n", &[])?;
    // Before this is answered, a descriptor could come in the same read as the line above,
    // which most take for a break of the rules.
    let header = DbusHeader::call("/", "Ping").interface("org.freedesktop.DBus.Peer");
    match is_bus {
        true => Ok(()),
        false => ask(wire, &header, &[]).map(drop),
    }
}

/// Calls, and waits for the answer: its kind. The rest are signals.
fn ask(wire: &mut Wire, header: &DbusHeader<'_>, body: &[u8]) -> Outcome<u8> {
    let mut call = Vec::new();
    header.encode(ByteOrder::NATIVE, NonZeroU32::MIN, body.len(), 0, &mut call)?;
    call.extend(body);
    wire.send(&call, &[])?;
    loop {
        if let kind @ 2..=3 = wire.next(length)?[1] {
            return Ok(kind);
        }
    }
}

/// Until the service has its name.
fn say_hello(wire: &mut Wire, name: &str) -> Outcome {
    let call = |member| {
        DbusHeader::call("/org/freedesktop/DBus", member)
            .interface(BUS)
            .destination(BUS)
    };
    ask(wire, &call("Hello"), &[])?;
    let mut body = (name.len() as u32).to_ne_bytes().to_vec();
    body.extend(name.bytes().chain([0]));
    let owner = call("GetNameOwner").signature("s");
    wait_for(|| (ask(wire, &owner, &body).ok()? == 2).then_some(()))
}

impl Session for Calls {
    fn run(&mut self, times: usize) -> Outcome {
        let files = borrowed(&self.files);
        for _ in 0..times {
            match files.is_empty() {
                true => self.wire.send(&self.calls, &[])?,
                false => {
                    for call in self.calls.chunks(self.calls.len() / self.at_once) {
                        self.wire.send(call, &files)?;
                    }
                }
            }
            let mut left = self.at_once;
            while left > 0 {
                let answer = self.wire.next(length)?;
                match answer[1] {
                    2 if answer.ends_with(&(files.len() as u32).to_ne_bytes()) => left -= 1,
                    4 => {}
                    _ => return Err(format!("answered: {}", answer.escape_ascii()).into()),
                }
            }
        }
        Ok(())
    }
}
