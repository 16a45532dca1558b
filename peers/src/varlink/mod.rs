//! varlink: calls and answers in JSON, each followed by a zero byte. systemd's services
//! speak it.
//!
//! [`connection`] makes a protocol of a [`VarlinkHandler`], for either side
//! ([`VarlinkRole`]). It keeps calls and answers in order, accepts several answers to one
//! call (`more`), sends calls without an answer (`oneway`), and hands over the connection
//! after an `upgrade`. Interfaces and their descriptions are left to the program.
//!
//! Descriptors are an extension of systemd. A message does not say how many it has. It has
//! those that arrived with the read in which it ends, and refers to them by index. They are
//! off by default, as in sd-varlink: a peer that sends one is disconnected.
//!
//! | limit | default | as in |
//! |---|---|---|
//! | bytes of a message | 16,777,216 | sd-varlink |
//! | descriptors of a message | 0; at most 253 | sd-varlink |
//! | time for a message whose descriptors have come | 30 s | [`Framed`] |
//! | calls that wait for an answer | 1,024 | |
//! | time for an answer | 45 s | sd-varlink |
//!
//! # Examples
//!
//! A service that opens a file, and a client:
//!
//! ```
//! use std::os::unix::net::UnixStream;
//!
//! use bowline::{Reactor, Transports, UnixTransport};
//! use bowline_peers::varlink::serde_json::{Value, json};
//! use bowline_peers::varlink::{
//!     VarlinkAnswer, VarlinkCall, VarlinkContext, VarlinkHandler, VarlinkRole,
//!     VarlinkSettings, connection,
//! };
//!
//! struct Files;
//!
//! impl<T: UnixTransport> VarlinkHandler<T> for Files {
//!     fn call_received(&mut self, cx: &mut VarlinkContext<'_, '_, T, Self>, _: &VarlinkCall<'_>) {
//!         let file = std::fs::File::open("/dev/null").expect("Linux has it");
//!         let sent = cx.reply(&json!({"fileDescriptor": 0}), vec![file.into()]);
//!         assert!(sent.is_ok(), "{sent:?}");
//!     }
//! }
//!
//! struct Client;
//!
//! impl<T: UnixTransport> VarlinkHandler<T> for Client {
//!     fn ready(&mut self, cx: &mut VarlinkContext<'_, '_, T, Self>) {
//!         let open = VarlinkCall::new("com.example.files.Open");
//!         let sent = cx.call(&open, Vec::new(), |_, cx, answer| {
//!             let VarlinkAnswer::Reply(reply) = answer else { panic!("{answer:?}") };
//!             let results: Value = reply.results().expect("it is JSON");
//!             assert_eq!(results["fileDescriptor"], 0);
//!             assert_eq!(cx.descriptors().count(), 1);
//!             cx.reactor().stop().expect("it runs");
//!         });
//!         assert!(sent.is_ok(), "{sent:?}");
//!     }
//! }
//!
//! let (ours, theirs) = UnixStream::pair()?;
//! let settings = || VarlinkSettings::default().max_descriptors(1);
//! let mut reactor = Reactor::new()?;
//! let service = connection(VarlinkRole::Service, settings(), Files);
//! reactor.adopt_unix_stream(ours.into(), service)?;
//! let client = connection(VarlinkRole::Client, settings(), Client);
//! reactor.adopt_unix_stream(theirs.into(), client)?;
//! reactor.run()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::time::Duration;

use bowline::UnixTransport;
use bowline::framing::Framed;

mod message;
mod peer;

pub use self::message::{LONGEST_MESSAGE, VarlinkCall, VarlinkFramer, VarlinkReply};
pub use self::peer::{VarlinkAnswer, VarlinkContext, VarlinkHandler, VarlinkPeer};
/// The crate that reads and writes JSON.
pub use serde_json;

/// The protocol of a varlink connection, as [`connection`] makes it.
pub type Varlink<T, H> = Framed<VarlinkFramer, VarlinkPeer<T, H>>;

/// The side of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VarlinkRole {
    /// The side that calls.
    Client,
    /// The side that answers.
    Service,
}

/// The limits of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VarlinkSettings {
    /// How many descriptors a message may have, in either direction; default 0, at most 253.
    pub max_descriptors: usize,
    /// How many bytes a message may have; default 16 MiB.
    pub max_length: usize,
    /// How many calls may wait for an answer; default 1,024.
    pub max_waiting_calls: usize,
    /// How long an answer may take; default 45 seconds. `None` sets no limit. A call with
    /// [`more`](VarlinkCall::more) never has one.
    pub call_deadline: Option<Duration>,
}

impl Default for VarlinkSettings {
    fn default() -> Self {
        Self {
            max_descriptors: 0,
            max_length: LONGEST_MESSAGE,
            max_waiting_calls: 1_024,
            call_deadline: Some(Duration::from_secs(45)),
        }
    }
}

impl VarlinkSettings {
    /// Sets [`max_descriptors`](Self#structfield.max_descriptors).
    #[must_use]
    pub fn max_descriptors(mut self, count: usize) -> Self {
        self.max_descriptors = count.min(message::MOST_DESCRIPTORS);
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
}

/// Makes a protocol that speaks varlink in this role, and calls `handler`.
///
/// Give it to `connect`, to `listen` (one for each connection) or to `adopt`, with a UNIX
/// stream. A timer reaches the handler with [`Framed::call`] and [`VarlinkPeer::enter`].
pub fn connection<T: UnixTransport, H: VarlinkHandler<T>>(
    role: VarlinkRole,
    settings: VarlinkSettings,
    handler: H,
) -> Varlink<T, H> {
    VarlinkPeer::framed(role, settings, handler)
}
