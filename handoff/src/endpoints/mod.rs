//! Endpoints as strings, for command lines and configuration files.
//!
//! | To listen | |
//! |---|---|
//! | `tcp:8080`, `tcp:HOST:8080` | TCP at this port; `host=` (or `interface=`), an IP address; default `0.0.0.0`. `backlog=`; `reuseport=1`, `nodelay=1`, `keepalive=1` |
//! | `tcp6:8080` | the same; the default address is `::`, and IPv4 is not served |
//! | `unix:/run/x.sock` | UNIX, at a path; `mode=660` in octal, `backlog=` |
//! | `unix-abstract:NAME` | UNIX, at an abstract name; `backlog=` |
//! | `systemd:name=web`, `systemd:index=0` | a listening socket that systemd passed ([`systemd`](crate::systemd)); `domain=`, one of `INET`, `INET6`, `UNIX`, has to fit |
//! | `fd:3` | a listening socket that this process was started with ([`take_granted`]) |
//! | `inherited:NAME` | one of [`Inherited`]; see [`ServerEndpoint::claim`] |
//!
//! | To connect | |
//! |---|---|
//! | `tcp:HOST:PORT` | TCP, to an IP address or a host by its name; `timeout=` in seconds, `bind=` (or `bindAddress=`), an address and optionally a port; `nodelay=1`, `keepalive=1` |
//! | `unix:/run/x.sock`, `unix-abstract:NAME` | UNIX; `timeout=` |
//!
//! Each argument has a name, which may be given: `tcp:port=8080`, `unix:path=/run/x.sock`.
//! A backslash escapes a colon, an equals sign or a backslash in an argument ([`quote`]
//! does that). An IPv6 address may be in brackets instead: `tcp:[::1]:8080`.
//!
//! [`ServerEndpoint`] and [`ClientEndpoint`] are parsed from these strings. Give them to
//! [`listen`](bowline_transport::Transports::listen) and
//! [`connect`](bowline_transport::Transports::connect) like any other endpoint. A factory
//! has to serve both TCP and UNIX connections. [`EndpointKinds`] lets a program add kinds.
//! (Twisted: `serverFromString`, `clientFromString`.)
//!
//! # Examples
//!
//! ```
//! use bowline::endpoint::ServerEndpoint;
//! use bowline::{Address, Context, Protocol, Reactor, Transport, Transports};
//!
//! struct Echo;
//!
//! impl<T: Transport> Protocol<T> for Echo {
//!     fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
//!         cx.transport.write(data);
//!     }
//! }
//!
//! let endpoint: ServerEndpoint = "tcp:127.0.0.1:0".parse()?;
//! let mut reactor = Reactor::new()?;
//! reactor.listen(endpoint, |_: &Address| Echo)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod client;
mod error;
mod kinds;
mod server;
mod syntax;

pub use self::client::{ClientEndpoint, LayeredClientEndpoint};
pub use self::error::EndpointError;
pub use self::kinds::{EndpointFactory, EndpointKinds};
pub use self::server::{LayeredServerEndpoint, ServerEndpoint};
pub use self::syntax::{EndpointArgument, EndpointArguments, quote};

use std::net::{IpAddr, SocketAddr};

#[cfg(doc)]
use crate::Inherited;
#[cfg(doc)]
use bowline_transport::take_granted;

/// What a port is, for error messages.
const PORT: &str = "port, which is a number up to 65535";

/// Makes the error for an unknown kind, or for one with another name.
fn unknown_kind(arguments: &EndpointArguments, known: &[&str]) -> EndpointError {
    let kind = arguments.kind();
    let text = arguments.as_str();
    let hint = if text.parse::<SocketAddr>().is_ok() || kind.parse::<IpAddr>().is_ok() {
        format!("; write tcp:{text}")
    } else if !kind.is_empty() && kind.bytes().all(|byte| byte.is_ascii_digit()) {
        format!("; write tcp:{kind}")
    } else if text.starts_with(['/', '.']) {
        format!("; write unix:{text}")
    } else {
        String::new()
    };
    let known = known.join(", ");
    arguments.error_at_kind(format!(
        "{kind:?} is no kind of endpoint, which are {known}{hint}"
    ))
}
