//! D-Bus: messages between programs, mostly through a bus.
//!
//! [`connection`] makes a protocol of a [`DbusHandler`]. It connects to a bus or to a peer,
//! or is connected to ([`DbusRole`]). It authenticates with the mechanism EXTERNAL,
//! negotiates the passing of descriptors, numbers the calls, and finds the answer to each.
//! It understands both byte orders.
//!
//! A body is bytes, and a signature with the types of its values. With the feature
//! `dbus-zvariant`, the crate `zvariant` makes bodies of any value. Names on the bus, match
//! rules and introspection are ordinary calls.
//!
//! | limit | default | as in |
//! |---|---|---|
//! | bytes of a message | 134,217,728 | the specification |
//! | bytes of a line | 16,384 | libdbus |
//! | descriptors of a message | 16 | libdbus, `max_message_unix_fds` |
//! | time for the authentication | 30 s | dbus-daemon, `auth_timeout` |
//! | authentications that fail | 6 | libdbus |
//! | time for the rest of a message whose descriptors have come | 150 s | dbus-daemon, `pending_fd_timeout` |
//! | calls that wait for an answer | 50,000 | the session bus, `max_replies_per_connection` |
//! | time for an answer | 25 s | libdbus |
//!
//! A message has as many descriptors as its header says. If more arrive with it, or if any
//! arrive with a line, the framing is broken, as the specification says. A message with
//! descriptors is sent in a call of its own, which suits every peer.
//!
//! # Examples
//!
//! A service to peers, and a client that calls it:
//!
//! ```
//! use std::os::unix::net::UnixStream;
//!
//! use bowline::{Reactor, Transports, UnixTransport};
//! use bowline_peers::dbus::{
//!     DbusAnswer, DbusCaller, DbusContext, DbusHandler, DbusHeader, DbusMessage, DbusRole,
//!     DbusSettings, connection,
//! };
//!
//! struct Files;
//!
//! impl<T: UnixTransport> DbusHandler<T> for Files {
//!     fn call_received(&mut self, cx: &mut DbusContext<'_, '_, T, Self>, call: &DbusMessage<'_>) {
//!         let file = std::fs::File::open("/dev/null").expect("Linux has it");
//!         // A value of the type `h` is an index into the descriptors.
//!         let index = 0_u32.to_ne_bytes();
//!         let sent = cx.reply(&DbusCaller::of(call), "h", &index, vec![file.into()]);
//!         assert!(sent.is_ok(), "{sent:?}");
//!     }
//! }
//!
//! struct Client;
//!
//! impl<T: UnixTransport> DbusHandler<T> for Client {
//!     fn ready(&mut self, cx: &mut DbusContext<'_, '_, T, Self>) {
//!         let open = DbusHeader::call("/files", "Open").interface("com.example.Files");
//!         let sent = cx.call(&open, &[], Vec::new(), |_, cx, answer| {
//!             assert!(matches!(answer, DbusAnswer::Return(_)), "{answer:?}");
//!             assert_eq!(cx.descriptors().count(), 1);
//!             cx.reactor().stop().expect("it runs");
//!         });
//!         assert!(sent.is_ok(), "{sent:?}");
//!     }
//! }
//!
//! let (ours, theirs) = UnixStream::pair()?;
//! let mut reactor = Reactor::new()?;
//! let settings = DbusSettings::default;
//! reactor.adopt_unix_stream(ours.into(), connection(DbusRole::Service, settings(), Files))?;
//! reactor.adopt_unix_stream(theirs.into(), connection(DbusRole::Client, settings(), Client))?;
//! reactor.run()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::io::Read as _;
use std::time::Duration;

use bowline::framing::Framed;
use bowline::{UnixAddress, UnixTransport};

mod auth;
#[cfg(feature = "dbus-zvariant")]
mod bodies;
mod framer;
mod message;
mod names;
mod peer;

#[cfg(feature = "dbus-zvariant")]
pub use self::bodies::DbusBody;
pub use self::framer::DbusFramer;
pub use self::message::{ByteOrder, DbusHeader, DbusKind, DbusMessage, LONGEST_MESSAGE};
pub use self::peer::{DbusAnswer, DbusCaller, DbusContext, DbusError, DbusHandler, DbusPeer};
/// The crate that makes bodies of values.
#[cfg(feature = "dbus-zvariant")]
pub use zvariant;

/// The protocol of a D-Bus connection, as [`connection`] makes it.
pub type Dbus<T, H> = Framed<DbusFramer, DbusPeer<T, H>>;

/// The side of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DbusRole {
    /// A client of a bus. It first asks the bus for a name.
    Bus,
    /// The side that has connected to a peer.
    Client,
    /// The side that a peer has connected to.
    Service,
}

/// The limits of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DbusSettings {
    /// How many descriptors a message may have, in either direction; default 16, as on
    /// buses. With 0, no descriptors are passed, and the other side is told so.
    pub max_descriptors: usize,
    /// How many bytes a received message may have. The default is the most that is
    /// possible, 134,217,728.
    pub max_length: usize,
    /// How many calls may wait for an answer; default 50,000.
    pub max_waiting_calls: usize,
    /// How long an answer may take; default 25 seconds. `None` sets no limit.
    pub call_deadline: Option<Duration>,
    /// How long the authentication may take; default 30 seconds.
    pub authentication_deadline: Duration,
    /// How long the rest of a message may take once its descriptors have arrived; default
    /// 150 seconds. `None` sets no limit.
    pub descriptor_deadline: Option<Duration>,
    /// The GUID of a service: 32 hexadecimal digits. The default is random.
    pub guid: String,
}

impl Default for DbusSettings {
    fn default() -> Self {
        Self {
            max_descriptors: 16,
            max_length: LONGEST_MESSAGE,
            max_waiting_calls: 50_000,
            call_deadline: Some(Duration::from_secs(25)),
            authentication_deadline: Duration::from_secs(30),
            descriptor_deadline: Some(Duration::from_secs(150)),
            guid: random_guid(),
        }
    }
}

impl DbusSettings {
    /// Sets [`max_descriptors`](Self#structfield.max_descriptors).
    #[must_use]
    pub fn max_descriptors(mut self, count: usize) -> Self {
        self.max_descriptors = count;
        self
    }

    /// Sets [`max_length`](Self#structfield.max_length).
    #[must_use]
    pub fn max_length(mut self, bytes: usize) -> Self {
        self.max_length = bytes;
        self
    }

    /// Sets [`max_waiting_calls`](Self#structfield.max_waiting_calls).
    #[must_use]
    pub fn max_waiting_calls(mut self, count: usize) -> Self {
        self.max_waiting_calls = count;
        self
    }

    /// Sets [`call_deadline`](Self#structfield.call_deadline).
    #[must_use]
    pub fn call_deadline(mut self, deadline: Option<Duration>) -> Self {
        self.call_deadline = deadline;
        self
    }

    /// Sets [`authentication_deadline`](Self#structfield.authentication_deadline).
    #[must_use]
    pub fn authentication_deadline(mut self, deadline: Duration) -> Self {
        self.authentication_deadline = deadline;
        self
    }

    /// Sets [`descriptor_deadline`](Self#structfield.descriptor_deadline).
    #[must_use]
    pub fn descriptor_deadline(mut self, deadline: Option<Duration>) -> Self {
        self.descriptor_deadline = deadline;
        self
    }

    /// Sets [`guid`](Self#structfield.guid).
    #[must_use]
    pub fn guid(mut self, guid: impl Into<String>) -> Self {
        self.guid = guid.into();
        self
    }
}

/// Makes a protocol that speaks D-Bus in this role, and calls `handler`.
///
/// Give it to `connect`, to `listen` (one for each connection) or to `adopt`, with a UNIX
/// stream. A timer reaches the handler with [`Framed::call`] and [`DbusPeer::enter`].
pub fn connection<T: UnixTransport, H: DbusHandler<T>>(
    role: DbusRole,
    settings: DbusSettings,
    handler: H,
) -> Dbus<T, H> {
    DbusPeer::framed(role, settings, handler)
}

/// Returns the first UNIX address in a list of D-Bus addresses, as in
/// `DBUS_SESSION_BUS_ADDRESS`: `unix:path=/run/user/1000/bus,guid=...;unix:abstract=...`.
/// `None` if the list has no address that a client could connect to.
pub fn unix_address(addresses: &str) -> Option<UnixAddress> {
    addresses.split(';').find_map(|address| {
        address.strip_prefix("unix:")?.split(',').find_map(|pair| {
            let (key, value) = pair.split_once('=')?;
            let value = unescaped(value)?;
            match key {
                "path" => Some(UnixAddress::Path(value.into())),
                "abstract" => Some(UnixAddress::Abstract(value.into())),
                _ => None,
            }
        })
    })
}

/// Replaces `%` and two digits by the byte that they stand for.
fn unescaped(value: &str) -> Option<String> {
    let mut pieces = value.split('%');
    let mut bytes = pieces.next()?.as_bytes().to_vec();
    for piece in pieces {
        bytes.push(u8::from_str_radix(piece.get(..2)?, 16).ok()?);
        bytes.extend(&piece.as_bytes()[2..]);
    }
    String::from_utf8(bytes).ok()
}

fn random_guid() -> String {
    let mut bytes = [0_u8; 16];
    let source = std::fs::File::open("/dev/urandom");
    // Where there is none, zeros are as good as any: nothing is protected by it.
    let _ = source.and_then(|mut source| source.read_exact(&mut bytes));
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
