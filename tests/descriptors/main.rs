//! Passing descriptors, with raw sockets or another transport at the other end.

#[path = "../support/mod.rs"]
mod support;

mod peer;

mod closing;
mod exact;
mod figures;
mod framed;
mod hostile;
mod limits;
mod memory;
mod protocols;
mod random;
mod receiving;
mod sending;
