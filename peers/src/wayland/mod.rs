//! The wire protocol of Wayland, for clients and for compositors.
//!
//! [`client`] and [`server`] are the protocols of the two ends, for a [`WaylandPeer`]. They
//! track which objects exist, and the [`Interface`] of each. So they know what a message
//! means: they check and parse its arguments, and give it as many descriptors as it has
//! arguments of that type. The program decides what the objects do.
//!
//! Interfaces are tables of [signatures](Signature), in the letters of libwayland.
//! [`interfaces`] has those of the core protocol and of xdg-shell that clients without
//! input need. A program writes others in the same way.
//!
//! A client finds its compositor with [`WAYLAND_SOCKET`](take_socket), a descriptor number,
//! or with `WAYLAND_DISPLAY`, a path below `XDG_RUNTIME_DIR` ([`display_path`]).
//!
//! | limit | default | of |
//! |---|---|---|
//! | bytes of a message, header included | 4,096 | libwayland |
//! | descriptors of a message that is sent | 28 | libwayland, which loses any more |
//! | descriptors that wait for their message | 1,024 | libwayland |
//! | how long they wait | 30 s | ours; libwayland has no limit |
//!
//! A peer that breaks the rules is disconnected. A server says why, as libwayland does:
//! `wl_display.error`. After an error in sending, everything that the peer has sent is
//! still delivered, so that a client receives such an error.
//!
//! # Examples
//!
//! A client that lists what a compositor offers:
//!
//! ```no_run
//! use bowline::{CloseReason, Once, Reactor, Transports, UnixTransport};
//! use bowline_peers::wayland::{
//!     Argument, DISPLAY, WaylandContext, WaylandMessage, WaylandPeer, client, display_path,
//!     interfaces,
//! };
//!
//! struct Lister;
//!
//! impl<T: UnixTransport> WaylandPeer<T> for Lister {
//!     fn connection_made(&mut self, cx: &mut WaylandContext<'_, T>) {
//!         let (registry, callback) = (cx.new_id(), cx.new_id());
//!         for (request, id) in [("get_registry", registry), ("sync", callback)] {
//!             cx.send(DISPLAY, request, [Argument::NewId(id)]).expect("as its signature");
//!         }
//!     }
//!
//!     fn message_received(
//!         &mut self,
//!         cx: &mut WaylandContext<'_, T>,
//!         message: &mut WaylandMessage<'_>,
//!     ) {
//!         match (message.interface.name, message.name()) {
//!             ("wl_registry", "global") => {
//!                 println!("{} {}", message.string(1), message.uint(2));
//!             }
//!             ("wl_display", "error") => eprintln!("{}", message.string(2)),
//!             ("wl_callback", "done") => cx.transport.lose_connection(),
//!             _ => {}
//!         }
//!     }
//!
//!     fn connection_lost(&mut self, reactor: &mut Reactor, _: &CloseReason) {
//!         reactor.stop().expect("it runs");
//!     }
//! }
//!
//! let mut reactor = Reactor::new()?;
//! let path = display_path().ok_or("no WAYLAND_DISPLAY")?;
//! reactor.connect_unix(path.as_path(), Once::new(client(Lister)))?;
//! reactor.run()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use bowline::process::{remove_environment, take_granted};

mod arguments;
mod connection;
mod framing;
pub mod interfaces;
mod objects;

pub use self::arguments::{Argument, WaylandMessage};
pub use self::connection::{
    WaylandConnection, WaylandContext, WaylandPeer, WaylandSendError, WaylandSendErrorKind, client,
    server,
};
pub use self::framing::{WaylandFramer, WaylandHeader};
pub use self::interfaces::{Interface, Signature};

/// The object that exists from the beginning, `wl_display`.
pub const DISPLAY: u32 = 1;

/// The variable of a compositor that has already connected its client.
const SOCKET: &str = "WAYLAND_SOCKET";

/// Takes the connection that a compositor has opened for this process, if there is one. Try
/// it before [`display_path`]. Call it at the beginning, before there are other threads.
/// Our own children do not find the connection any more.
///
/// # Errors
///
/// The variable does not name a descriptor that this process was given, or there are other
/// threads already ([`Unsupported`](io::ErrorKind::Unsupported)).
pub fn take_socket() -> io::Result<Option<OwnedFd>> {
    let Some(number) = std::env::var_os(SOCKET) else {
        return Ok(None);
    };
    let number = number.to_str().and_then(|number| number.parse().ok());
    let number = number.ok_or(io::ErrorKind::InvalidInput)?;
    remove_environment(&[SOCKET])?;
    take_granted(number).map(Some)
}

/// Returns the path of the compositor's socket, from the environment. It is
/// `WAYLAND_DISPLAY`, or `wayland-0` if that is not set, below `XDG_RUNTIME_DIR` unless it
/// is absolute.
pub fn display_path() -> Option<PathBuf> {
    let display = std::env::var_os("WAYLAND_DISPLAY").unwrap_or_else(|| "wayland-0".into());
    let display = PathBuf::from(display);
    if display.is_absolute() {
        return Some(display);
    }
    let folder = std::env::var_os("XDG_RUNTIME_DIR")?;
    Some(PathBuf::from(folder).join(display))
}
