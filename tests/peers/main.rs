//! The framings of `bowline-peers`: one suite for all of them, and the programs that
//! nobody here wrote.

#[path = "../support/mod.rs"]
mod support;

// Each protocol uses a part of it.
#[allow(dead_code)]
mod programs;
#[allow(dead_code)]
#[macro_use]
mod suite;

mod dbus;
mod examples;
mod haproxy;
mod imsg;
mod node;
mod notify;
mod oci;
mod rules;
mod table;
mod varlink;
mod vhost_user;
mod wayland;
