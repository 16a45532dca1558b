//! A D-Bus service that hands out files of sealed memory.
//!
//! It has the name `com.example.Memory` on the session bus, or on the bus whose socket is
//! named, and one method: `Open(s) -> h` answers a memfd with the text in
//! it, which nobody can change any more.
//!
//! ```console
//! $ cargo run --example dbus_memfd [-- --bus SOCKET]
//! $ busctl --user call com.example.Memory /memory com.example.Memory Open s hello
//! ```
//!
//! In Python, with a descriptor to read:
//!
//! ```python
//! import dbus, os
//! memory = dbus.SessionBus().get_object('com.example.Memory', '/memory', introspect=False)
//! fd = memory.Open('hello', dbus_interface='com.example.Memory').take()
//! print(os.pread(fd, 100, 0))
//! ```

#![allow(clippy::print_stdout)]

mod common;

use std::io;
use std::os::fd::OwnedFd;

use bowline::descriptor::SealedMemory;
use bowline::{CloseReason, Once, Reactor, Transports, UnixAddress, UnixTransport};
use bowline_peers::dbus::zvariant::Fd;
use bowline_peers::dbus::{
    DbusAnswer, DbusCaller, DbusContext, DbusHandler, DbusHeader, DbusMessage, DbusRole,
    DbusSettings, connection, unix_address,
};

use common::{Arguments, Inspect};

const HELP: &str = "
A D-Bus service that hands out files of sealed memory.

Usage: dbus_memfd [--bus SOCKET]

  --bus SOCKET     the bus [default: by DBUS_SESSION_BUS_ADDRESS]
  --inspect PLACE  show what is inside: on a UNIX socket (a path),
                   or to browsers (an address)
  --help           prints this
";

const NAME: &str = "com.example.Memory";
const BUS: &str = "org.freedesktop.DBus";

struct Memory;

impl<T: UnixTransport> DbusHandler<T> for Memory {
    fn ready(&mut self, cx: &mut DbusContext<'_, '_, T, Self>) {
        let header = DbusHeader::call("/org/freedesktop/DBus", "RequestName")
            .interface(BUS)
            .destination(BUS);
        // 4: answer at once, instead of having us wait for the name.
        let asked = cx.call_with(&header, &(NAME, 4_u32), |_, cx, answer| {
            let owner = match answer {
                DbusAnswer::Return(reply) => reply.body_as::<u32>().ok(),
                _ => None,
            };
            match owner {
                Some(1) => println!("{} is {NAME}", cx.unique_name()),
                _ => {
                    let error = format!("no {NAME} on this bus: {answer:?}");
                    cx.reactor().fail(io::Error::other(error));
                }
            }
        });
        if let Err(error) = asked {
            cx.reactor().fail(io::Error::other(error.to_string()));
        }
    }

    fn call_received(&mut self, cx: &mut DbusContext<'_, '_, T, Self>, call: &DbusMessage<'_>) {
        let caller = DbusCaller::of(call);
        let sent = match (call.header.member, call.body_as::<String>()) {
            (Some("Open"), Ok(text)) => match SealedMemory::new(NAME, text.as_bytes()) {
                Ok(memory) => cx.reply_with(&caller, &Fd::from(OwnedFd::from(memory))),
                Err(error) => {
                    let name = "org.freedesktop.DBus.Error.NoMemory";
                    cx.reply_error(&caller, name, &error.to_string())
                }
            },
            (Some("Open"), Err(error)) => {
                let name = "org.freedesktop.DBus.Error.InvalidArgs";
                cx.reply_error(&caller, name, &error.to_string())
            }
            _ => {
                let name = "org.freedesktop.DBus.Error.UnknownMethod";
                cx.reply_error(&caller, name, "there is only Open(s) -> h")
            }
        };
        if let Err(error) = sent {
            log::warn!("not answered: {error}");
        }
    }

    fn connection_lost(&mut self, reactor: &mut Reactor, reason: &CloseReason) {
        log::info!("the bus has ended: {reason}");
        // It may be stopping already.
        let _ = reactor.stop();
    }
}

fn main() -> common::Result {
    env_logger::init();
    let mut arguments = Arguments::parse(HELP);
    let bus = arguments.option::<String>("--bus")?;
    let inspect = Inspect::take(&mut arguments)?;
    arguments.finish()?;
    let bus = match bus {
        Some(socket) => UnixAddress::from(socket),
        None => {
            let addresses = std::env::var("DBUS_SESSION_BUS_ADDRESS")
                .map_err(|_| "DBUS_SESSION_BUS_ADDRESS is not set; --bus SOCKET, please")?;
            unix_address(&addresses).ok_or("the session bus has no UNIX socket")?
        }
    };
    let mut reactor = Reactor::new()?;
    Inspect::show(inspect.as_ref(), &mut reactor)?;
    let service = connection(DbusRole::Bus, DbusSettings::default(), Memory);
    let once = Once::new(service).on_failure(|cx, _, error| {
        cx.reactor
            .fail(io::Error::other(format!("no bus: {error}")));
    });
    reactor.connect_unix(bus, once)?;
    reactor.stop_on_signals()?;
    reactor.run()?;
    Ok(())
}
