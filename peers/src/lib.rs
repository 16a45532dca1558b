//! Ready framings for [bowline] of protocols that pass open descriptors between
//! processes.
//!
//! A module is one protocol: how its messages are cut out of the bytes and which
//! descriptors belong to each, as a pure [`Framer`](bowline::framing::Framer) and
//! [`FrameEncoder`](bowline::framing::FrameEncoder), and a thin protocol around both, to be
//! served or spoken over a [`Unix`](bowline::Unix) connection. What the messages mean is
//! the program's.
//!
//! Each module is behind the feature of its name. None is on by default, and the crate
//! `bowline` does not re-export them: a program depends on `bowline-peers`, and names
//! `bowline_peers::notify`.
//!
//! | module | protocol | a message has the descriptors that | peers |
//! |---|---|---|---|
//! | `imsg` | imsg of OpenBSD and tmux, both dialects | says that it has, in order | `tmux`, as server and as client |
//! | `haproxy` | HAProxy's listeners (`_getsocks`) and connections (`sockpair@`), both sides | has a record or two bytes for, in order | `haproxy`, on either side |
//! | `node` | Node's IPC with handles, both ends; workers of its `cluster` | is a `NODE_HANDLE` | `node`, as parent, child and primary |
//! | `dbus` | D-Bus: a client of a bus, or of a peer; a service to peers | are claimed by the number in its header | dbus-daemon, libdbus, GDBus, sd-bus |
//! | `oci` | the console socket of OCI runtimes | is the one of its connection | `runc` |
//! | `varlink` | varlink, client and service | came with the read in which it ends | asyncvarlink |
//! | `wayland` | Wayland's wire, client and compositor | has arguments of that type, by its object's interface | libwayland in `wayland-info` and weston, as client and as compositor |
//! | `vhost_user` | vhost-user, front-end and back-end | has by its kind and payload | QEMU, as front-end and as back-end |
//! | `notify` | sd_notify(3), both sides | came with its datagram | `systemd-notify`, libsystemd |
//!
//! # What holds for each
//!
//! - A message is delivered with exactly its descriptors, wherever the kernel cuts or
//!   glues the bytes, as far as its protocol says which those are.
//! - Descriptors that no message has are closed. How many may wait, and how long, is
//!   bounded in every phase of a protocol.
//! - Limits are settings, and their defaults are those of the protocol's reference
//!   implementation. What a peer would choke on is refused before it is sent, and the
//!   descriptors come back in the error.
//! - What the peer has sent is delivered to its end, though nothing can be sent to it any
//!   more.
//!
//! [bowline]: https://docs.rs/bowline

#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

#[cfg(feature = "dbus")]
pub mod dbus;
#[cfg(feature = "haproxy")]
pub mod haproxy;
#[cfg(feature = "imsg")]
pub mod imsg;
#[cfg(feature = "node")]
pub mod node;
#[cfg(feature = "notify")]
pub mod notify;
#[cfg(feature = "oci")]
pub mod oci;
#[cfg(any(feature = "dbus", feature = "varlink"))]
mod refused;
#[cfg(feature = "varlink")]
pub mod varlink;
#[cfg(feature = "vhost-user")]
pub mod vhost_user;
#[cfg(feature = "wayland")]
pub mod wayland;
