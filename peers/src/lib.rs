//! Framings and protocols for [bowline] to talk to programs that pass open descriptors
//! between processes.
//!
//! Each module is one protocol. A pure [`Framer`](bowline::framing::Framer) and
//! [`FrameEncoder`](bowline::framing::FrameEncoder) find its messages in the bytes, and the
//! descriptors that belong to each. A thin protocol around them is served or connected over
//! a [`Unix`](bowline::Unix) connection. The program decides what the messages mean.
//!
//! Each module is behind the feature of its name. None is on by default, and the crate
//! `bowline` does not re-export them. A program depends on `bowline-peers`, and uses
//! `bowline_peers::notify`, for example.
//!
//! | module | protocol | descriptors of a message | peers |
//! |---|---|---|---|
//! | `imsg` | imsg of OpenBSD and tmux, both dialects | one if its flag says so, in order | `tmux`, as server and as client |
//! | `haproxy` | HAProxy's listeners (`_getsocks`) and connections (`sockpair@`), both sides | one for each record or two-byte message, in order | `haproxy`, on either side |
//! | `node` | Node's IPC with handles, both ends; workers of its `cluster` | one if it is a `NODE_HANDLE` | `node`, as parent, child and primary |
//! | `dbus` | D-Bus: a client of a bus, or of a peer; a service to peers | as many as its header says | dbus-daemon, libdbus, GDBus, sd-bus |
//! | `oci` | the console socket of OCI runtimes | exactly one | `runc` |
//! | `varlink` | varlink, client and service | those that came with the read in which it ends | asyncvarlink |
//! | `wayland` | Wayland's wire, client and compositor | one for each argument of that type, by its object's interface | libwayland in `wayland-info` and weston, as client and as compositor |
//! | `vhost_user` | vhost-user, front-end and back-end | as many as its kind and payload say | QEMU, as front-end and as back-end |
//! | `notify` | sd_notify(3), both sides | those that came with its datagram | `systemd-notify`, libsystemd |
//!
//! # What all of them promise
//!
//! - A message is delivered with exactly its descriptors, as far as its protocol says which
//!   those are. It does not matter where the kernel splits or joins the bytes.
//! - Descriptors that belong to no message are closed. How many may wait, and how long, is
//!   bounded in every phase of a protocol.
//! - Limits are settings. Their defaults are those of the protocol's reference
//!   implementation. What a peer could not handle is refused before it is sent; the error
//!   returns the descriptors.
//! - Everything that the peer has sent is delivered, even if nothing can be sent to it any
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
